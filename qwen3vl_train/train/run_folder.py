"""The run folder: whether it is new, can be resumed, or belongs to another run."""

from pathlib import Path

from qwen3vl_train.checkpoint.manifest import choose_checkpoint, rename_damaged
from qwen3vl_train.config import Recipe, load_recipe, recipe_differences, run_dir, save_recipe
from qwen3vl_train.data.rejects import REJECTED_FILE

RECIPE_FILE = "recipe.yaml"


def open_run_folder(recipe: Recipe) -> tuple[Path, Path | None, list[str]]:
    """Return (run folder, checkpoint to resume from or None, what is wrong with newer checkpoints).

    Writes nothing: `claim_run_folder` does. Raises ValueError where the folder holds another run, all of its
    checkpoints are damaged, or the run has started and `checkpoint.resume` is never.
    """
    folder = run_dir(recipe)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; choose another name or output_dir")
    # A run that failed on its data before it started leaves only the list of rejected rows.
    if not folder.exists() or all(file.name == REJECTED_FILE for file in folder.iterdir()):
        return folder, None, []
    file = folder / RECIPE_FILE
    if not file.is_file():
        raise ValueError(f"{folder}: holds other files, but no {RECIPE_FILE}; choose another name or output_dir")
    differences = recipe_differences(load_recipe(file), recipe)
    if differences:
        lines = "\n".join(f"  - {line}" for line in differences)
        raise ValueError(f"{folder}: holds another run\n{lines}\nchoose another name, or remove the folder")
    if recipe.checkpoint.resume == "never":
        raise ValueError(
            f"{folder}: holds this run already; choose another name, or set checkpoint.resume: auto to continue"
        )
    return folder, *choose_checkpoint(folder)


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
