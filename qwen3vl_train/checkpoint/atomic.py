"""Folders that appear complete or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen3vl_train.atomic_file import flush


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to write to, and rename it to `folder` when the block ends without an error.

    Raises ValueError where `folder` exists already. Whatever ends the block early, `folder` is not made and the partial
    one is removed.
    """
    partial = start_partial(folder)
    try:
        yield partial
        for path in partial.rglob("*"):
            flush(path)
        finish_partial(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def start_partial(folder: Path) -> Path:
    """Make the folder in which `folder` is written until complete. Raises ValueError where `folder` exists already."""
    if folder.exists():
        raise ValueError(f"{folder}: exists already; choose another folder or remove it")
    partial = folder.with_name(f".{folder.name}.partial")
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    return partial


def finish_partial(partial: Path, folder: Path) -> None:
    """Rename `partial`, whose files are flushed, to `folder`, so that a power cut cannot undo it."""
    flush(partial)
    partial.rename(folder)
    flush(folder.parent)
