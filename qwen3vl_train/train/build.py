"""From a recipe to a model on its ranks: described without memory, sharded, then filled, each rank with its part."""

import os
import zlib
from collections.abc import Callable, Mapping, Sequence
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
from qwen3vl_train.model.new_rows import modules_with_new_rows
from qwen3vl_train.model.qwen3vl import DTYPES, Qwen3VLForConditionalGeneration
from qwen3vl_train.parallel.ddp import Replicated, same_on_all_ranks
from qwen3vl_train.parallel.deepspeed.config import deepspeed_config
from qwen3vl_train.parallel.deepspeed.engine import ZeroAdamW, start_deepspeed
from qwen3vl_train.parallel.deepspeed.internals import Fill, partitioned_fill
from qwen3vl_train.parallel.fsdp import Sharded, shard_model
from qwen3vl_train.parallel.mesh import build_mesh
from qwen3vl_train.parallel.optim import MasterAdamW, TrainEngine
from qwen3vl_train.train.tune import apply_tuning


def build_engine(recipe: Recipe, ranks: Ranks) -> tuple[Qwen3VLForConditionalGeneration, TrainEngine]:
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
        model = build_model(recipe, device=ranks.device, fill=partitioned_fill(config))
        return model, ZeroAdamW(model, recipe.optim, config, ranks)
    model = build_model(recipe, device=ranks.device)
    return model, MasterAdamW(model, recipe.optim, Replicated(ranks.world_size))


def check_replicas(optimizer: TrainEngine, ranks: Ranks) -> None:
    """Raise RuntimeError on all ranks where ranks that hold full copies of what trains hold different ones."""
    if not isinstance(optimizer, MasterAdamW) or optimizer.lockstep:
        return
    if not same_on_all_ranks([item.master for item in optimizer.trained], ranks.world_size):
        raise RuntimeError("ranks start from different weights; do they read the same model folder and checkpoint?")


def describe(arch: Qwen3VLArch, recipe: Recipe) -> Qwen3VLForConditionalGeneration:
    """Return the recipe's model on the meta device: its shapes, its adapters and what trains, without memory.

    Raises ValueError for a target that matches nothing, and for learning rates of groups that do not train.
    """
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(arch)
    apply_tuning(model, recipe)
    return model


def build_model(
    recipe: Recipe,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    mesh: DeviceMesh | None = None,
    fill: Fill | None = None,
    check: Callable[[nn.Module], Any] | None = None,
    num_layers: int | None = None,
) -> Qwen3VLForConditionalGeneration:
    """Build the recipe's model with its weights and fresh adapters, and apply parallelism to it.

    dtype: of the arithmetic, the recipe's by default.
    mesh: shards the model by FSDP2.
    fill: of an engine that partitions weights itself, fills the model in place of step 5.
    check: called with the model before it has memory.
    num_layers: keep so many decoder layers and no more.

    No rank holds more than its own weights and the tensor being read. Raises ValueError for what is wrong with the
    model folder or the targets.
    """
    dtype = dtype or DTYPES[recipe.model.dtype]
    files = WeightFiles(recipe.model.path)
    # 1. Adapters and what trains, on the meta device: sharding groups parameters by both. The files are compared with
    #    the shapes before anything is allocated.
    model = describe(Qwen3VLArch.from_pretrained(recipe.model.path), recipe)
    check_weights(model, files)
    if check is not None:
        check(model)
    if num_layers is not None:
        del model.language_model.model.layers[num_layers:]
    # 2. Activation checkpointing. It runs inside the blocks, so that what follows wraps them with it.
    for block in model.visual.vision.blocks:
        block.checkpointing = recipe.train.activation_checkpointing.vision  # type: ignore[assignment]
    for layer in model.language_model.model.layers:
        layer.checkpointing = recipe.train.activation_checkpointing.text  # type: ignore[assignment]
    # 3. Compiling the blocks would come here: after 2, which it would trace, and before sharding hooks them.
    # 4. Sharding. It holds what trains in float32 (see parallel.fsdp); replicated runs keep float32 masters beside it.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad and mesh is not None else dtype)
    if mesh is not None:
        shard_model(model, mesh, recipe.parallel, dtype)
    # 5. Memory and weights, of this rank's shards alone: a full copy never exists.
    if fill is not None:
        check_tied(model, files)
        fill(model, partial(_first_values, files, recipe.train.seed, _ids_of_new_rows(model)), device)
    else:
        materialize(model, "cpu" if mesh is not None and recipe.parallel.cpu_offload else device)
        read_weights(model, files)
        init_adapters(model, recipe.train.seed)
        # Float32 masters start where those of the other engines do: at the weights in the recipe's dtype.
        as_trained(model, dtype)
    return model


@torch.no_grad()
def as_trained(model: nn.Module, dtype: torch.dtype) -> None:
    """Round all weights to the dtype that a run computed with, and keep them in the dtype that they have.

    The model then is the function that was trained: float32 masters hold more than was ever used.
    """
    for parameter in model.parameters():
        if parameter.dtype != dtype:
            to_local(parameter).copy_(to_local(parameter).to(dtype))


@torch.no_grad()
def init_adapters(model: nn.Module, seed: int) -> None:
    """Give every adapter its first values: A uniform within 1/sqrt(in), B zero, so that the function is unchanged.

    The distribution is peft's, but each tensor's values come from (seed, name) alone, so that they do not depend on
    how the model is sharded. DoRA magnitudes are the row norms of the base weights; rows of tokens are the base's.
    Every rank must call it.
    """
    parameters, ids = dict(model.named_parameters()), _ids_of_new_rows(model)
    for name, parameter in parameters.items():
        if is_adapter(name):
            values = _adapter_values(name, parameter, seed, ids, lambda base: full_tensor(parameters[base]))
            copy_local_shard(parameter, values)


def _ids_of_new_rows(model: nn.Module) -> dict[str, Sequence[int]]:
    return {f"{name}.new_rows": table.new_ids for name, table in modules_with_new_rows(model)}


def _adapter_values(
    name: str, parameter: nn.Parameter, seed: int, ids: Mapping[str, Sequence[int]], read: Callable[[str], Tensor]
) -> Tensor:
    """Return the full first values of an adapter's tensor, or of rows of tokens.

    ids: the tokens of the rows, by name of the tensor. read: returns a full base weight, by its name.
    """
    if name in ids:
        return read(name.replace(".new_rows", ".weight"))[list(ids[name])]
    if ".lora_magnitude_vector." in name:
        base = read(name.partition(".lora_")[0] + ".base_layer.weight")
        return base.float().norm(dim=1).reshape(parameter.shape)
    if ".lora_B." in name:
        return torch.zeros(parameter.shape)
    assert ".lora_A." in name, name
    # torch's generator on the CPU takes the low 32 bits of a seed and drops the others.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    bound = parameter.shape[1] ** -0.5
    return torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)


def _first_values(
    files: WeightFiles, seed: int, ids: Mapping[str, Sequence[int]], name: str, parameter: nn.Parameter
) -> Tensor:
    """Return the full first values of a parameter, read or computed without the model's own memory."""

    def read(ours: str) -> Tensor:
        stored = base_name(ours)
        ((_, values),) = files.read({stored: tuple(map(slice, files.shapes[stored]))})
        return values

    if is_adapter(name):
        return _adapter_values(name, parameter, seed, ids, lambda base: read(base).to(parameter.dtype))
    return read(name)
