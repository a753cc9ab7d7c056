"""Read the size of images from their header alone, decode them, and cut them into patches as Qwen3-VL does.

Only the common raster formats are opened: some of Pillow's others start programs.
"""

import contextlib
import math
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from io import BytesIO
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from qwen3vl_train.data.errors import MediaFault
from qwen3vl_train.data.media.image_formats import has_16_bits, heif_formats, is_heif, to_8_bits, without_texts
from qwen3vl_train.data.media.paths import ImageInput, check_area, describe, path_or_bytes, too_large, unreadable

PATCH = 16
MERGE = 2
FACTOR = PATCH * MERGE
MAX_ASPECT = 200
ANY_SIZE = 1 << 62
"""As a limit in pixels: for readers of sizes alone, which decode nothing."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_DAMAGE = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError, AttributeError, AssertionError,
    RuntimeError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow's readers raise on damaged input; seen in its sources and by feeding them damaged files."""

_STRIP_ROWS = 64
_LIMIT_LOCK = threading.Lock()


class _TextLimit(MediaFault):
    """Pillow refuses a PNG because of its texts or its colour profile, not of its pixels."""


@cache
def _readable() -> tuple[str, ...]:
    Image.init()
    return tuple(kind for kind in _FORMATS if kind in Image.OPEN)


def _identify(file: str | BytesIO, name: str, max_pixels: int | None) -> Image.Image:
    try:
        try:
            image = Image.open(file, formats=_readable())
        except Image.UnidentifiedImageError:
            if not is_heif(file):
                raise
            image = Image.open(file, formats=heif_formats(name))
    except Image.UnidentifiedImageError:
        fault = f"{name}: is not an image of a known format ({', '.join(_readable())}); convert it"
        raise MediaFault(fault, kind="unsupported_media") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise too_large(name, _declared_size(file) or str(error), max_pixels) from None
    except MediaFault:
        raise
    except _DAMAGE as error:
        raise _damage_fault(name, error, "damaged") from None
    try:
        check_area(name, image.height, image.width, max_pixels)
    except MediaFault:
        image.close()
        raise
    return image


@contextlib.contextmanager
def _allowing(max_pixels: int | None) -> Iterator[None]:
    """Lift Pillow's limit, which is one of the whole process, where the recipe's is higher: `_identify` checks that."""
    usual = Image.MAX_IMAGE_PIXELS
    if max_pixels is None or usual is None or max_pixels <= usual:
        yield
        return
    with _LIMIT_LOCK:
        Image.MAX_IMAGE_PIXELS = None  # not max_pixels: Pillow would also warn, and only raise beyond twice that
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = usual


def _declared_size(file: str | BytesIO) -> str | None:
    """Return the size of an image that Pillow refuses to open because of it; None where its reader refuses too."""
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


def _damage_fault(name: str, error: BaseException, what: str) -> MediaFault:
    """Distinguish errors of the disk or of its permissions, which have a number, from damage in a file."""
    if isinstance(error, OSError) and error.errno is not None:
        return unreadable(name, error.strerror)
    kind = _TextLimit if isinstance(error, ValueError) and "MAX_TEXT" in str(error) else MediaFault
    return kind(f"{name}: is {what} ({error}); replace the file")


_Result = TypeVar("_Result")


def _read(
    source: ImageInput, media_root: str | os.PathLike[str] | None, max_pixels: int | None,
    use: Callable[[Image.Image], _Result],
) -> _Result:  # fmt: skip
    """Return what `use` makes of an opened image. Texts and colour profiles that Pillow finds too large are skipped."""
    with _allowing(max_pixels):
        try:
            with _reading(source, media_root, max_pixels) as image:
                return use(image)
        except _TextLimit:
            if isinstance(source, Image.Image):
                raise
            with _reading(source, media_root, max_pixels, skip_texts=True) as image:
                return use(image)


@contextlib.contextmanager
def _reading(
    source: ImageInput, media_root: str | os.PathLike[str] | None, max_pixels: int | None, *, skip_texts: bool = False
) -> Iterator[Image.Image]:
    """Open an image for reading, turn what Pillow raises into MediaFault, and close what was opened here."""
    name = describe(source)
    if isinstance(source, Image.Image):
        image = source
    else:
        file = path_or_bytes(source, media_root)
        if skip_texts:
            file = without_texts(file)
        image = _identify(BytesIO(file) if isinstance(file, bytes) else file, name, max_pixels)
    try:
        if image.width < 1 or image.height < 1:
            raise MediaFault(f"{name}: {image.width}x{image.height} has no pixels; replace it")
        if (image.mode == "F" or image.mode.startswith("I")) and not has_16_bits(image):
            fault = f"mode {image.mode} has more than 8 bits and no stated range; convert it to 8 bits a channel"
            raise MediaFault(f"{name}: {fault}", kind="unsupported_media")
        yield image
    except MediaFault:
        raise
    except _DAMAGE as error:
        raise _damage_fault(name, error, "truncated or damaged") from None
    finally:
        if image is not source:
            image.close()


def image_size(
    source: ImageInput, media_root: str | os.PathLike[str] | None = None, max_pixels: int | None = None
) -> tuple[int, int]:
    """Return the (height, width) that `load_rgb` will give, from the header alone. Raise MediaFault.

    max_pixels: larger images are a fault, here and there; None: beyond Pillow's own limit.
    """

    def size(image: Image.Image) -> tuple[int, int]:
        is_turned = image is not source and _header_orientation(image) in (5, 6, 7, 8)
        return (image.width, image.height) if is_turned else (image.height, image.width)

    return _read(source, media_root, max_pixels, size)


def _header_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation (1..8) to apply to `image.size`, without decoding pixels where possible."""
    if image.format == "TIFF" and ExifTags.Base.Orientation in image.tag_v2:  # type: ignore[attr-defined]
        return 1  # Pillow rotates these itself, and `size` is already that of the rotated image
    if image.format == "PNG" and "exif" not in image.info and _png_metadata_after_pixels(image):
        image.load()
    # Not image.getexif(): that of PNG decodes every image that has no EXIF block.
    return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)


def _png_metadata_after_pixels(image: Image.Image) -> bool:
    """Return whether a PNG has an EXIF or XMP block after its pixels. The file position is restored."""
    file = image.fp  # type: ignore[attr-defined]
    position, seen_pixels, found = file.tell(), False, False
    file.seek(8)
    while len(header := file.read(8)) == 8 and not found:
        length, kind = struct.unpack(">I4s", header)
        start = file.read(min(length, 24)) if seen_pixels else b""
        seen_pixels |= kind == b"IDAT"
        found = kind == b"eXIf" or start.startswith((b"Raw profile type exif", b"XML:com.adobe.xmp"))
        file.seek(length + 4 - len(start), os.SEEK_CUR)
    file.seek(position)
    return found


def load_rgb(
    source: ImageInput, media_root: str | os.PathLike[str] | None = None, max_pixels: int | None = None
) -> Tensor:
    """Decode an image to uint8 (3, H, W), a channels-last view. Raise MediaFault. max_pixels: as in `image_size`.

    EXIF orientation is applied to encoded images, not to PIL objects, and transparency is composited on white, as
    transformers' Qwen2VLImageProcessor does. Grey, palette and CMYK images are converted, and 16 bits become the upper
    eight, where PIL alone would make white of all but the darkest grey. An animation gives its first frame.
    """

    def pixels(image: Image.Image) -> Tensor:
        if image is not source:
            ImageOps.exif_transpose(image, in_place=True)
        if has_16_bits(image):
            rgb = to_8_bits(image).convert("RGB")
        elif "A" in image.getbands() or image.info.get("transparency") is not None:
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            rgb = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        else:
            rgb = image if image.mode == "RGB" else image.convert("RGB")
        # Converted at once, Pillow makes two more copies of the whole image, each of which takes longer to allocate
        # than a JPEG takes to decode.
        pixels_HWC = np.empty((rgb.height, rgb.width, 3), dtype=np.uint8)
        for top in range(0, rgb.height, _STRIP_ROWS):
            bottom = min(top + _STRIP_ROWS, rgb.height)
            pixels_HWC[top:bottom] = np.asarray(rgb.crop((0, top, rgb.width, bottom)))
        return torch.from_numpy(pixels_HWC).permute(2, 0, 1)

    return _read(source, media_root, max_pixels, pixels)


def smart_resize(height: int, width: int, *, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return the (height, width) to resize an image to: multiples of 32, area between the limits, ratio kept.

    Agrees with `smart_resize` of transformers' Qwen2VLImageProcessor (halves round to even). For very long images the
    smallest side (32) takes precedence over max_pixels. Raise MediaFault beyond 200:1. 300, 400 -> 288, 384.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        fault = f"image of {width}x{height}: its aspect ratio exceeds {MAX_ASPECT}:1; crop it or pad it"
        raise MediaFault(fault, kind="unsupported_media")
    return fit_area(height, width, 1, 1, min_pixels=min_pixels, max_pixels=max_pixels)


def fit_area(
    height: int, width: int, num_frames: int, counted_frames: int, *, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Return multiples of 32 whose area over all frames is between the limits.

    counted_frames: number of frames in the test against the limits; num_frames: in the scale.
    """
    rows, cols = round(height / FACTOR), round(width / FACTOR)
    area = counted_frames * rows * cols * FACTOR**2
    if area > max_pixels:
        shrink = math.sqrt(num_frames * height * width / max_pixels)
        rows, cols = (max(1, math.floor(side / shrink / FACTOR)) for side in (height, width))
    elif area < min_pixels:
        grow = math.sqrt(min_pixels / (num_frames * height * width))
        rows, cols = (math.ceil(side * grow / FACTOR) for side in (height, width))
    return rows * FACTOR, cols * FACTOR


def resize_to_patches(rgb_CHW: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """Resize uint8 (3, H, W) to grid_hw patches of 16x16 and return them as uint8 (P, 768), in merge-block order.

    A still repeats its frame, so that is stored once; a patch is (channel, row, column), flattened. Patches are ordered
    by blocks (rows / 2, columns / 2, 2, 2). Bit-equal to transformers' Qwen2VLImageProcessor (torchvision).
    """
    rows, cols = grid_hw
    size = (rows * PATCH, cols * PATCH)
    if rgb_CHW.shape[1:] != size:
        rgb_CHW = F.interpolate(rgb_CHW[None], size=size, mode="bicubic", antialias=True)[0]
    blocks = rgb_CHW.reshape(3, rows // MERGE, MERGE, PATCH, cols // MERGE, MERGE, PATCH)
    return blocks.permute(1, 4, 2, 5, 0, 3, 6).reshape(rows * cols, 3 * PATCH * PATCH)
