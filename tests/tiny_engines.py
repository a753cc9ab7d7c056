"""Five steps of one small model under any engine, the same packs in every case, and how two outcomes differ."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_checkpoint
import tiny_runs
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen3vl_train.batch import PackedBatch
from qwen3vl_train.config import Recipe, recipe_from_dict
from qwen3vl_train.data.collate import MultimodalCollator
from qwen3vl_train.dist import Ranks
from qwen3vl_train.model.flops import FlopsCounter
from qwen3vl_train.shards import whole
from qwen3vl_train.train.build import build_engine
from qwen3vl_train.train.step import train_step

FULL = {"method": "full", "train": ["all"]}
FROZEN_VISION = {"method": "full", "train": ["text", "merger", "deepstack"]}
LORA = {
    "method": "lora",
    "rank": 3,  # fewer rows than four ranks: one of them holds nothing of an adapter
    "dropout": 0.1,
    "targets": ["vision_attn", "vision_mlp", "merger", "deepstack", "text_attn", "text_mlp"],
}
TUNES = {"full": FULL, "lora": LORA, "frozen-vision": FROZEN_VISION}

# Pictures in each pack of each step. One step has none at all, the last one is short.
_PICTURES = [
    [[(64, 64)], [], [(96, 64), (64, 64)], []],
    [[], [], [], []],
    [[], [], [], [(64, 128)]],
    [[(64, 64)], [(64, 96)], [(128, 64)], [(64, 64)]],
    [[], [], [(64, 64)]],
]
# Which rank takes which packs: uneven, with ranks that get no picture and ranks that get no pack.
SHARES: dict[int, list[list[list[int]]]] = {
    1: [[[0, 1, 2, 3]], [[0, 1, 2, 3]], [[0, 1, 2, 3]], [[0, 1, 2, 3]], [[0, 1, 2]]],
    2: [[[0, 2], [1, 3]], [[0], [1, 2, 3]], [[0, 1, 2], [3]], [[0, 1], [2, 3]], [[0, 1, 2], []]],
    4: [
        [[0], [1], [2], [3]],
        [[0, 1], [], [2], [3]],
        [[0], [1, 2], [3], []],
        [[0], [1], [2], [3]],
        [[], [0], [1], [2]],
    ],
}
Steps = list[list[PackedBatch]]


def write_small_checkpoint(folder: Path, **sizes: Any) -> Path:
    """A tiny checkpoint whose hidden size no number of ranks divides, so that shards are uneven.

    Its biases are those of a trained model: next to fresh ones, zeros, a difference in the first steps has no scale.
    """
    small = {"hidden_size": 61, "num_layers": 4, "head_dim": 16, "vision_hidden_size": 32, "vision_depth": 3}
    tiny_checkpoint.write_tiny_checkpoint(folder, **{**small, **sizes})
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith(".bias"):
            tensor.copy_(0.05 * torch.randn(tensor.shape, generator=generator))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_steps(checkpoint: Path) -> Steps:
    """The packs of five steps; rows differ in text and pictures."""
    collate = MultimodalCollator.from_pretrained(checkpoint)
    steps = []
    for step, packs in enumerate(_PICTURES):
        steps.append([])
        for place, sizes in enumerate(packs):
            images = [tiny_runs.picture(*size, seed=100 * step + 10 * place + i) for i, size in enumerate(sizes)]
            parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
            question = [*parts, {"type": "text", "text": "What is shown here? " * (1 + place)}]
            answer = f"It is {step} " + "and more " * (1 + (step + 2 * place) % 4)
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            steps[-1].append(collate([{"messages": messages}]))
    return steps


def engine_recipe(checkpoint: Path, tune: dict[str, Any], engine: str = "single", **overrides: Any) -> Recipe:
    """overrides: dtype, activation_checkpointing, optim, and fields of `parallel`."""
    train = {"seed": 3, "activation_checkpointing": overrides.pop("activation_checkpointing", "none")}
    return recipe_from_dict(
        {
            "name": "engines",
            "model": {"path": str(checkpoint), "dtype": overrides.pop("dtype", "float32")},
            "tune": tune,
            "data": {"train": [{"path": "none.jsonl"}]},
            # Where the true gradient is zero (key biases), Adam at 1e-8 would make whole steps of the rounding noise.
            "optim": {"lr": 1e-3, "eps": 1e-6, "weight_decay": 0.1, **overrides.pop("optim", {})},
            "train": train,
            "parallel": {"engine": engine, **overrides},
        }
    )


@dataclass
class Outcome:
    """losses and gradient norms of every step; all weights after the last, on rank 0."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


def run_engine(rank: int, world_size: int, recipe: Recipe, steps: Steps) -> Outcome:
    """Train on the packs of SHARES as the training loop does."""
    ranks = Ranks(rank, world_size, rank, torch.device("cpu"))
    model, optimizer = build_engine(recipe, ranks)
    model.train()
    flops = FlopsCounter.of(model, model.arch)
    done = []
    for step, packs in enumerate(steps):
        mine = SHARES[world_size][step][rank]
        done.append(
            train_step(
                model,
                optimizer,
                [packs[place] for place in mine],
                mine,
                ranks,
                flops,
                step=step,
                seed=recipe.train.seed,
                lr_factor=1.0,
                max_grad_norm=1.0,
                sources=tiny_runs.sources_of(packs),
            )
        )
    weights = {name: whole(parameter).detach().clone() for name, parameter in model.named_parameters()}
    return Outcome([d.loss for d in done], [d.grad_norms["all"] for d in done], weights if rank == 0 else {})


@dataclass(frozen=True)
class Difference:
    """Largest relative differences; of weights: over tensors, the norm of the difference against the tensor's norm."""

    loss: float
    norm: float
    weight: float

    def __str__(self) -> str:
        return f"loss {self.loss:.1e}, gradient norm {self.norm:.1e}, weights {self.weight:.1e}"


def difference(got: Outcome, expected: Outcome) -> Difference:
    assert got.weights.keys() == expected.weights.keys()
    weights = [
        ((got.weights[name].float() - weight.float()).norm() / weight.float().norm()).item()
        for name, weight in expected.weights.items()
    ]
    assert all(math.isfinite(weight) for weight in weights)
    return Difference(_relative(got.losses, expected.losses), _relative(got.norms, expected.norms), max(weights))


def _relative(got: list[float], expected: list[float]) -> float:
    return max(abs(one - other) / abs(other) for one, other in zip(got, expected, strict=True))
