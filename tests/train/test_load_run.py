"""Which checkpoint of a run is exported and evaluated: the newest, that of a step, the best."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen3vl_train.checkpoint.writer import read_tensors
from qwen3vl_train.train.answers import evaluate_answers
from qwen3vl_train.train.cli import evaluate, export
from qwen3vl_train.train.export import export_run
from qwen3vl_train.train.load_run import find_checkpoint
from qwen3vl_train.train.loop import train
from tests.helpers import small_runs
from tests.helpers.messages import message_of

LOSSES = {1: 3.5, 2: 2.25, 3: 2.5}


@pytest.fixture(scope="module")
def run(small: Path, task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint of each of 3 steps. The losses in their manifests are LOSSES."""
    case = {"tune": small_runs.LORA, "train__num_steps": 3, "optim__lr": 1e-2, "eval": {"every_steps": 1}}
    case |= {"checkpoint": {"every_steps": 1, "keep_last": 9, "keep_best": "held"}}
    case["data__eval"] = [{"path": str(task / "eval.jsonl"), "name": "held"}]
    folder = train(small_runs.make_recipe(small, task, tmp_path_factory.mktemp("run"), **case))
    for step, loss in LOSSES.items():
        manifest = folder / "checkpoints" / f"step-{step:08d}" / "checkpoint.json"
        record = json.loads(manifest.read_text())
        assert list(record["eval"]) == ["held"]
        manifest.write_text(json.dumps({**record, "eval": {"held": loss}}))
    return folder


def test_a_checkpoint_is_chosen(run: Path) -> None:
    newest = find_checkpoint(run)
    assert (newest.step, newest.folder.name) == (3, "step-00000003")
    assert newest.note == "step 3 is the newest; the lowest loss on held is that of step 2: --best"
    assert find_checkpoint(run, step=1).step == 1
    for name in ("", "held"):
        best = find_checkpoint(run, best=name)
        assert (best.step, best.note) == (2, "step 2 has the lowest loss on held, 2.2500, of 3 checkpoints")


def test_a_checkpoint_that_is_not_there_is_an_error(run: Path, tmp_path: Path) -> None:
    fault = message_of(ValueError, find_checkpoint, run, step=4)
    assert fault == f"{run}: has no checkpoint of step 4; it has those of steps 1, 2, 3"
    fault = message_of(ValueError, find_checkpoint, run, best="other")
    assert fault == f"{run}: no checkpoint has a loss on a held-out set 'other'; there are losses on: held"
    fault = message_of(ValueError, find_checkpoint, tmp_path)
    assert fault == f"{tmp_path}: not a run folder (no recipe.yaml); give runs/<name>"


def test_best_without_a_name_needs_one_held_out_set(run: Path, small: Path, task: Path, tmp_path: Path) -> None:
    plain = train(small_runs.make_recipe(small, task, tmp_path, train__num_steps=1))
    assert find_checkpoint(plain).note is None
    fault = message_of(ValueError, find_checkpoint, plain, best="")
    assert fault == f"{plain}: losses on 0 held-out sets (no eval); name one of them"


def test_the_chosen_checkpoint_is_exported_and_evaluated(run: Path, task: Path, tmp_path: Path, capsys) -> None:
    prefix = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
    ours = "weight/language_model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert export([str(run), "--step", "1", "--out", str(tmp_path / "first")]) == 0
    assert export([str(run), "--best", "--out", str(tmp_path / "best")]) == 0
    out = capsys.readouterr().out
    assert "step 2 has the lowest loss on held, 2.2500, of 3 checkpoints\n" in out
    assert "adapter of step 1, " in out
    for step, name in ((1, "first"), (2, "best")):
        written = load_file(tmp_path / name / "adapter_model.safetensors")[prefix]
        stored = read_tensors(run / "checkpoints" / f"step-{step:08d}", ours)[ours]
        assert torch.equal(written, stored)
    losses = []
    for choice in (["--step", "1"], ["--best", "held"], []):
        command = [str(run), "--data", str(task / "eval.jsonl"), "--max-new-tokens", "1"]
        assert evaluate([*command, *choice, "--json", str(tmp_path / "summary")]) == 0
        summary = json.loads((tmp_path / "summary").read_text())
        losses.append((summary["step"], summary["loss"]))
    assert [step for step, _ in losses] == [1, 2, 3]
    assert len({loss for _, loss in losses}) == 3
    assert "the lowest loss on held is that of step 2: --best" in capsys.readouterr().out


def test_a_model_folder_has_no_steps(small: Path, task: Path) -> None:
    options = {"media_root": None, "max_new_tokens": 1, "dtype": None, "step": 3}
    fault = message_of(ValueError, evaluate_answers, small, task / "eval.jsonl", **options)
    assert fault == f"{small}: not a run folder, so it has no step to choose; take --step or --best away"


def test_a_recipe_that_was_changed_is_named(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    recipe = (copy / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(recipe.replace("rank: 4", "rank: 8"))
    fault = message_of(ValueError, export_run, copy, tmp_path / "out", merge=True)
    assert fault.startswith(f"{copy}/checkpoints/step-00000003: does not hold ")
    assert fault.endswith(f" in its shape; was the recipe in {copy} changed?")
    assert not (tmp_path / "out").exists()
