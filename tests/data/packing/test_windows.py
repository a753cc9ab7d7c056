"""One rank looks at a stream for all: the others hold the same plan whatever they can read, and stop where it ends."""

import json
import shutil
import time
from collections import Counter
from itertools import islice

import pytest
import torch

from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.packing.mixture import InOrder, Part
from qwen3vl_train.data.rows.parse import RowRules
from qwen3vl_train.data.sources.streams import FileStream
from qwen3vl_train.dist.ranks import Ranks, StoreBroadcast
from tests.helpers import faults, stream_files
from tests.helpers.ranks import run_ranks
from tests.helpers.stream_files import NUM_ROWS, NUM_TEXTS, names_of, stream_loader, write_folder

EVERY_ROW = Counter(
    [f"s.jsonl:{row}" for row in range(1, NUM_ROWS + 1)] + [f"k.jsonl:{row}" for row in range(1, NUM_TEXTS + 1)]
)


@pytest.fixture(scope="module")
def collator(tiny_folder):
    return MultimodalCollator.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("stream") / "rows")


@pytest.fixture
def copy(folder, tmp_path):
    """Another machine's copy of the folder, to be spoilt."""
    shutil.copytree(folder, tmp_path / "rows")
    return tmp_path / "rows"


def steps_of(folders, collator, *, state=None, **options):
    """The steps of every rank; each reads the files of its own folder."""
    broadcast = stream_files.Broadcast()
    steps = []
    for rank, folder in enumerate(folders):
        train = stream_loader(folder, collator, rank=rank, world_size=len(folders), broadcast=broadcast, **options)
        if state:
            train.load_state_dict(state)
        steps.append(list(train))
    return steps


def plans(steps):
    """But for the fingerprint, in which files may have a time: `open_data` gives all ranks that of rank 0."""
    states = [{**step.state, "fingerprint": None} for step in steps]
    return [(state, step.mark, step.num_packs, step.num_shrunk) for state, step in zip(states, steps, strict=True)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("what", ["picture", "row"])
def test_a_row_that_one_rank_cannot_read_changes_no_plan(folder, copy, collator, workers, what):
    whole = list(stream_loader(folder, collator))
    lines = (copy / "s.jsonl").read_text().splitlines()
    for row in range(0, NUM_ROWS, 3):
        if what == "picture":
            (copy / f"{row}.png").unlink()
        else:
            lines[row] = "[" + lines[row][1:]
    (copy / "s.jsonl").write_text("\n".join(lines) + "\n")
    ranks = steps_of([folder, copy], collator, num_workers=workers)
    assert plans(ranks[0]) == plans(ranks[1]) == plans(whole)
    lost = {reject.row for step in ranks[1] for reject in step.rejected}
    assert lost
    assert lost <= {row + 1 for row in range(0, NUM_ROWS, 3)}
    reason = {"picture": "no such file", "row": "not JSON"}[what]
    assert all(reason in reject.reason for step in ranks[1] for reject in step.rejected)
    assert not any(step.rejected for step in ranks[0])
    for epoch in range(2):
        of_epoch = [[step for step in steps if step.epoch == epoch] for steps in ranks]
        rejected = [f"s.jsonl:{reject.row}" for step in of_epoch[1] for reject in step.rejected]
        assert Counter(names_of(of_epoch[0]) + names_of(of_epoch[1]) + rejected) == EVERY_ROW


def test_without_a_broadcast_the_marks_tell_that_ranks_plan_apart(folder, copy, collator):
    (copy / "3.png").unlink()
    first, second = (
        list(stream_loader(files, collator, rank=rank, world_size=2)) for rank, files in enumerate((folder, copy))
    )
    assert [step.mark for step in first] != [step.mark for step in second]


def test_what_rank_0_cannot_read_is_left_out_on_every_rank_and_told_once(folder, copy, collator):
    (copy / "3.png").write_bytes(b"no picture")
    ranks = steps_of([copy, folder, folder], collator, num_epochs=1)
    assert plans(ranks[0]) == plans(ranks[1]) == plans(ranks[2])
    assert Counter(name for steps in ranks for name in names_of(steps)) == EVERY_ROW - Counter(["s.jsonl:4"])
    assert [[reject.row for step in steps for reject in step.rejected] for steps in ranks] == [[4], [], []]


def test_other_rows_on_another_machine_are_refused_with_their_place(folder, copy, collator):
    rows = (folder / "s.jsonl").read_text().splitlines()
    (copy / "s.jsonl").write_text("\n".join([*rows[:20], "", *rows[20:]]))
    with pytest.raises(ValueError) as caught:
        steps_of([folder, copy], collator)
    assert str(caught.value) == (
        "data.train: the stream goes on with s.jsonl:22 here and with s.jsonl:21 on rank 0; give all ranks the same "
        "files"
    )
    for kept, text in (
        (rows[:-1], "its end here .* s.jsonl:70 on"),
        ([*rows, rows[0]], "s.jsonl:71 here .* its end on"),
    ):
        (copy / "s.jsonl").write_text("\n".join(kept))
        with pytest.raises(ValueError, match=text):
            steps_of([folder, copy], collator, weights=(1.0, 0.1))


class BreaksOff(FileStream):
    def __init__(self, folder, fault):
        super().__init__("s", [str(folder / "s.jsonl")], str(folder), RowRules())
        self.fault = fault

    def rows(self, state=None):
        yield from islice(super().rows(state), 60)
        raise self.fault


@pytest.mark.parametrize("fault", [ValueError("s.jsonl is cut short"), RuntimeError("the disk is gone"), KeyError("b")])
@pytest.mark.parametrize("workers", [0, 1])
def test_where_reading_ends_on_rank_0_all_ranks_stop_behind_the_same_step(folder, collator, workers, fault):
    broadcast, told = stream_files.Broadcast(), []
    for rank in range(2):
        train = stream_loader(folder, collator, rank=rank, world_size=2, broadcast=broadcast, num_workers=workers)
        if rank == 0:
            faults.replace_first_part(train, Part(InOrder(BreaksOff(folder, fault)), 1.0))
        with pytest.raises(ValueError if isinstance(fault, ValueError) else Exception) as caught:
            list(train)
        assert str(fault) in str(caught.value)
        told.append(train.state()["steps_done"])
    assert told[0] == told[1] > 0


@pytest.mark.parametrize("stop", [0, 1])
def test_a_stretch_that_is_entered_again_keeps_its_plan_whatever_can_be_read_by_then(folder, copy, collator, stop):
    picture = (copy / "3.png").read_bytes()
    (copy / "3.png").write_bytes(b"no picture")
    straight = list(stream_loader(copy, collator, num_epochs=1, window=40))
    assert straight[stop].state["left_out"] == [6]
    state = json.loads(json.dumps(straight[stop].state))
    (copy / "3.png").write_bytes(picture)
    again = stream_loader(copy, collator, num_epochs=1, window=40)
    again.load_state_dict(state)
    rest = list(again)
    assert plans(rest) == plans(straight[stop + 1 :])
    assert names_of(rest) == names_of(straight[stop + 1 :])
    assert names_of(rest)


def test_a_stretch_that_cannot_be_read_as_it_was_ends_the_resume(copy, collator):
    state = next(iter(stream_loader(copy, collator))).state
    (copy / "2.png").unlink()
    again = stream_loader(copy, collator)
    again.load_state_dict(state)
    with pytest.raises(ValueError) as caught:
        next(iter(again))
    text = str(caught.value)
    assert text.startswith(
        f"resume: the stretch of the stream that the run stopped in is not what it was: {copy}/s.jsonl:3: messages[0]"
    )
    assert text.endswith("; put it back, or start a new run")


def run_rank(rank, world_size, folders, tiny_folder, workers):
    ranks = Ranks(rank, world_size, rank, torch.device("cpu"))
    train = stream_loader(
        folders[rank], MultimodalCollator.from_pretrained(tiny_folder), rank=rank, world_size=world_size,
        num_workers=workers, packs_per_step=3, window=6, broadcast=StoreBroadcast(ranks),
    )  # fmt: skip
    steps = []
    for step in train:
        steps.append((step.mark, step.state["steps_done"], names_of([step]), [reject.row for reject in step.rejected]))
        if len(steps) % 4 == rank:
            time.sleep(0.05)
        ranks.reduce([1.0])  # as a training step does: who is early waits here
    store = torch.distributed.distributed_c10d._get_default_store()
    ranks.gather(None)
    left = [key for key in range(40) if store.check([f"broadcast/1/1/{key}"])]
    return steps, left


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_with_fewer_packs_in_a_step_wait_for_no_note_that_comes_later(folder, copy, tiny_folder, workers):
    """Three packs for two ranks, and windows of about two packs: who has one pack a step would ask far ahead."""
    (copy / "9.png").unlink()
    first, second = run_ranks(run_rank, 2, [folder, copy], tiny_folder, workers, timeout=120)
    assert [step[:2] for step in first[0]] == [step[:2] for step in second[0]]
    trained = Counter(name for steps, _ in (first, second) for step in steps for name in step[2])
    lost = [row for steps, _ in (first, second) for step in steps for row in step[3]]
    assert set(lost) <= {10}
    assert trained + Counter(f"s.jsonl:{row}" for row in lost) == EVERY_ROW + EVERY_ROW
    assert first[1] == []  # what all have read is gone from the store
