"""What the index, the loader and the stream ask of a source of rows."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from qwen3vl_train.data.faults import RowFault
from qwen3vl_train.data.formats import Sample


class Source(Protocol):
    """Rows that are known by their number and not kept in memory. It must pickle, for worker processes.

    name: the file, as the recipe wrote it.
    """

    name: str

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
    """One row of a stream. state: JSON; handed to `rows`, it goes on behind this row. file, row_number: for a person."""

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
