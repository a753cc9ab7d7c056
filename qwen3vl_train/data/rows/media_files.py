"""Size and time of the media files of a row, by which a change of them shows."""

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from qwen3vl_train.data.media.remote import Remote
from qwen3vl_train.data.rows.sample import ImagePart, Sample, VideoPart

_FILES_PER_TASK = 1024
_NUM_THREADS = 16
_LATE_SECONDS = 1e-4
"""Of a file: a network file system answers later, but to many at once. A disk of one's own answers in 3e-6, and threads
that share the interpreter make that three times as much."""
_SIZE_FACTOR, _TIME_FACTOR = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F  # odd, so that nothing is lost modulo 2**64


def local_files(sample: Sample) -> list[str]:
    """Return the paths of all media of a sample that are files of their own on this machine, in their order."""
    root = sample.media_root or ""
    return [
        os.path.join(root, medium)
        for medium in _media(sample)
        if isinstance(medium, str) and not medium.startswith("data:")
    ]


def is_fetched(sample: Sample) -> bool:
    """Say whether any of a sample's media is fetched from elsewhere: no change of it can be seen from here."""
    return any(isinstance(medium, Remote) for medium in _media(sample))


def _media(sample: Sample) -> Iterator[Any]:
    """Yield the source of every image and video, and of every frame of a list."""
    for message in sample.messages:
        for part in message.content:
            if isinstance(part, ImagePart):
                yield part.image
            elif isinstance(part, VideoPart):
                yield from part.video if isinstance(part.video, tuple) else (part.video,)


def read_stats(paths: Sequence[str]) -> np.ndarray:
    """Return size in bytes and time of change in nanoseconds, int64 (files, 2); -1 where there is no such file."""
    tasks = [paths[start : start + _FILES_PER_TASK] for start in range(0, len(paths), _FILES_PER_TASK)]
    found: list[np.ndarray] = []
    while len(found) < len(tasks):
        started, task = time.perf_counter(), tasks[len(found)]
        found.append(_stats(task))
        if time.perf_counter() - started > _LATE_SECONDS * len(task):
            with ThreadPoolExecutor(_NUM_THREADS) as pool:
                found += pool.map(_stats, tasks[len(found) :])
    return np.concatenate([np.zeros((0, 2), dtype=np.int64), *found])


def _stats(paths: Sequence[str]) -> np.ndarray:
    return np.array([_stat(path) for path in paths], dtype=np.int64).reshape(-1, 2)


def _stat(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: no path at all, such as one with a zero byte
        return -1, -1
    return status.st_size, status.st_mtime_ns


def row_stamps(num_files: np.ndarray, stats: np.ndarray) -> np.ndarray:
    """Return one number for the files of each row, int64 (rows,); it changes with the size or time of any of them.

    num_files: of each row. stats: of all files, row after row, as `read_stats` gives them.
    """
    mixed = stats.astype(np.uint64) * np.array([_SIZE_FACTOR, _TIME_FACTOR], dtype=np.uint64)
    rows = np.repeat(np.arange(len(num_files)), num_files)
    stamps = np.zeros(len(num_files), dtype=np.uint64)
    np.add.at(stamps, rows, mixed.sum(axis=1, dtype=np.uint64))
    return stamps.astype(np.int64)


def stamp_of(sample: Sample) -> int:
    """Return the stamp of a sample's files as they are now, see `row_stamps`."""
    paths = local_files(sample)
    return int(row_stamps(np.array([len(paths)]), _stats(paths))[0])
