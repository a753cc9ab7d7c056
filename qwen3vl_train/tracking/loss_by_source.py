"""The loss of each data set of a mixture."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qwen3vl_train.batch import PackedBatch
from qwen3vl_train.config import Recipe
from qwen3vl_train.data.rows.parse import dataset_of
from qwen3vl_train.data.sources import entry_rules


class SourceLoss(NamedTuple):
    """loss: mean over the label tokens of one data set in a step; None where it had none."""

    loss: float | None
    label_tokens: int


def source_names(recipe: Recipe) -> list[str]:
    """Return the names of the training data sets, with which sample ids begin; entries may share one."""
    return list(dict.fromkeys(entry_rules(entry).label or entry.path for entry in recipe.data.train))


class SourceTally:
    """Sum losses and labels by data set over this rank's packs of a step; waits for the device once, at the end."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._numbers = {name: number for number, name in enumerate(names)}
        self._labels = torch.zeros(len(names), dtype=torch.int64)
        self._losses = torch.zeros(len(names), dtype=torch.float64, device=device)

    def add(self, batch: PackedBatch, terms_R: Tensor) -> None:
        """Add the loss terms of a pack's labels. batch: on the host. terms_R: on the device."""
        if not batch.num_labels:
            return
        of_sequence = torch.tensor([self._numbers[dataset_of(name)] for name in batch.sample_ids])
        sequences_R = torch.searchsorted(batch.segments.cu_seqlens[1:], batch.label_rows.int(), right=True)
        sources_R = of_sequence[sequences_R]
        self._labels += sources_R.bincount(minlength=len(self._numbers))
        self._losses.index_add_(0, sources_R.to(self._losses.device), terms_R.double())

    def values(self) -> list[float]:
        """Return sums of losses, then numbers of labels, in the order of the names; to be summed over ranks."""
        return [*self._losses.tolist(), *map(float, self._labels.tolist())]

    def means(self, values: Sequence[float]) -> dict[str, SourceLoss]:
        """Return the mean losses by name. values: those of `values`, summed over all ranks."""
        count = len(self._numbers)
        return {
            name: SourceLoss(loss / labels if labels else None, int(labels))
            for name, loss, labels in zip(self._numbers, values[:count], values[count:], strict=True)
        }
