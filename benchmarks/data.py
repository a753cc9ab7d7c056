"""Measure what the data path costs and how full its packs are: `python benchmarks/data.py [images index packs stream]`.

Prints a table for each part, in Markdown. Times of `images` are CPU seconds of one core of this process; those of
`index` and `stream` are wall seconds. All data is made in a temporary folder; nothing is downloaded.
"""

import argparse
import json
import os
import runpy
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.media.image import PATCH, load_rgb, resize_to_patches, smart_resize
from qwen3vl_train.data.packing.index import LengthRule, build_index
from qwen3vl_train.data.packing.loader import Loader
from qwen3vl_train.data.packing.mixture import InOrder, Part
from qwen3vl_train.data.packing.plan import (
    CostModel,
    FamilyCosts,
    PackLimits,
    arrange,
    plan_figures,
    plan_packs,
    random_stream,
)
from qwen3vl_train.data.packing.stream import StreamedWindows
from qwen3vl_train.data.rows.parse import RowRules
from qwen3vl_train.data.sources import JsonlSource
from qwen3vl_train.data.sources.streams import FileStream

ROOT = Path(__file__).resolve().parents[1]
TOKEN_PIXELS = 32 * 32
NUM_RANKS = 8


def table(head: list[str], lines: list[list[str]]) -> None:
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    print("\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n", flush=True)


def photo(width: int, height: int) -> bytes:
    """Return a JPEG of quality 90 that is tiled with two real photographs."""
    tiles = [Image.fromarray(image) for image in load_sample_images().images]
    picture = Image.new("RGB", (width, height))
    step_x, step_y = tiles[0].size
    for number, (x, y) in enumerate((x, y) for y in range(0, height, step_y) for x in range(0, width, step_x)):
        picture.paste(tiles[number % 2], (x, y))
    out = BytesIO()
    picture.save(out, "JPEG", quality=90)
    return out.getvalue()


def milliseconds(call: Callable[[], Any], times: int = 60) -> float:
    """Return the time of a call in the best of three rounds, since other work on the machine only adds to it."""
    call()
    rounds = []
    for _ in range(3):
        start = time.process_time()
        for _ in range(times):
            call()
        rounds.append((time.process_time() - start) / times * 1e3)
    return min(rounds)


def images() -> None:
    """Measure decoding, resizing and cutting into patches, on one core."""
    torch.set_num_threads(1)
    lines = []
    cases = {
        "1 megapixel, its own size": (1184, 896, 1036),
        "1 megapixel, at most 1,000 visual tokens": (1184, 896, 1000),
        "1 megapixel, at most 256 visual tokens": (1184, 896, 256),
        "640x427, at most 256 visual tokens": (640, 427, 256),
    }
    for name, (width, height, most) in cases.items():
        data = photo(width, height)
        rows, cols = smart_resize(height, width, min_pixels=64 * TOKEN_PIXELS, max_pixels=most * TOKEN_PIXELS)
        grid = (rows // PATCH, cols // PATCH)
        rgb = load_rgb(data)
        decode = milliseconds(lambda data=data: load_rgb(data))
        cut = milliseconds(lambda rgb=rgb, grid=grid: resize_to_patches(rgb, grid))
        both = milliseconds(lambda data=data, grid=grid: resize_to_patches(load_rgb(data), grid))
        tokens = rows * cols // TOKEN_PIXELS
        lines.append([name, f"{tokens:,}", f"{decode:.2f}", f"{cut:.2f}", f"{1e3 / both:.0f}"])
    table(["JPEG", "visual tokens", "decode ms", "resize and cut ms", "images a second a core"], lines)


def tiny_collator(scratch: Path, **limits: Any) -> MultimodalCollator:
    runpy.run_path(str(ROOT / "data" / "tiny_checkpoint.py"))["write_tiny_checkpoint"](scratch / "tiny")
    return MultimodalCollator.from_pretrained(scratch / "tiny", **limits)


def write_image_rows(folder: Path, num_rows: int) -> Path:
    """Write rows of one image each, each image in a file of its own, of different sizes."""
    random = random_stream(0)
    blanks = []
    for _ in range(64):
        out = BytesIO()
        Image.new("RGB", (int(random.randint(200, 2000)), int(random.randint(200, 2000)))).save(out, "JPEG")
        blanks.append(out.getvalue())
    with (folder / "rows.jsonl").open("w") as rows:
        for number in range(num_rows):
            name = f"{number // 1000:04d}/{number:07d}.jpg"
            if number % 1000 == 0:
                (folder / name).parent.mkdir()
            (folder / name).write_bytes(blanks[number % 64])
            question = {"type": "text", "text": f"What is in picture {number}, and how many of it are there?"}
            content = [{"type": "image", "image": name}, question]
            answer = "There is nothing in it but a dark colour, from one side of the frame to the other. " * 2
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
            rows.write(json.dumps({"messages": messages}) + "\n")
    return folder / "rows.jsonl"


def index(scratch: Path, num_rows: int) -> None:
    """Measure the index of new rows, which reads every row and the header of its image, and of unchanged rows."""
    folder = scratch / "index"
    folder.mkdir()
    file = write_image_rows(folder, num_rows)
    collate = tiny_collator(scratch, max_visual_tokens_per_image=1280)
    timed = []
    for _ in range(4):
        start = time.perf_counter()
        source = JsonlSource(file, folder)
        opened = time.perf_counter() - start
        found = build_index(
            [source], collate, LengthRule(8192), num_workers=len(os.sched_getaffinity(0)),
            cache_folder=scratch / "cache",
        )  # fmt: skip
        assert found.num_usable == num_rows, found.rejects[:3]
        timed.append((time.perf_counter() - start, opened))
    again = sorted(timed[1:])[1]
    lines = [
        [name, f"{opened:.2f}", f"{seconds:.2f}"]
        for name, (seconds, opened) in (("first time", timed[0]), ("again (median of 3)", again))
    ]
    table([f"index of {num_rows:,} image rows", "of which reading the file, s", "seconds"], lines)


def ragged(num_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens, patches and patch pairs of rows like those of mixed data.

    A row has zero to four images of 64 to 1,280 tokens each (log-uniform), and text of 20 to 3,000 tokens (log-normal,
    median 121).
    """
    random = random_stream(0)
    pictures = random.choice([0, 1, 1, 1, 1, 1, 1, 1, 2, 4], num_rows)
    tokens = np.clip(random.lognormal(4.8, 0.9, num_rows).astype(np.int64), 20, 3000)
    patches, pairs = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, count in enumerate(pictures.tolist()):
        visual = np.exp(random.uniform(np.log(64), np.log(1280), count)).astype(np.int64)
        tokens[row] += visual.sum()
        patches[row], pairs[row] = 4 * visual.sum(), (16 * visual**2).sum()
    return np.minimum(tokens, 8192), patches, pairs


def packs() -> None:
    """Measure fill and balance of packs of 8,192 tokens, 8 packs a step on 8 ranks."""
    num_rows = 10_000
    tokens, patches, pairs = ragged(num_rows)
    work = CostModel().work(tokens, patches, pairs)
    lines = []
    for window in (num_rows, 2048):
        for limits in (PackLimits(8192), PackLimits(8192, patches=28_672, sequences=32)):
            filled: list[int] = []
            loads: list[int] = []
            start_time = time.perf_counter()
            for start in range(0, num_rows, window):
                rows = slice(start, start + window)
                found = plan_packs(FamilyCosts.from_rows(tokens[rows], patches[rows], work[rows]), limits)
                sums = [int(work[rows][pack].sum()) for pack in found]
                carry_over = -len(loads) % NUM_RANKS
                for number in arrange(sums, packs_per_step=NUM_RANKS, carry_over=carry_over, seed=(0, start)):
                    filled.append(int(tokens[rows][found[number]].sum()))
                    loads.append(sums[number])
            seconds = time.perf_counter() - start_time
            figures = plan_figures(
                filled, loads, max_tokens=limits.tokens, packs_per_step=NUM_RANKS, world_size=NUM_RANKS
            )
            budgets = "tokens" if limits.patches is None else "tokens, patches, sequences"
            name = "planned at once" if window == num_rows else f"window of {window:,}"
            lines.append(
                [f"{name}, {budgets}", f"{len(filled):,}", f"{100 * figures.fill:.2f}%", f"{figures.balance:.3f}",
                 f"{figures.worst_balance:.3f}", f"{seconds:.1f}"]
            )  # fmt: skip
    head = [f"{num_rows:,} ragged rows", "packs", "filled", "max / mean of 8 ranks", "worst step", "seconds"]
    table(head, lines)


def resident_mib() -> float:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024


def write_text_rows(file: Path, num_rows: int) -> None:
    random = random_stream(0)
    words = np.array([
        "the", "a", "photo", "of", "shows", "dog", "cat", "lake", "tree", "house", "sky", "old", "new", "red", "green",
        "and", "in", "on", "with",
    ])  # fmt: skip
    lengths = random.randint(5, 60, num_rows)
    with file.open("w") as out:
        for number in range(num_rows):
            answer = " ".join(words[random.randint(0, len(words), lengths[number])].tolist())
            messages = [
                {"role": "user", "content": f"Tell me about {number}."}, {"role": "assistant", "content": answer},
            ]  # fmt: skip
            out.write(json.dumps({"messages": messages}) + "\n")


def stream(scratch: Path, num_rows: int) -> None:
    """Measure the memory of packing a long file through a window of 2,048 rows, in one process."""
    file = scratch / "stream.jsonl"
    write_text_rows(file, num_rows)
    collate = tiny_collator(scratch)
    source = FileStream(str(file), [str(file)], str(scratch), RowRules())
    windows = StreamedWindows([Part(InOrder(source), 1.0)], collate, LengthRule(8192), seed=0)
    loader = Loader(windows, collate, packs_per_step=NUM_RANKS, limits=PackLimits(8192), num_epochs=1)
    lines, start = [], time.perf_counter()
    reports = [num_rows * share // 100 for share in (5, 25, 50, 75, 100)]
    for step in loader:
        if reports and step.num_seen >= reports[0]:
            seconds = time.perf_counter() - start
            rate = step.num_seen / seconds
            lines.append([f"{step.num_seen:,}", f"{resident_mib():,.0f}", f"{seconds:.0f}", f"{rate:,.0f}"])
            reports.pop(0)
    table(["rows streamed", "resident MiB", "seconds", "rows a second"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    names = ("images", "index", "packs", "stream")
    parser.add_argument("parts", nargs="*", default=names, help=f"of {', '.join(names)}; default: all")
    parser.add_argument("--index-rows", type=int, default=100_000)
    parser.add_argument("--stream-rows", type=int, default=1_000_000)
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(names):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; use {', '.join(names)}")
    with TemporaryDirectory() as folder:
        scratch = Path(folder)
        parts: dict[str, Callable[[], None]] = {
            "images": images,
            "index": lambda: index(scratch, arguments.index_rows),
            "packs": packs,
            "stream": lambda: stream(scratch, arguments.stream_rows),
        }
        for name in arguments.parts:
            parts[name]()


if __name__ == "__main__":
    main()
