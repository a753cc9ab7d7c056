"""Files of text in which every row is a range of bytes: found once, and read again by its place."""

import hashlib
import os
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

import numpy as np

from qwen3vl_train.data.errors import LAST_RESORT, RowFault
from qwen3vl_train.data.rows.parse import MAX_ROW_BYTES
from qwen3vl_train.data.sources.base import BEGINNING, FileSource, Position, RawRow
from qwen3vl_train.data.sources.files import CUT, DAMAGE, damaged, naming_file, open_file, open_plain, read_range

_BLOCK = 1 << 20

Span = tuple[int, int, int, bytes]
"""Of one row in its file: start and length in bytes; number of its line, or of its element in the array, from 1 on; its
text, unless that is too long to be held."""


class TextFormat(NamedTuple):
    """How the rows of a file are found and read.

    spans: (file at a position, its name, position) -> the spans from there on. It raises ValueError.
    decode: text of a row, whether it is at the beginning of the file -> its object. It raises RowFault.
    """

    spans: Callable[[Any, str, Position], Iterator[Span]]
    decode: Callable[[bytes, bool], Any]


class SpanSource(FileSource):
    """A file of text, plain or compressed."""

    @abstractmethod
    def _format(self) -> TextFormat:
        """Return the format of `self.uncompressed`. Raise ValueError."""

    def _open(self) -> dict[str, Any]:
        self.uncompressed = self._uncompressed_path(keeps_rows=True)
        spans, digest = array("q"), hashlib.sha256()
        read_spans, self._decode = self._format()
        with open_file(self.uncompressed) as file, naming_file(self.name):
            size = self._record_signature(self.uncompressed)
            for *span, _ in read_spans(_HashingReader(file, digest), self.name, BEGINNING):
                spans.extend(span)
        self._spans = np.asarray(spans).reshape(-1, 3)
        return {"size": size, "sha256": digest.hexdigest()}

    def __len__(self) -> int:
        return len(self._spans)

    def raw(self, row: int) -> RawRow:
        self._check_unchanged()
        start, length, number = self._spans[row].tolist()
        _check_length(length)
        try:
            text = read_range(self.uncompressed, start, length)
        except OSError as error:
            fault = f"{self.name}: cannot be read ({error}); check the disk or the address"
            raise RowFault(fault, kind="read_error", transient=True) from None
        if CUT in text:
            raise _cut(self.name, number, text.rpartition(CUT)[2].decode().strip())
        return RawRow(self._decode(text, start == 0), number, {})

    def row_number(self, row: int) -> int:
        return int(self._spans[row, 2])


def stream_spans(path: str, position: Position, text_format: TextFormat) -> Iterator[RawRow]:
    """Yield the rows of a file, plain or compressed, from a position on. Raise ValueError where it is damaged."""
    last, start, length = position["row"], position["byte"], 0
    if "cut" in position:
        return
    with naming_file(path), open_plain(path) as file:
        try:
            _seek_forward(file, position["byte"])
            for start, length, last, text in text_format.spans(file, path, position):
                try:
                    _check_length(length)
                    with LAST_RESORT:
                        row = text_format.decode(text, start == 0)
                except RowFault as fault:
                    row = fault
                yield RawRow(row, last, {"byte": start + length, "row": last})
        except DAMAGE as error:
            if not isinstance(error, EOFError) or not last:
                raise damaged(path, last, error) from None
            position = {"byte": start + length, "row": last + 1, "cut": 1}
            yield RawRow(_cut(path, last + 1, error), last + 1, position)


def _cut(path: str, number: int, error: object) -> RowFault:
    """Return the fault of the row in which a compressed file ends before its end."""
    fault = f"{os.path.basename(path)} is truncated in row {number} or after it ({error}), and has no more rows"
    return RowFault(f"{fault}; copy the file again", kind="read_error")


def _seek_forward(file: IO[bytes], offset: int) -> None:
    """Go to an offset of a file just opened; the stream of a compressed file is read up to there."""
    if file.seekable():
        file.seek(offset)
        return
    while offset > 0 and (block := file.read(min(_BLOCK, offset))):
        offset -= len(block)


def _check_length(length: int) -> None:
    if length > MAX_ROW_BYTES:
        fault = f"row of {length >> 20} MiB is longer than {MAX_ROW_BYTES >> 20} MiB; split it"
        raise RowFault(fault, kind="too_long")


class _HashingReader:
    """A file that is hashed while it is read from start to end."""

    def __init__(self, file: IO[bytes], digest: Any) -> None:
        self.file, self.digest = file, digest

    def read(self, size: int) -> bytes:
        block = self.file.read(size)
        self.digest.update(block)
        return block
