"""From a recipe to a model on its ranks.

Built without memory, tuned, sharded, and only then filled, each rank with its own part.
"""

import os
import zlib
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from qwen3vl_train.arch import Qwen3VLArch
from qwen3vl_train.checkpoint.hf import WeightFiles, check_tied, check_weights, materialize, read_weights
from qwen3vl_train.config import Recipe
from qwen3vl_train.dist.ranks import Ranks
from qwen3vl_train.dist.tensors import copy_local_shard, full_tensor, to_local
from qwen3vl_train.model.lora import base_name, is_adapter
from qwen3vl_train.model.qwen3vl import Qwen3VLForConditionalGeneration
from qwen3vl_train.parallel.ddp import Replicated, same_on_all_ranks
from qwen3vl_train.parallel.deepspeed.config import deepspeed_config
from qwen3vl_train.parallel.deepspeed.engine import ZeroAdamW, start_deepspeed
from qwen3vl_train.parallel.deepspeed.internals import fill_partitioned
from qwen3vl_train.parallel.fsdp import Sharded, shard_model
from qwen3vl_train.parallel.mesh import build_mesh
from qwen3vl_train.parallel.optim import MasterAdamW, Optimizer
from qwen3vl_train.train.tune import apply_tuning

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_engine(recipe: Recipe, ranks: Ranks) -> tuple[Qwen3VLForConditionalGeneration, Optimizer]:
    """Build the model and the optimizer of the recipe's engine; the training step is the same with each.

    Raises ValueError for what is wrong with the model folder, the targets, or the numbers of ranks.
    """
    if recipe.train.deterministic:
        # cuBLAS is deterministic with a workspace of its own only, and reads its size at its first multiplication.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if recipe.parallel.engine == "fsdp2":
        mesh = build_mesh(recipe.parallel, ranks)
        model = build_model(recipe, device=ranks.device, mesh=mesh)
        return model, MasterAdamW(model, recipe.optim, Sharded(mesh))
    if recipe.parallel.engine == "deepspeed":
        config = deepspeed_config(recipe, ranks.world_size)
        start_deepspeed(ranks)
        model = build_model(recipe, device=ranks.device, zero=config)
        return model, ZeroAdamW(model, recipe.optim, config, ranks)
    model = build_model(recipe, device=ranks.device)
    return model, MasterAdamW(model, recipe.optim, Replicated(ranks.world_size))


def check_replicas(optimizer: Optimizer, ranks: Ranks) -> None:
    """Raise RuntimeError on all ranks where those that hold whole copies of what trains hold different ones."""
    if not isinstance(optimizer, MasterAdamW) or optimizer.lockstep:
        return
    if not same_on_all_ranks([item.master for item in optimizer.trained], ranks.world_size):
        raise RuntimeError("ranks start from different weights; do they read the same model folder and checkpoint?")


def build_model(
    recipe: Recipe,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    mesh: DeviceMesh | None = None,
    zero: dict[str, Any] | None = None,
) -> Qwen3VLForConditionalGeneration:
    """Build the recipe's model with its weights and fresh adapters; sharded over the mesh where one is given.

    dtype: of the arithmetic, the recipe's by default. zero: DeepSpeed's settings, of a run that uses it. No rank holds
    more than its own weights and the tensor being read. Raises ValueError for what is wrong with the model folder or
    the targets.
    """
    dtype = dtype or DTYPES[recipe.model.dtype]
    arch = Qwen3VLArch.from_pretrained(recipe.model.path)
    files = WeightFiles(recipe.model.path)
    # 1. Names and shapes only: the files are compared with them before anything else is done.
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(arch)
    check_weights(model, files)
    # 2. What trains, adapters, activation checkpointing: sharding must know all three.
    apply_tuning(model, recipe)
    # 3. Sharded runs hold what trains in float32 (see parallel.fsdp), replicated runs keep float32 masters beside it.
    _set_dtypes(model, frozen=dtype, trained=dtype if mesh is None else torch.float32)
    if mesh is not None:
        shard_model(model, mesh, recipe.parallel, dtype)
    model.always_run_vision = mesh is not None or zero is not None
    if zero is not None and zero["zero_optimization"]["stage"] == 3:
        # 4. and 5. at once: rank 0 reads a tensor, DeepSpeed cuts it up, the next one follows.
        check_tied(model, files)
        fill_partitioned(model, zero, partial(_first_values, files, recipe.train.seed), device)
        return model
    # 4. Memory, for this rank's part alone.
    materialize(model, "cpu" if mesh is not None and recipe.parallel.cpu_offload else device)
    # 5. Weights straight into it.
    read_weights(model, files)
    init_adapters(model, recipe.train.seed)
    if mesh is not None:
        _round_trained(model, dtype)
    return model


def _set_dtypes(model: nn.Module, *, frozen: torch.dtype, trained: torch.dtype) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(trained if parameter.requires_grad else frozen)


@torch.no_grad()
def _round_trained(model: nn.Module, dtype: torch.dtype) -> None:
    """Let float32 masters start where those of the other engines do: at the weights in the recipe's dtype."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            to_local(parameter).copy_(to_local(parameter).to(dtype))


@torch.no_grad()
def init_adapters(model: nn.Module, seed: int) -> None:
    """Give every adapter its first values: A uniform within 1/sqrt(in), B zero, so that the function is unchanged.

    The distribution is peft's own, but each tensor's values come from (seed, name) alone, so that they do not depend on
    how the model is spread over ranks. DoRA magnitudes are the row norms of the base weights. Every rank must call it.
    """
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if is_adapter(name):
            base = full_tensor(parameters[_dora_base(name)]) if _is_magnitude(name) else None
            copy_local_shard(parameter, _adapter_values(name, parameter, seed, base))


def _adapter_values(name: str, parameter: nn.Parameter, seed: int, base: Tensor | None) -> Tensor:
    """All first values of an adapter's tensor. base: the adapted weight, for a DoRA magnitude."""
    if base is not None:
        return base.float().norm(dim=1).reshape(parameter.shape)
    if ".lora_B." in name:
        return torch.zeros(parameter.shape)
    assert ".lora_A." in name, name
    # torch's generator on the CPU takes the low 32 bits of a seed and drops the others.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    bound = parameter.shape[1] ** -0.5
    return torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)


def _is_magnitude(name: str) -> bool:
    return ".lora_magnitude_vector." in name


def _dora_base(name: str) -> str:
    return name.partition(".lora_")[0] + ".base_layer.weight"


def _first_values(files: WeightFiles, seed: int, name: str, parameter: nn.Parameter) -> Tensor:
    """All values with which a parameter of the model starts, read or made without the model."""
    if not is_adapter(name):
        return _read(files, base_name(name))
    base = _read(files, base_name(_dora_base(name))).to(parameter.dtype) if _is_magnitude(name) else None
    return _adapter_values(name, parameter, seed, base)


def _read(files: WeightFiles, name: str) -> Tensor:
    ((_, values),) = files.read({name: tuple(map(slice, files.shapes[name]))})
    return values
