"""The run folder: whether it is new, can be resumed, or belongs to another run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from qwen3vl_train.atomic_file import is_temporary
from qwen3vl_train.checkpoint.folder_lock import LOCK_FILE, FolderLock
from qwen3vl_train.checkpoint.manifest import choose_checkpoint, complete_checkpoints, read_manifest, rename_damaged
from qwen3vl_train.config import Recipe, load_recipe, recipe_differences, run_dir, save_recipe
from qwen3vl_train.config.fields import may_change
from qwen3vl_train.data.rejects import REJECTED_FILE
from qwen3vl_train.dist.ranks import Ranks

RECIPE_FILE = "recipe.yaml"


class OpenedFolder(NamedTuple):
    """What the folder of a run holds."""

    path: Path
    checkpoint: Path | None  # to resume from
    damaged: list[str]  # what is wrong with newer checkpoints
    changes: list[str]  # fields of the recipe that were changed since, as `checkpoint.allow_changes` allows


@contextmanager
def locked_run_folder(recipe: Recipe, ranks: Ranks) -> Iterator[Callable[[], None]]:
    """Lock the run folder, from before anything is read in it until the block ends. Every rank must call it.

    Yields a function that raises RuntimeError on rank 0 where another job has taken the lock since. Raises ValueError
    on every rank where another job holds it, or where the folder is not that of a run; it is not touched then.
    """
    lock: FolderLock | None = None

    def acquire() -> None:
        nonlocal lock
        _has_started(run_dir(recipe))
        lock = FolderLock(run_dir(recipe), waiting=ranks.heartbeat)

    ranks.on_main(acquire)
    try:
        yield lambda: lock.check() if lock else None
    finally:
        if lock:
            lock.release()


def open_run_folder(recipe: Recipe, base: int) -> OpenedFolder:
    """Open the folder of a recipe's run. base: the fingerprint of its base weights.

    Writes nothing: `claim_run_folder` does. Raises ValueError where the folder holds another run, all of its
    checkpoints are damaged, or the run has started and `checkpoint.resume` is never.
    """
    folder = run_dir(recipe)
    if not _has_started(folder):
        return OpenedFolder(folder, None, [], [])
    differences = recipe_differences(load_recipe(folder / RECIPE_FILE), recipe)
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


def _has_started(folder: Path) -> bool:
    """Return whether the folder holds a run that has started. Raises ValueError where it holds something else."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; choose another name or output_dir")
    if not folder.exists() or all(_is_leftover(file.name) for file in folder.iterdir()):
        return False
    if not (folder / RECIPE_FILE).is_file():
        raise ValueError(f"{folder}: holds other files, but no {RECIPE_FILE}; choose another name or output_dir")
    return True


def _is_leftover(name: str) -> bool:
    """Return whether a file is what a run leaves that ended before it started, on its data or by a kill.

    `.nfs*`: what a network file system makes of a file that is removed while it is open.
    """
    return name in (REJECTED_FILE, LOCK_FILE) or is_temporary(name) or name.startswith(".nfs")


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

    Unfinished files of killed processes are removed: the folder is locked, so nobody writes them any more.
    Raises ValueError where that is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.iterdir():
            if is_temporary(file.name):
                file.unlink()
        rename_damaged(folder, checkpoint)
        save_recipe(recipe, folder / RECIPE_FILE)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({error.strerror}); choose another output_dir") from error
