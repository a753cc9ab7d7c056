"""One optimizer step over the packs of all ranks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from qwen3vl_train.arch import Qwen3VLArch
from qwen3vl_train.batch import PackedBatch
from qwen3vl_train.dist.ranks import Ranks, seed_everything
from qwen3vl_train.model.costs import FlopsCounter
from qwen3vl_train.model.loss import LossFunction, cross_entropy_loss
from qwen3vl_train.model.qwen3vl import Qwen3VLForConditionalGeneration
from qwen3vl_train.parallel.optim import Optimizer
from qwen3vl_train.tracking.loss_by_source import SourceLoss, SourceTally


@dataclass
class StepSums:
    """Sums over the packs of all ranks. loss is the mean over all label tokens.

    Grad_norms by module group, and 'all'. sources: the same mean for each data set.
    """

    loss: float = 0.0
    label_tokens: int = 0
    tokens: int = 0
    visual_tokens: int = 0
    patches: int = 0
    flops: float = 0.0
    grad_norms: dict[str, float] = field(default_factory=dict)
    sources: dict[str, SourceLoss] = field(default_factory=dict)


class NonFiniteError(RuntimeError):
    """A loss or gradient is not a finite number; the message names the step and the samples of its packs."""


def train_step(
    model: Qwen3VLForConditionalGeneration,
    optimizer: Optimizer,
    packs: list[PackedBatch],
    pack_numbers: list[int],
    ranks: Ranks,
    flops: FlopsCounter,
    *,
    step: int,
    seed: int,
    lr_factor: float,
    max_grad_norm: float | None,
    sources: Sequence[str],
    loss_function: LossFunction = cross_entropy_loss,
) -> StepSums:
    """Move the weights by the gradient of (sum of losses) / (number of labels), both over all packs of all ranks.

    packs: this rank's share, possibly empty. pack_numbers: their places among all packs of the step; dropout in a pack
    depends on (seed, step, place) alone, so it does not change with the number of ranks. sources: names of the data
    sets that the packs' samples are of. A step without a label moves nothing, not even by momentum.
    Raises NonFiniteError on every rank before any weight has moved.
    """
    counts = [[b.num_labels, b.num_tokens, b.num_visual_tokens, b.num_patches, flops.step(b)] for b in packs]
    totals = ranks.reduce([float(sum(column)) for column in zip(*counts, strict=True)] if counts else [0.0] * 5)
    num_labels = max(1.0, totals[0])
    # Ranks that share weights or gradients in every pass must run as many of them; who has fewer packs runs empty ones.
    # One at least, also where all packs of the step have broken: ZeRO has gradients after a pass only.
    num_passes = max(1, int(ranks.reduce([len(packs)], "max")[0])) if optimizer.lockstep else len(packs)
    passes = [*packs, *[empty_pack(model.arch)] * (num_passes - len(packs))]

    losses: list[torch.Tensor] = []
    tally = SourceTally(sources, ranks.device)
    for place, batch in enumerate(passes):
        seed_everything(seed, step, pack_numbers[place] if place < len(packs) else 0)
        loss_sum, _, terms_R = model(batch.to(ranks.device, non_blocking=True), loss_function)
        if loss_sum.requires_grad:  # not where only the vision side trains and the pack holds no image
            optimizer.backward(loss_sum / num_labels, last=place == num_passes - 1)
        losses.append(loss_sum.detach())
        tally.add(batch, terms_R)

    norms = optimizer.gradient_norms()
    of_rank = float(torch.stack(losses).sum(dtype=torch.float64)) if losses else 0.0
    loss, *of_sources = ranks.reduce([of_rank, *tally.values()])
    if not (math.isfinite(loss) and math.isfinite(norms["all"])):
        optimizer.discard()
        _stop_non_finite(packs, [loss.item() for loss in losses[: len(packs)]], loss / num_labels, norms, step, ranks)
    clip = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (norms["all"] + 1e-6))
    labels, tokens, visual_tokens, patches = (int(total) for total in totals[:4])
    if labels:
        optimizer.step(lr_factor, clip)
    else:
        optimizer.discard()
    return StepSums(
        loss / num_labels, labels, tokens, visual_tokens, patches, totals[4], norms, tally.means(of_sources)
    )


def empty_pack(arch: Qwen3VLArch) -> PackedBatch:
    """One token, no label, no image: a pass that adds nothing."""
    nothing = torch.zeros(0, arch.vision.patch_dim // arch.vision.temporal_patch_size, dtype=torch.uint8)
    return PackedBatch.from_samples(
        input_ids=torch.zeros(1, dtype=torch.int64),
        positions=torch.zeros(3, 1, dtype=torch.int64),
        sequence_lengths=[1],
        label_rows=torch.zeros(0, dtype=torch.int64),
        label_ids=torch.zeros(0, dtype=torch.int64),
        label_weights=torch.zeros(0),
        pixel_values=nothing,
        grid_thw=[],
        vision_slices_per_seq=[[]],
        position_table_side=arch.vision.position_table_side,
        merge_size=arch.vision.spatial_merge_size,
    )


def _stop_non_finite(
    packs: list[PackedBatch], losses: list[float], loss: float, norms: dict[str, float], step: int, ranks: Ranks
) -> None:
    """Name the packs whose loss is not finite, or all packs where only the gradient is not."""
    suspects = [pack for pack, value in zip(packs, losses, strict=True) if not math.isfinite(value)]
    named = ranks.gather([list(pack.sample_ids) for pack in suspects])
    if not any(named):
        named = ranks.gather([list(pack.sample_ids) for pack in packs])
    samples = [sample for of_rank in named for of_pack in of_rank for sample in of_pack]
    groups = [group for group, norm in norms.items() if group != "all" and not math.isfinite(norm)]
    raise NonFiniteError(
        f"step {step + 1}: loss {loss}, gradient norm {norms['all']}"
        + (f" (not finite in {', '.join(groups)})" if groups else "")
        + f"; no weight was changed. Samples: {', '.join(samples[:20])}"
        + (f" and {len(samples) - 20} more" if len(samples) > 20 else "")
        + ". Look at these rows, lower optim.lr, or start again from the last checkpoint"
    )
