"""What single image formats need: PNG with large texts, 16 bits of grey, HEIC."""

import struct
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from qwen3vl_train.data.errors import MediaFault

_TEXTS = (b"iCCP", b"tEXt", b"zTXt", b"iTXt")
_ROTATION_TEXTS = (b"Raw profile type exif", b"XML:com.adobe.xmp")
_MAX_ROTATION_TEXT = 1 << 16
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def without_texts(file: str | bytes) -> bytes:
    """Return a PNG without its colour profile and its texts, but for those that may hold its orientation.

    What is not a PNG, or damaged, is returned as far as it can be read.
    """
    data = Path(file).read_bytes() if isinstance(file, str) else file
    kept, position = [data[:8]], 8
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        chunk = data[position : position + 12 + length]
        is_rotation = length <= _MAX_ROTATION_TEXT and chunk[8:].startswith(_ROTATION_TEXTS)
        if kind not in _TEXTS or is_rotation:
            kept.append(chunk)
        position += 12 + length
    return b"".join(kept)


def has_16_bits(image: Image.Image) -> bool:
    """Return whether an image is grey of 16 bits, in a format that says that white is 65535."""
    return image.format in ("PNG", "PPM") and image.mode in ("I", "I;16", "I;16B")


def to_8_bits(image: Image.Image) -> Image.Image:
    """Return the upper eight bits of an image of `has_16_bits`, as Pillow itself reads colours of 16 bits.

    Pillow's `convert` would clip instead: every value above 255 is white. What a PNG declares transparent is white.
    """
    values = np.asarray(image)
    grey = (values >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def is_heif(file: str | BytesIO) -> bool:
    """Return whether a file begins as HEIC and HEIF images do."""
    if isinstance(file, str):
        with open(file, "rb") as stream:
            start = stream.read(12)
    else:
        file.seek(0)
        start = file.read(12)
        file.seek(0)
    return start[4:8] == b"ftyp" and start[8:] in _HEIF_BRANDS


def heif_formats(name: str) -> tuple[str, ...]:
    """Make Pillow read HEIC and HEIF with pillow-heif; return its name of the format. Raise MediaFault without it."""
    try:
        from pillow_heif import register_heif_opener  # type: ignore[import-not-found]
    except ImportError:
        fault = f"{name}: is HEIC, which Pillow alone cannot read; pip install 'qwen3vl_train[heif]', or convert it"
        raise MediaFault(fault, kind="unsupported_media") from None
    register_heif_opener()
    return ("HEIF",)
