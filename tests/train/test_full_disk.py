"""A disk that refuses a file beside the checkpoints ends a run with its name, after what was trained is saved."""

import shutil
from pathlib import Path

import pytest

from qwen3vl_train.checkpoint.manifest import latest_checkpoint
from qwen3vl_train.train.loop import train
from tests.helpers import faults, small_runs
from tests.helpers.messages import message_of
from tests.helpers.ranks import run_ranks
from tests.helpers.small_runs import in_child, losses

FULL = "cannot be written (No space left on device); make room or make it writable, then start again (saved after step"


def _full_from(first_step: int, recipe, file: Path) -> None:
    def fill(step: int) -> None:
        if step == first_step:
            file.unlink(missing_ok=True)
            file.symlink_to("/dev/full")

    faults.around_steps(before=fill)
    message = message_of(RuntimeError, train, recipe)
    assert message.startswith(f"{file}: {FULL} "), message


@pytest.mark.parametrize(("name", "step"), [("eval.jsonl", 3), ("rejected.jsonl", 1)])
def test_run_ends_with_a_checkpoint_and_resumes(tiny_folder, task, tmp_path, name, step):
    shutil.copytree(task, tmp_path / "task")
    if name == "rejected.jsonl":
        for broken in (tmp_path / "task" / "images").glob("*.png"):
            broken.write_bytes(broken.read_bytes()[:-2000])  # its header is intact: only decoding shows the damage
    case = {"data__max_rejected_fraction": 1.0, "data__eval": [{"path": str(task / "eval.jsonl")}]}
    case |= {"eval": {"every_steps": 3}, "checkpoint": {"every_steps": 100}}
    straight = train(small_runs.make_recipe(tiny_folder, tmp_path / "task", tmp_path / "straight", **case))
    recipe = small_runs.make_recipe(tiny_folder, tmp_path / "task", tmp_path / "full", **case)
    run = tmp_path / "full" / "run"
    assert in_child(lambda: _full_from(step, recipe, run / name)) == 0
    (run / name).unlink()
    train(recipe)
    assert losses(run) == losses(straight)


def _full_metrics(rank: int, world_size: int, recipe) -> str:
    if rank == 0:
        faults.fill_disk_of_metrics()
    return message_of(RuntimeError, train, recipe)


def test_all_ranks_end_where_one_cannot_write(tiny_folder, task, tmp_path):
    case = {"parallel": {"engine": "ddp"}, "checkpoint": {"every_steps": 100}}
    recipe = small_runs.make_recipe(tiny_folder, task, tmp_path, **case)
    first, second = run_ranks(_full_metrics, 2, recipe)
    assert first == second == f"{tmp_path}/run/metrics.jsonl: {FULL} 1)"
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    assert checkpoint.name == "step-00000001"
