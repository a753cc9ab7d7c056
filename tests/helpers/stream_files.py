"""Streams for the tests of the loaders: rows with a picture each, and a broadcast within one process."""

import json
from pathlib import Path

from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.packing.index import LengthRule
from qwen3vl_train.data.packing.mixture import InOrder, Part, Shuffled
from qwen3vl_train.data.packing.plan import PackLimits, random_stream
from qwen3vl_train.data.packing.stream import StreamLoader
from qwen3vl_train.data.rows.parse import RowRules
from qwen3vl_train.data.sources import JsonlSource
from qwen3vl_train.data.sources.streams import FileStream
from tests.helpers import small_runs

NUM_ROWS, NUM_TEXTS = 70, 12


class Broadcast:
    """Keep what rank 0 sends for ranks that run after it."""

    def __init__(self) -> None:
        self.messages: dict[str, str] = {}

    def send(self, key, message) -> None:
        assert key not in self.messages
        self.messages[key] = json.dumps(message)

    def receive(self, key):
        return json.loads(self.messages[key])


def write_folder(folder: Path) -> Path:
    """Write `s.jsonl`, 70 rows of uneven lengths, a picture `N.png` with each; and `k.jsonl`, 12 rows of text."""
    folder.mkdir(parents=True)
    random = random_stream(3)
    rows = []
    for number in range(NUM_ROWS):
        size = [(32, 32), (64, 32), (64, 64)][random.randint(3)]
        small_runs.picture(*size, seed=number).save(folder / f"{number}.png")
        question = f"row {number} " + "word " * random.randint(0, 20)
        rows.append(small_runs.row(question, f"answer {number}", [f"{number}.png"]))
    small_runs.write_rows(folder / "s.jsonl", rows)
    small_runs.write_rows(folder / "k.jsonl", [small_runs.row(f"text {n}", "x " * n) for n in range(NUM_TEXTS)])
    return folder


def parts_of(folder: Path, weights=(1.0, 1.0)) -> list[Part]:
    stream = InOrder(FileStream("s", [str(folder / "s.jsonl")], str(folder), RowRules()))
    return [Part(stream, weights[0]), Part(Shuffled(JsonlSource(folder / "k.jsonl", folder)), weights[1])]


def stream_loader(folder: Path, collator: MultimodalCollator, weights=(1.0, 1.0), **changes) -> StreamLoader:
    """Two epochs in steps of 5 packs, the rows planned 16 at a time."""
    options = {"packs_per_step": 5, "limits": PackLimits(160), "seed": 5, "num_epochs": 2, "window": 16, **changes}
    return StreamLoader(parts_of(folder, weights), collator, LengthRule(160), **options)


def names_of(steps) -> list[str]:
    return [name for step in steps for pack in step.packs for name in pack.sample_ids]
