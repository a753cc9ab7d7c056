"""What trains beside a frozen base in files that any peft from 0.11 on loads: adapters and whole modules."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qwen3vl_train.config import LoraTune
from qwen3vl_train.model.hf_names import to_huggingface
from qwen3vl_train.model.lora import ADAPTER, is_adapter, lora_layers
from qwen3vl_train.model.new_rows import is_new_rows, modules_with_new_rows
from qwen3vl_train.outputs import REMEDY, OutputError

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
TOKEN_ROWS = "token_adapter.trainable_tokens_delta"
_STOCK_CLASS = ("transformers.models.qwen3_vl.modeling_qwen3_vl", "Qwen3VLForConditionalGeneration")


def write_adapter(
    adapter: Mapping[str, Tensor], folder: Path, *, settings: Mapping[str, Any], base: str, dtype: torch.dtype
) -> None:
    """Write the adapter and read it back. base: path or name of its base.

    adapter, settings: as `adapter_tensors` and `adapter_settings` return them.

    Raises RuntimeError where a tensor reads back different from what was written.
    """
    tensors = {name: tensor.detach().to("cpu", dtype, copy=True).contiguous() for name, tensor in adapter.items()}
    try:
        save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:  # also for what the disk refuses
        raise OutputError(f"{folder / ADAPTER_WEIGHTS}: cannot be written ({error}); {REMEDY}") from error
    config = adapter_config(settings, base)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name, tensor in load_file(folder / ADAPTER_WEIGHTS).items():
        expect_equal(name, tensor, tensors[name])


def adapter_config(settings: Mapping[str, Any], base: str) -> dict[str, Any]:
    """Return adapter_config.json with the keys that say something alone: peft refuses those that it does not know.

    Without a task type, and with the class of its base, it opens through every class of peft and transformers.
    """
    module, name = _STOCK_CLASS
    return {
        "auto_mapping": {"base_model_class": name, "parent_library": module},
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "peft_type": "LORA",
        "task_type": None,
        **settings,
    }


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what trains under the names that `PeftModel.from_pretrained` reads on the stock model.

    The parameters themselves: only they know that ZeRO-3 has partitioned them.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):  # a tied head is a module of its own there
        module, found, part = name.partition(".lora_")
        if found:
            # peft's files name DoRA's vector itself, its model a weight inside of it.
            kind = part.replace(f".{ADAPTER}", "", 1).replace("magnitude_vector.weight", "magnitude_vector")
            tensors[f"{PREFIX}{to_huggingface(module)}.lora_{kind}"] = parameter
        elif is_new_rows(name):
            table = to_huggingface(name.removesuffix(".new_rows"))
            tensors[f"{PREFIX}{table}.{TOKEN_ROWS}"] = parameter
        elif parameter.requires_grad:
            tensors[f"{PREFIX}{to_huggingface(name)}"] = parameter
    return tensors


def adapter_settings(model: nn.Module, tune: LoraTune) -> dict[str, Any]:
    """Return the keys of adapter_config.json that follow from what trains; lists are sorted, modules have full names.

    Suffixes such as `proj` would match other modules too.
    """
    sizes = {to_huggingface(name): (layer.r[ADAPTER], layer.lora_alpha[ADAPTER]) for name, layer in lora_layers(model)}
    rank, alpha = (Counter(numbers).most_common(1)[0][0] for numbers in zip(*sizes.values(), strict=True))
    whole = {
        to_huggingface(name).rpartition(".")[0]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad and not is_adapter(name)
    }
    optional = {
        # Whole names, not escaped: older peft looks them up as they are.
        "rank_pattern": {name: own for name, (own, _) in sorted(sizes.items()) if own != rank},
        "alpha_pattern": {name: own for name, (_, own) in sorted(sizes.items()) if own != alpha},
        "modules_to_save": sorted(whole),
        "trainable_token_indices": {to_huggingface(n): list(t.new_ids) for n, t in modules_with_new_rows(model)},
        "use_dora": tune.dora,
        "use_rslora": tune.rslora,
    }
    return {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": tune.dropout,
        "target_modules": sorted(sizes),
        **{key: value for key, value in optional.items() if value},
    }


def expect_equal(name: str, written: Tensor, expected: Tensor) -> None:
    """Raise RuntimeError where a tensor does not read back as what was written."""
    if not torch.equal(written, expected):
        raise RuntimeError(f"{name}: reads back different from what was written; check the disk")
