"""The cost of every row, found once before training from text and image headers, and the rows that cannot be used."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from qwen3vl_train.data.collate import MultimodalCollator
from qwen3vl_train.data.encode import SampleCost
from qwen3vl_train.data.faults import Reject, RowFault
from qwen3vl_train.data.sources import Source


@dataclass
class Index:
    """Costs of the rows of all sources, numbered through: source s has rows starts[s] .. starts[s+1]-1.

    tokens, visual_tokens, patches, patch_pairs: int64 (rows,), all 0 where the row is rejected.
    """

    starts: np.ndarray
    tokens: np.ndarray
    visual_tokens: np.ndarray
    patches: np.ndarray
    patch_pairs: np.ndarray
    rejects: list[Reject] = field(default_factory=list)

    @classmethod
    def empty(cls, lengths: Sequence[int]) -> "Index":
        """Make an index in which no row is usable yet, for sources of these lengths."""
        starts = np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))]).astype(np.int64)
        tokens, visual_tokens, patches, patch_pairs = np.zeros(
            (len(SampleCost._fields), int(starts[-1])), dtype=np.int64
        )
        return cls(starts, tokens, visual_tokens, patches, patch_pairs)

    @property
    def num_rows(self) -> int:
        return len(self.tokens)

    @property
    def num_usable(self) -> int:
        return int(np.count_nonzero(self.tokens))

    def usable(self, source: int) -> np.ndarray:
        """Return the numbers of the usable rows of one source, ascending."""
        start, end = self.starts[source], self.starts[source + 1]
        return start + np.flatnonzero(self.tokens[start:end])

    def locate(self, number: int) -> tuple[int, int]:
        """Return (source, row of that source) of a row number."""
        source = int(np.searchsorted(self.starts, number, side="right")) - 1
        return source, int(number - self.starts[source])

    def put(self, number: int, cost: SampleCost) -> None:
        for name, value in zip(SampleCost._fields, cost, strict=True):
            getattr(self, name)[number] = value

    def digest(self) -> str:
        """Return a hash over all costs: it changes with the data, the template and the budgets."""
        digest = hashlib.sha256(self.starts.tobytes())
        for name in SampleCost._fields:
            digest.update(getattr(self, name).tobytes())
        return digest.hexdigest()


def row_cost(source: Source, row: int, collator: MultimodalCollator, max_tokens: int) -> SampleCost | Reject:
    """Return the cost of one row, or why it cannot be used. Decodes no pixels."""
    try:
        cost = collator.cost(source.sample(row))
    except RowFault as fault:
        return Reject(source.name, source.row_number(row), str(fault))
    if cost.tokens > max_tokens:
        reason = (
            f"sample of {cost.tokens} tokens ({cost.visual_tokens} visual) is longer than a pack of {max_tokens}; "
            "raise data.max_tokens_per_pack or lower data.max_visual_tokens_per_image"
        )
        return Reject(source.name, source.row_number(row), reason)
    return cost


def build_index(
    sources: Sequence[Source],
    collator: MultimodalCollator,
    *,
    max_tokens: int,
    max_rejected_fraction: float = 0.01,
    progress: Callable[[int, int], None] | None = None,
) -> Index:
    """Find the cost of every row of every source; what cannot be used goes to `Index.rejects`.

    max_tokens: tokens of a pack. progress: called with (rows done, rows in all). Raises ValueError when no row is
    usable, or when more than max_rejected_fraction of all rows are rejected.
    """
    index = Index.empty([len(source) for source in sources])
    for number in range(index.num_rows):
        place, row = index.locate(number)
        result = row_cost(sources[place], row, collator, max_tokens)
        if isinstance(result, Reject):
            index.rejects.append(result)
        else:
            index.put(number, result)
        if progress is not None:
            progress(number + 1, index.num_rows)
    check_rejects(index, sources, max_rejected_fraction)
    return index


def check_rejects(index: Index, sources: Sequence[Source], max_rejected_fraction: float) -> None:
    """Raise ValueError when there is nothing to learn from, or too much of the data is rejected."""
    rejected = len(index.rejects)
    shown = "".join(f"\n  - {reject}" for reject in index.rejects[:3])
    if not index.num_usable:
        names = ", ".join(source.name for source in sources)
        raise ValueError(
            f"{names}: nothing to learn from, none of {index.num_rows} rows can be used; mend the rows{shown}"
        )
    if rejected > max_rejected_fraction * index.num_rows:
        raise ValueError(
            f"data: {rejected} of {index.num_rows} rows cannot be used, more than data.max_rejected_fraction "
            f"{max_rejected_fraction:g}; mend them or raise it{shown}"
        )
