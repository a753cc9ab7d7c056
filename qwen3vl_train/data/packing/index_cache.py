"""The index of one source, and the file that keeps it between runs."""

import hashlib
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qwen3vl_train.atomic_file import atomic_file
from qwen3vl_train.data.encode.encoder import SampleCost
from qwen3vl_train.data.errors import FaultKind
from qwen3vl_train.data.signatures import hash_rows, read_signatures

_VERSION = 8
"""Of the files written here; increase it with every change of their content or of how costs are found."""
_ARRAYS = ("costs", "dropped", "formats", "num_files", "signatures")
"""Of a SourceIndex: these are kept as arrays, the rest as JSON."""
_NUM_COSTS = len(SampleCost._fields)
_DAMAGE = (OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What reading a truncated or altered file raises: every part of it carries a checksum. RuntimeError: an entry that now
claims to be encrypted, or (NotImplementedError) to be compressed in a way that zipfile does not know."""


class RowReject(NamedTuple):
    """A row that cannot be used."""

    row: int  # 0..n-1
    number: int  # its line or row number in the file, for messages
    reason: str
    kind: FaultKind
    transient: bool  # a retry may succeed


@dataclass
class SourceIndex:
    """The n rows of one source."""

    costs: np.ndarray  # int64 (fields of SampleCost, n), 0 where a row is not used
    dropped: np.ndarray  # bool (n,), whether the row is dropped as too long
    formats: np.ndarray  # int8 (n,), index of the row's format in FORMATS, -1 where it could not be read
    rejects: list[RowReject]
    files: list[str]  # media files of all rows, row after row
    num_files: np.ndarray  # int64 (n,), of each row
    signatures: np.ndarray  # of the files, see `read_signatures`

    @property
    def num_rows(self) -> int:
        return len(self.num_files)

    def row_signatures(self) -> np.ndarray:
        """Return a hash of the signatures of each row's media files, int64 (n,)."""
        return hash_rows(self.num_files, self.signatures)

    def rows_to_scan(self) -> np.ndarray:
        """Return the rows whose media files have changed, and those whose fault was transient, ascending.

        Reads the signature of every file.
        """
        changed = (read_signatures(self.files) != self.signatures).any(axis=1)
        transient = np.array([reject.row for reject in self.rejects if reject.transient], dtype=np.int64)
        return np.union1d(np.repeat(np.arange(self.num_rows), self.num_files)[changed], transient)

    @classmethod
    def join(cls, parts: Sequence["SourceIndex"]) -> "SourceIndex":
        """Concatenate chunks of rows."""
        rejects, start = [], 0
        for part in parts:
            rejects += [reject._replace(row=start + reject.row) for reject in part.rejects]
            start += part.num_rows
        return cls(
            np.concatenate([np.zeros((_NUM_COSTS, 0), dtype=np.int64), *(part.costs for part in parts)], axis=1),
            np.concatenate([np.zeros(0, dtype=bool), *(part.dropped for part in parts)]),
            np.concatenate([np.zeros(0, dtype=np.int8), *(part.formats for part in parts)]),
            rejects,
            [path for part in parts for path in part.files],
            np.concatenate([np.zeros(0, dtype=np.int64), *(part.num_files for part in parts)]),
            np.concatenate([np.zeros((0, 2), dtype=np.int64), *(part.signatures for part in parts)]),
        )

    def with_rows(self, rows: np.ndarray, fresh: "SourceIndex") -> "SourceIndex":
        """Return the index with some rows replaced by those of a new scan."""
        both = SourceIndex.join([self, fresh])
        order = np.arange(self.num_rows)
        order[rows] = self.num_rows + np.arange(len(rows))
        rejects = {reject.row: reject for reject in both.rejects}
        last = np.cumsum(both.num_files)
        files = [file for row in order for file in range(last[row] - both.num_files[row], last[row])]
        return SourceIndex(
            both.costs[:, order],
            both.dropped[order],
            both.formats[order],
            [rejects[row]._replace(row=at) for at, row in enumerate(order.tolist()) if row in rejects],
            [both.files[file] for file in files],
            both.num_files[order],
            both.signatures[files],
        )


def _cache_file(folder: Path, key: dict[str, Any]) -> Path:
    return folder / f"{_hash(key)[:32]}.npz"


def _hash(key: dict[str, Any]) -> str:
    """Return a hash: the key itself names files by addresses, which may hold passwords."""
    return hashlib.sha256(json.dumps([_VERSION, key], sort_keys=True).encode()).hexdigest()


def save_index(folder: Path, key: dict[str, Any], index: SourceIndex) -> None:
    """Write a source's index to a temporary file and rename it. Raises ValueError when it cannot be written."""
    file = _cache_file(folder, key)
    words = json.dumps({"key": _hash(key), "rejects": index.rejects, "files": index.files}, sort_keys=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as temporary, temporary.open("wb") as out:
            arrays = {name: getattr(index, name) for name in _ARRAYS}
            np.savez(out, words=np.frombuffer(words.encode(errors="surrogateescape"), dtype=np.uint8), **arrays)
    except OSError as error:
        raise ValueError(
            f"{folder}: the index of the data cannot be kept there ({error.strerror or error}); free space or set "
            "QWEN3VL_TRAIN_CACHE to another folder"
        ) from None


def load_index(folder: Path, key: dict[str, Any], num_rows: int) -> SourceIndex | None:
    """Return a source's index; None where there is none or it is damaged: a new one then replaces it."""
    try:
        with np.load(_cache_file(folder, key), allow_pickle=False) as arrays:
            words = json.loads(arrays["words"].tobytes().decode(errors="surrogateescape"))
            rejects = [RowReject(*reject) for reject in words["rejects"]]
            index = SourceIndex(rejects=rejects, files=words["files"], **{name: arrays[name] for name in _ARRAYS})
    except _DAMAGE:
        return None
    fits = index.num_rows == num_rows and len(index.files) == len(index.signatures) == index.num_files.sum()
    return index if fits and words["key"] == _hash(key) else None
