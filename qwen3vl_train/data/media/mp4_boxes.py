"""The boxes of MP4 and MOV files: what PyAV does not expose of their headers."""

import os
import struct
from collections.abc import Iterator, Sequence
from typing import IO

MAX_BOXES = 10_000
"""Of a file; bounds the time that a damaged one can take."""
_MAX_RUNS = 10_000_000
_WAY = (b"mdia", b"minf", b"stbl", b"ctts")


def mp4_time_offsets(file: IO[bytes], track: int) -> list[tuple[int, int]] | None:
    """Return (number of frames, what to add to their decoding time for the time at which they are shown), in runs.

    track: its number. None: the track has no such box, so that frames are shown as they are decoded.
    """
    size = file.seek(0, os.SEEK_END)
    left = [MAX_BOXES]
    movie = next((span for kind, span in boxes(file, 0, size, left) if kind == b"moov"), (0, 0))
    for kind, (start, end) in boxes(file, *movie, left):
        if kind != b"trak":
            continue
        head = next((span for inner, span in boxes(file, start, end, left) if inner == b"tkhd"), None)
        if head is None or unpack(file, head[0], ">I", 12, 8) != (track,):
            continue
        span: tuple[int, int] | None = (start, end)
        for name in _WAY:
            span = next((found for inner, found in boxes(file, *span, left) if inner == name), None)
            if span is None:
                return None
        return _runs(file, *span)
    return None


def mp4_num_frames(file: IO[bytes]) -> int:
    """Return the most frames that a track declares; 0 where none does. A few bytes can declare billions."""
    left, most = [MAX_BOXES], 0

    def search(span: tuple[int, int], way: Sequence[bytes]) -> None:
        nonlocal most
        for kind, inner in boxes(file, *span, left):
            if kind == way[0] and len(way) > 1:
                search(inner, way[1:])
            elif kind == way[0]:
                most = max(most, *(unpack(file, inner[0], ">I", 8, 0) or (0,)))

    search((0, file.seek(0, os.SEEK_END)), (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsz"))
    return most


def _runs(file: IO[bytes], start: int, end: int) -> list[tuple[int, int]]:
    file.seek(start)
    (count,) = struct.unpack(">4xI", file.read(8).ljust(8, b"\0"))
    count = min(count, (end - start - 8) // 8, _MAX_RUNS)
    # Version 0 has unsigned numbers by the standard, but writers put negative ones there too, and FFmpeg reads them so.
    return list(struct.iter_unpack(">Ii", file.read(8 * max(count, 0))))


def boxes(file: IO[bytes], start: int, end: int, left: list[int]) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """Yield (kind, (start, end) of the content) of the boxes between two offsets. left: how many may yet be read."""
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


def unpack(file: IO[bytes], start: int, form: str, offset: int, shift: int) -> tuple[int, ...] | None:
    """Read numbers of a box. shift: what the 64-bit times of version 1 (the first byte) add to their offset."""
    file.seek(start)
    content = file.read(100)
    offset += shift if content[:1] == b"\1" else 0
    return struct.unpack_from(form, content, offset) if len(content) >= offset + struct.calcsize(form) else None
