"""Several sources as one endless stream of rows, epoch after epoch, that can resume at any row."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.data.packing.plan import random_stream
from qwen3vl_train.data.sources import Source, StreamRow, StreamSource

Cursor = dict[str, Any]
"""Where a mixture continues, as JSON: the epoch, and for each part its pass, its row in that, the state of its source,
and how many rows were drawn from it."""


class InOrder:
    """A stream, read in its own order."""

    def __init__(self, source: StreamSource, num_rows: int | None = None) -> None:
        self.source, self.num_rows = source, num_rows  # None: not known

    def rows(self, state: dict[str, Any] | None, seed: tuple[int, ...]) -> Iterator[StreamRow]:
        """Yield the rows after a state, in the order of the source whatever the seed."""
        return self.source.rows(state)


class Numbered:
    """A source whose rows are known by number, read in an order that the seed draws, or else in the file's."""

    def __init__(self, source: Source, shuffle: bool = True) -> None:
        self.source, self.num_rows, self.shuffle = source, len(source), shuffle

    def rows(self, state: dict[str, Any] | None, seed: tuple[int, ...]) -> Iterator[StreamRow]:
        """Yield the rows after a state."""
        rows = len(self.source)
        order = random_stream(seed).permutation(rows) if self.shuffle else range(rows)
        for position in range(state["position"] if state else 0, len(order)):
            row = int(order[position])
            try:
                sample = self.source.sample(row)
            except RowFault as fault:
                sample = fault
            yield StreamRow({"position": position + 1}, sample, self.source.row_number(row), self.source.name)


@dataclass(frozen=True)
class Part:
    """One source of a mixture. weight: how often a row of it is drawn in an epoch; a fraction draws by chance."""

    reader: InOrder | Numbered
    weight: float

    @property
    def name(self) -> str:
        return self.reader.source.name

    def draw(self, position: dict[str, Any], seed: tuple[int, ...]) -> Iterator[tuple[dict[str, Any], StreamRow]]:
        """Yield (position after the row, row) from a position on, through all passes of one epoch."""
        whole, fraction = int(self.weight), self.weight - int(self.weight)
        number, state, count = position["pass"], position["state"], position["row"]
        while number < whole + (fraction > 0):
            for row in self.reader.rows(state, (*seed, number)):
                count += 1
                if number < whole or _chance((*seed, number, count)) < fraction:
                    yield {"pass": number, "state": row.state, "row": count}, row
            number, state, count = number + 1, None, 0


class Mixture:
    """Rows of all parts in turn, each at its own even pace until it has no more in this epoch.

    Where the number of rows of every part is known, all end together; else the pace is the weight alone.
    """

    def __init__(self, parts: Sequence[Part], seed: int) -> None:
        self.parts, self.seed = parts, seed
        known = [part.reader.num_rows for part in parts]
        rows = [1] * len(parts) if None in known else [number or 1 for number in known]
        self.paces = [part.weight * number for part, number in zip(parts, rows, strict=True)]

    def start(self, epoch: int = 0) -> Cursor:
        """Return the cursor of the first row of an epoch."""
        return {"epoch": epoch, "parts": [{"pass": 0, "state": None, "row": 0, "drawn": 0} for _ in self.parts]}

    def rows(self, cursor: Cursor) -> Iterator[tuple[Cursor, StreamRow]]:
        """Yield (cursor after the row, row) to the end of the cursor's epoch."""
        epoch, positions = cursor["epoch"], list(cursor["parts"])
        draws = {at: part.draw(positions[at], (self.seed, epoch, at)) for at, part in enumerate(self.parts)}
        while draws:
            # The part that is furthest below its pace; whether it has ended shows when it is asked.
            at = min(draws, key=lambda at: ((positions[at]["drawn"] + 1) / self.paces[at], at))
            drawn = next(draws[at], None)
            if drawn is None:
                del draws[at]
            else:
                positions[at] = {**drawn[0], "drawn": positions[at]["drawn"] + 1}
                yield {"epoch": epoch, "parts": list(positions)}, drawn[1]


def _chance(parts: tuple[int, ...]) -> float:
    """Return a number in 0..1 that follows from its arguments alone."""
    words = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(words) / 2**64
