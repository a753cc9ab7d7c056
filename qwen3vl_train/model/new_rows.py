"""Rows of a few tokens that train apart from a frozen embedding and head.

V vocabulary, D hidden, T packed tokens, K rows.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _WithNewRows(nn.Module):
    """A table of one row a token, of which some rows may be a parameter of their own, `new_rows` (K, D)."""

    weight: nn.Parameter
    new_rows: nn.Parameter | None
    new_ids: tuple[int, ...] = ()

    def add_new_rows(self, ids: Sequence[int]) -> None:
        """Let the rows of these tokens be a parameter of their own, in the order of the ids."""
        self.new_ids = tuple(sorted(ids))
        self.new_rows = nn.Parameter(self.weight.detach()[: len(self.new_ids)].clone())

    def table(self) -> Tensor:
        """Return all rows (V, D), the new ones in their places."""
        if self.new_rows is None:
            return self.weight
        return self.weight.index_copy(0, self._ids_on(self.weight.device), self.new_rows.to(self.weight.dtype))

    @torch.no_grad()
    def merge_new_rows(self) -> None:
        """Write the rows into the weight and drop them."""
        if self.new_rows is not None:
            self.weight.copy_(self.table())
            self.new_rows, self.new_ids = None, ()

    def _ids_on(self, device: torch.device) -> Tensor:
        # Kept, because a copy to a GPU in every pass would wait for it; not a buffer, which `to_empty` would lose.
        kept: Tensor | None = self.__dict__.get("_ids")
        if kept is None or kept.device != device:
            self.__dict__["_ids"] = kept = torch.tensor(self.new_ids, device=device)
        return kept


class TokenEmbedding(_WithNewRows, nn.Embedding):
    def __init__(self, num_rows: int, dim: int) -> None:
        super().__init__(num_rows, dim)
        self.register_parameter("new_rows", None)

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows (T, D) of token ids (T,)."""
        x_TD = super().forward(input)
        if self.new_rows is None:
            return x_TD
        ids = self._ids_on(input.device)
        slots = torch.searchsorted(ids, input).clamp_(max=len(self.new_ids) - 1)
        is_new = (ids[slots] == input).unsqueeze(-1)
        return torch.where(is_new, F.embedding(slots, self.new_rows).to(x_TD.dtype), x_TD)


class TokenHead(_WithNewRows, nn.Linear):
    def __init__(self, dim: int, num_rows: int) -> None:
        super().__init__(dim, num_rows, bias=False)
        self.register_parameter("new_rows", None)


def modules_with_new_rows(model: nn.Module) -> Iterator[tuple[str, _WithNewRows]]:
    """Yield every module that has new rows, by name."""
    for name, module in model.named_modules():
        if isinstance(module, _WithNewRows) and module.new_rows is not None:
            yield name, module


def is_new_rows(name: str) -> bool:
    return name.endswith(".new_rows")
