"""Streams: every row once an epoch, the same steps whatever the workers and ranks, exact resume, flat memory."""

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import pytest

from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.packing.index import LengthRule
from qwen3vl_train.data.packing.mixture import InOrder, Part, Shuffled
from qwen3vl_train.data.packing.plan import PackLimits, random_stream
from qwen3vl_train.data.packing.stream import StreamLoader
from qwen3vl_train.data.rows.parse import RowRules
from qwen3vl_train.data.sources import JsonlSource
from qwen3vl_train.data.sources.streams import FileStream
from tests.helpers import oracles

LIMITS = PackLimits(160, patches=400, sequences=9)
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def collator(tiny_folder):
    return MultimodalCollator.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`s-0.jsonl`, `s-1.jsonl`: 60 and 31 rows for a stream, two of them faulty; `k.jsonl`: 20 rows of text."""
    folder = tmp_path_factory.mktemp("stream")
    images = {name: image for name, image in oracles.sample_images().items() if max(image.size) <= 100}
    for name, image in images.items():
        image.save(folder / f"{name}.png")
    random = random_stream(1)

    def row(name):
        chosen = random.choice(sorted(images), random.randint(0, 3)).tolist()
        content = [{"type": "image", "image": f"{image}.png"} for image in chosen]
        content.append({"type": "text", "text": f"{name} " + "word " * random.randint(0, 20)})
        return json.dumps({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]})

    for name, count in (("s-0", 60), ("s-1", 31), ("k", 20)):
        rows = [row(f"{name}.{number}") for number in range(count)]
        if name == "s-0":
            rows[7], rows[40] = "{", json.dumps({"messages": [{"role": "user", "content": "a"}]})
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def parts(folder, weight=1.0):
    files = [str(folder / "s-0.jsonl"), str(folder / "s-1.jsonl")]
    stream = InOrder(FileStream("s", files, str(folder), RowRules()))
    return [Part(stream, weight), Part(Shuffled(JsonlSource(folder / "k.jsonl", folder)), 1.0)]


def loader(folder, collator, **changes):
    options = {"packs_per_step": 4, "limits": LIMITS, "seed": 5, "num_epochs": 2, "window": 32, **changes}
    return StreamLoader(parts(folder), collator, LengthRule(160), **options)


def told(steps):
    return [
        (step.epoch, step.num_packs, step.pack_numbers, [pack.sample_ids for pack in step.packs], step.state,
         step.num_seen)
        for step in steps
    ]  # fmt: skip


@pytest.fixture(scope="module")
def straight(folder, collator):
    return told(loader(folder, collator))


EVERY_ROW = Counter(
    [f"s-0.jsonl:{row}" for row in range(1, 61) if row not in (8, 41)]
    + [f"s-1.jsonl:{row}" for row in range(1, 32)]
    + [f"k.jsonl:{row}" for row in range(1, 21)]
)


def names(steps, epoch):
    return Counter(name for step in steps if step[0] == epoch for pack in step[3] for name in pack)


def test_every_row_once_an_epoch_and_only_the_last_step_of_it_is_short(straight):
    assert names(straight, 0) == names(straight, 1) == EVERY_ROW
    for epoch in (0, 1):
        sizes = [step[1] for step in straight if step[0] == epoch]
        assert set(sizes[:-1]) == {4}
        assert 1 <= sizes[-1] <= 4
    assert [step[3] for step in straight if step[0] == 0] != [step[3] for step in straight if step[0] == 1]
    assert [step[5] for step in straight][-1] == 2 * (60 + 31 + 20)


def test_packs_keep_every_limit_and_are_filled(folder, collator):
    steps = list(loader(folder, collator, num_epochs=1))
    packs = [pack for step in steps for pack in step.packs]
    for pack in packs:
        assert pack.num_tokens <= 160
        assert pack.num_patches <= 400
        assert len(pack.sample_ids) <= 9
    assert steps[0].state["fingerprint"] == steps[-1].state["fingerprint"]


def test_workers_change_nothing(folder, collator, straight):
    assert told(loader(folder, collator, num_workers=2)) == straight


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_share_out_the_same_steps_and_none_waits_for_ever(folder, collator, straight, world_size):
    ranks = [told(loader(folder, collator, rank=rank, world_size=world_size)) for rank in range(world_size)]
    for step, *of_ranks in zip(straight, *ranks, strict=True):
        union = {number: pack for part in of_ranks for number, pack in zip(part[2], part[3], strict=True)}
        assert [union[number] for number in range(step[1])] == step[3]
        assert all(part[4] == step[4] for part in of_ranks)
        counts = [len(part[3]) for part in of_ranks]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact_behind_every_step_also_on_other_ranks(folder, collator, straight, workers):
    last_of_epoch = max(place for place, step in enumerate(straight) if step[0] == 0)
    stops = {0, 3, last_of_epoch - 1, last_of_epoch, last_of_epoch + 1, len(straight) - 1} if not workers else {2}
    for stop in stops:
        state = json.loads(json.dumps(straight[stop][4]))
        again = loader(folder, collator, num_workers=workers)
        again.load_state_dict(state)
        assert again.num_seen == straight[stop][5]
        assert told(again) == straight[stop + 1 :]
        epoch = straight[stop][0]
        seen: Counter = Counter()
        for rank in range(3):
            other = loader(folder, collator, rank=rank, world_size=3)
            other.load_state_dict(state)
            seen += names(told(other), epoch)
        assert names(straight[: stop + 1], epoch) + seen == EVERY_ROW


def test_a_run_of_steps_goes_through_as_many_epochs_as_it_takes(folder, collator, straight):
    train = loader(folder, collator, num_epochs=None, num_steps=len(straight) - 1)
    assert train.num_steps == len(straight) - 1
    assert told(train) == straight[:-1]
    assert list(train) == []
    assert loader(folder, collator).num_steps is None


def test_rows_that_cannot_be_used_are_told_once_by_rank_0(folder, collator):
    def rejects(rank, state=None, **options):
        train = loader(folder, collator, rank=rank, world_size=2, num_epochs=1, **options)
        if state:
            train.load_state_dict(state)
        return [(reject.file, reject.row) for step in train for reject in step.rejected]

    wanted = [(f"{folder}/s-0.jsonl", 8), (f"{folder}/s-0.jsonl", 41)]
    assert rejects(0) == wanted
    assert rejects(1) == []
    steps = list(loader(folder, collator, num_epochs=1))
    for step, behind in pairwise(steps):
        before = sum(len(other.rejected) for other in steps if other.num_seen <= step.num_seen)
        if behind.num_seen > step.num_seen:
            assert rejects(0, step.state) == wanted[before:]


def test_what_changes_between_reading_and_building_is_left_out(folder, collator, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    steps = iter(loader(tmp_path, collator, num_epochs=1, window=111))
    next(steps)
    for image in tmp_path.glob("*.png"):
        os.utime(image, ns=(7, 7))
    rest = list(steps)
    kept = [name for step in rest for pack in step.packs for name in pack.sample_ids]
    reasons = [reject.reason for step in rest for reject in step.rejected if "size or time" in reject.reason]
    assert kept
    assert reasons
    assert reasons[0].endswith("is not what it was when the row was read; the row is left out, start again to take it "
                               "as it is now")  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_whose_file_changes_stops_the_run(folder, collator, tmp_path, workers):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    changing = loader(tmp_path, collator, window=8, num_workers=workers)
    steps = iter(changing)
    next(steps)
    with (tmp_path / "s-1.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(
        ValueError, match=r"s-1.jsonl changed since it was opened \([0-9]+ bytes then, [0-9]+ now\); put"
    ):
        list(steps)
    state = changing.state()
    with pytest.raises(ValueError, match=r"^resume: the data files changed since the checkpoint"):
        loader(tmp_path, collator, window=8).load_state_dict(state)


def test_dropped_and_shrunk_are_counted(folder, tiny_folder):
    few = {"max_visual_tokens_per_image": 2, "min_visual_tokens_per_image": 1}
    collator = MultimodalCollator.from_pretrained(tiny_folder, **few)
    rule = LengthRule(40, too_long="drop")
    options = {"packs_per_step": 2, "limits": PackLimits(40), "seed": 0, "num_epochs": 1, "window": 32}
    steps = list(StreamLoader(parts(folder), collator, rule, **options))
    kept = sum(len(pack.sample_ids) for step in steps for pack in step.packs)
    assert steps[-1].num_dropped == sum(EVERY_ROW.values()) - kept > 0
    assert sum(step.num_shrunk for step in steps) > 0


def test_a_stream_with_nothing_to_learn_from_ends_with_an_error(tmp_path, collator):
    file = tmp_path / "a.jsonl"
    file.write_text("{\n" * 70)
    stream = Part(InOrder(FileStream(str(file), [str(file)], None, RowRules())), 1.0)
    for workers in (0, 1):
        options = {"packs_per_step": 1, "limits": LIMITS, "seed": 0, "num_steps": 5, "window": 32}
        train = StreamLoader([stream], collator, LengthRule(160), num_workers=workers, **options)
        with pytest.raises(ValueError, match=f"^{file}: nothing to learn from, none of 70 rows can be used; mend the"):
            list(train)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_that_breaks_off_says_where(tmp_path, collator, workers):
    import gzip

    row = json.dumps({"messages": [{"role": "user", "content": "q" * 99}, {"role": "assistant", "content": "x"}]})
    whole = gzip.compress((row + "\n").encode() * 10_000, compresslevel=0)
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(whole[: len(whole) - 100])
    stream = Part(InOrder(FileStream(str(file), [str(file)], None, RowRules())), 1.0)
    options = {"packs_per_step": 8, "limits": PackLimits(2048), "seed": 0, "num_steps": 5000, "window": 256}
    train = StreamLoader([stream], collator, LengthRule(160), num_workers=workers, **options)
    with pytest.raises(ValueError, match=f"^{file}: is truncated or damaged after row [0-9]+ .*; copy the file agai"):
        list(train)
    assert train.num_seen >= 256


def test_resume_with_other_settings_is_refused(folder, collator, straight):
    train = loader(folder, collator, seed=6, window=33)
    with pytest.raises(ValueError) as caught:
        train.load_state_dict(straight[0][4])
    assert str(caught.value) == (
        "resume: seed (5 then, 6 now), window (32 then, 33 now) changed since the checkpoint, so the run cannot go on "
        "exactly; put them back or start a new run"
    )


MEMORY = """
import json, resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.rows.sample import Message, Sample, TextPart
from qwen3vl_train.data.packing.index import LengthRule
from qwen3vl_train.data.packing.mixture import InOrder, Part
from qwen3vl_train.data.packing.plan import PackLimits
from qwen3vl_train.data.sources import StreamRow
from qwen3vl_train.data.packing.stream import StreamLoader

class Endless:
    name = "endless"
    def rows(self, state=None):
        number = state["row"] if state else 0
        while True:
            number += 1
            text = "word " * (number % 40)
            told = (Message("user", (TextPart(text),)), Message("assistant", (TextPart(f"answer {number}"),), 1.0))
            yield StreamRow({"row": number}, Sample(told, sample_id=f"endless:{number}"), number, self.name)
    def fingerprint(self):
        return {}

collate = MultimodalCollator.from_pretrained(sys.argv[1])
steps = StreamLoader([Part(InOrder(Endless()), 1.0)], collate, LengthRule(2048), packs_per_step=8,
                     limits=PackLimits(2048), seed=0, num_steps=10**9)
marks, seen = [int(word) for word in sys.argv[2:]], []
for step in steps:
    if step.num_seen >= marks[len(seen)]:
        rss = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        seen.append(rss / 2**20)
        if len(seen) == len(marks):
            break
print(json.dumps(seen))
"""


def test_memory_does_not_grow_with_the_stream(tiny_folder):
    """The length of the real show, a million rows, is in benchmarks/data.py; here are five windows against twenty."""
    command = [sys.executable, "-c", MEMORY, str(tiny_folder), "4096", "10240", "40960"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    warm, early, late = json.loads(result.stdout)
    assert late - early < 8, (warm, early, late)  # MiB; 30,000 such samples would be over 50


def test_weights_out_of_range(folder, collator):
    with pytest.raises(ValueError) as caught:
        StreamLoader(
            parts(folder, weight=0.0), collator, LengthRule(160), packs_per_step=1, limits=LIMITS, seed=0, num_steps=1
        )
    assert str(caught.value) == "data.train: s: weight is 0.0; use a number above 0"


def test_a_loader_that_is_left_early_leaves_no_process_behind(folder, collator):
    import multiprocessing

    others = set(multiprocessing.active_children())
    steps = iter(loader(folder, collator, num_workers=2))
    list(islice(steps, 2))
    workers = set(multiprocessing.active_children()) - others
    assert workers
    steps.close()
    del steps
    for worker in workers:
        worker.join(20)
    assert not workers & set(multiprocessing.active_children())
