"""CSV and TSV files: the first line names the columns, and every cell is text, so that 007 stays 007."""

import csv
import io
from collections.abc import Iterator
from functools import partial
from typing import Any

from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.data.rows.parse import MAX_ROW_BYTES, RowRules
from qwen3vl_train.data.rows.values import decode_json
from qwen3vl_train.data.sources.arrow import text_keys
from qwen3vl_train.data.sources.base import Position, known_columns
from qwen3vl_train.data.sources.files import DAMAGE, damaged, naming_file, open_plain, suffix_of
from qwen3vl_train.data.sources.spans import Span, SpanSource, TextFormat

DELIMITERS = {".csv": ",", ".tsv": "\t"}
_BLOCK = 1 << 20
csv.field_size_limit(MAX_ROW_BYTES)  # of the process; the limit of 128 KiB is below that of a picture as base64


class CsvSource(SpanSource):
    """A CSV or TSV file. Row numbers count rows, without the line of names; blank lines are skipped."""

    def _format(self) -> TextFormat:
        ignored, text_format = csv_format(self.uncompressed, self.rules, self.name)
        self.ignored_columns = tuple(ignored)
        return text_format


def csv_format(path: str, rules: RowRules, name: str | None = None) -> tuple[list[str], TextFormat]:
    """Return the columns that no row is made from, and how rows are found and read. Raise ValueError.

    name: of the file in messages.
    """
    name, delimiter = name or path, DELIMITERS[suffix_of(path)]
    names = _read_names(path, name, delimiter)
    known, ignored = known_columns(names, rules, name)
    if twice := next((column for column in known if names.count(column) > 1), None):
        raise ValueError(f"{name}: two columns are called {twice}; rename one of them")
    lists = set(known) - text_keys(rules)
    spans, decode = partial(_spans, delimiter=delimiter), partial(_decode, names, {*known}, lists, delimiter)
    return ignored, TextFormat(spans, decode)


class _Lines:
    """The lines of a file from its position on, as text; how many bytes of it were taken is counted."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.held: list[bytes] = []  # since the last call of `take`, up to about MAX_ROW_BYTES
        self.length = 0

    def __iter__(self) -> Iterator[str]:
        line: list[bytes] = []
        while block := self.file.read(_BLOCK):
            for piece in io.BytesIO(block):
                line.append(piece)
                if piece.endswith(b"\n"):
                    yield self._text(b"".join(line))
                    line = []
        if line:
            yield self._text(b"".join(line))

    def _text(self, line: bytes) -> str:
        if self.length <= MAX_ROW_BYTES:
            self.held.append(line)
        self.length += len(line)
        return line.decode("utf-8", "surrogateescape")

    def take(self) -> tuple[int, bytes]:
        """Return the lines since the last call, with their length in bytes."""
        taken = self.length, b"".join(self.held)
        self.held, self.length = [], 0
        return taken


def _read_names(path: str, name: str, delimiter: str) -> list[str]:
    with naming_file(name), open_plain(path) as file:
        try:
            names = next(csv.reader(_Lines(file), delimiter=delimiter, strict=True), [])
        except csv.Error as error:
            raise ValueError(f"{name}: its first line is not one of column names ({error}); write names") from None
        except DAMAGE as error:
            raise damaged(name, 0, error) from None
    names = [column.removeprefix("\ufeff").strip() for column in names]
    if any("\udc80" <= character <= "\udcff" or character == "\0" for column in names for character in column):
        raise ValueError(f"{name}: not UTF-8; save the file as UTF-8")
    if len(names) == 1 and any(other in names[0] for other in ",;\t|"):
        fault = f"its first line names one column, {names[0][:100]!r}"
        raise ValueError(f"{name}: {fault}; separate columns by commas in .csv, by tabs in .tsv")
    return names


def _spans(file: Any, path: str, position: Position, delimiter: str) -> Iterator[Span]:
    """Yield every record that is not blank, but for the line of names. A record may have line breaks, in quotes."""
    lines = _Lines(file)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    start, number, is_names = position["byte"], position["row"], position["byte"] == 0
    while True:
        try:
            cells = next(reader, None)
        except csv.Error:  # `_decode` finds it again, as the fault of this row
            cells = [""]
        length, text = lines.take()
        if cells is None:
            return
        if cells and not is_names:
            number += 1
            yield start, length, number, text
        is_names = is_names and not cells
        start += length


def _decode(names: list[str], known: set[str], lists: set[str], delimiter: str, text: bytes, first: bool) -> Any:
    """Return a record as {column: text}, None for an empty cell. Cells of `lists` may hold JSON."""
    try:
        # Not `splitlines`: csv itself knows which line breaks end a record.
        (cells,) = csv.reader(io.StringIO(text.decode(), newline="\n"), delimiter=delimiter, strict=True)
    except UnicodeDecodeError as error:
        raise RowFault(f"not UTF-8 (byte {error.start} of the row); save the file as UTF-8") from None
    except csv.Error as error:
        fault = f'not CSV ({error}); put texts in double quotes, and write "" for a double quote in them'
        raise RowFault(fault) from None
    if len(cells) != len(names):
        kind = "comma" if delimiter == "," else "tab"
        fault = f"{len(cells)} cells for {len(names)} columns; put texts with a {kind} or a line break in double quotes"
        raise RowFault(fault, kind="wrong_type")
    row = {column: cell or None for column, cell in zip(names, cells, strict=True) if column in known}
    return {column: _from_json(cell) if cell and column in lists else cell for column, cell in row.items()}


def _from_json(cell: str) -> Any:
    """Return the list or object that a cell holds as JSON, or else its text. Raise RowFault for a key given twice."""
    if cell.lstrip()[:1] not in ("[", "{"):
        return cell
    try:
        return decode_json(cell)
    except RowFault:
        raise
    except (ValueError, RecursionError):
        return cell
