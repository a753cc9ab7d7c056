"""Rejected rows are counted once each, in little memory, and their list follows the checkpoint a run goes on from."""

import json
import tracemalloc

import pytest

from qwen3vl_train.data.errors import Reject
from qwen3vl_train.data.rejects import KnownRejects
from qwen3vl_train.train.run_folder import RejectLog, restart_rejects


def reject(row, file="a.jsonl", reason="broken"):
    return Reject(file, row, reason)


def lines(path):
    return [Reject(**json.loads(line)) for line in path.read_text().splitlines()]


def test_each_row_of_each_file_is_known_once():
    known = KnownRejects()
    assert known.add([reject(1), reject(2), reject(1, reason="again")]) == [reject(1), reject(2)]
    assert known.add([reject(2), reject(2, "b.jsonl"), reject(3)]) == [reject(2, "b.jsonl"), reject(3)]
    assert len(known) == 4
    known.add_unnamed(2)
    assert len(known) == 6


def test_a_known_row_takes_little_memory():
    known = KnownRejects()
    tracemalloc.start()
    for row in range(100_000):
        known.add([reject(row, "a/long/path/to/a/file.jsonl", "a reason of some length " * 4)])
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size / 100_000 < 100


def test_a_new_run_begins_with_what_its_index_found(tmp_path):
    path = tmp_path / "run" / "rejected.jsonl"
    assert restart_rejects(path, [], num_saved=0) == []
    assert not path.exists()
    assert restart_rejects(path, [reject(5), reject(1), reject(5)], num_saved=0) == []
    assert lines(path) == [reject(5), reject(1)]
    assert restart_rejects(path, [reject(7)], num_saved=0) == []
    assert lines(path) == [reject(7)]
    restart_rejects(path, [], num_saved=0)
    assert not path.exists()


@pytest.mark.parametrize("ahead", ["", '{"file": "a.jsonl", "row": 9, "reason": "x"}\n', '{"file": "a.js'])
def test_a_list_that_is_ahead_of_the_checkpoint_is_cut_back_to_it(tmp_path, ahead):
    path = tmp_path / "rejected.jsonl"
    saved = [reject(3), reject(4, "größe \udc80.jsonl", "half a \ud800 character")]
    RejectLog(path, writes=True).add(saved)
    with path.open("a") as file:
        file.write(ahead)
    assert restart_rejects(path, [reject(4, "größe \udc80.jsonl"), reject(6)], num_saved=2) == saved
    assert lines(path) == [*saved, reject(6)]
    assert "größe" in path.read_text()


def test_lines_that_were_taken_out_are_missed_but_stop_nothing(tmp_path):
    path = tmp_path / "rejected.jsonl"
    assert restart_rejects(path, [reject(1)], num_saved=3) == []
    assert lines(path) == [reject(1)]
    path.write_text("[]\n")
    with pytest.raises(ValueError) as caught:
        restart_rejects(path, [], num_saved=1)
    assert str(caught.value) == f"{path}:1: not a rejected row; take the line out"


def test_other_ranks_write_nothing(tmp_path):
    log = RejectLog(tmp_path / "rejected.jsonl", writes=False)
    assert log.add([reject(1)]) == [reject(1)]
    assert not log.path.exists()
