"""Resolve the media that a row names: paths within media_root, `file://` and data URIs, and base64 text.

Nothing outside media_root is reached, and only what the recipe allows to be fetched (a `Remote`) uses the network.
"""

import base64
import contextlib
import errno
import os
import re
import stat
from pathlib import Path
from urllib.parse import unquote

from PIL import Image

from qwen3vl_train.data.errors import MediaFault
from qwen3vl_train.data.media.remote import Remote, is_web_address
from qwen3vl_train.public_names import public_name

ImageInput = str | bytes | Image.Image | Remote
"""A path, a `file://` or `data:` URI, base64 text, the bytes of an encoded image, a PIL image, or one to be fetched."""
VideoInput = str | bytes | Remote
"""A path, a `file://` or `data:` URI, the bytes of a video file, or something to be fetched."""

_BASE64_MAGIC = re.compile(r"iVBORw0KGgo|/9j/|R0lGOD[dl]h|UklGR.{6}XRUJQ|Qk.{6}AAAA|SUkqA|TU0AK")
"""The base64 of how files begin: PNG, JPEG, GIF, WebP, BMP, TIFF in both byte orders."""
_BASE64_TEXT = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_MIN_BASE64 = 44
"""Characters; a GIF of one pixel has 48. What is shorter is a path."""
_HUB_FOLDER = re.compile(r"(datasets|models|spaces)--.+")
"""Of one repository in the Hub's cache: its snapshots are links to its blobs."""


class LinkedRoot(str):
    """A media_root within which symbolic links are followed, wherever they lead."""


_NOT_FOUND = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


def describe(medium: ImageInput, kind: str = "image") -> str:
    """Describe a medium in messages: its path (shortened), or its type. kind: 'image' or 'video'."""
    if isinstance(medium, str):
        if is_base64(medium):
            return f"{kind} in base64"
        return "data URI" if medium.startswith("data:") else f"{kind} {_shortened(public_name(medium))}"
    if isinstance(medium, bytes):
        return f"{kind} of {len(medium)} bytes"
    if isinstance(medium, Remote):
        return f"{kind} {medium}"
    return f"PIL image of {medium.width}x{medium.height}"


def _shortened(name: str) -> str:
    return f"{name[:200]}{'...' * (len(name) > 200)}"


def is_base64(medium: str) -> bool:
    """Return whether a string is the base64 text of an image: long, of its alphabet alone, with a known beginning.

    Does not exclude that a file has this name, see `path_or_bytes`.
    """
    return len(medium) >= _MIN_BASE64 and bool(_BASE64_MAGIC.match(medium) and _BASE64_TEXT.fullmatch(medium))


def local_path(medium: str, media_root: str | os.PathLike[str] | None) -> str | None:
    """Return the path of a medium that is a file or a folder on this machine, unchecked; None for any other."""
    if medium.startswith("data:"):
        return None
    with contextlib.suppress(MediaFault):
        medium = _path_of_uri(medium, "image")
    if _SCHEME.match(medium) and not medium.lower().startswith("file://"):  # an address, which `resolve_path` refuses
        return None
    path = os.path.join(media_root or "", medium)
    return None if is_base64(medium) and not _exists(path) else path


def _path_of_uri(path: str, kind: str) -> str:
    """Return the path of a `file://` URI, other strings unchanged. Raise MediaFault for another machine's.

    A path that is not percent-encoded, as some tools write it, is taken as it is where it exists.
    """
    if path[:7].lower() != "file://" or "::" in path:  # a chain of fsspec's, which is no path
        return path
    host, slash, rest = path[7:].partition("/")
    if not slash or host.lower() not in ("", "localhost"):
        fault = f"{describe(path, kind)}: names the machine {host!r}; write file:///folder/file, or the path alone"
        raise MediaFault(fault, kind="forbidden_path")
    return f"/{rest}" if _exists(f"/{rest}") else unquote(f"/{rest}")


def _exists(path: str) -> bool:
    try:
        return os.path.exists(path)
    except ValueError:  # a zero byte, or characters that no file name has
        return False


def resolve_path(path: str, media_root: str | os.PathLike[str] | None, kind: str = "image") -> str:
    """Return the real path of a media file or folder. Raise MediaFault for URLs and paths outside media_root.

    Relative paths start in media_root, and nothing outside it is reached, be it by `..`, an absolute path or a symbolic
    link. Three kinds of links are followed: one that is the media_root itself, all that lie in a `LinkedRoot`, and
    those of the Hub's cache, from a snapshot of a repository to the blobs of the same one. Without a media_root, any
    local path is accepted.
    """
    name, path = describe(path, kind), _path_of_uri(path, kind)
    scheme = _SCHEME.match(path)
    if scheme:
        remedy = " or set allow_urls: true" if is_web_address(path) else ""
        fault = f"{name}: is a {scheme[1]} URL and nothing is downloaded; give a local path{remedy}"
        raise MediaFault(fault, kind="forbidden_path")
    if "\0" in path or not path:
        raise MediaFault(f"{name}: is not a path; give the path of a file")
    if media_root is None:
        return os.path.realpath(path)
    root = os.path.realpath(media_root)
    joined = os.path.join(root, path)
    real = os.path.realpath(joined)
    if os.path.commonpath([root, real]) == root:
        return real
    if os.path.commonpath([root, os.path.normpath(joined)]) == root:  # it leaves by a link
        if isinstance(media_root, LinkedRoot):
            return os.path.realpath(os.path.normpath(joined))  # `..` is that of the path, not of a link's target
        if _is_hub_blob(root, real):
            return real
        fault = f"{name}: is a link to {real}, outside media_root {os.fspath(media_root)}"
        fault += "; set data.follow_links: true if the link is yours, or copy the file into it"
        raise MediaFault(fault, kind="forbidden_path")
    fault = f"{name}: is outside media_root {os.fspath(media_root)}; move the file into it"
    raise MediaFault(fault, kind="forbidden_path")


def _is_hub_blob(root: str, real: str) -> bool:
    """Return whether a folder is in a snapshot of a cached repository, and a file is one of the same one's blobs."""
    for repository in Path(root).parents:
        if _HUB_FOLDER.fullmatch(repository.name):
            is_snapshot = Path(root).is_relative_to(repository / "snapshots")
            return is_snapshot and Path(real).is_relative_to(repository / "blobs")
    return False


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
    """Return the bytes of a base64 data URI; line breaks and blanks in it are skipped. Raise MediaFault."""
    header, comma, body = uri.partition(",")
    if not comma or not header.rstrip().lower().endswith(";base64"):
        mime_type = "image/png" if kind == "image" else "video/mp4"
        raise MediaFault(f"data URI: is not base64; write data:{mime_type};base64,...")
    return _decode_base64(body, "data URI", kind)


def _decode_base64(text: str, name: str, kind: str) -> bytes:
    try:
        with contextlib.suppress(ValueError):
            return base64.b64decode(text, validate=True)
        return base64.b64decode("".join(text.split()), validate=True)  # as `base64` and MIME write it
    except ValueError as error:
        raise MediaFault(f"{name}: is not base64 ({error}); encode the {kind} again") from None


def path_or_bytes(medium: VideoInput, media_root: str | os.PathLike[str] | None, kind: str = "image") -> str | bytes:
    """Return the real path of a local file, or the bytes of any other medium. Raise MediaFault."""
    if isinstance(medium, Remote):
        return medium.fetch()
    if isinstance(medium, bytes):
        data = medium
    elif medium.startswith("data:"):
        data = decode_data_uri(medium, kind)
    elif is_base64(medium) and not _exists(os.path.join(media_root or "", medium)):
        data = _decode_base64(medium, describe(medium, kind), kind)
    else:
        return find_file(medium, media_root, kind)
    if not data:
        article = "an image" if kind == "image" else "a video"
        raise MediaFault(f"{describe(medium, kind)}: is empty; give the bytes of {article} file")
    return data


def check_area(name: str, height: int, width: int, max_pixels: int | None, unit: str = "pixels") -> None:
    """Raise MediaFault for a picture of more pixels than `data.max_image_pixels`. None: than Pillow's own limit."""
    limit = Image.MAX_IMAGE_PIXELS if max_pixels is None else max_pixels
    if limit is not None and height * width > limit:
        raise too_large(name, f"{width}x{height}", max_pixels, unit)


def too_large(name: str, size: str, max_pixels: int | None, unit: str = "pixels") -> MediaFault:
    """Return the fault of a picture whose size, in words, is beyond `check_area`'s limit."""
    if max_pixels is None:
        limit = f"{Image.MAX_IMAGE_PIXELS} {unit}, Pillow's limit against decompression bombs"
    else:
        limit = f"{max_pixels} {unit}, data.max_image_pixels"
    fault = f"{name}: {size} is more than {limit}; shrink the file, or raise data.max_image_pixels if you trust it"
    return MediaFault(fault, kind="unsupported_media")


def unreadable(name: str, reason: str | None) -> MediaFault:
    """Return the fault of a disk or of its permissions, which may be gone at the next attempt."""
    fault = f"{name}: cannot be read ({reason}); check disk and permissions"
    return MediaFault(fault, kind="read_error", transient=True)
