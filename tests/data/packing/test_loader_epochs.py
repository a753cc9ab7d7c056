"""Epochs of indexed rows are known ahead: even packs, each planned once; held-out rows stay in order."""

from collections import Counter

import numpy as np
import pytest

from qwen3vl_train.data.packing.index import build_index
from qwen3vl_train.data.packing.loader import Loader
from qwen3vl_train.data.packing.packs import eval_packs
from qwen3vl_train.data.packing.plan import PackLimits, share
from qwen3vl_train.data.packing.windows import IndexedWindows
from qwen3vl_train.data.sources import JsonlSource
from tests.helpers import faults, loaders
from tests.helpers.loaders import contents_of


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
    state = loaders.saved_state(next(step for step in steps if step.epoch == 1).state)
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
    train = Loader(producer, collate, packs_per_step=3, limits=PackLimits(loaders.MAX_TOKENS), **ends)
    assert (train.num_steps, train.epoch_packs(0), list(train)) == (0, [], [])
    train.load_state_dict(train.state())


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_reads_the_file_in_order_and_shares_it_out(folder, collate, workers):
    source = loaders.sources_of(folder)[0]
    index = build_index([source], collate, loaders.RULE)

    def names(rank, world_size):
        of_rank = {"data_rank": rank, "data_world_size": world_size, "num_workers": workers}
        return [
            result.pack.sample_ids
            for result in eval_packs(source, collate, index, limits=PackLimits(loaders.MAX_TOKENS), **of_rank)
        ]

    every = names(0, 1)
    assert [name for pack in every for name in pack] == [f"s.jsonl:{line}" for line in range(1, 71)]
    assert [names(rank, 2) for rank in range(2)] == [every[0::2], every[1::2]]
