"""Which of the recipe and the environment says what W&B records."""

import sys
from pathlib import Path
from typing import Any

import pytest

from qwen3vl_train.config import Recipe, load_recipe, recipe_from_dict
from qwen3vl_train.config.yaml12 import write_yaml
from qwen3vl_train.tracking.recorder import Recorder
from qwen3vl_train.tracking.wandb_settings import name_trial, wandb_settings
from qwen3vl_train.train.cli import sft
from tests.helpers import small_runs
from tests.helpers.messages import message_of

EVERYTHING = {
    "WANDB_MODE": "online", "WANDB_PROJECT": "p", "WANDB_NAME": "n", "WANDB_ENTITY": "e", "WANDB_RUN_GROUP": "g",
    "WANDB_TAGS": "a,b", "WANDB_NOTES": "why",
}  # fmt: skip
IN_RECIPE = {
    "wandb": "offline", "project": "P", "run_name": "N", "entity": "E", "group": "G", "tags": ["a"], "notes": "W",
}  # fmt: skip


def _recipe(**track: Any) -> Recipe:
    data = {"train": [{"path": "a.jsonl"}]}
    return recipe_from_dict(
        {"name": "tiny", "model": {"path": "m"}, "tune": {"method": "lora"}, "data": data, "track": track}
    )


def _values(recipe: Recipe, environ: dict[str, str]) -> tuple:
    found = wandb_settings(recipe, environ)
    return found.mode, found.project, found.run_name, found.entity, found.group, found.tags, found.notes


def test_the_environment_counts_where_the_recipe_is_silent():
    assert _values(_recipe(), {}) == ("offline", "qwen3vl", "tiny", None, None, None, None)
    assert _values(_recipe(), EVERYTHING) == ("online", "p", "n", "e", "g", ["a", "b"], "why")
    assert wandb_settings(_recipe(), EVERYTHING).unused == []


def test_the_recipe_wins_and_says_so():
    recipe = _recipe(**IN_RECIPE)
    assert _values(recipe, EVERYTHING) == ("offline", "P", "N", "E", "G", ["a"], "W")
    assert wandb_settings(recipe, EVERYTHING).unused == [
        "track.wandb: offline in the recipe, so WANDB_MODE=online is not used",
        "track.project: P in the recipe, so WANDB_PROJECT=p is not used",
        "track.run_name: N in the recipe, so WANDB_NAME=n is not used",
        "track.entity: E in the recipe, so WANDB_ENTITY=e is not used",
        "track.group: G in the recipe, so WANDB_RUN_GROUP=g is not used",
        "track.tags: a in the recipe, so WANDB_TAGS=a,b is not used",
        "track.notes: W in the recipe, so WANDB_NOTES=why is not used",
    ]
    assert (
        wandb_settings(_recipe(wandb="off", project="p"), {"WANDB_MODE": "disabled", "WANDB_PROJECT": "p"}).unused == []
    )


@pytest.mark.parametrize(
    ("word", "mode"),
    [("disabled", "off"), ("dryrun", "offline"), ("run", "online"), ("OFFLINE", "offline"), ("", "offline")],
)
def test_the_words_of_wandb_for_a_mode(word, mode):
    assert wandb_settings(_recipe(), {"WANDB_MODE": word}).mode == mode


def test_a_mode_that_wandb_does_not_have():
    message = message_of(ValueError, wandb_settings, _recipe(), {"WANDB_MODE": "on"})
    assert message == "WANDB_MODE: got 'on'; use online, offline or disabled, or unset it"


TRIAL = {"WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "abc123"}


def test_each_trial_of_a_sweep_has_a_folder_and_is_online():
    assert name_trial(_recipe(), TRIAL).name == "tiny-abc123"
    assert name_trial(_recipe(), {"WANDB_RUN_ID": "abc123"}).name == "tiny"
    settings = wandb_settings(_recipe(), TRIAL)
    assert (settings.mode, settings.trial) == ("online", "abc123")
    assert wandb_settings(_recipe(wandb="offline"), TRIAL).unused == [
        "track.wandb: offline, so the sweep of this trial sees no metrics; set it to online or remove it"
    ]


def test_sft_takes_the_arguments_of_wandb_agent(tmp_path, monkeypatch, small, task):
    """Both forms: `${args}` and `${args_no_hyphens}`."""
    for name, value in TRIAL.items():
        monkeypatch.setenv(name, value)
    values = small_runs.recipe_values(small, task, tmp_path, train__num_steps=1, tune=small_runs.LORA)
    (tmp_path / "recipe.yaml").write_text(write_yaml(values))
    assert sft([str(tmp_path / "recipe.yaml"), "--optim.lr=0.005", "optim.warmup=0", "--train.seed=3"]) == 0
    recipe = load_recipe(tmp_path / "run-abc123" / "recipe.yaml")
    assert (recipe.name, recipe.optim.lr, recipe.optim.warmup, recipe.train.seed) == ("run-abc123", 0.005, 0, 3)


def test_sft_refuses_arguments_that_set_nothing(tmp_path, capsys):
    with pytest.raises(SystemExit):
        sft([str(tmp_path / "recipe.yaml"), "--resume"])
    assert "unrecognized arguments: --resume" in capsys.readouterr().err


def test_what_is_not_used_is_said_on_the_terminal(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "online")
    recorder = Recorder(_recipe(wandb="off"), tmp_path, small_runs.ALONE, sys.stdout, num_steps=1, start_step=0)
    recorder.__exit__(None, None, None)
    assert "track.wandb: off in the recipe, so WANDB_MODE=online is not used\n" in capsys.readouterr().out
