"""Faults of single rows, and the record of a rejected row."""

import os
from traceback import extract_tb
from types import TracebackType
from typing import Any, ClassVar, Literal, NamedTuple

from qwen3vl_train.public_names import public_name, public_text

FaultKind = Literal[
    "invalid_json", "wrong_type", "missing_field", "unknown_field", "conflicting_fields", "invalid_value",
    "media_mismatch", "dropped_by_template", "invalid_boxes", "nothing_to_learn", "too_long",
    "missing_file", "forbidden_path", "unsupported_media", "invalid_media", "no_frame_rate", "download_failed",
    "read_error", "changed", "unexpected",
]  # fmt: skip
"""Why a row cannot be used. Code distinguishes faults by their kind, never by the wording of their message."""


class RowFault(ValueError):
    """One row cannot be used. The message says what was found and what to do; it does not name file and row.
    It is shown without what may be secret in addresses.

    kind: a `FaultKind`.
    transient: the cause is the machine and not the data, such as a server that does not answer, so a retry may succeed.
    sample: the row as far as it was parsed, a `Sample` or None.
    """

    default_kind: ClassVar[FaultKind] = "invalid_value"

    def __init__(self, message: str, *, kind: FaultKind | None = None, transient: bool = False) -> None:
        super().__init__(public_text(message))
        self.kind: FaultKind = kind or self.default_kind
        self.transient = transient
        self.sample: Any = None

    def at(self, where: str) -> "RowFault":
        """Return the same fault with its position in the row before the message."""
        return type(self)(f"{where}: {self}", kind=self.kind, transient=self.transient)


class MediaFault(RowFault):
    """An image or video of a row is missing, damaged, unsafe or in an unsupported format."""

    default_kind: ClassVar[FaultKind] = "invalid_media"


class LastResort:
    """A context in which every exception of one row becomes a RowFault of kind `unexpected`, which names it.

    All code that reads or encodes a single row is inside of one: a fault that no check foresaw costs its row, and not
    the run. Its row counts as transient, so that a corrected program reads it again in spite of a kept index.
    Exceptions that are not of the row pass: KeyboardInterrupt, SystemExit and other BaseExceptions.
    """

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is None or isinstance(error, RowFault) or not isinstance(error, Exception):
            return
        frame = extract_tb(traceback)[-1]
        what = f"{type(error).__name__}: {str(error)[:_SHOWN_CHARACTERS]}"
        where = f"{os.path.basename(frame.filename)}:{frame.lineno}"
        fault = f"cannot be read, {what} (in {where}); check the values of the row, or remove it"
        raise RowFault(fault, kind="unexpected", transient=True) from error


LAST_RESORT = LastResort()
_SHOWN_CHARACTERS = 300


class Reject(NamedTuple):
    """A rejected row, as `rejected.jsonl` lists it. row: its line number, counted from 1."""

    file: str
    row: int
    reason: str
    kind: FaultKind = "invalid_value"

    @classmethod
    def from_fault(cls, file: str, row: int, fault: RowFault) -> "Reject":
        return cls(public_name(file), row, str(fault), fault.kind)

    def __str__(self) -> str:
        return f"{self.file}:{self.row}: {self.reason}"
