"""The rotation of a video: the display matrix of an MP4 or MOV file, read from its boxes.

PyAV exposes the matrix on decoded frames only, and the cost of a clip is found without decoding.
"""

import math
import os
from typing import IO

from qwen3vl_train.data.media.mp4_boxes import MAX_BOXES, boxes, unpack

Matrix = tuple[int, ...]
"""Nine numbers in 16.16 and 2.30 fixed point, row by row; only the upper left 2x2 rotates."""

IDENTITY: Matrix = (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)


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
    left = [MAX_BOXES]
    movie = next((span for kind, span in boxes(file, 0, size, left) if kind == b"moov"), None)
    if movie is None:
        return IDENTITY
    movie_matrix, track_matrix = IDENTITY, IDENTITY
    for kind, (start, end) in boxes(file, *movie, left):
        if kind == b"mvhd":
            movie_matrix = unpack(file, start, ">9i", 36, 12) or IDENTITY
        elif kind == b"trak":
            for inner, (head, _) in boxes(file, start, end, left):
                if inner == b"tkhd" and unpack(file, head, ">I", 12, 8) == (track,):
                    track_matrix = unpack(file, head, ">9i", 40, 12) or IDENTITY
    a, b, c, d = track_matrix[0], track_matrix[1], track_matrix[3], track_matrix[4]
    p, q, r, s = movie_matrix[0], movie_matrix[1], movie_matrix[3], movie_matrix[4]
    product = [(value + (1 << 15)) >> 16 for value in (a * p + b * r, a * q + b * s, c * p + d * r, c * q + d * s)]
    return (product[0], product[1], 0, product[2], product[3], 0, 0, 0, 1 << 30)
