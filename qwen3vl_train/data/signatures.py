"""Signatures of files, by which a change of a file is noticed without reading it."""

import hashlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

_FILES_PER_TASK = 1024
_NUM_THREADS = 16
_SLOW_SECONDS = 1e-4
"""Of a file: a network file system takes longer, but answers many requests at once. A local disk takes 3e-6, and
threads that share the interpreter make that three times as much."""


class FileSignature(NamedTuple):
    """Size and version of a file."""

    size: int  # in bytes
    version: int | str  # nanoseconds of the last change; of a remote file its hash or time, as the server has it

    @classmethod
    def from_path(cls, path: str) -> "FileSignature":
        """Return the signature of a local file. Raises OSError."""
        status = os.stat(path)
        return cls(status.st_size, status.st_mtime_ns)


def read_signatures(paths: Sequence[str]) -> np.ndarray:
    """Return the signatures of local files, int64 (files, 2); -1 where there is no such file."""
    tasks = [paths[start : start + _FILES_PER_TASK] for start in range(0, len(paths), _FILES_PER_TASK)]
    found: list[np.ndarray] = []
    while len(found) < len(tasks):
        started, task = time.perf_counter(), tasks[len(found)]
        found.append(_read_task(task))
        if time.perf_counter() - started > _SLOW_SECONDS * len(task):
            with ThreadPoolExecutor(_NUM_THREADS) as pool:
                found += pool.map(_read_task, tasks[len(found) :])
    return np.concatenate([np.zeros((0, 2), dtype=np.int64), *found])


def _read_task(paths: Sequence[str]) -> np.ndarray:
    return np.array([_read(path) for path in paths], dtype=np.int64).reshape(-1, 2)


def _read(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: not a path at all, such as one with a zero byte
        return -1, -1
    return status.st_size, status.st_mtime_ns


def hash_rows(num_files: np.ndarray, signatures: np.ndarray) -> np.ndarray:
    """Return a hash of the signatures of each row's files, int64 (rows,).

    num_files: of each row.
    signatures: of all files, row after row, from `read_signatures`.
    """
    ends = np.cumsum(num_files)
    hashes = [_hash(signatures[start:end]) for start, end in zip(ends - num_files, ends, strict=True)]
    return np.array(hashes, dtype=np.int64)


def _hash(signatures: np.ndarray) -> int:
    digest = hashlib.blake2b(np.ascontiguousarray(signatures).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)


def hash_files(paths: Sequence[str]) -> int:
    """Return the hash of the present signatures of a row's files, as `hash_rows` does."""
    return _hash(_read_task(paths))
