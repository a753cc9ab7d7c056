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
    """Flush everything under `aside` to disk and rename it to `folder`."""
    for file in aside.rglob("*"):
        if file.is_file():
            _fsync(file)
    _fsync(aside)
    aside.rename(folder)
    _fsync(folder.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
