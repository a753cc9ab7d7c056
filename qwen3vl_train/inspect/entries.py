"""The sources of a recipe as they were opened: one entry under data.train or data.eval, with all of its files."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from qwen3vl_train.data.errors import Reject
from qwen3vl_train.data.packing.index import Index
from qwen3vl_train.data.rows.boxes import NO_CONVENTION
from qwen3vl_train.data.rows.sample import Sample
from qwen3vl_train.data.sources import FileSource, Source
from qwen3vl_train.inspect.marks import Listed


class RowRef(NamedTuple):
    """One row. entry, file: places among the entries and the files of the entry; row: of the file; all from 0."""

    entry: int
    file: int
    row: int


@dataclass(frozen=True)
class IndexedFile:
    """One file: source `place` of `index`. rejects: its rows that the index could not use."""

    source: Source
    index: Index
    place: int
    rejects: list[Reject]

    @property
    def first(self) -> int:
        """Number of its first row in the index."""
        return int(self.index.starts[self.place])

    def usable(self) -> np.ndarray:
        """Return the numbers of its usable rows in the index."""
        return self.index.usable(self.place)


@dataclass
class Entry:
    """One entry of the recipe. number: its place among all. role: 'train' or 'eval'."""

    number: int
    name: str
    role: str
    weight: float
    files: list[IndexedFile] = field(default_factory=list)

    def rows(self) -> list[RowRef]:
        """Return its usable rows."""
        return [
            RowRef(self.number, place, row - file.first)
            for place, file in enumerate(self.files)
            for row in file.usable().tolist()
        ]

    def spread(self, most: int | None) -> list[RowRef]:
        """Return its usable rows, or so many of them, evenly spread."""
        rows = self.rows()
        if most is None or most >= len(rows):
            return rows
        return [rows[place] for place in np.linspace(0, len(rows) - 1, most).round().astype(np.int64)]

    def sample(self, ref: RowRef) -> Sample:
        """Read one row. Raises RowFault."""
        return self.files[ref.file].source.sample(ref.row)

    def listed(self, ref: RowRef) -> Listed | None:
        """Return what a row lists under boxes and points; None where there is nothing. Raises RowFault."""
        source = self.files[ref.file].source
        if not isinstance(source, FileSource):  # a stream keeps samples only
            return None
        raw, rules = source.raw(ref.row), source.rules
        columns = {kind: rules.columns.get(name, name) for kind, name in (("box", "boxes"), ("point", "points"))}
        entries = {kind: raw.row.get(column) or [] for kind, column in columns.items()}
        if not any(entries.values()):
            return None
        without = {key: value for key, value in raw.row.items() if key not in {*columns.values(), "bbox"}}
        unfilled = replace(rules, boxes=NO_CONVENTION).sample(without, "unfilled", source.media_root, raw.resolve)
        return Listed(unfilled, entries)

    def visual_tokens(self, ref: RowRef) -> int:
        file = self.files[ref.file]
        return int(file.index.visual_tokens[file.first + ref.row])

    def tokens(self, ref: RowRef) -> int:
        file = self.files[ref.file]
        return int(file.index.tokens[file.first + ref.row])

    def label(self, ref: RowRef) -> str:
        """Name a row of this entry for a person: its number, with its file where there are several."""
        source = self.files[ref.file].source
        return self.label_in(source.name, source.row_number(ref.row))

    def label_in(self, file: str, row_number: int) -> str:
        return str(row_number) if len(self.files) == 1 else f"{file.rsplit('/', 1)[-1]}:{row_number}"


def entries_of(
    role: str, indexed: Iterable[tuple[Index, Sequence[Source]]], weights: list[float], first: int
) -> list[Entry]:
    """Group files by the entry that they come from, which is told by their rules: files of one entry share theirs.

    weights: of each file, in order. first: number of the first entry.
    """
    entries: list[Entry] = []
    last = None
    for index, sources in indexed:
        rejects = _rejects_of(index, sources)
        for place, source in enumerate(sources):
            if source.rules is not last:
                name = source.rules.label or source.name
                entries.append(Entry(first + len(entries), name, role, weights[place]))
                last = source.rules
            entries[-1].files.append(IndexedFile(source, index, place, rejects[place]))
    return entries


def _rejects_of(index: Index, sources: Sequence[Source]) -> list[list[Reject]]:
    """Return the rejects of each source. They name a file, which the recipe may list twice, under two sets of rules."""
    by_file: dict[str, dict[int, Reject]] = {}
    for reject in index.rejects:
        by_file.setdefault(reject.file, {})[reject.row] = reject
    found = []
    for place, source in enumerate(sources):
        start, end = index.starts[place], index.starts[place + 1]
        unusable = {source.row_number(row) for row in np.flatnonzero(index.tokens[start:end] == 0).tolist()}
        found.append([reject for row, reject in by_file.get(source.name, {}).items() if row in unusable])
    return found
