"""Attention over packed rows, as one object that both towers call in every block.

T packed tokens, N query heads, K key/value heads, H head dim, S sequences, L tokens of a segment.
No mask over T x T is ever built. On a GPU in half precision the work is one variable-length FlashAttention call;
elsewhere it is scaled_dot_product_attention, one call for each distinct segment length.
"""

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3vl_train.batch import Segments


class Attention(Protocol):
    """What a block knows of the rows that attend to each other: nothing but this call."""

    def attend(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Return (T, N, H), scaled by head_dim**-0.5. K may divide N; layer is the number of the block that calls."""
        ...


@dataclass(frozen=True)
class PackedAttention:
    """Attention inside each segment of a packed row. The lengths of the segments must sum to T."""

    segments: Segments
    causal: bool

    def attend(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        if q_TNH.is_cuda and q_TNH.dtype in (torch.bfloat16, torch.float16):
            return _attend_varlen(q_TNH, k_TKH, v_TKH, self.segments, self.causal)
        return _attend_by_length(q_TNH, k_TKH, v_TKH, self.segments, self.causal)


class CachedAttention:
    """Causal attention for generation: the prompts as one packed row first, then one token of each sequence a pass.

    The first pass stores the keys and values of every decoder layer, (S, capacity, K, H) each. `lengths` (S,) says how
    many of them are filled; call `advance` after every later pass.
    """

    def __init__(self, segments: Segments, max_new_tokens: int) -> None:
        self.prompts = PackedAttention(segments, causal=True)
        self.lengths = segments.cu_seqlens.diff().long()
        self.capacity = segments.max_length + max_new_tokens
        self.cache: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        if layer not in self.cache:
            self.cache[layer] = self._padded(k_TKH), self._padded(v_TKH)
            return self.prompts.attend(layer, q_TNH, k_TKH, v_TKH)
        keys, values = self.cache[layer]  # T is the number of sequences from here on
        rows, slots = (torch.arange(length, device=keys.device) for length in keys.shape[:2])
        keys[rows, self.lengths], values[rows, self.lengths] = k_TKH, v_TKH
        mask = (slots <= self.lengths[:, None])[:, None, None]
        q, k, v = q_TNH[:, :, None], keys.transpose(1, 2), values.transpose(1, 2)
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa).squeeze(2)

    def advance(self) -> None:
        """Count the token that every sequence got in the last pass."""
        self.lengths += 1

    def _padded(self, x_TKH: Tensor) -> Tensor:
        lengths = self.prompts.segments.lengths
        padded = x_TKH.new_zeros(len(lengths), self.capacity, *x_TKH.shape[1:])
        for row, of_sequence in enumerate(x_TKH.split(lengths)):
            padded[row, : of_sequence.shape[0]] = of_sequence
        return padded


def _attend_by_length(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, segments: Segments, causal: bool) -> Tensor:
    lengths = segments.lengths
    if not lengths:
        return q_TNH
    if len(set(lengths)) == 1:
        q, k, v = (x.unflatten(0, (len(lengths), lengths[0])) for x in (q_TNH, k_TKH, v_TKH))
        return _sdpa(q, k, v, causal).flatten(0, 1)
    by_length: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        by_length.setdefault(length, []).append(number)
    chunks = [x.split(lengths) for x in (q_TNH, k_TKH, v_TKH)]
    outputs: list[Tensor] = [q_TNH] * len(lengths)
    for numbers in by_length.values():
        q, k, v = (torch.stack([of_segment[number] for number in numbers]) for of_segment in chunks)
        for number, output in zip(numbers, _sdpa(q, k, v, causal).unbind(), strict=True):
            outputs[number] = output
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
