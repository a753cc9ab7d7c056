"""Folders that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Write a folder aside and rename it into place when the block ends well.

    Raises ValueError when `folder` exists already. Whatever stops the block, `folder` is not made and the part written
    is removed.
    """
    aside = start_aside(folder)
    try:
        yield aside
        for path in aside.rglob("*"):
            flush(path)
        finish(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def start_aside(folder: Path) -> Path:
    """Make the folder in which `folder` is written until it is whole.

    Raises ValueError when `folder` exists already.
    """
    if folder.exists():
        raise ValueError(f"{folder}: exists already; choose another folder or remove it")
    aside = folder.with_name(f".{folder.name}.partial")
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    return aside


def finish(aside: Path, folder: Path) -> None:
    """Rename `aside`, in which everything is flushed, to `folder`, so that a power cut cannot undo it."""
    flush(aside)
    aside.rename(folder)
    flush(folder.parent)


def flush(path: Path) -> None:
    """Let a file's content, or a folder's list of files, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
