"""What all ranks must hold alike: the data, and the plan of every step. Where they do not, all stop and say so."""

import json
from typing import Any

from qwen3vl_train.dist import Ranks

_SHOWN = 3
Held = list[tuple[str, dict[str, Any]]]
"""Names, and what is looked at of each, as JSON."""


def plan_fault(step: int, marks: list[list[int]]) -> str:
    """Say which ranks have planned a step otherwise. marks: the `PlanMark` of every rank."""
    apart = [rank for rank, mark in enumerate(marks) if mark != marks[0]]
    what = "stand elsewhere in the data" if marks[apart[0]][0] != marks[0][0] else "have planned other samples"
    named = ", ".join(map(str, apart[:20])) + (f" and {len(apart) - 20} more" if len(apart) > 20 else "")
    return (
        f"step {step}: ranks {named} {what} than rank 0, so samples would be left out or trained twice; no weight was "
        "changed. Give all machines the same files and the same versions, and start again from the last checkpoint"
    )


def check_same_data(held: Held, ranks: Ranks) -> None:
    """Raise ValueError on every rank where they do not hold the same, naming the first difference of each rank.

    Every rank must call it.
    """
    if ranks.agree(json.dumps(held, sort_keys=True)):
        return
    of_main = ranks.from_main(lambda: held)
    told = ranks.gather(None if held == of_main else _difference(held, of_main))
    lines = [f"\n  - rank {rank}: {text}" for rank, text in enumerate(told) if text is not None]
    raise ValueError(
        f"data: {len(lines)} of {len(told)} ranks do not have what rank 0 has; give all machines the same files"
        + "".join(lines[:_SHOWN])
    )


def _difference(held: Held, of_main: Held) -> str:
    for (name, content), (name_of_main, of_rank_0) in zip(held, of_main, strict=False):
        if name != name_of_main:
            return f"{name} where rank 0 has {name_of_main}"
        for key in of_rank_0:
            if content.get(key) != of_rank_0[key]:
                return f"{name}: {key} {str(content.get(key))[:80]}, on rank 0 {str(of_rank_0[key])[:80]}"
    return f"{len(held) - 1} files, on rank 0 {len(of_main) - 1}"
