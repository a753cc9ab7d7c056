"""Resolve the media that a row names: paths within media_root, and data URIs.

Nothing outside media_root is reached, and only what the recipe allows to be fetched (a `Remote`) uses the network.
"""

import base64
import errno
import os
import re
import stat

from PIL import Image

from qwen3vl_train.data.errors import MediaFault
from qwen3vl_train.data.media.remote import Remote, is_web_address

ImageInput = str | bytes | Image.Image | Remote
"""A path, a `data:` URI, the bytes of an encoded image, a PIL image, or something to be fetched."""
VideoInput = str | bytes | Remote
"""A path, a `data:` URI, the bytes of a video file, or something to be fetched."""

_NOT_FOUND = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


def describe(medium: ImageInput, kind: str = "image") -> str:
    """Describe a medium in messages: its path (shortened), or its type. kind: 'image' or 'video'."""
    if isinstance(medium, str):
        return "data URI" if medium.startswith("data:") else f"{kind} {medium[:200]}{'...' * (len(medium) > 200)}"
    if isinstance(medium, bytes):
        return f"{kind} of {len(medium)} bytes"
    if isinstance(medium, Remote):
        return f"{kind} {medium}"
    return f"PIL image of {medium.width}x{medium.height}"


def resolve_path(path: str, media_root: str | os.PathLike[str] | None, kind: str = "image") -> str:
    """Return the real path of a media file. Raise MediaFault for URLs and paths outside media_root.

    Relative paths start in media_root, and nothing outside it is reached, be it by `..`, an absolute path or a symbolic
    link. Without a media_root, any local path is accepted.
    """
    name = describe(path, kind)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", path)
    if scheme:
        remedy = " or set allow_urls: true" if is_web_address(path) else ""
        fault = f"{name}: is a {scheme[1]} URL and nothing is downloaded; give a local path{remedy}"
        raise MediaFault(fault, kind="forbidden_path")
    if "\0" in path or not path:
        raise MediaFault(f"{name}: is not a path; give the path of a file")
    if media_root is None:
        return os.path.realpath(path)
    root = os.path.realpath(media_root)
    real = os.path.realpath(os.path.join(root, path))
    if os.path.commonpath([root, real]) != root:
        fault = f"{name}: is outside media_root {os.fspath(media_root)}; move the file into it"
        raise MediaFault(fault, kind="forbidden_path")
    return real


def find_file(path: str, media_root: str | os.PathLike[str] | None, kind: str = "image") -> str:
    """Return the real path of a media file that exists and is not empty. Raise MediaFault, as `resolve_path` does."""
    name, real = describe(path, kind), resolve_path(path, media_root, kind)
    try:
        status = os.stat(real)
    except OSError as error:
        if error.errno not in _NOT_FOUND:
            raise unreadable(name, error.strerror) from None
        fault = f"{name}: no such file ({real}); check the path and media_root"
        raise MediaFault(fault, kind="missing_file") from None
    if not stat.S_ISREG(status.st_mode):
        raise MediaFault(f"{name}: is not a file ({real}); check the path and media_root", kind="missing_file")
    if status.st_size == 0:
        raise MediaFault(f"{name}: is empty (0 bytes); copy the file again")
    return real


def decode_data_uri(uri: str, kind: str = "image") -> bytes:
    """Return the bytes of a base64 data URI. Raise MediaFault."""
    header, comma, body = uri.partition(",")
    if not comma or not header.endswith(";base64"):
        mime_type = "image/png" if kind == "image" else "video/mp4"
        raise MediaFault(f"data URI: is not base64; write data:{mime_type};base64,...")
    try:
        return base64.b64decode(body, validate=True)
    except ValueError as error:
        raise MediaFault(f"data URI: is not base64 ({error}); encode the {kind} again") from None


def path_or_bytes(medium: VideoInput, media_root: str | os.PathLike[str] | None, kind: str = "image") -> str | bytes:
    """Return the real path of a local file, or the bytes of any other medium. Raise MediaFault."""
    if isinstance(medium, str) and not medium.startswith("data:"):
        return find_file(medium, media_root, kind)
    if isinstance(medium, Remote):
        return medium.fetch()
    data = decode_data_uri(medium, kind) if isinstance(medium, str) else medium
    if not data:
        article = "an image" if kind == "image" else "a video"
        raise MediaFault(f"{describe(medium, kind)}: is empty; give the bytes of {article} file")
    return data


def too_large(name: str, size: str, unit: str = "pixels") -> MediaFault:
    limit = f"{Image.MAX_IMAGE_PIXELS} {unit}, Pillow's limit against decompression bombs"
    return MediaFault(f"{name}: {size} is more than {limit}; shrink the file", kind="unsupported_media")


def unreadable(name: str, reason: str | None) -> MediaFault:
    """Return the fault of a disk or of its permissions, which may be gone at the next attempt."""
    fault = f"{name}: cannot be read ({reason}); check disk and permissions"
    return MediaFault(fault, kind="read_error", transient=True)
