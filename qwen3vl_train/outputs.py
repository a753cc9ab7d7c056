"""Files that a program writes beside its checkpoints: an error of the system names them, with the remedy."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

REMEDY = "make room or make it writable, then start again"


class OutputError(RuntimeError):
    """A file cannot be written: the disk is full, a folder is missing, a quota is used up."""


@contextlib.contextmanager
def writing(path: str | Path, remedy: str = REMEDY) -> Iterator[None]:
    """Turn what the system raises while a file or folder is written into an OutputError that names it.

    remedy: what to do, in the words of an error message.
    An error that names a file elsewhere, such as one that is read meanwhile, passes unchanged.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error.filename, str) and not _is_near(os.path.abspath(error.filename), os.path.abspath(path)):
            raise
        raise OutputError(f"{path}: cannot be written ({error.strerror or error}); {remedy}") from error


def _is_near(refused: str, wanted: str) -> bool:
    """Return whether a refused path is in the folder of the wanted one (a temporary file of it), or above it."""
    return refused.startswith(os.path.dirname(wanted)) or wanted.startswith(refused)


def check_writable(path: Path) -> None:
    """Open a file for writing, before the work of which it is to keep the result, and leave it as it is.

    Its folder is made. Raise OutputError.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        path.open("ab").close()
        if is_new:
            path.unlink()


def write_text(path: Path, text: str) -> None:
    """Replace the content of a file. Raise OutputError."""
    with writing(path):
        path.write_text(text, encoding="utf-8")


def append_text(path: Path, text: str, remedy: str = REMEDY) -> None:
    """Append whole lines to a file, or nothing: what a full disk cut short is removed again. Raise OutputError.

    A lone surrogate (in the name of a file, in a text that a message quotes) is written as JSON does: \\\\udc80.
    """
    with writing(path, remedy):
        path.parent.mkdir(parents=True, exist_ok=True)
        content = memoryview(text.encode("utf-8", "backslashreplace"))
        with path.open("ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                while content:
                    content = content[file.write(content) :]
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(file.fileno(), size)
                raise
