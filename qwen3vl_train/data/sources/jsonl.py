"""JSON files: one object a line, or one array of objects, which is read without ever holding all of it."""

import codecs
import io
import json
from collections.abc import Iterator
from typing import Any

from qwen3vl_train.data.rows.parse import MAX_ROW_BYTES, decode_row
from qwen3vl_train.data.sources.base import Position, is_turn
from qwen3vl_train.data.sources.files import DAMAGE, damaged, open_plain, suffix_of
from qwen3vl_train.data.sources.spans import Span, SpanSource, TextFormat

_BLOCK = 1 << 20
_MAX_FIRST_LINE = 16 << 20
"""A first line that is longer, and begins with a bracket, is taken for the whole array."""
_SPACE = " \t\r\n"
_DECODER = json.JSONDecoder()


class JsonlSource(SpanSource):
    """A JSON file. Row numbers are those of lines, or of elements; blank lines are skipped.

    A file whose first character is `[` is an array, unless its lines are rows: each a list of messages.
    """

    def _format(self) -> TextFormat:
        return json_format(self.uncompressed)


def json_format(path: str) -> TextFormat:
    """Return how the rows of a JSON file are found and read. Raise ValueError where it is damaged."""
    return TextFormat(_array_spans if _is_array(path) else _line_spans, _decode)


def _decode(text: bytes, first: bool) -> Any:
    return decode_row(text, first=first)


def _is_array(path: str) -> bool:
    first = b""
    try:
        with open_plain(path) as file:
            while not first and (block := file.read(_BLOCK)):
                first = block.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        if first != b"[" or suffix_of(path) == ".json":
            return first == b"["
        with open_plain(path) as file:
            if not _begins_with_row(file):
                return False
        with open_plain(path) as file:
            return _is_one_array(file)
    except DAMAGE as error:
        raise damaged(path, 0, error) from None


def _begins_with_row(file: Any) -> bool:
    """Return whether the list with which a file begins has a row as its first element, and not a turn or no JSON."""
    buffer = _TextBuffer(file, 0)
    try:
        buffer.peek()
        buffer.skip(1)
        buffer.peek()
        end, fault = _element_end(buffer)
        if fault:
            return False
        first = json.loads(buffer.text[buffer.at : end])
        buffer.skip(end - buffer.at)
        return isinstance(first, dict | list) and not is_turn(first) and buffer.peek() in (",", "]")
    except UnicodeDecodeError:
        return False


def _is_one_array(file: Any) -> bool:
    """Return whether a file that begins with a bracket is one array: a list of one line, or of many."""
    head = b""
    while len(head) < _MAX_FIRST_LINE and (block := file.read(_BLOCK)):
        head += block
    line, line_end, rest = head.removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")
    if not line_end and len(head) >= _MAX_FIRST_LINE:
        return True
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return not rest.strip()


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
