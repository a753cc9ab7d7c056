"""Functions for any tensor: sharded over ranks (a DTensor, or a parameter that ZeRO-3 has partitioned) or not."""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def to_local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor on every rank. Every rank must call it. Pass a parameter itself, not detached."""
    if hasattr(tensor, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def global_shape(tensor: Tensor) -> torch.Size:
    """Return the shape of the full tensor. A parameter that ZeRO-3 has partitioned is itself empty."""
    return getattr(tensor, "ds_shape", tensor.shape)


def local_slice(tensor: Tensor) -> tuple[slice, ...]:
    """Return which part of the full tensor this rank holds, a slice for each dim."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def shard_rows(values: Tensor, mesh: DeviceMesh) -> DTensor:
    """Return this rank's rows of a full tensor, as a DTensor on the CPU. Sends nothing. mesh: 1-D, of the CPU."""
    shape, offset = compute_local_shape_and_global_offset(values.shape, mesh, [Shard(0)])
    rows = values[offset[0] : offset[0] + shape[0]].to("cpu", copy=True)
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=values.shape, stride=values.stride())


def copy_local_shard(tensor: Tensor, values: Tensor) -> None:
    """Copy this rank's shard of the full `values` into a tensor. Sends nothing."""
    to_local(tensor).copy_(values[local_slice(tensor)])
