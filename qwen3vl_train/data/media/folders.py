"""Clips that are a folder of images, one for each frame."""

import os
import re

from qwen3vl_train.data.errors import MediaFault
from qwen3vl_train.data.media.paths import describe, local_path, resolve_path, unreadable

_ENDINGS = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif", ".heic",
    ".heif",
)  # fmt: skip
_MAX_FRAMES = 100_000
"""Images in a folder: almost an hour at 30 a second. Each row that names the folder lists it."""


def is_folder(path: str, media_root: str | os.PathLike[str] | None) -> bool:
    """Return whether a path that a row gives as a video is a folder. Raise MediaFault, as `resolve_path` does."""
    return local_path(path, media_root) is not None and os.path.isdir(resolve_path(path, media_root, "video"))


def list_frames(folder: str, media_root: str | os.PathLike[str] | None) -> tuple[str, ...]:
    """Return the paths of the images in a folder, by name and numbers: 2.png before 10.png. Raise MediaFault.

    Hidden files and those whose ending is not an image's are not frames, and folders within are not entered.
    """
    name, names = describe(folder, "video"), []
    try:
        with os.scandir(resolve_path(folder, media_root, "video")) as entries:
            for entry in entries:
                if entry.name.lower().endswith(_ENDINGS) and not entry.name.startswith("."):
                    names.append(entry.name)
                if len(names) > _MAX_FRAMES:
                    fault = f"{name}: is a folder of more than {_MAX_FRAMES:,} images; split it"
                    raise MediaFault(fault, kind="unsupported_media")
    except OSError as error:
        raise unreadable(name, error.strerror) from None
    if len(names) < 2:
        fault = f"{name}: is a folder of {len(names)} images ({', '.join(_ENDINGS)}), a clip needs 2; check the path"
        raise MediaFault(fault)
    return tuple(os.path.join(folder, one) for one in sorted(names, key=_natural))


def _natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """Return a key that sorts numbers within names by value. "f10.png" -> (-1, "f"), (10, "")."""
    pieces = [piece for piece in re.split(r"([0-9]+)", os.path.splitext(name)[0]) if piece]
    return [(int(piece), "") if piece[0] in "0123456789" else (-1, piece.casefold()) for piece in pieces], name
