"""Windows of streams, which come row after row and need not say how many rows they have.

Rank 0 scans the rows (text and headers only) and broadcasts what it found; the other ranks read the rows alone and
replay the scan. So all hold the same plan whatever a rank may fail to read, and no rank but one downloads media to
learn their size. Resuming from a position reads its window again.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, count, zip_longest
from typing import Any, Protocol

import numpy as np

from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.encode.encoder import SampleCost
from qwen3vl_train.data.errors import Reject, RowFault
from qwen3vl_train.data.packing.index import LengthRule
from qwen3vl_train.data.packing.mixture import Cursor, Mixture, Part
from qwen3vl_train.data.packing.packs import ScannedRow
from qwen3vl_train.data.packing.plan import CostModel, FamilyCosts, hash_48
from qwen3vl_train.data.packing.windows import Window, check_weights
from qwen3vl_train.data.packing.workers import from_worker, unchanged
from qwen3vl_train.data.rejects import none_usable
from qwen3vl_train.data.rows.media_files import media_of, media_signature
from qwen3vl_train.data.rows.sample import Sample
from qwen3vl_train.data.sources import StreamRow

_MAX_BYTES = 512 << 20
"""Limit on the media inside the rows of one window, which are held in memory; the window ends early."""
_MAX_REJECTS = 100_000
"""Of an epoch without a usable row, which its error lists; they take about 50 MiB."""
_CHUNK_ROWS, _CHUNK_BYTES = 256, 64 << 20
"""Rows that the reader of a replaying rank returns at a time."""
_CHUNKS_AHEAD = 8
"""Chunks that it prefetches: as many rows as the default window."""


class Broadcast(Protocol):
    """Messages from rank 0 to all other ranks, as JSON; `receive` waits for a message that is not sent yet."""

    def send(self, key: str, message: Any) -> None: ...

    def receive(self, key: str) -> Any: ...


@dataclass
class ScanResult:
    """What rank 0 found in the rows of one window: all that its plan follows from, as JSON."""

    next_cursor: Cursor  # of the first row after the window, in the next epoch where ends_epoch
    ends_epoch: bool = False
    names: list[tuple[str, int]] = field(default_factory=list)  # file (without its folder) and number of every row
    positions: list[int] = field(default_factory=list)  # of the usable rows
    costs: list[SampleCost] = field(default_factory=list)  # of the usable rows
    skipped: list[int] = field(default_factory=list)  # positions of the rows that cannot be used
    rejects: list[Reject] = field(default_factory=list)  # why, of those that were not skipped unread
    num_dropped: int = 0

    @property
    def num_rows(self) -> int:
        return len(self.names)

    @classmethod
    def from_json(cls, message: dict[str, Any]) -> "ScanResult":
        result = cls(**message)
        result.names = [(file, number) for file, number in result.names]
        result.costs = [SampleCost(*cost) for cost in result.costs]
        result.rejects = [Reject(*reject) for reject in result.rejects]
        return result


Scan = tuple[ScanResult, list[ScannedRow]]
"""What was found of a window, and its usable rows."""


class StreamReader:
    """Read the rows of a mixture from a cursor on, without end."""

    def __init__(self, mixture: Mixture, collator: MultimodalCollator, rule: LengthRule, size: int) -> None:
        self.mixture, self.collator, self.rule, self.size = mixture, collator, rule, size

    def scan(self, start: tuple[Cursor, Sequence[int]]) -> Iterator[Scan]:
        """Yield windows from a cursor on, scanned; they end with their epoch.

        start: the cursor, and the rows of the first window to skip, see `WindowProducer.windows`. Raises
        NoUsableRowError where an epoch holds no usable row.
        """
        cursor, skipped = start
        num_usable, num_rows, from_start = 0, 0, cursor == self.mixture.start(cursor["epoch"])
        first_rejects: list[Reject] = []
        while True:
            result, rows = self._scan_window(cursor, skipped)
            num_usable += len(rows)
            num_rows += result.num_rows
            first_rejects = [] if num_usable else (first_rejects + result.rejects)[:_MAX_REJECTS]
            if result.ends_epoch:
                if from_start and not num_usable:
                    names = [part.name for part in self.mixture.parts]
                    raise none_usable(names, num_rows, first_rejects)
                num_usable, num_rows, from_start = 0, 0, True
            yield result, rows
            cursor, skipped = result.next_cursor, ()

    def _scan_window(self, cursor: Cursor, skipped: Sequence[int]) -> Scan:
        result, rows = ScanResult(cursor, skipped=list(skipped)), []
        known, num_bytes = set(skipped), 0
        for next_cursor, row in self.mixture.rows(cursor):
            result.next_cursor = next_cursor
            result.names.append((os.path.basename(row.file), row.row_number))
            if result.num_rows - 1 not in known:
                num_bytes += self._scan_row(row, result, rows)
            if result.num_rows == self.size or num_bytes > _MAX_BYTES:
                return result, rows
        result.next_cursor, result.ends_epoch = self.mixture.start(cursor["epoch"] + 1), True
        return result, rows

    def _scan_row(self, row: StreamRow, result: ScanResult, rows: list[ScannedRow]) -> int:
        """Add the last row of `result.names` to what was found. Return how much memory its media take."""
        try:
            if isinstance(row.sample, RowFault):
                raise row.sample
            cost = self.rule.admit(row.sample, self.collator)
        except RowFault as fault:
            result.rejects.append(Reject.from_fault(row.file, row.row_number, fault))
            result.skipped.append(result.num_rows - 1)
            return 0
        if cost is None:
            result.num_dropped += 1
            return 0
        rows.append(_as_scanned(row, cost.tokens))
        result.costs.append(cost)
        result.positions.append(result.num_rows - 1)
        return _inline_bytes(row.sample)

    def read(self, cursor: Cursor) -> Iterator[list[ScannedRow | None]]:
        """Yield the rows unscanned, in chunks; None follows the last row of an epoch."""
        while True:
            chunk: list[ScannedRow | None] = []
            num_bytes = 0
            for _, row in self.mixture.rows(cursor):
                chunk.append(_as_scanned(row, 0))
                num_bytes += 0 if isinstance(row.sample, RowFault) else _inline_bytes(row.sample)
                if len(chunk) == _CHUNK_ROWS or num_bytes > _CHUNK_BYTES:
                    yield chunk
                    chunk, num_bytes = [], 0
            yield [*chunk, None]
            cursor = self.mixture.start(cursor["epoch"] + 1)


class StreamedWindows:
    """A `WindowProducer` over a mixture of streams."""

    num_usable: int | None = None
    counts: tuple[int, int] = (0, 0)

    def __init__(
        self,
        parts: Sequence[Part],
        collator: MultimodalCollator,
        rule: LengthRule,
        *,
        seed: int,
        size: int = 2048,
        cost_model: CostModel | None = None,
        broadcast: Broadcast | None = None,
        is_scanner: bool = True,
        in_worker: bool = False,
    ) -> None:
        """Prepare; nothing is read. Raises ValueError for a weight out of range.

        size: rows of a window, at most.
        broadcast: sends the scan results of the scanning rank to the others; every rank must ask for as many windows
            as that rank does. Without it each rank scans for itself, and has the same windows only while every rank
            can read every row.
        is_scanner: whether this is the scanning rank, rank 0.
        in_worker: read the stream in one more process.
        """
        check_weights([(part, part.weight) for part in parts])
        self.parts, self.seed, self.size = parts, seed, size
        self.cost_model = cost_model or CostModel()
        self.read_row: Callable[[Any], ScannedRow] = unchanged
        self._encoder = [collator.fingerprint(), list(rule)]
        self._reader = StreamReader(Mixture(parts, seed), collator, rule, size)
        self._broadcast, self._is_scanner, self._in_process, self._num_rounds = broadcast, is_scanner, not in_worker, 0

    def start(self, epoch: int = 0) -> Cursor:
        return self._reader.mixture.start(epoch)

    def windows(self, cursor: Cursor, skipped: Sequence[int] = ()) -> Iterator[Window]:
        """Yield the windows. Raises ValueError where the stream cannot be read on, on every rank."""
        for result, rows in self._scans(cursor, skipped):
            tokens, _, patches, patch_pairs, num_shrunk = np.array(result.costs, dtype=np.int64).reshape(-1, 5).T
            work = self.cost_model.work(tokens, patches, patch_pairs)
            yield Window(
                epoch=cursor["epoch"],
                ends_epoch=result.ends_epoch,
                next_cursor=result.next_cursor,
                order_seed=(self.seed, cursor["epoch"], 1, sum(part["drawn"] for part in cursor["parts"])),
                families=[(row,) for row in rows],
                costs=FamilyCosts.from_rows(tokens, patches, work, num_shrunk),
                num_rows=result.num_rows,
                num_dropped=result.num_dropped,
                rejects=result.rejects,
                skipped=result.skipped,
                content_hash=hash_48(repr((result.positions, result.costs))),
            )
            cursor = result.next_cursor

    def _scans(self, cursor: Cursor, skipped: Sequence[int]) -> Iterator[Scan]:
        """Yield the scans of the windows from a cursor on, the same on every rank."""
        self._num_rounds += 1
        keys = (f"{self._num_rounds}/{number}" for number in count())
        if self._broadcast is not None and not self._is_scanner:
            chunks = from_worker(self._reader.read, cursor, in_process=self._in_process, ahead=_CHUNKS_AHEAD)
            return _received(self._broadcast, keys, chunks)
        scans = from_worker(self._reader.scan, (cursor, skipped), in_process=self._in_process)
        return scans if self._broadcast is None else _sent(scans, self._broadcast, keys)

    def row_key(self, row: ScannedRow) -> tuple[str, int, int]:
        return os.path.basename(row.file), row.number, row.tokens

    def fingerprint(self) -> dict[str, Any]:
        return {
            "sources": [part.reader.source.fingerprint() for part in self.parts],
            "weights": [part.weight for part in self.parts],
            "encoder": self._encoder,
            "seed": self.seed,
            "window": self.size,
            "cost_model": repr(self.cost_model),
        }


def _received(broadcast: Broadcast, keys: Iterator[str], chunks: Iterator[list[ScannedRow | None]]) -> Iterator[Scan]:
    """Replay the scans that rank 0 sent, with the rows as this rank reads them.

    A row that cannot be read here keeps its position, as its fault. Raises ValueError where the rows are other ones,
    ValueError or RuntimeError where rank 0 met an error.
    """
    rows = chain.from_iterable(chunks)
    for key in keys:
        message = broadcast.receive(key)
        if "error" in message:
            raise (ValueError if message["is_value_error"] else RuntimeError)(message["error"])
        result = ScanResult.from_json(message)
        found: list[ScannedRow] = []
        while len(found) < result.num_rows and (row := next(rows)) is not None:
            found.append(row)
        _check_same_rows(found, result, next(rows) if result.ends_epoch and len(found) == result.num_rows else None)
        usable = zip(result.positions, result.costs, strict=True)
        yield result, [found[position]._replace(tokens=cost.tokens) for position, cost in usable]


def _check_same_rows(found: list[ScannedRow], result: ScanResult, surplus: ScannedRow | None) -> None:
    """Raise ValueError where other rows were read. surplus: a row that is here where the epoch ends on rank 0."""
    names = [(os.path.basename(row.file), row.number) for row in (*found, *([surplus] if surplus else []))]
    if names == result.names:
        return
    ours, theirs = next(pair for pair in zip_longest(names, result.names) if pair[0] != pair[1])
    here, there = (f"{name[0]}:{name[1]}" if name else "its end" for name in (ours, theirs))
    raise ValueError(
        f"data.train: the stream continues with {here} here and with {there} on rank 0; give all ranks the same files"
    )


def _sent(scans: Iterator[Scan], broadcast: Broadcast, keys: Iterator[str]) -> Iterator[Scan]:
    """Send what was found of each window to the other ranks, and the error where reading ends with one."""
    for key in keys:
        try:
            result, rows = next(scans)
        except Exception as error:  # of any type: the other ranks wait for it
            broadcast.send(key, {"error": str(error), "is_value_error": isinstance(error, ValueError)})
            raise
        broadcast.send(key, result.__dict__)
        yield result, rows


def _as_scanned(row: StreamRow, tokens: int) -> ScannedRow:
    signature = 0 if isinstance(row.sample, RowFault) else media_signature(row.sample)
    return ScannedRow(row.sample, row.file, row.row_number, tokens, signature)


def _inline_bytes(sample: Sample) -> int:
    """Return how much memory the media take that lie inside a row."""
    num_bytes = 0
    for medium in media_of(sample):
        if isinstance(medium, bytes | str):
            num_bytes += len(medium)
        elif hasattr(medium, "width"):
            num_bytes += 3 * medium.width * medium.height
    return num_bytes
