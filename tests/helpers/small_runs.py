"""Small training runs for the tests: a task of pictures and text-only rows, recipes for it, the files of a run."""

import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from qwen3vl_train.batch import PackedBatch
from qwen3vl_train.checkpoint.manifest import latest_checkpoint
from qwen3vl_train.checkpoint.writer import read_tensors
from qwen3vl_train.config import Recipe, recipe_from_dict
from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.packing.loader import StepPacks
from qwen3vl_train.data.packing.plan import PlanHash
from qwen3vl_train.data.rows.parse import dataset_of
from qwen3vl_train.data.sources import JsonlSource
from qwen3vl_train.dist.ranks import Ranks
from qwen3vl_train.dist.tensors import global_shape
from qwen3vl_train.model.costs import FlopsCounter
from qwen3vl_train.model.qwen3vl import Qwen3VLForConditionalGeneration
from qwen3vl_train.parallel.ddp import Replicated
from qwen3vl_train.parallel.optim import MasterAdamW
from qwen3vl_train.tracking.metrics import StepTally, read_metrics
from qwen3vl_train.train.build import build_model
from qwen3vl_train.train.loop import train
from qwen3vl_train.train.step import StepOptions, train_step

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
TEXT_ONLY, ONE_IMAGE, TWO_IMAGES = 4, 0, 5  # rows of the task

# Sizes of pictures in each row: none, one, or two. Row costs differ, so that ranks get uneven work.
_PICTURES = [[(64, 64)], [], [(96, 64)], [], [], [(64, 64), (128, 96)], [(64, 96)], [], [(160, 128)], [], [(64, 64)]]
_ANSWERS = ["one", "two", "No, it is not.", "seven", "Yes.", "odd, and then even", "twelve", "4", "left", "right", "0"]


def write_rows(file: Path, rows: list[Any]) -> Path:
    """Write JSONL; a string is written as it is, for lines that are not JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


def row(question: str, answer: str, images: list[str] | None = None) -> dict[str, Any]:
    parts: list[dict[str, str]] = [{"type": "image", "image": image} for image in images or []]
    content = [*parts, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def picture(width: int, height: int, seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def write_task(folder: Path) -> Path:
    """Write `train.jsonl` (11 rows: 6 with pictures, 5 without), `eval.jsonl` (its first 4 rows) and the pictures."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number, (sizes, answer) in enumerate(zip(_PICTURES, _ANSWERS, strict=True)):
        names = [f"images/{number}-{place}.png" for place in range(len(sizes))]
        for place, (name, size) in enumerate(zip(names, sizes, strict=True)):
            picture(*size, seed=10 * number + place).save(folder / name)
        rows.append(row(f"Question {number}?", answer, names))
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "eval.jsonl", rows[:4])
    return folder


FULL = {"method": "full", "train": ["all"]}
LORA = {
    "method": "lora",
    "rank": 4,
    "alpha": 8,
    "dropout": 0.1,
    "targets": ["vision_attn", "vision_mlp", "merger", "deepstack", "text_attn", "text_mlp"],
}

# Rows of two tokens beside adapters.
ROWS = {"method": "lora", "rank": 4, "targets": ["text_attn", "merger"], "new_tokens": ["<|box_start|>", "<|box_end|>"]}
# Adapters of two ranks, and whole modules beside them.
MIXED = {
    "method": "lora",
    "rank": {"text": 4, "vision": 3},
    "alpha": 8,
    "dropout": 0.1,
    "targets": ["vision_attn", "text_attn"],
    "full": ["merger", "deepstack", "text_embed", "lm_head"],
}


def recipe_values(model: Path, task: Path, out: Path, **overrides: Any) -> dict[str, Any]:
    """A recipe as plain values: 6 steps of 2 packs over 2 epochs of the task, in this process, untracked.

    overrides: dotted keys with `__` for the dot, such as optim__lr=1e-2; a dict replaces a whole section.
    """
    values: dict[str, Any] = {
        "name": "run",
        "output_dir": str(out),
        "model": {"path": str(model), "dtype": "float32"},
        "tune": FULL,
        "data": {"train": [{"path": str(task / "train.jsonl")}], "max_tokens_per_pack": 96, "num_workers": 0},
        "optim": {"lr": 1e-3, "warmup": 2, "weight_decay": 0.1},
        "train": {"num_steps": 6, "packs_per_step": 2},
        "checkpoint": {"every_steps": 2},
        "track": {"wandb": "off"},
    }
    for key, value in overrides.items():
        *sections, last = key.split("__")
        spot = values
        for section in sections:
            spot = spot.setdefault(section, {})
        spot[last] = value
    return values


def make_recipe(model: Path, task: Path, out: Path, **overrides: Any) -> Recipe:
    return recipe_from_dict(recipe_values(model, task, out, **overrides))


def train_on_rank(rank: int, world_size: int, recipe: Recipe) -> Path:
    """Train, as a function for `run_ranks`."""
    return train(recipe)


def sources_of(packs: list[PackedBatch], ranks: Ranks = ALONE) -> list[str]:
    """Names of the data sets that the packs of all ranks are of."""
    mine = [dataset_of(name) for pack in packs for name in pack.sample_ids]
    return sorted({name for names in ranks.gather(mine) for name in names})


def step_packs(packs: list[PackedBatch], numbers: list[int]) -> StepPacks:
    """The packs of a step as the loader yields them; the step reads nothing else of its plan."""
    return StepPacks(packs, numbers, len(packs), 0, [], {}, 1.0, PlanHash(0, 0), False, 0, 0, 0)


def step_options(model: Qwen3VLForConditionalGeneration, sources: list[str], **changes: Any) -> StepOptions:
    """Options of a step: seed 0, and gradients are not clipped."""
    flops = FlopsCounter.from_model(model, model.arch, lambda parameter: global_shape(parameter).numel())
    return StepOptions(**{"flops": flops, "sources": sources, "seed": 0, "lr": 1e-3, "max_grad_norm": None, **changes})


class Trainee:
    """A model with its optimizer, set up as `train` does."""

    def __init__(self, folder: Path, *, dtype: torch.dtype = torch.float32, **overrides):
        recipe = make_recipe(folder, folder, folder, **{"optim__eps": 1e-6, **overrides})
        self.model = build_model(recipe, device="cpu", dtype=dtype)
        self.model.train()
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.optimizer = MasterAdamW(self.model, recipe.optim, Replicated(world_size))

    def step(
        self, packs: list[PackedBatch], numbers: list[int] | None = None, ranks: Ranks = ALONE, **options
    ) -> StepTally:
        """One step at the full learning rate, unclipped unless options say otherwise."""
        when = {"step": options.pop("step", 0), "lr_factor": options.pop("lr_factor", 1.0)}
        numbers = list(range(len(packs))) if numbers is None else numbers
        constant = step_options(self.model, options.pop("sources", sources_of(packs, ranks)), **options)
        return train_step(self.model, self.optimizer, step_packs(packs, numbers), ranks, constant, **when)

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}


def losses(run: Path) -> list[float]:
    """The loss of every step, at full precision."""
    return [metrics["loss"] for metrics in read_metrics(run / "metrics.jsonl")]


def final_tensors(run: Path) -> dict[str, Tensor]:
    """Trained weights and moments of the newest checkpoint."""
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None, f"{run} has no checkpoint"
    return read_tensors(checkpoint)


def assert_same_tensors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert got.keys() == expected.keys()
    differ = [name for name in expected if not torch.equal(got[name], expected[name])]
    assert not differ, f"{len(differ)} of {len(expected)} differ: {differ[:5]}"


def largest_difference(got: dict[str, Tensor], expected: dict[str, Tensor], part: str = "weight/") -> float:
    assert got.keys() == expected.keys()
    return max((got[name] - expected[name]).abs().max().item() for name in expected if name.startswith(part))


def in_child(work: Callable[[], Any]) -> int:
    """Run in a forked process and return its exit code; -9 where it was killed."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    deadline = time.monotonic() + 900
    # Not join(900): that waits for a pipe which loader workers of a killed child hold open until they see it is gone.
    while process.exitcode is None and time.monotonic() < deadline:
        time.sleep(0.02)
    if process.exitcode is None:
        process.kill()
        raise AssertionError("the child did not end within 900 seconds")
    return process.exitcode


def packer(model: Path, task: Path) -> Callable[..., PackedBatch]:
    """A function: row numbers of the task's training file -> one pack."""
    source, collate = JsonlSource(task / "train.jsonl", task), MultimodalCollator.from_pretrained(model)
    return lambda *rows: collate([source.sample(row) for row in rows])
