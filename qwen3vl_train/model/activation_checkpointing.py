"""Activation checkpointing of blocks: what is kept from the forward pass, what the backward pass computes again.

none keeps everything. full keeps the block's input and computes the block again (Chen et al., 2016). selective keeps
the results of matrix products and attention, where nearly all FLOPs are, and computes norms, activations, rotations and
residuals again: they are cheap but hold most of the memory.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Checkpointing = Literal["none", "full", "selective"]

_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def _keep(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # The variable-length kernel is a custom operator that exists only once its module is imported, so it goes by name.
    kept = operator in _KEPT or "varlen_attn" in str(operator)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def run_block(mode: Checkpointing, block: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Call `block(*inputs)`, checkpointed where a graph is being built. Dropout repeats the same random numbers."""
    if mode == "none" or not torch.is_grad_enabled():
        return block(*inputs)
    options = {} if mode == "full" else {"context_fn": partial(create_selective_checkpoint_contexts, _keep)}
    return checkpoint(block, *inputs, use_reentrant=False, **options)  # type: ignore[return-value]
