"""What the index, the loader and the stream ask of a source of rows."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.data.media.remote import Remote, reaches_web
from qwen3vl_train.data.rows.parse import Find, RowRules
from qwen3vl_train.data.rows.sample import Sample
from qwen3vl_train.data.sources.files import explained, is_compressed, is_url, stamp, unpacked

Place = dict[str, int]
"""Where a file is read on, as JSON."""


class Source(Protocol):
    """Rows that are known by their number and not kept in memory. It must pickle, for worker processes.

    name: the file, as the recipe wrote it. What the rows give follows from `fingerprint`, media_root and rules.
    """

    name: str
    media_root: str | None
    rules: RowRules

    def __len__(self) -> int: ...

    def sample(self, row: int) -> Sample:
        """Return row 0..len-1, checked. Raises RowFault."""
        ...

    def row_number(self, row: int) -> int:
        """Return the number a person finds the row by, counted from 1."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Return what changes when the content changes, as JSON."""
        ...


class StreamRow(NamedTuple):
    """One row of a stream. state: JSON; handed to `rows`, it goes on behind this row. file, row_number: for people."""

    state: dict[str, Any]
    sample: Sample | RowFault
    row_number: int
    file: str


class StreamSource(Protocol):
    """Rows that come one after the other, of all files of one entry of the recipe. It must pickle, as a `Source`.

    name: the path or pattern, as the recipe wrote it.
    """

    name: str

    def rows(self, state: dict[str, Any] | None = None) -> Iterator[StreamRow]:
        """Yield the rows once, in their order: from the first, or behind the row whose state this is.

        A row that cannot be used comes as its fault. Raises ValueError where a file cannot be read on.
        """
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Return what the stream is made of, as JSON: files and their sizes, without reading them."""
        ...


class RawRow(NamedTuple):
    """A row as a file holds it, or its fault. place: where the file goes on behind it. number: for people.

    find: where its media are, of an archive or a data set.
    """

    row: Any
    number: int
    place: Place
    find: Find | None = None


class FileSource(ABC):
    """What the sources of one file have in common."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        media_root: str | os.PathLike[str] | None = None,
        rules: RowRules | None = None,
    ) -> None:
        """media_root: a folder or an fsspec URL. Raises ValueError when it is not there."""
        self.name = os.fspath(path)
        self.media_root = None if media_root is None else os.fspath(media_root)
        self.rules = rules or RowRules()
        self.file = Path(self.name).name
        self._stamps: dict[str, list[int | str]] = {}
        check_media_root(self.name, self.media_root, self.rules)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def raw(self, row: int) -> RawRow:
        """Return row 0..len-1 unchecked. Raises RowFault."""

    @abstractmethod
    def row_number(self, row: int) -> int:
        """Return the number a person finds the row by, counted from 1."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Return what changes when the content changes, as JSON."""

    def _plain(self) -> str:
        """Return the file, or a plain copy of a compressed one, for reading at any place. Raises ValueError."""
        if not is_compressed(self.name):
            return self.name
        if not is_url(self.name):
            with explained(self.name):
                self._note_stamp(self.name)  # before it is read, so that a change of it while it is read shows too
        return str(unpacked(self.name))

    def _note_stamp(self, path: str) -> int:
        """Remember a file as it is now, for `_check_unchanged`. Returns its size. Raises OSError."""
        self._stamps[path] = stamp(path)
        return int(self._stamps[path][0])

    def _check_unchanged(self) -> None:
        """Raise RowFault when a file that was noted is not as it was."""
        for path, seen in self._stamps.items():
            check_unchanged(path, seen)

    def sample(self, row: int) -> Sample:
        """Return row 0..len-1 as a Sample, named like `train.jsonl:17`. Raises RowFault."""
        raw = self.raw(row)
        return self.rules.sample(raw.row, self.rules.sample_id(self.file, raw.number), self.media_root, raw.find)


def check_media_root(name: str, media_root: str | None, rules: RowRules) -> None:
    """Raise ValueError for a folder that is not there, and for a web address unless the rules allow those."""
    if media_root is not None and reaches_web(media_root) and not rules.allow_urls:
        raise ValueError(
            f"{name}: media_root {Remote(media_root)} is a web address, and nothing is downloaded; set allow_urls: "
            "true, or media_root to a folder"
        )
    if media_root is not None and not is_url(media_root) and not os.path.isdir(media_root):
        raise ValueError(f"{name}: media_root {media_root} is not a folder; check the paths under data")


def check_unchanged(path: str, seen: list[int | str], when: str = "indexed") -> None:
    """Raise RowFault when a file is not as it was, see `stamp`, so that places in it mean nothing any more.

    Of a remote file this is not asked: it would double its requests.
    """
    if is_url(path):
        return
    try:
        now = stamp(path)
    except OSError as error:
        now = [error.strerror or str(error)]
    if now != seen:
        what = f"{seen[0]} bytes then, {now[0]} now" if now[0] != seen[0] else "its time differs"
        raise RowFault(
            f"{path} changed since it was {when} ({what}); put it back and resume, or start a new run",
            kind="changed",
            transient=True,
        )
