"""Streams: one rank scans for all, the others hold the same plan whatever they can read; faults; flat memory."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch

from qwen3vl_train.config.data_fields import TrainSource
from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.packing.index import LengthRule
from qwen3vl_train.data.packing.loader import Loader
from qwen3vl_train.data.packing.mixture import InOrder, Part
from qwen3vl_train.data.packing.plan import PackLimits
from qwen3vl_train.data.packing.stream import StreamedWindows
from qwen3vl_train.data.rejects import NoUsableRowError
from qwen3vl_train.data.rows.parse import RowRules
from qwen3vl_train.data.sources import open_stream
from qwen3vl_train.data.sources.streams import FileStream
from qwen3vl_train.dist.ranks import Ranks, StoreBroadcast
from tests.helpers import faults, loaders, row_files
from tests.helpers.loaders import EVERY_ROW, NUM_ROWS, assert_same_packs, contents_of, make_loader, names_of, plan_of
from tests.helpers.messages import message_of
from tests.helpers.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def faulty(copy):
    """A copy of the folder in which rows 8 and 41 of `s.jsonl` cannot be used."""
    lines = (copy / "s.jsonl").read_text().splitlines()
    lines[7], lines[40] = "{", json.dumps({"messages": [{"role": "user", "content": "a"}]})
    (copy / "s.jsonl").write_text("\n".join(lines) + "\n")
    return copy


def stream_loader(folder, collate, **changes):
    return make_loader("streamed", folder, collate, **{"window": 16, **changes})


def file_loader(path, collate, **changes):
    """A loader of one stream."""
    part = Part(InOrder(open_stream(TrainSource(path=str(path), streaming=True))), 1.0)
    how = {"size": changes.pop("window"), "in_worker": changes.get("num_workers", 0) > 0}
    producer = StreamedWindows([part], collate, LengthRule(160), seed=0, **how)
    return Loader(producer, collate, limits=PackLimits(160), **changes)


def steps_on_ranks(folders, collate, **options):
    """Return the steps of every rank; each reads the files of its own folder."""
    broadcast = loaders.Broadcast()
    return [
        list(stream_loader(folder, collate, rank=rank, world_size=len(folders), broadcast=broadcast, **options))
        for rank, folder in enumerate(folders)
    ]


def test_unusable_rows_are_reported_once_by_rank_0(faulty, collate):
    def rejects(rank, state=None):
        train = stream_loader(faulty, collate, rank=rank, world_size=2, num_epochs=1)
        if state:
            train.load_state_dict(state)
        return [(reject.file, reject.row) for step in train for reject in step.rejected]

    wanted = [(f"{faulty}/s.jsonl", 8), (f"{faulty}/s.jsonl", 41)]
    assert (rejects(0), rejects(1)) == (wanted, [])
    steps = list(stream_loader(faulty, collate, num_epochs=1))
    assert Counter(names_of(steps)) == EVERY_ROW - Counter(["s.jsonl:8", "s.jsonl:41"])
    for step, following in pairwise(steps):
        before = sum(len(other.rejected) for other in steps if other.num_seen <= step.num_seen)
        if following.num_seen > step.num_seen:
            assert rejects(0, step.state) == wanted[before:]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("what", ["picture", "row"])
def test_row_that_one_rank_cannot_read_changes_no_plan(folder, copy, collate, workers, what):
    lines = (copy / "s.jsonl").read_text().splitlines()
    damaged = range(0, NUM_ROWS["s.jsonl"], 3)
    for number in damaged:
        if what == "picture":
            (copy / f"{number}.png").unlink()
        else:
            lines[number] = "[" + lines[number][1:]
    (copy / "s.jsonl").write_text("\n".join(lines) + "\n")
    ranks = steps_on_ranks([folder, copy], collate, num_workers=workers)
    assert plan_of(ranks[0]) == plan_of(ranks[1]) == plan_of(stream_loader(folder, collate))
    rejected = [reject for step in ranks[1] for reject in step.rejected]
    assert rejected
    assert {reject.row for reject in rejected} <= {number + 1 for number in damaged}
    reason = {"picture": "no such file", "row": "not JSON"}[what]
    assert all(reason in reject.reason for reject in rejected)
    assert not any(step.rejected for step in ranks[0])
    lost = Counter(f"s.jsonl:{reject.row}" for reject in rejected)
    assert Counter(names_of(ranks[0]) + names_of(ranks[1])) + lost == EVERY_ROW + EVERY_ROW


def test_plan_hashes_differ_where_each_rank_scans_for_itself(folder, copy, collate):
    (copy / "3.png").unlink()
    first, second = (
        [step.plan_hash for step in stream_loader(files, collate, rank=rank, world_size=2)]
        for rank, files in enumerate((folder, copy))
    )
    assert first != second


def test_row_that_rank_0_cannot_read_is_skipped_on_every_rank(folder, copy, collate):
    (copy / "3.png").write_bytes(b"no picture")
    ranks = steps_on_ranks([copy, folder, folder], collate, num_epochs=1)
    assert plan_of(ranks[0]) == plan_of(ranks[1]) == plan_of(ranks[2])
    assert Counter(name for steps in ranks for name in names_of(steps)) == EVERY_ROW - Counter(["s.jsonl:4"])
    assert [[reject.row for step in steps for reject in step.rejected] for steps in ranks] == [[4], [], []]


def test_other_rows_on_another_machine_are_refused(folder, copy, collate):
    rows, texts = ((folder / f"{name}.jsonl").read_text().splitlines() for name in "st")
    end = "give all ranks the same files"
    for name, lines, here, there in (
        ("s", [*rows[:20], "", *rows[20:]], "s.jsonl:22", "s.jsonl:21"),
        ("t", texts[:-1], "its end", "t.jsonl:9"),
        ("t", [*texts, texts[0]], "t.jsonl:10", "its end"),
    ):
        (copy / f"{name}.jsonl").write_text("\n".join(lines))
        fault = f"data.train: the stream continues with {here} here and with {there} on rank 0; {end}"
        assert message_of(ValueError, steps_on_ranks, [folder, copy], collate, weights=(1.0, 0.1)) == fault
        shutil.copy(folder / f"{name}.jsonl", copy)


class BreaksOff(FileStream):
    def __init__(self, folder, fault):
        super().__init__("s", [str(folder / "s.jsonl")], str(folder), RowRules())
        self.fault = fault

    def rows(self, state=None):
        yield from islice(super().rows(state), 60)
        raise self.fault


@pytest.mark.parametrize("fault", [ValueError("s.jsonl is cut short"), RuntimeError("the disk is gone"), KeyError("b")])
@pytest.mark.parametrize("workers", [0, 1])
def test_error_on_rank_0_stops_all_ranks_after_the_same_step(folder, collate, workers, fault):
    broadcast, steps_done = loaders.Broadcast(), []
    for rank in range(2):
        train = stream_loader(folder, collate, rank=rank, world_size=2, broadcast=broadcast, num_workers=workers)
        if rank == 0:
            faults.replace_first_part(train, Part(InOrder(BreaksOff(folder, fault)), 1.0))
        with pytest.raises(ValueError if isinstance(fault, ValueError) else Exception) as caught:
            list(train)
        assert str(fault) in str(caught.value)
        steps_done.append(train.state()["steps_done"])
    assert steps_done[0] == steps_done[1] > 0


@pytest.mark.parametrize(
    ("stop", "changes"),
    [(0, {"window": 40}), (1, {"window": 40}), (0, {"window": 7, "packs_per_step": 1})],
    ids=["first", "second", "last row of the window skipped"],
)
def test_window_that_is_read_again_keeps_its_plan(copy, collate, stop, changes):
    picture = (copy / "3.png").read_bytes()
    (copy / "3.png").write_bytes(b"no picture")
    straight = list(stream_loader(copy, collate, num_epochs=1, **changes))
    assert straight[stop].state["skipped"] == [6]
    state = json.loads(json.dumps(straight[stop].state))
    (copy / "3.png").write_bytes(picture)
    again = stream_loader(copy, collate, num_epochs=1, **changes)
    again.load_state_dict(state)
    rest = list(again)
    assert contents_of(rest) == contents_of(straight[stop + 1 :])
    assert names_of(rest)


def test_window_that_cannot_be_read_as_before_ends_the_resume(copy, collate):
    state = next(iter(stream_loader(copy, collate, window=40))).state
    (copy / "2.png").unlink()
    again = stream_loader(copy, collate, window=40)
    again.load_state_dict(state)
    start, end = message_of(ValueError, next, iter(again)).split(" messages[0]")
    assert start == f"resume: the chunk of the stream that the run stopped in is not what it was: {copy}/s.jsonl:3:"
    assert end.endswith("; put it back, or start a new run")


def run_rank(rank, world_size, folders, tiny_folder, workers):
    ranks = Ranks(rank, world_size, rank, torch.device("cpu"))
    train = stream_loader(
        folders[rank], MultimodalCollator.from_pretrained(tiny_folder), rank=rank, world_size=world_size,
        num_workers=workers, packs_per_step=3, window=6, broadcast=StoreBroadcast(ranks),
    )  # fmt: skip
    steps = []
    for step in train:
        rejected = [reject.row for reject in step.rejected]
        steps.append((step.plan_hash, step.state["steps_done"], names_of([step]), rejected))
        if len(steps) % 4 == rank:
            time.sleep(0.05)
        ranks.reduce([1.0])  # as a training step does: who is early waits here
    store = torch.distributed.distributed_c10d._get_default_store()
    ranks.gather(None)
    left = [key for key in range(40) if store.check([f"broadcast/1/1/{key}"])]
    return steps, left


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_with_fewer_packs_wait_for_no_later_message(folder, copy, tiny_folder, workers):
    """Three packs for two ranks, and windows of about two packs: who has one pack a step would ask far ahead."""
    (copy / "9.png").unlink()
    first, second = run_ranks(run_rank, 2, [folder, copy], tiny_folder, workers)
    assert [step[:2] for step in first[0]] == [step[:2] for step in second[0]]
    trained = Counter(name for steps, _ in (first, second) for step in steps for name in step[2])
    lost = [row for steps, _ in (first, second) for step in steps for row in step[3]]
    assert set(lost) <= {10}
    assert trained + Counter(f"s.jsonl:{row}" for row in lost) == EVERY_ROW + EVERY_ROW
    assert first[1] == []  # what all have read is gone from the store


@pytest.mark.parametrize("workers", [0, 1])
def test_changed_file_of_a_stream_stops_the_run(copy, collate, workers):
    changing = stream_loader(copy, collate, window=8, num_workers=workers)
    steps = iter(changing)
    next(steps)
    for name in ("s.jsonl", "t.jsonl"):
        with (copy / name).open("a") as file:
            file.write("\n")
    with pytest.raises(ValueError, match=r"s.jsonl changed since it was opened \([0-9]+ bytes then, [0-9]+ now\); put"):
        list(steps)
    state = changing.state()
    with pytest.raises(ValueError, match=r"^resume: the data files changed since the checkpoint"):
        stream_loader(copy, collate, window=8).load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 1])
def test_stream_with_nothing_to_learn_from_ends_with_an_error(tmp_path, collate, workers):
    file = tmp_path / "a.jsonl"
    file.write_text("{\n" * 70)
    train = file_loader(file, collate, packs_per_step=1, num_steps=5, window=32, num_workers=workers)
    expected = f"^{file}: nothing to learn from, none of 70 rows can be used; fix the rows"
    with pytest.raises(NoUsableRowError, match=expected) as caught:
        list(train)
    assert [(reject.row, reject.kind) for reject in caught.value.rejects] == [(n, "invalid_json") for n in range(1, 71)]


@pytest.mark.parametrize("workers", [0, 1])
def test_stream_that_breaks_off_says_where(tmp_path, collate, workers):
    row = json.dumps({"messages": [{"role": "user", "content": "q" * 99}, {"role": "assistant", "content": "x"}]})
    content = gzip.compress((row + " " * 900 + "\n").encode() * 1500, compresslevel=0)
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(content[:-200_000] + b"\xff" * 100_000 + content[-100_000:])
    train = file_loader(file, collate, packs_per_step=100, num_steps=5000, window=256, num_workers=workers)
    with pytest.raises(ValueError, match=f"^{file}: is truncated or damaged after row [0-9]+ .*; copy the file agai"):
        list(train)
    assert train.num_seen >= 256


@pytest.mark.process
@pytest.mark.parametrize("kind", ["a.jsonl", "a.json", "b.jsonl.gz", "a.parquet", "a.tar", "b.tar.gz", "saved"])
def test_every_kind_of_file_streams_packs_and_resumes(tmp_path, collate, kind):
    path = row_files.write_all(tmp_path)[kind]
    options = {"packs_per_step": 1, "num_epochs": 2, "window": 5}
    straight = list(file_loader(path, collate, **options))
    wanted = Counter(f"{kind}:{row}" for row in range(1, row_files.NUM_ROWS + 1))
    assert len(straight) > 3
    for epoch in range(2):
        assert Counter(names_of([step for step in straight if step.epoch == epoch])) == wanted
    for stop, workers in ((0, 0), (1, 1), (2, 0)):
        again = file_loader(path, collate, num_workers=workers, **options)
        again.load_state_dict(json.loads(json.dumps(straight[stop].state)))
        rest = list(again)
        assert contents_of(rest) == contents_of(straight[stop + 1 :])
        assert_same_packs(rest, straight[stop + 1 :])


MEMORY = """
import json, resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.rows.sample import Message, Sample, TextPart
from qwen3vl_train.data.packing.index import LengthRule
from qwen3vl_train.data.packing.loader import Loader
from qwen3vl_train.data.packing.mixture import InOrder, Part
from qwen3vl_train.data.packing.plan import PackLimits
from qwen3vl_train.data.packing.stream import StreamedWindows
from qwen3vl_train.data.sources import StreamRow

class Endless:
    name = "endless"
    def rows(self, state=None):
        number = state["row"] if state else 0
        while True:
            number += 1
            text = "word " * (number % 40)
            turns = (Message("user", (TextPart(text),)), Message("assistant", (TextPart(f"answer {number}"),), 1.0))
            yield StreamRow({"row": number}, Sample(turns, sample_id=f"endless:{number}"), number, self.name)
    def fingerprint(self):
        return {}

collate = MultimodalCollator.from_pretrained(sys.argv[1])
windows = StreamedWindows([Part(InOrder(Endless()), 1.0)], collate, LengthRule(2048), seed=0)
steps = Loader(windows, collate, packs_per_step=8, limits=PackLimits(2048), num_steps=10**9)
marks, seen = [int(word) for word in sys.argv[2:]], []
for step in steps:
    if step.num_seen >= marks[len(seen)]:
        rss = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        seen.append(rss / 2**20)
        if len(seen) == len(marks):
            break
print(json.dumps(seen))
"""


@pytest.mark.measures
def test_memory_does_not_grow_with_the_stream(tiny_folder):
    """The length of the real show, a million rows, is in benchmarks/data.py; here are five windows against twenty."""
    command = [sys.executable, "-c", MEMORY, str(tiny_folder), "4096", "10240", "40960"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    warm, early, late = json.loads(result.stdout)
    assert late - early < 8, (warm, early, late)  # MiB; 30,000 such samples would be over 50
