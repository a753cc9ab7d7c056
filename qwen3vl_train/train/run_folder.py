"""The run's folder: whether it is new, can be gone on with, or belongs to another run.

And the rows that were rejected.
"""

import json
import os
import platform
from pathlib import Path

import torch

import qwen3vl_train
from qwen3vl_train.checkpoint.manifest import choose_checkpoint, set_aside_newer
from qwen3vl_train.config import Recipe, load_recipe, recipe_differences, run_dir, save_recipe
from qwen3vl_train.data.errors import Reject
from qwen3vl_train.data.rejects import KnownRejects

RECIPE_FILE = "recipe.yaml"
REJECTED_FILE = "rejected.jsonl"


def open_run_folder(recipe: Recipe) -> tuple[Path, Path | None, list[str]]:
    """Return (run folder, checkpoint to resume from or None, what is wrong with newer checkpoints).

    Writes nothing: `claim_run_folder` does. Raises ValueError where the folder holds another run, no checkpoint of it
    is whole, or `checkpoint.resume: never` meets a started one.
    """
    folder = run_dir(recipe)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; choose another name or output_dir")
    # A run that stopped over its data before it began leaves the list of rejected rows and nothing else.
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
            f"{folder}: holds this run already; choose another name, or set checkpoint.resume: auto to go on"
        )
    return folder, *choose_checkpoint(folder)


def claim_run_folder(folder: Path, recipe: Recipe, checkpoint: Path | None) -> None:
    """Make the folder, write the resolved recipe and set checkpoints behind the chosen one aside.

    Raises ValueError where that is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        set_aside_newer(folder, checkpoint)
        save_recipe(recipe, folder / RECIPE_FILE)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({error.strerror}); choose another output_dir") from error


def versions() -> dict[str, str]:
    """What produced a checkpoint."""
    return {"qwen3vl_train": qwen3vl_train.__version__, "torch": torch.__version__, "python": platform.python_version()}


class RejectLog:
    """`rejected.jsonl`: one object a rejected row. Who adds rows adds each once, see `TrainingData.add_rejects`.

    writes: False on ranks other than 0.
    """

    def __init__(self, path: Path, *, writes: bool) -> None:
        self.path, self._writes = path, writes

    def add(self, rejects: list[Reject]) -> list[Reject]:
        """List rows, and return them."""
        if rejects and self._writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Half a character (of a file's name, of a text that a reason quotes) is written as JSON writes it: \\udc80.
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(json.dumps(reject._asdict(), ensure_ascii=False) + "\n" for reject in rejects)
        return rejects


def restart_rejects(path: Path, found: list[Reject], *, num_saved: int) -> list[Reject]:
    """Make `rejected.jsonl` what it was when num_saved rows were in it, and add those of `found` that are not.

    num_saved: at the checkpoint that the run goes on from, 0 where it begins. What was listed behind that is taken out:
    it is met again. Returns the rows that stay; fewer than num_saved where somebody took lines out.
    """
    # A kill can cut the last line short, so it is whole only with its line feed.
    lines = path.read_bytes().split(b"\n")[:-1][:num_saved] if path.is_file() else []
    saved = [_reject_of(line, path, number) for number, line in enumerate(lines, start=1)]
    if saved:
        os.truncate(path, sum(len(line) + 1 for line in lines))
    else:
        path.unlink(missing_ok=True)
    known = KnownRejects()
    known.add(saved)
    RejectLog(path, writes=True).add(known.add(found))
    return saved


def _reject_of(line: bytes, path: Path, number: int) -> Reject:
    try:
        return Reject(**json.loads(line))
    except (ValueError, TypeError):
        raise ValueError(f"{path}:{number}: not a rejected row; take the line out") from None
