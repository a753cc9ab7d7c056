"""What a model costs, from the sizes of its architecture: FLOPs of a step, work of a sample, memory of a rank.

A linear layer costs 2 * rows * in * out FLOPs forward, as much again for the gradient of its input where something
below it trains, and as much again for the gradient of its weight where that trains. Attention costs twice its forward
more where gradients pass. The head runs on label rows only. No padding and no recomputation is counted.

This module imports nothing else of `model`, so that the planner of `data` may use it.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from qwen3vl_train.arch import Qwen3VLArch, TextArch, VisionArch
from qwen3vl_train.batch import PackedBatch
from qwen3vl_train.modules import VISION_GROUPS, grouped_parameters

MERGER_GROUPS, DECODER_GROUPS = ("merger", "deepstack"), ("text_attn", "text_mlp")


@dataclass(frozen=True)
class FlopsCounter:
    """Multiply-adds of a forward pass or of training steps. Built once.

    linear: by module group, for each row: a patch below the mergers, a merged row in them, a token in the decoder, a
        label in the head.
    patch_pair: of the tower's attention, for each pair of patches of a frame.
    token_pair: of the decoder's attention, for each pair of tokens of a sequence; causal, so half of the square.
    """

    linear: dict[str, int]
    patch_pair: int
    token_pair: int

    @classmethod
    def from_arch(cls, arch: Qwen3VLArch) -> "FlopsCounter":
        """Count one forward pass: multiply out the shapes of all weights."""
        vision, text = arch.vision, arch.text
        merger = vision.merged_size * (vision.merged_size + vision.out_hidden_size)
        layers = text.num_hidden_layers
        return cls(
            linear={
                "vision_embed": vision.patch_dim * vision.hidden_size,
                "vision_attn": vision.depth * 4 * vision.hidden_size**2,
                "vision_mlp": vision.depth * 2 * vision.hidden_size * vision.intermediate_size,
                "merger": merger,
                "deepstack": merger * len(vision.deepstack_visual_indexes),
                "text_attn": layers * text.hidden_size * 2 * (text.q_size + text.kv_size),
                "text_mlp": layers * text.hidden_size * 3 * text.intermediate_size,
                "lm_head": text.hidden_size * text.vocab_size,
            },
            patch_pair=2 * vision.hidden_size * vision.depth,
            token_pair=text.q_size * layers,
        )

    @classmethod
    def from_model(
        cls, model: nn.Module, arch: Qwen3VLArch, num_elements: Callable[[nn.Parameter], int] = nn.Parameter.numel
    ) -> "FlopsCounter":
        """Count steps: read from requires_grad which parts train, and from the parameter names where adapters are.

        num_elements: of a full parameter, where the model holds shards that do not know it.
        """
        groups = grouped_parameters(model)
        trains = {group: any(p.requires_grad for _, p in members) for group, members in groups.items()}
        weight = {
            group: any(p.requires_grad and ".lora_" not in name for name, p in members)
            for group, members in groups.items()
        }
        weight["lm_head"] |= arch.tie_word_embeddings and weight["text_embed"]
        tower = any(trains[group] for group in VISION_GROUPS)
        decoder = tower or any(trains[group] for group in ("text_embed", *MERGER_GROUPS, *DECODER_GROUPS))
        passes = {
            "vision_embed": False,  # pixels need no gradient
            **dict.fromkeys(("vision_attn", "vision_mlp"), tower),
            **{merger: tower or trains[merger] for merger in MERGER_GROUPS},
            **dict.fromkeys(DECODER_GROUPS, decoder),
            "lm_head": decoder or trains["lm_head"],  # the final norm is of the head's group
        }
        forward = cls.from_arch(arch)
        linear = {group: forward.linear[group] * (1 + below + weight[group]) for group, below in passes.items()}
        for group in linear:
            linear[group] += sum(3 * num_elements(p) for name, p in groups[group] if ".lora_" in name)
        return cls(linear, forward.patch_pair * (3 if tower else 1), forward.token_pair * (3 if decoder else 1))

    def step(self, batch: PackedBatch) -> float:
        """Return the FLOPs of forward and backward over one pack."""
        rows = {
            **dict.fromkeys(VISION_GROUPS, batch.num_patches),
            **dict.fromkeys(MERGER_GROUPS, batch.num_visual_tokens),
            **dict.fromkeys(DECODER_GROUPS, batch.num_tokens),
            "lm_head": batch.num_labels,
        }
        multiply_adds = (
            sum(rows[group] * cost for group, cost in self.linear.items())
            + self.patch_pair * sum(length**2 for length in batch.vision.segments.lengths)
            + self.token_pair * sum(length**2 for length in batch.segments.lengths)
        )
        return float(2 * multiply_adds)


def work_ratios(arch: Qwen3VLArch, *, text_passes: int, vision_passes: int) -> tuple[float, float, float]:
    """Return what a pair of tokens, a patch and a pair of patches cost, in units of a token in the decoder's layers.

    passes: how often a training step pays the forward pass of the weights: 3 where they train, 2 where only a gradient
        passes through, 1 where nothing below trains. Attention has no weights: 3 wherever a gradient passes.

    The head, which runs on label rows only, is not counted.
    """
    costs = FlopsCounter.from_arch(arch)
    token = sum(costs.linear[group] for group in DECODER_GROUPS) * text_passes
    merged = sum(costs.linear[group] for group in MERGER_GROUPS) // arch.vision.spatial_merge_size**2
    patch = (sum(costs.linear[group] for group in VISION_GROUPS) + merged) * vision_passes
    token_pair = costs.token_pair * (3 if text_passes > 1 else 1)
    patch_pair = costs.patch_pair * (3 if vision_passes > 1 else 1)
    return token_pair / token, patch / token, patch_pair / token


# Memory and traffic of one rank in a bfloat16 run, computed from the shapes of a model that may be on the meta device.

HALF, FULL = 2, 4  # bytes of a bfloat16 and of a float32 number


@dataclass(frozen=True)
class Layout:
    """Ranks as replicas of the model, each cut into shards. ddp has one shard; several replicas of shards are HSDP."""

    engine: Literal["ddp", "fsdp2"]
    replicate: int
    shard: int

    @property
    def num_ranks(self) -> int:
        return self.replicate * self.shard


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank.

    frozen, trained, moments, gradients: what it holds during the entire step.
    gathered: the most that it holds for a moment beside these.
    sent_in_shard, sent_between_replicas: what it sends in a step of one pass, within its replica and to the others.
    padding: the empty part of what all ranks gather, because rows do not divide by the ranks.
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


def fsdp_unit(name: str) -> str:
    """Return the FSDP unit that a parameter is gathered with, as `parallel.fsdp.shard_model` cuts them."""
    for stem in ("visual.vision.blocks.", "language_model.model.layers."):
        if name.startswith(stem):
            return ".".join(name.split(".")[:4])
    return "visual.vision" if name.startswith("visual.vision.") else ""


def rows_of_shard(rows: int, num_shards: int, index: int) -> int:
    """Return the rows of dim 0 that one shard holds: all but the last ones hold ceil(rows / num_shards)."""
    each = math.ceil(rows / num_shards)
    return max(0, min(rows - index * each, each))


def rank_memory(model: nn.Module, layout: Layout, index: int = 0) -> RankMemory:
    """Return the memory and traffic of a rank in a bfloat16 run with float32 reduction.

    model: tuned (what trains requires a gradient); shapes alone are read.
    index: of the rank within its replica.

    Sends are counted for a ring, in bytes out of one rank. Backward passes gather a unit again only where a gradient
    passes through it. ddp holds, beside float32 masters of what trains, all weights in bfloat16.
    """
    held = {True: 0, False: 0}
    padded, trained = Counter[str](), Counter[str]()  # elements of each FSDP unit in even shards; those that train
    tower_trains = False
    for name, parameter in model.named_parameters():
        unit, width, trains = fsdp_unit(name), parameter[0].numel(), parameter.requires_grad
        held[trains] += rows_of_shard(parameter.shape[0], layout.shard, index) * width
        elements = rows_of_shard(parameter.shape[0], layout.shard, 0) * layout.shard * width
        padded[unit] += elements
        trained[unit] += elements * trains
        tower_trains |= trains and name.startswith("visual.vision.") and "merger" not in name
    sent = 0
    for unit in padded:
        # Gradients pass every decoder layer; a vision unit where it trains, or any part of the tower.
        backward = not unit.startswith("visual.") or trained[unit] > 0 or tower_trains
        # Forward; backward again (not the root, which stays gathered); the gradients of what trains, in float32.
        sent += HALF * padded[unit] * (1 + (backward and unit != "")) + FULL * trained[unit]
    ring = (layout.shard - 1) / layout.shard
    across = 2 * (layout.replicate - 1) / layout.replicate * FULL * trained.total() / layout.shard
    ddp = layout.engine == "ddp"
    return RankMemory(
        frozen=HALF * held[False],
        trained=(FULL + HALF * ddp) * held[True],
        moments=2 * FULL * held[True],
        gradients=FULL * held[True],
        gathered=0 if ddp else _gathered(padded, trained),
        sent_in_shard=int(ring * sent),
        sent_between_replicas=int(across),
        padding=1 - sum(parameter.numel() for parameter in model.parameters()) / padded.total(),
    )


def _gathered(padded: Counter[str], trained: Counter[str]) -> int:
    """Return the most bytes that exist for a moment.

    The root is there all the time, and beside it two blocks (one computes, one is fetched) and one block's gradients;
    or, at the end of the backward pass, the root's own gradients. Gradients of a unit exist in bfloat16 and, to be
    summed, in float32.
    """
    blocks = [unit for unit in padded if unit != ""]
    largest, largest_trained = max(padded[unit] for unit in blocks), max(trained[unit] for unit in blocks)
    during = HALF * trained[""] + 2 * HALF * largest + (HALF + FULL) * largest_trained
    return HALF * padded[""] + max(during, (HALF + FULL) * trained[""])


def text_activation_bytes(text: TextArch, checkpointing: Literal["none", "full"]) -> float:
    """Return the bytes a token that all decoder layers keep for the backward pass; with full, their inputs alone."""
    layer = HALF * text.hidden_size if checkpointing == "full" else layer_activation_bytes(text)
    return layer * text.num_hidden_layers


def layer_activation_bytes(text: TextArch) -> float:
    """Return the bytes a token that one decoder layer keeps, in bfloat16.

    Its input, two normed rows and the row between; q and k before their norms; q, k, v; the attention output; gate, up
    and their product. Holds for fused kernels: norms and SwiGLU written as separate operations keep more.
    """
    q, kv = text.q_size, text.kv_size
    return HALF * (4 * text.hidden_size + (q + kv) + (q + 2 * kv) + q + 3 * text.intermediate_size)


def vision_activation_bytes(vision: VisionArch) -> float:
    """Return the bytes a patch that all vision blocks keep; a tower that no gradient passes keeps nothing.

    A block keeps its input, two normed rows and the row between; q, k, v; the attention output; the MLP before and
    after GELU.
    """
    return HALF * (8 * vision.hidden_size + 2 * vision.intermediate_size) * vision.depth
