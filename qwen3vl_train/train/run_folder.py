"""The run folder: whether it is new, can be resumed, or belongs to another run."""

from pathlib import Path
from typing import NamedTuple

from qwen3vl_train.checkpoint.manifest import choose_checkpoint, complete_checkpoints, read_manifest, rename_damaged
from qwen3vl_train.config import Recipe, load_recipe, recipe_differences, run_dir, save_recipe
from qwen3vl_train.config.fields import may_change
from qwen3vl_train.data.rejects import REJECTED_FILE

RECIPE_FILE = "recipe.yaml"


class OpenedFolder(NamedTuple):
    """What the folder of a run holds."""

    path: Path
    checkpoint: Path | None  # to resume from
    damaged: list[str]  # what is wrong with newer checkpoints
    changes: list[str]  # fields of the recipe that were changed since, as `checkpoint.allow_changes` allows


def open_run_folder(recipe: Recipe, base: int) -> OpenedFolder:
    """Open the folder of a recipe's run. base: the fingerprint of its base weights.

    Writes nothing: `claim_run_folder` does. Raises ValueError where the folder holds another run, all of its
    checkpoints are damaged, or the run has started and `checkpoint.resume` is never.
    """
    folder = run_dir(recipe)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; choose another name or output_dir")
    # A run that failed on its data before it started leaves only the list of rejected rows.
    if not folder.exists() or all(file.name == REJECTED_FILE for file in folder.iterdir()):
        return OpenedFolder(folder, None, [], [])
    file = folder / RECIPE_FILE
    if not file.is_file():
        raise ValueError(f"{folder}: holds other files, but no {RECIPE_FILE}; choose another name or output_dir")
    differences = recipe_differences(load_recipe(file), recipe)
    base_there = _base_of(folder)
    if base_there == base:
        differences.pop("model.path", None)
    elif base_there is not None:
        path = recipe.model.path
        differences["model.path"] = f"model.path: {path} holds other weights than the run was started with"
    if refused := [key for key in differences if key not in recipe.checkpoint.allow_changes]:
        raise ValueError(_holds_another_run(folder, refused, list(differences.values())))
    if recipe.checkpoint.resume == "never":
        raise ValueError(
            f"{folder}: holds this run already; choose another name, or set checkpoint.resume: auto to continue"
        )
    return OpenedFolder(folder, *choose_checkpoint(folder), list(differences.values()))


def _base_of(folder: Path) -> int | None:
    """Return the fingerprint of the base weights that the newest readable checkpoint was made with, if it has one."""
    for checkpoint in reversed(complete_checkpoints(folder)):
        try:
            return read_manifest(checkpoint).get("base")
        except ValueError:
            continue
    return None


def _holds_another_run(folder: Path, refused: list[str], differences: list[str]) -> str:
    lines = "".join(f"\n  - {line}" for line in differences)
    ways = [f"choose another name, with tune.start_from: {folder} to start from what was trained here"]
    if all(may_change(key) for key in refused):
        ways.append(f"set checkpoint.allow_changes: [{', '.join(refused)}] to continue this run with the changes")
    return f"{folder}: holds another run{lines}\n{'; or '.join(ways)}"


def claim_run_folder(folder: Path, recipe: Recipe, checkpoint: Path | None) -> None:
    """Make the folder, write the resolved recipe and set checkpoints after the chosen one aside.

    Raises ValueError where that is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        rename_damaged(folder, checkpoint)
        save_recipe(recipe, folder / RECIPE_FILE)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({error.strerror}); choose another output_dir") from error
