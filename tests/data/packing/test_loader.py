"""The loader over both producers: the same steps whatever the workers and ranks, exact resume, broken rows."""

import json
import multiprocessing
import os
import shutil
import signal
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.packing.index import LengthRule, build_index
from qwen3vl_train.data.packing.loader import Loader
from qwen3vl_train.data.packing.packs import eval_packs
from qwen3vl_train.data.packing.plan import PackLimits, share
from qwen3vl_train.data.packing.windows import IndexedWindows
from qwen3vl_train.data.sources import JsonlSource
from tests.helpers import faults, loaders
from tests.helpers.loaders import EVERY_ROW, NUM_ROWS, assert_same_packs, contents_of, make_loader, names_of, plan_of
from tests.helpers.messages import message_of
from tests.helpers.small_runs import row, write_rows

LIMITS = PackLimits(loaders.MAX_TOKENS)


@pytest.fixture(scope="module")
def index(folder, collate):
    return build_index(loaders.sources_of(folder), collate, loaders.RULE)


@pytest.fixture(scope="module")
def make(folder, collate, index):
    """A function: kind of producer, and options of `make_loader` -> a loader of the undamaged rows."""
    return lambda kind, *weights, **changes: make_loader(kind, folder, collate, *weights, index=index, **changes)


@pytest.fixture(scope="module", params=loaders.KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def straight(make, kind):
    """The steps of an undisturbed run on one rank."""
    return list(make(kind))


def saved(state):
    return json.loads(json.dumps(state))


def test_every_row_comes_once_an_epoch(make, kind, straight):
    train = make(kind)
    assert train.num_steps == (len(straight) if kind == "indexed" else None)
    for epoch in (0, 1):
        steps = [step for step in straight if step.epoch == epoch]
        assert Counter(names_of(steps)) == EVERY_ROW
        *sizes, last = [step.num_packs for step in steps]
        assert set(sizes) == {5}
        assert 1 <= last <= 5
    assert len({tuple(names_of(step for step in straight if step.epoch == epoch)) for epoch in (0, 1)}) == 2
    assert names_of(make(kind, seed=6)) != names_of(straight)
    num_rows = sum(NUM_ROWS.values())
    assert straight[-1].num_seen == (num_rows if kind == "indexed" else 2 * num_rows)


@pytest.mark.process
def test_workers_change_nothing(make, kind, straight):
    steps = list(make(kind, num_workers=2))
    assert contents_of(steps) == contents_of(straight)
    assert_same_packs(steps, straight)


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_share_out_the_same_steps(make, kind, straight, world_size):
    ranks = [list(make(kind, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert all(plan_of(steps) == plan_of(straight) for steps in ranks)
    for step, *parts in zip(straight, *ranks, strict=True):
        union = {n: pack.sample_ids for part in parts for n, pack in zip(part.pack_numbers, part.packs, strict=True)}
        assert union == dict(enumerate(pack.sample_ids for pack in step.packs))
        counts = [len(part.packs) for part in parts]
        assert max(counts) - min(counts) <= 1
        (balance,) = {part.balance for part in parts}
        # The work of a pack follows its rows, text and pictures: by the tokens it has, near enough.
        loads = np.array([sum(pack.num_tokens for pack in part.packs) for part in parts])
        assert balance == pytest.approx(loads.max() / loads.mean(), rel=0.25)
    assert {step.balance for step in straight} == {1.0}


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact_in_any_epoch_and_on_other_ranks(make, kind, straight, workers):
    last = max(number for number, step in enumerate(straight) if step.epoch == 0)
    for stop in {0, 3, last - 1, last, last + 1, len(straight) - 1} if not workers else {2}:
        state = saved(straight[stop].state)
        again = make(kind, num_workers=workers)
        again.load_state_dict(state)
        assert again.num_seen == straight[stop].num_seen
        steps = list(again)
        assert contents_of(steps) == contents_of(straight[stop + 1 :])
        assert_same_packs(steps, straight[stop + 1 :])
        seen = names_of(straight[: stop + 1])
        for rank in range(3):
            other = make(kind, rank=rank, world_size=3)
            other.load_state_dict(state)
            steps = list(other)
            assert plan_of(steps) == plan_of(straight[stop + 1 :])
            seen += names_of(steps)
        assert Counter(seen) == EVERY_ROW + EVERY_ROW


@pytest.mark.process
def test_weighted_epoch_survives_changes_of_ranks(make, kind):
    straight = list(make(kind, (1.0, 2.5)))
    epoch = [step for step in straight if step.epoch == 0]
    counts = Counter(names_of(epoch))
    assert {counts[f"s.jsonl:{number}"] for number in range(1, 71)} == {1}
    assert {counts[f"k.jsonl:{number}"] for number in range(1, 13)} == {2, 3}
    seen: Counter[str] = Counter()
    state = None
    for world_size, num_steps, workers in ((1, 2, 0), (4, 2, 2), (2, len(epoch) - 4, 0)):
        for rank in range(world_size):
            train = make(kind, (1.0, 2.5), rank=rank, world_size=world_size, num_workers=workers)
            if state is not None:
                train.load_state_dict(saved(state))
            steps = list(islice(train, num_steps))
            seen += Counter(names_of(steps))
        state = steps[-1].state
    assert seen == counts
    train = make(kind, (1.0, 2.5))
    train.load_state_dict(saved(state))
    assert contents_of(islice(train, 1)) == contents_of([straight[len(epoch)]])


def test_state_before_and_after_the_run(make, kind, straight):
    train = make(kind)
    first = train.state()
    assert contents_of(train) == contents_of(straight)
    assert list(train) == []
    assert train.state() == straight[-1].state
    train.load_state_dict(first)
    assert contents_of(train) == contents_of(straight)


def test_num_steps_runs_through_as_many_epochs_as_it_takes(make, kind, straight):
    train = make(kind, num_epochs=None, num_steps=len(straight) - 1)
    assert train.num_steps == len(straight) - 1
    steps = list(train)
    assert names_of(steps) == names_of(straight[:-1])
    assert [step.plan_hash for step in steps] == [step.plan_hash for step in straight[:-1]]
    assert list(train) == []
    train = make(kind, num_epochs=None, num_steps=len(straight) - 1)
    train.load_state_dict(steps[6].state)
    assert contents_of(train) == contents_of(steps[7:])


def test_short_last_step_leaves_some_ranks_without_packs(make, kind):
    total = sum(step.num_packs for step in make(kind, num_epochs=1, window=200))
    options = {"packs_per_step": total - 1, "num_epochs": 1, "window": 200, "world_size": total}
    steps = [list(make(kind, rank=rank, **options)) for rank in range(total)]
    assert [[step.num_packs for step in rank] for rank in steps] == [[total - 1, 1]] * total
    assert sorted(len(rank[1].packs) for rank in steps) == [0] * (total - 1) + [1]
    assert steps[0][1].balance == total


def test_limits_of_a_pack_hold_in_training_and_evaluation(make, kind, folder, collate, index):
    limits = PackLimits(loaders.MAX_TOKENS, patches=int(index.patches.max()) + 8, sequences=3)
    packs = [pack for step in make(kind, limits=limits, num_epochs=1) for pack in step.packs]
    source = loaders.sources_of(folder)[0]
    own = build_index([source], collate, loaders.RULE)
    packs += [result.pack for result in eval_packs(source, collate, own, limits=limits)]
    names = Counter(name for pack in packs for name in pack.sample_ids)
    assert names == EVERY_ROW + Counter(name for name in EVERY_ROW if name[0] == "s")
    for pack in packs:
        assert pack.num_tokens <= loaders.MAX_TOKENS
        assert pack.num_patches <= index.patches.max() + 8
        assert len(pack.sample_ids) <= 3


def test_shrunk_and_dropped_media_are_counted(folder, kind, tiny_folder):
    few = {"max_visual_tokens_per_image": 1, "min_visual_tokens_per_image": 1}
    small = MultimodalCollator.from_pretrained(tiny_folder, **few)
    rule = LengthRule(50, too_long="drop")
    index = build_index(loaders.sources_of(folder), small, rule)
    steps = list(make_loader(kind, folder, small, rule=rule, num_epochs=1))
    assert (steps[-1].num_seen, steps[-1].num_dropped) == (index.num_rows, index.num_dropped)
    assert sum(step.num_shrunk for step in steps) == index.num_shrunk.sum() > 0
    assert len(names_of(steps)) == index.num_usable == index.num_rows - index.num_dropped
    assert 0 < index.num_usable < index.num_rows
    for step in steps:
        lines = [int(name.rpartition(":")[2]) for name in names_of([step]) if name[0] == "s"]
        assert step.num_shrunk == index.num_shrunk[np.array(lines, dtype=int) - 1].sum()


@pytest.mark.parametrize("workers", [0, 2])
def test_media_that_break_or_change_are_rejected(copy, collate, kind, workers):
    data = (copy / "2.png").read_bytes()
    (copy / "2.png").write_bytes(data[: len(data) // 2])  # its header is valid
    steps = iter(make_loader(kind, copy, collate, num_epochs=1, num_workers=workers, window=200))
    done = list(islice(steps, 1 if kind == "streamed" else 0))  # by now all rows are scanned
    os.utime(copy / "9.png", ns=(7, 7))
    (copy / "3.png").write_bytes((copy / "4.png").read_bytes())
    done += steps
    rejected = {reject.row: reject for step in done for reject in step.rejected}
    lost = Counter(f"s.jsonl:{number}" for number in rejected)
    assert Counter(names_of(done)) == EVERY_ROW - lost
    assert 3 in rejected
    assert set(rejected) <= {3, 4, 10}
    assert rejected[3].reason.startswith("messages[0].content[0]: image 2.png: is truncated or damaged (")
    changed = [reject for number, reject in rejected.items() if number != 3]
    assert changed or (kind == "streamed" and workers)  # workers may have built these rows before they changed
    for reject in changed:
        assert (reject.file, reject.kind) == (str(copy / "s.jsonl"), "changed")
        assert reject.reason == (
            f"size or time of {copy}/{reject.row - 1}.png is not what it was when the row was scanned; the row is "
            "skipped, start again to train on it as it is now"
        )


def test_changed_file_of_rows_gives_no_more_rows(copy, collate):
    train = make_loader("indexed", copy, collate)
    for name in NUM_ROWS:
        with (copy / name).open("a") as file:
            file.write("\n{}")
    step = next(iter(train))
    assert step.packs == []
    reasons = {reject.reason.partition(" (")[0].rpartition("/")[2] for reject in step.rejected}
    assert reasons <= {f"{name} changed since it was indexed" for name in NUM_ROWS}
    assert reasons


def test_pack_of_broken_rows_is_skipped(copy, collate):
    write_rows(copy / "two.jsonl", [row("a", "x", ["3.png"]), row("a", "x", ["4.png"])])
    shutil.copy(copy / "3.png", copy / "4.png")
    source = JsonlSource(copy / "two.jsonl", copy)
    tokens = collate.cost(source.sample(0)).tokens
    data = (copy / "4.png").read_bytes()
    (copy / "4.png").write_bytes(data[: len(data) // 2])
    index = build_index([source], collate, LengthRule(tokens))
    options = {"packs_per_step": 2, "limits": PackLimits(tokens), "num_epochs": 1}
    (step,) = Loader(IndexedWindows([(source, 1.0)], index, seed=0), collate, **options)
    assert step.num_packs == 2
    assert [pack.sample_ids for pack in step.packs] == [("two.jsonl:1",)]
    assert len(step.pack_numbers) == len(step.rejected) == 1
    results = list(eval_packs(source, collate, index, limits=PackLimits(tokens)))
    assert [result.pack is None for result in results] == [False, True]
    assert [len(result.rejected) for result in results] == [0, 1]


def lose_a_worker(train, sender):
    """In a process of its own: torch raises out of a signal handler, which may raise again later, within pytest."""
    try:
        for step in train:
            if step.state["steps_done"] == 1:
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        sender.send("continued")
    except (RuntimeError, EOFError, OSError):  # the last two when it dies while it hands a tensor over
        sender.send("raised")
    os._exit(0)


@pytest.mark.process
def test_killed_worker_raises(make, kind):
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    train = make(kind, num_workers=2, num_epochs=None, num_steps=3000)
    process = context.Process(target=lose_a_worker, args=(train, sender))
    process.start()
    try:
        assert receiver.poll(60), "the loader hangs"
        assert receiver.recv() == "raised"
    finally:
        process.kill()
        process.join()


def test_resume_with_other_settings_or_data_is_refused(make, kind, straight, copy, collate):
    fix = "put them back or start a new run"
    other = make(kind, seed=6, window=33, packs_per_step=2)
    assert message_of(ValueError, other.load_state_dict, straight[0].state) == (
        "resume: seed (5 then, 6 now), window (32 then, 33 now), packs_per_step (5 then, 2 now) changed since the "
        f"checkpoint, so the run cannot continue exactly; {fix}"
    )
    with (copy / "s.jsonl").open("a") as file:
        file.write(json.dumps(row("one", "more")) + "\n")
    what = "the data files, the rows' token counts" if kind == "indexed" else "the data files"
    with pytest.raises(ValueError, match=f"^resume: {what} changed .* {fix}$"):
        make_loader(kind, copy, collate).load_state_dict(straight[0].state)


def test_state_of_an_earlier_version_is_refused(make, kind):
    state = {"epoch": 0, "step_in_epoch": 3, "steps_done": 3, "epoch_lengths": [9], "fingerprint": {}}
    assert message_of(ValueError, make(kind).load_state_dict, state) == (
        "resume: the position in the data has no cursor, carry_over, taken, num_seen, num_dropped, skipped, "
        "content_hash: the checkpoint is of an earlier version of qwen3vl_train; continue with that version, or start "
        "a new run"
    )


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"packs_per_step": 0}, "train.packs_per_step: got 0; use at least 1"),
        ({"num_steps": 5}, "train: num_epochs is 2 and num_steps is 5; give one of them"),
        ({"num_epochs": None}, "train: num_epochs is None and num_steps is None; give one of them"),
        ({"num_epochs": 0}, "train: num_epochs is 0 and num_steps is None; use at least 1"),
        ({"weights": (1.0, 0.0)}, "weight is 0.0; use a number above 0"),
        ({"weights": (1.0, -1.0)}, "weight is -1.0; use a number above 0"),
        ({"weights": (float("nan"), 1.0)}, "weight is nan; use a number above 0"),
        ({"weights": (float("inf"), 1.0)}, "weight is inf; use a number above 0"),
    ],
)
def test_faults_of_settings(make, kind, folder, changes, fault):
    names = {str(folder / name) for name in NUM_ROWS} | {"s"}
    assert message_of(ValueError, make, kind, **changes) in {fault, *(f"data.train: {name}: {fault}" for name in names)}


def test_plan_hashes_change_with_every_step(make, kind, straight):
    assert len({step.plan_hash.combined() for step in straight}) == len(straight)
    assert straight[0].plan_hash.packs != next(iter(make(kind, packs_per_step=4))).plan_hash.packs


@pytest.mark.process
def test_loader_that_is_left_early_leaves_no_process(make, kind):
    others = set(multiprocessing.active_children())
    steps = iter(make(kind, num_workers=2))
    list(islice(steps, 2))
    workers = set(multiprocessing.active_children()) - others
    assert workers
    steps.close()
    del steps
    for worker in workers:
        worker.join(20)
    assert not workers & set(multiprocessing.active_children())


# Of indexed rows alone: whole epochs are known ahead.


def test_epoch_packs_are_even_and_shared_by_work(make):
    train = make("indexed", packs_per_step=4, num_epochs=1, window=200)
    packs = train.epoch_packs(0)
    index = train.producer.index
    assert [pack.tokens for pack in packs] == [index.tokens[pack.rows].sum() for pack in packs]
    work = [pack.work for pack in packs]
    assert work == [train.producer.work[pack.rows].sum() for pack in packs]
    ranges = [max(work[start : start + 4]) - min(work[start : start + 4]) for start in range(0, len(work) - 3, 4)]
    assert np.mean(ranges) < 0.5 * (max(work) - min(work))
    for rank in range(2):
        step = next(iter(make("indexed", packs_per_step=4, window=200, rank=rank, world_size=2)))
        shares = share(work[:4], 2)
        assert step.pack_numbers == shares[rank]
        loads = [sum(work[number] for number in numbers) for numbers in shares]
        assert step.balance == max(loads) / (sum(loads) / 2)


def test_weights_repeat_and_thin_out_sources(make):
    train = make("indexed", (0.5, 2.3), num_epochs=3)
    drawn = []
    for epoch in range(3):
        counts = Counter(row for pack in train.epoch_packs(epoch) for row in pack.rows)
        first = {number for number in counts if number < 70}
        assert len(first) == 35
        assert all(counts[number] == 1 for number in first)
        assert Counter(counts[number] for number in range(79, 91)) == {2: 8, 3: 4}
        drawn.append(first)
    assert drawn[0] != drawn[1]


def test_no_epoch_is_planned_twice_in_a_row(make):
    planned = faults.note_planned_windows()
    train = make("indexed", num_epochs=3, window=200)
    assert train.num_steps == train.num_steps
    assert train.epoch_packs(0)  # as the start-up report does
    steps = list(train)
    assert len(steps) == train.num_steps
    assert [epoch for epoch, _ in planned] == [1, 2, 0, 1, 2]
    state = saved(next(step for step in steps if step.epoch == 1).state)
    planned.clear()
    train = make("indexed", num_epochs=3, window=200)
    train.load_state_dict(state)
    assert (train.num_steps, train.epoch) == (len(steps), 1)  # the lengths of all epochs are in the state
    assert train.epoch_packs(1)
    assert contents_of(train) == contents_of(steps[state["steps_done"] :])
    assert [epoch for epoch, _ in planned] == [1, 2]


def test_epoch_is_planned_window_by_window_as_it_is_trained(make):
    planned = faults.note_planned_windows()
    train = make("indexed", num_epochs=None, num_steps=1, window=40)
    assert train.num_steps == len(list(train)) == 1
    assert planned == [(0, 40)]


@pytest.mark.parametrize("ends", [{"num_epochs": 2}, {"num_steps": 4}])
def test_index_without_a_usable_row_makes_a_run_of_no_steps(collate, tmp_path, ends):
    (tmp_path / "none.jsonl").write_text("{\n{}\n")
    source = JsonlSource(tmp_path / "none.jsonl", tmp_path)
    index = build_index([source], collate, loaders.RULE)
    producer = IndexedWindows([(source, 0.5)], index, seed=5)
    train = Loader(producer, collate, packs_per_step=3, limits=LIMITS, **ends)
    assert (train.num_steps, train.epoch_packs(0), list(train)) == (0, [], [])
    train.load_state_dict(train.state())


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_reads_the_file_in_order_and_shares_it_out(folder, collate, workers):
    source = loaders.sources_of(folder)[0]
    index = build_index([source], collate, loaders.RULE)

    def names(rank, world_size):
        of_rank = {"data_rank": rank, "data_world_size": world_size, "num_workers": workers}
        return [result.pack.sample_ids for result in eval_packs(source, collate, index, limits=LIMITS, **of_rank)]

    every = names(0, 1)
    assert [name for pack in every for name in pack] == [f"s.jsonl:{line}" for line in range(1, 71)]
    assert [names(rank, 2) for rank in range(2)] == [every[0::2], every[1::2]]
