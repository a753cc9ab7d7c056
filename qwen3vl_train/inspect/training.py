"""The training rows of a recipe and the packs they make, whether all are indexed or the first of a stream are read."""

from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from qwen3vl_train.config import Recipe
from qwen3vl_train.data.collate import MultimodalCollator
from qwen3vl_train.data.faults import RowFault
from qwen3vl_train.data.formats import Sample
from qwen3vl_train.data.index import Index, build_index
from qwen3vl_train.data.loader import TrainLoader
from qwen3vl_train.data.mixture import InOrder, Part
from qwen3vl_train.data.plan import plan_packs
from qwen3vl_train.data.rows import RowRules
from qwen3vl_train.data.sources import Source, StreamRow, entry_rules
from qwen3vl_train.data.stream import StreamLoader
from qwen3vl_train.train.data import TrainingData, length_rule


@dataclass(frozen=True)
class Training:
    """sources: the files, as `index` numbers them, with their weights. packs: row numbers of the index.

    streamed: only the first rows of each source were read, and packs are of these alone; else of the first epoch.
    """

    collate: MultimodalCollator
    index: Index
    sources: list[Source]
    weights: list[float]
    packs: list[list[int]]
    streamed: bool

    def sample(self, number: int) -> Sample:
        """Read a row of the index. Raises RowFault."""
        place, row = self.index.locate(number)
        return self.sources[place].sample(row)


class ReadRows:
    """A `Source` of rows of one file that were read from a stream, and are kept."""

    def __init__(self, name: str, rules: RowRules) -> None:
        self.name, self.rules = name, rules
        self.media_root: str | None = None  # each sample has its own
        self._rows: list[StreamRow] = []

    def add(self, row: StreamRow) -> None:
        self._rows.append(row)

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, row: int) -> Sample:
        sample = self._rows[row].sample
        if isinstance(sample, RowFault):
            raise sample
        return sample

    def row_number(self, row: int) -> int:
        return self._rows[row].row_number

    def fingerprint(self) -> dict[str, Any]:
        return {"rows": len(self._rows)}


def open_training(recipe: Recipe, data: TrainingData, max_rows: int | None) -> Training:
    """Return the training rows: all of them where they are indexed, else the first of each source.

    Of a stream, one window is read (data.stream_window), or max_rows where that is less. Raises ValueError where none
    of what was read can be used.
    """
    loader = data.loader
    if isinstance(loader, TrainLoader):
        packs = loader.epoch_packs(0)
        return Training(loader.collator, loader.index, [*loader.sources], loader.weights, packs, streamed=False)
    most = loader.window if max_rows is None else min(loader.window, max_rows)
    streams = iter([entry for entry in recipe.data.train if entry.streaming])
    sources: list[ReadRows] = []
    weights: list[float] = []
    for part in loader.parts:
        reader = part.reader
        rules = entry_rules(next(streams)) if isinstance(reader, InOrder) else reader.source.rules
        files = _read(part, rules, most, recipe.train.seed)
        sources += files
        weights += [part.weight] * len(files)
    index = build_index(sources, loader.collator, rule=length_rule(recipe.data))
    return Training(loader.collator, index, [*sources], weights, _plan(index, loader), streamed=True)


def _read(part: Part, rules: RowRules, most: int, seed: int) -> list[ReadRows]:
    """Read the first rows of a source, one list for each of its files."""
    files: dict[str, ReadRows] = {}
    for row in islice(part.reader.rows(None, (seed,)), most):
        if row.file not in files:
            files[row.file] = ReadRows(row.file, rules)
        files[row.file].add(row)
    return list(files.values())


def _plan(index: Index, loader: StreamLoader) -> list[list[int]]:
    numbers = np.flatnonzero(index.tokens)
    if not numbers.size:
        first = f"; the first: {index.rejects[0]}" if index.rejects else ""
        raise ValueError(f"data.train: none of the first {index.num_rows} rows of the streams can be used{first}")
    tokens, patches, pairs = (column[numbers] for column in (index.tokens, index.patches, index.patch_pairs))
    packs = plan_packs(tokens, patches, loader.cost_model.work(tokens, patches, pairs), loader.limits)
    return [numbers[pack].tolist() for pack in packs]
