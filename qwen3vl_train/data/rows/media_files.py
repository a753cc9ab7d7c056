"""The media files of a row on this machine, and their signature."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from qwen3vl_train.data.errors import MediaFault
from qwen3vl_train.data.media.folders import list_frames
from qwen3vl_train.data.media.paths import local_path
from qwen3vl_train.data.media.remote import Remote
from qwen3vl_train.data.rows.sample import ImagePart, Sample, VideoPart
from qwen3vl_train.data.signatures import hash_files


def local_files(sample: Sample) -> list[str]:
    """Return the paths of all media of a sample that are local files, in order, and those of the frames in a folder."""
    files: list[str] = []
    clips = {part.video for part in sample.parts if isinstance(part, VideoPart) and isinstance(part.video, str)}
    for medium in media_of(sample):
        path = local_path(medium, sample.media_root) if isinstance(medium, str) else None
        if path is not None:
            files.append(path)
            if medium in clips and os.path.isdir(path):
                with contextlib.suppress(MediaFault):
                    files += list_frames(path, sample.media_root)
    return files


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
