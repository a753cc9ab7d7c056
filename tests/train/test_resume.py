"""Stopping changes nothing: a run that was killed resumes bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qwen3vl_train.config import Recipe, load_recipe
from qwen3vl_train.tracking.metrics import read_metrics
from qwen3vl_train.train.loop import train
from qwen3vl_train.train.step import lr_factor
from tests.helpers import faults, small_runs
from tests.helpers.messages import message_of
from tests.helpers.ranks import run_ranks
from tests.helpers.small_runs import in_child, losses

CASES = {
    "full-float32": {"tune": small_runs.FULL},
    "lora-float32-workers": {"tune": small_runs.LORA, "data__num_workers": 2},
    "full-bfloat16-workers": {"tune": small_runs.FULL, "model__dtype": "bfloat16", "data__num_workers": 2},
    "lora-bfloat16": {"tune": small_runs.LORA, "model__dtype": "bfloat16"},
    "mixed-bfloat16": {"tune": small_runs.MIXED, "model__dtype": "bfloat16"},
    "rows-bfloat16": {"tune": small_runs.ROWS, "model__dtype": "bfloat16"},
}


def _killed_after(step: int, recipe: Recipe) -> int:
    """Train in a process that is killed the moment the row of this step is on disk; return its exit code.

    Checkpoints of the steps before are complete by then. `test_killed.py` kills in the middle of one.
    """

    def work() -> None:
        faults.finish_saves()
        faults.kill_after_metrics_of(step)
        train(recipe)

    return in_child(work)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_killed_run_resumes_bit_for_bit(tiny_folder: Path, task: Path, tmp_path: Path, case: dict):
    straight = train(small_runs.make_recipe(tiny_folder, task, tmp_path / "straight", **case))
    recipe = small_runs.make_recipe(tiny_folder, task, tmp_path / "killed", **case)
    # Epochs have 2 steps, checkpoints come every 2: the first kill falls into an epoch, the second after a resume.
    assert _killed_after(3, recipe) == -9
    assert _killed_after(5, recipe) == -9
    killed = train(recipe)
    rows = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert rows == [1, 2, 3, 3, 4, 5, 5, 6]  # a step that is done again is written again
    assert losses(killed) == losses(straight)
    small_runs.assert_same_tensors(small_runs.final_tensors(killed), small_runs.final_tensors(straight))


def test_a_run_killed_before_its_first_checkpoint_starts_again(tiny_folder: Path, task: Path, tmp_path: Path):
    straight = train(small_runs.make_recipe(tiny_folder, task, tmp_path / "straight", train__num_steps=2))
    recipe = small_runs.make_recipe(tiny_folder, task, tmp_path / "killed", train__num_steps=2)
    assert _killed_after(1, recipe) == -9
    run = train(recipe)
    assert losses(run) == losses(straight)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("tune", [small_runs.FULL, small_runs.LORA], ids=["full", "lora"])
def test_a_run_of_one_rank_resumes_with_two(tiny_folder: Path, task: Path, tmp_path: Path, tune: dict):
    straight = train(small_runs.make_recipe(tiny_folder, task, tmp_path / "straight", tune=tune))
    recipe = small_runs.make_recipe(tiny_folder, task, tmp_path / "killed", tune=tune)
    assert _killed_after(3, recipe) == -9
    run_ranks(small_runs.train_on_rank, 2, recipe)
    run = tmp_path / "killed" / "run"
    # Two packs a step: the sum of two gradients is the same in either order, so this too holds bit for bit.
    assert losses(run) == losses(straight)
    small_runs.assert_same_tensors(small_runs.final_tensors(run), small_runs.final_tensors(straight))


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run that has done its 6 steps. Copy it before changing it."""
    out = tmp_path_factory.mktemp("finished")
    train(small_runs.make_recipe(tiny_folder, task, out, checkpoint__keep_last=2))
    return out


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "out")


def test_a_finished_run_has_nothing_to_do(tiny_folder, task, copied, capsys):
    before = (copied / "run" / "metrics.jsonl").read_bytes()
    train(small_runs.make_recipe(tiny_folder, task, copied))
    assert "nothing to do: all 6 steps are done" in capsys.readouterr().out.splitlines()
    assert (copied / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.process
def test_settings_that_do_not_change_training_may_change(tiny_folder, task, copied, capsys):
    recipe = small_runs.make_recipe(
        tiny_folder, task, copied, checkpoint={"every_steps": 5, "keep_last": 1}, data__num_workers=1
    )
    shutil.rmtree(copied / "run" / "checkpoints" / "step-00000006")
    train(recipe)
    assert "resuming after step 4 of 6" in capsys.readouterr().out.splitlines()
    kept = [folder.name for folder in (copied / "run" / "checkpoints").iterdir()]
    assert kept == ["step-00000006"]  # of those at 4, 5 and 6, as keep_last now says


def test_resume_never_refuses_a_started_run(tiny_folder, task, copied):
    recipe = small_runs.make_recipe(tiny_folder, task, copied, checkpoint__resume="never")
    assert message_of(ValueError, train, recipe) == (
        f"{copied / 'run'}: holds this run already; choose another name, or set checkpoint.resume: auto to continue"
    )


def test_resume_never_starts_where_nothing_is(tiny_folder, task, tmp_path):
    recipe = small_runs.make_recipe(tiny_folder, task, tmp_path, checkpoint__resume="never", train__num_steps=1)
    assert len(losses(train(recipe))) == 1


def test_a_folder_of_something_else_is_not_changed(tiny_folder, task, tmp_path):
    recipe = small_runs.make_recipe(tiny_folder, task, tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("dear")
    with pytest.raises(ValueError, match=r"run: holds other files, but no recipe\.yaml; choose another name or output"):
        train(recipe)
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ValueError, match=r"run: is a file; choose another name or output_dir$"):
        train(recipe)
    assert (tmp_path / "run").read_text() == "a file"


def test_more_steps_at_another_rate_where_allowed(tiny_folder, task, copied, capsys):
    """It goes on with optimizer and position, as a run of these values would from there."""
    changes = {"train__num_steps": 8, "optim__lr": 5e-4}
    with pytest.raises(ValueError, match=r"set checkpoint\.allow_changes: \[optim\.lr, train\.num_steps\] to continue"):
        train(small_runs.make_recipe(tiny_folder, task, copied, **changes))
    allowed = ["optim.lr", "train.num_steps", "optim.eps"]  # what is listed need not change
    train(small_runs.make_recipe(tiny_folder, task, copied, checkpoint__allow_changes=allowed, **changes))
    lines = capsys.readouterr().out.splitlines()
    assert "resuming after step 6 of 8" in lines
    assert "changed, as checkpoint.allow_changes says: optim.lr: 0.001 there, 0.0005 here" in lines
    saved = load_recipe(copied / "run" / "recipe.yaml")
    rates = [row["lr"] for row in read_metrics(copied / "run" / "metrics.jsonl")]
    assert rates[6:] == [5e-4 * lr_factor(step, num_steps=8, optim=saved.optim) for step in (6, 7)]
    assert (saved.optim.lr, saved.train.num_steps, saved.checkpoint.allow_changes) == (5e-4, 8, allowed)
    train(small_runs.make_recipe(tiny_folder, task, copied, **changes))  # they are the run's values now
    assert "changed" not in capsys.readouterr().out


def test_the_same_base_under_another_name_is_the_same_run(tiny_folder, task, copied, tmp_path, capsys):
    base = shutil.copytree(tiny_folder, tmp_path / "copy")
    train(small_runs.make_recipe(base, task, copied))
    assert "nothing to do: all 6 steps are done" in capsys.readouterr().out


def test_another_base_at_the_same_place_is_refused(tiny_folder, task, tmp_path):
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    recipe = small_runs.make_recipe(base, task, tmp_path, train__num_steps=2)
    train(recipe)
    weights = load_file(base / "model.safetensors")
    weights["model.visual.merger.norm.bias"] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    run = tmp_path / "run"
    assert message_of(ValueError, train, recipe) == (
        f"{run}: holds another run\n  - model.path: {base} holds other weights than the run was started with\n"
        f"choose another name, with tune.start_from: {run} to start from what was trained here"
    )


def test_a_damaged_checkpoint_is_skipped(tiny_folder, task, copied, capsys):
    recipe = small_runs.make_recipe(tiny_folder, task, copied)
    expected, tensors = losses(copied / "run"), small_runs.final_tensors(copied / "run")
    checkpoint = copied / "run" / "checkpoints" / "step-00000006"
    (file,) = (checkpoint / "state").iterdir()
    content = file.read_bytes()
    file.write_bytes(content[:-100] + bytes(10) + content[-90:])
    train(recipe)
    lines = capsys.readouterr().out.splitlines()
    fault = "its checksum is not the one it was written with; restore it, or move this checkpoint away"
    assert f"falling back to an earlier checkpoint: {file}: {fault}" in lines
    assert "resuming after step 4 of 6" in lines
    assert losses(copied / "run") == expected
    small_runs.assert_same_tensors(small_runs.final_tensors(copied / "run"), tensors)
    kept = sorted(folder.name for folder in (copied / "run" / "checkpoints").iterdir())
    assert kept == ["damaged-step-00000006", "step-00000004", "step-00000006"]


def test_changed_data_stops_a_resume(tiny_folder, task, tmp_path):
    shutil.copytree(task, tmp_path / "task")
    recipe = small_runs.make_recipe(tiny_folder, tmp_path / "task", tmp_path)
    assert _killed_after(3, recipe) == -9
    rows = (tmp_path / "task" / "train.jsonl").read_text()
    (tmp_path / "task" / "train.jsonl").write_text(rows.replace("Question 6?", "Question 9?"))
    with pytest.raises(ValueError, match=r"^resume: the data files changed since the checkpoint"):
        train(recipe)


def test_rows_rejected_before_a_kill_still_count_after_it(tiny_folder, task, tmp_path):
    shutil.copytree(task, tmp_path / "task")
    broken = tmp_path / "task" / "images" / "6-0.png"
    broken.write_bytes(broken.read_bytes()[:-2000])  # its header is intact: only decoding shows the damage
    case = {"data__max_rejected_fraction": 0.1}
    straight = train(small_runs.make_recipe(tiny_folder, tmp_path / "task", tmp_path / "straight", **case))
    recipe = small_runs.make_recipe(tiny_folder, tmp_path / "task", tmp_path / "killed", **case)
    assert _killed_after(5, recipe) == -9
    killed = train(recipe)
    assert losses(killed) == losses(straight)
    counts = [row["rejected"] for row in read_metrics(killed / "metrics.jsonl")]
    assert counts == [row["rejected"] for row in read_metrics(straight / "metrics.jsonl")]
    assert counts[-1] == 1
    assert (killed / "rejected.jsonl").read_text() == (straight / "rejected.jsonl").read_text()


def test_a_run_that_met_a_full_disk_resumes(tiny_folder, task, tmp_path):
    straight = train(small_runs.make_recipe(tiny_folder, task, tmp_path / "straight"))
    recipe = small_runs.make_recipe(tiny_folder, task, tmp_path / "full")
    run = tmp_path / "full" / "run"

    def train_until_the_disk_is_full() -> None:
        faults.finish_saves(2)
        # Between the first checkpoint and the second; one takes 19 MB.
        faults.around_steps(after=lambda step, packs: faults.fill_disk(1_000_000) if step == 3 else None)
        with pytest.raises(RuntimeError, match=r"step-00000004: could not be saved \(.*\); make room, then the run"):
            train(recipe)

    assert in_child(train_until_the_disk_is_full) == 0
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step-00000002"]
    train(recipe)
    assert losses(run) == losses(straight)
    small_runs.assert_same_tensors(small_runs.final_tensors(run), small_runs.final_tensors(straight))
