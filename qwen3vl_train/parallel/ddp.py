"""Replicated training: every rank holds the model, and the gradients of what trains are summed once a step.

torch's DistributedDataParallel is not used: it reduces inside every backward and waits for parameters that got no
gradient on a rank, so a rank without an image, or with fewer packs, would stall the rest. One explicit sum after the
last pack cannot.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_ELEMENTS = 2**24  # 64 MiB of float32: large enough for full bandwidth, small enough not to double the memory


class Replicated:
    """Gradient sync of a replicated run: each rank holds all gradients, which are summed once a step."""

    lockstep = False  # ranks may run different numbers of packs

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size

    def sum_gradients(self, gradients: list[Tensor]) -> None:
        """Sum each gradient over all ranks, in place, in float32. All ranks pass the same tensors in the same order."""
        if self.world_size == 1:
            return
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat)
            for gradient, summed in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def sum_squares(self, squares: Tensor) -> Tensor:
        """Return the squares: every rank holds full gradients."""
        return squares


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    filled = 0
    for gradient in gradients:
        if bucket and filled + gradient.numel() > BUCKET_ELEMENTS:
            yield bucket
            bucket, filled = [], 0
        bucket.append(gradient)
        filled += gradient.numel()
    if bucket:
        yield bucket


def same_on_all_ranks(tensors: Sequence[Tensor], world_size: int) -> bool:
    """Return whether every rank holds bit-equal tensors. Compares a checksum, so each rank sends a few bytes."""
    if world_size == 1:
        return True
    checksum = torch.zeros(2, dtype=torch.float64)
    for number, tensor in enumerate(tensors, start=1):
        total = tensor.detach().double().sum().cpu()
        checksum += torch.stack([total, total * number])
    low, high = checksum.clone(), checksum.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    return torch.equal(low, high)
