"""What was found out about the rows of one source, and how it is kept on disk between runs."""

import contextlib
import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qwen3vl_train.data.errors import FaultKind
from qwen3vl_train.data.rows.media_files import read_stats, row_stamps

_FORM = 4
"""Of the files written here; one more for every change in what they hold or in how costs are found."""
_DAMAGE = (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error)
"""What reading a cut or altered file raises: every part of it carries a checksum."""


class RowReject(NamedTuple):
    """row: 0..n-1. number: by which a person finds it. transient: the row may be sound at the next look."""

    row: int
    number: int
    reason: str
    kind: FaultKind
    transient: bool = False


@dataclass
class SourceIndex:
    """n rows of one source. costs: int64 (fields of SampleCost, n), 0 where a row is not used. dropped: bool (n,).
    shapes: int8 (n,), index of the row's format in FORMATS, -1 where it could not be read.

    files: media files of all rows, row after row; num_files: int64 (n,), of each; stats: (files, 2), see `read_stats`.
    """

    costs: np.ndarray
    dropped: np.ndarray
    shapes: np.ndarray
    rejects: list[RowReject]
    files: list[str]
    num_files: np.ndarray
    stats: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.num_files)

    def stamps(self) -> np.ndarray:
        return row_stamps(self.num_files, self.stats)

    def rows_to_look_at(self) -> np.ndarray:
        """Return the rows whose media files are not as they were, and those whose fault may have passed, ascending.

        Asks the disk for every file.
        """
        changed = (read_stats(self.files) != self.stats).any(axis=1)
        transient = np.array([reject.row for reject in self.rejects if reject.transient], dtype=np.int64)
        return np.union1d(np.repeat(np.arange(self.num_rows), self.num_files)[changed], transient)

    @classmethod
    def join(cls, parts: Sequence["SourceIndex"], *, num_costs: int) -> "SourceIndex":
        """Put stretches of rows one behind the other."""
        rejects, start = [], 0
        for part in parts:
            rejects += [reject._replace(row=start + reject.row) for reject in part.rejects]
            start += part.num_rows
        return cls(
            np.concatenate([np.zeros((num_costs, 0), dtype=np.int64), *(part.costs for part in parts)], axis=1),
            np.concatenate([np.zeros(0, dtype=bool), *(part.dropped for part in parts)]),
            np.concatenate([np.zeros(0, dtype=np.int8), *(part.shapes for part in parts)]),
            rejects,
            [path for part in parts for path in part.files],
            np.concatenate([np.zeros(0, dtype=np.int64), *(part.num_files for part in parts)]),
            np.concatenate([np.zeros((0, 2), dtype=np.int64), *(part.stats for part in parts)]),
        )

    def with_rows(self, rows: np.ndarray, fresh: "SourceIndex") -> "SourceIndex":
        """Replace some rows, given ascending, by what was found of them anew."""
        pieces: list[SourceIndex] = []
        ends = np.concatenate([[0], np.cumsum(self.num_files)])
        fresh_ends = np.concatenate([[0], np.cumsum(fresh.num_files)])
        start = 0
        for at, row in enumerate([*rows.tolist(), self.num_rows]):
            pieces.append(self._stretch(start, row, ends))
            if at < len(rows):
                pieces.append(fresh._stretch(at, at + 1, fresh_ends))
            start = row + 1
        return SourceIndex.join(pieces, num_costs=len(self.costs))

    def _stretch(self, start: int, end: int, ends: np.ndarray) -> "SourceIndex":
        first, last = int(ends[start]), int(ends[end])
        return SourceIndex(
            self.costs[:, start:end],
            self.dropped[start:end],
            self.shapes[start:end],
            [reject._replace(row=reject.row - start) for reject in self.rejects if start <= reject.row < end],
            self.files[first:last],
            self.num_files[start:end],
            self.stats[first:last],
        )


def _file_of(folder: Path, key: dict[str, Any]) -> Path:
    words = json.dumps([_FORM, key], sort_keys=True)
    return folder / f"{hashlib.sha256(words.encode()).hexdigest()[:32]}.npz"


def save_index(folder: Path, key: dict[str, Any], index: SourceIndex) -> None:
    """Write a source's index aside, then put it in its place. Raises ValueError when it cannot be written."""
    file = _file_of(folder, key)
    words = json.dumps({"key": key, "rejects": index.rejects, "files": index.files}, sort_keys=True)
    aside = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as out:
            np.savez(
                out,
                costs=index.costs,
                dropped=index.dropped,
                shapes=index.shapes,
                num_files=index.num_files,
                stats=index.stats,
                words=np.frombuffer(words.encode(errors="surrogateescape"), dtype=np.uint8),
            )
        os.replace(aside, file)
    except OSError as error:
        raise ValueError(
            f"{folder}: the index of the data cannot be kept there ({error.strerror or error}); free space or set "
            "QWEN3VL_TRAIN_CACHE to another folder"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def load_index(folder: Path, key: dict[str, Any], num_rows: int) -> SourceIndex | None:
    """Read a source's index; None where there is none or it is damaged, which a new one then replaces."""
    try:
        with np.load(_file_of(folder, key), allow_pickle=False) as arrays:
            words = json.loads(arrays["words"].tobytes().decode(errors="surrogateescape"))
            index = SourceIndex(
                arrays["costs"],
                arrays["dropped"],
                arrays["shapes"],
                [RowReject(*reject) for reject in words["rejects"]],
                words["files"],
                arrays["num_files"],
                arrays["stats"],
            )
    except _DAMAGE:
        return None
    fits = index.num_rows == num_rows and len(index.files) == len(index.stats) == index.num_files.sum()
    return index if fits and words["key"] == json.loads(json.dumps(key)) else None
