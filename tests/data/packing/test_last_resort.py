"""A fault of one row that no check foresaw costs this row, and not the run."""

from dataclasses import replace

import pytest

from qwen3vl_train.data.packing.index import LengthRule, build_index
from qwen3vl_train.data.packing.mixture import Numbered, Part
from qwen3vl_train.data.packing.packs import eval_packs
from qwen3vl_train.data.packing.plan import PackLimits
from qwen3vl_train.data.packing.stream import StreamedWindows
from qwen3vl_train.data.sources import JsonlSource
from tests.helpers.small_runs import row, write_rows


class BrokenRead(JsonlSource):
    """Row 2 raises while it is read."""

    def raw(self, row):
        return super().raw(row // (row != 1))


class BrokenRender(JsonlSource):
    """Row 2 raises while it is rendered: its tool cannot be written as JSON."""

    def sample(self, row):
        sample = super().sample(row)
        return replace(sample, tools=(object(),)) if row == 1 else sample


class BrokenLabels(JsonlSource):
    """Row 2 has a weight that float32 rounds to zero, so that none of its tokens would be trained."""

    def sample(self, row):
        sample = super().sample(row)
        weight = 1e-60 if row == 1 else 1.0
        return replace(sample, messages=tuple(replace(turn, loss_weight=weight) for turn in sample.messages[1:]))


WORDS = {
    BrokenRead: "cannot be read, ZeroDivisionError: integer division or modulo by zero (in test_last_resort.py:",
    BrokenRender: "cannot be read, TypeError: Object of type object is not JSON serializable (in ",
}
RULE = LengthRule(500)


def file(folder):
    write_rows(folder / "a.jsonl", [row(f"question {number}", "answer") for number in range(3)])
    return folder / "a.jsonl"


@pytest.mark.parametrize("broken", WORDS)
def test_row_is_rejected_when_indexed(broken, tmp_path, collate):
    source = broken(file(tmp_path), tmp_path)
    index = build_index([source], collate, RULE, cache_folder=tmp_path / "cache")
    (reject,) = index.rejects
    assert (reject.row, reject.kind, index.num_usable) == (2, "unexpected", 2)
    assert reject.reason.startswith(WORDS[broken])
    again = build_index([JsonlSource(source.name, tmp_path)], collate, RULE, cache_folder=tmp_path / "cache")
    assert not again.rejects, "a kept index reads the row again"


@pytest.mark.parametrize("broken", WORDS)
def test_row_is_rejected_when_packed(broken, tmp_path, collate):
    index = build_index([JsonlSource(file(tmp_path), tmp_path)], collate, RULE)
    (result,) = eval_packs(broken(tmp_path / "a.jsonl", tmp_path), collate, index, limits=PackLimits(500))
    assert result.pack is not None
    assert result.pack.sample_ids == ("a.jsonl:1", "a.jsonl:3")
    assert [(reject.row, reject.kind) for reject in result.rejected] == [(2, "unexpected")]


@pytest.mark.parametrize("broken", WORDS)
def test_row_is_rejected_in_a_stream(broken, tmp_path, collate):
    part = Part(Numbered(broken(file(tmp_path), tmp_path), shuffle=False), 1.0)
    windows = StreamedWindows([part], collate, RULE, seed=0)
    window = next(windows.windows(windows.start()))
    assert [(reject.row, reject.kind) for reject in window.rejects] == [(2, "unexpected")]
    assert window.num_rows == 3


def test_row_that_would_train_no_token_is_rejected(tmp_path, collate):
    source = BrokenLabels(file(tmp_path), tmp_path)
    index = build_index([source], collate, RULE)
    (result,) = eval_packs(source, collate, index, limits=PackLimits(500))
    assert result.pack is not None
    assert result.pack.sample_ids == ("a.jsonl:1", "a.jsonl:3")
    assert [(reject.row, reject.kind) for reject in result.rejected] == [(2, "nothing_to_learn")]
