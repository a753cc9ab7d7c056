"""What a run does besides its steps: saving, keeping the best, exporting, determinism."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qwen3vl_train.checkpoint.manifest import checkpoint_folder, complete_checkpoints, latest_checkpoint, read_manifest
from qwen3vl_train.checkpoint.writer import CheckpointWriter, read_tensors
from qwen3vl_train.config import Recipe, load_recipe, run_dir
from qwen3vl_train.dist.stop import StopRequest
from qwen3vl_train.tracking.metrics import read_metrics
from qwen3vl_train.tracking.recorder import Recorder
from qwen3vl_train.tracking.wandb import SilentTracker
from qwen3vl_train.train.export import export_run
from qwen3vl_train.train.loop import train
from tests.helpers import faults, small_runs
from tests.helpers.messages import message_of
from tests.helpers.ranks import run_ranks


def test_a_checkpoint_stall_is_in_the_next_metrics(small: Path, task: Path, tmp_path: Path):
    run = train(small_runs.make_recipe(small, task, tmp_path))
    stalls = [row["checkpoint_stall_seconds"] for row in read_metrics(run / "metrics.jsonl")]
    assert [stall > 0 for stall in stalls] == [False, False, True, False, True, False]


def test_the_optimizer_state_is_part_of_the_stall(small: Path, task: Path, tmp_path: Path):
    faults.slow_optimizer_state(seconds=0.4)
    run = train(small_runs.make_recipe(small, task, tmp_path, train__num_steps=3))
    assert read_metrics(run / "metrics.jsonl")[2]["checkpoint_stall_seconds"] > 0.4


def test_an_evaluation_sends_a_heartbeat_for_every_pack(small: Path, task: Path, tmp_path: Path):
    """Without them a long evaluation would be reported as a late rank."""
    heard = faults.note_heartbeats()
    case = {"data__eval": [{"path": str(task / "eval.jsonl"), "name": "held"}], "data__max_tokens_per_pack": 64}
    train(small_runs.make_recipe(small, task, tmp_path / "held", train__num_steps=1, **case))
    assert heard[:3] == [0, 0, 0]  # the data, the model, the start
    assert heard[3:].count(1) > 3  # the step, and packs of four rows


def test_the_manifest_holds_engine_ranks_versions_and_losses(small: Path, task: Path, tmp_path: Path):
    case = {"data__eval": [{"path": str(task / "eval.jsonl"), "name": "held"}], "eval__every_steps": 2}
    recipe = small_runs.make_recipe(small, task, tmp_path, parallel={"engine": "fsdp2"}, train__num_steps=3, **case)
    run_ranks(small_runs.train_on_rank, 2, recipe)
    run = tmp_path / "run"
    second, third = (read_manifest(checkpoint_folder(run, step), checksums=True) for step in (2, 3))
    assert (second["step"], second["engine"], second["world_size"]) == (2, "fsdp2", 2)
    assert second["versions"]["torch"] == torch.__version__
    assert len(second["files"]) == 2, "a file of each rank"
    logged = {row["step"]: row["loss"] for row in map(json.loads, (run / "eval.jsonl").read_text().splitlines())}
    assert (second["eval"], third["eval"]) == ({"held": logged[2]}, {"held": logged[3]})


def test_the_id_of_the_tracked_run_is_in_the_checkpoint(small: Path, task: Path, tmp_path: Path):
    given: list[str | None] = []

    def track(recipe: Recipe, folder: Path, rank: int, run_id: str | None) -> SilentTracker:
        given.append(run_id)
        return SilentTracker(run_id or "abc123")

    faults.track_with(track)
    recipe = small_runs.make_recipe(small, task, tmp_path, train__num_steps=2, checkpoint__every_steps=1)
    run = train(recipe)
    assert read_manifest(checkpoint_folder(run, 1))["wandb_run_id"] == "abc123"
    shutil.rmtree(checkpoint_folder(run, 2))
    train(recipe)
    assert given == [None, "abc123"]
    assert read_manifest(checkpoint_folder(run, 2))["wandb_run_id"] == "abc123"


def test_a_stop_is_not_a_failure_to_the_tracker(small: Path, task: Path, tmp_path: Path):
    codes = faults.note_tracker_exit_codes()
    recipe = small_runs.make_recipe(small, task, tmp_path)
    for error in (None, StopRequest("saved"), RuntimeError("broke")):
        recorder = Recorder(recipe, tmp_path, small_runs.ALONE, sys.stdout, num_steps=1, start_step=0)
        recorder.__exit__(type(error) if error else None, error, None)
    assert codes == [0, 75, 1]


def test_the_best_checkpoint_is_kept(small: Path, task: Path, tmp_path: Path):
    case = {
        "data__eval": [{"path": str(task / "eval.jsonl"), "name": "held"}],
        "eval__every_steps": 1,
        "checkpoint": {"every_steps": 1, "keep_last": 1, "keep_every_steps": 3, "keep_best": "held"},
        "optim": {"lr": 0.03, "schedule": "constant"},  # far too high: the loss first falls, then jumps about
    }
    run = train(small_runs.make_recipe(small, task, tmp_path, **case))
    lines = (run / "eval.jsonl").read_text().splitlines()
    logged = {row["step"]: row["loss"] for row in map(json.loads, lines)}
    best = min(logged, key=lambda step: logged[step])
    kept = sorted(int(folder.name[5:]) for folder in (run / "checkpoints").iterdir())
    assert kept == sorted({best, 3, 6})


@pytest.mark.parametrize("engine", ["single", "fsdp2"])
def test_moments_are_kept_in_the_last_checkpoints_alone(small: Path, task: Path, tmp_path: Path, engine: str):
    case = {"tune": small_runs.LORA, "train__num_steps": 5, "parallel": {"engine": engine}}
    keep = {"every_steps": 1, "keep_last": 2, "keep_every_steps": 2, "keep_optimizer": "last"}
    recipe = small_runs.make_recipe(small, task, tmp_path, checkpoint=keep, **case)
    whole = small_runs.make_recipe(
        small, task, tmp_path / "whole", checkpoint={"every_steps": 2, "keep_last": 9}, **case
    )
    num_ranks = 2 if engine == "fsdp2" else 1
    for each in (recipe, whole):
        run_ranks(small_runs.train_on_rank, num_ranks, each)
    run = tmp_path / "run"
    parts = {
        read_manifest(folder, checksums=True)["step"]: {name.split("/")[0] for name in read_tensors(folder)}
        for folder in complete_checkpoints(run)
    }
    everything = {"weight", "exp_avg", "exp_avg_sq"}
    assert parts == {2: {"weight"}, 4: everything, 5: everything}
    second = read_tensors(checkpoint_folder(tmp_path / "whole" / "run", 2), "weight/")
    small_runs.assert_same_tensors(read_tensors(checkpoint_folder(run, 2)), second)
    # The second newest is whole: a run resumes from it, and equals one that never stopped.
    shutil.rmtree(checkpoint_folder(run, 5))
    run_ranks(small_runs.train_on_rank, num_ranks, recipe)
    small_runs.assert_same_tensors(small_runs.final_tensors(run), small_runs.final_tensors(tmp_path / "whole" / "run"))


def test_epochs_say_when_to_save_to_evaluate_and_to_export(small: Path, task: Path, tmp_path: Path):
    """The run ends within its third epoch."""
    case = {
        "tune": small_runs.LORA,
        "data__eval": [{"path": str(task / "eval.jsonl"), "name": "held"}],
        "train": {"num_epochs": 2.6, "packs_per_step": 2},
        "eval": {"every_epochs": 1},
        "checkpoint": {"every_epochs": 1, "save_last": False, "keep_last": 9, "export_every_epochs": 2},
    }
    run = train(small_runs.make_recipe(small, task, tmp_path, **case))
    epochs = [row["epoch"] for row in read_metrics(run / "metrics.jsonl")]
    first, second = epochs.count(0), epochs.count(0) + epochs.count(1)
    assert 0 < len(epochs) - second < first, "the third epoch is not complete"
    evaluated = [json.loads(line)["step"] for line in (run / "eval.jsonl").read_text().splitlines()]
    assert evaluated == [first, second, len(epochs)]
    saved = [read_manifest(folder)["step"] for folder in complete_checkpoints(run)]
    assert saved == [first, second]
    assert [folder.name for folder in (run / "export").iterdir()] == [f"step-{second:08d}"]
    train(load_recipe(run / "recipe.yaml"))  # resumes after the last one saved, and trains the rest again
    assert [row["epoch"] for row in read_metrics(run / "metrics.jsonl")] == epochs


# ---- an error of one rank ends the run on all ranks


def _wait_until(true: Callable[[], bool], seconds: float = 900) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not so after {seconds} seconds"
        time.sleep(0.02)


def _fills_up(rank: int, world_size: int, recipe: Recipe, victim: int) -> str:
    writers: list[CheckpointWriter] = []

    def fill(step: int) -> None:
        if step == 4:
            _wait_until(lambda: latest_checkpoint(run_dir(recipe)) is not None)
            faults.fill_disk(50_000)
        if step == 5:
            _wait_until(writers[-1].failed)

    if rank == victim:
        faults.around_saves(before=lambda writer, step: writers.append(writer))
        faults.around_steps(before=fill)
    return message_of(RuntimeError, train, recipe)


@pytest.mark.parametrize(("engine", "victim", "num_steps"), [("ddp", 0, 8), ("ddp", 0, 4), ("fsdp2", 1, 8)], ids=str)
def test_all_ranks_end_when_one_cannot_save(
    small: Path, task: Path, tmp_path: Path, engine: str, victim: int, num_steps: int
):
    """Under ddp rank 0 writes alone. With four steps the write that fails is the last one."""
    recipe = small_runs.make_recipe(
        small, task, tmp_path, parallel={"engine": engine}, train__num_steps=num_steps, checkpoint__every_steps=2
    )
    first, second = run_ranks(_fills_up, 2, recipe, victim)
    assert first == second
    run = tmp_path / "run"
    assert first.startswith(f"{checkpoint_folder(run, 4)}: could not be saved (")
    assert first.endswith(f"; make room, then the run continues from {checkpoint_folder(run, 2)}, which is complete")
    assert len(read_metrics(run / "metrics.jsonl")) == min(5, num_steps), "the step after the one that was refused"


def _cannot_export(rank: int, world_size: int, recipe: Recipe) -> str:
    def refuse(out: Path) -> None:
        if recipe.parallel.engine == "ddp":
            faults.fill_disk(50_000)
        else:
            out.parent.write_text("a file: the folder cannot be made, and not one weight is asked for")

    if rank == 0:
        faults.before_export_in_training(refuse)
    return message_of(RuntimeError, train, recipe)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_all_ranks_end_when_an_export_fails(small: Path, task: Path, tmp_path: Path, engine: str):
    case = {"checkpoint": {"export_every_steps": 2}, "train__num_steps": 3, "parallel": {"engine": engine}}
    first, second = run_ranks(_cannot_export, 2, small_runs.make_recipe(small, task, tmp_path, **case))
    assert first == second
    out = tmp_path / "run" / "export" / "step-00000002"
    assert first.startswith(f"{out}: could not be written (")
    assert ("File too large" if engine == "ddp" else "File exists") in first
    assert first.endswith(
        "); make room or set checkpoint.export_every_steps: null, then start the run again; launch/export.py writes "
        "the same later"
    )
    assert out.parent.is_file() or not any(out.parent.iterdir())


def test_an_export_of_a_step_done_again_is_replaced(small: Path, task: Path, tmp_path: Path):
    case = {"tune": small_runs.LORA, "checkpoint": {"every_steps": 2, "export_every_steps": 2}, "train__num_steps": 2}
    recipe = small_runs.make_recipe(small, task, tmp_path, **case)
    stale = tmp_path / "run" / "export" / "step-00000002" / "stale"
    run = train(recipe)
    stale.write_text("left by a run that was killed and went back")
    for folder in (run / "checkpoints").iterdir():
        (folder / "checkpoint.json").unlink()
        folder.rename(folder.with_name("gone"))
    train(recipe)
    assert not stale.exists()
    assert (stale.parent / "adapter_config.json").is_file()


def test_older_exports_are_removed(small: Path, task: Path, tmp_path: Path):
    case = {"tune": small_runs.LORA, "train__num_steps": 3}
    case["checkpoint"] = {"every_steps": 9, "keep_last": 1, "keep_every_steps": 2, "export_every_steps": 1}
    run = train(small_runs.make_recipe(small, task, tmp_path, **case))
    assert sorted(folder.name for folder in (run / "export").iterdir()) == ["step-00000002", "step-00000003"]


def test_an_export_while_training_equals_a_later_export(small: Path, task: Path, tmp_path: Path):
    case = {"checkpoint": {"every_steps": 2, "export_every_steps": 2}, "train__num_steps": 2}
    run = train(small_runs.make_recipe(small, task, tmp_path / "out", **case))
    export_run(run, tmp_path / "export", merge=True)
    written = run / "export" / "step-00000002"
    names = sorted(file.name for file in (tmp_path / "export").iterdir())
    assert sorted(file.name for file in written.iterdir()) == names
    for name in names:
        assert (written / name).read_bytes() == (tmp_path / "export" / name).read_bytes(), name


def test_an_altered_checkpoint_is_not_exported(small: Path, task: Path, tmp_path: Path):
    run = train(small_runs.make_recipe(small, task, tmp_path, tune=small_runs.LORA, train__num_steps=1))
    (file,) = (checkpoint_folder(run, 1) / "state").iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{file}: its checksum is not the one it was written with"):
        export_run(run, tmp_path / "export", merge=False)


def test_a_deterministic_run_uses_deterministic_kernels(small: Path, task: Path, tmp_path: Path):
    try:
        plain = train(small_runs.make_recipe(small, task, tmp_path / "plain", train__num_steps=2))
        assert not torch.are_deterministic_algorithms_enabled()
        recipe = small_runs.make_recipe(
            small, task, tmp_path / "exact", train={"num_steps": 2, "packs_per_step": 2, "deterministic": True}
        )
        exact = train(recipe)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert small_runs.losses(exact) == pytest.approx(small_runs.losses(plain), rel=1e-6)
    finally:
        torch.use_deterministic_algorithms(False)
