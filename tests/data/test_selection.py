"""Which rows of a recipe are trained, and which are held out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen3vl_train.config import Recipe
from qwen3vl_train.data.selection import SomeRows, check_names, open_rows
from qwen3vl_train.data.sources import FileSource, JsonlSource
from qwen3vl_train.tracking.metrics import read_metrics
from qwen3vl_train.train.loop import train
from tests.helpers import small_runs
from tests.helpers.messages import message_of
from tests.helpers.ranks import run_ranks


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A folder of two files with 30 and 10 rows."""
    for name, count in (("a", 30), ("b", 10)):
        rows = [small_runs.row(f"{name}{number}", "x") for number in range(1, count + 1)]
        small_runs.write_rows(tmp_path / "parts" / f"{name}.jsonl", rows)
    return tmp_path / "parts"


def _recipe(parts: Path, seed: int = 0, entry: dict[str, Any] | None = None, **data: Any) -> Recipe:
    train_on = [{"path": str(parts), **(entry or {})}]
    return small_runs.make_recipe(parts, parts, parts, data={"train": train_on, **data}, train__seed=seed)


def _names(files: list[FileSource]) -> list[str]:
    return [file.sample(row).messages[0].text for file in files for row in range(len(file))]


def _trained(recipe: Recipe) -> list[str]:
    return _names([file for file, _ in open_rows(recipe).train if isinstance(file, FileSource)])


EVERY_ROW = [f"{name}{number}" for name, count in (("a", 30), ("b", 10)) for number in range(1, count + 1)]


def test_max_rows_are_drawn_by_the_seed_from_all_files(parts):
    few = _trained(_recipe(parts, entry={"max_rows": 12}))
    assert len(few) == 12
    assert few == [name for name in EVERY_ROW if name in few], "in the order of the files"
    assert {name[0] for name in few} == {"a", "b"}
    assert _trained(_recipe(parts, entry={"max_rows": 12})) == few
    assert _trained(_recipe(parts, seed=1, entry={"max_rows": 12})) != few
    for enough in (40, 41):
        assert _trained(_recipe(parts, entry={"max_rows": enough})) == EVERY_ROW


def test_held_out_files_have_max_rows_too(parts):
    recipe = _recipe(parts, eval=[{"path": str(parts / "b.jsonl"), "max_rows": 3}])
    assert len(_names(open_rows(recipe).evals["b"])) == 3


@pytest.mark.parametrize(("share", "held_out"), [(0.25, 10), (0.001, 1), (0.999, 39)])
def test_a_share_is_held_out_and_the_rest_is_trained(parts, share, held_out):
    rows = open_rows(_recipe(parts, eval_share=share))
    trained = _names([file for file, _ in rows.train if isinstance(file, FileSource)])
    evaluated = _names(rows.evals["held_out"])
    assert len(evaluated) == held_out
    assert sorted([*trained, *evaluated]) == sorted(EVERY_ROW)


def test_a_share_of_max_rows_and_other_held_out_files(parts):
    other = [{"path": str(parts / "b.jsonl"), "name": "other"}]
    rows = open_rows(_recipe(parts, entry={"max_rows": 20}, eval=other, eval_share=0.1))
    assert {name: len(_names(files)) for name, files in rows.evals.items()} == {"held_out": 2, "other": 10}
    assert sum(len(file) for file, _ in rows.train if isinstance(file, FileSource)) == 18


def test_chosen_rows_keep_their_numbers_and_have_a_fingerprint(parts):
    file = JsonlSource(parts / "a.jsonl")
    some, others = (SomeRows(file, np.array(rows)) for rows in ([2, 7], [2, 8]))
    assert [some.row_number(row) for row in range(2)] == [3, 8]
    assert some.sample(1).sample_id.endswith("a.jsonl:8")
    assert some.fingerprint() != others.fingerprint()
    assert some.fingerprint() == SomeRows(file, np.array([2, 7])).fingerprint() != file.fingerprint()


def test_names_and_rows_that_a_share_cannot_have(parts):
    small_runs.write_rows(parts / "a.jsonl", [small_runs.row("only", "x")])
    one = str(parts / "a.jsonl")
    recipe = _recipe(parts, eval_share=0.5, entry={"path": one})
    expected = f"{one}: 1 rows cannot be shared out by data.eval_share; give held-out rows"
    assert message_of(ValueError, open_rows, recipe) == expected
    both = {"path": str(parts), "name": "held_out"}
    named = _recipe(parts, eval_share=0.5, eval=[both])
    assert message_of(ValueError, check_names, named.data).startswith("data.eval: two files are called held_out")


@pytest.mark.parametrize("streaming", [False, True])
def test_linked_pictures_are_used_where_the_recipe_follows_links(small, task, tmp_path, streaming):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "images").symlink_to(task / "images")
    entry = {"path": str(task / "train.jsonl"), "media_root": str(tmp_path / "linked"), "streaming": streaming}
    case = {"data__train": [entry], "data__max_rejected_fraction": 1.0, "tune": small_runs.LORA, "train__num_steps": 2}
    for follow_links, num_rejected in ((False, True), (True, False)):
        links = {"data__follow_links": follow_links, "name": str(follow_links)}
        recipe = small_runs.make_recipe(small, task, tmp_path, **case, **links)
        rows = read_metrics(train(recipe) / "metrics.jsonl")
        assert bool(rows[-1]["rejected"]) == num_rejected
        assert (sum(row["visual_tokens"] for row in rows) > 0) == follow_links


def test_a_run_on_two_ranks_evaluates_what_it_holds_out(small: Path, task: Path, tmp_path: Path):
    case = {
        "data__eval_share": 0.3,
        "data__max_tokens_per_pack": 64,
        "tune": small_runs.LORA,
        "eval__every_steps": 2,
        "train": {"num_epochs": 1, "packs_per_step": 2},
    }
    run_ranks(small_runs.train_on_rank, 2, small_runs.make_recipe(small, task, tmp_path, **case))
    train(small_runs.make_recipe(small, task, tmp_path / "alone", **case))
    runs = tmp_path / "run", tmp_path / "alone" / "run"
    tokens, tokens_alone = ([row["tokens"] for row in read_metrics(run / "metrics.jsonl")] for run in runs)
    assert tokens == tokens_alone
    evaluations = [[json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()] for run in runs]
    for row, other in zip(*evaluations, strict=True):
        assert (row["step"], row["name"], row["label_tokens"]) == (other["step"], "held_out", other["label_tokens"])
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)
