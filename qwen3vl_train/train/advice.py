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


def length_lines(recipe: Recipe, num_steps: int, epoch: EpochFigures | None) -> list[str]:
    """Return the lines about the length of a run. epoch: None of streams, whose length is not known."""
    lines = []
    if epoch is not None and epoch.num_steps:
        a_step = epoch.num_samples / epoch.num_steps
        lines.append(f"data: {_count(epoch.num_steps, 'step')} an epoch, about {a_step:,.1f} samples a step")
    if 0 < num_steps < _FEW_STEPS:
        lines.append(f"warning: the run has {_count(num_steps, 'step')}, {_fewer_tokens_a_step(recipe, epoch)}")
    warmup_steps = recipe.optim.warmup_steps(num_steps)
    if 0 < num_steps <= warmup_steps:
        share = num_steps / (warmup_steps + 1)
        lines.append(
            f"warning: optim.warmup is {_count(warmup_steps, 'step')} and the run has {num_steps:,}: its rate reaches "
            f"{share:.0%} of optim.lr; lower optim.warmup, or give it as a share of the run, such as 0.03"
        )
    return lines


def _fewer_tokens_a_step(recipe: Recipe, epoch: EpochFigures | None) -> str:
    """Return what a step takes, and what to change for more of them."""
    data, packs_per_step = recipe.data, recipe.train.packs_per_step
    a_step = f"each of {_count(packs_per_step, 'pack')} of up to {data.max_tokens_per_pack:,} tokens"
    if epoch is None:
        return f"{a_step}; raise train.num_steps to train longer"
    ways = ["raise train.num_epochs"]
    if packs_per_step > 1:
        ways.insert(0, "lower train.packs_per_step")
    wanted = max(epoch.longest, epoch.tokens // (_FEW_STEPS * packs_per_step))
    if wanted < data.max_tokens_per_pack:
        steps = max(1, epoch.tokens // (wanted * packs_per_step))
        ways.insert(0, f"set data.max_tokens_per_pack to {wanted:,} for about {_count(steps, 'step')} an epoch")
    return f"{a_step}; for more of them {', or '.join(ways)}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
