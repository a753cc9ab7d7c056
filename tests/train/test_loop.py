import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from qwen3vl_train.batch import IGNORE_LABEL
from qwen3vl_train.config import Recipe, load_recipe
from qwen3vl_train.data.open import open_collator
from qwen3vl_train.data.sources import JsonlSource
from qwen3vl_train.tracking.metrics import read_metrics
from qwen3vl_train.train.load_run import restore_run
from qwen3vl_train.train.loop import train
from qwen3vl_train.train.step import NonFiniteError
from tests.helpers import small_runs
from tests.helpers.messages import message_of
from tests.helpers.ranks import run_ranks


@pytest.fixture(scope="module")
def evaluated(tiny_folder: Path, task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 5 steps with two held-out files, evaluated every 2."""
    recipe = small_runs.make_recipe(
        tiny_folder,
        task,
        tmp_path_factory.mktemp("evaluated"),
        data__eval=[{"path": str(task / "eval.jsonl")}, {"path": str(task / "train.jsonl"), "name": "whole"}],
        eval__every_steps=2,
        train__num_steps=5,
        tune=small_runs.LORA,
    )
    return train(recipe)


def test_held_out_files_are_evaluated_on_time_and_at_the_end(evaluated):
    rows = [json.loads(line) for line in (evaluated / "eval.jsonl").read_text().splitlines()]
    expected = [(step, name) for step in (2, 4, 5) for name in ("eval", "whole")]
    assert [(row["step"], row["name"]) for row in rows] == expected
    assert all(row.keys() == {"step", "name", "loss", "label_tokens", "seconds"} for row in rows)


def test_the_held_out_loss_is_a_mean_over_labels(evaluated, task):
    model = restore_run(evaluated, dtype=torch.float32).model
    collate = open_collator(load_recipe(evaluated / "recipe.yaml"))
    source = JsonlSource(task / "eval.jsonl", task)
    total, labels = 0.0, 0
    for number in range(len(source)):
        batch = collate([source.sample(number)])
        rows = batch.labels != IGNORE_LABEL
        total += F.cross_entropy(model.logits(batch)[rows], batch.labels[rows], reduction="sum").item()
        labels += int(rows.sum())
    last = json.loads((evaluated / "eval.jsonl").read_text().splitlines()[-2])
    assert last["loss"] == pytest.approx(total / labels, abs=1e-5)
    assert last["label_tokens"] == labels


def test_evaluation_does_not_change_training(evaluated, tiny_folder, task, tmp_path):
    recipe = small_runs.make_recipe(tiny_folder, task, tmp_path, train__num_steps=5, tune=small_runs.LORA)
    assert small_runs.losses(train(recipe)) == small_runs.losses(evaluated)


def test_two_held_out_files_of_one_name_are_refused(tiny_folder, task, tmp_path):
    same = [{"path": str(task / "eval.jsonl")}, {"path": str(task / "train.jsonl"), "name": "eval"}]
    recipe = small_runs.make_recipe(tiny_folder, task, tmp_path, data__eval=same)
    with pytest.raises(ValueError, match=r"^data\.eval: two files are called eval; give one of them a name$"):
        train(recipe)


def _with_nan(folder: Path, copy: Path, name: str, row: int) -> Path:
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    weights[name][row] = float("nan")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_a_weight_that_is_not_finite_is_named(tiny_folder, task, tmp_path):
    _with_nan(tiny_folder, tmp_path / "model", "model.visual.merger.linear_fc2.bias", 0)
    # With this seed the first step is text alone, which never meets the NaN; the second has a picture.
    recipe = small_runs.make_recipe(
        tmp_path / "model", task, tmp_path, data__max_tokens_per_pack=64, train__packs_per_step=1, train__seed=2
    )
    with pytest.raises(NonFiniteError, match=r"^step 2: model\.visual\.merger\.linear_fc2\.bias holds NaN or infinity"):
        train(recipe)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(row["step"], row["visual_tokens"]) for row in rows] == [(1, 0)]


def _train_on_rank(rank: int, world_size: int, recipe: Recipe) -> str:
    return message_of(NonFiniteError, train, recipe)


def test_a_weight_that_is_not_finite_on_one_rank_is_named_by_all(tiny_folder, task, tmp_path):
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    model = _with_nan(tiny_folder, tmp_path / "model", name, -1)  # a row of the last rank's shard
    case = {"tune": small_runs.LORA, "parallel": {"engine": "fsdp2"}}
    messages = run_ranks(_train_on_rank, 2, small_runs.make_recipe(model, task, tmp_path, **case))
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"step 1: {name} holds NaN or infinity, so the loss does, too.")


def test_the_metrics_add_up_over_an_epoch(tiny_folder, task, tmp_path):
    recipe = small_runs.make_recipe(tiny_folder, task, tmp_path, train={"num_epochs": 1, "packs_per_step": 3})
    rows = read_metrics(train(recipe) / "metrics.jsonl")
    source, collate = JsonlSource(task / "train.jsonl", task), open_collator(recipe)
    packs = [collate([source.sample(number)]) for number in range(len(source))]
    assert sum(row["tokens"] for row in rows) == sum(pack.num_tokens for pack in packs)
    assert sum(row["label_tokens"] for row in rows) == sum(pack.num_labels for pack in packs)
    assert sum(row["visual_tokens"] for row in rows) == sum(pack.num_visual_tokens for pack in packs)
    assert sum(row["patches"] for row in rows) == sum(pack.num_patches for pack in packs)
    assert [row["epoch"] for row in rows] == [0, 0]
    # 4 packs of at most 96 tokens: 3 in the first step, 1 in the last.
    assert rows[1]["pack_efficiency"] == rows[1]["tokens"] / 96
    assert [row["lr"] for row in rows] == pytest.approx([1e-3 / 3, 2e-3 / 3])  # still in the warm-up
    assert all(row["mfu"] is None and row["seconds"] > 0 and 0 <= row["data_wait_fraction"] <= 1 for row in rows)
