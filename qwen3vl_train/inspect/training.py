"""Open the rows of a recipe, entry by entry, and plan the packs that they make.

The rows are those of the whole index, or the first ones of each source if one is streamed.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from qwen3vl_train.config import Recipe
from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.errors import Reject, RowFault
from qwen3vl_train.data.open import cost_model, length_rule, pack_limits
from qwen3vl_train.data.packing.index import Index, build_index
from qwen3vl_train.data.packing.loader import Loader
from qwen3vl_train.data.packing.mixture import InOrder, Numbered
from qwen3vl_train.data.packing.plan import FamilyCosts, pack_in_order, plan_packs
from qwen3vl_train.data.packing.windows import IndexedWindows
from qwen3vl_train.data.rows.boxes import NO_CONVENTION, listed_marks
from qwen3vl_train.data.rows.formats import column_names
from qwen3vl_train.data.rows.parse import RowRules
from qwen3vl_train.data.rows.sample import Sample
from qwen3vl_train.data.selection import open_rows
from qwen3vl_train.data.sources import FileSource, Source, StreamRow, entry_rules, open_sources, open_stream
from qwen3vl_train.data.sources.files import cache_folder
from qwen3vl_train.inspect.boxes import ListedMarks
from qwen3vl_train.public_names import last_part, public_name
from qwen3vl_train.tracking.console import IndexProgress


@dataclass(frozen=True)
class Training:
    """The training rows and their packs.

    sources: the files, as `index` numbers them, with their weights.
    packs: row numbers of the index; none if no row can be used.
    num_steps: of the run.
    streamed: whether only the first rows of each source were read; packs are then of these alone, else of the first
        epoch.
    """

    collate: MultimodalCollator
    index: Index
    sources: Sequence[Source]
    weights: list[float]
    packs: list[list[int]]
    num_steps: int
    streamed: bool

    def sample(self, number: int) -> Sample:
        """Read a row of the index. Raises RowFault."""
        source, row = self.index.locate(number)
        return self.sources[source].sample(row)


class RowRef(NamedTuple):
    """Indices, all from 0, of an entry, a file of the entry, and a row of the file."""

    entry: int
    file: int
    row: int


@dataclass(frozen=True)
class IndexedFile:
    """One file. number: its index among the sources of `index`. rejects: its rows that the index could not use."""

    source: Source
    index: Index
    number: int
    rejects: list[Reject]

    @property
    def first(self) -> int:
        """Number of its first row in the index."""
        return int(self.index.starts[self.number])

    def usable(self) -> np.ndarray:
        """Return the numbers of its usable rows in the index."""
        return self.index.usable(self.number)


@dataclass
class Entry:
    """One entry under data.train or data.eval. number: its index among all. role: 'train' or 'eval'."""

    number: int
    name: str
    role: str
    weight: float
    files: list[IndexedFile] = field(default_factory=list)

    def evenly_spaced(self, most: int | None) -> list[RowRef]:
        """Return its usable rows, at most so many of them, evenly spaced."""
        rows = [
            RowRef(self.number, file_number, row - file.first)
            for file_number, file in enumerate(self.files)
            for row in file.usable().tolist()
        ]
        if most is None or most >= len(rows):
            return rows
        return [rows[number] for number in np.linspace(0, len(rows) - 1, most).round().astype(np.int64)]

    def sample(self, ref: RowRef) -> Sample:
        """Read one row. Raises RowFault."""
        return self.files[ref.file].source.sample(ref.row)

    def listed_marks(self, ref: RowRef) -> ListedMarks | None:
        """Return what a row lists under boxes and points, None if there is nothing. Raises RowFault."""
        source = self.files[ref.file].source
        if not isinstance(source, FileSource):  # a stream keeps samples only
            return None
        raw, rules = source.raw(ref.row), source.rules
        if not isinstance(raw.row, dict):  # a row that is the list of its messages
            return None
        entries = {name: values or [] for name, values in listed_marks(raw.row, rules.columns).items()}
        if not any(entries.values()):
            return None
        columns = {column_names(field, rules.columns)[0] for field in ("boxes", "points")}
        without = {key: value for key, value in raw.row.items() if key not in {*columns, "bbox"}}
        unfilled = replace(rules, boxes=NO_CONVENTION).sample(without, "unfilled", source.media_root, raw.resolve)
        return unfilled, entries

    def visual_tokens(self, ref: RowRef) -> int:
        file = self.files[ref.file]
        return int(file.index.visual_tokens[file.first + ref.row])

    def tokens(self, ref: RowRef) -> int:
        file = self.files[ref.file]
        return int(file.index.tokens[file.first + ref.row])

    def label(self, ref: RowRef) -> str:
        """Name a row of this entry for a person: its number, with its file if there are several."""
        source = self.files[ref.file].source
        return self.label_in(source.name, source.row_number(ref.row))

    def label_in(self, file: str, row_number: int) -> str:
        return str(row_number) if len(self.files) == 1 else f"{last_part(file)}:{row_number}"


class ReadRows:
    """Keep the rows of one file that were read from a stream, as a `Source`."""

    def __init__(self, name: str, rules: RowRules) -> None:
        self.name, self.rules = name, rules
        self.media_root: str | None = None  # each sample has its own
        self.ignored_columns: tuple[str, ...] = ()
        self.rows: list[StreamRow] = []

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, row: int) -> Sample:
        sample = self.rows[row].sample
        if isinstance(sample, RowFault):
            raise sample
        return sample

    def row_number(self, row: int) -> int:
        return self.rows[row].row_number

    def fingerprint(self) -> dict[str, Any]:
        return {"rows": len(self.rows)}


def open_training(recipe: Recipe, collate: MultimodalCollator, max_rows: int | None) -> Training:
    """Return the training rows: all of them, or the first of each source if one is streamed.

    Of a stream, one window is read (data.stream_window), or max_rows if that is less. Raises ValueError for files that
    cannot be read; that no row can be used is a finding, not an error.
    """
    data, train = recipe.data, recipe.train
    if any(entry.streaming for entry in data.train):
        return _read_streams(recipe, collate, max_rows)
    weighted = [(file, entry.weight) for file, entry in open_rows(recipe).train if isinstance(file, FileSource)]
    sources, weights = [file for file, _ in weighted], [weight for _, weight in weighted]
    index = index_files(recipe, collate, sources)
    if not index.num_usable:
        return Training(collate, index, sources, weights, [], 0, streamed=False)
    loader = Loader(
        IndexedWindows(weighted, index, seed=train.seed, shuffle=data.shuffle, cost_model=cost_model(recipe)),
        collate,
        packs_per_step=train.packs_per_step,
        limits=pack_limits(data),
        num_epochs=train.num_epochs if train.num_steps is None else None,
        num_steps=train.num_steps,
        shuffle=data.shuffle,
    )
    packs = [pack.rows for pack in loader.epoch_packs(0)]
    assert loader.num_steps is not None
    return Training(collate, index, sources, weights, packs, loader.num_steps, streamed=False)


def open_held_out(recipe: Recipe, collate: MultimodalCollator) -> list[tuple[Index, list[FileSource]]]:
    """Return every held-out file with its index. Raises ValueError for files that cannot be read."""
    files = [file for of_set in open_rows(recipe).evals.values() for file in of_set]
    return [(index_files(recipe, collate, [file]), [file]) for file in files]


def index_files(recipe: Recipe, collate: MultimodalCollator, sources: Sequence[FileSource]) -> Index:
    """Find the cost of every row, or read it from the cache, which training shares."""
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
        rules = entry_rules(entry, data.follow_links)
        numbered = partial(Numbered, shuffle=data.shuffle)
        readers = (
            [InOrder(open_stream(entry, data.follow_links))]
            if entry.streaming
            else map(numbered, open_sources(entry, data.follow_links))
        )
        files = [file for reader in readers for file in _read(reader, rules, most, recipe.train.seed)]
        sources += files
        weights += [entry.weight] * len(files)
    index = build_index(sources, collate, rule=length_rule(data))
    num_steps = recipe.train.num_steps if index.num_usable else 0
    assert num_steps is not None, "recipes with streams have train.num_steps"
    return Training(collate, index, sources, weights, _plan(recipe, index), num_steps, streamed=True)


def _read(reader: InOrder | Numbered, rules: RowRules, most: int, seed: int) -> list[ReadRows]:
    """Read the first rows of a source, a `ReadRows` for each of its files; an empty one if it has no row."""
    files: dict[str, ReadRows] = {}
    for row in islice(reader.rows(None, (seed,)), most):
        if row.file not in files:
            files[row.file] = ReadRows(row.file, rules)
        files[row.file].rows.append(row)
    for file in files.values():
        file.ignored_columns = reader.source.ignored_columns  # known once rows were read
    return list(files.values()) or [ReadRows(reader.source.name, rules)]


def _plan(recipe: Recipe, index: Index) -> list[list[int]]:
    numbers = np.flatnonzero(index.tokens)
    if not numbers.size:
        return []
    tokens, patches, pairs = (column[numbers] for column in (index.tokens, index.patches, index.patch_pairs))
    work = cost_model(recipe).work(tokens, patches, pairs)
    plan = plan_packs if recipe.data.shuffle else pack_in_order
    packs = plan(FamilyCosts.from_rows(tokens, patches, work), pack_limits(recipe.data))
    return [numbers[pack].tolist() for pack in packs]


def name_entries(training: Training, held_out: list[tuple[Index, list[FileSource]]]) -> list[Entry]:
    """Return the entries of a recipe in order, the training ones first, each under a name of its own."""
    entries: list[Entry] = []
    _group_by_entry(entries, "train", [(training.index, training.sources)], training.weights)
    _group_by_entry(entries, "eval", held_out, [1.0])
    taken: dict[str, int] = {}
    for entry in entries:
        taken[entry.name] = taken.get(entry.name, 0) + 1
        if taken[entry.name] > 1:
            entry.name += f" ({taken[entry.name]})"
    return entries


def _group_by_entry(
    entries: list[Entry], role: str, indexed: Iterable[tuple[Index, Sequence[Source]]], weights: list[float]
) -> None:
    """Add files, grouped by their entry; those of one entry share their rules. weights: of each file of an index."""
    last = None
    for index, sources in indexed:
        rejects = _rejects_of(index, sources)
        for number, source in enumerate(sources):
            if source.rules is not last:
                name = source.rules.label or public_name(source.name)
                entries.append(Entry(len(entries), name, role, weights[number]))
                last = source.rules
            entries[-1].files.append(IndexedFile(source, index, number, rejects[number]))


def _rejects_of(index: Index, sources: Sequence[Source]) -> list[list[Reject]]:
    """Return the rejects of each source. They name a file, which a recipe may list twice, under two sets of rules."""
    by_file: dict[str, dict[int, Reject]] = {}
    for reject in index.rejects:
        by_file.setdefault(reject.file, {})[reject.row] = reject
    found = []
    for number, source in enumerate(sources):
        start, end = index.starts[number], index.starts[number + 1]
        unusable = {source.row_number(row) for row in np.flatnonzero(index.tokens[start:end] == 0).tolist()}
        found.append([reject for row, reject in by_file.get(public_name(source.name), {}).items() if row in unusable])
    return found
