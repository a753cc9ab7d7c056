"""The chunked loss against F.cross_entropy on all logits at once."""

import pytest
import torch
from torch.nn import functional as F

from qwen3vl_train.model.loss import linear_cross_entropy_sum
from tests.helpers import faults
from tests.helpers.dispatch import LargestTensor

ROWS, DIM, VOCAB = 37, 16, 101


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, DIM, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(VOCAB, DIM, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    return hidden, head, labels, torch.rand(ROWS, generator=generator) * 2


def plain(hidden, head, labels, weights):
    return (F.cross_entropy((hidden @ head.T).float(), labels, reduction="none") * weights).sum()


@pytest.mark.parametrize("chunk_elements", [1, 5 * VOCAB, 2**25], ids=["one row", "five rows", "all rows"])
def test_equals_cross_entropy(chunk_elements):
    faults.set_loss_chunk(chunk_elements)
    hidden, head, labels, weights = inputs()
    mine, expected = linear_cross_entropy_sum(hidden, head, labels, weights)[0], plain(hidden, head, labels, weights)
    assert mine.dtype == torch.float32
    assert mine.item() == pytest.approx(expected.item(), rel=1e-6)
    # Divided by a count before backward, as the training step does.
    got = torch.autograd.grad(mine / 7, (hidden, head))
    for gradient, wanted in zip(got, torch.autograd.grad(expected / 7, (hidden, head)), strict=True):
        assert (gradient - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("graph", [True, False])
def test_terms_of_the_sum(graph):
    faults.set_loss_chunk(5 * VOCAB)
    hidden, head, labels, weights = inputs()
    with torch.set_grad_enabled(graph):
        loss_sum, terms = linear_cross_entropy_sum(hidden, head, labels, weights)
    expected = F.cross_entropy(hidden @ head.T, labels, reduction="none").detach() * weights
    assert torch.allclose(terms, expected, atol=1e-6)
    assert loss_sum.item() == pytest.approx(expected.sum().item(), rel=1e-6)
    assert (loss_sum.requires_grad, terms.requires_grad) == (graph, False)


@pytest.mark.parametrize("chunk_elements", [5 * VOCAB, 2**25], ids=["five rows", "all rows"])
def test_in_bfloat16(chunk_elements):
    faults.set_loss_chunk(chunk_elements)
    hidden, head, labels, weights = inputs(torch.bfloat16)
    mine, expected = linear_cross_entropy_sum(hidden, head, labels, weights)[0], plain(hidden, head, labels, weights)
    assert mine.dtype == torch.float32
    assert mine.item() == pytest.approx(expected.item(), rel=1e-5)  # the same bfloat16 logits, summed in float32
    got = torch.autograd.grad(mine, (hidden, head))
    for gradient, wanted in zip(got, torch.autograd.grad(expected, (hidden, head)), strict=True):
        assert gradient.dtype == torch.bfloat16
        # bfloat16 keeps 8 bits (4e-3); the head's gradient is rounded once a chunk.
        assert (gradient - wanted).float().norm() <= 1e-2 * wanted.float().norm()


def test_only_what_trains_gets_a_gradient():
    hidden, head, labels, weights = inputs()
    linear_cross_entropy_sum(hidden, head.detach(), labels, weights)[0].backward()
    wanted = torch.autograd.grad(plain(hidden, head, labels, weights), (hidden, head))
    torch.testing.assert_close(hidden.grad, wanted[0], atol=1e-6, rtol=1e-5)
    linear_cross_entropy_sum(hidden.detach(), head, labels, weights)[0].backward()
    torch.testing.assert_close(head.grad, wanted[1], atol=1e-5, rtol=1e-5)


def test_no_rows_cost_nothing():
    _, head, _, _ = inputs()
    hidden = torch.zeros(0, DIM, requires_grad=True)
    value, _ = linear_cross_entropy_sum(hidden, head, torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    value.backward()
    assert value.item() == 0
    assert hidden.grad is not None
    assert not head.grad.any()


class TallestLogits(LargestTensor):
    """Remembers the most rows that any (rows, vocabulary) tensor had as well."""

    rows = 0

    def see(self, tensor: torch.Tensor) -> None:
        super().see(tensor)
        if tensor.ndim == 2 and tensor.shape[1] == VOCAB:
            self.rows = max(self.rows, tensor.shape[0])


@pytest.mark.parametrize("graph", [True, False])
def test_logits_of_one_chunk_exist_at_a_time(graph):
    faults.set_loss_chunk(5 * VOCAB + 50)
    hidden, head, labels, weights = inputs()
    with torch.set_grad_enabled(graph), TallestLogits() as tallest:
        value, _ = linear_cross_entropy_sum(hidden, head, labels, weights)
        if graph:
            value.backward()
    assert tallest.rows in (5, DIM)  # DIM: the head transposed
    assert tallest.elements == DIM * VOCAB < ROWS * VOCAB
