"""The interface of a source of rows, and what the sources of one file share."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from qwen3vl_train.data.errors import LAST_RESORT, RowFault
from qwen3vl_train.data.media.remote import Remote, uses_web
from qwen3vl_train.data.rows.parse import ResolveMedium, RowRules
from qwen3vl_train.data.rows.sample import Sample
from qwen3vl_train.data.signatures import FileSignature
from qwen3vl_train.data.sources.files import file_signature, is_compressed, is_url, naming_file, unpack
from qwen3vl_train.public_names import last_part

StrPath = str | os.PathLike[str]
Position = dict[str, int]
"""Where to continue reading a file, as JSON."""
Ignored = dict[str, None]
"""Names of ignored columns, as an ordered set."""
BEGINNING: Position = {"byte": 0, "row": 0}


class Source(Protocol):
    """Rows that are known by their index and not kept in memory. It must pickle, for worker processes.

    name: the file, as the recipe has it.
    The rows are determined by `fingerprint`, media_root and rules.
    """

    name: str
    media_root: str | None
    rules: RowRules

    @property
    def ignored_columns(self) -> tuple[str, ...]:
        """The names of the columns of a typed file (Parquet, CSV, `datasets`) that no row is made from, in its order.

        None for JSON and tar files, whose rows come whole.
        """
        ...

    def __len__(self) -> int: ...

    def sample(self, row: int) -> Sample:
        """Return row 0..len-1, checked. Raise RowFault."""
        ...

    def row_number(self, row: int) -> int:
        """Return the number that messages give the row, counted from 1."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Return what changes when the content changes, as JSON; the path is not in it, so a file may move."""
        ...


class StreamRow(NamedTuple):
    """One row of a stream. state: JSON; passed to `StreamSource.rows`, it continues after this row."""

    state: dict[str, Any]
    sample: Sample | RowFault
    row_number: int
    file: str


class StreamSource(Protocol):
    """The rows of all files of one entry of the recipe (name: its path or pattern), in order. It must pickle."""

    name: str

    @property
    def ignored_columns(self) -> tuple[str, ...]:
        """As of a `Source`: those of all files that this object has read rows from so far, each once."""
        ...

    def rows(self, state: dict[str, Any] | None = None) -> Iterator[StreamRow]:
        """Yield each row once, in order: from the first, or after the row whose state this is.

        A row that cannot be used is yielded as its fault. Raise ValueError where a file cannot be read further.
        """
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Return what the stream consists of, as JSON: files and their sizes, without reading them."""
        ...


class RawRow(NamedTuple):
    """A row as a file has it, or its fault. position: where the file continues after it. number: for messages."""

    row: Any
    number: int
    position: Position
    resolve: ResolveMedium | None = None


class FileSource(ABC):
    """A `Source` over one file."""

    def __init__(self, path: StrPath, media_root: StrPath | None = None, rules: RowRules | None = None) -> None:
        """Open and scan the file. Raise ValueError when it is damaged or media_root (folder or URL) does not exist."""
        self.name = os.fspath(path)
        self.media_root = None if media_root is None else os.fspath(media_root)
        self.rules = rules or RowRules()
        self.file = last_part(self.name)
        self.ignored_columns: tuple[str, ...] = ()
        self._signatures: dict[str, FileSignature] = {}
        check_media_root(self.name, self.media_root, self.rules)
        self._fingerprint = self._open()

    @abstractmethod
    def _open(self) -> dict[str, Any]:
        """Find the rows of the file and return its fingerprint. Raise ValueError."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def raw(self, row: int) -> RawRow:
        """Return row 0..len-1 unchecked. Raise RowFault where it cannot be read or the file has changed."""

    def row_number(self, row: int) -> int:
        return row + 1

    def fingerprint(self) -> dict[str, Any]:
        return dict(self._fingerprint)

    def sample(self, row: int) -> Sample:
        with LAST_RESORT:
            raw = self.raw(row)
            return self.rules.sample(raw.row, self.rules.sample_id(self.file, raw.number), self.media_root, raw.resolve)

    def _uncompressed_path(self, *, keeps_rows: bool = False) -> str:
        """Return the file, or an uncompressed copy of it, for random access. Raise ValueError. keeps_rows: `unpack`."""
        if not is_compressed(self.name):
            return self.name
        if not is_url(self.name):
            with naming_file(self.name):
                self._record_signature(self.name)  # before it is read, to notice a change during reading too
        return str(unpack(self.name, keeps_rows=keeps_rows))

    def _record_signature(self, path: str) -> int:
        """Record the present signature of a file, for `_check_unchanged`. Return its size. Raise OSError."""
        self._signatures[path] = file_signature(path)
        return self._signatures[path].size

    def _check_unchanged(self) -> None:
        for path, recorded in self._signatures.items():
            check_unchanged(path, recorded)


def known_columns(names: Sequence[str], rules: RowRules, path: str) -> tuple[list[str], list[str]]:
    """Return the columns that rows are made from, and the others. Raise ValueError when there are none of the first."""
    read = rules.columns_read()
    known, others = [name for name in names if name in read], [name for name in names if name not in read]
    if not known:
        found = ", ".join(names[:20])
        raise ValueError(f"{path}: has the columns {found}, and none that rows are made from; name them under columns")
    return known, others


def is_turn(value: Any) -> bool:
    """Return whether a value is one turn of a conversation, so that a list of such values is one row."""
    return isinstance(value, dict) and ("role" in value or "from" in value)


def check_media_root(name: str, media_root: str | None, rules: RowRules) -> None:
    """Raise ValueError for a folder that does not exist, and for a web address unless the rules allow those."""
    if media_root is not None and uses_web(media_root) and not rules.allow_urls:
        fault = "is a web address, and nothing is downloaded; set allow_urls: true, or media_root to a folder"
        raise ValueError(f"{name}: media_root {Remote(media_root)} {fault}")
    if media_root is not None and not is_url(media_root) and not os.path.isdir(media_root):
        raise ValueError(f"{name}: media_root {media_root} is not a folder; check the paths under data")


def check_unchanged(path: str, recorded: FileSignature | None, when: str = "indexed") -> None:
    """Raise RowFault when a file's signature has changed, so that positions in it are no longer valid."""
    if recorded is None or is_url(path):  # checking remote files would double the number of requests
        return
    try:
        now = file_signature(path)
        size = str(now.size)
    except OSError as error:
        now, size = None, error.strerror or str(error)
    if now != recorded:
        what = f"{recorded.size} bytes then, {size} now" if size != str(recorded.size) else "its time differs"
        fault = f"{path} changed since it was {when} ({what}); put it back and resume, or start a new run"
        raise RowFault(fault, kind="changed", transient=True)
