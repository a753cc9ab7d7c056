"""What an export consists of: an adapter or all weights, and the files beside them."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from qwen3vl_train.checkpoint.adapter import ADAPTER_CONFIG, adapter_settings, write_adapter
from qwen3vl_train.checkpoint.companions import copy_companions, write_card
from qwen3vl_train.checkpoint.hf import write_huggingface
from qwen3vl_train.checkpoint.safetensors_writer import check_safetensors
from qwen3vl_train.config import LoraTune, Recipe
from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.encode.template import find_template


def write_adapter_files(
    recipe: Recipe,
    model: nn.Module,
    adapter: Mapping[str, Tensor],
    folder: Path,
    collate: MultimodalCollator,
    dtype: torch.dtype,
) -> None:
    """Write an adapter for peft, and read it back.

    model: whose adapter it is; no values of it are read. adapter: by the names of `adapter_tensors`.
    """
    assert isinstance(recipe.tune, LoraTune)
    settings = adapter_settings(model, recipe.tune)
    write_adapter(adapter, folder, settings=settings, base=recipe.model.public_name, dtype=dtype)
    _write_companions(recipe, folder, collate)


def write_checkpoint_files(
    recipe: Recipe,
    weights: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    folder: Path,
    collate: MultimodalCollator,
    dtype: torch.dtype,
) -> None:
    """Write a full checkpoint, and read it back. weights, shapes: see `write_huggingface`."""
    checksums = write_huggingface(weights, shapes, folder, source=recipe.model.path, dtype=dtype)
    for file, of_file in checksums.items():
        check_safetensors(folder / file, of_file)
    _write_companions(recipe, folder, collate)


def _write_companions(recipe: Recipe, folder: Path, collate: MultimodalCollator) -> None:
    """Write tokenizer, template and processors with the limits of images and the settings of clips that were used."""
    budgets, clips = collate.budgets, collate.budgets.clips
    limits, settings = (budgets.min_pixels, budgets.max_pixels), None
    if clips is not None:
        size = {"shortest_edge": clips.min_pixels, "longest_edge": clips.max_pixels}
        sampling = {"fps": clips.fps, "min_frames": clips.min_frames, "max_frames": clips.max_frames}
        settings = {"size": size, **sampling}
    template, _ = find_template(recipe.model.path)
    source = recipe.model.path
    copy_companions(source, folder, template=template, pixel_limits=limits, clip_settings=settings)
    base, hub_id, is_adapter = recipe.model.public_name, recipe.model.hub_id, (folder / ADAPTER_CONFIG).is_file()
    write_card(folder, name=recipe.name, base=base, hub_id=hub_id, is_adapter=is_adapter)
