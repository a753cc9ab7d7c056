"""The ledger of rejected rows: which rows of a run cannot be used, how many may be, and where they are listed.

Many rows that are rejected for one reason are reported in one line: see `RejectSummary`.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from qwen3vl_train.data.errors import FaultKind, Reject
from qwen3vl_train.outputs import OutputError, append_text
from qwen3vl_train.public_names import public_name

T = TypeVar("T")
REJECTED_FILE = "rejected.jsonl"
_SHOWN = 3
"""Rejected rows, or groups of them, that a message lists."""
_ROW_BITS = 44


class NoUsableRowError(ValueError):
    """No row of some files can be used. rejects: why, of the first ones."""

    def __init__(self, message: str, rejects: list[Reject]) -> None:
        super().__init__(message)
        self.rejects = rejects


class RejectGroup:
    """Rows of one file that are rejected with faults of one kind. first: the one that was met first."""

    def __init__(self, first: Reject) -> None:
        self.first, self.count = first, 0

    def line(self, num_rows: int | None) -> str:
        """Describe the group. num_rows: of the file, None where that is not known."""
        if self.count == 1:
            return str(self.first)
        of = "" if num_rows is None else f" of {num_rows:,}"
        where = f"{self.first.file}: {self.count:,}{of} rows rejected ({self.first.kind})"
        return f"{where}, the first is row {self.first.row}: {self.first.reason}"


class RejectSummary:
    """Count rejected rows by file and kind of fault, and describe each group in one line with its first row."""

    def __init__(self, rejects: Iterable[Reject] = ()) -> None:
        self._groups: dict[tuple[str, FaultKind], RejectGroup] = {}
        self._first: list[Reject] = []
        self.num_rejects = 0
        self.add(rejects)

    def add(self, rejects: Iterable[Reject]) -> None:
        for reject in rejects:
            self._groups.setdefault((reject.file, reject.kind), RejectGroup(reject)).count += 1
            self.num_rejects += 1
            if len(self._first) < _SHOWN:
                self._first.append(reject)

    def groups(self) -> list[RejectGroup]:
        """Return the groups, the largest first."""
        return sorted(self._groups.values(), key=lambda group: group.count, reverse=True)

    def lines(self, num_rows: Mapping[str, int] | None = None) -> list[str]:
        """Return at most four lines: every reject where they are few, or else the largest groups.

        num_rows: by file, as far as they are known.
        """
        if self.num_rejects <= _SHOWN:
            return list(map(str, self._first))
        shown, others = self.groups()[:_SHOWN], self.groups()[_SHOWN:]
        lines = [group.line((num_rows or {}).get(group.first.file)) for group in shown]
        return lines + ([f"and {sum(group.count for group in others):,} more"] if others else [])


class RejectLedger:
    """The rejected rows of a run. Each is listed once in `rejected.jsonl`, however often it is read.

    Rows of indexed files count against the limit once for each entry that names their file. Rows of streams, whose
    number is not known, count each time they are read, against the rows read so far.
    Every rank holds the same ledger; rank 0 writes the file.
    """

    def __init__(self, path: Path, max_rejected_fraction: float, *, writes: bool) -> None:
        self._path, self._max_fraction, self._writes = path, max_rejected_fraction, writes
        self._listed = _RowSet()
        self.failure: OutputError | None = None
        """The first error of writing after the start, which `add` does not raise: the rows are counted all the same."""
        self._num_unnamed = 0  # listed before, but their lines were removed from the file since
        self._indexed: list[_IndexedFiles] = []
        self._indexed_by_file: dict[str, list[_IndexedFiles]] = {}
        self._num_streamed, self._num_seen = 0, 0
        self._of_streams = RejectSummary()

    def __len__(self) -> int:
        return len(self._listed) + self._num_unnamed

    @property
    def indexed(self) -> list[Reject]:
        """The rejected rows of indexed files, in the order they were found."""
        return [reject for files in self._indexed for reject in files.rejects]

    def add_index(self, files: Sequence[str], *, num_rows: int, num_usable: int, rejects: list[Reject]) -> None:
        """Count what indexing found in some files, whose rows share the limit."""
        files = [public_name(file) for file in files]
        indexed = _IndexedFiles(files, num_rows, num_usable, list(rejects))
        self._indexed.append(indexed)
        for file in files:
            self._indexed_by_file.setdefault(file, []).append(indexed)
        self._listed.add(rejects)

    def resume(self, state: dict[str, int] | None, on_main: Callable[[Callable[[], object]], object]) -> None:
        """Bring the file and the counts to the `state` of a checkpoint, or to the start of a run.

        Lines added after the checkpoint are removed: their rows are read again. The limit is checked before what the
        checkpoint counted is added, so that a run whose rows were fixed continues.

        on_main: runs a function on rank 0 and returns its result on every rank.
        """
        num_listed, num_streamed = (state["listed"], state["of_streams"]) if state else (0, 0)
        saved = on_main(lambda: self._restart_file(num_listed))
        assert isinstance(saved, list)
        self.check()
        self._count(saved)
        self._num_unnamed = num_listed - len(saved)
        self._num_streamed = num_streamed
        self._of_streams = RejectSummary(reject for reject in saved if reject.file not in self._indexed_by_file)

    def state(self) -> dict[str, int]:
        """Return what a checkpoint keeps; which rows were rejected is in `rejected.jsonl`."""
        return {"listed": len(self), "of_streams": self._num_streamed}

    def add(self, rejects: list[Reject], *, num_seen: int | None = None) -> list[Reject]:
        """Count and list rows that turned out broken after the start. Returns those not listed before, each once.

        num_seen: rows of the streams read so far, where the rows are of streams.
        """
        new = self._count(rejects)
        if num_seen is not None:
            self._num_seen = num_seen
            self._num_streamed += len(rejects)
            self._of_streams.add(rejects)
        if new and self._writes:
            try:
                self._append(new)
            except OutputError as error:
                self.failure = self.failure or error
        return new

    def check(self) -> None:
        """Raise ValueError where files hold nothing to learn from, or too many rows are rejected."""
        for files in self._indexed:
            if not files.num_usable:
                raise none_usable(files.names, files.num_rows, files.rejects)
            if len(files.rejects) > self._max_fraction * files.num_rows:
                count = f"{len(files.rejects)} of {files.num_rows}"
                raise ValueError(self._too_many(count, RejectSummary(files.rejects), files.rows_by_file()))
        if self._num_streamed > self._max_fraction * self._num_seen:
            count = f"{self._num_streamed} of the first {self._num_seen}"
            raise ValueError(self._too_many(count, self._of_streams))

    def _too_many(self, count: str, rejects: RejectSummary, num_rows: Mapping[str, int] | None = None) -> str:
        return (
            f"data: {count} rows cannot be used, more than data.max_rejected_fraction {self._max_fraction:g}; fix them "
            f"or raise it{_lines(rejects, num_rows)}"
        )

    def _count(self, rejects: list[Reject]) -> list[Reject]:
        new = self._listed.add(rejects)
        for reject in new:
            for files in self._indexed_by_file.get(reject.file, []):
                files.rejects.append(reject)
        return new

    def _restart_file(self, num_saved: int) -> list[Reject]:
        """Cut the file to the rows that a checkpoint had listed, append what indexing found, return the former.

        They are fewer than num_saved where lines were removed by hand.
        """
        # A kill can cut the last line short, so it counts only with its line feed.
        lines = self._path.read_bytes().split(b"\n")[:-1][:num_saved] if self._path.is_file() else []
        saved: list[Reject] = []
        for line in lines:
            try:
                saved.append(Reject(**json.loads(line)))
            except (ValueError, TypeError):
                raise ValueError(f"{self._path}:{len(saved) + 1}: not a rejected row; remove the line") from None
        if saved:
            os.truncate(self._path, sum(len(line) + 1 for line in lines))
        else:
            self._path.unlink(missing_ok=True)
        in_file = _RowSet()
        in_file.add(saved)
        if new := in_file.add(self.indexed):
            self._append(new)
        return saved

    def _append(self, rejects: list[Reject]) -> None:
        lines = (json.dumps(reject._asdict(), ensure_ascii=False) + "\n" for reject in rejects)
        append_text(self._path, "".join(lines))


@dataclass
class _IndexedFiles:
    """Files whose rows share the limit, and the rejected rows among them."""

    names: Sequence[str]
    num_rows: int
    num_usable: int
    rejects: list[Reject]

    def rows_by_file(self) -> dict[str, int]:
        """Return the number of rows by file, where it is known."""
        return {self.names[0]: self.num_rows} if len(self.names) == 1 else {}


class _RowSet:
    """File and row of rejected rows, as one integer each: a million take about 60 MiB, whatever their reasons."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self._rows: set[int] = set()

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, rejects: Iterable[Reject]) -> list[Reject]:
        """Add rows. Returns those not in the set before, each once."""
        new = []
        for reject in rejects:
            file = self._files.setdefault(reject.file, len(self._files))
            row = file << _ROW_BITS | reject.row
            if row not in self._rows:
                self._rows.add(row)
                new.append(reject)
        return new


def none_usable(names: Sequence[str], num_rows: int, rejects: list[Reject]) -> NoUsableRowError:
    """Return the error of files of which no row can be used."""
    found = f"{', '.join(names)}: nothing to learn from, none of {num_rows} rows can be used; fix the rows"
    lines = _lines(RejectSummary(rejects), {names[0]: num_rows} if len(names) == 1 else None)
    return NoUsableRowError(found + lines, rejects)


def _lines(rejects: RejectSummary, num_rows: Mapping[str, int] | None = None) -> str:
    return "".join(f"\n  - {line}" for line in rejects.lines(num_rows))
