"""Whole runs of `train(recipe)` with sharded engines: stopped, resumed by another engine, exported."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from qwen3vl_train.checkpoint.hf import load_qwen3_vl_model
from qwen3vl_train.checkpoint.manifest import checkpoint_folder
from qwen3vl_train.checkpoint.writer import read_tensors
from qwen3vl_train.config import Recipe
from qwen3vl_train.model.hf_names import to_huggingface
from qwen3vl_train.train.loop import train
from tests.helpers import launchers, small_runs
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("fast_zero_steps")
TUNES = {"full": small_runs.FULL, "lora": small_runs.LORA, "mixed": {**small_runs.ROWS, "full": ["deepstack"]}}
HSDP = {"engine": "fsdp2", "replicate": 2, "shard": 2}


def _recipe(small: Path, task: Path, out: Path, **overrides: Any) -> Recipe:
    """Three steps with a checkpoint after each, all of them kept."""
    settings = {"checkpoint": {"every_steps": 1, "keep_last": 3}, "train__num_steps": 3, "optim__eps": 1e-4}
    settings |= overrides
    return small_runs.make_recipe(small, task, out, **settings)


def _forget_after(step: int, run: Path) -> None:
    """Leave a run as if it had been killed after the checkpoint of this step."""
    for folder in (run / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)


def _relay(rank: int, world_size: int, recipes: list[Recipe], run: Path) -> list[list[float]]:
    """Train with each recipe in turn, one step further with each; returns the losses in the metrics after each."""
    seen = []
    for number, recipe in enumerate(recipes):
        train(recipe)
        seen.append(small_runs.losses(run))
        dist.barrier()
        if rank == 0:
            _forget_after(number + 1, run)
        dist.barrier()
    return seen


@pytest.fixture(scope="module")
def straight(small: Path, task: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The losses of one process, by way to tune."""
    out = tmp_path_factory.mktemp("straight")
    return {tune: small_runs.losses(train(_recipe(small, task, out / tune, tune=TUNES[tune]))) for tune in TUNES}


@pytest.mark.parametrize("tune", TUNES)
def test_a_run_goes_from_fsdp2_to_deepspeed_to_ddp(
    small: Path, task: Path, tmp_path: Path, straight: dict[str, list[float]], tune: str
):
    engines = [{"engine": "fsdp2"}, {"engine": "deepspeed", "zero_stage": 3}, {"engine": "ddp"}]
    recipes = [_recipe(small, task, tmp_path / "out", tune=TUNES[tune], parallel=engine) for engine in engines]
    run = tmp_path / "out" / "run"
    first, second, third = run_ranks(_relay, 2, recipes, run)[0]
    assert third == pytest.approx(straight[tune], rel=1e-6)
    # Each took its part: a step of the first, one of the second, one of the third.
    assert (third[:1], third[1:2]) == (first[:1], second[1:2])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_deepspeed_run_resumes_bit_for_bit(small: Path, task: Path, tmp_path: Path, stage: int):
    recipe = _recipe(small, task, tmp_path, tune=small_runs.LORA, parallel={"engine": "deepspeed", "zero_stage": stage})
    whole, resumed = run_ranks(_relay, 2, [recipe, recipe], tmp_path / "run")[0]
    assert len(resumed) == 3
    assert resumed == whole
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3 + 2, "two steps were done again"


@pytest.mark.parametrize("engine", ["fsdp2", "deepspeed"])
def test_a_recipe_of_a_sharded_engine_needs_no_launcher(
    small: Path, task: Path, tmp_path: Path, straight: dict[str, list[float]], engine: str
):
    """The run of two ranks resumes in one plain process, by the command of the README."""
    recipe = _recipe(small, task, tmp_path / "out", parallel={"engine": engine})
    run = tmp_path / "out" / "run"
    run_ranks(_relay, 2, [recipe], run)
    file = launchers.write_recipe(tmp_path / "recipe.yaml", recipe)
    done = launchers.run([sys.executable, str(launchers.SFT), str(file)])
    assert done.returncode == 0, done.stderr
    assert "resuming after step 1 of 3" in done.stdout
    assert small_runs.losses(run) == pytest.approx(straight["full"], rel=1e-5)


EXPORTING = {
    "single": (1, {"engine": "single"}),
    "fsdp2": (2, {"engine": "fsdp2"}),
    "zero3": (2, {"engine": "deepspeed", "zero_stage": 3}),
    "hsdp": (4, HSDP),
}


@pytest.mark.parametrize("engine", EXPORTING)
@pytest.mark.parametrize("tune", TUNES)
def test_an_export_is_written_while_training(small: Path, task: Path, tmp_path: Path, capfd, tune: str, engine: str):
    world_size, parallel = EXPORTING[engine]
    if engine == "zero3":  # no weight stays gathered, as none of a large model does
        file = tmp_path / "zero3.json"
        file.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
        parallel = {**parallel, "deepspeed_config": str(file)}
    case = {"tune": TUNES[tune], "parallel": parallel, "train": {"num_steps": 3, "packs_per_step": 4}}
    recipe = _recipe(small, task, tmp_path, checkpoint={"every_steps": 2, "export_every_steps": 2}, **case)
    if world_size == 1:
        train(recipe)
    else:
        run_ranks(small_runs.train_on_rank, world_size, recipe)
    run = tmp_path / "run"
    written = run / "export" / "step-00000002"
    assert list((run / "export").iterdir()) == [written]
    stored = read_tensors(checkpoint_folder(run, 2), "weight/")
    trained = {name.removeprefix("weight/"): weight for name, weight in stored.items()}
    if tune == "full":
        got = dict(load_qwen3_vl_model(written, dtype=torch.float32).named_parameters())
    else:
        adapter = load_file(written / "adapter_model.safetensors")
        got = {name: adapter[_adapter_key(name)] for name in trained}
        assert len(adapter) == len(trained)
    small_runs.assert_same_tensors(got, trained)
    assert (written / "tokenizer.json").is_file()
    assert re.search(rf"^export step 2: written in \d+\.\d s, {written}$", capfd.readouterr().out, re.MULTILINE)


def _adapter_key(name: str) -> str:
    module, found, part = name.partition(".lora_")
    if not found:
        stored = to_huggingface(name.removesuffix(".new_rows"))
        return (
            f"base_model.model.{stored}{'.token_adapter.trainable_tokens_delta' if name.endswith('.new_rows') else ''}"
        )
    return f"base_model.model.{to_huggingface(module)}.lora_{part.replace('.default', '')}"
