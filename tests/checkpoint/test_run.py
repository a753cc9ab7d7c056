import json
import os
import resource
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwen3vl_train.checkpoint.atomic import replacing
from qwen3vl_train.checkpoint.manifest import KeepPolicy, checkpoint_folder, latest_checkpoint, read_record
from qwen3vl_train.checkpoint.writer import CheckpointWriter, read_tensors
from qwen3vl_train.tracking.metrics import MetricsLog
from qwen3vl_train.train.loop import train
from tests.helpers import small_runs


def _tensors(seed: int, size: int = 40) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"weight/a.{number}": torch.randn(size, 3 + number, generator=generator) for number in range(3)}


def save_checkpoint(run_dir: Path, step: int, tensors: dict[str, Tensor], record: dict, keep_last: int) -> Path:
    """Write a checkpoint as the loop does, and wait for it."""
    writer = CheckpointWriter(run_dir, small_runs.ALONE, KeepPolicy(keep_last))
    writer.start(step, lambda: tensors, {"updates": 0, "loader": {}, "rejects": [], **record})
    writer.wait()
    return checkpoint_folder(run_dir, step)


def _limit_files(num_bytes: int) -> None:
    """Let this process write no file larger than this, as if the disk were full there."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def test_tensors_and_record_come_back(tmp_path):
    tensors = {**_tensors(1), "exp_avg/b": torch.tensor([1e-30, -0.0, float("inf")])}
    folder = save_checkpoint(tmp_path, 7, tensors, {"loader": {"epoch": 1}}, keep_last=2)
    assert folder == checkpoint_folder(tmp_path, 7) == latest_checkpoint(tmp_path)
    assert folder.name == "step-00000007"
    small_runs.assert_same_tensors(read_tensors(folder), tensors)
    record = read_record(folder)
    assert (record["step"], record["loader"]) == (7, {"epoch": 1})


def test_no_pickle_is_written(tmp_path):
    folder = save_checkpoint(tmp_path, 1, _tensors(1), {}, keep_last=1)
    assert {file.suffix for file in folder.rglob("*") if file.is_file()} == {".json", ".safetensors"}


@pytest.mark.parametrize(("keep_last", "kept"), [(1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_the_newest_are_kept(tmp_path, keep_last, kept):
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, _tensors(step), {}, keep_last)
    assert [int(folder.name[5:]) for folder in sorted((tmp_path / "checkpoints").iterdir())] == kept


def test_only_whole_checkpoints_are_chosen(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    whole = save_checkpoint(tmp_path, 2, _tensors(2), {}, keep_last=3)
    later = save_checkpoint(tmp_path, 4, _tensors(4), {}, keep_last=3)
    later.rename(later.with_name(".step-00000004.partial"))
    shutil.copytree(whole, checkpoint_folder(tmp_path, 6))
    (checkpoint_folder(tmp_path, 6) / "checkpoint.json").unlink()  # the record is written last
    assert latest_checkpoint(tmp_path) == whole


def test_a_left_over_half_is_replaced_by_the_next_save(tmp_path):
    half = tmp_path / "checkpoints" / ".step-00000002.partial"
    half.mkdir(parents=True)
    (half / "junk").write_text("half")
    folder = save_checkpoint(tmp_path, 2, _tensors(2), {}, keep_last=1)
    assert not half.exists()
    assert sorted(file.name for file in folder.iterdir()) == ["checkpoint.json", "state"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name"),
        ("[]", "list indices"),
        ('{"step": 1}', "'files'"),
        ("\xff", "UnicodeDecodeError"),
    ],
)
def test_an_unreadable_record_is_named(tmp_path, text, reason):
    folder = save_checkpoint(tmp_path, 1, _tensors(1), {}, keep_last=1)
    (folder / "checkpoint.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError) as fault:
        read_record(folder)
    message = str(fault.value)
    assert message.startswith(f"{folder / 'checkpoint.json'}: unreadable (")
    assert reason in message
    assert message.endswith("; remove this checkpoint")


def test_a_full_disk_leaves_the_checkpoint_before_and_says_so(tmp_path, capfd):
    before = save_checkpoint(tmp_path, 1, _tensors(1), {"loader": 1}, keep_last=1)

    def save_too_much() -> None:
        _limit_files(100_000)
        with pytest.raises(RuntimeError) as stop:
            save_checkpoint(tmp_path, 2, _tensors(2, size=20_000), {}, keep_last=1)
        print(f"message: {stop.value}", flush=True)

    assert small_runs.in_child(save_too_much) == 0
    assert capfd.readouterr().out == (
        f"message: {tmp_path}/checkpoints/step-00000002: could not be saved ([Errno 27] File too large); "
        f"make room, then the run goes on from {before}, which is whole\n"
    )
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert read_record(before)["loader"] == 1
    small_runs.assert_same_tensors(read_tensors(before), _tensors(1))


def test_a_run_that_meets_a_full_disk_goes_on_once_there_is_room(tiny_folder, task, tmp_path):
    straight = train(small_runs.make_recipe(tiny_folder, task, tmp_path / "straight"))
    recipe = small_runs.make_recipe(tiny_folder, task, tmp_path / "full")
    run = tmp_path / "full" / "run"

    def train_until_the_disk_is_full() -> None:
        append, start = MetricsLog.append, CheckpointWriter.start

        def start_and_wait(writer: CheckpointWriter, step: int, *arguments) -> None:
            start(writer, step, *arguments)
            if step == 2:  # the first is whole before the disk is full
                writer.wait()

        def append_and_fill(log: MetricsLog, row: dict) -> None:
            append(log, row)
            if row["step"] == 3:  # between the first checkpoint and the second; one takes 19 MB
                _limit_files(1_000_000)

        MetricsLog.append, CheckpointWriter.start = append_and_fill, start_and_wait
        with pytest.raises(RuntimeError, match=r"step-00000004: could not be saved \(.*\); make room, then the run"):
            train(recipe)

    assert small_runs.in_child(train_until_the_disk_is_full) == 0
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step-00000002"]
    train(recipe)
    assert small_runs.losses(run) == small_runs.losses(straight)
    small_runs.assert_same_tensors(small_runs.final_tensors(run), small_runs.final_tensors(straight))


def test_a_first_checkpoint_that_fails_says_that_there_is_none(tmp_path, capfd):
    def save() -> None:
        _limit_files(100_000)
        with pytest.raises(RuntimeError) as stop:
            save_checkpoint(tmp_path, 2, _tensors(2, size=20_000), {}, keep_last=1)
        print(stop.value, flush=True)

    assert small_runs.in_child(save) == 0
    assert capfd.readouterr().out.endswith("; make room, then the run starts again, it has no checkpoint\n")


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "deep" / "out"
    with pytest.raises(FileNotFoundError), replacing(out) as aside:
        shutil.copy(tmp_path / "missing", aside)
    assert list(out.parent.iterdir()) == []
    with replacing(out) as aside:
        (aside / "file").write_text("whole")
        assert not out.exists()
    assert (out / "file").read_text() == "whole"
    assert os.listdir(out.parent) == ["out"]
    with pytest.raises(ValueError, match=r"out: exists already; choose another folder or remove it$"), replacing(out):
        pass
    assert (out / "file").read_text() == "whole"


def test_the_manifest_lists_sizes_and_checksums_of_all_files(tmp_path: Path):
    folder = save_checkpoint(tmp_path, 1, _tensors(1), {}, keep_last=1)
    files = json.loads((folder / "checkpoint.json").read_text())["files"]
    assert files == {
        f"state/{file.name}": {"bytes": file.stat().st_size, "crc32": zlib.crc32(file.read_bytes())}
        for file in (folder / "state").iterdir()
    }
