"""Rows that break or change after they were scanned give no pack, and are named."""

import os
import shutil
from collections import Counter
from itertools import islice

import pytest

from qwen3vl_train.data.packing.index import LengthRule, build_index
from qwen3vl_train.data.packing.loader import Loader
from qwen3vl_train.data.packing.packs import eval_packs
from qwen3vl_train.data.packing.plan import PackLimits
from qwen3vl_train.data.packing.windows import IndexedWindows
from qwen3vl_train.data.sources import JsonlSource
from tests.helpers.loaders import EVERY_ROW, NUM_ROWS, make_loader, names_of
from tests.helpers.small_runs import row, write_rows


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
