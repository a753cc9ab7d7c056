"""Files wherever they lie: on disk, or behind any URL that fsspec reads. Finds them, reads them, unpacks them once."""

import contextlib
import fcntl
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from glob import glob, has_magic
from pathlib import Path
from typing import IO, Any

COMPRESSED = (".gz", ".zst", ".zstd")
_BLOCK = 1 << 20


def is_url(path: str) -> bool:
    return "://" in path


def suffix_of(path: str) -> str:
    """Return the ending that says what a file is, without that of its compression: `a.jsonl.gz` -> `.jsonl`."""
    name = path.rstrip("/").rpartition("/")[2].lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    if name.endswith(".tgz"):
        return ".tar"
    return os.path.splitext(name)[1]


def is_compressed(path: str) -> bool:
    return path.lower().endswith((*COMPRESSED, ".tgz"))


def find_files(path: str, endings: tuple[str, ...]) -> list[str]:
    """Return the files that a path, a pattern or a folder names, sorted; of a folder those with one of the endings.

    A `**` in a pattern goes down into folders. Raises ValueError when there are none.
    """
    with explained(path):
        if is_url(path):
            found = _find_remote(path)
        elif os.path.isdir(path):
            found = [os.path.join(path, name) for name in os.listdir(path)]
        elif has_magic(path) and not os.path.exists(path):
            found = glob(path, recursive=True)
        else:
            found = [path]
    if found == [path]:
        return found
    files = sorted(name for name in found if suffix_of(name) in endings)
    if not files:
        raise ValueError(f"{path}: no file in it ends with {', '.join(endings)}; check the paths under data")
    return files


def _find_remote(url: str) -> list[str]:
    import fsspec

    fs, place = fsspec.core.url_to_fs(url)
    if has_magic(place):
        return [fs.unstrip_protocol(name) for name in fs.glob(place)]
    if fs.isdir(place):
        return [fs.unstrip_protocol(name) for name in fs.ls(place, detail=False)]
    return [url]


@contextlib.contextmanager
def explained(path: str) -> Iterator[None]:
    """Turn what a file system raises into a ValueError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; check the paths under data") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: not a file; check the paths under data") from None
    except ImportError as error:
        raise ValueError(f"{path}: {error}; install what reads such addresses") from None
    except ValueError as error:  # of fsspec, such as an unknown protocol
        if path in str(error):
            raise
        raise ValueError(f"{path}: {error}; check the paths under data") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}); check the paths under data") from None


def open_file(path: str) -> IO[bytes]:
    """Open a file for reading at any place. Raises ValueError."""
    with explained(path):
        if not is_url(path):
            if os.path.exists(path) and not os.path.isfile(path):
                raise IsADirectoryError
            return open(path, "rb")
        import fsspec

        return fsspec.open(path, "rb").open()  # type: ignore[return-value]


def read_span(path: str, start: int, length: int) -> bytes:
    """Return part of a file, shorter where it ends before. Raises OSError."""
    if not is_url(path):
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(length)
    import fsspec

    fs, place = fsspec.core.url_to_fs(path)
    return fs.cat_file(place, start=start, end=start + length)


def stamp(path: str) -> list[int | str]:
    """Return size and time of change of a file, by which a change of it shows. Raises OSError."""
    if not is_url(path):
        status = os.stat(path)
        return [status.st_size, status.st_mtime_ns]
    import fsspec

    fs, place = fsspec.core.url_to_fs(path)
    info = fs.info(place)
    time = next((info[key] for key in ("ETag", "etag", "LastModified", "mtime", "created") if info.get(key)), "")
    return [int(info.get("size") or 0), str(time)]


def open_unpacked(path: str) -> IO[bytes]:
    """Open a compressed file as the stream of what is in it; damage shows while reading. See `reading_packed`."""
    file = open_file(path)
    if path.lower().endswith((".gz", ".tgz")):
        return gzip.GzipFile(fileobj=file)  # type: ignore[return-value]
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")


def skip_to(file: IO[bytes], place: int) -> None:
    """Go to a place of a file just opened, by reading where the stream of a compressed file can do no better."""
    if file.seekable():
        file.seek(place)
        return
    while place > 0 and (block := file.read(min(_BLOCK, place))):
        place -= len(block)


DAMAGE = (OSError, EOFError, zlib.error)
"""What reading a damaged compressed file raises."""


def cache_folder() -> Path:
    """Where unpacked copies and other things worked out once are kept; it may be deleted at any time between runs.

    $QWEN3VL_TRAIN_CACHE, or qwen3vl_train in $XDG_CACHE_HOME or ~/.cache.
    """
    own = os.environ.get("QWEN3VL_TRAIN_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen3vl_train"


def unpack_once(path: str, what: Any, write: Callable[[Path], None], ending: str) -> Path:
    """Return the copy of a file that `write` makes, made at the first call for this file as it is now.

    what: all that the copy depends on beside the file, as JSON. Processes that ask at the same time wait for the one
    that writes; a copy is whole or not there. Raises what `write` raises, and ValueError for a full disk.
    """
    with explained(path):
        seen = stamp(path)
    key = json.dumps([path if is_url(path) else os.path.abspath(path), seen, what])
    folder = cache_folder() / "unpacked"
    name = hashlib.sha256(key.encode()).hexdigest()[:32] + ending
    copy, lock = folder / name, folder / f"{name}.lock"
    if copy.exists():
        return copy
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            if not copy.exists():
                aside = folder / f"{name}.{os.getpid()}"
                try:
                    write(aside)
                    if stamp(path) != seen:
                        raise ValueError(f"{path}: changed while it was unpacked; start again once it is whole")
                    os.replace(aside, copy)
                finally:
                    aside.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be unpacked to {folder} ({error.strerror or error}); free space, set "
            "QWEN3VL_TRAIN_CACHE to another folder, or set streaming: true"
        ) from None
    return copy


def unpacked(path: str) -> Path:
    """Return a plain copy of a compressed file, for reading at any place. Raises ValueError where it is damaged."""

    def write(copy: Path) -> None:
        lines = 0
        with copy.open("wb") as out, open_unpacked(path) as file:
            while True:
                try:
                    block = file.read(_BLOCK)
                except DAMAGE as error:
                    raise ValueError(damaged(path, lines, error)) from None
                if not block:
                    return
                lines += block.count(b"\n")
                out.write(block)

    return unpack_once(path, "plain", write, suffix_of(path))


def damaged(path: str, rows: int, error: object) -> str:
    """Say that a file cannot be read on behind so many whole rows or lines."""
    return f"{path}: is truncated or damaged behind row {rows} ({error}); copy the file again"
