"""Load a run as a model: its base checkpoint with the trained tensors of one of its checkpoints."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qwen3vl_train.checkpoint.manifest import (
    best_checkpoint,
    checkpoint_folder,
    complete_checkpoints,
    held_out_losses,
    read_manifest,
)
from qwen3vl_train.checkpoint.writer import iter_tensors, stored_weights
from qwen3vl_train.config import Recipe, load_recipe
from qwen3vl_train.model.qwen3vl import DTYPES, Qwen3VLForConditionalGeneration
from qwen3vl_train.train.build import as_trained, build_model
from qwen3vl_train.train.run_folder import RECIPE_FILE


@dataclass(frozen=True)
class FoundCheckpoint:
    """One checkpoint of a run. note: a line for the user, where another one may have been meant."""

    recipe: Recipe
    folder: Path
    step: int
    note: str | None = None

    def check_trained(self, model: nn.Module) -> list[str]:
        """Return the names of the weights of the model that train; the checkpoint holds them all.

        model: as the recipe describes it, with or without values. Raises ValueError where the two differ.
        """
        stored, recipe_of = stored_weights(self.folder), self.folder.parent.parent
        wanted = {n: tuple(parameter.shape) for n, parameter in model.named_parameters() if parameter.requires_grad}
        for name, shape in wanted.items():
            if stored.get(name) != shape:
                what = f"does not hold {name} in its shape; was the recipe in {recipe_of} changed?"
                raise ValueError(f"{self.folder}: {what}")
        if more := stored.keys() - wanted.keys():
            what = f"holds weight/{min(more)}, which the recipe in {recipe_of} does not train"
            raise ValueError(f"{self.folder}: {what}")
        return list(wanted)


@dataclass(frozen=True)
class RestoredRun:
    """A run as a model."""

    model: Qwen3VLForConditionalGeneration  # in eval mode; adapters are not merged
    recipe: Recipe
    step: int  # of the checkpoint that was read


def is_run_folder(path: Path) -> bool:
    return (path / RECIPE_FILE).is_file()


def find_checkpoint(run: Path, *, step: int | None = None, best: str | None = None) -> FoundCheckpoint:
    """Choose a checkpoint of a run: the newest one, that of a step, or the one with the lowest held-out loss.

    best: name of a held-out set; empty: that of checkpoint.keep_best, or the only one.

    Every byte of it is compared with its checksum. Raises ValueError where the folder holds no run, not this
    checkpoint, or a damaged one.
    """
    if not is_run_folder(run):
        raise ValueError(f"{run}: not a run folder (no {RECIPE_FILE}); give runs/<name>")
    recipe = load_recipe(run / RECIPE_FILE)
    folders = complete_checkpoints(run)
    if not folders:
        raise ValueError(f"{run}: has no checkpoint yet; wait for checkpoint.every_steps, or let the run end")
    folder, note = folders[-1], None
    if step is not None:
        folder = checkpoint_folder(run, step)
        if folder not in folders:
            known = ", ".join(str(_step(one)) for one in folders)
            raise ValueError(f"{run}: has no checkpoint of step {step}; it has those of steps {known}")
    elif best is not None:
        name = best or _only_name(run, recipe, folders)
        folder = best_checkpoint(folders, name)
        if folder is None:
            known = ", ".join(sorted({known for one in folders for known in held_out_losses(one)})) or "none"
            raise ValueError(
                f"{run}: no checkpoint has a loss on a held-out set {name!r}; there are losses on: {known}"
            )
        loss = held_out_losses(folder)[name]
        note = f"step {_step(folder)} has the lowest loss on {name}, {loss:.4f}, of {len(folders)} checkpoints"
    elif name := recipe.checkpoint.keep_best:
        lowest = best_checkpoint(folders, name)
        if lowest is not None and lowest != folder:
            note = (
                f"step {_step(folder)} is the newest; the lowest loss on {name} is that of step {_step(lowest)}: --best"
            )
        elif lowest is not None:
            note = f"step {_step(folder)} is the newest, and has the lowest loss on {name}"
    record = read_manifest(folder, checksums=True)
    return FoundCheckpoint(recipe, folder, int(record["step"]), note)


def _only_name(run: Path, recipe: Recipe, folders: list[Path]) -> str:
    names = sorted({name for folder in folders for name in held_out_losses(folder)})
    if recipe.checkpoint.keep_best or len(names) == 1:
        return recipe.checkpoint.keep_best or names[0]
    raise ValueError(f"{run}: losses on {len(names)} held-out sets ({', '.join(names) or 'no eval'}); name one of them")


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


@torch.no_grad()
def restore_run(
    run: Path | FoundCheckpoint,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    num_layers: int | None = None,
) -> RestoredRun:
    """Load a checkpoint of a run over its base model; that of a run folder is the newest one.

    dtype: of the arithmetic, the recipe's by default.
    num_layers: load so many decoder layers and no more.

    All weights are rounded to the dtype that the run computed with, see `as_trained`. Raises ValueError as
    `find_checkpoint` does, and where the checkpoint is not of this recipe.
    """
    found = find_checkpoint(run) if isinstance(run, Path) else run
    model = build_model(found.recipe, device=device, dtype=dtype, check=found.check_trained, num_layers=num_layers)
    trained = {f"weight/{name}": parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, tensor in iter_tensors(found.folder, list(trained)):
        trained[name].copy_(tensor)
    as_trained(model, DTYPES[found.recipe.model.dtype])
    return RestoredRun(model.eval(), found.recipe, found.step)
