"""JSON: one object a line, or one array of objects, which is read without ever holding it whole."""

import codecs
import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

import numpy as np

from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.data.rows.parse import MAX_ROW_BYTES, RowRules, decode_row
from qwen3vl_train.data.sources.base import FileSource, Place, RawRow
from qwen3vl_train.data.sources.files import (
    DAMAGE,
    damaged,
    explained,
    is_compressed,
    open_file,
    open_unpacked,
    read_span,
    skip_to,
    suffix_of,
)

_BLOCK = 1 << 20
_SPACE = " \t\r\n"


class Span(NamedTuple):
    """Where a row stands in its file. length: in bytes. number: of its line, or of its place in the array, from 1."""

    start: int
    length: int
    number: int


class JsonlSource(FileSource):
    """A JSON file, plain or compressed. Numbers of rows are numbers of lines, or of elements; blank lines are skipped.

    A file ending in .json whose first character is `[` is an array; every other one has a row a line.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        media_root: str | os.PathLike[str] | None = None,
        rules: RowRules | None = None,
    ) -> None:
        """Scan the file once for its rows and its hash. Raises ValueError when it cannot be read."""
        super().__init__(path, media_root, rules)
        self.plain = self._plain()
        starts, lengths, numbers = array("q"), array("q"), array("q")
        digest = hashlib.sha256()
        spans_of = _spans_of(self.plain)
        with open_file(self.plain) as file, explained(self.name):
            size = self._note_stamp(self.plain)
            for span, _ in spans_of(_Hashed(file, digest), self.name):
                starts.append(span.start)
                lengths.append(span.length)
                numbers.append(span.number)
        self._starts, self._lengths, self._numbers = map(np.asarray, (starts, lengths, numbers))
        self._fingerprint = {"size": size, "sha256": digest.hexdigest()}

    def __len__(self) -> int:
        return len(self._starts)

    def raw(self, row: int) -> RawRow:
        """Return row 0..len-1 unchecked. Raises RowFault when it is not JSON, too long, or the file has changed."""
        self._check_unchanged()
        length = int(self._lengths[row])
        _check_length(length)
        try:
            text = read_span(self.plain, int(self._starts[row]), length)
        except OSError as error:
            raise RowFault(
                f"{self.name}: cannot be read ({error}); check the disk or the address",
                kind="read_error",
                transient=True,
            ) from None
        return RawRow(decode_row(text, first=int(self._starts[row]) == 0), self.row_number(row), {})

    def row_number(self, row: int) -> int:
        """Return the number of the row's line or element, counted from 1."""
        return int(self._numbers[row])

    def fingerprint(self) -> dict[str, Any]:
        """Return size and SHA-256 of the content; the path is no part of it, so a file may move."""
        return dict(self._fingerprint)


def stream_json(path: str, place: Place | None) -> Iterator[RawRow]:
    """Yield the rows of a JSON file, plain or compressed, from a place on. Raises ValueError where it is damaged."""
    last = place["row"] if place else 0
    spans_of = _spans_of(path)
    with explained(path), open_unpacked(path) if is_compressed(path) else open_file(path) as file:
        try:
            if place:
                skip_to(file, place["byte"])
            for span, text in spans_of(file, path, place):
                last = span.number
                try:
                    _check_length(span.length)
                    row = decode_row(text, first=span.start == 0)
                except RowFault as fault:
                    row = fault
                yield RawRow(row, last, {"byte": span.start + span.length, "row": last})
        except DAMAGE as error:
            raise ValueError(damaged(path, last, error)) from None


def _check_length(length: int) -> None:
    if length > MAX_ROW_BYTES:
        raise RowFault(f"row of {length >> 20} MiB is longer than {MAX_ROW_BYTES >> 20} MiB; split it", kind="too_long")


class _Hashed:
    """A file that is hashed while it is read from front to back."""

    def __init__(self, file: IO[bytes], digest: Any) -> None:
        self.file, self.digest = file, digest

    def read(self, size: int) -> bytes:
        block = self.file.read(size)
        self.digest.update(block)
        return block


def _spans_of(path: str) -> Callable[..., Iterator[tuple[Span, bytes]]]:
    """Choose how a file is cut, by the first character of one that ends in .json."""
    if suffix_of(path) != ".json":
        return _line_spans
    first = b""
    with open_unpacked(path) if is_compressed(path) else open_file(path) as file:
        try:
            while not first and (block := file.read(_BLOCK)):
                first = block.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        except DAMAGE as error:
            raise ValueError(damaged(path, 0, error)) from None
    return _array_spans if first == b"[" else _line_spans


def _line_spans(file: Any, path: str, place: Place | None = None) -> Iterator[tuple[Span, bytes]]:
    """Yield every line that is not blank: its span, and its text if that is not too long to be held."""
    start, number = (place["byte"], place["row"]) if place else (0, 0)
    held: list[bytes] = []  # the line that is not yet whole, but for what no longer fits
    length = 0
    while block := file.read(_BLOCK):
        for piece in _lines(block):
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


def _lines(block: bytes) -> list[bytes]:
    """Cut behind line feeds; `splitlines` would cut at carriage returns too."""
    pieces = [piece + b"\n" for piece in block.split(b"\n")]
    pieces[-1] = pieces[-1][:-1]
    return pieces if pieces[-1] else pieces[:-1]


class _Window:
    """The stretch of a UTF-8 file that an array is being read from. place: of the next character, in bytes."""

    def __init__(self, file: Any, place: int) -> None:
        self.file, self.place = file, place
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at, self.ended = "", 0, False

    def more(self) -> bool:
        """Read on, doubling what is held; False at the end of the file. Raises UnicodeDecodeError."""
        if self.ended:
            return False
        block = self.file.read(max(_BLOCK, len(self.text) - self.at))
        self.text, self.at = self.text[self.at :] + self.decoder.decode(block, final=not block), 0
        self.ended = not block
        return True

    def skip(self, count: int) -> None:
        passed = self.text[self.at : self.at + count]
        self.place += count if passed.isascii() else len(passed.encode())
        self.at += count

    def peek(self) -> str:
        """Return the next character that is no space, "" at the end of the file."""
        while True:
            rest = self.text[self.at : self.at + 64]
            blanks = len(rest) - len(rest.lstrip(_SPACE + "\ufeff" * (self.place == 0)))
            self.skip(blanks)
            if blanks < len(rest):
                return self.text[self.at]
            if not rest and not self.more():
                return ""


def _array_spans(file: Any, path: str, place: Place | None = None) -> Iterator[tuple[Span, bytes]]:
    """Yield every element of an array. Raises ValueError where it is no JSON: behind that nothing can be told."""
    start, number = (place["byte"], place["row"]) if place else (0, 0)
    window, decode = _Window(file, start), json.JSONDecoder().raw_decode
    try:
        if not number and window.peek() == "[":
            window.skip(1)
        while (mark := window.peek()) != "]":
            if number:
                if mark != ",":
                    raise _broken(path, number, "no comma behind it" if mark else "the file ends behind it")
                window.skip(1)
                window.peek()
            end, fault = _element_end(window, decode)
            if fault:
                raise _broken(path, number, fault)
            number += 1
            text = window.text[window.at : end].encode()
            span = Span(window.place, len(text), number)
            window.skip(end - window.at)
            yield span, text
        window.skip(1)
        if window.peek():
            raise _broken(path, number, "there is more behind the closing bracket")
    except UnicodeDecodeError:
        raise _broken(path, number, "not UTF-8") from None


def _element_end(window: _Window, decode: Any) -> tuple[int, str]:
    """Return where the next element ends in the window's text, or why it has no end."""
    while True:
        try:
            _, end = decode(window.text, window.at)
            if end < len(window.text) or not window.more():
                return end, ""
        except RecursionError:
            return 0, "nested too deeply"
        except ValueError as error:
            # A string that is not closed is told by where it starts; any other fault by where it is, so that one far
            # from the end of what was read is not the cut at the end.
            placed = isinstance(error, json.JSONDecodeError) and not error.msg.startswith("Unterminated")
            if placed and error.pos + 64 < len(window.text):  # type: ignore[attr-defined]
                return 0, f"not JSON ({error.msg})"  # type: ignore[attr-defined]
            if len(window.text) - window.at > MAX_ROW_BYTES:
                return 0, f"longer than {MAX_ROW_BYTES >> 20} MiB, or not JSON ({error})"
            if not window.more():
                return 0, f"not JSON, or the file is truncated in it ({error})"


def _broken(path: str, rows: int, what: str) -> ValueError:
    return ValueError(f"{path}: row {rows + 1} of the array: {what}; mend the file, or write one object a line")
