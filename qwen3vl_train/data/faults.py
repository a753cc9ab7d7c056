"""What can be wrong with one row of data, and how it is written down."""

from typing import NamedTuple


class RowFault(ValueError):
    """One row cannot be used. The message says what was found and what to do; it does not name file and row."""


class MediaFault(RowFault):
    """An image of a row is missing, damaged, unsafe or of a kind that is not read."""


class Reject(NamedTuple):
    """A row that is left out, as `rejected.jsonl` lists it. row: line number, counted from 1."""

    file: str
    row: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.row}: {self.reason}"
