"""The sum of the cross-entropies of all labels of a pack, without a [T, vocab] tensor.

R labels, T packed tokens, D hidden, V vocabulary. Only the rows of the labels pass the head, in chunks, and the
gradients of a chunk are computed while its logits exist: at most `CHUNK_ELEMENTS` logits are alive, in float32.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qwen3vl_train.batch import PackedBatch

CHUNK_ELEMENTS = 2**25  # 128 MiB of float32 logits: 220 rows of a 151,936-token vocabulary; larger was no faster on CPU


class LossOutput(NamedTuple):
    """The loss of one pack: a float32 scalar; what the sums of all packs are divided by, which weights do not change;
    and the terms of the sum, (R,) float32, one for each label, without gradient.
    """

    loss_sum: Tensor
    num_labels: int
    terms_R: Tensor


# Called as loss_function(hidden_TD, head_VD, batch) inside the forward pass, where sharded weights are gathered.
LossFunction = Callable[[Tensor, Tensor, PackedBatch], LossOutput]


def cross_entropy_loss(hidden_TD: Tensor, head_VD: Tensor, batch: PackedBatch) -> LossOutput:
    """Return the weighted cross-entropies of a pack's labels."""
    hidden_RD = hidden_TD.index_select(0, batch.label_rows)
    loss_sum, terms_R = linear_cross_entropy_sum(hidden_RD, head_VD, batch.label_ids, batch.label_weights)
    return LossOutput(loss_sum, batch.num_labels, terms_R)


def linear_cross_entropy_sum(
    hidden_RD: Tensor, head_VD: Tensor, labels_R: Tensor, weights_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the sum over rows of weight * cross-entropy(hidden @ head.T, label), and its terms without gradient.

    Equals `F.cross_entropy(logits.float(), labels, reduction="none") @ weights`, gradients included. Labels are in
    0..V-1; there is no ignored value. Weights, sum and terms (R,) are float32.
    """
    if not torch.is_grad_enabled():
        hidden_RD, head_VD = hidden_RD.detach(), head_VD.detach()
    return _LinearCrossEntropySum.apply(hidden_RD, head_VD, labels_R, weights_R)  # type: ignore[return-value]


class _LinearCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_RD: Tensor, head_VD: Tensor, labels_R: Tensor, weights_R: Tensor
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_RD) if needs_hidden else None
        grad_head = torch.zeros_like(head_VD) if needs_head else None
        loss = hidden_RD.new_zeros((), dtype=torch.float32)
        terms_R = torch.empty_like(weights_R)
        step = max(1, CHUNK_ELEMENTS // head_VD.shape[0])
        for start in range(0, hidden_RD.shape[0], step):
            rows = slice(start, start + step)
            log_probs_RV = (hidden_RD[rows] @ head_VD.T).float()
            log_probs_RV -= log_probs_RV.logsumexp(dim=-1, keepdim=True)
            losses = -log_probs_RV.gather(1, labels_R[rows, None]).squeeze(1) * weights_R[rows]
            terms_R[rows] = losses
            loss += losses.sum()
            if not (needs_hidden or needs_head):
                continue
            grad_RV = log_probs_RV.exp_()
            grad_RV.scatter_add_(1, labels_R[rows, None], grad_RV.new_full((grad_RV.shape[0], 1), -1.0))
            grad_RV *= weights_R[rows, None]
            grad_RV = grad_RV.to(hidden_RD.dtype)
            if grad_hidden is not None:
                torch.mm(grad_RV, head_VD, out=grad_hidden[rows])
            if grad_head is not None:
                grad_head.addmm_(grad_RV.T, hidden_RD[rows])
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.mark_non_differentiable(terms_R)
        return loss, terms_R

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads = [None if grad is None else grad * grad_loss.to(grad.dtype) for grad in ctx.saved_tensors]
        return *grads, None, None
