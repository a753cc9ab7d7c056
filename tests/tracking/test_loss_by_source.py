"""Each data set's own loss: the parts of the loss of a step, on any number of ranks."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from qwen3vl_train.batch import IGNORE_LABEL
from qwen3vl_train.config import Recipe
from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.rows.parse import RowRules
from qwen3vl_train.data.sources import JsonlSource
from qwen3vl_train.tracking.loss_by_source import SourceLoss, source_names
from qwen3vl_train.tracking.metrics import read_metrics
from qwen3vl_train.train.loop import train
from tests.helpers import faults, small_runs
from tests.helpers.ranks import run_ranks
from tests.helpers.small_runs import ONE_IMAGE, TEXT_ONLY, TWO_IMAGES, Trainee


def _named(task: Path, name: str, weight: float = 1.0) -> dict:
    return {"path": str(task / "train.jsonl"), "name": name, "weight": weight}


def test_a_tally_has_the_mean_loss_of_each_data_set(tiny_folder: Path, task: Path):
    """One pack holds rows of two data sets, another of one of them, the third data set has none; weights count."""
    rows = {name: JsonlSource(task / "train.jsonl", task, RowRules(label=name)) for name in ("one", "two")}
    samples = [rows["one"].sample(TEXT_ONLY), rows["two"].sample(ONE_IMAGE), rows["one"].sample(TWO_IMAGES)]
    collate = MultimodalCollator.from_pretrained(tiny_folder)
    packs = [collate(samples[:2]), collate(samples[2:])]
    packs[0] = replace(packs[0], label_weights=packs[0].label_weights * 0.5)
    trainee = Trainee(tiny_folder)
    sums, labels = {"one": 0.0, "two": 0.0}, {"one": 0, "two": 0}
    for name, sample, weight in zip(("one", "two", "one"), samples, (0.5, 0.5, 1.0), strict=True):
        batch = collate([sample])
        counted = batch.labels != IGNORE_LABEL
        logits = trainee.model.logits(batch)[counted]
        sums[name] += weight * F.cross_entropy(logits, batch.labels[counted], reduction="sum").item()
        labels[name] += int(counted.sum())
    done = trainee.step(packs, sources=["three", "two", "one"])
    assert done.sources["three"] == SourceLoss(None, 0)
    for name in ("one", "two"):
        assert done.sources[name].loss == pytest.approx(sums[name] / labels[name], abs=1e-5)
        assert done.sources[name].label_tokens == labels[name]
    assert done.loss == pytest.approx(sum(sums.values()) / sum(labels.values()), abs=1e-5)


def test_curves_of_a_mixture_are_the_same_on_two_ranks(tiny_folder: Path, task: Path, tmp_path: Path):
    def recipe(name: str) -> Recipe:
        mixture = [_named(task, "often", 2.0), _named(task, "seldom", 0.5), {"path": str(task / "eval.jsonl")}]
        return small_runs.make_recipe(
            tiny_folder, task, tmp_path / name, data__train=mixture, train={"num_epochs": 1, "packs_per_step": 4}
        )

    assert source_names(recipe("one")) == ["often", "seldom", "eval.jsonl"]
    one = read_metrics(train(recipe("one")) / "metrics.jsonl")
    run_ranks(small_runs.train_on_rank, 2, recipe("two"))
    two = read_metrics(tmp_path / "two" / "run" / "metrics.jsonl")
    seen = dict.fromkeys(["often", "seldom", "eval.jsonl"], 0)
    for alone, shared in zip(one, two, strict=True):
        assert alone["sources"].keys() == seen.keys()
        total = 0.0
        for name, of_source in alone["sources"].items():
            seen[name] += of_source["label_tokens"]
            total += (of_source["loss"] or 0.0) * of_source["label_tokens"]
            assert shared["sources"][name]["label_tokens"] == of_source["label_tokens"]
            assert shared["sources"][name]["loss"] == pytest.approx(of_source["loss"], abs=1e-5)
        assert total / alone["label_tokens"] == pytest.approx(alone["loss"], rel=1e-6)
    assert seen["often"] > seen["seldom"] > 0
    assert seen["eval.jsonl"] > 0


def test_each_data_set_is_a_curve_of_the_tracker(tiny_folder: Path, task: Path, tmp_path: Path):
    logged: list[dict] = []

    class Tracker:
        run_id = None

        def log(self, metrics: dict, step: int) -> None:
            logged.append(metrics)

        def finish(self, exit_code: int = 0) -> None:
            pass

    faults.track_with(lambda *_, **__: Tracker())
    mixture = [_named(task, "first"), _named(task, "second")]
    run = train(small_runs.make_recipe(tiny_folder, task, tmp_path, data__train=mixture, train__num_steps=2))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for curves, row in zip(logged, rows, strict=True):
        assert "sources" not in curves
        for name in ("first", "second"):
            assert curves[f"loss/{name}"] == row["sources"][name]["loss"]


@pytest.mark.parametrize("tune", [small_runs.FULL, small_runs.LORA], ids=["full", "lora"])
def test_a_step_without_a_label_changes_nothing(tiny_folder: Path, task: Path, tune: dict):
    pack = small_runs.packer(tiny_folder, task)
    trainee = Trainee(tiny_folder, tune=tune, optim__weight_decay=0.1)
    trainee.step([pack(ONE_IMAGE)])
    before, state = trainee.weights(), {k: v.clone() for k, v in trainee.optimizer.state_tensors().items()}
    done = trainee.step([], step=1)  # momentum and decay alone would move what trains
    assert (done.loss, done.label_tokens) == (0.0, 0)
    small_runs.assert_same_tensors(trainee.weights(), before)
    small_runs.assert_same_tensors(trainee.optimizer.state_tensors(), state)
    assert {int(values["step"]) for values in trainee.optimizer.adamw.state.values()} == {1}
    assert all(torch.isfinite(weight).all() for weight in before.values())
