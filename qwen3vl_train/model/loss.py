"""The sum of the cross-entropies of the labelled rows, without a [T, vocab] tensor.

R labelled rows, D hidden, V vocabulary. Only rows that have a label come in; they pass the head in chunks, and each
chunk's gradients are made while its logits exist, so at most `CHUNK_ELEMENTS` logits are alive, in float32.
"""

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**25  # 128 MiB of float32 logits: 220 rows of a 151,936-token vocabulary; larger was no faster on CPU


def linear_cross_entropy_sum(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    labels_R: Tensor,
    weights_R: Tensor | None,
    losses_R: Tensor | None = None,
) -> Tensor:
    """Sum over rows of weight * cross-entropy(hidden @ weight.T, label). Returns a float32 scalar.

    labels_R: int64, each in 0..V-1 (no ignore value: drop those rows first). weights_R: float32 factors, None for all
    1. losses_R: float32, is filled with each row's term of the sum, for looking; no gradient passes through it. Equals
    `F.cross_entropy(logits.float(), labels, reduction="none") @ weights`, gradients included.
    """
    if torch.is_grad_enabled() and (hidden_RD.requires_grad or weight_VD.requires_grad):
        return _LinearCrossEntropySum.apply(hidden_RD, weight_VD, labels_R, weights_R, losses_R)  # type: ignore[return-value]
    loss = hidden_RD.new_zeros((), dtype=torch.float32)
    for rows in _chunks(hidden_RD, weight_VD):
        losses, _ = _losses(hidden_RD[rows], weight_VD, labels_R[rows])
        losses = losses if weights_R is None else losses * weights_R[rows]
        loss += losses.sum()
        if losses_R is not None:
            losses_R[rows] = losses
    return loss


def _chunks(hidden_RD: Tensor, weight_VD: Tensor) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // weight_VD.shape[0])
    return [slice(start, start + step) for start in range(0, hidden_RD.shape[0], step)]


def _losses(hidden_RD: Tensor, weight_VD: Tensor, labels_R: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (R,) and log-probabilities (R, V), both float32."""
    log_probs_RV = (hidden_RD @ weight_VD.T).float()
    log_probs_RV -= log_probs_RV.logsumexp(dim=-1, keepdim=True)
    return -log_probs_RV.gather(1, labels_R[:, None]).squeeze(1), log_probs_RV


class _LinearCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden_RD: Tensor,
        weight_VD: Tensor,
        labels_R: Tensor,
        weights_R: Tensor | None,
        losses_R: Tensor | None,
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_RD) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VD) if needs_weight else None
        loss = hidden_RD.new_zeros((), dtype=torch.float32)
        for rows in _chunks(hidden_RD, weight_VD):
            losses, log_probs_RV = _losses(hidden_RD[rows], weight_VD, labels_R[rows])
            grad_RV = log_probs_RV.exp_()
            grad_RV.scatter_add_(1, labels_R[rows, None], grad_RV.new_full((grad_RV.shape[0], 1), -1.0))
            if weights_R is not None:
                losses = losses * weights_R[rows]
                grad_RV *= weights_R[rows, None]
            loss += losses.sum()
            if losses_R is not None:
                losses_R[rows] = losses
            grad_RV = grad_RV.to(hidden_RD.dtype)
            if grad_hidden is not None:
                torch.mm(grad_RV, weight_VD, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight.addmm_(grad_RV.T, hidden_RD[rows])
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor):  # type: ignore[override]
        grads = [None if grad is None else grad * grad_loss.to(grad.dtype) for grad in ctx.saved_tensors]
        return *grads, None, None, None
