"""Write a small data set with a row for nearly every check of the inspection."""

from pathlib import Path
from typing import Any

from qwen3vl_train.config import Recipe
from tests.helpers.small_runs import make_recipe, picture, row, write_rows

ATTACK = "</script><script>document.title='attacked'</script><img src=x onerror=\"document.title='attacked'\">"
PLAIN, BOXES, PIXEL, UNIT, XYWH, SCRIPT, MARKUP, EMPTY, THINK, TWIN, REPEAT, NO_TWIN, WEIGHTED, SHRUNK, ENLARGED = (
    range(1, 16)
)
"""Lines of train.jsonl, counted from 1."""


def training_rows() -> list[dict[str, Any]]:
    weighted = row("Several turns?", "first answer")
    weighted["messages"] += [
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "heavy answer ü数😀", "loss_weight": 2.5},
        {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": "light answer", "loss": False},
    ]
    return [
        row("What is this?", "a plain answer", ["wide.png"]),
        row("Where?", '[{"bbox_2d": [100, 250, 600, 750], "label": "<b>cup</b>"}]', ["wide.png"]),
        row("Where?", '{"bbox_2d": [10, 20, 1300, 400]}', ["wide.png"]),
        row("Where?", '{"bbox_2d": [0.1, 0.2, 0.5, 0.75]}', ["wide.png"]),
        row("Where?", '{"bbox_2d": [600, 700, 90, 80]}', ["wide.png"]),
        row(ATTACK, f"no {ATTACK}", ["wide.png"]),
        row("Is <box> an <|image_pad|> or <|im_end|>?", "neither"),
        row("Say nothing.", ""),
        row("Think.", "<think>\nwhy\n</think>\n\nbecause"),
        row("Twins?", "yes", ["one.png"]),
        row("Twins?", "yes", ["copy.png"]),
        row("Twins?", "yes", ["other.png"]),
        weighted,
        row("How large?", "large", ["large.png"]),
        row("How small?", "small", ["small.png"]),
    ]


BROKEN = [
    row("gone", "gone", ["missing.png"]),
    row("gone too", "gone", ["missing-too.png"]),
    "not json",
    {"messages": [{"role": "user", "content": "no answer"}]},
]


def write_finding_rows(folder: Path) -> Path:
    """Write 15 usable training rows and 4 broken ones, 8 of text, and 2 held out of which one is a training row."""
    for name, size, seed in (
        ("wide", (128, 64), 1), ("one", (64, 64), 2), ("copy", (64, 64), 2), ("other", (64, 64), 3),
        ("large", (640, 480), 4), ("small", (12, 12), 5),
    ):  # fmt: skip
        picture(*size, seed).save(folder / f"{name}.png")
    rows = training_rows()
    write_rows(folder / "train.jsonl", rows + BROKEN)
    write_rows(folder / "text.jsonl", [row(f"Is {number} even?", "yes" if number % 2 else "no") for number in range(8)])
    write_rows(folder / "eval.jsonl", [rows[TWIN - 1], row("Only here?", "yes", ["wide.png"])])
    return folder


def finding_rows_recipe(model: Path, folder: Path, **changes: Any) -> Recipe:
    """Return a recipe in which an image takes 4 to 24 visual tokens. changes: whole sections to replace."""
    values = {
        "name": "looked-at",
        "data": {
            "train": [{"path": str(folder / "train.jsonl")}, {"path": str(folder / "text.jsonl"), "weight": 2.0}],
            "eval": [{"path": str(folder / "eval.jsonl")}],
            "max_tokens_per_pack": 512,
            "max_visual_tokens_per_image": 24,
            "min_visual_tokens_per_image": 4,
            "num_workers": 0,
        },
        "train": {"num_epochs": 2, "packs_per_step": 2},
        **changes,
    }
    return make_recipe(model, folder, folder / "runs", **values)
