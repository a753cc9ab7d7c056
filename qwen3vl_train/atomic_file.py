"""Files that appear complete or not at all, however many processes write them at the same time."""

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

_ENDING = ".tmp"
_LEFTOVER_SECONDS = 24 * 3600.0
"""Since the last write; no process pauses that long within a file."""


@contextlib.contextmanager
def atomic_file(file: Path, *, flushed: bool = False) -> Iterator[Path]:
    """Yield a path to write to, and rename it to `file` when the block ends without an error.

    The path is unique: a process id is not, where containers or machines share a folder. What a killed process has left
    is removed a day later. Raises what writing raises (OSError); then `file` is as it was before.

    flushed: let not even a power cut undo or empty it (fsync), which a cache can do without.
    """
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}{_ENDING}")
    _remove_leftovers(file)
    try:
        yield temporary
        if flushed:
            flush(temporary)
        temporary.replace(file)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    if flushed:
        flush(file.parent)


def is_temporary(name: str) -> bool:
    """Return whether a file has the name of one that was never completed."""
    return name.startswith(".") and name.endswith(_ENDING)


def flush(path: Path) -> None:
    """Write a file's content, or a folder's list of files, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(file: Path) -> None:
    """Remove old temporary files of the same file. Another process may do so too, and a file may not be ours."""
    with contextlib.suppress(OSError):
        for name in os.listdir(file.parent):
            if is_temporary(name) and name.startswith(f".{file.name}."):
                with contextlib.suppress(OSError):
                    left = file.with_name(name)
                    if time.time() - left.stat().st_mtime > _LEFTOVER_SECONDS:
                        left.unlink()
