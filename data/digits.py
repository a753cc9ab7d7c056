"""Write scikit-learn's handwritten digits as a data set of images and conversations: `python data/digits.py --out DIR`.

1,797 real scans of handwritten digits (UCI, 8x8 grey levels), each enlarged to 64x64 and stored once as a PNG:

    DIR/images/0001.png ... 1797.png
    DIR/train.jsonl, eval.jsonl               "Which digit is this?" -> "7"
    DIR/words-train.jsonl, words-eval.jsonl   "Is it even or odd, and what is its name?" -> "odd, seven"
    DIR/shuffled-train.jsonl                  a control: the answers of train.jsonl in random order

1,500 are for training and 297 held out, with the same share of every digit in both. The scans come from 13 people,
who are on both sides of the split: held-out accuracy measures new scans, not new handwriting.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SEED = 0
NUM_EVAL = 297
IMAGE_SIZE = 64
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def png_bytes(scan: np.ndarray) -> bytes:
    """Turn one (8, 8) scan of levels 0..16 into a 64x64 grey PNG, enlarged with the bicubic filter."""
    levels = np.rint(scan * (255 / 16)).astype(np.uint8)
    out = BytesIO()
    Image.fromarray(levels).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).save(out, format="PNG")
    return out.getvalue()


def image_path(index: int) -> str:
    return f"images/{index + 1:04d}.png"


def conversation(image: str, question: str, answer: str) -> dict:
    """Build one row: an image and a question, and the answer to learn."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def which_digit(index: int, digit: int) -> dict:
    return conversation(image_path(index), "Which digit is this?", str(digit))


def in_words(index: int, digit: int) -> dict:
    answer = f"{'odd' if digit % 2 else 'even'}, {NAMES[digit]}"
    return conversation(image_path(index), "Is it even or odd, and what is its name?", answer)


def tables(digits: np.ndarray) -> dict[str, list[dict]]:
    """Build the rows of every file, always the same ones. digits: (1797,) the digit of each scan."""
    train, held_out = train_test_split(
        np.arange(len(digits)), test_size=NUM_EVAL, stratify=digits, random_state=SEED, shuffle=True
    )
    shuffled = np.random.default_rng(SEED).permutation(digits[train])  # one in ten is right by chance
    return {
        "train.jsonl": [which_digit(i, int(digits[i])) for i in train],
        "eval.jsonl": [which_digit(i, int(digits[i])) for i in held_out],
        "words-train.jsonl": [in_words(i, int(digits[i])) for i in train],
        "words-eval.jsonl": [in_words(i, int(digits[i])) for i in held_out],
        "shuffled-train.jsonl": [which_digit(i, int(digit)) for i, digit in zip(train, shuffled, strict=True)],
    }


def write_if_changed(file: Path, content: bytes) -> bool:
    """Write `file` unless it holds `content`, and return whether it was written. Never leaves an incomplete file."""
    if file.is_file() and file.read_bytes() == content:
        return False
    temporary = file.with_name(file.name + ".part")
    temporary.write_bytes(content)
    os.replace(temporary, file)
    return True


def jsonl_bytes(rows: Iterable[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_digits(folder: Path) -> tuple[int, int]:
    """Write the data set, unless it is there, and return (images written, tables written)."""
    data: Any = load_digits()
    (folder / "images").mkdir(parents=True, exist_ok=True)
    num_images = sum(write_if_changed(folder / image_path(i), png_bytes(scan)) for i, scan in enumerate(data.images))
    num_tables = sum(write_if_changed(folder / name, jsonl_bytes(rows)) for name, rows in tables(data.target).items())
    return num_images, num_tables


def run_script(description: str, write: Callable[[Path], dict[str, int]]) -> None:
    """Write to the folder given by --out, and print what was written. write: returns how many files of each kind."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    folder = parser.parse_args().out
    written = write(folder)
    counts = " and ".join(f"{number} {name}" for name, number in written.items())
    print(f"{folder}: {f'wrote {counts}' if any(written.values()) else 'complete, nothing to do'}")


if __name__ == "__main__":
    run_script(
        "Write scikit-learn's handwritten digits as PNG images and JSONL rows.",
        lambda folder: dict(zip(("images", "tables"), write_digits(folder), strict=True)),
    )
