"""Open the rows of a recipe: all of each entry or max_rows of them, and of the training rows a share held out."""

import hashlib
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qwen3vl_train.config import DataSection, EvalSource, Recipe, TrainSource
from qwen3vl_train.data.packing.plan import random_stream
from qwen3vl_train.data.rows.sample import Sample
from qwen3vl_train.data.sources import FileSource, StreamSource, open_sources, open_stream
from qwen3vl_train.data.sources.base import RawRow
from qwen3vl_train.public_names import last_part

HELD_OUT = "held_out"
"""The name of the held-out set that data.eval_share makes."""
# What is drawn, as part of the seed: draws for different purposes do not depend on each other.
_MAX_ROWS_OF_TRAIN, _MAX_ROWS_OF_EVAL, _EVAL_SHARE = 11, 12, 13


class SomeRows(FileSource):
    """Some rows of a file, in its order. They keep the numbers that they have in it."""

    def __init__(self, source: FileSource, rows: np.ndarray) -> None:
        """rows: ascending, int64."""
        self.source, self.rows = source, rows
        self.name, self.media_root, self.rules, self.file = source.name, source.media_root, source.rules, source.file
        self.ignored_columns = source.ignored_columns

    def _open(self) -> dict[str, Any]:
        raise AssertionError("the file is open already")

    def __len__(self) -> int:
        return len(self.rows)

    def raw(self, row: int) -> RawRow:
        return self.source.raw(int(self.rows[row]))

    def sample(self, row: int) -> Sample:
        return self.source.sample(int(self.rows[row]))

    def row_number(self, row: int) -> int:
        return self.source.row_number(int(self.rows[row]))

    def fingerprint(self) -> dict[str, Any]:
        return {**self.source.fingerprint(), "chosen": hashlib.sha256(self.rows.tobytes()).hexdigest()}


class OpenedRows(NamedTuple):
    """train: each file or stream, with its entry. evals: the files of each held-out set, by its name."""

    train: list[tuple[FileSource | StreamSource, TrainSource]]
    evals: dict[str, list[FileSource]]


def open_rows(recipe: Recipe) -> OpenedRows:
    """Open everything under `data`. Which rows are chosen follows from train.seed, the same on every rank.

    Raises ValueError for files that cannot be read. Held-out sets of one name are one set, see `check_names`.
    """
    data, seed = recipe.data, recipe.train.seed
    train: list[tuple[FileSource | StreamSource, TrainSource]] = []
    evals: dict[str, list[FileSource]] = {HELD_OUT: []} if data.eval_share else {}
    for number, entry in enumerate(data.train):
        if entry.streaming:
            train.append((open_stream(entry, data.follow_links), entry))
            continue
        files = _at_most(entry, open_sources(entry, data.follow_links), (seed, _MAX_ROWS_OF_TRAIN, number))
        if data.eval_share:
            held_out, files = _split(entry, files, data.eval_share, (seed, _EVAL_SHARE, number))
            evals[HELD_OUT] += held_out
        train += [(file, entry) for file in files]
    for number, entry in enumerate(data.eval):
        evals.setdefault(_name_of(entry), [])
        evals[_name_of(entry)] += _at_most(
            entry, open_sources(entry, data.follow_links), (seed, _MAX_ROWS_OF_EVAL, number)
        )
    return OpenedRows(train, evals)


def check_names(data: DataSection) -> None:
    """Raise ValueError for two held-out sets of one name: their losses would be one curve."""
    names = [HELD_OUT] * bool(data.eval_share) + [_name_of(entry) for entry in data.eval]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"data.eval: two files are called {name}; give one of them a name")


def _name_of(entry: EvalSource) -> str:
    return entry.name or Path(last_part(entry.path)).stem


def _at_most(entry: TrainSource | EvalSource, files: list[FileSource], seed: tuple[int, ...]) -> list[FileSource]:
    """Return max_rows of the rows of an entry, drawn from all of its files; a file may be left with none."""
    num_rows = sum(map(len, files))
    if entry.max_rows is None or entry.max_rows >= num_rows:
        return files
    return _some(files, _draw(num_rows, entry.max_rows, seed))


def _split(
    entry: TrainSource, files: list[FileSource], share: float, seed: tuple[int, ...]
) -> tuple[list[FileSource], list[FileSource]]:
    """Return a share of the rows of an entry, at least one, and the others, also at least one."""
    num_rows = sum(map(len, files))
    if num_rows < 2:
        raise ValueError(f"{entry.path}: {num_rows} rows cannot be shared out by data.eval_share; give held-out rows")
    drawn = _draw(num_rows, min(num_rows - 1, max(1, round(share * num_rows))), seed)
    return _some(files, drawn), _some(files, np.setdiff1d(np.arange(num_rows), drawn))


def _draw(num_rows: int, wanted: int, seed: tuple[int, ...]) -> np.ndarray:
    return np.sort(random_stream(seed).permutation(num_rows)[:wanted])


def _some(files: list[FileSource], rows: np.ndarray) -> list[FileSource]:
    """Return the rows of all files that are given by their numbers from the first file on."""
    starts = np.cumsum([0, *map(len, files)])
    chosen = [rows[(rows >= start) & (rows < end)] - start for start, end in itertools.pairwise(starts)]
    return [SomeRows(file, of_file) for file, of_file in zip(files, chosen, strict=True) if len(of_file)]
