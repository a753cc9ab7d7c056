"""The weights of a checkpoint of a run, one tensor at a time: what trained, merged into what did not.

Nothing here holds a model. It is described on the meta device, and its tensors come from the files of base and
checkpoint as they are asked for; adapters are small and held.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qwen3vl_train.arch import Qwen3VLArch
from qwen3vl_train.checkpoint.hf import WeightFiles, check_weights
from qwen3vl_train.checkpoint.writer import iter_tensors
from qwen3vl_train.model.lora import base_name, is_adapter
from qwen3vl_train.model.new_rows import modules_with_new_rows
from qwen3vl_train.model.qwen3vl import DTYPES, Qwen3VLForConditionalGeneration
from qwen3vl_train.train.build import describe
from qwen3vl_train.train.export.memory import return_freed_memory
from qwen3vl_train.train.load_run import FoundCheckpoint


def describe_trained(found: FoundCheckpoint) -> Qwen3VLForConditionalGeneration:
    """Return the model of a run on the meta device; base and checkpoint hold all of its weights. Raises ValueError."""
    path = found.recipe.model.path
    model = describe(Qwen3VLArch.from_pretrained(path), found.recipe)
    check_weights(model, WeightFiles(path))
    found.check_trained(model)
    return model


@torch.no_grad()
def fill_trained(model: nn.Module, found: FoundCheckpoint) -> None:
    """Give the weights that train their values, rounded to the dtype that the run computed with; others stay meta."""
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}  # of a tied head two
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            owners.setdefault(parameter, []).append((module, leaf))
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, values in _trained(found, list(parameters)):
        filled = nn.Parameter(values)
        for module, leaf in owners[parameters[name]]:
            setattr(module, leaf, filled)


def plain_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all weights of a model without its adapters, by the names that they have then."""
    parameters = model.named_parameters()
    return {base_name(name): tuple(parameter.shape) for name, parameter in parameters if not is_adapter(name)}


@torch.no_grad()
def merged_weights(model: nn.Module, found: FoundCheckpoint) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight of `plain_shapes`, with adapters merged in float32.

    All arithmetic is on values rounded to the dtype that the run computed with: float32 masters hold more than was
    ever used. model: on the meta device; modules are filled and emptied as they are merged.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    dtype, files = DTYPES[found.recipe.model.dtype], WeightFiles(found.recipe.model.path)
    parameters = dict(model.named_parameters())
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    adapters = dict(_trained(found, [name for name in trained if is_adapter(name)]))
    whole = _trained(found, [name for name in trained if not is_adapter(name)])
    tables = dict(modules_with_new_rows(model))
    layers: dict[str, Any] = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    for name, parameter in parameters.items():
        if is_adapter(name):
            continue
        plain = base_name(name)
        values = next(whole)[1] if parameter.requires_grad else files.read_one(plain).to(dtype)
        layer_name, adapted, leaf = name.partition(".base_layer.")
        if adapted and leaf == "weight":
            prefix = f"{layer_name}."
            own = {key.removeprefix(prefix): adapters[key] for key in trained if key.startswith(prefix)}
            values = _merge(layers[layer_name], {"base_layer.weight": values, **own})
        rows = adapters.get(name.removesuffix("weight") + "new_rows")
        if rows is not None:
            ids = torch.tensor(tables[name.removesuffix(".weight")].new_ids)
            values = values.index_copy(0, ids, rows.to(values.dtype))
        yield plain, values


def _merge(layer: Any, tensors: dict[str, Tensor]) -> Tensor:
    """Return the weight of one layer with its adapter merged by peft, and give its memory back."""
    layer.to_empty(device="cpu")
    for name, parameter in layer.named_parameters():
        if name in tensors:
            parameter.copy_(tensors[name])
    layer.merge(safe_merge=True)
    merged = layer.get_base_layer().weight.detach()
    layer.to("meta")
    return_freed_memory()
    return merged


def _trained(found: FoundCheckpoint, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the stored weights of these names, in their order, rounded to the dtype that the run computed with."""
    dtype = DTYPES[found.recipe.model.dtype]
    for stored, tensor in iter_tensors(found.folder, [f"weight/{name}" for name in names]):
        yield stored.removeprefix("weight/"), tensor.to(dtype).float()
