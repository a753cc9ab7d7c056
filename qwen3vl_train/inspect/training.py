"""The rows of a recipe and the packs they make, whether all are indexed or the first of a stream are read."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from qwen3vl_train.config import Recipe
from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.data.open import cost_model, length_rule, pack_limits
from qwen3vl_train.data.packing.index import Index, build_index
from qwen3vl_train.data.packing.loader import Loader
from qwen3vl_train.data.packing.mixture import InOrder, Shuffled
from qwen3vl_train.data.packing.plan import FamilyCosts, plan_packs
from qwen3vl_train.data.packing.windows import IndexedWindows
from qwen3vl_train.data.rows.parse import RowRules
from qwen3vl_train.data.rows.sample import Sample
from qwen3vl_train.data.sources import FileSource, Source, StreamRow, entry_rules, open_sources, open_stream
from qwen3vl_train.data.sources.files import cache_folder
from qwen3vl_train.tracking.console import IndexProgress


@dataclass(frozen=True)
class Training:
    """sources: the files, as `index` numbers them, with their weights. packs: row numbers of the index; none where no
    row can be used. num_steps: of the run.

    streamed: only the first rows of each source were read, and packs are of these alone; else of the first epoch.
    """

    collate: MultimodalCollator
    index: Index
    sources: list[Source]
    weights: list[float]
    packs: list[list[int]]
    num_steps: int
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


def open_training(recipe: Recipe, collate: MultimodalCollator, max_rows: int | None) -> Training:
    """Return the training rows: all of them where they are indexed, else the first of each source.

    Of a stream, one window is read (data.stream_window), or max_rows where that is less. Raises ValueError for files
    that cannot be read; that no row can be used is a finding, not an error.
    """
    data, train = recipe.data, recipe.train
    if any(entry.streaming for entry in data.train):
        return _read_streams(recipe, collate, max_rows)
    weighted = [(file, entry.weight) for entry in data.train for file in open_sources(entry)]
    sources: list[Source] = [file for file, _ in weighted]
    weights = [weight for _, weight in weighted]
    index = index_files(recipe, collate, [file for file, _ in weighted])
    if not index.num_usable:
        return Training(collate, index, sources, weights, [], 0, streamed=False)
    loader = Loader(
        IndexedWindows(weighted, index, seed=train.seed, cost_model=cost_model(recipe)),
        collate,
        packs_per_step=train.packs_per_step,
        limits=pack_limits(data),
        num_epochs=train.num_epochs if train.num_steps is None else None,
        num_steps=train.num_steps,
    )
    packs = [pack.rows for pack in loader.epoch_packs(0)]
    assert loader.num_steps is not None
    return Training(collate, index, sources, weights, packs, loader.num_steps, streamed=False)


def open_held_out(recipe: Recipe, collate: MultimodalCollator) -> list[tuple[Index, list[FileSource]]]:
    """Return every file under data.eval with its index. Raises ValueError for files that cannot be read."""
    files = [file for entry in recipe.data.eval for file in open_sources(entry)]
    return [(index_files(recipe, collate, [file]), [file]) for file in files]


def index_files(recipe: Recipe, collate: MultimodalCollator, sources: Sequence[FileSource]) -> Index:
    """Find the cost of every row, or read it from the cache that training fills and reads, too."""
    with IndexProgress() as progress:
        return build_index(
            sources, collate, length_rule(recipe.data), num_workers=len(os.sched_getaffinity(0)),
            cache_folder=cache_folder() / "index", progress=progress,
        )  # fmt: skip


def _read_streams(recipe: Recipe, collate: MultimodalCollator, max_rows: int | None) -> Training:
    data = recipe.data
    most = data.stream_window if max_rows is None else min(data.stream_window, max_rows)
    sources: list[Source] = []
    weights: list[float] = []
    for entry in data.train:
        rules = entry_rules(entry)
        readers = [InOrder(open_stream(entry))] if entry.streaming else map(Shuffled, open_sources(entry))
        files = [file for reader in readers for file in _read(reader, rules, most, recipe.train.seed)]
        sources += files
        weights += [entry.weight] * len(files)
    index = build_index(sources, collate, rule=length_rule(data))
    num_steps = recipe.train.num_steps if index.num_usable else 0
    assert num_steps is not None, "recipes with streams have train.num_steps"
    return Training(collate, index, sources, weights, _plan(recipe, index), num_steps, streamed=True)


def _read(reader: InOrder | Shuffled, rules: RowRules, most: int, seed: int) -> list[ReadRows]:
    """Read the first rows of a source, one list for each of its files; one empty list where it has no row."""
    files: dict[str, ReadRows] = {}
    for row in islice(reader.rows(None, (seed,)), most):
        if row.file not in files:
            files[row.file] = ReadRows(row.file, rules)
        files[row.file].add(row)
    return list(files.values()) or [ReadRows(reader.source.name, rules)]


def _plan(recipe: Recipe, index: Index) -> list[list[int]]:
    numbers = np.flatnonzero(index.tokens)
    if not numbers.size:
        return []
    tokens, patches, pairs = (column[numbers] for column in (index.tokens, index.patches, index.patch_pairs))
    work = cost_model(recipe).work(tokens, patches, pairs)
    packs = plan_packs(FamilyCosts.from_rows(tokens, patches, work), pack_limits(recipe.data))
    return [numbers[pack].tolist() for pack in packs]
