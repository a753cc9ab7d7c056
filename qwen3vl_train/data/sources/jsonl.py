"""JSON files: one object a line, or one array of objects, which is read without ever holding all of it."""

import codecs
import hashlib
import json
from array import array
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

import numpy as np

from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.data.rows.parse import MAX_ROW_BYTES, decode_row
from qwen3vl_train.data.sources.base import FileSource, Position, RawRow
from qwen3vl_train.data.sources.files import (
    DAMAGE,
    damaged,
    is_compressed,
    naming_file,
    open_compressed,
    open_file,
    read_range,
    seek_forward,
    suffix_of,
)

_BLOCK = 1 << 20
_SPACE = " \t\r\n"


class Span(NamedTuple):
    """The bytes of one row in its file. number: of its line, or of its element in the array, counted from 1."""

    start: int
    length: int
    number: int


class JsonlSource(FileSource):
    """A JSON file, plain or compressed. Row numbers are those of lines, or of elements; blank lines are skipped.

    A file ending in .json whose first character is `[` is an array; every other file has a row a line.
    """

    def _open(self) -> dict[str, Any]:
        self.uncompressed = self._uncompressed_path()
        starts, lengths, numbers = array("q"), array("q"), array("q")
        digest = hashlib.sha256()
        read_spans = _span_reader(self.uncompressed)
        with open_file(self.uncompressed) as file, naming_file(self.name):
            size = self._record_signature(self.uncompressed)
            for (start, length, number), _ in read_spans(_HashingReader(file, digest), self.name, None):
                starts.append(start)
                lengths.append(length)
                numbers.append(number)
        self._starts, self._lengths, self._numbers = map(np.asarray, (starts, lengths, numbers))
        return {"size": size, "sha256": digest.hexdigest()}

    def __len__(self) -> int:
        return len(self._starts)

    def raw(self, row: int) -> RawRow:
        """Return row 0..len-1 unchecked. Raise RowFault when it is not JSON, too long, or the file has changed."""
        self._check_unchanged()
        start, length = int(self._starts[row]), int(self._lengths[row])
        _check_length(length)
        try:
            text = read_range(self.uncompressed, start, length)
        except OSError as error:
            fault = f"{self.name}: cannot be read ({error}); check the disk or the address"
            raise RowFault(fault, kind="read_error", transient=True) from None
        return RawRow(decode_row(text, first=start == 0), self.row_number(row), {})

    def row_number(self, row: int) -> int:
        return int(self._numbers[row])


def stream_json(path: str, position: Position | None) -> Iterator[RawRow]:
    """Yield the rows of a JSON file, plain or compressed, from a position on. Raise ValueError where it is damaged."""
    last = position["row"] if position else 0
    read_spans = _span_reader(path)
    with naming_file(path), _open_plain(path) as file:
        try:
            if position:
                seek_forward(file, position["byte"])
            for (start, length, last), text in read_spans(file, path, position):
                try:
                    _check_length(length)
                    row = decode_row(text, first=start == 0)
                except RowFault as fault:
                    row = fault
                yield RawRow(row, last, {"byte": start + length, "row": last})
        except DAMAGE as error:
            raise damaged(path, last, error) from None


def _open_plain(path: str) -> IO[bytes]:
    return open_compressed(path) if is_compressed(path) else open_file(path)


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


def _span_reader(path: str) -> Callable[..., Iterator[tuple[Span, bytes]]]:
    """Choose between lines and an array, by the first character of a file that ends in .json."""
    if suffix_of(path) != ".json":
        return _line_spans
    first = b""
    with _open_plain(path) as file:
        try:
            while not first and (block := file.read(_BLOCK)):
                first = block.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        except DAMAGE as error:
            raise damaged(path, 0, error) from None
    return _array_spans if first == b"[" else _line_spans


def _line_spans(file: Any, path: str, position: Position | None) -> Iterator[tuple[Span, bytes]]:
    """Yield every line that is not blank: its span, and its text unless that is too long to be held."""
    start, number = (position["byte"], position["row"]) if position else (0, 0)
    held: list[bytes] = []  # the current line, up to about MAX_ROW_BYTES
    length = 0
    while block := file.read(_BLOCK):
        for piece in _split_lines(block):
            if length <= MAX_ROW_BYTES:
                held.append(piece)
            length += len(piece)
            if piece.endswith(b"\n"):
                number += 1
                text = b"".join(held)
                if text.strip():
                    yield Span(start, length, number), text
                start, length, held = start + length, 0, []
    text = b"".join(held)
    if text.strip():
        yield Span(start, length, number + 1), text


def _split_lines(block: bytes) -> list[bytes]:
    """Split after line feeds; `splitlines` would split at carriage returns too."""
    pieces = [piece + b"\n" for piece in block.split(b"\n")]
    pieces[-1] = pieces[-1][:-1]
    return pieces if pieces[-1] else pieces[:-1]


class _TextBuffer:
    """The part of a UTF-8 file that an array is being read from. offset: of the next character, in bytes."""

    def __init__(self, file: Any, offset: int) -> None:
        self.file, self.offset = file, offset
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at, self.ended = "", 0, False

    def read_more(self) -> bool:
        """Read on, doubling what is held; return False at the end of the file. Raise UnicodeDecodeError."""
        if self.ended:
            return False
        block = self.file.read(max(_BLOCK, len(self.text) - self.at))
        self.text, self.at = self.text[self.at :] + self.decoder.decode(block, final=not block), 0
        self.ended = not block
        return True

    def skip(self, count: int) -> None:
        skipped = self.text[self.at : self.at + count]
        self.offset += count if skipped.isascii() else len(skipped.encode())
        self.at += count

    def peek(self) -> str:
        """Return the next character that is not a space, "" at the end of the file."""
        while True:
            rest = self.text[self.at : self.at + 64]
            blanks = len(rest) - len(rest.lstrip(_SPACE + "\ufeff" * (self.offset == 0)))
            self.skip(blanks)
            if blanks < len(rest):
                return self.text[self.at]
            if not rest and not self.read_more():
                return ""


def _array_spans(file: Any, path: str, position: Position | None) -> Iterator[tuple[Span, bytes]]:
    """Yield every element of an array. Raise ValueError where it is not JSON: what follows cannot be found."""
    start, number = (position["byte"], position["row"]) if position else (0, 0)
    buffer, decode = _TextBuffer(file, start), json.JSONDecoder().raw_decode
    try:
        if not number and buffer.peek() == "[":
            buffer.skip(1)
        while (character := buffer.peek()) != "]":
            if number:
                if character != ",":
                    raise _broken(path, number, "no comma after it" if character else "the file ends after it")
                buffer.skip(1)
                buffer.peek()
            end, fault = _element_end(buffer, decode)
            if fault:
                raise _broken(path, number, fault)
            number += 1
            text = buffer.text[buffer.at : end].encode()
            span = Span(buffer.offset, len(text), number)
            buffer.skip(end - buffer.at)
            yield span, text
        buffer.skip(1)
        if buffer.peek():
            raise _broken(path, number, "there is more after the closing bracket")
    except UnicodeDecodeError:
        raise _broken(path, number, "not UTF-8") from None


def _element_end(buffer: _TextBuffer, decode: Any) -> tuple[int, str]:
    """Return where the next element ends in the buffer's text, or why it has no end."""
    while True:
        try:
            _, end = decode(buffer.text, buffer.at)
            if end < len(buffer.text) or not buffer.read_more():
                return end, ""
        except RecursionError:
            return 0, "nested too deeply"
        except ValueError as error:
            # An unterminated string is reported at its start, any other fault at its own position: one far from the
            # end of the text is not caused by the text ending there.
            located = isinstance(error, json.JSONDecodeError) and not error.msg.startswith("Unterminated")
            if located and error.pos + 64 < len(buffer.text):  # type: ignore[attr-defined]
                return 0, f"not JSON ({error.msg})"  # type: ignore[attr-defined]
            if len(buffer.text) - buffer.at > MAX_ROW_BYTES:
                return 0, f"longer than {MAX_ROW_BYTES >> 20} MiB, or not JSON ({error})"
            if not buffer.read_more():
                return 0, f"not JSON, or the file is truncated in it ({error})"


def _broken(path: str, rows: int, what: str) -> ValueError:
    return ValueError(f"{path}: row {rows + 1} of the array: {what}; fix the file, or write one object a line")
