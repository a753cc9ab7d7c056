"""What ranks compare of a step, and how evenly its work is dealt out."""

import numpy as np
import pytest

from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.packing.index import LengthRule, build_index
from qwen3vl_train.data.packing.loader import TrainLoader
from qwen3vl_train.data.packing.plan import PackLimits, share
from qwen3vl_train.data.packing.steps import PlanMark
from qwen3vl_train.data.sources import JsonlSource
from tests.helpers.stream_files import stream_loader, write_folder


@pytest.fixture(scope="module")
def collator(tiny_folder):
    return MultimodalCollator.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("steps") / "rows")


@pytest.fixture(scope="module")
def make(folder, collator):
    """A function: kind of loader, and its options -> a loader of two epochs, in steps of 5 packs."""
    source = JsonlSource(folder / "s.jsonl", folder)
    index = build_index([source], collator, LengthRule(160))

    def loader(kind, **changes):
        if kind == "stream":
            return stream_loader(folder, collator, **changes)
        options = {"packs_per_step": 5, "limits": PackLimits(160), "seed": 5, "num_epochs": 2, **changes}
        return TrainLoader([(source, 1.0)], collator, index, **options)

    return loader


def test_a_mark_is_the_same_where_position_and_rows_are_and_is_exact_as_a_float():
    mark = PlanMark.from_plan({"epoch": 0, "done": 3}, [[1, 2], [3]])
    assert mark == PlanMark.from_plan({"done": 3, "epoch": 0}, [[1, 2], [3]])
    moved = PlanMark.from_plan({"done": 4, "epoch": 0}, [[1, 2], [3]])
    assert (moved.position != mark.position, moved.packs) == (True, mark.packs)
    for rows in ([[1, 2, 3]], [[2, 1], [3]], [[3], [1, 2]], [[1, 2], [4]]):
        other = PlanMark.from_plan({"epoch": 0, "done": 3}, rows)
        assert other.position == mark.position
        assert other.packs != mark.packs
        assert other.both() != mark.both()
    assert int(float(mark.both())) == mark.both() < 2**48


@pytest.mark.parametrize("kind", ["indexed", "stream"])
def test_marks_are_those_of_all_ranks_and_change_with_every_step(make, kind):
    marks = [[step.mark for step in make(kind, rank=rank, world_size=3)] for rank in range(3)]
    assert marks[0] == marks[1] == marks[2] == [step.mark for step in make(kind)]
    assert len({mark.both() for mark in marks[0]}) == len(marks[0])
    assert marks[0][0].packs != next(iter(make(kind, packs_per_step=4))).mark.packs


@pytest.mark.parametrize("kind", ["indexed", "stream"])
def test_balance_is_the_busiest_rank_over_the_mean(make, kind):
    train = make(kind)
    alone = list(train)
    assert {step.balance for step in alone} == {1.0}
    for world_size in (2, 4, 50):
        ranks = [list(make(kind, rank=rank, world_size=world_size, num_epochs=1)) for rank in range(world_size)]
        for of_ranks in zip(*ranks, strict=True):
            (balance,) = {step.balance for step in of_ranks}
            # Text and pictures of a pack follow its rows, so its work does: by the tokens it has, near enough.
            loads = np.array([sum(pack.num_tokens for pack in step.packs) for step in of_ranks])
            assert balance == pytest.approx(loads.max() / loads.mean(), rel=0.25)
            if world_size == 50:
                assert balance > 9  # five ranks at most have work


def test_balance_is_exact(make):
    train = make("indexed", world_size=2)
    work = [int(train.work[pack].sum()) for pack in train.epoch_packs(0)[:5]]
    loads = [sum(work[number] for number in numbers) for numbers in share(work, 2)]
    assert next(iter(train)).balance == max(loads) / (sum(loads) / 2)
