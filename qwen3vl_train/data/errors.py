"""Faults of single rows, and the record of a rejected row."""

from typing import Any, ClassVar, Literal, NamedTuple

FaultKind = Literal[
    "invalid_json", "wrong_type", "missing_field", "unknown_field", "conflicting_fields", "invalid_value",
    "media_mismatch", "dropped_by_template", "invalid_boxes", "nothing_to_learn", "too_long",
    "missing_file", "forbidden_path", "unsupported_media", "invalid_media", "no_frame_rate", "download_failed",
    "read_error", "changed",
]  # fmt: skip
"""Why a row cannot be used. Code distinguishes faults by their kind, never by the wording of their message."""


class RowFault(ValueError):
    """One row cannot be used. The message says what was found and what to do; it does not name file and row.

    kind: a `FaultKind`.
    transient: the cause is the machine and not the data, such as a server that does not answer, so a retry may succeed.
    sample: the row as far as it was parsed, a `Sample` or None.
    """

    default_kind: ClassVar[FaultKind] = "invalid_value"

    def __init__(self, message: str, *, kind: FaultKind | None = None, transient: bool = False) -> None:
        super().__init__(message)
        self.kind: FaultKind = kind or self.default_kind
        self.transient = transient
        self.sample: Any = None

    def at(self, where: str) -> "RowFault":
        """Return the same fault with its position in the row before the message."""
        return type(self)(f"{where}: {self}", kind=self.kind, transient=self.transient)


class MediaFault(RowFault):
    """An image or video of a row is missing, damaged, unsafe or in an unsupported format."""

    default_kind: ClassVar[FaultKind] = "invalid_media"


class Reject(NamedTuple):
    """A rejected row, as `rejected.jsonl` lists it. row: its line number, counted from 1."""

    file: str
    row: int
    reason: str
    kind: FaultKind = "invalid_value"

    @classmethod
    def from_fault(cls, file: str, row: int, fault: RowFault) -> "Reject":
        return cls(file, row, str(fault), fault.kind)

    def __str__(self) -> str:
        return f"{self.file}:{self.row}: {self.reason}"
