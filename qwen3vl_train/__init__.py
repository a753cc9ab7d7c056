"""Exact, packed, distributed fine-tuning of the Qwen3-VL vision-language models."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen3vl_train.checkpoint.hf import load_qwen3_vl_model
    from qwen3vl_train.data.encode.collator import MultimodalCollator
    from qwen3vl_train.model.qwen3vl import Qwen3VLForConditionalGeneration, process_vision_slices

__version__ = "0.1.0"

_HOME = {
    "load_qwen3_vl_model": "qwen3vl_train.checkpoint.hf",
    "MultimodalCollator": "qwen3vl_train.data.encode.collator",
    "Qwen3VLForConditionalGeneration": "qwen3vl_train.model.qwen3vl",
    "process_vision_slices": "qwen3vl_train.model.qwen3vl",
}
__all__ = ["MultimodalCollator", "Qwen3VLForConditionalGeneration", "load_qwen3_vl_model", "process_vision_slices"]


def __getattr__(name: str):
    # Loaded on first use: reading a recipe or a plan must not import torch modules.
    from importlib import import_module

    if name not in _HOME:
        raise AttributeError(f"module 'qwen3vl_train' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
