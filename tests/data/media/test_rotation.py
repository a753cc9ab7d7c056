"""Display matrices, and the boxes of MP4 files that contain them."""

import io
import math
import random
import struct

import av
import pytest

from qwen3vl_train.data.media.rotation import IDENTITY, mp4_matrix, rotation_from_matrix
from tests.helpers.clip_files import write_clip


def matrix(degrees: float, *, scale: float = 1.0, mirror: bool = False) -> tuple[int, ...]:
    """Return the matrix of a rotation counter-clockwise by degrees, as FFmpeg's `av_display_rotation_set`."""
    angle = -math.radians(degrees)
    a, b = (round(scale * 65536 * value) for value in (math.cos(angle), math.sin(angle)))
    flip = -1 if mirror else 1
    return (flip * a, b, 0, flip * -b, a, 0, 0, 0, 1 << 30)


@pytest.mark.parametrize("scale", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("degrees", range(-360, 361, 90))
def test_rotation_from_matrix(degrees, scale):
    assert rotation_from_matrix(matrix(degrees, scale=scale)) == degrees // 90 % 4


def test_other_angles_and_mirrors_are_not_rotations():
    for nine, turns in ((IDENTITY, 0), ((0,) * 9, 0), (matrix(90.4), 1), (matrix(45), None), (matrix(2), None)):
        assert rotation_from_matrix(nine) == turns
    assert all(rotation_from_matrix(matrix(degrees, mirror=True)) is None for degrees in (0, 90, 180))


@pytest.mark.parametrize("layout", [{}, {"movflags": "faststart"}, {"movflags": "frag_keyframe+empty_moov"}], ids=str)
@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
def test_matrix_is_that_of_the_track(tmp_path, layout, degrees):
    path = write_clip(tmp_path / "a.mp4", 6, rotation=degrees, container=layout, audio=not layout)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        track, shown = stream.id, next(container.decode(stream)).rotation
    assert shown in (degrees, degrees - 360)
    with path.open("rb") as file:
        assert rotation_from_matrix(mp4_matrix(file, track)) == degrees // 90 % 4
        assert mp4_matrix(file, track + 7) == IDENTITY


def box(kind: bytes, content: bytes, *, large: bool = False) -> bytes:
    if large:
        return struct.pack(">I4sQ", 1, kind, len(content) + 16) + content
    return struct.pack(">I4s", len(content) + 8, kind) + content


def movie(of_movie: tuple[int, ...], of_track: tuple[int, ...], *, version: int, large: bool = False) -> bytes:
    """A file of headers alone. version 1 has 64-bit times, which shift all that follows."""
    times = 12 if version else 0
    mvhd = struct.pack(">B35x", version) + b"\0" * times + struct.pack(">9i", *of_movie) + b"\0" * 28
    number = struct.pack(">I", 5)
    tkhd = bytes([version, 0, 0, 0]) + b"\0" * (16 if version else 8) + number + b"\0" * (28 if version else 24)
    tkhd += struct.pack(">9i", *of_track) + b"\0" * 8
    tracks = box(b"trak", box(b"tkhd", tkhd)) + box(b"trak", box(b"junk", b"12"))
    return box(b"ftyp", b"isom" * 3) + box(b"free", b"x" * 9) + box(b"moov", box(b"mvhd", mvhd) + tracks, large=large)


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("large", [False, True])
def test_both_box_versions_and_the_matrix_of_the_movie(version, large):
    for whole in (0, 90, 270):
        for track in (0, 90, 180):
            file = io.BytesIO(movie(matrix(whole), matrix(track), version=version, large=large))
            assert rotation_from_matrix(mp4_matrix(file, 5)) == (whole + track) // 90 % 4


def test_junk_is_read_quickly():
    assert mp4_matrix(io.BytesIO(b""), 1) == IDENTITY
    assert mp4_matrix(io.BytesIO(box(b"free", b"") * 1_000_000), 1) == IDENTITY  # 10,000 of them are read
    whole = movie(matrix(90), matrix(90), version=0)
    rng = random.Random(0)
    for _ in range(3000):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 5)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        assert len(mp4_matrix(io.BytesIO(bytes(data[: rng.randrange(len(data) + 1)])), 5)) == 9
