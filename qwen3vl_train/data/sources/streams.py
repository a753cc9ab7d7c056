"""One entry of the recipe as a stream: its files one after the other, each row once, starting at any row."""

import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

from qwen3vl_train.data.errors import LAST_RESORT, RowFault
from qwen3vl_train.data.rows.parse import RowRules
from qwen3vl_train.data.signatures import FileSignature
from qwen3vl_train.data.sources.arrow import Convert, row_converter
from qwen3vl_train.data.sources.base import (
    BEGINNING,
    Ignored,
    Position,
    RawRow,
    StreamRow,
    check_media_root,
    check_unchanged,
    known_columns,
)
from qwen3vl_train.data.sources.delimited import DELIMITERS, csv_format
from qwen3vl_train.data.sources.files import file_signature, folder_of, is_url, naming_file, suffix_of
from qwen3vl_train.data.sources.hub import load_rows, reading_on, resolve_hub_path
from qwen3vl_train.data.sources.jsonl import json_format
from qwen3vl_train.data.sources.parquet import stream_parquet
from qwen3vl_train.data.sources.spans import stream_spans
from qwen3vl_train.data.sources.tar import stream_tar


class FileStream:
    """A `StreamSource` over files. Its state: `{"file": 3, "position": {...}}`, a file and a position in it."""

    def __init__(self, name: str, files: list[str], media_root: str | None, rules: RowRules) -> None:
        """Prepare; no row is read. media_root: of all files; None: the folder of each. Raise ValueError."""
        self.name, self.files, self.media_root, self.rules = name, files, media_root, rules
        for root in sorted({root for file in files if (root := self._root(file)) is not None}):
            check_media_root(name, root, rules)
        self._signatures: dict[str, FileSignature] = {}
        self._ignored: Ignored = {}

    @property
    def ignored_columns(self) -> tuple[str, ...]:
        return tuple(self._ignored)

    def _root(self, file: str) -> str | None:
        """Return the folder or URL that the media of a file are relative to; None: they are in it."""
        return None if suffix_of(file) == ".tar" else self.media_root or folder_of(file)

    def rows(self, state: dict[str, Any] | None = None) -> Iterator[StreamRow]:
        # Positions in a local file are invalid once it has changed since `fingerprint`, or since it was opened.
        first, position = (state["file"], state["position"]) if state else (0, BEGINNING)
        for number, path in enumerate(self.files[first:], start=first):
            signature, root = None if is_url(path) else self._signature(path), self._root(path)
            for raw in _stream(path, self.rules, position if number == first else BEGINNING, self._ignored):
                check_unchanged(path, signature, "opened")
                yield _parse(raw, self.rules, path, root, {"file": number, "position": raw.position})
            # A file that was truncated at the end of a row would otherwise just be shorter.
            check_unchanged(path, signature, "opened")

    def fingerprint(self) -> dict[str, Any]:
        """Return sizes of the files, times of the local ones, and a hash of their names without their folders."""
        signatures = [self._signature(path) for path in self.files]
        times = [None if is_url(path) else time for path, (_, time) in zip(self.files, signatures, strict=True)]
        names = json.dumps([os.path.basename(path) for path in self.files])
        hashed = hashlib.sha256(names.encode()).hexdigest()
        return {"sizes": [size for size, _ in signatures], "times": times, "names": hashed}

    def _signature(self, path: str) -> FileSignature:
        """Return the signature of a file at the first call for it."""
        if path not in self._signatures:
            with naming_file(path):
                self._signatures[path] = file_signature(path)
        return self._signatures[path]


class HubStream:
    """A `StreamSource` over an iterable data set of `datasets`. Its state is the data set's own, and the row number."""

    def __init__(self, name: str, media_root: str, rules: RowRules, split: str | None, subset: str | None) -> None:
        self.name, self.media_root, self.rules, self.split, self.subset = name, media_root, rules, split, subset
        self.ignored_columns: tuple[str, ...] = ()
        check_media_root(name, media_root, rules)

    def rows(self, state: dict[str, Any] | None = None) -> Iterator[StreamRow]:
        number = state["row"] if state else 0
        rows, convert = self._open()
        if state:
            rows.load_state_dict(state["position"])
        iterator = iter(rows)
        while True:
            with reading_on(self.name, number):
                row = next(iterator, None)
            if row is None:
                return
            number += 1
            try:
                with LAST_RESORT:
                    row = convert(row)
            except RowFault as fault:
                row = fault
            raw = RawRow(row, number, {}, resolve_hub_path)
            yield _parse(raw, self.rules, self.name, self.media_root, {"row": number, "position": rows.state_dict()})

    def _open(self) -> tuple[Any, Convert]:
        """Open the data set, and return also the function for its rows. Raise ValueError."""
        rows = load_rows(self.name, self.split, self.subset, streaming=True)
        with reading_on(self.name, 0):
            rows = rows if rows.features else rows._resolve_features()
        kept, ignored = known_columns(rows.column_names or [], self.rules, self.name)
        self.ignored_columns = tuple(ignored)
        # Not decoded: pictures stay bytes or paths, so that their size is read from their header alone.
        return rows.select_columns(kept).decode(False), row_converter(rows.features.arrow_schema, self.rules)

    def fingerprint(self) -> dict[str, Any]:
        """Return the name of the data set. A change of its content on the hub is not noticed."""
        return {"name": self.name, "split": self.split, "subset": self.subset}


def _stream(path: str, rules: RowRules, position: Position, ignored: Ignored) -> Iterator[RawRow]:
    suffix = suffix_of(path)
    if suffix == ".parquet":
        return stream_parquet(path, rules, position, ignored)
    if suffix == ".tar":
        return stream_tar(path, position)
    if suffix in DELIMITERS:
        columns, text_format = csv_format(path, rules)
        ignored.update(dict.fromkeys(columns))
        return stream_spans(path, position, text_format)
    return stream_spans(path, position, json_format(path))


def _parse(raw: RawRow, rules: RowRules, path: str, media_root: str | None, state: dict[str, Any]) -> StreamRow:
    sample, sample_id = raw.row, rules.sample_id(os.path.basename(path), raw.number)
    if not isinstance(sample, RowFault):
        try:
            with LAST_RESORT:
                sample = rules.sample(sample, sample_id, media_root, raw.resolve)
        except RowFault as fault:
            sample = fault
    return StreamRow(state, sample, raw.number, path)
