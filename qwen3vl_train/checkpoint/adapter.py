"""A LoRA adapter in files that any peft from 0.11 on loads: its tensors and its configuration."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen3vl_train.config import LoraTune

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_STOCK_CLASS = ("transformers.models.qwen3_vl.modeling_qwen3_vl", "Qwen3VLForConditionalGeneration")


def write_adapter(
    adapter: Mapping[str, Tensor], folder: Path, *, tune: LoraTune, base: str, dtype: torch.dtype
) -> None:
    """Write the adapter and read it back. adapter: by the names of `adapter_tensors`. base: path or name of its base.

    Raises RuntimeError where a tensor reads back different from what was written.
    """
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in adapter.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = adapter_config(tensors, tune, base)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name, tensor in load_file(folder / ADAPTER_WEIGHTS).items():
        expect_equal(name, tensor, tensors[name])


def adapter_config(adapter: Mapping[str, Tensor], tune: LoraTune, base: str) -> dict[str, Any]:
    """Return adapter_config.json with the keys that say something alone: peft refuses those that it does not know.

    Without a task type, and with the class of its base, it opens through every class of peft and transformers.
    """
    module, name = _STOCK_CLASS
    return {
        "auto_mapping": {"base_model_class": name, "parent_library": module},
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": tune.alpha,
        "lora_dropout": tune.dropout,
        "peft_type": "LORA",
        "r": tune.rank,
        # Full names: suffixes such as 'proj' would match others too.
        "target_modules": sorted({name.removeprefix("base_model.model.").partition(".lora_")[0] for name in adapter}),
        "task_type": None,
        **({"use_dora": True} if tune.dora else {}),
        **({"use_rslora": True} if tune.rslora else {}),
    }


def expect_equal(name: str, written: Tensor, expected: Tensor) -> None:
    """Raise RuntimeError where a tensor does not read back as what was written."""
    if not torch.equal(written, expected):
        raise RuntimeError(f"{name}: reads back different from what was written; check the disk")
