"""Files of one JSON object a line."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from qwen3vl_train.data.faults import RowFault
from qwen3vl_train.data.formats import Sample, parse_row


class JsonlSource:
    """A file of one JSON object a line. Blank lines are skipped; numbers of rows are numbers of lines."""

    def __init__(self, path: str | os.PathLike[str], media_root: str | os.PathLike[str] | None = None) -> None:
        """Scan the file once for its line starts and its hash. Raises ValueError when it cannot be read."""
        self.path = Path(path)
        self.name = str(path)
        self.media_root = None if media_root is None else os.fspath(media_root)
        if not self.path.is_file():
            found = "not a file" if self.path.exists() else "no such file"
            raise ValueError(f"{self.path}: {found}; check the paths under data")
        if self.media_root is not None and not os.path.isdir(self.media_root):
            raise ValueError(f"{self.path}: media_root {self.media_root} is not a folder; check the paths under data")
        starts: list[int] = []
        lines: list[int] = []
        place, digest = 0, hashlib.sha256()
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                digest.update(line)
                if line.strip():
                    starts.append(place)
                    lines.append(number)
                place += len(line)
        self._starts = np.array(starts, dtype=np.int64)
        self._lines = np.array(lines, dtype=np.int64)
        self._fingerprint = {"size": place, "sha256": digest.hexdigest()}

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, row: int) -> str:
        """Return the text of row 0..len-1. Raises RowFault when it is not UTF-8."""
        with self.path.open("rb") as file:
            file.seek(int(self._starts[row]))
            line = file.readline()
        try:
            return line.decode("utf-8-sig" if row == 0 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise RowFault(f"not UTF-8 (byte {error.start} of the line); save the file as UTF-8") from None

    def sample(self, row: int) -> Sample:
        """Return row 0..len-1 as a Sample, named like `train.jsonl:17`. Raises RowFault."""
        return parse_row(self[row], f"{self.path.name}:{self.row_number(row)}", self.media_root)

    def row_number(self, row: int) -> int:
        """Return the number of the row's line, counted from 1."""
        return int(self._lines[row])

    def fingerprint(self) -> dict[str, Any]:
        """Return size and SHA-256 of the content; the path is no part of it, so a file may move."""
        return dict(self._fingerprint)
