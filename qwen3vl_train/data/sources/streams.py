"""One entry of the recipe as a stream: its files one after the other, each row once, starting at any row."""

import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.data.rows.parse import RowRules
from qwen3vl_train.data.signatures import FileSignature
from qwen3vl_train.data.sources.base import Position, RawRow, StreamRow, check_media_root, check_unchanged
from qwen3vl_train.data.sources.files import file_signature, is_url, naming_file, suffix_of
from qwen3vl_train.data.sources.hub import load_rows, resolve_hub_path, stream_hub
from qwen3vl_train.data.sources.jsonl import stream_json
from qwen3vl_train.data.sources.parquet import stream_parquet
from qwen3vl_train.data.sources.tar import stream_tar


class FileStream:
    """A `StreamSource` over files. Its state: `{"file": 3, "position": {...}}`, a file and a position in it."""

    def __init__(self, name: str, files: list[str], media_root: str | None, rules: RowRules) -> None:
        self.name, self.files, self.media_root, self.rules = name, files, media_root, rules
        if any(suffix_of(file) != ".tar" for file in files):  # the media of a shard are in it
            check_media_root(name, media_root, rules)
        self._signatures: dict[str, FileSignature] = {}

    def rows(self, state: dict[str, Any] | None = None) -> Iterator[StreamRow]:
        """See `StreamSource.rows`. Raise ValueError, too, where a local file has changed since `fingerprint`, or since
        it was opened: positions in it are no longer valid.
        """
        first, position = (state["file"], state["position"]) if state else (0, None)
        for number in range(first, len(self.files)):
            path = self.files[number]
            signature = None if is_url(path) else self._signature(path)
            root = None if suffix_of(path) == ".tar" else self.media_root
            for raw in _stream(path, self.rules, position if number == first else None):
                if signature is not None:
                    check_unchanged(path, signature, "opened")
                yield _parse(raw, self.rules, path, root, {"file": number, "position": raw.position})
            if signature is not None:  # a file that was truncated at the end of a row would otherwise just be shorter
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

    def __init__(
        self, name: str, media_root: str | None, rules: RowRules, *, split: str | None, subset: str | None
    ) -> None:
        self.name, self.media_root, self.rules = name, media_root, rules
        self.split, self.subset = split, subset
        check_media_root(name, media_root, rules)

    def rows(self, state: dict[str, Any] | None = None) -> Iterator[StreamRow]:
        """See `StreamSource.rows`."""
        # Not decoded: pictures stay bytes or paths, so that their size is read from their header alone.
        rows = load_rows(self.name, self.split, self.subset, streaming=True).decode(False)
        done, position = (state["row"], state["position"]) if state else (0, None)
        for number, (row, next_position) in enumerate(stream_hub(rows, position), start=done + 1):
            raw = RawRow(row, number, {}, resolve_hub_path)
            yield _parse(raw, self.rules, self.name, self.media_root, {"row": number, "position": next_position})

    def fingerprint(self) -> dict[str, Any]:
        """Return the name of the data set. A change of its content on the hub is not noticed."""
        return {"name": self.name, "split": self.split, "subset": self.subset}


def _stream(path: str, rules: RowRules, position: Position | None) -> Iterator[RawRow]:
    if suffix_of(path) == ".parquet":
        return stream_parquet(path, rules, position)
    if suffix_of(path) == ".tar":
        return stream_tar(path, position)
    return stream_json(path, position)


def _parse(raw: RawRow, rules: RowRules, path: str, media_root: str | None, state: dict[str, Any]) -> StreamRow:
    sample = raw.row
    if not isinstance(sample, RowFault):
        try:
            sample_id = rules.sample_id(os.path.basename(path), raw.number)
            sample = rules.sample(raw.row, sample_id, media_root, raw.resolve)
        except RowFault as fault:
            sample = fault
    return StreamRow(state, sample, raw.number, path)
