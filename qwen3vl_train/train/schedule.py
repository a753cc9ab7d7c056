"""The learning-rate schedule: what the peak rates are multiplied with at each step."""

import math


def lr_factor(step: int, *, num_steps: int, warmup_steps: int, schedule: str) -> float:
    """What the peak learning rate is multiplied with at a step, 0 <= step < num_steps.

    Warm-up rises linearly to 1, reached at step `warmup_steps`; cosine and linear then fall towards 0, which they would
    reach at `num_steps`, one past the last step: no step is wasted on a rate of zero.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0 - progress
