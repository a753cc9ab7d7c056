"""What one rank holds and sends in a bfloat16 run of any number of ranks, computed from the shapes of a model.

Nothing is measured here and no rank is started: the model may be on the meta device. docs/scaling.md has the table.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from qwen3vl_train.arch import TextArch, VisionArch

HALF, FULL = 2, 4  # bytes of a bfloat16 and of a float32 number
Engine = Literal["ddp", "fsdp2"]


@dataclass(frozen=True)
class Layout:
    """Ranks as copies of the model, each cut into pieces. ddp has pieces of 1; more than one copy of pieces is HSDP."""

    engine: Engine
    replicate: int
    shard: int

    @property
    def num_ranks(self) -> int:
        return self.replicate * self.shard


@dataclass(frozen=True)
class RankShare:
    """Bytes of one rank.

    frozen, trained, moments, gradients: what it holds all step. gathered: the most that is there for a moment.
    sent_in_shard and sent_between_replicas: what it sends in a step of one pass, within its copy and to other copies.
    padding: part of what all ranks gather that is empty, because rows do not divide by the ranks.
    """

    frozen: int
    trained: int
    moments: int
    gradients: int
    gathered: int
    sent_in_shard: int
    sent_between_replicas: int
    padding: float

    @property
    def held(self) -> int:
        return self.frozen + self.trained + self.moments + self.gradients


def unit_of(name: str) -> str:
    """The unit that a parameter is gathered with; the same cut as `parallel.fsdp.shard_model` makes."""
    parts = name.split(".")
    for stem in ("visual.vision.blocks.", "language_model.model.layers."):
        if name.startswith(stem):
            return ".".join(parts[:4])
    return "visual.vision" if name.startswith("visual.vision.") else ""


def piece_rows(rows: int, shard: int, place: int) -> int:
    """Rows of dim 0 that the rank at `place` of `shard` holds: all but the last ones hold ceil(rows / shard)."""
    each = math.ceil(rows / shard)
    return max(0, min(rows - place * each, each))


def share_of(model: nn.Module, layout: Layout, place: int = 0) -> RankShare:
    """The share of the rank at `place` within its copy, for a bfloat16 run with float32 reduction.

    model: tuned (what trains requires a gradient); shapes alone are read. Sends are counted for a ring, in bytes out
    of one rank. Backward passes gather a unit again only where a gradient passes through it.
    """
    if layout.engine == "ddp":
        return _replicated(model, layout.num_ranks)
    frozen = trained = padded = whole = 0
    for _, shape, trains in _parameters(model):
        row = math.prod(shape[1:])
        held = piece_rows(shape[0], layout.shard, place) * row
        frozen, trained = (frozen, trained + held) if trains else (frozen + held, trained)
        padded += math.ceil(shape[0] / layout.shard) * layout.shard * row
        whole += shape[0] * row
    units = _units(model, layout.shard)
    sent = sum(
        # Forward; backward again (not the root, which stays gathered); the gradients of what trains, in float32.
        HALF * unit.padded * (1 + (unit.backward and unit.name != "")) + FULL * unit.padded_trained
        for unit in units
    )
    ring = (layout.shard - 1) / layout.shard
    across = 2 * (layout.replicate - 1) / layout.replicate * FULL * sum(u.padded_trained for u in units) / layout.shard
    return RankShare(
        frozen=HALF * frozen,
        trained=FULL * trained,
        moments=2 * FULL * trained,
        gradients=FULL * trained,
        gathered=_gathered(units),
        sent_in_shard=int(ring * sent),
        sent_between_replicas=int(across),
        padding=1 - whole / padded,
    )


def text_activation_bytes(text: TextArch, checkpointing: Literal["none", "full"]) -> float:
    """Bytes a token that all decoder layers keep for the backward pass; with full, their inputs alone.

    A layer keeps, in bfloat16: its input, two normed rows and the row between; q and k before their norms; q, k, v; the
    attention output; gate, up and their product. Holds for fused kernels: norms and SwiGLU written as separate
    operations keep more.
    """
    if checkpointing == "full":
        return HALF * text.hidden_size * text.num_hidden_layers
    return layer_activation_bytes(text) * text.num_hidden_layers


def layer_activation_bytes(text: TextArch) -> float:
    q, kv = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    return HALF * (4 * text.hidden_size + (q + kv) + (q + 2 * kv) + q + 3 * text.intermediate_size)


def vision_activation_bytes(vision: VisionArch) -> float:
    """Bytes a patch that all vision blocks keep, without checkpointing; a tower that no gradient passes keeps nothing.

    A block keeps its input, two normed rows and the row between; q, k, v; the attention output; the MLP before and
    after GELU.
    """
    return HALF * (8 * vision.hidden_size + 2 * vision.intermediate_size) * vision.depth


@dataclass(frozen=True)
class _Unit:
    name: str
    padded: int
    padded_trained: int
    backward: bool


def _parameters(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    for name, parameter in model.named_parameters():
        yield name, tuple(parameter.shape), parameter.requires_grad


def _units(model: nn.Module, shard: int) -> list[_Unit]:
    sizes: dict[str, list[int]] = {}
    tower_trains = False
    for name, shape, trains in _parameters(model):
        padded = math.ceil(shape[0] / shard) * shard * math.prod(shape[1:])
        size = sizes.setdefault(unit_of(name), [0, 0])
        size[0] += padded
        size[1] += padded * trains
        tower_trains = tower_trains or (trains and name.startswith("visual.vision.") and "merger" not in name)
    return [
        _Unit(name, padded, trained, _runs_backward(name, trained, tower_trains))
        for name, (padded, trained) in sizes.items()
    ]


def _runs_backward(name: str, trained: int, tower_trains: bool) -> bool:
    """Gradients pass through every decoder layer; through a vision unit where it trains, or any part of the tower."""
    return not name.startswith("visual.") or trained > 0 or tower_trains


def _gathered(units: list[_Unit]) -> int:
    """The root all the while, and beside it two blocks (one computes, one is fetched) and one block's gradients.

    Or, at the end of the backward pass, the root's own gradients. Gradients of a unit are there in bfloat16 and, to be
    summed, in float32.
    """
    root = next(unit for unit in units if unit.name == "")
    blocks = [unit for unit in units if unit.name != ""]
    largest, largest_trained = max(unit.padded for unit in blocks), max(unit.padded_trained for unit in blocks)
    during = HALF * root.padded_trained + 2 * HALF * largest + (HALF + FULL) * largest_trained
    return HALF * root.padded + max(during, (HALF + FULL) * root.padded_trained)


def _replicated(model: nn.Module, num_ranks: int) -> RankShare:
    """Every rank holds all in bfloat16, and float32 masters of what trains; gradients are summed once a step."""
    sizes = [(math.prod(shape), trains) for _, shape, trains in _parameters(model)]
    trained = sum(size for size, trains in sizes if trains)
    frozen = sum(size for size, trains in sizes if not trains)
    return RankShare(
        frozen=HALF * frozen,
        trained=(HALF + FULL) * trained,
        moments=2 * FULL * trained,
        gradients=FULL * trained,
        gathered=0,
        sent_in_shard=0,
        sent_between_replicas=int(2 * (num_ranks - 1) / num_ranks * FULL * trained),
        padding=0.0,
    )
