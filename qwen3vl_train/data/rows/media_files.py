"""The media files of a row on this machine, and their signature."""

import os
from collections.abc import Iterator
from typing import Any

from qwen3vl_train.data.media.remote import Remote
from qwen3vl_train.data.rows.sample import ImagePart, Sample, VideoPart
from qwen3vl_train.data.signatures import hash_files


def local_files(sample: Sample) -> list[str]:
    """Return the paths of all media of a sample that are local files, in order."""
    paths = [medium for medium in media_of(sample) if isinstance(medium, str) and not medium.startswith("data:")]
    return [os.path.join(sample.media_root or "", path) for path in paths]


def is_fetched(sample: Sample) -> bool:
    """Return whether any of a sample's media is downloaded, so that no change of it is noticed here."""
    return any(isinstance(medium, Remote) for medium in media_of(sample))


def media_of(sample: Sample) -> Iterator[Any]:
    """Yield the source of every image and video, and of every frame of a list."""
    for part in sample.parts:
        if isinstance(part, ImagePart):
            yield part.image
        elif isinstance(part, VideoPart):
            yield from part.video if isinstance(part.video, tuple) else (part.video,)


def media_signature(sample: Sample) -> int:
    """Return a hash of the present signatures of a sample's local media files."""
    return hash_files(local_files(sample))
