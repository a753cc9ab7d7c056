"""Ranks that do not hold the same data or plan stop and say so; what one cannot read stops none and doubles nothing."""

import json
import os
import shutil

import pytest
import torch

from qwen3vl_train.checkpoint.manifest import latest_checkpoint, read_record
from qwen3vl_train.dist.ranks import Ranks
from qwen3vl_train.tracking.metrics import read_metrics
from qwen3vl_train.train.data import open_data
from qwen3vl_train.train.loop import train
from tests.helpers.ranks import run_ranks
from tests.helpers.small_runs import make_recipe, write_rows


def stand_on_a_machine_of_its_own(rank, folders):
    """The same paths, which are other files on each rank."""
    os.chdir(folders[rank])


def opening_fault(rank, world_size, folders, recipe):
    stand_on_a_machine_of_its_own(rank, folders)
    with pytest.raises(ValueError) as caught:
        open_data(recipe, Ranks(rank, world_size, rank, torch.device("cpu")))
    return str(caught.value)


def machines(task, tmp_path, count=2):
    folders = [tmp_path / f"machine-{number}" for number in range(count)]
    for folder in folders:
        shutil.copytree(task, folder)
    return folders


@pytest.mark.parametrize("streaming", [False, True])
def test_a_copy_of_the_data_that_differs_is_named_on_every_rank(tiny_folder, task, tmp_path, streaming):
    folders = machines(task, tmp_path, 3)
    rows = (task / "train.jsonl").read_text().splitlines()
    write_rows(folders[1] / "train.jsonl", rows[:-1])
    entry = {"path": "train.jsonl", "media_root": ".", "streaming": streaming}
    recipe = make_recipe(tiny_folder, task, tmp_path, data__train=[entry], data__eval=[{"path": "eval.jsonl"}])
    told = run_ranks(opening_fault, 3, folders, recipe)
    assert told == [told[0]] * 3
    first, second = told[0].split("\n")
    assert first == "data: 1 of 3 ranks do not have what rank 0 has; give all machines the same files"
    size, whole = (folder.joinpath("train.jsonl").stat().st_size for folder in (folders[1], folders[0]))
    how = f"sizes [{size}], on rank 0 [{whole}]" if streaming else "rows 10, on rank 0 11"
    assert second == f"  - rank 1: train.jsonl: {how}"
    (folders[2] / "eval.jsonl").unlink()
    told = run_ranks(opening_fault, 3, folders, recipe)
    fault = "eval.jsonl: no such file; check the paths under data"
    assert told == [f"rank 2: {fault}"] * 2 + [fault]


def open_saved(rank, world_size, folders, recipe):
    stand_on_a_machine_of_its_own(rank, folders)
    ranks = Ranks(rank, world_size, rank, torch.device("cpu"))
    first = open_data(recipe, ranks)
    step, _ = first.take(iter(first.loader), ranks)
    second = open_data(recipe, ranks, loader_state=step.state)
    return first.loader.state()["fingerprint"], second.loader.state()["steps_done"]


def test_a_data_set_that_each_machine_prepared_by_itself_is_known_by_what_rank_0_has(tiny_folder, task, tmp_path):
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
    (first, done), second = run_ranks(open_saved, 2, folders, recipe)
    assert second == (first, done)
    assert (done, first["sources"][0]["rows"]) == (1, 8)
    assert first["sources"][0]["fingerprint"] != "another"


def taken(rank, world_size, recipe, how):
    ranks = Ranks(rank, world_size, rank, torch.device("cpu"))
    data = open_data(recipe, ranks)
    if how == "apart" and rank == 1:
        data.loader.producer.seed += 1
    steps = iter(data.loader)

    def one_and_no_more(steps):
        yield next(steps)
        raise OSError("the disk of rank 1 is gone")

    if how == "broken" and rank == 1:
        steps = one_and_no_more(steps)
    done = []
    try:
        for _ in range(3):
            step, waited = data.take(steps, ranks)
            assert waited >= 0
            done.append([reject.row for reject in step.rejected])
    except (RuntimeError, OSError) as error:
        return done, f"{type(error).__name__}: {error}"
    return done, ""


def test_a_step_is_taken_on_all_ranks_or_on_none(tiny_folder, task, tmp_path):
    shutil.copytree(task, tmp_path / "data")
    entry = {"path": str(tmp_path / "data" / "train.jsonl")}
    recipe = make_recipe(tiny_folder, task, tmp_path, data__train=[entry], train__packs_per_step=4)
    assert run_ranks(taken, 2, recipe, "well") == [([[], [], []], "")] * 2
    first, second = run_ranks(taken, 2, recipe, "broken")
    assert first == ([[]], "OSError: rank 1: the disk of rank 1 is gone")
    assert second == ([[]], "OSError: the disk of rank 1 is gone")
    apart = run_ranks(taken, 3, recipe, "apart")
    assert apart == [([], (
        "RuntimeError: step 1: ranks 1 have planned other samples than rank 0, so samples would be left out or trained "
        "twice; no weight was changed. Give all machines the same files and the same versions, and start again from "
        "the last checkpoint"
    ))] * 3  # fmt: skip
    # What broke on one rank is known to all.
    file = tmp_path / "data" / "images" / "0-0.png"
    file.write_bytes(file.read_bytes()[:-3000])
    (first, _), (second, _) = run_ranks(taken, 2, recipe, "well")
    assert first == second
    assert [1] in first


def train_on(rank, world_size, folders, recipe):
    stand_on_a_machine_of_its_own(rank, folders)
    return train(recipe)


def test_a_stream_that_one_machine_cannot_read_whole_trains_every_other_sample_once(tiny_folder, task, tmp_path):
    """Rank 1 lacks pictures: all hold the plan of rank 0, and a row is left out where its turn comes on rank 1."""
    folders = machines(task, tmp_path)
    entry = {"path": "train.jsonl", "media_root": ".", "streaming": True}
    options = {
        "data__train": [entry], "data__stream_window": 5, "data__max_rejected_fraction": 0.5,
        "train__packs_per_step": 4, "data__num_workers": 1, "parallel": {"engine": "ddp"},
    }  # fmt: skip
    whole = make_recipe(tiny_folder, task, tmp_path, name="whole", **options)
    lacking = make_recipe(tiny_folder, task, tmp_path, name="lacking", **options)
    run, _ = run_ranks(train_on, 2, folders, whole, timeout=120)
    os.utime(folders[1] / "train.jsonl", ns=(7, 7))  # copied by hand, and the same content
    for name in ("0-0", "2-0", "8-0"):
        (folders[1] / "images" / f"{name}.png").unlink()
    with_faults, _ = run_ranks(train_on, 2, folders, lacking, timeout=120)
    steps, others = (read_metrics(folder / "metrics.jsonl") for folder in (run, with_faults))
    assert [step["epoch"] for step in steps] == [step["epoch"] for step in others]
    assert [step["patches"] for step in steps][:3] != [step["patches"] for step in others][:3]
    assert steps[-1]["rejected"] == 0
    listed = [json.loads(line) for line in (with_faults / "rejected.jsonl").read_text().splitlines()]
    assert others[-1]["rejected"] == len(listed) > 0
    assert {row["row"] for row in listed} <= {1, 3, 9}
    assert all("no such file" in row["reason"] for row in listed)
    one, other = (read_record(latest_checkpoint(folder))["loader"] for folder in (run, with_faults))
    assert one == other
