"""Attention objects against one dense masked attention."""

import pytest
import torch

from qwen3vl_train.batch import Segments
from qwen3vl_train.model.attention import CachedAttention, PackedAttention
from tests.helpers.dispatch import LargestTensor


def masked_reference(q_TNH, k_TKH, v_TKH, lengths, causal):
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = owner[:, None] == owner[None, :]
    if causal:
        allowed &= torch.ones_like(allowed).tril()
    repeats = q_TNH.shape[1] // k_TKH.shape[1]
    k_TNH, v_TNH = k_TKH.repeat_interleave(repeats, 1), v_TKH.repeat_interleave(repeats, 1)
    scores = torch.einsum("qnh,knh->nqk", q_TNH, k_TNH) * q_TNH.shape[-1] ** -0.5
    return torch.einsum("nqk,knh->qnh", scores.masked_fill(~allowed, float("-inf")).softmax(-1), v_TNH)


def random_qkv(total: int, heads: int, kv_heads: int, head_dim: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(total, heads, head_dim), (total, kv_heads, head_dim), (total, kv_heads, head_dim)]
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("lengths", [[7], [5, 5, 5], [1, 9, 3, 9, 1, 4]], ids=["one", "equal", "mixed"])
def test_segments_equal_a_dense_mask(lengths, heads, kv_heads, causal):
    qkv = random_qkv(sum(lengths), heads, kv_heads)
    gradient = torch.randn(sum(lengths), heads, 8, generator=torch.Generator().manual_seed(1))
    out = PackedAttention(Segments.from_lengths(lengths), causal).attend(0, *qkv)
    expected = masked_reference(*qkv, lengths, causal)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    mine = torch.autograd.grad(out, qkv, gradient)
    for got, wanted in zip(mine, torch.autograd.grad(expected, qkv, gradient), strict=True):
        torch.testing.assert_close(got, wanted, atol=2e-6, rtol=1e-5)


def test_no_segments_give_nothing():
    attention = PackedAttention(Segments.from_lengths([]), causal=False)
    assert attention.attend(0, *random_qkv(0, 4, 2)).shape == (0, 4, 8)


@pytest.mark.parametrize("lengths", [[256] * 8, [200, 300] * 4, [2048]], ids=["equal", "mixed", "one"])
def test_nothing_of_size_T_by_T_is_built(lengths):
    total = sum(lengths)
    qkv = random_qkv(total, 4, 2)
    with LargestTensor() as largest:
        PackedAttention(Segments.from_lengths(lengths), causal=True).attend(0, *qkv).sum().backward()
    assert largest.elements == total * 4 * 8  # the queries themselves; a mask or scores would have total squared


def test_cached_attention_equals_attending_to_all_tokens():
    lengths, new_tokens = [4, 7, 1], 3
    generator = torch.Generator().manual_seed(0)
    rows = [
        [torch.randn(length + new_tokens, heads, 8, generator=generator) for heads in (4, 2, 2)] for length in lengths
    ]
    attention = CachedAttention(Segments.from_lengths(lengths), new_tokens)
    prompts = [torch.cat([row[kind][:length] for row, length in zip(rows, lengths, strict=True)]) for kind in range(3)]
    torch.testing.assert_close(attention.attend(0, *prompts), masked_reference(*prompts, lengths, True))
    for step in range(new_tokens):
        q, k, v = (
            torch.stack([row[kind][length + step] for row, length in zip(rows, lengths, strict=True)])
            for kind in range(3)
        )
        out = attention.attend(0, q, k, v)
        attention.advance()
        for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            seen = [x[: length + step + 1] for x in row]
            expected = masked_reference(*seen, [length + step + 1], True)[-1]
            torch.testing.assert_close(out[number], expected, atol=1e-6, rtol=1e-5)
