"""Held-out loss, and answers generated from the model beside the answers expected."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from qwen3vl_train.batch import PackedBatch
from qwen3vl_train.dist import Ranks
from qwen3vl_train.model.qwen3vl import Qwen3VLForConditionalGeneration


@dataclass(frozen=True)
class EvalLoss:
    """loss: mean over all label tokens of all ranks."""

    loss: float
    label_tokens: int


@torch.no_grad()
def evaluate_loss(model: Qwen3VLForConditionalGeneration, packs: Iterable[PackedBatch], ranks: Ranks) -> EvalLoss:
    """Mean loss over held-out packs, each rank with its share. Dropout is off meanwhile. Every rank must call it."""
    was_training = model.training
    model.eval()
    loss, labels = 0.0, 0
    for batch in packs:
        loss_sum, num_labels = model(batch.to(ranks.device))
        loss += loss_sum.item()
        labels += num_labels
    model.train(was_training)
    loss, num = ranks.sum([loss, float(labels)])
    return EvalLoss(loss / max(1.0, num), int(num))
