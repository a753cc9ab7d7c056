"""The loader resumes exactly, in any epoch and on other ranks, or says why it cannot."""

import json
from collections import Counter
from itertools import islice

import pytest

from tests.helpers import loaders
from tests.helpers.loaders import EVERY_ROW, assert_same_packs, contents_of, make_loader, names_of, plan_of
from tests.helpers.messages import message_of
from tests.helpers.small_runs import row


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact_in_any_epoch_and_on_other_ranks(make, kind, straight, workers):
    last = max(number for number, step in enumerate(straight) if step.epoch == 0)
    for stop in {0, 3, last - 1, last, last + 1, len(straight) - 1} if not workers else {2}:
        state = loaders.saved_state(straight[stop].state)
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
                train.load_state_dict(loaders.saved_state(state))
            steps = list(islice(train, num_steps))
            seen += Counter(names_of(steps))
        state = steps[-1].state
    assert seen == counts
    train = make(kind, (1.0, 2.5))
    train.load_state_dict(loaders.saved_state(state))
    assert contents_of(islice(train, 1)) == contents_of([straight[len(epoch)]])


def test_state_before_and_after_the_run(make, kind, straight):
    train = make(kind)
    first = train.state()
    assert contents_of(train) == contents_of(straight)
    assert list(train) == []
    assert train.state() == straight[-1].state
    train.load_state_dict(first)
    assert contents_of(train) == contents_of(straight)


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
