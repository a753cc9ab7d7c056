"""Ranks that differ in run folder, weights, data or plan all stop and name the difference."""

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3vl_train.checkpoint.manifest import latest_checkpoint, read_manifest
from qwen3vl_train.dist.ranks import Ranks
from qwen3vl_train.tracking.metrics import read_metrics
from qwen3vl_train.train.consistency import StepStatus, check_same_folder, check_same_weights
from qwen3vl_train.train.data import open_data
from qwen3vl_train.train.loop import train
from tests.helpers import faults
from tests.helpers.messages import message_of
from tests.helpers.ranks import run_ranks
from tests.helpers.small_runs import make_recipe, write_rows

CPU = torch.device("cpu")
HOST = socket.gethostname()


def _check_folder(rank: int, world_size: int, folders: list[Path]) -> str | None:
    faults.look_for_folder(1.0)
    try:
        check_same_folder(folders[rank], Ranks(rank, world_size, rank, CPU))
    except ValueError as error:
        return str(error)


def test_ranks_on_another_disk_are_named_on_all_ranks(tmp_path: Path):
    shared, other = tmp_path / "shared" / "run", tmp_path / "other" / "run"
    messages = run_ranks(_check_folder, 3, [shared, shared, other])
    assert len({message and message.partition(": ")[2] for message in messages}) == 1
    assert messages[0] == (
        f"{shared}: what rank 0 on {HOST} writes there is not seen by rank 2 on {HOST}; let output_dir be on a disk "
        "that all machines share, under the same path"
    )
    assert list(shared.parent.iterdir()) == [], "the token is removed"


def test_a_shared_folder_passes_and_keeps_no_token(tmp_path: Path):
    assert run_ranks(_check_folder, 2, [tmp_path / "runs" / "run"] * 2) == [None, None]
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_folder_that_cannot_be_made_fails_on_all_ranks(tmp_path: Path):
    (tmp_path / "runs").write_text("a file")
    messages = run_ranks(_check_folder, 2, [tmp_path / "runs" / "run"] * 2)
    assert messages == [f"{tmp_path}/runs/run: cannot be written (File exists); choose another output_dir"] * 2


def _check_weights(rank: int, world_size: int, models: list[Path]) -> str | None:
    try:
        check_same_weights(str(models[rank]), Ranks(rank, world_size, rank, CPU))
    except ValueError as error:
        return str(error)


def test_a_rank_with_other_weights_is_named_on_all_ranks(small: Path, tmp_path: Path):
    """Same names, shapes and sizes: only the numbers of one tensor differ."""
    shutil.copytree(small, tmp_path / "same")
    shutil.copytree(small, tmp_path / "other")
    tensors = load_file(small / "model.safetensors")
    tensors["model.visual.blocks.0.attn.proj.weight"] *= 1.01
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "none").mkdir()
    assert run_ranks(_check_weights, 2, [small, tmp_path / "same"]) == [None, None]
    messages = run_ranks(_check_weights, 3, [small, tmp_path / "other", small])
    ending = (
        f"rank 1 on {HOST} has other weights there than rank 0 on {HOST}; copy one model folder to all machines, or "
        "share it"
    )
    assert [message.partition(": ")[2] for message in messages] == [ending] * 3
    messages = run_ranks(_check_weights, 2, [small, tmp_path / "none"])
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"rank 1 on {HOST}: {tmp_path / 'none'}: no config.json")


def _train_apart(rank: int, world_size: int, models: list[Path], out: Path, task: Path, blind: int | None) -> str:
    faults.look_for_folder(1.0)
    if rank == blind:
        faults.see_no_files_of_others()  # its disk has the folder, and not what rank 0 writes
    return message_of(ValueError, train, make_recipe(models[rank], task, out, parallel={"engine": "ddp"}))


def test_a_run_starts_with_both_checks(small: Path, tmp_path: Path, task: Path):
    (none := tmp_path / "none").mkdir()
    shutil.copy(small / "config.json", none)
    messages = run_ranks(_train_apart, 2, [small, small], tmp_path / "runs", task, 1)
    assert all("is not seen by rank 1" in message for message in messages)
    messages = run_ranks(_train_apart, 2, [small, none], tmp_path / "runs", task, None)
    assert all(message.startswith(f"rank 1 on {HOST}: {none}") for message in messages)
    assert not list((tmp_path / "runs").glob("*")), "nothing is written before"


def _reduce_status(rank: int, world_size: int) -> list[StepStatus]:
    ranks = Ranks(rank, world_size, rank, CPU)
    quiet = {"has_rejects": False, "stop_requested": False, "save_failed": False}
    return [
        StepStatus.reduce(ranks, plan_hash=7, **quiet),
        StepStatus.reduce(ranks, plan_hash=7 + rank, **quiet),
        StepStatus.reduce(ranks, plan_hash=None if rank == 1 else 7, **quiet),
        StepStatus.reduce(
            ranks, plan_hash=2**48 - 1, has_rejects=rank == 0, stop_requested=True, save_failed=rank == 1
        ),
    ]


def test_a_step_status_is_true_where_it_is_on_any_rank():
    statuses = run_ranks(_reduce_status, 2)
    assert statuses[0] == statuses[1] == [
        StepStatus(False, False, False, False, False),
        StepStatus(False, True, False, False, False),
        StepStatus(True, False, False, False, False),
        StepStatus(False, False, True, True, True),
    ]  # fmt: skip


def _open_error(rank, world_size, folders, recipe):
    os.chdir(folders[rank])  # the same relative paths are other files
    return message_of(ValueError, open_data, recipe, Ranks(rank, world_size, rank, CPU))


def _machines(task, tmp_path, count=2):
    return [shutil.copytree(task, tmp_path / f"machine-{number}") for number in range(count)]


@pytest.mark.parametrize("streaming", [False, True])
def test_data_that_differs_is_named_on_all_ranks(tiny_folder, task, tmp_path, streaming):
    folders = _machines(task, tmp_path, 3)
    rows = (task / "train.jsonl").read_text().splitlines()
    write_rows(folders[1] / "train.jsonl", rows[:-1])
    entry = {"path": "train.jsonl", "media_root": ".", "streaming": streaming}
    recipe = make_recipe(tiny_folder, task, tmp_path, data__train=[entry], data__eval=[{"path": "eval.jsonl"}])
    messages = run_ranks(_open_error, 3, folders, recipe)
    assert messages == [messages[0]] * 3
    first, second = messages[0].split("\n")
    assert first == "data: 1 of 3 ranks do not have the data of rank 0; give all machines the same files"
    size, size_on_main = (folder.joinpath("train.jsonl").stat().st_size for folder in (folders[1], folders[0]))
    how = f"sizes [{size}], on rank 0 [{size_on_main}]" if streaming else "rows 10, on rank 0 11"
    assert second == f"  - rank 1: train.jsonl: {how}"
    (folders[2] / "eval.jsonl").unlink()
    messages = run_ranks(_open_error, 3, folders, recipe)
    error = "eval.jsonl: no such file; check the paths under data"
    assert messages == [f"rank 2: {error}"] * 2 + [error]


def _open_saved(rank, world_size, folders, recipe):
    os.chdir(folders[rank])
    ranks = Ranks(rank, world_size, rank, CPU)
    first = open_data(recipe, ranks)
    step = first.take(iter(first.loader), ranks).packs
    second = open_data(recipe, ranks, loader_state=step.state)
    return first.loader.state()["fingerprint"], second.loader.state()["steps_done"]


def test_a_prepared_data_set_has_the_fingerprint_of_rank_0(tiny_folder, task, tmp_path):
    """`datasets` makes a fingerprint of the time at which a machine wrote its cache."""
    import datasets

    rows = [json.loads(line) for line in (task / "train.jsonl").read_text().splitlines()[1:5:2]]
    table = [{"question": "?" * n, "answer": row["messages"][1]["content"]} for n, row in enumerate(rows, 1)]
    datasets.Dataset.from_list(table * 4).save_to_disk(str(tmp_path / "saved"))
    folders = [tmp_path / f"machine-{number}" for number in range(2)]
    for folder in folders:
        shutil.copytree(tmp_path / "saved", folder / "saved")
    state = folders[1] / "saved" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "_fingerprint": "another"}))
    recipe = make_recipe(tiny_folder, task, tmp_path, data__train=[{"path": "saved"}])
    (first, done), second = run_ranks(_open_saved, 2, folders, recipe)
    assert second == (first, done)
    assert (done, first["sources"][0]["rows"]) == (1, 8)
    assert first["sources"][0]["fingerprint"] != "another"


def _take(rank, world_size, recipe, how):
    ranks = Ranks(rank, world_size, rank, CPU)
    data = open_data(recipe, ranks)
    if how == "differs" and rank == 1:
        data.loader.producer.seed += 1
    steps = iter(data.loader)

    def one_step(steps):
        yield next(steps)
        raise OSError("the disk of rank 1 is gone")

    if how == "fails" and rank == 1:
        steps = one_step(steps)
    done = []
    try:
        for _ in range(3):
            step, _, waited = data.take(steps, ranks)
            assert waited >= 0
            done.append([reject.row for reject in step.rejected])
    except (RuntimeError, OSError) as error:
        return done, f"{type(error).__name__}: {error}"
    return done, ""


def test_a_step_is_taken_on_all_ranks_or_on_none(tiny_folder, task, tmp_path):
    shutil.copytree(task, tmp_path / "data")
    entry = {"path": str(tmp_path / "data" / "train.jsonl")}
    recipe = make_recipe(tiny_folder, task, tmp_path, data__train=[entry], train__packs_per_step=4)
    assert run_ranks(_take, 2, recipe, "well") == [([[], [], []], "")] * 2
    first, second = run_ranks(_take, 2, recipe, "fails")
    assert first == ([[]], "OSError: rank 1: the disk of rank 1 is gone")
    assert second == ([[]], "OSError: the disk of rank 1 is gone")
    different = run_ranks(_take, 3, recipe, "differs")
    assert different == [([], (
        "RuntimeError: step 1: ranks 1 have planned other samples than rank 0, so samples would be skipped or trained "
        "twice; no weight was changed. Give all machines the same files and the same versions, and start again from "
        "the last checkpoint"
    ))] * 3  # fmt: skip
    # A row that is broken on one rank is known to all.
    file = tmp_path / "data" / "images" / "0-0.png"
    file.write_bytes(file.read_bytes()[:-3000])
    (first, _), (second, _) = run_ranks(_take, 2, recipe, "well")
    assert first == second
    assert [1] in first


def _train(rank, world_size, folders, recipe):
    os.chdir(folders[rank])
    return train(recipe)


def test_a_stream_with_missing_media_trains_the_other_rows(tiny_folder, task, tmp_path):
    """Rank 1 lacks pictures: all ranks use the plan of rank 0, and a row is rejected when rank 1 builds it."""
    folders = _machines(task, tmp_path)
    entry = {"path": "train.jsonl", "media_root": ".", "streaming": True}
    options = {
        "data__train": [entry], "data__stream_window": 5, "data__max_rejected_fraction": 0.5,
        "train__packs_per_step": 4, "data__num_workers": 1, "parallel": {"engine": "ddp"},
    }  # fmt: skip
    complete = make_recipe(tiny_folder, task, tmp_path, name="complete", **options)
    lacking = make_recipe(tiny_folder, task, tmp_path, name="lacking", **options)
    run, _ = run_ranks(_train, 2, folders, complete)
    os.utime(folders[1] / "train.jsonl", ns=(7, 7))  # copied by hand, and the same content
    for name in ("0-0", "2-0", "8-0"):
        (folders[1] / "images" / f"{name}.png").unlink()
    with_faults, _ = run_ranks(_train, 2, folders, lacking)
    steps, others = (read_metrics(folder / "metrics.jsonl") for folder in (run, with_faults))
    assert [step["epoch"] for step in steps] == [step["epoch"] for step in others]
    assert [step["patches"] for step in steps][:3] != [step["patches"] for step in others][:3]
    assert steps[-1]["rejected"] == 0
    listed = [json.loads(line) for line in (with_faults / "rejected.jsonl").read_text().splitlines()]
    assert others[-1]["rejected"] == len(listed) > 0
    assert {row["row"] for row in listed} <= {1, 3, 9}
    assert all("no such file" in row["reason"] for row in listed)
    one, other = (read_manifest(latest_checkpoint(folder))["loader"] for folder in (run, with_faults))
    assert one == other
