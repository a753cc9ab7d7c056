"""One optimizer step over the packs of all ranks, and the learning rate at each step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from qwen3vl_train.arch import Qwen3VLArch
from qwen3vl_train.batch import PackedBatch
from qwen3vl_train.config import OptimSection, Recipe
from qwen3vl_train.data.packing.loader import StepPacks
from qwen3vl_train.dist.ranks import Ranks, seed_everything
from qwen3vl_train.dist.tensors import full_tensor, global_shape, to_local
from qwen3vl_train.model.costs import FlopsCounter
from qwen3vl_train.model.hf_names import to_huggingface
from qwen3vl_train.model.lora import base_name, is_adapter
from qwen3vl_train.model.loss import LossFunction, cross_entropy_loss
from qwen3vl_train.model.qwen3vl import Qwen3VLForConditionalGeneration
from qwen3vl_train.parallel.optim import TrainEngine
from qwen3vl_train.tracking.loss_by_source import SourceTally, source_names
from qwen3vl_train.tracking.metrics import StepTally


@dataclass(frozen=True)
class StepOptions:
    """What does not change from step to step."""

    flops: FlopsCounter
    sources: Sequence[str]  # names of all data sets
    seed: int  # of the run; dropout follows from it
    lr: float  # the peak learning rate, for the tally
    max_grad_norm: float | None  # None where gradients are not clipped
    loss_function: LossFunction = cross_entropy_loss  # of a pack; its sum is divided by the labels of all packs

    @classmethod
    def from_recipe(cls, recipe: Recipe, model: Qwen3VLForConditionalGeneration) -> "StepOptions":
        flops = FlopsCounter.from_model(model, model.arch, lambda parameter: global_shape(parameter).numel())
        return cls(flops, source_names(recipe), recipe.train.seed, recipe.optim.lr, recipe.optim.max_grad_norm)


def lr_factor(step: int, *, num_steps: int, optim: OptimSection) -> float:
    """Return the factor of the peak learning rate at a step, 0 <= step < num_steps.

    Warm-up rises linearly to 1, reached at the step after it. Every schedule but constant then falls towards
    min_lr / lr, which it would reach at `num_steps`, one past the last step: no step is wasted on the lowest rate. wsd
    begins to fall at its last decay_share.
    """
    warmup_steps = optim.warmup_steps(num_steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    first = warmup_steps
    if optim.schedule == "wsd":
        first = max(warmup_steps, num_steps - math.ceil(optim.decay_share * num_steps))
    if optim.schedule == "constant" or step < first:
        return 1.0
    progress = (step - first) / max(1, num_steps - first)
    factor = 0.5 * (1.0 + math.cos(math.pi * progress)) if optim.schedule == "cosine" else 1.0 - progress
    floor = optim.min_lr / optim.lr
    return floor + (1.0 - floor) * factor


class NonFiniteError(RuntimeError):
    """A loss or gradient is not a finite number; the message names the step and the samples of its packs."""


def train_step(
    model: Qwen3VLForConditionalGeneration,
    optimizer: TrainEngine,
    share: StepPacks,
    ranks: Ranks,
    options: StepOptions,
    *,
    step: int,
    lr_factor: float,
) -> StepTally:
    """Update the weights by the gradient of (sum of losses) / (number of labels), both over all packs of all ranks.

    A step without a label changes nothing, not even by momentum. Dropout in a pack depends on (seed, step, its number
    in the step) alone, so it does not change with the number of ranks. Raises NonFiniteError on every rank before any
    weight has changed.

    share: this rank's packs, possibly none.
    step: steps done before this one.
    """
    packs, flops = share.packs, options.flops
    counts = [[b.num_labels, b.num_tokens, b.num_visual_tokens, b.num_patches, flops.step(b)] for b in packs]
    totals = ranks.reduce([float(sum(column)) for column in zip(*counts, strict=True)] if counts else [0.0] * 5)
    num_labels = max(1.0, totals[0])
    # Ranks that share weights or gradients in every pass run equally many: one with fewer packs adds empty ones.
    # At least one, even where all packs of the step are broken: ZeRO has gradients only after a pass.
    num_passes = max(1, int(ranks.reduce([len(packs)], "max")[0])) if optimizer.lockstep else len(packs)
    numbers = share.pack_numbers + [0] * (num_passes - len(packs))
    passes = packs + [empty_pack(model.arch)] * (num_passes - len(packs))

    losses: list[torch.Tensor] = []
    by_source = SourceTally(options.sources, ranks.device)
    for number, batch in zip(numbers, passes, strict=True):
        seed_everything(options.seed, step, number)
        loss_sum, _, terms_R = model(batch.to(ranks.device, non_blocking=True), options.loss_function)
        if loss_sum.requires_grad:  # not where only the vision side trains and the pack holds no image
            optimizer.backward(loss_sum / num_labels, last=len(losses) == num_passes - 1)
        losses.append(loss_sum.detach())
        by_source.add(batch, terms_R)

    norms = optimizer.gradient_norms()
    loss_of_rank = float(torch.stack(losses).sum(dtype=torch.float64)) if losses else 0.0
    loss, *of_sources = ranks.reduce([loss_of_rank, *by_source.values()])
    if not (math.isfinite(loss) and math.isfinite(norms["all"])):
        optimizer.discard()
        _check_weights_are_finite(model, step, ranks)
        _raise_non_finite(packs, [loss.item() for loss in losses[: len(packs)]], loss / num_labels, norms, step, ranks)
    labels, tokens, visual_tokens, patches = map(int, totals[:4])
    if labels:
        max_norm = options.max_grad_norm
        optimizer.step(lr_factor, clip=1.0 if max_norm is None else min(1.0, max_norm / (norms["all"] + 1e-6)))
    else:
        optimizer.discard()
    return StepTally(
        step=step + 1, loss=loss / num_labels, lr=options.lr * lr_factor, tokens=tokens, label_tokens=labels,
        visual_tokens=visual_tokens, patches=patches, flops=totals[4], grad_norms=norms,
        sources=by_source.means(of_sources),
    )  # fmt: skip


def empty_pack(arch: Qwen3VLArch) -> PackedBatch:
    """Return a pack of one token without a label or an image: its pass adds nothing."""
    vision, zeros = arch.vision, partial(torch.zeros, dtype=torch.int64)
    return PackedBatch.from_samples(
        input_ids=zeros(1), positions=zeros(3, 1), sequence_lengths=[1],
        label_rows=zeros(0), label_ids=zeros(0), label_weights=torch.zeros(0),
        pixel_values=torch.zeros(0, vision.patch_dim // vision.temporal_patch_size, dtype=torch.uint8),
        grid_thw=[], vision_slices_per_seq=[[]],
        position_table_side=vision.position_table_side, merge_size=vision.spatial_merge_size,
    )  # fmt: skip


def _check_weights_are_finite(model: Qwen3VLForConditionalGeneration, step: int, ranks: Ranks) -> None:
    """Raise NonFiniteError with the weights that are not finite: then it is not the rows. Every rank must call it."""
    mine = []
    for name, parameter in model.named_parameters():
        values = full_tensor(parameter) if hasattr(parameter, "ds_id") else to_local(parameter.detach())
        if not values.isfinite().all():
            mine.append(name if is_adapter(name) else to_huggingface(base_name(name)))
    broken = list(dict.fromkeys(name for of_rank in ranks.gather(mine) for name in of_rank))
    if broken:
        more = f" and {len(broken) - 1} more weights" if len(broken) > 1 else ""
        raise NonFiniteError(
            f"step {step + 1}: {broken[0]}{more} holds NaN or infinity, so the loss does, too. If this is the first "
            "step, the checkpoint in model.path is damaged: download it again, or convert it again in bfloat16 or "
            "float32. Otherwise start again from the last checkpoint with a lower optim.lr"
        )


def _raise_non_finite(
    packs: list[PackedBatch], losses: list[float], loss: float, norms: dict[str, float], step: int, ranks: Ranks
) -> None:
    """Raise NonFiniteError with the packs whose loss is not finite, or all packs where only the gradient is not."""
    suspects = [pack for pack, value in zip(packs, losses, strict=True) if not math.isfinite(value)]
    named = ranks.gather([sample for pack in suspects for sample in pack.sample_ids])
    if not any(named):
        named = ranks.gather([sample for pack in packs for sample in pack.sample_ids])
    samples = [sample for of_rank in named for sample in of_rank]
    groups = [group for group, norm in norms.items() if group != "all" and not math.isfinite(norm)]
    where = f" (not finite in {', '.join(groups)})" if groups else ""
    more = f" and {len(samples) - 20} more" if len(samples) > 20 else ""
    raise NonFiniteError(
        f"step {step + 1}: loss {loss}, gradient norm {norms['all']}{where}; no weight was changed. Samples: "
        f"{', '.join(samples[:20])}{more}. Check these rows, lower optim.lr, or start again from the last checkpoint"
    )
