"""What a run does beside its steps: saving, keeping the best, writing for others, determinism."""

import json
from pathlib import Path

import pytest
import tiny
import tiny_engines
import tiny_runs
import torch
from safetensors.torch import load_file

from qwen3vl_train.checkpoint.hf import load_qwen3_vl_model
from qwen3vl_train.checkpoint.manifest import checkpoint_folder, read_record
from qwen3vl_train.checkpoint.names import to_huggingface
from qwen3vl_train.checkpoint.run import read_tensors
from qwen3vl_train.config import Recipe
from qwen3vl_train.train.export import export_run
from qwen3vl_train.train.loop import train
from qwen3vl_train.train.metrics import read_metrics


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_engines.write_small_checkpoint(tmp_path_factory.mktemp("small") / "model")


def _train(rank: int, world_size: int, recipe: Recipe) -> None:
    train(recipe)


def test_the_wait_for_a_checkpoint_is_in_the_metrics_of_the_next_step(small: Path, task: Path, tmp_path: Path):
    run = train(tiny_runs.make_recipe(small, task, tmp_path))
    stalls = [row["checkpoint_stall_seconds"] for row in read_metrics(run / "metrics.jsonl")]
    assert [stall > 0 for stall in stalls] == [False, False, True, False, True, False]


def test_the_manifest_says_who_wrote_it_and_what_for(small: Path, task: Path, tmp_path: Path):
    case = {"data__eval": [{"path": str(task / "eval.jsonl"), "name": "held"}], "eval__every_steps": 2}
    recipe = tiny_runs.make_recipe(small, task, tmp_path, parallel={"engine": "fsdp2"}, train__num_steps=3, **case)
    tiny.run_ranks(_train, 2, recipe)
    run = tmp_path / "run"
    second, third = (read_record(checkpoint_folder(run, step), checksums=True) for step in (2, 3))
    assert (second["step"], second["engine"], second["world_size"]) == (2, "fsdp2", 2)
    assert second["versions"]["torch"] == torch.__version__
    assert len(second["files"]) == 2, "a file of each rank"
    logged = {row["step"]: row["loss"] for row in map(json.loads, (run / "eval.jsonl").read_text().splitlines())}
    assert (second["eval"], third["eval"]) == ({"held": logged[2]}, {"held": logged[3]})


def test_the_best_checkpoint_stays_behind_the_newest(small: Path, task: Path, tmp_path: Path):
    case = {
        "data__eval": [{"path": str(task / "eval.jsonl"), "name": "held"}],
        "eval__every_steps": 1,
        "checkpoint": {"every_steps": 1, "keep_last": 1, "keep_every_steps": 3, "keep_best": "held"},
        "optim": {"lr": 0.03, "schedule": "constant"},  # far too high: the loss first falls, then jumps about
    }
    run = train(tiny_runs.make_recipe(small, task, tmp_path, **case))
    lines = (run / "eval.jsonl").read_text().splitlines()
    logged = {row["step"]: row["loss"] for row in map(json.loads, lines)}
    best = min(logged, key=lambda step: logged[step])
    kept = sorted(int(folder.name[5:]) for folder in (run / "checkpoints").iterdir())
    assert kept == sorted({best, 3, 6})


EXPORTS = {"full": tiny_runs.FULL, "lora": tiny_runs.LORA}


@pytest.mark.parametrize("engine", ["single", "fsdp2"])
@pytest.mark.parametrize("tune", EXPORTS)
def test_the_form_for_others_is_written_while_training(small: Path, task: Path, tmp_path: Path, engine: str, tune: str):
    case = {"tune": EXPORTS[tune], "checkpoint": {"every_steps": 2, "export_every_steps": 2}, "train__num_steps": 3}
    recipe = tiny_runs.make_recipe(small, task, tmp_path / "out", parallel={"engine": engine}, **case)
    if engine == "single":
        train(recipe)
    else:
        tiny.run_ranks(_train, 2, recipe)
    run = tmp_path / "out" / "run"
    assert [folder.name for folder in (run / "export").iterdir()] == ["step-00000002"]
    written = run / "export" / "step-00000002"
    stored = read_tensors(checkpoint_folder(run, 2), "weight/")
    trained = {name.removeprefix("weight/"): weight for name, weight in stored.items()}
    if tune == "full":
        weights = dict(load_qwen3_vl_model(written, dtype=torch.float32).named_parameters())
        assert weights.keys() == trained.keys()
        assert all(torch.equal(weight, trained[name]) for name, weight in weights.items())
    else:
        adapter = load_file(written / "adapter_model.safetensors")
        assert len(adapter) == len(trained)
        for name, weight in trained.items():
            module, _, part = name.partition(".lora_")
            key = f"base_model.model.{to_huggingface(module)}.lora_{part.replace('.default', '')}"
            assert torch.equal(adapter[key], weight)
    assert (written / "tokenizer.json").is_file()


def test_an_export_of_a_step_done_again_is_replaced(small: Path, task: Path, tmp_path: Path):
    case = {"tune": tiny_runs.LORA, "checkpoint": {"every_steps": 2, "export_every_steps": 2}, "train__num_steps": 2}
    recipe = tiny_runs.make_recipe(small, task, tmp_path, **case)
    stale = tmp_path / "run" / "export" / "step-00000002" / "stale"
    run = train(recipe)
    stale.write_text("left by a run that was killed and went back")
    for folder in (run / "checkpoints").iterdir():
        (folder / "checkpoint.json").unlink()
        folder.rename(folder.with_name("gone"))
    train(recipe)
    assert not stale.exists()
    assert (stale.parent / "adapter_config.json").is_file()


def test_what_was_written_while_training_is_what_export_writes(small: Path, task: Path, tmp_path: Path):
    case = {"checkpoint": {"every_steps": 2, "export_every_steps": 2}, "train__num_steps": 2}
    run = train(tiny_runs.make_recipe(small, task, tmp_path / "out", **case))
    export_run(run, tmp_path / "export", merge=True)
    written = run / "export" / "step-00000002"
    names = sorted(file.name for file in (tmp_path / "export").iterdir())
    assert sorted(file.name for file in written.iterdir()) == names
    for name in names:
        assert (written / name).read_bytes() == (tmp_path / "export" / name).read_bytes(), name


def test_deterministic_kernels_are_asked_for(small: Path, task: Path, tmp_path: Path):
    try:
        plain = train(tiny_runs.make_recipe(small, task, tmp_path / "plain", train__num_steps=2))
        assert not torch.are_deterministic_algorithms_enabled()
        recipe = tiny_runs.make_recipe(
            small, task, tmp_path / "exact", train={"num_steps": 2, "packs_per_step": 2, "deterministic": True}
        )
        exact = train(recipe)
        assert torch.are_deterministic_algorithms_enabled()
        assert tiny_runs.losses(exact) == pytest.approx(tiny_runs.losses(plain), rel=1e-6)
    finally:
        torch.use_deterministic_algorithms(False)
