"""Parquet: read a batch of rows at a time, and of those only the columns that rows are made from."""

import bisect
import hashlib
import json
import os
from collections.abc import Iterator
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, NamedTuple

from qwen3vl_train.data.errors import LAST_RESORT, RowFault
from qwen3vl_train.data.rows.parse import RowRules
from qwen3vl_train.data.sources.arrow import Convert, row_converter
from qwen3vl_train.data.sources.base import FileSource, Ignored, Position, RawRow, known_columns
from qwen3vl_train.data.sources.files import cached_copy, damaged, naming_file, open_file

_BATCH_ROWS = 64
"""Rows decoded at a time; a batch of pictures of a megabyte each stays below a hundred."""
_IGNORED = b"ignored_columns"


class _Copy(NamedTuple):
    """An opened Arrow file. ends: the number of rows up to the end of each of its batches."""

    reader: Any
    ends: list[int]
    convert: Convert


class ParquetSource(FileSource):
    """One Parquet file. It is unpacked once to an Arrow file in the cache folder, for random access.

    Parquet itself is compressed in groups of thousands of rows: a shuffled epoch would decode a group for each row.
    """

    def _open(self) -> dict[str, Any]:
        with open_file(self.name), naming_file(self.name):
            size = self._record_signature(self.name)
        key = {"columns": sorted(self.rules.columns_read()), "layout": 2}
        self._copy = cached_copy(self.name, key, self._unpack, ".arrow")
        self._opened: _Copy | None = None
        self.ignored_columns = tuple(json.loads(self._batches().reader.schema.metadata[_IGNORED]))
        # The footer has the offset and statistics of every column chunk.
        return {"size": size, "rows": len(self), "footer": _footer_hash(self.name)}

    def _unpack(self, copy: Path) -> None:
        import pyarrow as pa

        with _opened(self.name) as file:
            found = file.schema_arrow
            names, ignored = known_columns(found.names, self.rules, self.name)
            batches = _batches(file, names, 0, self.name)
            first = next(batches, None)
            schema = pa.schema([found.field(name) for name in names]) if first is None else first.schema
            schema = schema.with_metadata({**(found.metadata or {}), _IGNORED: json.dumps(ignored)})
            with pa.OSFile(str(copy), "wb") as out, pa.ipc.new_file(out, schema) as writer:
                for batch in chain([] if first is None else [first], batches):
                    writer.write_batch(batch)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def _batches(self) -> _Copy:
        import pyarrow as pa

        if self._opened is None:
            reader = pa.ipc.open_file(pa.memory_map(str(self._copy)))
            sizes = (reader.get_batch(number).num_rows for number in range(reader.num_record_batches))
            self._opened = _Copy(reader, list(accumulate(sizes)), row_converter(reader.schema, self.rules))
        return self._opened

    def __len__(self) -> int:
        ends = self._batches().ends
        return ends[-1] if ends else 0

    def raw(self, row: int) -> RawRow:
        import pyarrow as pa

        self._check_unchanged()
        try:
            reader, ends, convert = self._batches()
            number = bisect.bisect_right(ends, row)
            batch = reader.get_batch(number)
        except (pa.ArrowException, OSError) as error:
            fault = f"{self.name}: its copy {self._copy} cannot be read ({_short(error)}); remove it and start again"
            raise RowFault(fault, kind="read_error", transient=True) from None
        one = batch.slice(row - (ends[number] - batch.num_rows), 1)
        return RawRow(row_to_python(one, convert), row + 1, {})


def stream_parquet(path: str, rules: RowRules, position: Position, ignored: Ignored) -> Iterator[RawRow]:
    """Yield the rows of a Parquet file from a position on. Raise ValueError where it is damaged."""
    done = position["row"]
    with _opened(path) as file:
        names, not_read = known_columns(file.schema_arrow.names, rules, path)
        ignored.update(dict.fromkeys(not_read))
        convert = row_converter(file.schema_arrow, rules)
        for batch in _batches(file, names, done, path):
            for index in range(batch.num_rows):
                done += 1
                try:
                    with LAST_RESORT:
                        row = row_to_python(batch.slice(index, 1), convert)
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


def _batches(file: Any, names: list[str], skip: int, path: str) -> Iterator[Any]:
    """Yield record batches from row `skip` on; row groups that end before it are not read. Raise ValueError."""
    import pyarrow as pa

    done = 0
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        if done + size <= skip:
            done += size
            continue
        try:
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=names, use_threads=False):
                remaining = _plain(batch.slice(min(batch.num_rows, max(0, skip - done))))
                done += batch.num_rows
                if remaining.num_rows:
                    yield remaining
        except NotImplementedError as error:  # ArrowNotImplementedError: a type that pyarrow cannot read
            fault = f"row group {group + 1} cannot be read ({_short(error)}); write the file again with plain types"
            raise ValueError(f"{path}: {fault}") from None
        except (pa.ArrowException, OSError) as error:
            raise damaged(path, done, f"row group {group + 1}: {_short(error)}") from None


def _plain_type(arrow_type: Any) -> Any:
    """Return a type without dictionaries, which an Arrow file cannot replace from one batch to the next."""
    import pyarrow as pa

    if pa.types.is_dictionary(arrow_type):
        return _plain_type(arrow_type.value_type)
    if pa.types.is_struct(arrow_type):
        fields = [arrow_type.field(index) for index in range(arrow_type.num_fields)]
        return pa.struct([field.with_type(_plain_type(field.type)) for field in fields])
    if pa.types.is_list(arrow_type):
        return pa.list_(arrow_type.value_field.with_type(_plain_type(arrow_type.value_type)))
    if pa.types.is_large_list(arrow_type):
        return pa.large_list(arrow_type.value_field.with_type(_plain_type(arrow_type.value_type)))
    return arrow_type


def _plain(batch: Any) -> Any:
    """Return a batch with plain types. Raise ArrowException."""
    import pyarrow as pa

    fields = [pa.field(field.name, _plain_type(field.type)) for field in batch.schema]
    columns = [_with_type(column, field.type) for column, field in zip(batch.columns, fields, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields))


def _with_type(column: Any, arrow_type: Any) -> Any:
    import pyarrow as pa

    if column.type.equals(arrow_type):
        return column
    try:
        return column.cast(arrow_type)
    except pa.ArrowException:  # as for a struct in a list with a field that is null in every row
        return pa.array(column.to_pylist(), type=arrow_type)


def row_to_python(batch: Any, convert: Convert) -> dict[str, Any]:
    """Return the one row of a batch. Raise RowFault for values that Python cannot represent."""
    import pyarrow as pa

    try:
        row = batch.to_pylist()[0]
    except (pa.ArrowException, ValueError, OverflowError) as error:
        fault = f"a value cannot be read ({_short(error)}); write text, numbers, bytes, lists and structs"
        raise RowFault(fault, kind="wrong_type") from None
    return convert(row)


def _footer_hash(path: str) -> str:
    with open_file(path) as file:
        size = file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(0, size - length))
        return hashlib.sha256(file.read(length)).hexdigest()


def _short(error: BaseException) -> str:
    return str(error).split("\n")[0][:200]
