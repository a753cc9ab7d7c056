"""Tensors that may be sharded over ranks (DTensor) or whole, handled alike."""

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local(tensor: Tensor) -> Tensor:
    """This rank's piece of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank. Every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def place_of(tensor: Tensor) -> tuple[slice, ...]:
    """Where this rank's piece stands in the whole tensor, a slice for each dim."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def put(tensor: Tensor, values: Tensor) -> None:
    """Copy this rank's piece of the whole `values` into a tensor. Sends nothing."""
    local(tensor).copy_(values[place_of(tensor)])
