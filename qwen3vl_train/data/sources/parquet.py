"""Parquet: read a batch of rows at a time, and of those only the columns that rows are made from."""

import bisect
import hashlib
import os
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.data.rows.parse import RowRules
from qwen3vl_train.data.sources.base import FileSource, Position, RawRow
from qwen3vl_train.data.sources.files import cached_copy, damaged, naming_file, open_file

_BATCH_ROWS = 64
"""Rows decoded at a time; a batch of pictures of a megabyte each stays below a hundred."""


class ParquetSource(FileSource):
    """One Parquet file. It is unpacked once to an Arrow file in the cache folder, for random access.

    Parquet itself is compressed in groups of thousands of rows: a shuffled epoch would decode a group for each row.
    """

    def _open(self) -> dict[str, Any]:
        with open_file(self.name), naming_file(self.name):
            size = self._record_signature(self.name)
        columns = sorted(self.rules.columns_read())
        self._copy = cached_copy(self.name, columns, self._unpack, ".arrow")
        self._opened: tuple[Any, list[int]] | None = None
        # The footer has the offset and statistics of every column chunk.
        return {"size": size, "rows": len(self), "footer": _footer_hash(self.name)}

    def _unpack(self, copy: Path) -> None:
        import pyarrow as pa

        with _opened(self.name) as file:
            names = known_columns(file.schema_arrow.names, self.rules, self.name)
            schema = pa.schema([file.schema_arrow.field(name) for name in names])
            with pa.OSFile(str(copy), "wb") as out, pa.ipc.new_file(out, schema) as writer:
                for batch in _batches(file, names, 0, self.name):
                    # The reader's types may differ from the schema (nullable, dictionary), so the batch is cast.
                    writer.write_batch(batch.cast(schema))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def _batches(self) -> tuple[Any, list[int]]:
        """Return the opened Arrow file and the number of rows up to the end of each of its batches."""
        import pyarrow as pa

        if self._opened is None:
            reader = pa.ipc.open_file(pa.memory_map(str(self._copy)))
            sizes = (reader.get_batch(number).num_rows for number in range(reader.num_record_batches))
            self._opened = (reader, list(accumulate(sizes)))
        return self._opened

    def __len__(self) -> int:
        _, ends = self._batches()
        return ends[-1] if ends else 0

    def raw(self, row: int) -> RawRow:
        import pyarrow as pa

        self._check_unchanged()
        try:
            reader, ends = self._batches()
            number = bisect.bisect_right(ends, row)
            batch = reader.get_batch(number)
        except (pa.ArrowException, OSError) as error:
            fault = f"{self.name}: its copy {self._copy} cannot be read ({_short(error)}); remove it and start again"
            raise RowFault(fault, kind="read_error", transient=True) from None
        return RawRow(row_to_python(batch.slice(row - (ends[number] - batch.num_rows), 1)), row + 1, {})


def stream_parquet(path: str, rules: RowRules, position: Position) -> Iterator[RawRow]:
    """Yield the rows of a Parquet file from a position on. Raise ValueError where it is damaged."""
    done = position["row"]
    with _opened(path) as file:
        names = known_columns(file.schema_arrow.names, rules, path)
        for batch in _batches(file, names, done, path):
            for index in range(batch.num_rows):
                done += 1
                try:
                    row = row_to_python(batch.slice(index, 1))
                except RowFault as fault:
                    row = fault
                yield RawRow(row, done, {"row": done})


def _opened(path: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with naming_file(path):
        file = open_file(path)
    try:
        # Without pre_buffer and with a small buffer, pages are read as they are needed and not a group at a time.
        return pq.ParquetFile(pa.PythonFile(file, mode="r"), pre_buffer=False, buffer_size=1 << 20)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: is not a complete Parquet file ({_short(error)}); copy the file again") from None


def known_columns(names: Sequence[str], rules: RowRules, path: str) -> list[str]:
    """Return the columns that rows are made from. Raise ValueError when there are none."""
    known = [name for name in names if name in rules.columns_read()]
    if not known:
        found = ", ".join(names[:20])
        raise ValueError(f"{path}: has the columns {found}, and none that rows are made from; name them under columns")
    return known


def _batches(file: Any, names: list[str], skip: int, path: str) -> Iterator[Any]:
    """Yield record batches from row `skip` on; row groups that end before it are not read."""
    import pyarrow as pa

    done = 0
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        if done + size <= skip:
            done += size
            continue
        try:
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=names, use_threads=False):
                remaining = batch.slice(min(batch.num_rows, max(0, skip - done)))
                done += batch.num_rows
                if remaining.num_rows:
                    yield remaining
        except (pa.ArrowException, OSError) as error:
            raise damaged(path, done, _short(error)) from None


def row_to_python(batch: Any) -> dict[str, Any]:
    """Return the one row of a batch. Raise RowFault for values that Python cannot represent."""
    import pyarrow as pa

    try:
        return batch.to_pylist()[0]
    except (pa.ArrowException, ValueError, OverflowError) as error:
        fault = f"a value cannot be read ({_short(error)}); write text, numbers, bytes, lists and structs"
        raise RowFault(fault, kind="wrong_type") from None


def _footer_hash(path: str) -> str:
    with open_file(path) as file:
        size = file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(0, size - length))
        return hashlib.sha256(file.read(length)).hexdigest()


def _short(error: BaseException) -> str:
    return str(error).split("\n")[0][:200]
