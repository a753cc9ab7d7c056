"""The data of a recipe: indexed on rank 0 for all ranks, files and streams, limits and budgets from the recipe."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from qwen3vl_train.checkpoint.manifest import latest_checkpoint, read_manifest
from qwen3vl_train.data.open import cost_model
from qwen3vl_train.data.packing.stream import StreamedWindows
from qwen3vl_train.data.packing.windows import IndexedWindows
from qwen3vl_train.dist.ranks import Ranks
from qwen3vl_train.modules import GROUPS
from qwen3vl_train.tracking.metrics import read_metrics
from qwen3vl_train.train.data import open_data
from qwen3vl_train.train.loop import train
from tests.helpers import small_runs
from tests.helpers.messages import message_of
from tests.helpers.ranks import run_ranks
from tests.helpers.small_runs import ALONE, make_recipe, write_rows


def open_on_rank(rank, world_size, recipe, folder):
    os.environ["QWEN3VL_TRAIN_CACHE"] = str(folder / f"cache-{rank}")
    data = open_data(recipe, Ranks(rank, world_size, rank, torch.device("cpu")))
    steps = [step.packs for step in data.loader]
    names = [name for packs in steps for pack in packs for name in pack.sample_ids]
    # Rank 0 sends heartbeats, so that the others wait however long it takes.
    heartbeats = torch.distributed.distributed_c10d._get_default_store().add("main/heartbeats", 0)
    return data.index.digest(), data.rejects.indexed, len(data.rejects), heartbeats > 0, names


def test_rank_0_indexes_the_rows_for_all_ranks(tiny_folder, task, tmp_path):
    rows = [*(task / "train.jsonl").read_text().splitlines(), "{"]
    write_rows(tmp_path / "train.jsonl", rows)
    entry = {"path": str(tmp_path / "train.jsonl"), "media_root": str(task)}
    options = {"data__train": [entry], "train": {"num_epochs": 1, "packs_per_step": 2}}
    recipe = make_recipe(tiny_folder, task, tmp_path, **options)
    first, second = run_ranks(open_on_rank, 2, recipe, tmp_path)
    assert first[:4] == second[:4]
    assert first[2:4] == (1, True)
    assert [(reject.file, reject.row) for reject in first[1]] == [(str(tmp_path / "train.jsonl"), 12)]
    assert sorted(first[4] + second[4]) == sorted(f"train.jsonl:{line}" for line in range(1, 12))
    assert list((tmp_path / "cache-0" / "index").iterdir())
    assert not (tmp_path / "cache-1").exists()


def test_budgets_and_limits_of_the_recipe_reach_the_packs(tiny_folder, task, tmp_path):
    limits = {"data__max_patches_per_pack": 40, "data__max_sequences_per_pack": 2, "data__max_tokens_per_sample": 30}
    rejecting = open_data(make_recipe(tiny_folder, task, tmp_path, **limits), ALONE)
    assert rejecting.rejects.indexed[0].reason.startswith("sample of ")
    dropping = open_data(make_recipe(tiny_folder, task, tmp_path, data__too_long="drop", **limits), ALONE)
    assert dropping.rejects.indexed == []
    assert dropping.index.num_dropped == len(rejecting.rejects)
    shrinking = open_data(make_recipe(tiny_folder, task, tmp_path, data__too_long="shrink_media", **limits), ALONE)
    assert shrinking.index.num_usable > dropping.index.num_usable
    assert shrinking.index.num_shrunk.sum() > 0
    for data in (dropping, shrinking):
        for step in data.loader:
            for pack in step.packs:
                assert pack.num_patches <= 40
                assert len(pack.sample_ids) <= 2
                assert max(pack.segments.lengths) <= 30
    assert any("dropped as too long" in line for line in dropping.summary())


def test_a_streamed_run_resumes_with_the_same_counts(tiny_folder, task, tmp_path):
    rows = [json.loads(line) for line in (task / "train.jsonl").read_text().splitlines()]
    write_rows(tmp_path / "s.jsonl", [{"messages": []}, *rows, *rows])
    entries = [
        {"path": str(tmp_path / "s.jsonl"), "media_root": str(task), "streaming": True, "name": "s"},
        {"path": str(task / "train.jsonl")},
    ]
    options = {
        "data__train": entries, "data__stream_window": 8, "data__max_rejected_fraction": 0.5,
        "data__max_visual_tokens_per_image": 4, "data__min_visual_tokens_per_image": 1,
    }  # fmt: skip
    whole = train(make_recipe(tiny_folder, task, tmp_path, name="whole", **options))
    steps = read_metrics(whole / "metrics.jsonl")
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert sum(step["shrunk"] for step in steps) > 0
    assert {step["dropped"] for step in steps} == {0}
    rejected = [json.loads(line) for line in (whole / "rejected.jsonl").read_text().splitlines()]
    assert len(rejected) == steps[-1]["rejected"] == 1
    cut = train(make_recipe(tiny_folder, task, tmp_path, name="cut", **options))
    shutil.rmtree(cut / "checkpoints" / "step-00000006")
    train(make_recipe(tiny_folder, task, tmp_path, name="cut", **options))
    assert small_runs.losses(cut) == small_runs.losses(whole)
    assert [row["rejected"] for row in read_metrics(cut / "metrics.jsonl")] == [step["rejected"] for step in steps]
    assert (cut / "rejected.jsonl").read_text() == (whole / "rejected.jsonl").read_text()
    # Six steps of 2 packs scan 46 rows, the broken one once in each epoch.
    record = read_manifest(latest_checkpoint(whole))
    assert record["rejects"] == read_manifest(latest_checkpoint(cut))["rejects"]
    assert record["rejects"]["listed"] == 1


def test_too_many_rejected_rows_stop_a_stream(tiny_folder, task, tmp_path):
    rows = (task / "train.jsonl").read_text().splitlines()
    write_rows(tmp_path / "s.jsonl", [*rows[:4], "{", *rows[4:]] * 3)
    entries = [{"path": str(tmp_path / "s.jsonl"), "media_root": str(task), "streaming": True}]
    recipe = make_recipe(
        tiny_folder, task, tmp_path, data__train=entries, data__stream_window=12, data__max_rejected_fraction=0.05
    )
    assert message_of(ValueError, train, recipe).startswith(
        "data: 1 of the first 12 rows cannot be used, more than data.max_rejected_fraction 0.05; fix them or raise it"
        f"\n  - {tmp_path}/s.jsonl:5: not JSON"
    )


def test_a_stream_without_a_usable_row_lists_its_rejects(tiny_folder, task, tmp_path):
    write_rows(tmp_path / "s.jsonl", [{"images": ["a.png"], **small_runs.row("What?", "A")}] * 30)
    entries = [{"path": str(tmp_path / "s.jsonl"), "media_root": str(task), "streaming": True}]
    options = {"data__train": entries, "data__stream_window": 12, "data__max_rejected_fraction": 1.0}
    recipe = make_recipe(tiny_folder, task, tmp_path, **options)
    line = f"  - {tmp_path}/s.jsonl: 30 of 30 rows rejected (media_mismatch), the first is row 1: 1 image but 0 <image>"
    none, reason = message_of(ValueError, train, recipe).splitlines()
    assert none == f"{tmp_path}/s.jsonl: nothing to learn from, none of 30 rows can be used; fix the rows"
    assert reason.startswith(line)
    rejected = (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(row)["row"] for row in rejected] == list(range(1, 31))
    _, count, reason = open_data(recipe, ALONE).summary()
    assert count == "data: 30 of the first 30 rows of the streams cannot be used"
    assert reason.startswith(line)


def test_the_start_shows_many_rejects_of_one_kind_in_one_line(tiny_folder, task, tmp_path):
    rows = (task / "train.jsonl").read_text().splitlines()
    write_rows(tmp_path / "s.jsonl", ["{"] * 9 + rows)
    entries = [{"path": str(tmp_path / "s.jsonl"), "media_root": str(task)}]
    summary = open_data(make_recipe(tiny_folder, task, tmp_path, data__train=entries), ALONE).summary()
    assert summary[-2:-1] == ["data: 9 rows rejected, listed in rejected.jsonl"]
    assert summary[-1].startswith(f"  - {tmp_path}/s.jsonl: 9 of 20 rows rejected (invalid_json), the first is row 1: ")


def test_the_loader_has_the_settings_of_the_recipe(tiny_folder, task, tmp_path):
    files = open_data(make_recipe(tiny_folder, task, tmp_path), ALONE)
    assert isinstance(files.loader.producer, IndexedWindows)
    assert "the busiest rank does 1.000 of the mean" in files.summary()[0]
    entries = [{"path": str(task / "train.jsonl"), "streaming": True}]
    stream = open_data(make_recipe(tiny_folder, task, tmp_path, data__train=entries), ALONE)
    assert isinstance(stream.loader.producer, StreamedWindows)
    assert stream.summary() == [
        f"data: streamed from {task}/train.jsonl, packed 2,048 rows at a time",
        "data: begins with train.jsonl: 11 rows, openai 11",
    ]


def test_work_is_estimated_for_what_trains(tiny_folder, task, tmp_path):
    def model(**tune):
        return cost_model(make_recipe(tiny_folder, task, tmp_path, tune=tune))

    everything = model(method="full", train=["all"])
    text = model(method="full", train=["text"])
    lora = model(method="lora", targets=["text_attn"])
    both = model(method="lora", targets=["text_attn", "vision_attn"])
    pattern = model(method="lora", targets=[r".*\.qkv"])
    assert text.patch == pytest.approx(everything.patch / 3)
    assert lora.patch == pytest.approx(everything.patch / 2)
    assert both.patch == pytest.approx(everything.patch)
    assert pattern.patch == both.patch
    assert len(GROUPS) == 9  # a tenth group would need a place in `cost_model`


def test_the_cache_folder_is_set_by_the_environment(tiny_folder, task, tmp_path):
    assert Path(os.environ["QWEN3VL_TRAIN_CACHE"]).is_absolute()
    open_data(make_recipe(tiny_folder, task, tmp_path), ALONE)
    kept = Path(os.environ["QWEN3VL_TRAIN_CACHE"], "index")
    assert [file.suffix for file in kept.iterdir() if file.suffix != ".npz"] == []


def test_entries_of_one_file_share_the_ledger(tiny_folder, task, tmp_path):
    rows = (task / "train.jsonl").read_text().splitlines()
    path = str(write_rows(tmp_path / "train.jsonl", [*rows, "{"]))
    entries = [{"path": path, "media_root": str(task), "name": name} for name in ("once", "again")]
    data = open_data(make_recipe(tiny_folder, task, tmp_path, data__train=entries), ALONE)
    assert (len(data.rejects), len(data.rejects.indexed), data.index.num_rows) == (1, 2, 24)


def test_the_rejected_share_of_a_stream_holds_over_epochs(tiny_folder, task, tmp_path):
    rows = (task / "train.jsonl").read_text().splitlines()
    path = str(write_rows(tmp_path / "s.jsonl", [*rows[:4], "{", *rows[4:]]))
    entry = {"path": path, "media_root": str(task), "streaming": True}
    options = {"data__train": [entry], "data__stream_window": 12, "train__num_steps": 20}
    data = open_data(make_recipe(tiny_folder, task, tmp_path, data__max_rejected_fraction=1 / 12, **options), ALONE)
    steps, new = iter(data.loader), []
    for _ in range(20):
        packs = data.take(steps, ALONE).packs
        new += data.rejects.add(packs.rejected, num_seen=packs.num_seen)
        data.rejects.check()
    assert len(data.rejects) == len(new) == 1
    assert data.rejects.state() == {"listed": 1, "of_streams": packs.num_seen // 12}
    assert packs.num_seen > 24
