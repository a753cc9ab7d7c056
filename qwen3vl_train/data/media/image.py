"""Find images, read their sizes from the header alone, decode them, and cut them into patches as Qwen3-VL does.

Everything a row of data may name goes through `open_image`; only what the recipe allows to be fetched (a `Remote`) is
reached over the network, and only the common raster formats are opened (some of Pillow's others start programs).
"""

import base64
import binascii
import contextlib
import errno
import math
import os
import re
import stat
import struct
import zlib
from collections.abc import Iterator
from functools import cache
from io import BytesIO
from typing import IO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from qwen3vl_train.data.errors import MediaFault
from qwen3vl_train.data.media.remote import Remote, is_web_address

ImageSource = str | bytes | Image.Image | Remote
"""A path, a `data:` URI, the bytes of an encoded image, a PIL image, or something to be fetched."""

PATCH = 16
MERGE = 2
FACTOR = PATCH * MERGE
MAX_ASPECT = 200

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_DAMAGE = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError, AttributeError, AssertionError,
    RuntimeError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow's readers raise on damaged input; seen in its sources and by feeding them damaged files."""

_STRIP_ROWS = 64
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


def name_of(source: ImageSource, kind: str = "image") -> str:
    """Name a source in messages: its path (shortened), or what kind of object it is. kind: 'image' or 'video'."""
    if isinstance(source, str):
        return "data URI" if source.startswith("data:") else f"{kind} {source[:200]}{'...' * (len(source) > 200)}"
    if isinstance(source, bytes):
        return f"{kind} of {len(source)} bytes"
    if isinstance(source, Remote):
        return f"{kind} {source}"
    return f"PIL image of {source.width}x{source.height}"


def locate(path: str, media_root: str | os.PathLike[str] | None, kind: str = "image") -> str:
    """Return the real path of a media file.

    With a media_root, relative paths start there and nothing outside it is reached, be it by `..`, by an absolute
    path or through a symbolic link. Without one, any local path will do. Raises MediaFault.
    """
    name = name_of(path, kind)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", path)
    if scheme:
        remedy = " or set allow_urls: true" if is_web_address(path) else ""
        raise MediaFault(
            f"{name}: is a {scheme[1]} URL and nothing is downloaded; give a local path{remedy}", kind="forbidden_path"
        )
    if "\0" in path or not path:
        raise MediaFault(f"{name}: is not a path; give the path of a file")
    if media_root is None:
        return os.path.realpath(path)
    root = os.path.realpath(media_root)
    real = os.path.realpath(os.path.join(root, path))
    if os.path.commonpath([root, real]) != root:
        raise MediaFault(
            f"{name}: leaves media_root {os.fspath(media_root)}; move the file into it", kind="forbidden_path"
        )
    return real


def open_image(source: ImageSource, media_root: str | os.PathLike[str] | None = None) -> Image.Image:
    """Open an image without decoding it; the caller closes it. Raises MediaFault for everything that is not one."""
    name = name_of(source)
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, str) and source.startswith("data:"):
        source = decode_data_uri(source)
    elif isinstance(source, Remote):
        source = source.fetch()
    if isinstance(source, bytes):
        if not source:
            raise MediaFault(f"{name}: is empty; give the bytes of an image file")
        return _identify(BytesIO(source), name)
    return _identify(find_file(source, media_root), name)


def find_file(path: str, media_root: str | os.PathLike[str] | None, kind: str = "image") -> str:
    """Return the real path of a media file that exists and is not empty. Raises MediaFault, as `locate` does."""
    name, real = name_of(path, kind), locate(path, media_root, kind)
    try:
        status = os.stat(real)
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise _unreadable(name, error, "damaged") from None
        raise MediaFault(f"{name}: no such file ({real}); check the path and media_root", kind="missing_file") from None
    if not stat.S_ISREG(status.st_mode):
        raise MediaFault(f"{name}: is not a file ({real}); check the path and media_root", kind="missing_file")
    if status.st_size == 0:
        raise MediaFault(f"{name}: is empty (0 bytes); copy the file again")
    return real


def decode_data_uri(uri: str, kind: str = "image") -> bytes:
    """Return the bytes that a base64 data URI holds. Raises MediaFault."""
    header, comma, body = uri.partition(",")
    if not comma or not header.endswith(";base64"):
        raise MediaFault(
            f"data URI: is not base64; write data:{'image/png' if kind == 'image' else 'video/mp4'};base64,..."
        )
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaFault(f"data URI: is not base64 ({error}); encode the {kind} again") from None


@cache
def _readable() -> tuple[str, ...]:
    Image.init()
    return tuple(kind for kind in _FORMATS if kind in Image.OPEN)


def _identify(file: str | IO[bytes], name: str) -> Image.Image:
    try:
        image = Image.open(file, formats=_readable())
    except Image.UnidentifiedImageError:
        raise MediaFault(
            f"{name}: is not an image of a known kind ({', '.join(_readable())}); convert it", kind="unsupported_media"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, _declared_size(file) or str(error)) from None
    except _DAMAGE as error:
        raise _unreadable(name, error, "damaged") from None
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        image.close()
        raise _too_large(name, f"{image.width}x{image.height}")
    return image


def _unreadable(name: str, error: BaseException, what: str) -> MediaFault:
    """Tell a disk or its permissions, whose errors have a number, from what is in a file."""
    if isinstance(error, OSError) and error.errno is not None:
        return MediaFault(
            f"{name}: cannot be read ({error.strerror}); check disk and permissions", kind="read_error", transient=True
        )
    return MediaFault(f"{name}: is {what} ({error}); replace the file")


def _too_large(name: str, size: str) -> MediaFault:
    return MediaFault(
        f"{name}: {size} is more than {Image.MAX_IMAGE_PIXELS} pixels, Pillow's limit against decompression bombs; "
        "shrink the file",
        kind="unsupported_media",
    )


def _declared_size(file: str | IO[bytes]) -> str | None:
    """Read the size of an image that Pillow refuses to open for its size; None where its reader itself refuses."""
    with open(file, "rb") if isinstance(file, str) else file as stream:
        for kind in _readable():
            make, accept = Image.OPEN[kind]
            stream.seek(0)
            if accept is None or accept(stream.read(16)) is True:
                stream.seek(0)
                with contextlib.suppress(*_DAMAGE):
                    width, height = make(stream, "").size
                    return f"{width}x{height}"
    return None


@contextlib.contextmanager
def _reading(source: ImageSource, media_root: str | os.PathLike[str] | None) -> Iterator[Image.Image]:
    """Open an image for reading, turn what Pillow raises into MediaFault, close what was opened here."""
    image, name = open_image(source, media_root), name_of(source)
    try:
        if image.width < 1 or image.height < 1:
            raise MediaFault(f"{name}: {image.width}x{image.height} has no pixels; replace it")
        if image.mode == "F" or image.mode.startswith("I"):
            raise MediaFault(
                f"{name}: mode {image.mode} has more than 8 bits and no stated range; convert it to 8 bits a channel",
                kind="unsupported_media",
            )
        yield image
    except MediaFault:
        raise
    except _DAMAGE as error:
        raise _unreadable(name, error, "truncated or damaged") from None
    finally:
        if image is not source:
            image.close()


def image_size(source: ImageSource, media_root: str | os.PathLike[str] | None = None) -> tuple[int, int]:
    """Return (height, width) as `load_rgb` will give them, from the header alone. Raises MediaFault."""
    with _reading(source, media_root) as image:
        width, height = image.size
        if image is not source and _header_orientation(image) in (5, 6, 7, 8):
            return width, height
        return height, width


def _header_orientation(image: Image.Image) -> int:
    """EXIF orientation (1..8) still to be applied to `image.size`, without decoding pixels where that can be."""
    if image.format == "TIFF" and ExifTags.Base.Orientation in image.tag_v2:  # type: ignore[attr-defined]
        return 1  # Pillow turns these itself, and their size is already the turned one
    if image.format == "PNG" and "exif" not in image.info and _png_metadata_behind_pixels(image):
        image.load()
    # Not image.getexif(): that of PNG decodes every image that has no EXIF block.
    return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)


def _png_metadata_behind_pixels(image: Image.Image) -> bool:
    """Say whether a PNG has an EXIF or XMP block behind its pixels. Leaves the file where it was."""
    file = image.fp  # type: ignore[attr-defined]
    place, seen_pixels, found = file.tell(), False, False
    file.seek(8)
    while len(header := file.read(8)) == 8 and not found:
        length, kind = struct.unpack(">I4s", header)
        start = file.read(min(length, 24)) if seen_pixels else b""
        seen_pixels |= kind == b"IDAT"
        found = kind == b"eXIf" or start.startswith((b"Raw profile type exif", b"XML:com.adobe.xmp"))
        file.seek(length + 4 - len(start), os.SEEK_CUR)
    file.seek(place)
    return found


def load_rgb(source: ImageSource, media_root: str | os.PathLike[str] | None = None) -> Tensor:
    """Decode an image to uint8 (3, H, W), a channels-last view. Raises MediaFault.

    EXIF orientation is applied to encoded images, not to PIL objects, and transparency is laid on white, as
    transformers' Qwen2VLImageProcessor does. Grey, palette and CMYK images convert. Of an animation: the first frame.
    """
    with _reading(source, media_root) as image:
        if image is not source:
            ImageOps.exif_transpose(image, in_place=True)
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            rgb = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        else:
            rgb = image if image.mode == "RGB" else image.convert("RGB")
        return torch.from_numpy(_pixels(rgb)).permute(2, 0, 1)


def _pixels(rgb: Image.Image) -> np.ndarray:
    """Copy an RGB image to uint8 (H, W, 3), a few rows at a time.

    In one go Pillow makes two more copies of the whole on the way; to get the memory for every copy that is spared here
    and in `load_rgb` takes longer than to decode a JPEG.
    """
    pixels_HWC = np.empty((rgb.height, rgb.width, 3), dtype=np.uint8)
    for top in range(0, rgb.height, _STRIP_ROWS):
        bottom = min(top + _STRIP_ROWS, rgb.height)
        pixels_HWC[top:bottom] = np.asarray(rgb.crop((0, top, rgb.width, bottom)))
    return pixels_HWC


def smart_resize(height: int, width: int, *, factor: int = FACTOR, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return the (height, width) an image is resized to: multiples of factor, area between the limits, ratio kept.

    Agrees with `smart_resize` of transformers' Qwen2VLImageProcessor (halves round to even). For very long images the
    smallest side (one factor) wins over max_pixels. Raises MediaFault beyond 200:1. 300, 400 -> 288, 384.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise MediaFault(
            f"image of {width}x{height}: is more extreme than {MAX_ASPECT}:1; crop it or pad it",
            kind="unsupported_media",
        )
    rows, cols = round(height / factor) * factor, round(width / factor) * factor
    if rows * cols > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        cols = max(factor, math.floor(width / shrink / factor) * factor)
    elif rows * cols < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor) * factor
        cols = math.ceil(width * grow / factor) * factor
    return rows, cols


def resize_to_patches(rgb_CHW: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """Resize uint8 (3, H, W) to grid_hw patches of 16x16 and return them as uint8 (P, 768), in merge-block order.

    One frame: a still repeats its frame, so it is stored once; a patch is (channel, row, column), flattened. Patches
    run over blocks (rows / 2, columns / 2, 2, 2). Bit-equal to transformers' Qwen2VLImageProcessor (torchvision).
    """
    rows, cols = grid_hw
    size = (rows * PATCH, cols * PATCH)
    if rgb_CHW.shape[1:] != size:
        rgb_CHW = F.interpolate(rgb_CHW[None], size=size, mode="bicubic", antialias=True)[0]
    blocks = rgb_CHW.reshape(3, rows // MERGE, MERGE, PATCH, cols // MERGE, MERGE, PATCH)
    return blocks.permute(1, 4, 2, 5, 0, 3, 6).reshape(rows * cols, 3 * PATCH * PATCH)
