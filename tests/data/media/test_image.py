"""Pixels against transformers, sizes from headers against decoded sizes, and the exact message of every fault."""

import base64
import hashlib
import io
import os
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from qwen3vl_train.data.errors import MediaFault
from qwen3vl_train.data.media.image import image_size, load_rgb, resize_to_patches, smart_resize
from qwen3vl_train.data.media.paths import resolve_path
from tests.helpers.messages import message_of

LIMITS = {"min_pixels": 65536, "max_pixels": 16777216}

# SHA-256 (first 16 digits) of the patches of `pattern`, frozen from transformers 5.23's Qwen2VLImageProcessor on
# torchvision 0.28 under LIMITS; the same with AVX2, AVX-512 and neither. The second number: levels (of 255) by which
# Pillow's own resize differs at most; it is far off where one side grows and the other shrinks by a little.
GOLDEN = {
    (500, 333): ("bd809f93330a6bc7", 16),
    (400, 300): ("5b81fe8ba08aa2e0", 2),
    (64, 64): ("8a0bdb95c0de7d69", 2),
    (1600, 16): ("7028180e1bba0675", 2),
    (48, 900): ("861d40b5d37159e2", 2),
    (208, 176): ("75a31957a4f7b8de", 2),
    (333, 777): ("4adda259c94d778d", 2),
    (257, 255): ("70a25b1db2cc0495", 2),
    (31, 31): ("3bad90027cff81cb", 2),
    (2000, 1500): ("66e18f7dc2c552e8", 2),
}


def pattern(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    channels = [(x * 7 + y * 13) % 256, (x * x + 3 * y) % 251, ((x * y) ^ (x + 5 * y)) % 256]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x112] = orientation
    return exif


def patches_of(source) -> torch.Tensor:
    rgb = load_rgb(source)
    height, width = smart_resize(*rgb.shape[1:], **LIMITS)
    return resize_to_patches(rgb, (height // 16, width // 16))


@pytest.mark.parametrize("size", GOLDEN, ids=str)
def test_patches_are_bit_equal_to_torchvision_and_near_pillow(size):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    digest, off_by = GOLDEN[size]
    image = pattern(*size)
    ours = patches_of(image)
    assert hashlib.sha256(ours.contiguous().numpy().tobytes()).hexdigest()[:16] == digest

    processor = Qwen2VLImageProcessorPil(
        patch_size=16, temporal_patch_size=2, merge_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        size={"shortest_edge": LIMITS["min_pixels"], "longest_edge": LIMITS["max_pixels"]},
    )  # fmt: skip
    theirs = processor(image, return_tensors="pt")
    levels = (theirs["pixel_values"] * 127.5 + 127.5).reshape(-1, 3, 2, 256)
    for frame in range(2):  # a still is stored once and repeated on the device
        assert (levels[:, :, frame].reshape(-1, 768) - ours).abs().max() <= off_by + 0.01


def test_smart_resize_equals_transformers():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as theirs

    rng = random.Random(0)
    for _ in range(3000):
        height = rng.randint(1, 3000)
        width = rng.randint(max(1, height // 200 + 1), min(3000, height * 200))
        least = rng.choice([1024, 4096, 65536])
        most = least * rng.choice([1, 2, 50])
        assert smart_resize(height, width, min_pixels=least, max_pixels=most) == theirs(
            height, width, factor=32, min_pixels=least, max_pixels=most
        )


def test_patch_order_is_blocks_of_two_by_two():
    rgb = torch.zeros(3, 64, 96, dtype=torch.uint8)
    for row in range(4):
        for col in range(6):
            rgb[:, row * 16 : (row + 1) * 16, col * 16 : (col + 1) * 16] = 10 * row + col
    patches = resize_to_patches(rgb, (4, 6))
    assert patches.shape == (24, 768)
    assert patches[:, 0].tolist()[:12] == [0, 1, 10, 11, 2, 3, 12, 13, 4, 5, 14, 15]
    rgb = torch.arange(3)[:, None, None].expand(3, 32, 32).to(torch.uint8) * 50 + torch.arange(32).to(torch.uint8)
    first = resize_to_patches(rgb, (2, 2))[0].reshape(3, 16, 16)
    assert torch.equal(first, rgb[:, :16, :16])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotates_files_but_not_pil_images(kind, orientation):
    data = encoded(pattern(50, 30), kind, exif=exif_of(orientation))
    rgb = load_rgb(data)
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert torch.equal(rgb, torch.from_numpy(np.array(turned)).permute(2, 0, 1))
    assert image_size(data) == tuple(rgb.shape[1:]) == ((50, 30) if orientation > 4 else (30, 50))
    if kind != "TIFF":  # Pillow itself turns TIFF when it decodes
        assert image_size(Image.open(io.BytesIO(data))) == (30, 50)
        assert load_rgb(Image.open(io.BytesIO(data))).shape == (3, 30, 50)


def test_png_orientation_after_the_pixels_is_applied():
    data = encoded(pattern(50, 30), exif=exif_of(6))
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    late = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    assert image_size(late) == tuple(load_rgb(late).shape[1:]) == (50, 30)


def test_modes_convert_as_transformers_does():
    from transformers.image_transforms import convert_to_rgb

    base = pattern(40, 24)
    alpha = base.copy()
    alpha.putalpha(Image.linear_gradient("L").resize((40, 24)))
    see_through = base.quantize(16)
    see_through.info["transparency"] = 3
    images = [base.convert(mode) for mode in ("RGB", "L", "1", "CMYK", "YCbCr")]
    for image in [*images, base.quantize(16), alpha, alpha.convert("LA"), see_through]:
        wanted = torch.from_numpy(convert_to_rgb(image, return_numpy=True)).permute(2, 0, 1)
        assert torch.equal(load_rgb(image), wanted), image.mode
    assert load_rgb(Image.new("RGBA", (4, 4), (255, 0, 0, 0))).unique().tolist() == [255]
    assert torch.equal(load_rgb(encoded(alpha)), load_rgb(alpha))


def test_every_input_type_gives_the_same_pixels(tmp_path):
    data = encoded(pattern(33, 21))
    (tmp_path / "a b.png").write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    sources = [data, uri, Image.open(io.BytesIO(data)), str(tmp_path / "a b.png")]
    for source in sources:
        assert torch.equal(load_rgb(source), load_rgb(pattern(33, 21)))
        assert image_size(source) == (21, 33)
    assert image_size("a b.png", tmp_path) == (21, 33)
    assert image_size(str(tmp_path / "a b.png"), tmp_path) == (21, 33)


def test_sizes_are_read_without_decoding(monkeypatch):
    data = {kind: encoded(pattern(60, 40), kind) for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF")}

    def decode(self, *arguments):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    assert {image_size(value) for value in data.values()} == {(40, 60)}


KINDS = "(JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM, JPEG2000, AVIF)"


def test_faults_of_files(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    (root / "empty.png").write_bytes(b"")
    (root / "text.png").write_text("hello, I am no image")
    (root / "cut.jpg").write_bytes(encoded(pattern(400, 300), "JPEG")[:3000])
    (root / "header.png").write_bytes(encoded(pattern(40, 30))[:20])
    (root / "sub").mkdir()
    real = os.path.realpath(root)
    faults = {
        "none.png": f"image none.png: no such file ({real}/none.png); check the path and media_root",
        "sub": f"image sub: is not a file ({real}/sub); check the path and media_root",
        "empty.png": "image empty.png: is empty (0 bytes); copy the file again",
        "text.png": f"image text.png: is not an image of a known format {KINDS}; convert it",
        "header.png": "image header.png: is damaged (Truncated File Read); replace the file",
        "http://example.org/a.png": "image http://example.org/a.png: is a http URL and nothing is downloaded; "
        "give a local path or set allow_urls: true",
        "s3://bucket/a.png": "image s3://bucket/a.png: is a s3 URL and nothing is downloaded; give a local path",
        "": "image : is not a path; give the path of a file",
        "a\0b": "image a\0b: is not a path; give the path of a file",
        "x" * 5000: f"image {'x' * 200}...: no such file ({real}/{'x' * 5000}); check the path and media_root",
    }
    for path, fault in faults.items():
        assert message_of(MediaFault, image_size, path, root) == fault
        assert message_of(MediaFault, load_rgb, path, root) == fault
    assert image_size("cut.jpg", root) == (300, 400)  # the header of a truncated file is complete
    assert message_of(MediaFault, load_rgb, "cut.jpg", root).startswith(
        "image cut.jpg: is truncated or damaged (image file is truncated"
    )


def test_faults_of_other_inputs():
    unknown = f"is not an image of a known format {KINDS}; convert it"
    for source, fault in (
        (b"", "image of 0 bytes: is empty; give the bytes of an image file"),
        (b"junk", f"image of 4 bytes: {unknown}"),
        ("data:image/png,abc", "data URI: is not base64; write data:image/png;base64,..."),
        ("data:image/png;base64,aGk=", f"data URI: {unknown}"),
    ):
        assert message_of(MediaFault, image_size, source) == message_of(MediaFault, load_rgb, source) == fault
    assert message_of(MediaFault, load_rgb, "data:image/png;base64,a?b=").startswith("data URI: is not base64 (")


@pytest.mark.parametrize("mode", ["I", "I;16", "F"])
def test_more_than_eight_bits_are_refused(mode):
    fault = f"PIL image of 8x8: mode {mode} has more than 8 bits and no stated range; convert it to 8 bits a channel"
    for read in (image_size, load_rgb):
        assert message_of(MediaFault, read, Image.new(mode, (8, 8))) == fault


def test_formats_that_run_programs_are_not_opened():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    assert "is not an image of a known format" in message_of(MediaFault, image_size, postscript)


@pytest.mark.parametrize("size", [(1200, 1000), (3000, 1000)])
def test_decompression_bombs(monkeypatch, size):
    data = encoded(Image.new("1", size))  # a few hundred bytes
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)  # beyond twice this, Pillow raises by itself
    fault = (
        f"image of {len(data)} bytes: {size[0]}x{size[1]} is more than 1000000 pixels, Pillow's limit against "
        "decompression bombs; shrink the file, or raise data.max_image_pixels if you trust it"
    )
    with pytest.warns(Image.DecompressionBombWarning) if size[0] == 1200 else monkeypatch.context():
        assert message_of(MediaFault, image_size, data) == fault


def test_aspect_ratio_beyond_200_is_refused():
    assert smart_resize(2000, 10, **LIMITS) == (3648, 32)
    fault = "image of 10x2001: its aspect ratio exceeds 200:1; crop it or pad it"
    assert message_of(MediaFault, lambda: smart_resize(2001, 10, **LIMITS)) == fault
    assert message_of(MediaFault, lambda: smart_resize(10, 2001, **LIMITS)) == fault.replace("10x2001", "2001x10")


def test_paths_outside_media_root_are_refused(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    (tmp_path / "images2").mkdir()
    for place in (tmp_path, root, tmp_path / "images2"):
        pattern(8, 8).save(place / "a.png")
    (root / "link.png").symlink_to(tmp_path / "a.png")
    (root / "inner.png").symlink_to(root / "a.png")
    (root / "out").symlink_to(tmp_path)
    for path in ("../a.png", str(tmp_path / "a.png"), "../images2/a.png", "x/../../a.png"):
        fault = f"image {path}: is outside media_root {root}; move the file into it"
        assert message_of(MediaFault, image_size, path, root) == fault
    for path in ("link.png", "out/a.png"):
        fault = f"image {path}: is a link to {tmp_path}/a.png, outside media_root {root}"
        fault += "; set data.follow_links: true if the link is yours, or copy the file into it"
        assert message_of(MediaFault, image_size, path, root) == fault
    for path in ("a.png", "./a.png", "x/../a.png", "inner.png", str(root / "a.png"), "../images/a.png"):
        assert image_size(path, root) == (8, 8)
    (tmp_path / "alias").symlink_to(root)
    assert image_size("a.png", tmp_path / "alias") == (8, 8)
    assert image_size(str(root / "link.png")) == (8, 8)  # no media_root: any local path
    assert resolve_path("a.png", root) == str(root / "a.png")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
def test_damaged_files_raise_media_fault_only():
    """Cut and flip bytes of every format: the size from the header is the size that decodes, or both are refused."""
    rng = random.Random(0)
    whole = [encoded(pattern(37, 21), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")]
    whole.append(encoded(Image.fromarray(np.arange(37 * 21, dtype=np.uint16).reshape(21, 37) * 80)))
    whole.append(encoded(pattern(37, 21), icc_profile=bytes(3 << 20)))  # more than Pillow reads
    refused = 0
    for turn in range(1500):
        data = bytearray(whole[turn % len(whole)])
        if rng.random() < 0.4:
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.randrange(6) if data else 0):
            data[rng.randrange(min(len(data), 300))] = rng.randrange(256)
        sizes = []
        for read in (image_size, lambda source: tuple(load_rgb(source).shape[1:])):
            try:
                sizes.append(read(bytes(data)))
            except MediaFault:
                sizes.append(None)
        refused += sizes[1] is None
        assert sizes[1] is None or sizes[0] == sizes[1]
    assert 300 < refused < 1500
