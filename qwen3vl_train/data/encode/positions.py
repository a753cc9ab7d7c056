"""Positions of the interleaved M-RoPE: three rows (time, height, width) for every token."""

from collections.abc import Iterable

import torch
from torch import Tensor

from qwen3vl_train.data.media.image import MERGE

Run = int | tuple[int, int, int]
"""A part of a sequence: a number of text tokens, or the grid (1, height, width) of an image or frame, in patches."""


def mrope_positions(runs: Iterable[Run]) -> Tensor:
    """Return int64 (3, n) positions of a sequence, exactly as transformers' `Qwen3VLModel.get_rope_index`.

    Text increases by one on all three rows. An image that starts at p has time p, height p + row, width p + column of
    its merged grid, and the text after it continues at p + max(rows, columns). A clip is one run for each frame.
    [2, (1, 4, 4), 1] -> 0 1 | 2 2 2 2 | 4;  0 1 | 2 2 3 3 | 4;  0 1 | 2 3 2 3 | 4
    """
    parts = [torch.zeros(3, 0, dtype=torch.int64)]
    start = 0
    for run in runs:
        if isinstance(run, int):
            parts.append(torch.arange(start, start + run).expand(3, -1))
            start += run
            continue
        frames, height, width = run
        assert frames == 1, f"a clip is one run for each frame, got {run}"
        rows, cols = height // MERGE, width // MERGE
        row, col = torch.arange(rows).repeat_interleave(cols), torch.arange(cols).repeat(rows)
        parts.append(start + torch.stack([torch.zeros_like(row), row, col]))
        start += max(rows, cols)
    return torch.cat(parts, dim=1)
