"""Sharded training by torch's `fully_shard` (FSDP2), and HSDP when there are several replicas.

What trains is held as float32 shards and computed in the recipe's dtype; what is frozen is held in that dtype. So a
bfloat16 run computes with the rounded masters, exactly as a replicated run does.
"""

import itertools

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from qwen3vl_train.config import ParallelSection
from qwen3vl_train.model.qwen3vl import DTYPES, Qwen3VLForConditionalGeneration

# Gathered weights may take this part of the device before `reshard_after_forward: auto` frees them after every forward.
KEEP_GATHERED = 0.2


def shard_model(
    model: Qwen3VLForConditionalGeneration, mesh: DeviceMesh, parallel: ParallelSection, dtype: torch.dtype
) -> None:
    """Shard a model, in place, from the inside out; it may be on the meta device. A unit is what is gathered at once.

    Raises ValueError for cpu_offload on a host without a GPU.
    """
    if parallel.cpu_offload and not torch.cuda.is_available():
        raise ValueError("parallel.cpu_offload: true, but there is no GPU here, weights are on the CPU; remove it")
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=DTYPES[parallel.reduce_dtype],
        cast_forward_inputs=False,  # the rotary tables stay float32
    )
    # HSDP shards over the last axis and replicates over the first; with one replica a 1-D mesh spares its all-reduce.
    axes = mesh if mesh.size(0) > 1 else mesh["shard"]
    offload = CPUOffloadPolicy() if parallel.cpu_offload else OffloadPolicy()
    settings = {"mesh": axes, "mp_policy": policy, "offload_policy": offload}
    reshard = _reshard(model, parallel, dtype)
    vision, text = model.visual.vision, model.language_model.model
    # 1. Each vision block and each decoder layer: they run one after the other, so one is in memory while the next is
    #    fetched.
    for block in [*vision.blocks, *text.layers]:
        fully_shard(block, reshard_after_forward=reshard, **settings)
    # 2. What is left of the vision side in one unit: both ends of the tower are small next to the blocks, and the four
    #    mergers run directly one after the other.
    fully_shard(vision, reshard_after_forward=reshard, **settings)
    # 3. Embedding, final norm and head as the root: a tied head is the embedding, so they cannot be apart, and both
    #    ends of the forward pass need them, so they stay gathered from the first to the last.
    fully_shard(model, reshard_after_forward=False, **settings)
    assert isinstance(model, FSDPModule)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is already divided by the labels of all ranks, so gradients are summed, not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    model.always_run_vision = True  # every rank gathers the vision side in every pass
    tower_trains = any(parameter.requires_grad for parameter in vision.tower_parameters())
    vision_trains = any(parameter.requires_grad for parameter in vision.parameters())
    _prefetch([*vision.blocks], before=None)
    _prefetch([vision], before=vision.blocks[-1] if tower_trains else None)
    _prefetch([*text.layers], before=vision if vision_trains else None)


def _prefetch(blocks: list[nn.Module], *, before: nn.Module | None) -> None:
    """Fetch the next block's weights while one computes, in both directions.

    before: the unit whose backward pass follows that of the first block; None where the backward pass ends there. By
        default torch would fetch what ran before, for nothing where that is frozen; a block that names itself
        fetches none.
    """
    for block, following in itertools.pairwise(blocks):
        block.set_modules_to_forward_prefetch([following])  # type: ignore[union-attr]
        following.set_modules_to_backward_prefetch([block])  # type: ignore[union-attr]
    blocks[0].set_modules_to_backward_prefetch([before or blocks[0]])  # type: ignore[union-attr]


def _reshard(model: nn.Module, parallel: ParallelSection, dtype: torch.dtype) -> bool:
    """Return whether to free gathered weights after forward; auto: unless the model takes little of the device."""
    if parallel.reshard_after_forward != "auto":
        return parallel.reshard_after_forward
    if not torch.cuda.is_available():
        return True
    gathered = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    return gathered > KEEP_GATHERED * torch.cuda.mem_get_info()[1]


class Sharded:
    """Gradient sync of a sharded run: backward has summed the gradients, each rank holds its shard."""

    lockstep = True

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    def sum_gradients(self, gradients: list[Tensor]) -> None:
        """Do nothing: every backward pass has summed them over all ranks."""

    def sum_squares(self, squares: Tensor) -> Tensor:
        """Add up the shards' sums of squares; replicas hold the same shards and are counted once."""
        squares = squares.clone()
        dist.all_reduce(squares, group=self.mesh.get_group("shard"))
        return squares
