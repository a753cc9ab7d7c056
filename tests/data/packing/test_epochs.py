"""Epochs of indexed data are planned when they are needed, and none twice in a row."""

import json

import pytest

from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.packing.index import LengthRule, build_index
from qwen3vl_train.data.packing.loader import TrainLoader
from qwen3vl_train.data.packing.plan import PackLimits
from qwen3vl_train.data.sources import JsonlSource
from tests.helpers import faults
from tests.helpers.stream_files import names_of, write_folder


@pytest.fixture(scope="module")
def collator(tiny_folder):
    return MultimodalCollator.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def make(tmp_path_factory, collator):
    folder = write_folder(tmp_path_factory.mktemp("epochs") / "rows")
    source = JsonlSource(folder / "s.jsonl", folder)
    index = build_index([source], collator, LengthRule(160))

    def loader(**changes):
        options = {"packs_per_step": 3, "limits": PackLimits(160), "seed": 5, "num_epochs": 3, **changes}
        return TrainLoader([(source, 1.0)], collator, index, **options)

    return loader


def test_no_epoch_is_planned_twice_in_a_row(make):
    planned = faults.note_planned_epochs()
    train = make()
    assert train.num_steps == train.num_steps
    assert train.epoch_packs(0)  # as the start-up report does
    steps = list(train)
    assert len(steps) == train.num_steps
    assert planned == [1, 2, 0, 1, 2]


def test_a_run_that_goes_on_knows_the_lengths_of_all_epochs(make):
    planned = faults.note_planned_epochs()
    steps = list(make())
    state = json.loads(json.dumps(next(step for step in steps if step.epoch == 1).state))
    planned.clear()
    train = make()
    train.load_state_dict(state)
    assert (train.num_steps, train.epoch) == (len(steps), 1)
    assert train.epoch_packs(1)
    rest = list(train)
    assert [step.mark for step in rest] == [step.mark for step in steps[state["steps_done"] :]]
    assert names_of(rest) == names_of(steps[state["steps_done"] :])
    assert planned == [1, 2]


def test_an_epoch_is_planned_window_by_window_as_it_is_trained(make):
    sizes = faults.note_planned_windows()
    train = make(num_epochs=None, num_steps=1, window=20)
    assert train.num_steps == len(list(train)) == 1
    assert sizes == [20]


@pytest.mark.parametrize("ends", [{"num_epochs": 2}, {"num_epochs": None, "num_steps": 4}])
def test_an_index_without_a_usable_row_makes_a_run_of_no_steps(collator, tmp_path, ends):
    (tmp_path / "none.jsonl").write_text("{\n{}\n")
    source = JsonlSource(tmp_path / "none.jsonl", tmp_path)
    index = build_index([source], collator, LengthRule(160))
    train = TrainLoader([(source, 0.5)], collator, index, packs_per_step=3, limits=PackLimits(160), seed=5, **ends)
    assert (train.num_steps, train.epoch_packs(0), list(train)) == (0, [], [])
    train.load_state_dict(train.state())
