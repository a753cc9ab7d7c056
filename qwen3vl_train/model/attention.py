"""Attention over packed rows: the one function that both towers call, and the cache that generation decodes from.

T packed tokens, N query heads, K key/value heads, H head dim, S segments, L longest segment.
No mask over T x T is ever built. On a GPU in half precision the work is one variable-length FlashAttention call;
elsewhere it is scaled_dot_product_attention, one call for each distinct segment length.
"""

import inspect
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3vl_train.batch import Segments


def attend(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, segments: Segments, *, causal: bool) -> Tensor:
    """Attend inside each segment only; scale head_dim**-0.5. Returns (T, N, H).

    K may divide N (grouped-query attention). Does not check that the segments add up to T: `PackedBatch` did.
    """
    if q_TNH.is_cuda and q_TNH.dtype in (torch.bfloat16, torch.float16):
        return _attend_varlen(q_TNH, k_TKH, v_TKH, segments, causal)
    return _attend_by_length(q_TNH, k_TKH, v_TKH, segments, causal)


def _attend_by_length(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, segments: Segments, causal: bool) -> Tensor:
    lengths = segments.lengths
    if not lengths:
        return q_TNH
    if len(set(lengths)) == 1:
        q, k, v = (x.unflatten(0, (len(lengths), lengths[0])) for x in (q_TNH, k_TKH, v_TKH))
        return _sdpa(q, k, v, causal).flatten(0, 1)
    places: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        places.setdefault(length, []).append(place)
    pieces = [x.split(lengths) for x in (q_TNH, k_TKH, v_TKH)]
    outputs: list[Tensor] = [q_TNH] * len(lengths)
    for same in places.values():
        q, k, v = (torch.stack([piece[i] for i in same]) for piece in pieces)
        for place, output in zip(same, _sdpa(q, k, v, causal).unbind(), strict=True):
            outputs[place] = output
    return torch.cat(outputs)


def _sdpa(q_SLNH: Tensor, k_SLKH: Tensor, v_SLKH: Tensor, causal: bool) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_SLNH, k_SLKH, v_SLKH))
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa).transpose(1, 2)


@cache
def _varlen_has_gqa() -> bool:
    # torch 2.11 has the kernel but not the argument; there the key/value heads are repeated instead.
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _attend_varlen(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, segments: Segments, causal: bool) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    window = (-1, 0) if causal else (-1, -1)
    cu_seqlens, longest = segments.cu_seqlens, segments.max_length
    repeats = q_TNH.shape[1] // k_TKH.shape[1]
    extra: dict[str, Any] = {}
    if repeats > 1 and _varlen_has_gqa():
        extra["enable_gqa"] = True
    elif repeats > 1:
        k_TKH, v_TKH = k_TKH.repeat_interleave(repeats, dim=1), v_TKH.repeat_interleave(repeats, dim=1)
    out = varlen_attn(q_TNH, k_TKH, v_TKH, cu_seqlens, cu_seqlens, longest, longest, window_size=window, **extra)
    assert isinstance(out, Tensor)
    return out


class KVCache:
    """Keys and values of every decoder layer for S sequences that are generated side by side.

    Each layer holds (S, capacity, K, H); `lengths` (S,) says how much of each row is filled.
    """

    def __init__(self, num_layers: int, segments: Segments, num_new_tokens: int) -> None:
        self.segments = segments
        self.lengths = segments.cu_seqlens.diff().long()
        self.capacity = segments.max_length + num_new_tokens
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers

    def fill(self, layer: int, k_TKH: Tensor, v_TKH: Tensor) -> None:
        """Store the prompts' keys and values, cut from the packed row."""
        self.keys[layer], self.values[layer] = self._padded(k_TKH), self._padded(v_TKH)

    def _padded(self, x_TKH: Tensor) -> Tensor:
        padded = x_TKH.new_zeros(len(self.segments.lengths), self.capacity, *x_TKH.shape[1:])
        for row, piece in enumerate(x_TKH.split(self.segments.lengths)):
            padded[row, : piece.shape[0]] = piece
        return padded

    def attend(self, layer: int, q_SNH: Tensor, k_SKH: Tensor, v_SKH: Tensor) -> Tensor:
        """Add one token to every sequence and attend to all that came before it. Returns (S, N, H)."""
        keys, values = self.keys[layer], self.values[layer]
        assert keys is not None, f"layer {layer} was not filled"
        assert values is not None
        rows = torch.arange(keys.shape[0], device=keys.device)
        keys[rows, self.lengths], values[rows, self.lengths] = k_SKH, v_SKH
        seen = torch.arange(self.capacity, device=keys.device)[None, :] <= self.lengths[:, None]
        out = F.scaled_dot_product_attention(
            q_SNH[:, :, None],
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=seen[:, None, None],
            enable_gqa=q_SNH.shape[1] != k_SKH.shape[1],
        )
        return out.squeeze(2)
