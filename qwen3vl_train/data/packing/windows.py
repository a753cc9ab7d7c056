"""Windows of rows that are planned together, from sources whose costs are all known before training.

Streams make their windows in `stream.py`. Both kinds are planned, packed and dealt to ranks by `loader.py`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from qwen3vl_train.data.errors import Reject
from qwen3vl_train.data.packing.index import Index
from qwen3vl_train.data.packing.packs import Families, ReadIndexedRow, ScannedRow
from qwen3vl_train.data.packing.plan import CostModel, FamilyCosts, random_stream
from qwen3vl_train.data.sources import Source

Cursor = dict[str, Any]
"""Where a window begins, as JSON. Its `epoch` counts from 0; the rest is the producer's own."""


@dataclass
class Window:
    """Neighbouring families that are planned together."""

    epoch: int  # counted from 0
    ends_epoch: bool  # no window of this epoch follows
    next_cursor: Cursor  # of the next window, in the next epoch where this one ends it
    order_seed: tuple[int, ...]  # from which the order of the steps is drawn; other windows have others
    families: Families  # the rows of each, in the form that the producer's `read_row` takes
    costs: FamilyCosts
    num_rows: int = 0  # scanned for this window
    num_dropped: int = 0  # of them, as too long
    rejects: list[Reject] = field(default_factory=list)  # rows that cannot be used
    skipped: list[int] = field(default_factory=list)  # their positions in the window
    content_hash: int = 0  # of what the plan follows from, where reading the rows again might find something else


class WindowProducer(Protocol):
    """Make windows, the same ones on every rank."""

    num_usable: int | None
    """Rows that can be used, where that is known before they are read."""
    counts: tuple[int, int]
    """Rows scanned, and those of them dropped as too long, before the first window."""
    read_row: Callable[[Any], ScannedRow]
    """Reads a row of `Window.families`; sent to worker processes."""

    def start(self, epoch: int = 0) -> Cursor:
        """Return the cursor of the first window of an epoch."""
        ...

    def windows(self, cursor: Cursor, skipped: Sequence[int] = ()) -> Iterator[Window]:
        """Yield the windows from a cursor on, epoch after epoch, without end.

        skipped: `Window.skipped` of the first window as it was found before; these rows are skipped again, whether or
        not they can be read by now.
        """
        ...

    def row_key(self, row: Any) -> Any:
        """Return what ranks compare of a row of `Window.families`; its repr is its content."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Return everything that the windows follow from, as JSON."""
        ...


def check_weights(sources_with_weights: Sequence[tuple[Any, float]]) -> None:
    """Raise ValueError for a weight that is not a number above 0."""
    for source, weight in sources_with_weights:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"data.train: {source.name}: weight is {weight}; use a number above 0")


class IndexedWindows:
    """A `WindowProducer` over indexed sources: all usable rows of an epoch, by default in an order that seed draws."""

    def __init__(
        self,
        sources_with_weights: Sequence[tuple[Source, float]],
        index: Index,
        *,
        seed: int,
        shuffle: bool = True,
        size: int = 8192,
        cost_model: CostModel | None = None,
    ) -> None:
        """Prepare; nothing is read. Raises ValueError for a weight out of range.

        shuffle: else the rows of an epoch are those of the sources one after the other, each in its own order.
        sources_with_weights: weight 1 is every row once an epoch, 2 twice, 0.5 another random half each epoch.
        size: rows of a window: by default so many that almost no pack has room left over.
        """
        self.sources = [source for source, _ in sources_with_weights]
        self.weights = [float(weight) for _, weight in sources_with_weights]
        lengths = [len(source) for source in self.sources]
        assert np.diff(index.starts).tolist() == lengths, f"index of other sources: {index.starts}, rows {lengths}"
        check_weights(sources_with_weights)
        self.index, self.seed, self.shuffle, self.size = index, seed, shuffle, size
        self.cost_model = cost_model or CostModel()
        self.work = self.cost_model.work(index.tokens, index.patches, index.patch_pairs)
        self.costs = FamilyCosts.from_rows(index.tokens, index.patches, self.work, index.num_shrunk)
        self.num_usable: int | None = index.num_usable
        self.counts: tuple[int, int] = (index.num_rows, index.num_dropped)
        self.read_row: Callable[[Any], ScannedRow] = ReadIndexedRow(self.sources, index)

    def start(self, epoch: int = 0) -> Cursor:
        return {"epoch": epoch, "window": 0}

    def windows(self, cursor: Cursor, skipped: Sequence[int] = ()) -> Iterator[Window]:
        """Yield the windows. Of an index without a usable row, every epoch is one empty window."""
        epoch, first = cursor["epoch"], cursor["window"]
        while True:
            order = self._epoch_order(epoch)
            count = max(1, math.ceil(len(order) / self.size))
            for number in range(first, count):
                rows = order[number * self.size : (number + 1) * self.size]
                ends_epoch = number == count - 1
                following = self.start(epoch + 1) if ends_epoch else {"epoch": epoch, "window": number + 1}
                families = [(row,) for row in rows.tolist()]
                costs = FamilyCosts(*(column[rows] for column in self.costs))
                yield Window(epoch, ends_epoch, following, (self.seed, epoch, 1, number), families, costs)
            epoch, first = epoch + 1, 0

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """Return the rows of an epoch in their order: each usable row as often as its source's weight says."""
        stream = random_stream((self.seed, epoch, 0))
        chosen = []
        for source, weight in enumerate(self.weights):
            rows = self.index.usable(source)
            repeats, fraction = int(weight), weight - int(weight)
            some = stream.permutation(len(rows))[: max(round(fraction * len(rows)), 1 if weight < 1 else 0)]
            chosen += [rows] * repeats + [rows[np.sort(some)]]
        order = np.concatenate(chosen)
        return order[stream.permutation(len(order))] if self.shuffle else order

    def row_key(self, row: int) -> int:
        return row

    def fingerprint(self) -> dict[str, Any]:
        return {
            "sources": [source.fingerprint() for source in self.sources],
            "weights": self.weights,
            "costs": self.index.digest(),
            "seed": self.seed,
            "window": self.size,
            "cost_model": repr(self.cost_model),
        }
