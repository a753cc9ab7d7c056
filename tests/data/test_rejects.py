"""The ledger of rejected rows: its count, its file, its limit, and how it resumes."""

import json
import tracemalloc
from pathlib import Path

import pytest

from qwen3vl_train.data.errors import Reject
from qwen3vl_train.data.rejects import RejectLedger, RejectSummary
from tests.helpers.messages import message_of


def reject(row, file="a.jsonl", reason="broken"):
    return Reject(file, row, reason, "invalid_json")


def lines(path):
    return [Reject(**json.loads(line)) for line in path.read_text().splitlines()]


def ledger_of(folder: Path, found: list[Reject] | None = None, *, limit=1.0, writes=True, num_rows=100) -> RejectLedger:
    """A ledger of one indexed file, a.jsonl."""
    ledger = RejectLedger(folder / "run" / "rejected.jsonl", limit, writes=writes)
    ledger.add_index(["a.jsonl"], num_rows=num_rows, num_usable=num_rows - len(found or []), rejects=found or [])
    return ledger


def resume(ledger: RejectLedger, listed: int = 0, of_streams: int = 0) -> RejectLedger:
    ledger.resume({"listed": listed, "of_streams": of_streams}, lambda work: work())
    return ledger


def test_each_row_of_each_file_is_listed_once(tmp_path):
    ledger = ledger_of(tmp_path)
    assert ledger.add([reject(1), reject(2), reject(1, reason="again")]) == [reject(1), reject(2)]
    assert ledger.add([reject(2), reject(2, "b.jsonl"), reject(3)]) == [reject(2, "b.jsonl"), reject(3)]
    assert len(ledger) == 4
    assert lines(tmp_path / "run" / "rejected.jsonl") == [reject(1), reject(2), reject(2, "b.jsonl"), reject(3)]


def test_a_rejected_row_takes_little_memory(tmp_path):
    ledger = RejectLedger(tmp_path / "rejected.jsonl", 1.0, writes=False)
    tracemalloc.start()
    for row in range(100_000):
        ledger.add([reject(row, "a/long/path/to/a/file.jsonl", "a reason of some length " * 4)], num_seen=row)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size / 100_000 < 100


def test_a_new_run_lists_what_its_index_found(tmp_path):
    path = tmp_path / "run" / "rejected.jsonl"
    resume(ledger_of(tmp_path))
    assert not path.exists()
    for found, listed in (([5, 1, 5], [5, 1]), ([7], [7])):
        resume(ledger_of(tmp_path, [reject(row) for row in found]))
        assert lines(path) == [reject(row) for row in listed]
    ledger_of(tmp_path).resume(None, lambda work: work())
    assert not path.exists()


@pytest.mark.parametrize("ahead", ["", '{"file": "a.jsonl", "row": 9, "reason": "x"}\n', '{"file": "a.js'])
def test_lines_after_the_checkpoint_are_removed(tmp_path, ahead):
    path = tmp_path / "run" / "rejected.jsonl"
    saved = [reject(3), reject(4, "größe \udc80.jsonl", "half a \ud800 character")]
    ledger_of(tmp_path).add(saved)
    with path.open("a") as file:
        file.write(ahead)
    ledger = resume(ledger_of(tmp_path, [reject(3), reject(6)]), listed=2)
    assert lines(path) == [*saved, reject(6)]
    assert "größe" in path.read_text()
    assert len(ledger) == 3
    assert ledger.add([*saved, reject(9)]) == [reject(9)]


def test_lines_that_were_removed_still_count(tmp_path):
    path = tmp_path / "run" / "rejected.jsonl"
    ledger = resume(ledger_of(tmp_path, [reject(1)]), listed=3)
    assert lines(path) == [reject(1)]
    assert ledger.state() == {"listed": 4, "of_streams": 0}
    path.write_text("[]\n")
    fault = f"{path}:1: not a rejected row; remove the line"
    assert message_of(ValueError, resume, ledger_of(tmp_path), listed=1) == fault


def test_other_ranks_write_nothing(tmp_path):
    assert ledger_of(tmp_path, writes=False).add([reject(1)]) == [reject(1)]
    assert not (tmp_path / "run").exists()


def test_too_many_rejected_rows_raise(tmp_path):
    ledger_of(tmp_path, [reject(2)], num_rows=4, limit=0.25).check()
    assert message_of(ValueError, ledger_of(tmp_path, [reject(2)], num_rows=4, limit=0.2).check) == (
        "data: 1 of 4 rows cannot be used, more than data.max_rejected_fraction 0.2; fix them or raise it\n"
        "  - a.jsonl:2: broken"
    )


@pytest.mark.parametrize("num_rows", [0, 5])
def test_files_without_a_usable_row_raise(tmp_path, num_rows):
    ledger = RejectLedger(tmp_path / "rejected.jsonl", 1.0, writes=True)
    found = [reject(row) for row in range(1, num_rows + 1)]
    ledger.add_index(["a.jsonl", "b.jsonl"], num_rows=num_rows, num_usable=0, rejects=found)
    assert message_of(ValueError, ledger.check) == (
        f"a.jsonl, b.jsonl: nothing to learn from, none of {num_rows} rows can be used; fix the rows"
        + ("\n  - a.jsonl: 5 rows rejected (invalid_json), the first is row 1: broken" if num_rows else "")
    )


def test_a_file_of_two_entries_counts_twice_and_is_listed_once(tmp_path):
    def ledger_with(limit: float) -> RejectLedger:
        ledger = RejectLedger(tmp_path / "rejected.jsonl", limit, writes=False)
        ledger.add_index(["a.jsonl", "a.jsonl"], num_rows=24, num_usable=22, rejects=[reject(12), reject(12)])
        assert ledger.add([reject(1), reject(1)]) == [reject(1)]
        assert ledger.add([reject(1)]) == []
        assert (len(ledger), len(ledger.indexed)) == (2, 4)
        return ledger

    ledger_with(4 / 24).check()
    with pytest.raises(ValueError, match=r"^data: 4 of 24 rows cannot be used"):
        ledger_with(3.9 / 24).check()


def test_a_row_of_a_stream_counts_as_often_as_it_is_met(tmp_path):
    ledger = RejectLedger(tmp_path / "rejected.jsonl", 0.25, writes=True)
    assert ledger.add([reject(5)], num_seen=4) == [reject(5)]
    assert ledger.add([reject(5)], num_seen=8) == []
    ledger.check()
    assert ledger.state() == {"listed": 1, "of_streams": 2}
    resumed = resume(RejectLedger(tmp_path / "rejected.jsonl", 0.25, writes=True), **ledger.state())
    assert resumed.state() == ledger.state()
    for again, shown in ((ledger, 3), (resumed, 2)):
        again.add([reject(5)], num_seen=11)
        assert message_of(ValueError, again.check) == (
            "data: 3 of the first 11 rows cannot be used, more than data.max_rejected_fraction 0.25; fix them or raise "
            "it" + shown * "\n  - a.jsonl:5: broken"
        )


def test_what_a_checkpoint_counted_does_not_stop_a_resume(tmp_path):
    ledger_of(tmp_path).add([reject(1), reject(2)])
    ledger = resume(ledger_of(tmp_path, num_rows=4, limit=0.25), listed=2)
    with pytest.raises(ValueError, match=r"^data: 2 of 4 rows cannot be used"):
        ledger.check()


def test_a_few_rejects_are_shown_one_by_one():
    few = [reject(1), reject(2, "b.jsonl"), reject(3)]
    assert RejectSummary().lines() == []
    assert RejectSummary(few).lines() == ["a.jsonl:1: broken", "b.jsonl:2: broken", "a.jsonl:3: broken"]


def test_many_rejects_of_one_kind_are_one_line():
    many = [reject(row, reason=f"{row} images but 0 placeholders; put one") for row in range(4, 1004)]
    assert RejectSummary(many).lines({"a.jsonl": 1200}) == [
        "a.jsonl: 1,000 of 1,200 rows rejected (invalid_json), the first is row 4: 4 images but 0 placeholders; put one"
    ]
    assert RejectSummary(many).lines()[0].startswith("a.jsonl: 1,000 rows rejected (invalid_json), the first is row 4")


def test_the_largest_groups_of_rejects_come_first():
    mixed = [Reject("a.jsonl", 1, "odd", "too_long")] + [reject(row, f"{row % 4}.jsonl") for row in range(10)]
    assert RejectSummary(mixed).lines() == [
        "0.jsonl: 3 rows rejected (invalid_json), the first is row 0: broken",
        "1.jsonl: 3 rows rejected (invalid_json), the first is row 1: broken",
        "2.jsonl: 2 rows rejected (invalid_json), the first is row 2: broken",
        "and 3 more",
    ]
    assert RejectSummary(mixed[:5]).lines()[0] == "a.jsonl:1: odd"


def test_the_line_of_one_file_has_its_number_of_rows(tmp_path):
    ledger = RejectLedger(tmp_path / "rejected.jsonl", 1.0, writes=True)
    ledger.add_index(["a.jsonl"], num_rows=9, num_usable=0, rejects=[reject(row) for row in range(1, 8)])
    resume_error = message_of(ValueError, resume, ledger)
    assert resume_error.splitlines()[1:] == [
        "  - a.jsonl: 7 of 9 rows rejected (invalid_json), the first is row 1: broken"
    ]
    assert len(lines(tmp_path / "rejected.jsonl")) == 7
