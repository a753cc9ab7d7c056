"""Rows and loaders for the tests of packing: the same rows indexed and streamed, and a broadcast within one process."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.packing.index import Index, LengthRule, build_index
from qwen3vl_train.data.packing.loader import Loader
from qwen3vl_train.data.packing.mixture import InOrder, Numbered, Part
from qwen3vl_train.data.packing.plan import PackLimits, random_stream
from qwen3vl_train.data.packing.stream import StreamedWindows
from qwen3vl_train.data.packing.windows import IndexedWindows
from qwen3vl_train.data.rows.parse import RowRules
from qwen3vl_train.data.sources import JsonlSource
from qwen3vl_train.data.sources.streams import FileStream
from tests.helpers import small_runs

KINDS = ("indexed", "streamed")
MAX_TOKENS = 160
RULE = LengthRule(MAX_TOKENS)
NUM_ROWS = {"s.jsonl": 70, "t.jsonl": 9, "k.jsonl": 12}
EVERY_ROW = Counter(f"{file}:{row}" for file, count in NUM_ROWS.items() for row in range(1, count + 1))


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
    """Write rows of uneven lengths.

    `s.jsonl`: 70 rows with a picture `N.png` each, every fifth with `extra.png`, too. `t.jsonl`, `k.jsonl`: text.
    """
    folder.mkdir(parents=True)
    random = random_stream(3)
    small_runs.picture(64, 32, seed=99).save(folder / "extra.png")
    rows = []
    for number in range(NUM_ROWS["s.jsonl"]):
        size = [(32, 32), (64, 32), (64, 64)][random.randint(3)]
        small_runs.picture(*size, seed=number).save(folder / f"{number}.png")
        question = f"row {number} " + "word " * random.randint(0, 20)
        images = [f"{number}.png"] + ["extra.png"] * (number % 5 == 0)
        rows.append(small_runs.row(question, f"answer {number}", images))
    small_runs.write_rows(folder / "s.jsonl", rows)
    for name in ("t.jsonl", "k.jsonl"):
        texts = [small_runs.row(f"text {number}", "x " * number) for number in range(NUM_ROWS[name])]
        small_runs.write_rows(folder / name, texts)
    return folder


def sources_of(folder: Path) -> list[JsonlSource]:
    return [JsonlSource(folder / name, folder) for name in NUM_ROWS]


def parts_of(folder: Path, weights=(1.0, 1.0), shuffle: bool = True) -> list[Part]:
    stream = InOrder(FileStream("s", [str(folder / "s.jsonl"), str(folder / "t.jsonl")], str(folder), RowRules()))
    return [Part(stream, weights[0]), Part(Numbered(JsonlSource(folder / "k.jsonl", folder), shuffle), weights[1])]


def make_loader(
    kind: str,
    folder: Path,
    collator: MultimodalCollator,
    weights: tuple[float, float] = (1.0, 1.0),
    *,
    index: Index | None = None,
    rule: LengthRule = RULE,
    seed: int = 5,
    window: int = 32,
    broadcast: Broadcast | None = None,
    rank: int = 0,
    world_size: int = 1,
    **changes,
) -> Loader:
    """Return a loader of two epochs in steps of 5 packs; weights: of the files of pictures, and of `k.jsonl`."""
    num_workers, shuffle = changes.get("num_workers", 0), changes.get("shuffle", True)
    if kind == "indexed":
        sources = sources_of(folder)
        index = index or build_index(sources, collator, rule)
        weighted = list(zip(sources, (weights[0], weights[0], weights[1]), strict=True))
        producer = IndexedWindows(weighted, index, seed=seed, shuffle=shuffle, size=window)
    else:
        producer = StreamedWindows(
            parts_of(folder, weights, shuffle), collator, rule, seed=seed, size=window,
            broadcast=broadcast, is_scanner=rank == 0, in_worker=num_workers > 0,
        )  # fmt: skip
    options = {"packs_per_step": 5, "limits": PackLimits(rule.max_tokens), "num_epochs": 2, **changes}
    return Loader(producer, collator, data_rank=rank, data_world_size=world_size, **options)


def names_of(steps) -> list[str]:
    return [name for step in steps for pack in step.packs for name in pack.sample_ids]


def plan_of(steps) -> list[tuple]:
    """Return all that must be the same on every rank and after every resume, without the built packs."""
    return [
        (step.epoch, step.num_packs, step.num_shrunk, step.num_seen, step.num_dropped, step.plan_hash,
         {**step.state, "fingerprint": None})
        for step in steps
    ]  # fmt: skip


def contents_of(steps) -> list[tuple]:
    """Return `plan_of`, and the names of the samples of every pack."""
    steps = list(steps)
    packs = [(step.pack_numbers, [pack.sample_ids for pack in step.packs]) for step in steps]
    return list(zip(plan_of(steps), packs, strict=True))


def assert_same_packs(steps, wanted):
    for step, same in zip(steps, wanted, strict=True):
        for pack, other in zip(step.packs, same.packs, strict=True):
            for field in ("input_ids", "labels", "positions", "pixel_values", "grid_thw", "visual_pos_mask"):
                assert torch.equal(getattr(pack, field), getattr(other, field)), field
            assert pack.vision_slices_per_seq == other.vision_slices_per_seq


def saved_state(state: dict[str, Any]) -> dict[str, Any]:
    """The state as a checkpoint gives it back."""
    return json.loads(json.dumps(state))
