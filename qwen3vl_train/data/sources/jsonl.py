"""JSON files: one object a line, or one array of objects, which is read without ever holding all of it."""

import codecs
import hashlib
import io
import json
from array import array
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np

from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.data.rows.parse import MAX_ROW_BYTES, decode_row
from qwen3vl_train.data.sources.base import BEGINNING, FileSource, Position, RawRow
from qwen3vl_train.data.sources.files import DAMAGE, damaged, naming_file, open_file, open_plain, read_range, suffix_of

_BLOCK = 1 << 20
_SPACE = " \t\r\n"
_DECODER = json.JSONDecoder()

Span = tuple[int, int, int, bytes]
"""Of one row in its file: start and length in bytes; number of its line, or of its element in the array, from 1 on; its
text, unless that is too long to be held."""


class JsonlSource(FileSource):
    """A JSON file, plain or compressed. Row numbers are those of lines, or of elements; blank lines are skipped.

    A file ending in .json whose first character is `[` is an array; every other file has a row a line.
    """

    def _open(self) -> dict[str, Any]:
        self.uncompressed = self._uncompressed_path()
        spans, digest = array("q"), hashlib.sha256()
        read_spans = _span_reader(self.uncompressed)
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
        return RawRow(decode_row(text, first=start == 0), number, {})

    def row_number(self, row: int) -> int:
        return int(self._spans[row, 2])


def stream_json(path: str, position: Position) -> Iterator[RawRow]:
    """Yield the rows of a JSON file, plain or compressed, from a position on. Raise ValueError where it is damaged."""
    last, read_spans = position["row"], _span_reader(path)
    with naming_file(path), open_plain(path) as file:
        try:
            _seek_forward(file, position["byte"])
            for start, length, last, text in read_spans(file, path, position):
                try:
                    _check_length(length)
                    row = decode_row(text, first=start == 0)
                except RowFault as fault:
                    row = fault
                yield RawRow(row, last, {"byte": start + length, "row": last})
        except DAMAGE as error:
            raise damaged(path, last, error) from None


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


def _span_reader(path: str) -> Callable[..., Iterator[Span]]:
    """Choose between lines and an array, by the first character of a file that ends in .json."""
    if suffix_of(path) != ".json":
        return _line_spans
    first = b""
    with open_plain(path) as file:
        try:
            while not first and (block := file.read(_BLOCK)):
                first = block.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        except DAMAGE as error:
            raise damaged(path, 0, error) from None
    return _array_spans if first == b"[" else _line_spans


def _line_spans(file: Any, path: str, position: Position) -> Iterator[Span]:
    """Yield every line that is not blank."""
    start, number = position["byte"], position["row"]
    held: list[bytes] = []  # the current line, up to about MAX_ROW_BYTES
    length = 0
    while block := file.read(_BLOCK):
        for piece in io.BytesIO(block):  # lines end at line feeds; `splitlines` would split at carriage returns too
            if length <= MAX_ROW_BYTES:
                held.append(piece)
            length += len(piece)
            if piece.endswith(b"\n"):
                number += 1
                text = b"".join(held)
                if text.strip():
                    yield start, length, number, text
                start, length, held = start + length, 0, []
    text = b"".join(held)
    if text.strip():
        yield start, length, number + 1, text


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


def _array_spans(file: Any, path: str, position: Position) -> Iterator[Span]:
    """Yield every element of an array. Raise ValueError where it is not JSON: what follows cannot be found."""
    buffer, number = _TextBuffer(file, position["byte"]), position["row"]
    try:
        if not number and buffer.peek() == "[":
            buffer.skip(1)
        while (character := buffer.peek()) != "]":
            if number:
                if character != ",":
                    raise _broken(path, number, "no comma after it" if character else "the file ends after it")
                buffer.skip(1)
                buffer.peek()
            end, fault = _element_end(buffer)
            if fault:
                raise _broken(path, number, fault)
            number += 1
            text = buffer.text[buffer.at : end].encode()
            start = buffer.offset
            buffer.skip(end - buffer.at)
            yield start, len(text), number, text
        buffer.skip(1)
        if buffer.peek():
            raise _broken(path, number, "there is more after the closing bracket")
    except UnicodeDecodeError:
        raise _broken(path, number, "not UTF-8") from None


def _element_end(buffer: _TextBuffer) -> tuple[int, str]:
    """Return where the next element ends in the buffer's text, or why it has no end."""
    while True:
        try:
            _, end = _DECODER.raw_decode(buffer.text, buffer.at)
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
