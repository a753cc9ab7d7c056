"""What a run says of its own length before it starts: steps of an epoch, and runs too short for their settings."""

from typing import NamedTuple

from qwen3vl_train.config import Recipe

_FEW_STEPS = 10


class EpochFigures(NamedTuple):
    """An epoch of indexed rows. longest: tokens of the longest sample."""

    num_samples: int
    num_steps: int
    tokens: int
    longest: int


def length_lines(recipe: Recipe, num_steps: int, epoch: EpochFigures | None, num_ranks: int = 1) -> list[str]:
    """Return the lines about the length of a run. epoch: None of streams, whose length is not known."""
    lines = []
    if epoch is not None and epoch.num_steps:
        a_step = epoch.num_samples / epoch.num_steps
        lines.append(f"data: {_count(epoch.num_steps, 'step')} an epoch, about {a_step:,.1f} samples a step")
    if 0 < num_steps < _FEW_STEPS:
        packs = _count(recipe.train.packs_per_step, "pack")
        a_step = f"each of {packs} of up to {recipe.data.max_tokens_per_pack:,} tokens"
        ways = ["raise train.num_steps"]
        if epoch is not None and recipe.train.num_steps is None:
            ways = _more_steps(recipe, epoch, num_ranks)
        what = f"warning: the run has {_count(num_steps, 'step')}, {a_step}"
        lines.append(f"{what}; for more of them {', or '.join(ways)}")
    warmup_steps = recipe.optim.warmup_steps(num_steps)
    if 0 < num_steps <= warmup_steps:
        share = num_steps / (warmup_steps + 1)
        lines.append(
            f"warning: optim.warmup is {_count(warmup_steps, 'step')} and the run has {num_steps:,}: its rate reaches "
            f"{share:.0%} of optim.lr; lower optim.warmup, or give it as a share of the run, such as 0.03"
        )
    if num_steps > 0 and not _keeps_something(recipe, num_steps, epoch):
        lines.append(
            f"warning: checkpoint.save_last is false and no checkpoint is due within {_count(num_steps, 'step')}: "
            "nothing of the training will be kept"
        )
    return lines


def _keeps_something(recipe: Recipe, num_steps: int, epoch: EpochFigures | None) -> bool:
    """Return whether a checkpoint or an export is written."""
    keep, an_epoch = recipe.checkpoint, epoch.num_steps if epoch else num_steps + 1
    due = [keep.every_steps, keep.export_every_steps]
    due += [every * an_epoch for every in (keep.every_epochs, keep.export_every_epochs) if every]
    return keep.save_last or any(steps is not None and steps <= num_steps for steps in due)


def _more_steps(recipe: Recipe, epoch: EpochFigures, num_ranks: int) -> list[str]:
    """Return what makes more steps of an epoch: smaller packs, where that is not enough fewer of them, more epochs."""
    limit, given = recipe.data.max_tokens_per_pack, recipe.train.packs_per_step
    ways = ["raise train.num_epochs"]
    for packs in dict.fromkeys((num_ranks, given)):
        tokens = min(limit, max(epoch.longest, epoch.tokens // (_FEW_STEPS * packs)))
        steps = epoch.tokens // (tokens * packs)
        if steps <= epoch.num_steps or (packs == given and len(ways) > 1 and steps < _FEW_STEPS):
            continue
        changes = [f"data.max_tokens_per_pack to {tokens:,}"] if tokens < limit else []
        changes += [f"train.packs_per_step to {packs}"] if packs != given else []
        ways = [f"set {' and '.join(changes)} for about {_count(steps, 'step')} an epoch", ways[-1]]
    return ways


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
