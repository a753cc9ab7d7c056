"""This rank's partitions of weights and gradients in DeepSpeed's three ZeRO optimizers, with one interface.

Stages 1 and 2 share a class, bfloat16 in stage 1 has one of its own, stage 3 a third. Each flattens the parameters of
an AdamW group into one long vector and gives every rank a partition of it, a float32 master that AdamW updates.
DeepSpeed has no public call for the gradients of a partition before its step, so the attributes that hold them are
used here, and nowhere else (as of DeepSpeed 0.19.8).
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Fill = Callable[[nn.Module, Callable[[str, nn.Parameter], Tensor], torch.device | str], None]
"""Fills a model on the meta device in place: (model, (name, meta parameter) -> its first values, device)."""


class Partitions(Protocol):
    """This rank's partitions of what trains. groups: the index of the AdamW group of each master."""

    masters: list[Tensor]
    groups: list[int]

    def gradients(self) -> list[list[Tensor]]:
        """Return the reduced gradients of each master, in tensors that may be written to; padding is zero."""
        ...

    def link_moments(self) -> None:
        """Link AdamW's state of every master in DeepSpeed, so that it can be read and set by parameter."""
        ...

    def set_part(self, parameter: nn.Parameter, part: str, values: Tensor) -> None:
        """Copy this rank's part of the full float32 `values` into the master ('weight') or a moment. Sends nothing."""
        ...

    def round_into_model(self) -> None:
        """Copy the masters into the model, in its dtype. Every rank must call it."""
        ...

    def discard(self) -> None: ...


def partitions_of(zero: Any) -> Partitions:
    """Return the partitions of a ZeRO optimizer. zero: `engine.optimizer` of a DeepSpeed engine."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        return _Stage3(zero)
    return _Stage1BFloat16(zero) if isinstance(zero, BF16_Optimizer) else _Stages1And2(zero)


class _Replicated:
    """What stages 1 and 2 have in common: every rank holds the full model."""

    masters: list[Tensor]

    def __init__(self, zero: Any, members: list[list[nn.Parameter]]) -> None:
        self.zero, self.members = zero, members
        self.groups = list(range(len(members)))

    def link_moments(self) -> None:
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        for parameters, master in zip(self.members, self.masters, strict=True):
            lazy_init_hp_params_optimizer_state(parameters, master, self.zero.optimizer.state)

    def set_part(self, parameter: nn.Parameter, part: str, values: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if part == "weight":
            safe_set_full_fp32_param(parameter, values)
        else:
            safe_set_full_optimizer_state(parameter, values, part)

    def round_into_model(self) -> None:
        self.zero.update_lp_params()


class _Stages1And2(_Replicated):
    def __init__(self, zero: Any) -> None:
        super().__init__(zero, zero.bit16_groups)
        self.masters = zero.single_partition_of_fp32_groups

    def gradients(self) -> list[list[Tensor]]:
        if self.zero.cpu_offload:
            return [[master.grad] for master in self.masters if master.grad is not None]
        return [self.zero.averaged_gradients[group] for group in self.groups]

    def discard(self) -> None:
        zero = self.zero
        zero.zero_grad()
        zero.averaged_gradients.clear()
        zero.all_grad_tensors.clear()
        zero.micro_step_id = -1  # the next pass starts a sum instead of adding to one
        if zero.cpu_offload:
            zero.reset_cpu_buffers()


class _Stage1BFloat16(_Replicated):
    def __init__(self, zero: Any) -> None:
        super().__init__(zero, zero.bf16_groups)
        self.masters = zero.fp32_groups_flat_partition

    def gradients(self) -> list[list[Tensor]]:
        return [[gradient] for gradient in self.zero.fp32_groups_gradient_flat_partition]

    def discard(self) -> None:
        self.zero.zero_grad()


class _Stage3:
    def __init__(self, zero: Any) -> None:
        self.zero = zero
        self.masters = zero.fp32_partitioned_groups_flat
        self.groups = [zero.sub_group_to_group_id[number] for number in range(len(self.masters))]

    def gradients(self) -> list[list[Tensor]]:
        if self.zero.offload_optimizer:
            return [[master.grad] for master in self.masters if master.grad is not None]
        return [self.zero.averaged_gradients[number] for number in range(len(self.masters))]

    def link_moments(self) -> None:
        """Do nothing: stage 3 finds them through AdamW."""

    def set_part(self, parameter: nn.Parameter, part: str, values: Tensor) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size, rank = parameter.ds_tensor.numel(), parameter.ds_zero_partition_rank  # type: ignore[attr-defined]
        local = values.flatten()[rank * size : (rank + 1) * size]
        local = nn.functional.pad(local, (0, size - local.numel()))  # the last rank's part may be short
        if part == "weight":
            safe_set_local_fp32_param(parameter, local)
        else:
            safe_set_local_optimizer_state(parameter, local, part)

    def round_into_model(self) -> None:
        # Small parameters stay gathered between steps; releasing them makes the next use fetch the new values.
        self.zero.parameter_offload.partition_all_parameters()
        for flat, master in zip(self.zero.fp16_partitioned_groups_flat, self.masters, strict=True):
            flat.copy_(master)
        persistent = self.zero.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)

    def discard(self) -> None:
        self.zero.zero_grad()
        self.zero.averaged_gradients.clear()


def partitioned_fill(config: dict[str, Any]) -> Fill | None:
    """Return `fill_partitioned` with DeepSpeed's configuration; None below stage 3, where ranks hold full weights."""
    return partial(fill_partitioned, config) if config["zero_optimization"]["stage"] == 3 else None


def fill_partitioned(
    config: dict[str, Any], model: nn.Module, value: Callable[[str, nn.Parameter], Tensor], device: torch.device | str
) -> None:
    """Fill a model on the meta device for ZeRO-3: each weight is partitioned before the next one is read.

    value: (name, meta parameter) -> all of its first values; called on rank 0 alone, which sends them to the others.

    A rank holds its partitions and one full tensor at a time. A tied head stays tied. Every rank must call it.
    """
    import deepspeed
    import torch.distributed as dist

    filled: dict[nn.Parameter, nn.Parameter] = {}
    # All full tensors share this buffer. Allocated and freed between the partitions that stay, they would leave holes
    # that the C library does not return: half as much memory again as the partitions take.
    buffer = torch.empty(max(meta.nbytes for meta in model.parameters()), dtype=torch.uint8, device=device)
    for name, meta in list(model.named_parameters(remove_duplicate=False)):
        module, _, attribute = name.rpartition(".")
        if meta not in filled:
            full = buffer[: meta.nbytes].view(meta.dtype).view(meta.shape)
            if dist.get_rank() == 0:
                full.copy_(value(name, meta))
            filled[meta] = nn.Parameter(full, requires_grad=meta.requires_grad)
            del full
            _partition(filled[meta], filled.values(), config, deepspeed.zero.Init)
        setattr(model.get_submodule(module), attribute, filled[meta])


def _partition(parameter: nn.Parameter, others: Iterable[nn.Parameter], config: dict[str, Any], init: Any) -> None:
    first: Any = next(iter(others))
    if parameter is first:
        init(module=nn.ParameterList([parameter]), config_dict_or_path=config)
    else:  # every partitioned parameter can partition others in the same way
        first.convert_to_zero_parameters([parameter])
