"""How far a phone held its camera turned: the display matrix of an MP4 or MOV file, read from its boxes.

PyAV shows the matrix only on decoded frames; here it is read from the header, so that the cost of a clip needs no
decoding.
"""

import math
import os
import struct
from typing import IO

Matrix = tuple[int, ...]
"""Nine numbers in 16.16 and 2.30 fixed point, row by row; only the upper left 2x2 turns."""

IDENTITY: Matrix = (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
_MAX_BOXES = 10_000  # what a file of junk can make us walk over


def quarter_turns(matrix: Matrix) -> int | None:
    """Return how many quarter turns counter-clockwise (0..3) a frame is turned by before it is shown.

    The sign convention is that of FFmpeg's `av_display_rotation_get`. None: mirrored, or another angle. A matrix of
    zeros turns nothing.
    """
    a, b, c, d = matrix[0], matrix[1], matrix[3], matrix[4]
    across, down = math.hypot(a, c), math.hypot(b, d)
    if not across or not down:
        return 0
    if a * d - b * c < 0:
        return None
    angle = -math.degrees(math.atan2(b / down, a / across))
    turns = round(angle / 90)
    return turns % 4 if abs(angle - 90 * turns) < 1 else None


def mp4_matrix(file: IO[bytes], track: int) -> Matrix:
    """Return the display matrix of the track of this number, identity where the file says nothing.

    Reads box headers only: `moov` may stand behind gigabytes of frames. The movie's own matrix is multiplied in.
    """
    size = file.seek(0, os.SEEK_END)
    left = [_MAX_BOXES]
    movie = next((place for kind, place in _boxes(file, 0, size, left) if kind == b"moov"), None)
    if movie is None:
        return IDENTITY
    of_movie, of_track = IDENTITY, IDENTITY
    for kind, (start, end) in _boxes(file, *movie, left):
        if kind == b"mvhd":
            of_movie = _read_matrix(file, start, (36, 48)) or IDENTITY
        elif kind == b"trak":
            for inner, (head, _) in _boxes(file, start, end, left):
                if inner == b"tkhd" and _track_number(file, head) == track:
                    of_track = _read_matrix(file, head, (40, 52)) or IDENTITY
    a, b, c, d = of_track[0], of_track[1], of_track[3], of_track[4]
    p, q, r, s = of_movie[0], of_movie[1], of_movie[3], of_movie[4]
    turned = [(value + (1 << 15)) >> 16 for value in (a * p + b * r, a * q + b * s, c * p + d * r, c * q + d * s)]
    return (turned[0], turned[1], 0, turned[2], turned[3], 0, 0, 0, 1 << 30)


def _boxes(file: IO[bytes], start: int, end: int, left: list[int]):
    """Yield (kind, (start, end) of the content) of the boxes between two places."""
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


def _track_number(file: IO[bytes], start: int) -> int:
    file.seek(start)
    content = file.read(24).ljust(24, b"\0")
    return struct.unpack_from(">I", content, 20 if content[0] == 1 else 12)[0]


def _read_matrix(file: IO[bytes], start: int, offsets: tuple[int, int]) -> Matrix | None:
    """Read the nine numbers; offsets: where they stand in version 0 and version 1 of the box (its first byte)."""
    file.seek(start)
    content = file.read(100)
    offset = offsets[bool(content) and content[0] == 1]
    return struct.unpack_from(">9i", content, offset) if len(content) >= offset + 36 else None
