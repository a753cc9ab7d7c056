"""Load a run as a model: its base checkpoint with the trained tensors of its last checkpoint."""

from dataclasses import dataclass
from pathlib import Path

import torch

from qwen3vl_train.checkpoint.manifest import latest_checkpoint, read_manifest
from qwen3vl_train.checkpoint.writer import read_tensors
from qwen3vl_train.config import Recipe, load_recipe
from qwen3vl_train.model.qwen3vl import DTYPES, Qwen3VLForConditionalGeneration
from qwen3vl_train.train.build import as_trained, build_model
from qwen3vl_train.train.run_folder import RECIPE_FILE


@dataclass(frozen=True)
class RestoredRun:
    """A run as a model."""

    model: Qwen3VLForConditionalGeneration  # in eval mode; adapters are not merged
    recipe: Recipe
    step: int  # of the checkpoint that was read


def is_run_folder(path: Path) -> bool:
    return (path / RECIPE_FILE).is_file()


@torch.no_grad()
def restore_run(folder: Path, *, dtype: torch.dtype | None, device: torch.device | str = "cpu") -> RestoredRun:
    """Load a run's newest checkpoint over its base model. dtype: of the arithmetic, the recipe's by default.

    All weights are rounded to the dtype that the run computed with, see `as_trained`. Raises ValueError where the
    folder holds no run or no checkpoint, or the newest checkpoint is damaged.
    """
    if not is_run_folder(folder):
        raise ValueError(f"{folder}: not a run folder (no {RECIPE_FILE}); give runs/<name>")
    recipe = load_recipe(folder / RECIPE_FILE)
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        raise ValueError(f"{folder}: has no checkpoint yet; wait for checkpoint.every_steps, or let the run end")
    record = read_manifest(checkpoint, checksums=True)
    model = build_model(recipe, device=device, dtype=dtype)
    stored = read_tensors(checkpoint, "weight/")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensor = stored.pop(f"weight/{name}", None)
            if tensor is None or tensor.shape != parameter.shape:
                what = f"does not hold {name} in its shape; was the recipe in {folder} changed?"
                raise ValueError(f"{checkpoint}: {what}")
            parameter.copy_(tensor)
    if stored:
        raise ValueError(f"{checkpoint}: holds {next(iter(stored))}, which the recipe in {folder} does not train")
    as_trained(model, DTYPES[recipe.model.dtype])
    return RestoredRun(model.eval(), recipe, int(record["step"]))
