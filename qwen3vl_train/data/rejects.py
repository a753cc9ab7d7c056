"""The rows of a run that cannot be used: each counted once, in memory that the number of rows read does not touch."""

from collections.abc import Iterable

from qwen3vl_train.data.errors import Reject

_ROW_BITS = 44


class KnownRejects:
    """File and row of every rejected row, as one integer each: a million take about 60 MiB, with or without reasons."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self._rows: set[int] = set()
        self._unnamed = 0

    def __len__(self) -> int:
        return len(self._rows) + self._unnamed

    def add(self, rejects: Iterable[Reject]) -> list[Reject]:
        """Take note of rows. Returns those not known before, each once."""
        new = []
        for reject in rejects:
            file = self._files.setdefault(reject.file, len(self._files))
            row = file << _ROW_BITS | reject.row
            if row not in self._rows:
                self._rows.add(row)
                new.append(reject)
        return new

    def add_unnamed(self, count: int) -> None:
        """Count rows that are known to have been rejected, but no longer which."""
        self._unnamed += count
