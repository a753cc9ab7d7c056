"""What the commands of launch/ do, called in this process; `test_scripts.py` starts the scripts themselves."""

import json
import re
import shutil
from pathlib import Path

import pytest

from qwen3vl_train.train.cli import evaluate, export
from qwen3vl_train.train.loop import train
from tests.helpers import small_runs


@pytest.fixture(scope="module")
def learnt(tiny_folder: Path, task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has memorised the task."""
    recipe = small_runs.make_recipe(
        tiny_folder,
        task,
        tmp_path_factory.mktemp("learnt"),
        data={"train": [{"path": str(task / "train.jsonl")}], "max_tokens_per_pack": 512, "num_workers": 0},
        data__eval=[{"path": str(task / "eval.jsonl")}],
        optim={"lr": 2e-3, "warmup": 5, "schedule": "constant"},
        train={"num_steps": 60, "packs_per_step": 1},
        checkpoint={"every_steps": None},
        eval={"every_steps": None},
    )
    return train(recipe)


def test_eval_gives_loss_and_answers_of_a_run(learnt, task, tmp_path, capsys):
    data, out, summary = task / "eval.jsonl", tmp_path / "answers.jsonl", tmp_path / "summary.json"
    assert evaluate([str(learnt), "--data", str(data), "--out", str(out), "--json", str(summary)]) == 0
    said = capsys.readouterr().out.splitlines()
    got = json.loads(summary.read_text())
    assert (got["model"], got["data"]) == (str(learnt), str(data))
    assert (got["num_samples"], got["num_rejected"], got["exact_match"]) == (4, 0, 1.0)
    at_the_end = json.loads((learnt / "eval.jsonl").read_text())
    assert got["loss"] == pytest.approx(at_the_end["loss"], abs=1e-5)
    assert got["label_tokens"] == at_the_end["label_tokens"]
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert answers[2] == {"id": "eval.jsonl:3", "expected": "No, it is not.", "answer": "No, it is not.", "match": True}
    assert said[2] == "eval.jsonl:3: expected 'No, it is not.', got 'No, it is not.'"
    assert said[-1] == (
        f"4 samples: loss {got['loss']:.4f} over {got['label_tokens']} label tokens, exact match 100.0%"
    )


def test_eval_takes_a_model_folder(tiny_folder, task, capsys):
    assert evaluate([str(tiny_folder), "--data", str(task / "eval.jsonl"), "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("exact match 0.0%")


def test_rows_without_an_answer_at_the_end_are_counted(learnt, task, tmp_path, capsys):
    rows = (task / "eval.jsonl").read_text().splitlines()
    asks_again = json.loads(rows[1])
    asks_again["messages"].append({"role": "user", "content": "And?"})
    path = small_runs.write_rows(tmp_path / "eval.jsonl", [rows[1], asks_again, "not json"])
    assert evaluate([str(learnt), "--data", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("exact match 100.0%, 2 rows rejected")
    small_runs.write_rows(path, [asks_again])
    assert evaluate([str(learnt), "--data", str(path)]) == 2
    assert capsys.readouterr().err.startswith(
        f"error: {path}: no row can be used; the first: {path}:1: does not end with an answer to compare with; "
    )


def test_media_root_is_the_folder_of_the_file_or_an_option(learnt, task, tmp_path, capsys):
    shutil.copy(task / "eval.jsonl", tmp_path / "eval.jsonl")
    arguments = [str(learnt), "--data", str(tmp_path / "eval.jsonl")]
    assert evaluate(arguments) == 0  # no pictures lie next to this copy: the two rows that name some are rejected
    assert re.search(r"^2 samples: .*, 2 rows rejected$", capsys.readouterr().out, re.MULTILINE)
    assert evaluate([*arguments, "--media-root", str(task)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("4 samples")


def test_answers_that_cannot_be_written_are_an_error(learnt, task, tmp_path, capsys):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "answers.jsonl"
    assert evaluate([str(learnt), "--data", str(tmp_path / "none.jsonl"), "--out", str(out)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {out}: cannot be written (")  # before the rows are looked for
    (tmp_path / "full").symlink_to("/dev/full")
    outputs = ["--out", str(tmp_path / "full"), "--json", str(tmp_path / "new" / "summary.json")]
    assert evaluate([str(learnt), "--data", str(task / "eval.jsonl"), *outputs]) == 1
    said = capsys.readouterr()
    assert "exact match" in said.out
    assert said.err.startswith(
        f"error: {tmp_path}/full: cannot be written (No space left on device); make room or make it writable, then "
    )
    assert json.loads((tmp_path / "new" / "summary.json").read_text())["exact_match"]


def test_the_export_command_says_what_it_checked(learnt, tmp_path, capsys):
    out = tmp_path / "out"
    assert export([str(learnt), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{out}: checkpoint of step 60, 121 tensors, read back bit-equal; logits in stock transf")
    assert export([str(learnt), "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {out}: exists already; choose another folder or remove it\n")
    assert evaluate([str(out), "--data", str(learnt.parent / "none.jsonl")]) == 2
