"""The rotation of a video: the display matrix of an MP4 or MOV file, read from its boxes.

PyAV exposes the matrix on decoded frames only, and the cost of a clip is found without decoding.
"""

import math
import os
import struct
from typing import IO

Matrix = tuple[int, ...]
"""Nine numbers in 16.16 and 2.30 fixed point, row by row; only the upper left 2x2 rotates."""

IDENTITY: Matrix = (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
_MAX_BOXES = 10_000  # bounds the time that a damaged file can take


def rotation_from_matrix(matrix: Matrix) -> int | None:
    """Return the quarter turns counter-clockwise (0..3) to rotate a frame by before it is shown.

    The sign convention is that of FFmpeg's `av_display_rotation_get`. None: mirrored, or another angle. A matrix of
    zeros does not rotate.
    """
    a, b, c, d = matrix[0], matrix[1], matrix[3], matrix[4]
    across, down = math.hypot(a, c), math.hypot(b, d)
    if not across or not down:
        return 0
    if a * d - b * c < 0:
        return None
    angle = -math.degrees(math.atan2(b / down, a / across))
    rotation = round(angle / 90)
    return rotation % 4 if abs(angle - 90 * rotation) < 1 else None


def mp4_matrix(file: IO[bytes], track: int) -> Matrix:
    """Return the display matrix of the track with this number, the identity where the file has none.

    Only box headers are read: `moov` may follow gigabytes of frames. The movie's own matrix is multiplied in.
    """
    size = file.seek(0, os.SEEK_END)
    left = [_MAX_BOXES]
    movie = next((span for kind, span in _boxes(file, 0, size, left) if kind == b"moov"), None)
    if movie is None:
        return IDENTITY
    movie_matrix, track_matrix = IDENTITY, IDENTITY
    for kind, (start, end) in _boxes(file, *movie, left):
        if kind == b"mvhd":
            movie_matrix = _unpack(file, start, ">9i", 36, 12) or IDENTITY
        elif kind == b"trak":
            for inner, (head, _) in _boxes(file, start, end, left):
                if inner == b"tkhd" and _unpack(file, head, ">I", 12, 8) == (track,):
                    track_matrix = _unpack(file, head, ">9i", 40, 12) or IDENTITY
    a, b, c, d = track_matrix[0], track_matrix[1], track_matrix[3], track_matrix[4]
    p, q, r, s = movie_matrix[0], movie_matrix[1], movie_matrix[3], movie_matrix[4]
    product = [(value + (1 << 15)) >> 16 for value in (a * p + b * r, a * q + b * s, c * p + d * r, c * q + d * s)]
    return (product[0], product[1], 0, product[2], product[3], 0, 0, 0, 1 << 30)


def _boxes(file: IO[bytes], start: int, end: int, left: list[int]):
    """Yield (kind, (start, end) of the content) of the boxes between two offsets."""
    while start + 8 <= end and left[0] > 0:
        left[0] -= 1
        file.seek(start)
        header = file.read(16)
        if len(header) < 8:
            return
        length, kind = struct.unpack(">I4s", header[:8])
        skip = 8
        if length == 1 and len(header) == 16:
            length, skip = struct.unpack(">Q", header[8:])[0], 16
        stop = end if length == 0 else start + length
        if stop < start + skip or stop > end:
            return
        yield kind, (start + skip, stop)
        start = stop


def _unpack(file: IO[bytes], start: int, form: str, offset: int, shift: int) -> tuple[int, ...] | None:
    """Read numbers of a box. shift: what the 64-bit times of version 1 (the first byte) add to their offset."""
    file.seek(start)
    content = file.read(100)
    offset += shift if content[:1] == b"\1" else 0
    return struct.unpack_from(form, content, offset) if len(content) >= offset + struct.calcsize(form) else None
