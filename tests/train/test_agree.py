"""Ranks that do not see the same run folder, or begin from other weights, are named before anything is done."""

import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3vl_train.dist.ranks import Ranks
from qwen3vl_train.train import consistency as agree
from qwen3vl_train.train.consistency import check_same_folder, check_same_weights
from qwen3vl_train.train.loop import train
from tests.helpers import engine_runs, faults, small_runs
from tests.helpers.ranks import run_ranks

CPU = torch.device("cpu")
HOST = socket.gethostname()


def _look(rank: int, world_size: int, folders: list[Path]) -> str | None:
    agree.LOOK_SECONDS = 1.0
    try:
        check_same_folder(folders[rank], Ranks(rank, world_size, rank, CPU))
    except ValueError as error:
        return str(error)


def test_ranks_on_another_disk_are_named_on_all(tmp_path: Path):
    shared, apart = tmp_path / "shared" / "run", tmp_path / "apart" / "run"
    told = run_ranks(_look, 3, [shared, shared, apart])
    assert len({message and message.partition(": ")[2] for message in told}) == 1
    assert told[0] == (
        f"{shared}: what rank 0 on {HOST} writes there is not seen by rank 2 on {HOST}; let output_dir be on a disk "
        "that all machines share, under the same path"
    )
    assert list(shared.parent.iterdir()) == [], "nothing is left behind"


def test_a_shared_folder_passes_and_nothing_is_left(tmp_path: Path):
    assert run_ranks(_look, 2, [tmp_path / "runs" / "run"] * 2) == [None, None]
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told_on_all(tmp_path: Path):
    (tmp_path / "runs").write_text("a file")
    told = run_ranks(_look, 2, [tmp_path / "runs" / "run"] * 2)
    assert told == [f"{tmp_path}/runs/run: cannot be written (File exists); choose another output_dir"] * 2


def _compare(rank: int, world_size: int, models: list[Path]) -> str | None:
    try:
        check_same_weights(str(models[rank]), Ranks(rank, world_size, rank, CPU))
    except ValueError as error:
        return str(error)


def test_a_rank_with_other_weights_is_named_on_all(tmp_path: Path):
    """Same names, shapes and sizes: only the numbers of one tensor differ."""
    one = engine_runs.write_small_checkpoint(tmp_path / "one")
    shutil.copytree(one, tmp_path / "same")
    shutil.copytree(one, tmp_path / "other")
    tensors = load_file(one / "model.safetensors")
    tensors["model.visual.blocks.0.attn.proj.weight"] *= 1.01
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "none").mkdir()
    told = run_ranks(_compare, 2, [one, tmp_path / "same"])
    assert told == [None, None]
    told = run_ranks(_compare, 3, [one, tmp_path / "other", one])
    ending = (
        f"rank 1 on {HOST} has other weights there than rank 0 on {HOST}; copy one model folder to all machines, or "
        "share it"
    )
    assert [message.partition(": ")[2] for message in told] == [ending] * 3
    told = run_ranks(_compare, 2, [one, tmp_path / "none"])
    assert told[0] == told[1]
    assert told[0].startswith(f"rank 1 on {HOST}: {tmp_path / 'none'}: missing model.safetensors")


def _train_apart(rank: int, world_size: int, models: list[Path], out: Path, task: Path, blind: int | None) -> str:
    faults.look_for_folder(1.0)
    if rank == blind:
        faults.see_no_files_of_others()  # its disk has the folder, and not what rank 0 writes
    with pytest.raises(ValueError) as fault:
        train(small_runs.make_recipe(models[rank], task, out, parallel={"engine": "ddp"}))
    return str(fault.value)


def test_a_run_begins_with_both(tmp_path: Path, task: Path):
    model, none = engine_runs.write_small_checkpoint(tmp_path / "model"), tmp_path / "none"
    none.mkdir()
    told = run_ranks(_train_apart, 2, [model, model], tmp_path / "runs", task, 1)
    assert all("is not seen by rank 1" in message for message in told)
    told = run_ranks(_train_apart, 2, [model, none], tmp_path / "runs", task, None)
    assert all(message.startswith(f"rank 1 on {HOST}: {none}") for message in told)
    assert not list((tmp_path / "runs").iterdir()), "nothing is made before"
