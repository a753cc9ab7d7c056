"""Bad input gets a clear error: every message as the user of launch/sft.py sees it, with its exit code."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from qwen3vl_train.tracking.metrics import read_metrics
from qwen3vl_train.train.cli import sft
from tests.helpers import small_runs

HINT = "(QWEN3VL_TRACEBACK=1 shows where)\n"


@pytest.fixture
def answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Return a function: recipe values (or text) and overrides -> exit code and error message of the sft script."""

    def run(values: dict[str, Any] | str, *overrides: str) -> tuple[int, str]:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(values if isinstance(values, str) else json.dumps(values))
        capsys.readouterr()
        code = sft([str(recipe), *overrides])
        error = capsys.readouterr().err
        if error:
            assert error.startswith("error: ")
            assert error.endswith("\n" + HINT)
        return code, error.removeprefix("error: ").removesuffix("\n" + HINT)

    return run


@pytest.fixture
def values(tiny_folder: Path, task: Path, tmp_path: Path) -> dict[str, Any]:
    return small_runs.recipe_values(tiny_folder, task, tmp_path / "out", train__num_steps=1)


@pytest.fixture
def model(tiny_folder: Path, values: dict[str, Any], tmp_path: Path) -> Path:
    """The folder of the recipe's checkpoint: a copy, to be damaged."""
    values["model"]["path"] = str(tmp_path / "model")
    return shutil.copytree(tiny_folder, tmp_path / "model")


# Recipe


def test_all_errors_of_a_recipe_are_listed_at_once(answer, tmp_path):
    text = """# line 1
name: my run
model: {path: some/model, dtype: float16}
tune: {method: lora, rank: "16", targets: [text_atn]}
data: {train: [{path: a.jsonl, wieght: 2.0}], max_tokens_per_pack: 0}
optim: {learning_rate: 1.0e-4}
optim: {lr: 1.0e-4}
trian: {num_steps: 3}
"""
    code, message = answer(text, "train.packs_per_step=none")
    assert code == 2
    assert message.splitlines() == [
        f"{tmp_path / 'recipe.yaml'}: 10 errors",
        "  - name: got 'my run'; it becomes a folder: use up to 100 letters, digits, '.', '_' and '-', "
        "starting with a letter or digit",
        "  - model.dtype: got 'float16'; use bfloat16 or float32",
        "  - tune.rank: got '16', expected an integer",
        "  - tune.targets.0: 'text_atn' is not a module group; did you mean text_attn or text? "
        "(a module name is given as a regular expression, such as '.*\\.text_atn')",
        "  - data.train.0.wieght: unknown key; did you mean data.train.0.weight?",
        "  - data.max_tokens_per_pack: got 0, expected at least 1",
        "  - optim: given twice, on lines 6 and 7; keep one",
        "  - optim.learning_rate: unknown key; did you mean optim.lr?",
        "  - train.packs_per_step: got 'none', expected an integer",
        "  - trian.num_steps: unknown key; did you mean train.num_steps?",
    ]


# Model folder


def test_missing_model_folder(answer, values, tmp_path):
    values["model"]["path"] = "none"
    expected = "none: not a folder; give a local Qwen3-VL checkpoint in Hugging Face form"
    assert answer(values) == (2, expected)
    values["model"]["path"] = str(tmp_path)
    expected = f"{tmp_path}: no config.json; give a local Qwen3-VL checkpoint in Hugging Face form"
    assert answer(values) == (2, expected)
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_match_the_config(answer, values, model):
    weights = load_file(model / "model.safetensors")
    del weights["model.visual.merger.norm.bias"]
    weights["model.visual.merger.extra.bias"] = weights["model.visual.merger.norm.weight"].clone()
    weights["model.language_model.norm.weight"] = weights["model.language_model.norm.weight"][:-1].clone()
    save_file(weights, model / "model.safetensors")
    assert answer(values) == (
        2,
        f"{model}: weights do not fit config.json\n"
        "  - 1 missing weight: model.visual.merger.norm.bias\n"
        "  - 1 unexpected weight: model.visual.merger.extra.bias\n"
        "  - 1 wrong shape: model.language_model.norm.weight is (127,), config.json makes it (128,)",
    )


def test_lora_target_that_matches_nothing(answer, values, tmp_path):
    values["tune"] = {"method": "lora", "targets": [r"model\.visual\.merger\.linear_fc3"]}
    assert answer(values) == (
        2,
        "tune.targets: 'model\\\\.visual\\\\.merger\\\\.linear_fc3' matches no module; near names: "
        "model.visual.merger.linear_fc2, model.visual.merger.linear_fc1, "
        "model.visual.deepstack_merger_list.2.linear_fc2",
    )
    values["tune"]["targets"] = [".*lm_head.*", "text_attn"]
    code, message = answer(values)
    assert (code, message.split(":")[0]) == (2, "tune.targets")
    assert not (tmp_path / "out").exists()


# Data


def _write_broken_rows(folder: Path, task: Path) -> list[tuple[int, str]]:
    """Write a file of one valid row and one row with each fault; return (line, reason) of the faults."""
    shutil.copytree(task / "images", folder / "images")
    images = folder / "images"
    whole = (images / "0-0.png").read_bytes()
    (images / "empty.png").touch()
    (images / "cut.png").write_bytes(whole[:20])
    (images / "pixels-cut.png").write_bytes(whole[:-3000])
    (images / "text.png").write_text("not an image")
    Image.new("1", (20_000, 10_000)).save(images / "bomb.png")
    Image.new("L", (4020, 20)).save(images / "strip.png")
    small_runs.picture(64, 64, 0).save(folder.parent / "outside.png")
    ask = {"role": "user", "content": "?"}
    part, where = "messages[0].content[0]", "messages[0]"
    bomb = f"more than {Image.MAX_IMAGE_PIXELS} pixels, Pillow's limit against decompression bombs; shrink the file"
    faults: list[tuple[Any, str]] = [
        ('{"messages": [', "not JSON (Expecting value: line 1 column 15 (char 14)); write one object a line"),
        (
            {"text": "?"},
            'no messages, no conversations and no answer among its keys (text); write {"messages": [{"role": ..., '
            '"content": ...}, ...]} or name its columns under columns',
        ),
        ({"messages": []}, "messages is empty; write at least a question and an answer"),
        ({"messages": [{**ask, "role": "cast"}]}, f"{where}: unknown role 'cast'; use system, user, assistant, tool"),
        (
            {"messages": [{**ask, "content": [{"type": "audio", "audio": "a.wav"}]}]},
            f"{part}: unknown content type 'audio'; use text, image or video",
        ),
        ({"messages": [ask]}, "nothing to learn: no assistant message is trained; add an answer or remove loss: false"),
        (
            small_runs.row("a b " * 60, "!"),
            "sample of {tokens} tokens (0 visual) is longer than data.max_tokens_per_pack 96; raise it, lower "
            "data.max_visual_tokens_per_image, or set data.too_long to drop or shrink_media",
        ),
    ]
    of_images = {
        "images/none.png": f" images/none.png: no such file ({images / 'none.png'}); check the path and media_root",
        "images/empty.png": " images/empty.png: is empty (0 bytes); copy the file again",
        "images/bomb.png": f" images/bomb.png: 20000x10000 is {bomb}",
        "images/strip.png": " of 4020x20: its aspect ratio exceeds 200:1; crop it or pad it",
        "../outside.png": f" ../outside.png: is outside media_root {folder}; move the file into it",
        "images/text.png": " images/text.png: is not an image of a known format",
        "images/cut.png": " images/cut.png: ",
        "images/pixels-cut.png": " images/pixels-cut.png: is truncated or damaged (",
    }
    faults += [(small_runs.row("?", "!", [path]), f"{part}: image{fault}") for path, fault in of_images.items()]
    valid = small_runs.row("Which?", "This.", ["images/0-0.png"])
    small_runs.write_rows(folder / "train.jsonl", [valid, *[row for row, _ in faults]])
    return [(line, reason) for line, (_, reason) in enumerate(faults, start=2)]


def _rejected(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rejected.jsonl").read_text().splitlines()]


def test_broken_rows_are_listed_and_the_run_continues(answer, values, task, tmp_path):
    expected = _write_broken_rows(tmp_path / "data", task)
    values["data"] |= {"train": [{"path": str(tmp_path / "data" / "train.jsonl")}], "max_rejected_fraction": 0.99}
    assert answer(values) == (0, "")
    rows = _rejected(tmp_path / "out" / "run")
    assert [(row["file"], row["row"]) for row in rows] == [(values["data"]["train"][0]["path"], n) for n, _ in expected]
    for row, (_, reason) in zip(rows, expected, strict=True):
        start, _, end = reason.partition("{tokens}")
        assert row["reason"].startswith(start), row
        assert row["reason"].endswith(end) or not end, row
    assert read_metrics(tmp_path / "out" / "run" / "metrics.jsonl")[-1]["rejected"] == len(expected)


def test_too_many_broken_rows_stop_the_run_at_its_start(answer, values, task, tmp_path):
    found_in_headers = len(_write_broken_rows(tmp_path / "data", task)) - 1  # all but the one whose header is complete
    path = str(tmp_path / "data" / "train.jsonl")
    values["data"]["train"] = [{"path": path}]
    code, message = answer(values)
    lines = message.splitlines()
    assert (code, len(lines)) == (2, 5)
    assert lines[0] == (
        f"data: {found_in_headers} of 16 rows cannot be used, more than data.max_rejected_fraction 0.01; "
        "fix them or raise it"
    )
    assert all(re.match(rf"  - {path}: \d+ of 16 rows rejected \(\w+\), the first is row", line) for line in lines[1:4])
    assert re.match(r"  - and \d+ more", lines[4])
    run = tmp_path / "out" / "run"
    assert [file.name for file in run.iterdir()] == ["rejected.jsonl"]
    assert len(_rejected(run)) == found_in_headers
    # Once fixed, the same recipe starts in the same folder, and the list holds what is broken now.
    rows = (tmp_path / "data" / "train.jsonl").read_text().splitlines()
    small_runs.write_rows(tmp_path / "data" / "train.jsonl", [rows[0]] * 200 + [rows[2]])
    assert answer(values) == (0, "")
    assert [row["row"] for row in _rejected(run)] == [201]


def test_too_many_rows_that_break_in_decoding_stop_the_run(answer, values, task, tmp_path):
    shutil.copytree(task, tmp_path / "data")
    for name in ("0-0", "2-0"):
        file = tmp_path / "data" / "images" / f"{name}.png"
        file.write_bytes(file.read_bytes()[:-3000])
    path = str(tmp_path / "data" / "train.jsonl")
    values["data"] |= {"train": [{"path": path}], "max_rejected_fraction": 0.1}
    values["train"] = {"num_epochs": 1, "packs_per_step": 2}
    code, message = answer(values)
    expected = "data: 2 of 11 rows cannot be used, more than data.max_rejected_fraction 0.1; fix them or raise it"
    assert (code, message.splitlines()[0]) == (2, expected)
    assert sorted(row["row"] for row in _rejected(tmp_path / "out" / "run")) == [1, 3]


def test_broken_held_out_rows_are_listed_and_counted_apart(answer, values, task, tmp_path):
    shutil.copytree(task, tmp_path / "data")
    file = tmp_path / "data" / "images" / "0-0.png"
    file.write_bytes(file.read_bytes()[:-3000])
    path = str(tmp_path / "data" / "eval.jsonl")
    values["data"] |= {"eval": [{"path": path}], "max_rejected_fraction": 0.3}
    assert answer(values) == (0, "")
    assert [(row["file"], row["row"]) for row in _rejected(tmp_path / "out" / "run")] == [(path, 1)]
    assert json.loads((tmp_path / "out" / "run" / "eval.jsonl").read_text())["label_tokens"] > 0
    shutil.rmtree(tmp_path / "out")
    values["data"]["max_rejected_fraction"] = 0.2
    code, message = answer(values)
    expected = "data: 1 of 4 rows cannot be used, more than data.max_rejected_fraction 0.2; fix them or raise it"
    assert (code, message.splitlines()[0]) == (2, expected)
    # It stopped after the last checkpoint, so nothing trained is lost because of rows that were never trained on.
    assert small_runs.final_tensors(tmp_path / "out" / "run")


def test_file_without_a_usable_row(answer, values, tmp_path):
    path = small_runs.write_rows(tmp_path / "data" / "train.jsonl", [{"messages": [{"role": "user", "content": "?"}]}])
    values["data"]["train"] = [{"path": str(path)}]
    values["data"]["max_rejected_fraction"] = 1.0
    assert answer(values) == (
        2,
        f"{path}: nothing to learn from, none of 1 rows can be used; fix the rows\n"
        f"  - {path}:1: nothing to learn: no assistant message is trained; add an answer or remove loss: false",
    )
    run = tmp_path / "out" / "run"
    assert [file.name for file in run.iterdir()] == ["rejected.jsonl"]
    assert [(row["file"], row["row"]) for row in _rejected(run)] == [(str(path), 1)]
    path.write_text("")
    assert answer(values) == (2, f"{path}: nothing to learn from, none of 0 rows can be used; fix the rows")
    assert list(run.iterdir()) == []


def test_missing_data_files(answer, values, task, tmp_path):
    values["data"]["train"] = [{"path": str(tmp_path / "none.jsonl")}]
    assert answer(values) == (2, f"{tmp_path / 'none.jsonl'}: no such file; check the paths under data")
    values["data"]["train"] = [{"path": str(task / "train.jsonl"), "media_root": str(tmp_path / "none")}]
    expected = f"{task / 'train.jsonl'}: media_root {tmp_path / 'none'} is not a folder; check the paths under data"
    assert answer(values) == (2, expected)


# Output


def test_output_folder_of_another_run(answer, values, tmp_path):
    assert answer(values) == (0, "")
    run = tmp_path / "out" / "run"
    expected = (
        f"{run}: holds another run\n  - optim.lr: 0.001 there, 2e-05 here\n"
        f"choose another name, with tune.start_from: {run} to start from what was trained here; or set "
        "checkpoint.allow_changes: [optim.lr] to continue this run with the changes"
    )
    assert answer(values, "optim.lr=2e-5") == (2, expected)
    assert answer(values, "checkpoint.resume=never")[0] == 2
    assert answer(values) == (0, "")


def test_output_folder_that_cannot_be_made(answer, values, tmp_path):
    (tmp_path / "out").write_text("a file")
    code, message = answer(values)
    assert code in (1, 2)
    assert str(tmp_path / "out") in message


def test_traceback_is_shown_on_request(answer, values, monkeypatch):
    monkeypatch.setenv("QWEN3VL_TRACEBACK", "1")
    values["model"]["path"] = "nowhere"
    with pytest.raises(ValueError, match=r"^nowhere: not a folder"):
        answer(values)
