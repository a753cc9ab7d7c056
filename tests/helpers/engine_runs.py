"""Five steps of one small model under any engine, the same packs in every case, and how two results differ."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoint
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from qwen3vl_train.batch import PackedBatch
from qwen3vl_train.config import Recipe, recipe_from_dict
from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.dist.ranks import Ranks
from qwen3vl_train.dist.tensors import copy_local_shard, local_slice, to_local
from qwen3vl_train.tracking.metrics import StepTally
from qwen3vl_train.train.build import build_engine
from qwen3vl_train.train.step import NonFiniteError, train_step
from tests.helpers import small_runs

FULL = {"method": "full", "train": ["all"]}
FROZEN_VISION = {"method": "full", "train": ["text", "merger", "deepstack"]}
LORA = {
    "method": "lora",
    "rank": 3,  # fewer rows than four ranks: one of them holds nothing of an adapter
    "dropout": 0.1,
    "targets": ["vision_attn", "vision_mlp", "merger", "deepstack", "text_attn", "text_mlp"],
}
TUNES = {"full": FULL, "lora": LORA, "frozen-vision": FROZEN_VISION}

# Pictures in each pack of each step. One step has none at all, the last ones are short.
_PICTURES = [
    [[(64, 64)], [], [(96, 64), (64, 64)], []],
    [[], [], []],
    [[], [(64, 128)]],
    [[(128, 64)], [(64, 64)]],
    [[], [(64, 64)]],
]
# Which rank takes which packs: uneven, with ranks that get no picture and ranks that get no pack.
SHARES: dict[int, list[list[list[int]]]] = {
    1: [[[0, 1, 2, 3]], [[0, 1, 2]], [[0, 1]], [[0, 1]], [[0, 1]]],
    2: [[[0, 2], [1, 3]], [[0], [1, 2]], [[0], [1]], [[0], [1]], [[0, 1], []]],
    4: [[[0], [1], [2], [3]], [[0, 1], [], [2], []], [[0], [], [], [1]], [[], [0], [1], []], [[], [0], [], [1]]],
}
Steps = list[list[PackedBatch]]


def write_small_checkpoint(folder: Path, **sizes: Any) -> Path:
    """A tiny checkpoint whose hidden size no number of ranks divides, so that shards are uneven.

    Its biases are those of a trained model: next to fresh ones, zeros, a difference in the first steps has no scale.
    """
    small: dict[str, Any] = {
        "hidden_size": 61,
        "num_layers": 3,
        "head_dim": 16,
        "vision_hidden_size": 32,
        "vision_depth": 2,
    }
    small["deepstack_visual_indexes"] = (0, 1)  # so one decoder layer gets no features, as most do not
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
            images = [small_runs.picture(*size, seed=100 * step + 10 * place + i) for i, size in enumerate(sizes)]
            parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
            question = [*parts, {"type": "text", "text": "What is shown here? " * (1 + place)}]
            answer = f"It is {step} " + "and more " * (1 + (step + 2 * place) % 4)
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            steps[-1].append(collate([{"messages": messages}]))
    return steps


def engine_recipe(checkpoint: Path, tune: dict[str, Any], engine: str = "single", **overrides: Any) -> Recipe:
    """overrides: dtype, activation_checkpointing, optim, and fields of `parallel`."""
    values = {
        "name": "engines",
        "model": {"path": str(checkpoint), "dtype": overrides.pop("dtype", "float32")},
        "tune": tune,
        "data": {"train": [{"path": "none.jsonl"}]},
        # Where the true gradient is zero (key biases), Adam at 1e-8 would make whole steps of the rounding noise.
        "optim": {"lr": 1e-3, "eps": 1e-6, "weight_decay": 0.1, **overrides.pop("optim", {})},
        "train": {"seed": 3, "activation_checkpointing": overrides.pop("activation_checkpointing", "none")},
        "parallel": {"engine": engine, **overrides},
    }
    return recipe_from_dict(values)


class Trainee:
    """One engine between steps, whose state a test may read and change."""

    def __init__(self, rank: int, world_size: int, recipe: Recipe) -> None:
        self.ranks = Ranks(rank, world_size, rank, torch.device("cpu"))
        self.recipe = recipe
        self.model, self.optimizer = build_engine(recipe, self.ranks)
        self.model.train()

    def step(self, step: int, packs: list[PackedBatch]) -> StepTally:
        """Train on this rank's share of the packs of all; none at all leaves every rank without one."""
        mine = SHARES[self.ranks.world_size][step][self.ranks.rank] if packs else []
        options = small_runs.step_options(
            self.model, small_runs.sources_of(packs), seed=self.recipe.train.seed, max_grad_norm=1.0
        )
        taken = small_runs.step_packs([packs[place] for place in mine], mine)
        return train_step(self.model, self.optimizer, taken, self.ranks, options, step=step, lr_factor=1.0)

    def steps(self, steps: Steps, first: int, last: int) -> list[float]:
        return [self.step(step, steps[step]).loss for step in range(first, last)]

    def state(self) -> dict[str, Tensor]:
        return full_tensors(self.optimizer.state_tensors())

    def load(self, state: dict[str, Tensor], num_updates: int) -> None:
        tensors = self.optimizer.state_tensors()
        assert tensors.keys() == state.keys()
        for name, tensor in tensors.items():
            copy_local_shard(tensor, state[name])
        self.optimizer.load_state_dict(tensors, num_updates)


def full_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of what `full_tensor` gives for each, in one exchange: hundreds of small ones take seconds."""
    first = next(iter(tensors.values()))
    if hasattr(first, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(list(tensors.values())):
            return {name: tensor.detach().clone() for name, tensor in tensors.items()}
    if not isinstance(first, DTensor):
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}
    pieces: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(
        pieces, {name: (local_slice(tensor), to_local(tensor.detach())) for name, tensor in tensors.items()}
    )
    full = {name: torch.full(tensor.shape, torch.nan, dtype=tensor.dtype) for name, tensor in tensors.items()}
    for of_rank in pieces:
        for name, (place, values) in of_rank.items():
            full[name][place] = values
    return full


@dataclass
class EngineRun:
    """losses and gradient norms (by module group, and 'all') of every step; all weights after the last, on rank 0."""

    losses: list[float]
    norms: list[dict[str, float]]
    weights: dict[str, Tensor]


def run_engine(rank: int, world_size: int, recipe: Recipe, steps: Steps) -> EngineRun:
    """Train on the packs of SHARES as the training loop does."""
    trainee = Trainee(rank, world_size, recipe)
    done = [trainee.step(step, packs) for step, packs in enumerate(steps)]
    weights = full_tensors(dict(trainee.model.named_parameters()))
    return EngineRun([d.loss for d in done], [d.grad_norms for d in done], weights if rank == 0 else {})


def run_engines(rank: int, world_size: int, recipes: list[Recipe], steps: Steps) -> list[EngineRun]:
    return [run_engine(rank, world_size, recipe, steps) for recipe in recipes]


def poisoned(rank: int, world_size: int, recipes: list[Recipe], steps: Steps) -> list[tuple[str, list[float]]]:
    """Two good steps, one whose loss is not a number, two more good ones: its message, and the losses of the good ones.

    Nothing of the bad step remains: no weight or moment has changed, and the good ones continue as if it had not been.
    """
    results = []
    for recipe in recipes:
        trainee = Trainee(rank, world_size, recipe)
        losses = trainee.steps(steps, 0, 2)
        before = trainee.state()
        bad = [list(packs) for packs in steps]
        weights = torch.full_like(bad[2][0].label_weights, torch.nan)
        bad[2][0] = dataclasses.replace(bad[2][0], label_weights=weights)
        with pytest.raises(NonFiniteError) as error:
            trainee.steps(bad, 2, 3)
        small_runs.assert_same_tensors(trainee.state(), before)
        results.append((str(error.value), losses + trainee.steps(steps, 2, 4)))
    return results


def skipped(rank: int, world_size: int, recipes: list[Recipe], steps: Steps) -> list[list[float]]:
    """The losses of five steps, and between them one in which no rank has a pack, which changes nothing."""
    results = []
    for recipe in recipes:
        trainee = Trainee(rank, world_size, recipe)
        losses = trainee.steps(steps, 0, 2)
        before = trainee.state()
        nothing = trainee.step(2, [])
        assert (nothing.loss, nothing.label_tokens, nothing.grad_norms["all"]) == (0.0, 0, 0.0)
        small_runs.assert_same_tensors(trainee.state(), before)
        results.append(losses + trainee.steps(steps, 2, 5))
    return results


@dataclass(frozen=True)
class Difference:
    """Largest relative differences. norm: over steps and module groups.

    weight: over tensors, the norm of the difference against the tensor's norm.
    """

    loss: float
    norm: float
    weight: float

    @property
    def largest(self) -> float:
        return max(self.loss, self.norm, self.weight)

    def __str__(self) -> str:
        return f"loss {self.loss:.1e}, gradient norm {self.norm:.1e}, weights {self.weight:.1e}"


def difference(got: EngineRun, expected: EngineRun) -> Difference:
    assert got.weights.keys() == expected.weights.keys()
    weights = [
        ((got.weights[name].float() - weight.float()).norm() / weight.float().norm()).item()
        for name, weight in expected.weights.items()
    ]
    assert all(math.isfinite(weight) for weight in weights)
    norms = 0.0
    for of_got, of_expected in zip(got.norms, expected.norms, strict=True):
        assert of_got.keys() == of_expected.keys()
        # A group that no pack of the step reaches has a norm of zero, to the bit; then it has no relative difference.
        silent = [group for group, norm in of_expected.items() if norm == 0.0]
        assert all(of_got[group] == 0.0 for group in silent), (of_got, of_expected)
        heard = [group for group in of_expected if group not in silent]
        norms = max([norms, *(_relative(of_got[group], of_expected[group]) for group in heard)])
    losses = max(_relative(one, other) for one, other in zip(got.losses, expected.losses, strict=True))
    return Difference(losses, norms, max(weights))


def norm_of(tensors: dict[str, Tensor]) -> float:
    """The norm of all tensors as one vector."""
    return sum(tensor.square().sum().item() for tensor in tensors.values()) ** 0.5


def _relative(got: float, expected: float) -> float:
    return abs(got - expected) / abs(expected)
