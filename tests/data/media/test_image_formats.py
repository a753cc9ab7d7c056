"""PNG with large texts, grey of 16 bits, photographs beyond Pillow's limit, HEIC."""

import io
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from qwen3vl_train.data.errors import MediaFault
from qwen3vl_train.data.media.image import image_size, load_rgb
from tests.helpers.messages import message_of

RAMP = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(8, 0)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(png: bytes, *chunks: bytes, late: bool = False) -> bytes:
    """Put chunks after the header of a PNG, or late after its pixels."""
    at = png.rindex(b"IEND") - 4 if late else png.index(b"IHDR") + 21
    return png[:at] + b"".join(chunks) + png[at:]


def picture() -> Image.Image:
    return Image.fromarray(np.arange(30 * 50 * 3, dtype=np.uint8).reshape(30, 50, 3))


HUGE = b"\0" * (2 << 20)
LARGE = {
    "profile": [chunk(b"iCCP", b"p\0\0" + zlib.compress(HUGE))],
    "text": [chunk(b"zTXt", b"k\0\0" + zlib.compress(HUGE))],
    "international": [chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(HUGE))],
    "many": [chunk(b"zTXt", b"k\0\0" + zlib.compress(HUGE[: 1 << 20]))] * 80,
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", LARGE)
def test_large_texts_and_profiles_are_skipped(kind, late, tmp_path):
    data = with_chunks(encoded(picture()), *LARGE[kind], late=late and kind != "profile")
    (tmp_path / "a.png").write_bytes(data)
    for source, root in ((data, None), ("a.png", tmp_path)):
        assert image_size(source, root) == (30, 50)
        assert torch.equal(load_rgb(source, root), load_rgb(picture()))


def test_orientation_beside_a_large_text_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = with_chunks(encoded(picture(), exif=exif), *LARGE["text"])
    assert image_size(data) == tuple(load_rgb(data).shape[1:]) == (50, 30)
    packet = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><tiff:Orientation>6</tiff:Orientation></x:xmpmeta>'
    xmp = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet)
    data = with_chunks(encoded(picture()), xmp, *LARGE["text"])
    assert image_size(data) == tuple(load_rgb(data).shape[1:]) == (50, 30)


def test_damage_beside_a_large_text_is_damage():
    data = with_chunks(encoded(picture()), *LARGE["text"])
    fault = message_of(MediaFault, load_rgb, data[: len(data) - 200])
    assert fault.startswith(f"image of {len(data) - 200} bytes: is truncated or damaged (")


def test_grey_of_16_bits_keeps_its_range():
    """Black to white in 256 steps. Pillow's own conversion clips: all from 256 of 65535 on would be white."""
    ramp = Image.fromarray(RAMP)
    rgb = load_rgb(encoded(ramp))
    assert rgb.shape == (3, 8, 256)
    assert rgb[:, 3].tolist() == [list(range(256))] * 3
    assert load_rgb(Image.open(io.BytesIO(encoded(ramp)))).equal(rgb)
    assert image_size(encoded(ramp)) == (8, 256)
    assert load_rgb(encoded(ramp, "PPM")).equal(rgb)
    naive = np.asarray(Image.open(io.BytesIO(encoded(ramp))).convert("RGB"))
    assert (naive == 255).mean() > 0.9  # the trap


def test_grey_of_16_bits_equals_colours_of_16_bits():
    """Pillow reads 16 bits of red, green and blue as their upper eight."""
    header = struct.pack(">IIBBBBB", 256, 8, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + np.repeat(row.astype(">u2"), 3).tobytes() for row in RAMP)
    colour = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert torch.equal(load_rgb(colour), load_rgb(encoded(Image.fromarray(RAMP))))


def test_transparent_grey_of_16_bits_is_white():
    data = with_chunks(encoded(Image.fromarray(RAMP)), chunk(b"tRNS", struct.pack(">H", int(RAMP[0, 5]))))
    assert load_rgb(data)[0, 0, :8].tolist() == [0, 1, 2, 3, 4, 255, 6, 7]


def test_16_bits_without_a_stated_range_are_refused():
    fault = "mode I;16 has more than 8 bits and no stated range; convert it to 8 bits a channel"
    assert fault in message_of(MediaFault, load_rgb, encoded(Image.fromarray(RAMP), "TIFF"))


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_photographs_are_read_up_to_the_limit_of_the_recipe(kind, monkeypatch, tmp_path):
    data = encoded(picture(), kind)
    (tmp_path / "a").write_bytes(data)
    wanted = load_rgb(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for source in (data, str(tmp_path / "a")):
        for limit in (1500, 10**9):
            assert image_size(source, None, limit) == (30, 50)
            assert torch.equal(load_rgb(source, None, limit), wanted)
        for read in (image_size, load_rgb):
            fault = message_of(MediaFault, read, source, None, 1499)
            assert fault.endswith(
                ": 50x30 is more than 1499 pixels, data.max_image_pixels; shrink the file, or raise "
                "data.max_image_pixels if you trust it"
            )
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert "50x30 is more than 1499 pixels" in message_of(MediaFault, load_rgb, data, None, 1499)
    assert message_of(MediaFault, load_rgb, b"no image", None, 10**9).startswith("image of 8 bytes: is not an image")


def test_unknown_files_are_named_at_any_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    fault = message_of(MediaFault, load_rgb, b"no image", None, 10**9)
    assert fault.startswith("image of 8 bytes: is not an image of a known format (JPEG, ")


def test_heic_names_what_reads_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    data = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    for read in (image_size, load_rgb):
        assert message_of(MediaFault, read, data) == (
            "image of 124 bytes: is HEIC, which Pillow alone cannot read; pip install 'qwen3vl_train[heif]', or "
            "convert it"
        )


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    smooth = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    for given, size in ((None, (48, 64)), (exif, (64, 48))):
        out = io.BytesIO()
        heif.from_pillow(smooth).save(out, quality=-1, **({} if given is None else {"exif": given.tobytes()}))
        (tmp_path / "a.heic").write_bytes(out.getvalue())
        for source in (out.getvalue(), str(tmp_path / "a.heic")):
            rgb = load_rgb(source)
            assert image_size(source) == tuple(rgb.shape[1:]) == size
            assert image_size(source, None, 10**9) == size
            if given is None:
                assert (rgb.float() - load_rgb(smooth).float()).abs().max() < 8
