"""Files on disk, or at any URL that fsspec reads: find them, read them, and unpack them once."""

import contextlib
import fcntl
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from glob import glob, has_magic
from pathlib import Path
from typing import IO, Any

from qwen3vl_train.atomic_file import atomic_file
from qwen3vl_train.data.signatures import FileSignature

COMPRESSED = (".gz", ".zst", ".zstd")
DAMAGE = (OSError, EOFError, zlib.error)
"""What reading a damaged compressed file raises."""
_BLOCK = 1 << 20
CUT = b"\0cut:"
"""In the last line of the unpacked copy of a truncated file, after what is left of its row; the reason follows."""
MAX_UNPACKED_RATIO, MIN_UNPACKED_BYTES = 200, 1 << 30
"""A file that unpacks to more than both of these is not text: JSON shrinks to a tenth, zeros to a thousandth."""


def is_url(path: str) -> bool:
    return "://" in path


def suffix_of(path: str) -> str:
    """Return the file's suffix without that of its compression: `a.jsonl.gz` -> `.jsonl`."""
    name = path.rstrip("/").rpartition("/")[2].lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return ".tar" if name.endswith(".tgz") else os.path.splitext(name)[1]


def folder_of(path: str) -> str:
    return path.rpartition("/")[0] if is_url(path) else os.path.dirname(path) or "."


def is_compressed(path: str) -> bool:
    return path.lower().endswith((*COMPRESSED, ".tgz"))


def find_files(path: str, suffixes: tuple[str, ...]) -> list[str]:
    """Return the files that a path, a pattern or a folder names, sorted; in a folder, those with one of the suffixes.

    A `**` in a pattern descends into folders. Raise ValueError when there are none.
    """
    with naming_file(path):
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
    files = sorted(name for name in found if suffix_of(name) in suffixes)
    if not files:
        raise ValueError(f"{path}: no file in it ends with {', '.join(suffixes)}; check the paths under data")
    return files


def _find_remote(url: str) -> list[str]:
    import fsspec

    fs, path = fsspec.core.url_to_fs(url)
    if has_magic(path):
        return [fs.unstrip_protocol(name) for name in fs.glob(path)]
    if fs.isdir(path):
        return [fs.unstrip_protocol(name) for name in fs.ls(path, detail=False)]
    return [url]


@contextlib.contextmanager
def naming_file(path: str) -> Iterator[None]:
    """Turn what a file system raises into a ValueError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; check the paths under data") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: not a file; check the paths under data") from None
    except ImportError as error:
        raise ValueError(f"{path}: {error}; install what reads such addresses") from None
    except ValueError as error:  # from fsspec, such as an unknown protocol
        if path in str(error):
            raise
        raise ValueError(f"{path}: {error}; check the paths under data") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}); check the paths under data") from None


def open_file(path: str) -> IO[bytes]:
    """Open a file for random access. Raise ValueError."""
    with naming_file(path):
        if not is_url(path):
            if os.path.exists(path) and not os.path.isfile(path):
                raise IsADirectoryError
            return open(path, "rb")
        import fsspec

        return fsspec.open(path, "rb").open()  # type: ignore[return-value]


def read_range(path: str, start: int, length: int) -> bytes:
    """Return a byte range of a file, shorter where the file ends before. Raise OSError."""
    if not is_url(path):
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(length)
    import fsspec

    fs, remote_path = fsspec.core.url_to_fs(path)
    return fs.cat_file(remote_path, start=start, end=start + length)


def file_signature(path: str) -> FileSignature:
    """Return the signature of a local or remote file. Raises OSError."""
    if not is_url(path):
        return FileSignature.from_path(path)
    import fsspec

    fs, path_in_fs = fsspec.core.url_to_fs(path)
    info = fs.info(path_in_fs)
    version = next((info[key] for key in ("ETag", "etag", "LastModified", "mtime", "created") if info.get(key)), "")
    return FileSignature(int(info.get("size") or 0), str(version))


def open_compressed(path: str) -> IO[bytes]:
    """Open a compressed file as the stream of its content. Reading a damaged one raises one of DAMAGE.

    One that unpacks to far more than text would is a ValueError: a few megabytes may hold terabytes.
    """
    file = open_file(path)
    if path.lower().endswith((".gz", ".tgz")):
        content: Any = gzip.GzipFile(fileobj=file)
    else:
        import pyarrow

        content = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")
    return _Limited(content, path, file)  # type: ignore[return-value]


class _Limited(io.RawIOBase):
    """The content of a compressed file, up to a size that its own allows."""

    def __init__(self, content: Any, path: str, file: IO[bytes]) -> None:
        self._content, self._path, self._file = content, path, file
        packed = file.seek(0, os.SEEK_END)
        file.seek(0)
        self._left = max(MIN_UNPACKED_BYTES, MAX_UNPACKED_RATIO * packed)

    def read(self, size: int = -1) -> bytes:
        # read1, where there is one: read discards what it has unpacked when the file ends too early.
        read = getattr(self._content, "read1", self._content.read)
        block = read(size if size >= 0 else self._left + 1)
        self._left -= len(block)
        if self._left < 0:
            fault = f"unpacks to more than 1 GiB and {MAX_UNPACKED_RATIO} times its size, as no file of rows does"
            raise ValueError(f"{self._path}: {fault}; unpack it yourself if you trust it")
        return block

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        self._content.close()
        self._file.close()
        super().close()


def open_plain(path: str) -> IO[bytes]:
    """Open a file, compressed or not, as the stream of its content."""
    return open_compressed(path) if is_compressed(path) else open_file(path)


def cache_folder() -> Path:
    """Return the folder of unpacked copies and other cached results; it may be deleted between runs.

    $QWEN3VL_TRAIN_CACHE, or qwen3vl_train in $XDG_CACHE_HOME or ~/.cache.
    """
    own = os.environ.get("QWEN3VL_TRAIN_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen3vl_train"


def cached_copy(path: str, key: Any, write: Callable[[Path], None], suffix: str) -> Path:
    """Return the copy of a file that `write` makes, made at the first call for the file's present signature.

    key: all that the copy depends on besides the file, as JSON.
    Processes that ask at the same time wait for the one that writes; a copy is complete or absent. Raise what `write`
    raises, and ValueError for a full disk.
    """
    with naming_file(path):
        signature = file_signature(path)
    full_key = json.dumps([path if is_url(path) else os.path.abspath(path), signature, key])
    folder = cache_folder() / "unpacked"
    name = hashlib.sha256(full_key.encode()).hexdigest()[:32] + suffix
    copy, lock = folder / name, folder / f"{name}.lock"
    if copy.exists():
        return copy
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as held:
            with contextlib.suppress(OSError):  # a file system without locks: each writes a copy, the last one is kept
                fcntl.flock(held, fcntl.LOCK_EX)
            if not copy.exists():
                with atomic_file(copy) as temporary:
                    write(temporary)
                    if file_signature(path) != signature:
                        raise ValueError(f"{path}: changed while it was unpacked; start again once it is complete")
    except OSError as error:
        remedy = "free space, set QWEN3VL_TRAIN_CACHE to another folder, or set streaming: true"
        raise ValueError(f"{path}: cannot be unpacked to {folder} ({error.strerror or error}); {remedy}") from None
    return copy


def unpack(path: str, *, keeps_rows: bool = False) -> Path:
    """Return an uncompressed copy of a file, for random access. Raise ValueError where it is damaged.

    keeps_rows: of a file that is truncated, the copy has all lines before the cut, and then one with CUT.
    """

    def write(copy: Path) -> None:
        lines = 0
        with copy.open("wb") as out, open_compressed(path) as file:
            while True:
                try:
                    block = file.read(_BLOCK)
                except DAMAGE as error:
                    if keeps_rows and isinstance(error, EOFError) and lines:
                        out.write(CUT + str(error).encode() + b"\n")
                        return
                    raise damaged(path, lines, error) from None
                if not block:
                    return
                lines += block.count(b"\n")
                out.write(block)

    return cached_copy(path, "lines" if keeps_rows else "plain", write, suffix_of(path))


def damaged(path: str, rows: int, error: object) -> ValueError:
    """Return the error of a file that cannot be read further after so many complete rows or lines."""
    return ValueError(f"{path}: is truncated or damaged after row {rows} ({error}); copy the file again")
