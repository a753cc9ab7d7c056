"""The same steps whatever the workers and ranks; exact resume; broken pixels, dead workers, changed data."""

import json
import multiprocessing
import os
import signal
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.packing.index import LengthRule, build_index
from qwen3vl_train.data.packing.loader import TrainLoader, eval_packs
from qwen3vl_train.data.packing.plan import PackLimits, random_stream, share
from qwen3vl_train.data.sources import JsonlSource
from tests.helpers import oracles

MAX_TOKENS = 160
LIMITS = PackLimits(MAX_TOKENS)


@pytest.fixture(scope="module")
def collator(tiny_folder):
    return MultimodalCollator.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two files: 37 rows with one image, two or none, of uneven lengths, and 10 rows of text."""
    folder = tmp_path_factory.mktemp("rows")
    images = {name: image for name, image in oracles.sample_images().items() if max(image.size) <= 200}
    for name, image in images.items():
        image.save(folder / f"{name}.png")
    random = random_stream(0)
    rows = []
    for number in range(37):
        names = random.choice(sorted(images), random.randint(0, 3)).tolist()
        content = [{"type": "image", "image": f"{name}.png"} for name in names]
        content.append({"type": "text", "text": f"row {number} " + "word " * random.randint(0, 20)})
        rows.append([{"role": "user", "content": content}, {"role": "assistant", "content": f"answer {number}"}])
    texts = [[{"role": "user", "content": f"t{n}"}, {"role": "assistant", "content": f"u{n}"}] for n in range(10)]
    for name, messages in (("a.jsonl", rows), ("b.jsonl", texts)):
        (folder / name).write_text("".join(json.dumps({"messages": m}) + "\n" for m in messages))
    return folder


@pytest.fixture(scope="module")
def source(folder):
    return JsonlSource(folder / "a.jsonl", folder)


@pytest.fixture(scope="module")
def index(source, collator):
    return build_index([source], collator, LengthRule(MAX_TOKENS))


def loader(source, collator, index, **changes):
    options = {"packs_per_step": 3, "limits": LIMITS, "seed": 5, "num_epochs": 2, **changes}
    return TrainLoader([(source, 1.0)], collator, index, **options)


def ids_of(steps):
    return [
        (step.epoch, step.num_packs, step.pack_numbers, [pack.sample_ids for pack in step.packs], step.state)
        for step in steps
    ]


def test_every_row_once_an_epoch_in_another_order(source, collator, index):
    train = loader(source, collator, index)
    steps = list(train)
    assert len(steps) == train.num_steps
    seen = []
    for epoch in range(2):
        packs = [pack for step in steps if step.epoch == epoch for pack in step.packs]
        assert all(pack.num_tokens <= MAX_TOKENS for pack in packs)
        seen.append([name for pack in packs for name in pack.sample_ids])
        assert Counter(seen[-1]) == Counter(f"a.jsonl:{line}" for line in range(1, 38))
    assert seen[0] != seen[1]
    assert all(step.num_packs == len(step.packs) == 3 for step in steps if step.num_packs == 3)
    assert ids_of(loader(source, collator, index, seed=6)) != ids_of(steps)


@pytest.mark.process
def test_workers_change_nothing(source, collator, index):
    alone, workers = (list(loader(source, collator, index, num_workers=n)) for n in (0, 2))
    assert ids_of(alone) == ids_of(workers)
    for one, other in zip(alone, workers, strict=True):
        for pack, same in zip(one.packs, other.packs, strict=True):
            for field in ("input_ids", "labels", "positions", "pixel_values", "grid_thw", "visual_pos_mask"):
                assert torch.equal(getattr(pack, field), getattr(same, field))
            assert pack.vision_slices_per_seq == same.vision_slices_per_seq


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_out_the_same_steps(source, collator, index, world_size):
    whole = list(loader(source, collator, index))
    ranks = [list(loader(source, collator, index, rank=rank, world_size=world_size)) for rank in range(world_size)]
    for step, *parts in zip(whole, *ranks, strict=True):
        union = {n: pack.sample_ids for part in parts for n, pack in zip(part.pack_numbers, part.packs, strict=True)}
        assert union == dict(enumerate(pack.sample_ids for pack in step.packs))
        assert sum(len(part.packs) for part in parts) == step.num_packs
        counts = [len(part.packs) for part in parts]
        assert max(counts) - min(counts) <= 1
        assert {json.dumps(part.state) for part in parts} == {json.dumps(step.state)}


def test_ranks_get_packs_of_even_cost(source, collator, index):
    options = {"packs_per_step": 12, "num_epochs": 1, "world_size": 3}
    train = loader(source, collator, index, **options)
    work = [int(train.work[pack].sum()) for pack in train.epoch_packs(0)[:12]]
    for rank in range(3):
        step = next(iter(loader(source, collator, index, rank=rank, **options)))
        assert step.pack_numbers == share(work, 3)[rank]


@pytest.mark.parametrize("stop", [0, 1, 4, -1])
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact_in_any_epoch_and_for_other_ranks(source, collator, index, stop, workers):
    straight = list(loader(source, collator, index))
    boundary = next(n for n, step in enumerate(straight) if step.epoch == 1) - 1
    stop = boundary if stop == -1 else stop
    state = json.loads(json.dumps(straight[stop].state))
    again = loader(source, collator, index, num_workers=workers)
    again.load_state_dict(state)
    assert again.num_steps == len(straight)
    assert ids_of(again) == ids_of(straight[stop + 1 :])
    for rank in range(2):
        other = loader(source, collator, index, rank=rank, world_size=2)
        other.load_state_dict(state)
        wanted = list(loader(source, collator, index, rank=rank, world_size=2))[stop + 1 :]
        assert ids_of(other) == ids_of(wanted)


def test_state_before_and_after_the_run(source, collator, index):
    train = loader(source, collator, index)
    first = train.state()
    steps = list(train)
    assert list(train) == []
    assert train.state() == steps[-1].state
    train.load_state_dict(first)
    assert ids_of(train) == ids_of(steps)


def test_num_steps_runs_through_as_many_epochs_as_it_takes(source, collator, index):
    train = loader(source, collator, index, num_epochs=None, num_steps=11)
    steps = list(train)
    assert len(steps) == train.num_steps == 11
    of_epochs = list(islice(loader(source, collator, index, num_epochs=9), 8))
    # But for the lengths of the epochs: of a run that does not end with one they are not known, nor asked for.
    assert [told[:-1] for told in ids_of(steps)[:8]] == [told[:-1] for told in ids_of(of_epochs)]
    assert [step.mark for step in steps[:8]] == [step.mark for step in of_epochs]
    train = loader(source, collator, index, num_epochs=None, num_steps=11)
    train.load_state_dict(steps[6].state)
    assert ids_of(train) == ids_of(steps[7:])


def test_a_short_last_step_leaves_some_ranks_without_packs(source, collator, index):
    total = len(loader(source, collator, index).epoch_packs(0))
    steps = [
        list(loader(source, collator, index, rank=rank, world_size=8, packs_per_step=total - 1, num_epochs=1))
        for rank in range(8)
    ]
    assert [rank[0].num_packs for rank in steps] == [total - 1] * 8
    assert [rank[1].num_packs for rank in steps] == [1] * 8
    assert sorted(len(rank[1].packs) for rank in steps) == [0] * 7 + [1]


def test_weights_repeat_and_thin_out_sources(folder, source, collator):
    texts = JsonlSource(folder / "b.jsonl", folder)
    index = build_index([source, texts], collator, LengthRule(MAX_TOKENS))
    train = TrainLoader(
        [(source, 0.5), (texts, 2.3)], collator, index, packs_per_step=4, limits=LIMITS, seed=0,
        num_epochs=3,
    )  # fmt: skip
    drawn = []
    for epoch in range(3):
        counts = Counter(row for pack in train.epoch_packs(epoch) for row in pack)
        first = {row for row in counts if row < 37}
        assert len(first) == round(0.5 * 37)
        assert all(counts[row] == 1 for row in first)
        assert Counter(counts[row] for row in range(37, 47)) == {2: 7, 3: 3}
        drawn.append(first)
    assert drawn[0] != drawn[1]


def copy_with_broken_image(folder, tmp_path, lines):
    """Copy the rows; the images of some lines become files of their own, to be broken after the index is built."""
    rows = (folder / "a.jsonl").read_text().splitlines()
    for line in lines:
        row = json.loads(rows[line - 1])
        (tmp_path / f"own{line}.png").write_bytes((folder / "wide.png").read_bytes())
        row["messages"][0]["content"] = [{"type": "image", "image": f"own{line}.png"}]
        rows[line - 1] = json.dumps(row)
    for image in folder.glob("*.png"):
        (tmp_path / image.name).write_bytes(image.read_bytes())
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    return JsonlSource(tmp_path / "a.jsonl", tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_break_or_change_are_left_out_and_reported(folder, tmp_path, collator, workers):
    source = copy_with_broken_image(folder, tmp_path, [3, 8, 9])
    data = (tmp_path / "own3.png").read_bytes()
    (tmp_path / "own3.png").write_bytes(data[: len(data) // 2])  # its header is whole
    index = build_index([source], collator, LengthRule(MAX_TOKENS))
    (tmp_path / "own8.png").write_bytes((tmp_path / "exact.png").read_bytes())
    os.utime(tmp_path / "own9.png", ns=(7, 7))
    steps = list(loader(source, collator, index, num_epochs=1, num_workers=workers))
    names = Counter(name for step in steps for pack in step.packs for name in pack.sample_ids)
    assert names == Counter(f"a.jsonl:{line}" for line in range(1, 38) if line not in (3, 8, 9))
    rejected = sorted(reject for step in steps for reject in step.rejected)
    assert [(reject.file, reject.row) for reject in rejected] == [(str(tmp_path / "a.jsonl"), row) for row in (3, 8, 9)]
    assert rejected[0].reason.startswith("messages[0].content[0]: image own3.png: is truncated or damaged (")
    for reject in rejected[1:]:
        assert reject.reason == (
            f"size or time of {tmp_path}/own{reject.row}.png is not what it was when the row was indexed; the row is "
            "left out, start again to take it as it is now"
        )


def test_a_file_of_rows_that_changes_stops_giving_rows(folder, tmp_path, collator):
    source = copy_with_broken_image(folder, tmp_path, [])
    index = build_index([source], collator, LengthRule(MAX_TOKENS))
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("\n{}")
    step = next(iter(loader(source, collator, index)))
    assert step.packs == []
    assert {reject.reason.partition(" (")[0] for reject in step.rejected} == {
        f"{tmp_path}/a.jsonl changed since it was indexed"
    }


def test_a_pack_of_broken_rows_only_is_left_out(tmp_path, collator):
    for name, image in (("good", "exact"), ("bad", "exact")):
        oracles.sample_images()[image].save(tmp_path / f"{name}.png")
    asked = [{"role": "user", "content": [{"image": f"{name}.png"}]} for name in ("good", "bad")]
    rows = [{"messages": [question, {"role": "assistant", "content": "x"}]} for question in asked]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = JsonlSource(tmp_path / "a.jsonl", tmp_path)
    tokens = collator.cost(source.sample(0)).tokens
    data = (tmp_path / "bad.png").read_bytes()
    (tmp_path / "bad.png").write_bytes(data[: len(data) // 2])
    index = build_index([source], collator, LengthRule(tokens))
    steps = list(loader(source, collator, index, num_epochs=1, packs_per_step=2, limits=PackLimits(tokens)))
    (step,) = steps
    assert step.num_packs == 2
    assert [pack.sample_ids for pack in step.packs] == [("a.jsonl:1",)]
    assert len(step.pack_numbers) == len(step.rejected) == 1
    results = list(eval_packs(source, collator, index, limits=PackLimits(tokens)))
    assert [result.pack is None for result in results] == [False, True]
    assert [len(result.rejected) for result in results] == [0, 1]


def lose_a_worker(train, sender):
    """In a process of its own: torch raises out of a signal handler, which may strike again while pytest goes on."""
    try:
        for step in train:
            if step.state["steps_done"] == 1:
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        sender.send("went on")
    except (RuntimeError, EOFError, OSError):  # the last two when it dies while it hands a tensor over
        sender.send("raised")
    os._exit(0)


def test_a_killed_worker_raises(source, collator, index):
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    train = loader(source, collator, index, num_workers=2, num_epochs=200)
    process = context.Process(target=lose_a_worker, args=(train, sender))
    process.start()
    try:
        assert receiver.poll(60), "the loader hangs"
        assert receiver.recv() == "raised"
    finally:
        process.kill()
        process.join()


def test_resume_with_other_data_is_refused(folder, tmp_path, source, collator, index):
    state = next(iter(loader(source, collator, index))).state
    same = "put them back or start a new run"
    with pytest.raises(ValueError) as caught:
        loader(source, collator, index, seed=6, packs_per_step=2).load_state_dict(state)
    assert str(caught.value) == (
        "resume: seed (5 then, 6 now), packs_per_step (3 then, 2 now) changed since the checkpoint, so the run cannot "
        f"go on exactly; {same}"
    )
    changed = copy_with_broken_image(folder, tmp_path, [1])
    train = loader(changed, collator, build_index([changed], collator, LengthRule(MAX_TOKENS)))
    with pytest.raises(ValueError, match=f"^resume: the data files, the rows' token counts changed .* {same}$"):
        train.load_state_dict(state)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"packs_per_step": 0}, "train.packs_per_step: got 0; use at least 1"),
        ({"num_steps": 5}, "train: num_epochs is 2 and num_steps is 5; give one of them"),
        ({"num_epochs": None}, "train: num_epochs is None and num_steps is None; give one of them"),
        ({"num_epochs": 0}, "train: num_epochs is 0 and num_steps is None; use at least 1"),
    ],
)
def test_faults_of_settings(source, collator, index, changes, fault):
    with pytest.raises(ValueError) as caught:
        loader(source, collator, index, **changes)
    assert str(caught.value) == fault


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_faults_of_weights(source, collator, index, weight):
    with pytest.raises(ValueError) as caught:
        TrainLoader([(source, weight)], collator, index, packs_per_step=1, limits=PackLimits(99), seed=0, num_epochs=1)
    assert str(caught.value) == f"data.train: {source.name}: weight is {weight}; use a number above 0"


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_reads_the_file_in_order_and_shares_it_out(source, collator, index, workers):
    def names(rank, world_size):
        results = eval_packs(source, collator, index, limits=LIMITS, rank=rank, world_size=world_size,
                             num_workers=workers)  # fmt: skip
        return [result.pack.sample_ids for result in results]

    whole = names(0, 1)
    assert [name for pack in whole for name in pack] == [f"a.jsonl:{line}" for line in range(1, 38)]
    assert [names(rank, 2) for rank in range(2)] == [whole[0::2], whole[1::2]]


def test_every_limit_of_a_pack_holds_in_training_and_evaluation(source, collator, index):
    limits = PackLimits(MAX_TOKENS, patches=int(index.patches.max()) + 8, sequences=3)
    steps = loader(source, collator, index, limits=limits, num_epochs=1)
    packs = [pack for step in steps for pack in step.packs]
    packs += [result.pack for result in eval_packs(source, collator, index, limits=limits)]
    assert Counter(name for pack in packs for name in pack.sample_ids) == Counter(
        [f"a.jsonl:{line}" for line in range(1, 38)] * 2
    )
    for pack in packs:
        assert pack.num_tokens <= MAX_TOKENS
        assert pack.num_patches <= index.patches.max() + 8
        assert len(pack.sample_ids) <= 3


def test_shrunk_and_dropped_are_counted_in_the_steps_that_have_them(folder, source, tiny_folder):
    small = MultimodalCollator.from_pretrained(
        tiny_folder, max_visual_tokens_per_image=6, min_visual_tokens_per_image=1
    )
    index = build_index([source], small, LengthRule(60, too_long="drop"))
    assert index.num_shrunk.sum() > 0
    assert 0 < index.num_dropped < 37
    steps = list(loader(source, small, index, limits=PackLimits(60), num_epochs=1))
    assert {(step.num_seen, step.num_dropped) for step in steps} == {(37, index.num_dropped)}
    assert sum(step.num_shrunk for step in steps) == index.num_shrunk.sum()
    for step in steps:
        lines = [int(name.rpartition(":")[2]) for pack in step.packs for name in pack.sample_ids]
        assert step.num_shrunk == index.num_shrunk[np.array(lines) - 1].sum()
    assert sum(len(pack.sample_ids) for step in steps for pack in step.packs) == 37 - index.num_dropped


def test_steps_hold_packs_of_like_work(source, collator, index):
    train = loader(source, collator, index, packs_per_step=4, num_epochs=1)
    work = [int(train.work[pack].sum()) for pack in train.epoch_packs(0)]
    spread = [max(work[start : start + 4]) - min(work[start : start + 4]) for start in range(0, len(work) - 3, 4)]
    assert np.mean(spread) < 0.5 * (max(work) - min(work))
