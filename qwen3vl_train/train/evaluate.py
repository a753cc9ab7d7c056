"""The loss on held-out packs while a run trains."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from qwen3vl_train.batch import PackedBatch
from qwen3vl_train.dist.ranks import Ranks
from qwen3vl_train.model.qwen3vl import Qwen3VLForConditionalGeneration
from qwen3vl_train.train.step import empty_pack


@dataclass(frozen=True)
class EvalLoss:
    """loss: mean over all label tokens of all ranks."""

    loss: float
    label_tokens: int


@torch.no_grad()
def evaluate_loss(
    model: Qwen3VLForConditionalGeneration,
    packs: Iterable[PackedBatch],
    ranks: Ranks,
    *,
    lockstep: bool,
    each: Callable[[], None] = lambda: None,
) -> EvalLoss:
    """Return the mean loss over held-out packs, each rank with its share. Dropout is off. Every rank must call it.

    lockstep: ranks that have run out of packs run empty ones until all have, because the model's weights are sharded.
    each: called before every pack.
    """
    was_training = model.training
    model.eval()
    loss, labels = 0.0, 0.0
    remaining = iter(packs)
    while True:
        each()
        batch = next(remaining, None)
        more = ranks.any(batch is not None) if lockstep else batch is not None
        if not more:
            break
        loss_sum, num_labels = model((batch or empty_pack(model.arch)).to(ranks.device))
        loss, labels = loss + loss_sum.item(), labels + num_labels
    model.train(was_training)
    loss, labels = ranks.reduce([loss, labels])
    return EvalLoss(loss / max(1.0, labels), int(labels))
