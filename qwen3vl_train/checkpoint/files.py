"""Folders that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Write a folder aside, flush it to disk and rename it into place when the block ends well.

    Raises ValueError when `folder` exists already. Whatever stops the block, `folder` is not made and the part written
    is removed.
    """
    if folder.exists():
        raise ValueError(f"{folder}: exists already; choose another folder or remove it")
    aside = folder.with_name(f".{folder.name}.partial")
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                _fsync(file)
        _fsync(aside)
        aside.rename(folder)
        _fsync(folder.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
