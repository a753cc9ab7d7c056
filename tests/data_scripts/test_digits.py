import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import digits
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tests.helpers import small_runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    assert digits.write_digits(folder) == (1797, 5)
    return folder


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def image_of(row: dict) -> str:
    return row["messages"][0]["content"][0]["image"]


def answer_of(row: dict) -> str:
    return row["messages"][1]["content"]


def test_rows_are_conversations_about_images_that_exist(folder: Path):
    expected = small_runs.row("Which digit is this?", "4", ["images/0651.png"])
    assert rows(folder / "train.jsonl")[0] == expected
    for name, count in (("train", 1500), ("eval", 297), ("words-train", 1500), ("words-eval", 297)):
        table = rows(folder / f"{name}.jsonl")
        assert len(table) == count
        assert all((folder / image_of(row)).is_file() for row in table)
    assert len(list((folder / "images").iterdir())) == 1797


def test_answers_are_those_of_the_scans(folder: Path):
    scans: Any = load_digits()
    truth = {digits.image_path(i): int(digit) for i, digit in enumerate(scans.target)}
    for name in ("train", "eval"):
        assert all(answer_of(row) == str(truth[image_of(row)]) for row in rows(folder / f"{name}.jsonl"))
        words = rows(folder / f"words-{name}.jsonl")
        assert [image_of(row) for row in words] == [image_of(row) for row in rows(folder / f"{name}.jsonl")]
        for row in words:
            parity, digit_name = answer_of(row).split(", ")
            assert (digits.NAMES.index(digit_name), parity == "odd") == (truth[image_of(row)], truth[image_of(row)] % 2)


def test_split_is_disjoint_and_has_every_digit_on_both_sides(folder: Path):
    train, held_out = rows(folder / "train.jsonl"), rows(folder / "eval.jsonl")
    assert len({image_of(row) for row in train} | {image_of(row) for row in held_out}) == 1797
    counts = Counter(answer_of(row) for row in held_out)
    assert len(counts) == 10
    assert 28 <= min(counts.values()) <= max(counts.values()) <= 31


def test_control_has_the_same_answers_on_other_images(folder: Path):
    train, shuffled = rows(folder / "train.jsonl"), rows(folder / "shuffled-train.jsonl")
    assert [image_of(row) for row in train] == [image_of(row) for row in shuffled]
    assert Counter(map(answer_of, train)) == Counter(map(answer_of, shuffled))
    still_right = sum(answer_of(a) == answer_of(b) for a, b in zip(train, shuffled, strict=True))
    assert 100 < still_right < 200, "chance is 150 of 1500"


def test_images_show_the_scan(folder: Path):
    scans: Any = load_digits()
    scan = scans.images[650]
    with Image.open(folder / "images" / "0651.png") as image:
        assert (image.size, image.mode) == ((64, 64), "L")
        shrunk = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=float)
    # Enlarging smooths a little: 0.984 was the least over 300 scans.
    assert np.corrcoef(shrunk.ravel(), scan.ravel())[0, 1] > 0.98


def test_second_run_writes_only_what_is_missing(folder: Path):
    assert digits.write_digits(folder) == (0, 0)
    (folder / "images" / "0007.png").write_bytes(b"")
    (folder / "images" / "0008.png").unlink()
    table = folder / "eval.jsonl"
    whole = table.read_bytes()
    table.write_bytes(whole[:1000])
    assert digits.write_digits(folder) == (2, 1)
    assert table.read_bytes() == whole
    assert digits.write_digits(folder) == (0, 0)


def test_command_prints_what_it_did(tmp_path: Path):
    def run() -> str:
        command = [sys.executable, digits.__file__, "--out", str(tmp_path / "digits")]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert run() == f"{tmp_path / 'digits'}: wrote 1797 images and 5 tables\n"
    assert run() == f"{tmp_path / 'digits'}: complete, nothing to do\n"
