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
    ("packs_per_step", "num_ranks", "way"),
    [
        (1, 1, "set data.max_tokens_per_pack to 500 for about 10 steps an epoch"),
        (4, 1, "set data.max_tokens_per_pack to 125 for about 10 steps an epoch"),
        (8, 1, "set data.max_tokens_per_pack to 500 and train.packs_per_step to 1 for about 10 steps an epoch"),
        (8, 2, "set data.max_tokens_per_pack to 250 and train.packs_per_step to 2 for about 10 steps an epoch"),
        (8, 8, "set data.max_tokens_per_pack to 80 for about 7 steps an epoch"),
    ],
)
def test_a_short_run_says_what_makes_more_steps(packs_per_step, num_ranks, way):
    """The longest sample has 80 tokens, so that eight packs a step cannot make ten steps."""
    lines = length_lines(_recipe(train={"packs_per_step": packs_per_step}), 3, EPOCH, num_ranks)
    packs = f"{packs_per_step} pack{'s' * (packs_per_step > 1)}"
    what = f"warning: the run has 3 steps, each of {packs} of up to 8,192 tokens; for more of them"
    assert lines == [AN_EPOCH, f"{what} {way}, or raise train.num_epochs"]


def test_packs_that_are_small_already():
    train_section = {"packs_per_step": 1, "num_epochs": 1}
    epoch = EPOCH._replace(num_steps=9, tokens=700)
    lines = length_lines(_recipe(data__max_tokens_per_pack=80, train=train_section), 9, epoch)
    assert lines[1] == (
        "warning: the run has 9 steps, each of 1 pack of up to 80 tokens; for more of them raise train.num_epochs"
    )


@pytest.mark.parametrize("epoch", [None, EPOCH])
def test_a_number_of_steps_that_is_given_is_to_be_raised(epoch):
    assert length_lines(_recipe(), 10, None) == []
    assert length_lines(_recipe(train__num_steps=1), 1, epoch)[-1] == (
        "warning: the run has 1 step, each of 2 packs of up to 8,192 tokens; for more of them raise train.num_steps"
    )


@pytest.mark.parametrize(
    ("warmup", "num_steps", "said"),
    [(100, 50, "50: its rate reaches 50%"), (10, 10, "10: its rate reaches 91%"), (9, 10, None), (0.5, 10, None)],
)
def test_a_warm_up_longer_than_the_run(warmup, num_steps, said):
    lines = length_lines(_recipe(optim={"warmup": warmup}), num_steps, None)
    expected = f"warning: optim.warmup is {warmup} steps and the run has {said} of optim.lr; lower optim.warmup, or "
    assert lines == ([] if said is None else [f"{expected}give it as a share of the run, such as 0.03"])


@pytest.mark.parametrize(
    ("checkpoint", "kept"),
    [
        ({"every_steps": 20, "save_last": False}, True),
        ({"every_steps": 21, "save_last": False}, False),
        ({"every_steps": 21}, True),
        ({"every_epochs": 2, "save_last": False}, True),
        ({"every_epochs": 3, "save_last": False}, False),
        ({"every_steps": None, "export_every_steps": 20, "save_last": False}, True),
        ({"every_steps": None, "export_every_epochs": 3, "save_last": False}, False),
    ],
    ids=str,
)
def test_a_run_that_keeps_nothing_says_so(checkpoint, kept):
    lines = length_lines(_recipe(checkpoint=checkpoint), 20, EPOCH._replace(num_steps=10))
    warning = (
        "checkpoint.save_last is false and no checkpoint is due within 20 steps: nothing of the training will be kept"
    )
    assert lines[1:] == ([] if kept else [f"warning: {warning}"])


def test_a_run_prints_these_lines(small: Path, task: Path, tmp_path: Path, capsys):
    case = {"optim__warmup": 100, "train": {"num_epochs": 1, "packs_per_step": 2}, "tune": small_runs.LORA}
    recipe = small_runs.make_recipe(small, task, tmp_path, **case)
    train(recipe)
    out = capsys.readouterr().out
    lines = open_data(recipe, small_runs.ALONE).length_lines(recipe)
    assert len(lines) == 3
    assert "\n".join(lines) in out
