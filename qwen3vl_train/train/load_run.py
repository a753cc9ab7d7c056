"""A finished or running run as a model again.

The base checkpoint with the trained tensors of the run's last checkpoint.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qwen3vl_train.checkpoint.manifest import latest_checkpoint, read_manifest
from qwen3vl_train.checkpoint.writer import read_tensors
from qwen3vl_train.config import Recipe, load_recipe
from qwen3vl_train.model.qwen3vl import Qwen3VLForConditionalGeneration
from qwen3vl_train.train.build import build_model
from qwen3vl_train.train.run_folder import RECIPE_FILE


@dataclass(frozen=True)
class RestoredRun:
    """model: with adapters still apart, in eval mode. step: of the checkpoint it was read from."""

    model: Qwen3VLForConditionalGeneration
    recipe: Recipe
    step: int


def is_run_folder(path: Path) -> bool:
    return (path / RECIPE_FILE).is_file()


@torch.no_grad()
def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Let the parameters hold only what `dtype` can hold, in the dtype that they have."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


@torch.no_grad()
def restore_run(folder: Path, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> RestoredRun:
    """Load a run's newest checkpoint over its base model.

    All weights, the trained float32 masters and the frozen ones, are rounded to the dtype the run computed in before
    they are cast to `dtype`, so that what is looked at or exported is the function that was trained. Raises ValueError
    where the folder holds no run or no checkpoint, or the newest is not whole to the last byte.
    """
    if not is_run_folder(folder):
        raise ValueError(f"{folder}: not a run folder (no {RECIPE_FILE}); give runs/<name>")
    recipe = load_recipe(folder / RECIPE_FILE)
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        raise ValueError(f"{folder}: has no checkpoint yet; wait for checkpoint.every_steps, or let the run end")
    record = read_manifest(checkpoint, checksums=True)
    model = build_model(recipe, device=device, dtype=dtype)
    trained_as = torch.bfloat16 if recipe.model.dtype == "bfloat16" else torch.float32
    round_weights(model, trained_as)
    stored = read_tensors(checkpoint, "weight/")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensor = stored.pop(f"weight/{name}", None)
            if tensor is None or tensor.shape != parameter.shape:
                raise ValueError(f"{checkpoint}: holds no fitting {name}; was the recipe in {folder} changed?")
            parameter.copy_(tensor.to(trained_as))
    if stored:
        raise ValueError(f"{checkpoint}: holds {next(iter(stored))}, which the recipe in {folder} does not train")
    return RestoredRun(model.eval(), recipe, int(record["step"]))
