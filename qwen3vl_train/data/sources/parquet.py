"""Parquet: read a batch of rows at a time, of those columns alone that rows are made from."""

import bisect
import os
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.data.rows.parse import RowRules
from qwen3vl_train.data.sources.base import FileSource, Place, RawRow
from qwen3vl_train.data.sources.files import damaged, explained, open_file, unpack_once

_BATCH_ROWS = 64
"""Rows decoded at a time; a batch of pictures of a megabyte each stays below a hundred."""


class ParquetSource(FileSource):
    """One Parquet file. It is unpacked once to an Arrow file in the cache folder, which rows are read from at random.

    Parquet itself is compressed in groups of thousands of rows: a shuffled epoch would decode a group for each row.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        media_root: str | os.PathLike[str] | None = None,
        rules: RowRules | None = None,
    ) -> None:
        """Unpack the file where that was not done before. Raises ValueError when it is damaged."""
        super().__init__(path, media_root, rules)
        with open_file(self.name), explained(self.name):
            self._fingerprint = {"size": self._note_stamp(self.name), "rows": 0, "footer": ""}
        columns = sorted(self.rules.columns_read())
        self._copy = unpack_once(self.name, columns, self._unpack, ".arrow")
        self._opened: tuple[Any, list[int]] | None = None
        self._fingerprint |= {"rows": len(self), "footer": _footer_hash(self.name)}

    def _unpack(self, copy: Path) -> None:
        import pyarrow as pa

        with _opened(self.name) as file:
            names = _columns(file, self.rules, self.name)
            schema = pa.schema([file.schema_arrow.field(name) for name in names])
            done = 0
            with pa.OSFile(str(copy), "wb") as out, pa.ipc.new_file(out, schema) as writer:
                for batch in _batches(file, names, 0, self.name):
                    # Not batch as it is: the reader may call a column what the schema does not (nullable, dictionary).
                    writer.write_batch(batch.cast(schema))
                    done += batch.num_rows

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
        """Return row 0..len-1 unchecked. Raises RowFault, also for values that Python has no form of."""
        import pyarrow as pa

        self._check_unchanged()
        try:
            reader, ends = self._batches()
            number = bisect.bisect_right(ends, row)
            batch = reader.get_batch(number)
        except (pa.ArrowException, OSError) as error:
            raise RowFault(
                f"{self.name}: its copy {self._copy} cannot be read ({_short(error)}); remove it and start again",
                kind="read_error",
                transient=True,
            ) from None
        place = row - (ends[number] - batch.num_rows)
        return RawRow(as_python(batch.slice(place, 1)), row + 1, {})

    def row_number(self, row: int) -> int:
        return row + 1

    def fingerprint(self) -> dict[str, Any]:
        """Return size, rows and a hash of the footer, which holds the place and statistics of every column chunk."""
        return dict(self._fingerprint)


def stream_parquet(path: str, rules: RowRules, place: Place | None) -> Iterator[RawRow]:
    """Yield the rows of a Parquet file from a place on. Raises ValueError where it is damaged."""
    done = place["row"] if place else 0
    with _opened(path) as file:
        names = _columns(file, rules, path)
        for batch in _batches(file, names, done, path):
            for number in range(batch.num_rows):
                done += 1
                try:
                    row = as_python(batch.slice(number, 1))
                except RowFault as fault:
                    row = fault
                yield RawRow(row, done, {"row": done})


def _opened(path: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with explained(path):
        file = open_file(path)
    try:
        # Without pre_buffer and with a small buffer, pages are read as they are needed and not a group at a time.
        return pq.ParquetFile(pa.PythonFile(file, mode="r"), pre_buffer=False, buffer_size=1 << 20)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: is no whole Parquet file ({_short(error)}); copy the file again") from None


def _columns(file: Any, rules: RowRules, path: str) -> list[str]:
    names = [name for name in file.schema_arrow.names if name in rules.columns_read()]
    if not names:
        raise ValueError(
            f"{path}: has the columns {', '.join(file.schema_arrow.names[:20])}, and none that rows are made from; "
            "name them under columns"
        )
    return names


def _batches(file: Any, names: list[str], skip: int, path: str) -> Iterator[Any]:
    """Yield record batches from row `skip` on; whole row groups before it are not read."""
    import pyarrow as pa

    done = 0
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        if done + size <= skip:
            done += size
            continue
        try:
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=names, use_threads=False):
                fresh = batch.slice(min(batch.num_rows, max(0, skip - done)))
                done += batch.num_rows
                if fresh.num_rows:
                    yield fresh
        except (pa.ArrowException, OSError) as error:
            raise ValueError(damaged(path, done, _short(error))) from None


def as_python(batch: Any) -> dict[str, Any]:
    import pyarrow as pa

    try:
        return batch.to_pylist()[0]
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise RowFault(
            f"a value cannot be read ({_short(error)}); write text, numbers, bytes, lists and structs",
            kind="wrong_type",
        ) from None


def _footer_hash(path: str) -> str:
    import hashlib

    with open_file(path) as file:
        size = file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(0, size - length))
        return hashlib.sha256(file.read(length)).hexdigest()


def _short(error: BaseException) -> str:
    return str(error).split("\n")[0][:200]
