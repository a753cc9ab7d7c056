"""Transfer packs from worker processes: all tensors of a pack in one block of shared memory.

Tensor by tensor, a pack would hold fifteen file descriptors open here for as long as it lives, and the usual limit of
1,024 is reached by a step of 64 packs.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qwen3vl_train.batch import PackedBatch

_ALIGNMENT = 64


@dataclass(frozen=True)
class SharedMemoryPack:
    """A pack in shared memory.

    block: uint8, the tensors of the pack, one after the other.
    form: the pack, its tensors without their content.
    """

    block: Tensor
    form: PackedBatch

    @classmethod
    def from_pack(cls, pack: PackedBatch) -> "SharedMemoryPack":
        """Copy a pack into shared memory: the only copy of the transfer to the other process."""
        tensors: list[Tensor] = []

        def emptied(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return tensor.to("meta")

        form = pack._apply(emptied)
        size = sum(map(_room, tensors))
        block = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))  # type: ignore[call-overload]
        shared, contents = cls(block, form), iter(tensors)
        shared.unpack()._apply(lambda view: view.copy_(next(contents)))
        return shared

    def unpack(self) -> PackedBatch:
        """Return the pack. Its tensors are views of the block: nothing is copied."""
        start = 0

        def view(empty: Tensor) -> Tensor:
            nonlocal start
            content = self.block[start : start + empty.numel() * empty.element_size()]
            start += _room(empty)
            return content.view(empty.dtype).view(empty.shape)

        return self.form._apply(view)

    def pin_memory(self) -> "SharedMemoryPack":
        """Copy to page-locked memory, see `PackedBatch.pin_memory`."""
        return replace(self, block=self.block.pin_memory())


def _room(tensor: Tensor) -> int:
    return math.ceil(tensor.numel() * tensor.element_size() / _ALIGNMENT) * _ALIGNMENT
