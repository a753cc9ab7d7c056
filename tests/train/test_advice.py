"""What a run says of its length before it starts."""

from pathlib import Path
from typing import Any

import pytest

from qwen3vl_train.config import Recipe
from qwen3vl_train.train.advice import EpochFigures, length_lines
from qwen3vl_train.train.data import open_data
from qwen3vl_train.train.loop import train
from tests.helpers import small_runs

EPOCH = EpochFigures(num_samples=96, num_steps=1, tokens=5000, longest=80)
AN_EPOCH = "data: 1 step an epoch, about 96.0 samples a step"


def _recipe(**overrides: Any) -> Recipe:
    case = {"data__max_tokens_per_pack": 8192, "optim": {}, **overrides}
    return small_runs.make_recipe(Path("m"), Path("t"), Path("o"), **case)


@pytest.mark.parametrize(
    ("packs_per_step", "way"),
    [
        (
            1,
            "1 pack of up to 8,192 tokens; for more of them set data.max_tokens_per_pack to 500 for about 10 steps an "
            "epoch",
        ),
        (
            8,
            "8 packs of up to 8,192 tokens; for more of them set data.max_tokens_per_pack to 80 for about 7 steps an "
            "epoch, or lower train.packs_per_step",
        ),
    ],
)
def test_a_short_run_says_what_makes_more_steps(packs_per_step, way):
    lines = length_lines(_recipe(train__packs_per_step=packs_per_step), 3, EPOCH)
    assert lines == [AN_EPOCH, f"warning: the run has 3 steps, each of {way}, or raise train.num_epochs"]


def test_packs_that_are_small_already():
    lines = length_lines(_recipe(data__max_tokens_per_pack=80, train__packs_per_step=1), 9, EPOCH)
    assert lines[1] == (
        "warning: the run has 9 steps, each of 1 pack of up to 80 tokens; for more of them raise train.num_epochs"
    )


def test_streams_do_not_say_how_long_an_epoch_is():
    assert length_lines(_recipe(), 10, None) == []
    assert length_lines(_recipe(), 1, None) == [
        "warning: the run has 1 step, each of 2 packs of up to 8,192 tokens; raise train.num_steps to train longer"
    ]


@pytest.mark.parametrize(
    ("warmup", "num_steps", "said"),
    [(100, 50, "50: its rate reaches 50%"), (10, 10, "10: its rate reaches 91%"), (9, 10, None), (0.5, 10, None)],
)
def test_a_warm_up_longer_than_the_run(warmup, num_steps, said):
    lines = length_lines(_recipe(optim={"warmup": warmup}), num_steps, None)
    expected = f"warning: optim.warmup is {warmup} steps and the run has {said} of optim.lr; lower optim.warmup, or "
    assert lines == ([] if said is None else [f"{expected}give it as a share of the run, such as 0.03"])


def test_a_run_prints_these_lines(small: Path, task: Path, tmp_path: Path, capsys):
    case = {"optim__warmup": 100, "train": {"num_epochs": 1, "packs_per_step": 2}, "tune": small_runs.LORA}
    recipe = small_runs.make_recipe(small, task, tmp_path, **case)
    train(recipe)
    out = capsys.readouterr().out
    lines = open_data(recipe, small_runs.ALONE).length_lines(recipe)
    assert len(lines) == 3
    assert "\n".join(lines) in out
