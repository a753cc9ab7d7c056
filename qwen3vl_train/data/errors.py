"""What can be wrong with one row of data, and how it is written down."""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from qwen3vl_train.data.rows.sample import Sample


class RowFault(ValueError):
    """One row cannot be used. The message says what was found and what to do; it does not name file and row.

    transient: it follows from the machine and not from the data, such as a server that does not answer or a disk that
    fails, so that the row may be sound at the next look. sample: the row as far as it was understood, if it was.
    """

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient
        self.sample: Sample | None = None

    def at(self, where: str) -> "RowFault":
        """Return the same fault with the place before it."""
        return type(self)(f"{where}: {self}", transient=self.transient)


class MediaFault(RowFault):
    """An image of a row is missing, damaged, unsafe or of a kind that is not read."""


class Reject(NamedTuple):
    """A row that is left out, as `rejected.jsonl` lists it. row: line number, counted from 1."""

    file: str
    row: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.row}: {self.reason}"
