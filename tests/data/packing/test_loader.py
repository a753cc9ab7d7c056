"""The loader over both producers: every row once an epoch, the same steps whatever the workers and ranks."""

import multiprocessing
import os
import signal
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.packing.index import LengthRule, build_index
from qwen3vl_train.data.packing.packs import eval_packs
from qwen3vl_train.data.packing.plan import PackLimits
from tests.helpers import loaders
from tests.helpers.loaders import EVERY_ROW, NUM_ROWS, assert_same_packs, contents_of, make_loader, names_of, plan_of
from tests.helpers.messages import message_of


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


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"packs_per_step": 0}, "train.packs_per_step: got 0; use at least 1"),
        ({"num_steps": 5}, "train: num_epochs is 2 and num_steps is 5; give one of them"),
        ({"num_epochs": None}, "train: num_epochs is None and num_steps is None; give one of them"),
        ({"num_epochs": 0}, "train: num_epochs is 0 and num_steps is None; use more than 0"),
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
