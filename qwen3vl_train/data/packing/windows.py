"""Stretches of a stream that are planned together: read and looked at on one rank, read after it on the others.

What can be used is found out once: an image that one machine cannot read for a moment must not change the plan of one
rank alone, and no rank but one downloads media to learn their size.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import Any, NamedTuple

from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.encode.encoder import SampleCost
from qwen3vl_train.data.errors import Reject, RowFault
from qwen3vl_train.data.packing.index import LengthRule
from qwen3vl_train.data.packing.mixture import Cursor, Mixture
from qwen3vl_train.data.packing.steps import mark_of
from qwen3vl_train.data.rows.media_files import stamp_of
from qwen3vl_train.data.rows.sample import Sample, TextPart
from qwen3vl_train.data.sources import StreamRow

_MAX_BYTES = 512 << 20
"""Of media inside the rows of one window, which are held in memory; the window ends early."""
_PIECE_ROWS, _PIECE_BYTES = 256, 64 << 20
"""Of the rows that a follower's reader hands over at a time."""
PIECES_AHEAD = 8
"""That it reads before they are asked for: as many rows as the usual window."""


class StreamedRow(NamedTuple):
    """A row as it was when it was read. sample: or why it cannot be used. file, number: for people. tokens: it has, 0
    where nobody looked. stamp: of its media files, see `stamp_of`.
    """

    sample: Sample | RowFault
    file: str
    number: int
    tokens: int
    stamp: int


@dataclass
class Window:
    """Neighbouring rows of the stream. rows: those that can be used, and costs: of each.

    names: file (without its folder) and number of every row. places: of the usable rows among them. left_out: of those
    that cannot be used. behind: cursor of the first row behind the window, in the next epoch where ends_epoch.
    """

    epoch: int
    behind: Cursor
    rows: list[StreamedRow] = field(default_factory=list)
    costs: list[SampleCost] = field(default_factory=list)
    names: list[tuple[str, int]] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    num_dropped: int = 0
    ends_epoch: bool = False

    @property
    def num_rows(self) -> int:
        return len(self.names)

    def mark(self) -> int:
        """Return a hash of all that the plan of the window follows from."""
        return mark_of(repr((self.places, self.costs)))

    def outcome(self) -> dict[str, Any]:
        """Return all but the rows themselves, as JSON."""
        return {**self.__dict__, "rows": []}

    @classmethod
    def of_outcome(cls, outcome: dict[str, Any]) -> "Window":
        window = cls(**outcome)
        window.costs = [SampleCost(*cost) for cost in window.costs]
        window.names = [(file, number) for file, number in window.names]
        window.rejects = [Reject(*reject) for reject in window.rejects]
        return window


class Scanner:
    """Reads the rows of a mixture from a cursor on, for ever."""

    def __init__(self, mixture: Mixture, collator: MultimodalCollator, rule: LengthRule, window: int) -> None:
        self.mixture, self.collator, self.rule, self.window = mixture, collator, rule, window

    def windows(self, start: tuple[Cursor, Sequence[int]]) -> Iterator[Window]:
        """Yield windows from a cursor on; they end with their epoch.

        Start is the cursor, and the rows of the first window that were left out when it was read before: they are left
        out again, without being looked at. Raises ValueError when an epoch holds no usable row.
        """
        cursor, left_out = start
        num_usable, whole_epoch = 0, cursor == self.mixture.start(cursor["epoch"])
        seen: list[Reject] = []
        num_rows = 0
        while True:
            window = self._look(cursor, left_out)
            num_usable += len(window.rows)
            num_rows += window.num_rows
            seen = (seen + window.rejects)[:3]
            if window.ends_epoch:
                if whole_epoch and not num_usable:
                    names = ", ".join(part.name for part in self.mixture.parts)
                    shown = "".join(f"\n  - {reject}" for reject in seen)
                    raise ValueError(
                        f"{names}: nothing to learn from, none of {num_rows} rows can be used; mend the rows{shown}"
                    )
                num_usable, num_rows, whole_epoch = 0, 0, True
            yield window
            cursor, left_out = window.behind, ()

    def _look(self, cursor: Cursor, left_out: Sequence[int]) -> Window:
        window = Window(cursor["epoch"], cursor, left_out=list(left_out))
        known = set(left_out)
        num_bytes = 0
        for behind, row in self.mixture.rows(cursor):
            window.behind = behind
            window.names.append((os.path.basename(row.file), row.row_number))
            place = window.num_rows - 1
            try:
                if place in known:
                    continue
                if isinstance(row.sample, RowFault):
                    raise row.sample
                cost = self.rule.admit(row.sample, self.collator)
            except RowFault as fault:
                window.rejects.append(Reject.from_fault(row.file, row.row_number, fault))
                window.left_out.append(place)
            else:
                if cost is None:
                    window.num_dropped += 1
                else:
                    window.rows.append(_streamed(row, cost.tokens))
                    window.costs.append(cost)
                    window.places.append(place)
                    num_bytes += _inline_bytes(row.sample)
            if window.num_rows == self.window or num_bytes > _MAX_BYTES:
                return window
        window.behind, window.ends_epoch = self.mixture.start(cursor["epoch"] + 1), True
        return window

    def pieces(self, cursor: Cursor) -> Iterator[list[StreamedRow | None]]:
        """Yield the rows as they are, a few at a time; None stands behind the last row of an epoch."""
        epoch = cursor["epoch"]
        piece: list[StreamedRow | None] = []
        num_bytes = 0
        while True:
            for _, row in self.mixture.rows(cursor):
                piece.append(_streamed(row, 0))
                num_bytes += 0 if isinstance(row.sample, RowFault) else _inline_bytes(row.sample)
                if len(piece) == _PIECE_ROWS or num_bytes > _PIECE_BYTES:
                    yield piece
                    piece, num_bytes = [], 0
            yield [*piece, None]
            piece, num_bytes, epoch = [], 0, epoch + 1
            cursor = self.mixture.start(epoch)


def follow(outcomes: Iterator[dict[str, Any]], pieces: Iterator[list[StreamedRow | None]]) -> Iterator[Window]:
    """Yield the windows that another rank has looked at, with the rows as this one reads them.

    A row that cannot be read here stays in its place, as its fault. Raises ValueError where the rows are other ones.
    """
    rows = chain.from_iterable(pieces)
    for outcome in outcomes:
        window = Window.of_outcome(outcome)
        found: list[StreamedRow] = []
        while len(found) < window.num_rows and (row := next(rows)) is not None:
            found.append(row)
        _check_same(found, window, next(rows) if window.ends_epoch and len(found) == window.num_rows else None)
        window.rows = [
            found[place]._replace(tokens=cost.tokens) for place, cost in zip(window.places, window.costs, strict=True)
        ]
        yield window


def _check_same(found: list[StreamedRow], window: Window, surplus: StreamedRow | None) -> None:
    """surplus: a row that is here where the epoch ends there."""
    names = [_name(row) for row in found] + ([_name(surplus)] if surplus else [])
    if names == window.names:
        return
    ours, theirs = next(pair for pair in zip_longest(names, window.names) if pair[0] != pair[1])
    raise ValueError(
        f"data.train: the stream goes on with {_place(ours)} here and with {_place(theirs)} on rank 0; give all ranks "
        "the same files"
    )


def _place(name: tuple[str, int] | None) -> str:
    return f"{name[0]}:{name[1]}" if name else "its end"


def _name(row: StreamedRow) -> tuple[str, int]:
    return os.path.basename(row.file), row.number


def _streamed(row: StreamRow, tokens: int) -> StreamedRow:
    stamp = 0 if isinstance(row.sample, RowFault) else stamp_of(row.sample)
    return StreamedRow(row.sample, row.file, row.row_number, tokens, stamp)


def _inline_bytes(sample: Sample) -> int:
    """Return how much memory the media take that lie inside a row."""
    parts = [part for message in sample.messages for part in message.content if not isinstance(part, TextPart)]
    return sum(_size(getattr(part, "image", None) or getattr(part, "video", None)) for part in parts)


def _size(medium: Any) -> int:
    if isinstance(medium, bytes | str):
        return len(medium)
    if isinstance(medium, list | tuple):
        return sum(_size(item) for item in medium)
    return 3 * medium.width * medium.height if hasattr(medium, "width") else 0
