"""One job at a time in a run folder, and nothing that a killed one left there keeps the next one out."""

import json
from pathlib import Path

import pytest

from qwen3vl_train.checkpoint.folder_lock import LOCK_FILE, FolderLock
from qwen3vl_train.config import Recipe
from qwen3vl_train.train.loop import train
from tests.helpers import faults, small_runs
from tests.helpers.messages import message_of
from tests.helpers.ranks import run_ranks
from tests.helpers.small_runs import in_child, losses


@pytest.fixture(scope="module")
def straight(small: Path, task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happens to."""
    return train(small_runs.make_recipe(small, task, tmp_path_factory.mktemp("straight"), train__num_steps=3))


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file but the lock, which its holder renews."""
    found = [file for file in folder.rglob("*") if file.is_file() and file.name != LOCK_FILE]
    return {str(file.relative_to(folder)): (file.read_bytes(), file.stat().st_mtime_ns) for file in found}


@pytest.mark.parametrize("moment", [faults.before_data, faults.before_steps])
def test_a_second_job_is_refused(small: Path, task: Path, tmp_path: Path, straight: Path, moment):
    recipe = small_runs.make_recipe(small, task, tmp_path, train__num_steps=3, checkpoint__every_steps=None)
    folder, exit_codes = tmp_path / "run", []

    def second() -> None:
        faults.undo()
        assert f"{folder}: in use by process " in message_of(ValueError, train, recipe)

    def start_second() -> None:
        before = files(folder)
        exit_codes.append(in_child(second))
        assert files(folder) == before

    moment(start_second)
    train(recipe)
    assert exit_codes in ([0], [0] * 3)
    assert losses(folder) == losses(straight)
    assert not (folder / LOCK_FILE).exists()


def _message(rank: int, world_size: int, recipe: Recipe) -> str:
    return message_of(ValueError, train, recipe)


def test_a_second_job_is_refused_on_all_ranks(small: Path, task: Path, tmp_path: Path):
    recipe = small_runs.make_recipe(small, task, tmp_path, parallel__engine="ddp")
    lock = FolderLock(tmp_path / "run")
    messages = run_ranks(_message, 2, recipe)
    lock.release()
    assert len(set(messages)) == 1
    assert "in use by process" in messages[0]
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_another_job_took_over_ends(small: Path, task: Path, tmp_path: Path):
    recipe = small_runs.make_recipe(small, task, tmp_path)
    other = {"host": "node-7", "process": 12, "token": "t", "started": "today"}

    def take_over(step: int) -> None:
        if step == 3:
            (tmp_path / "run" / LOCK_FILE).write_text(json.dumps(other))

    faults.around_steps(before=take_over)
    message = message_of(RuntimeError, train, recipe)
    assert message.startswith(f"{tmp_path}/run: taken over by process 12 on node-7, started today because")
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


def test_leftover_files_do_not_lock_a_name(small: Path, task: Path, tmp_path: Path, straight: Path):
    recipe = small_runs.make_recipe(small, task, tmp_path, train__num_steps=3)
    (folder := tmp_path / "run").mkdir()
    for name in (".recipe.yaml.123.tmp", ".recipe.yaml.0f.tmp", ".nfs0001", "rejected.jsonl", LOCK_FILE):
        (folder / name).write_text("")
    train(recipe)
    assert losses(folder) == losses(straight)
    assert not list(folder.glob("*.tmp"))


def test_the_saved_recipe_is_written_only_when_it_changes(small: Path, task: Path, tmp_path: Path):
    recipe = small_runs.make_recipe(small, task, tmp_path, train__num_steps=1)
    flushed = faults.note_checkpoint_files()["flushed"]
    train(recipe)
    (at,) = (place for place, name in enumerate(flushed) if name.startswith(".recipe.yaml."))
    assert flushed[at + 1] == "run", "its name, too, survives a power cut"
    file = tmp_path / "run" / "recipe.yaml"
    before = file.stat()
    train(recipe)
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    train(small_runs.make_recipe(small, task, tmp_path, train__num_steps=1, checkpoint__keep_last=7))
    assert "keep_last: 7" in file.read_text()
