"""One entry of the recipe as a stream: its files one after the other, each row once, from any row on."""

import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

from qwen3vl_train.data.faults import RowFault
from qwen3vl_train.data.rows import RowRules
from qwen3vl_train.data.sources.base import Place, RawRow, StreamRow, check_media_root
from qwen3vl_train.data.sources.files import explained, stamp, suffix_of
from qwen3vl_train.data.sources.hub import load_rows, stream_hub
from qwen3vl_train.data.sources.json_files import stream_json
from qwen3vl_train.data.sources.parquet import stream_parquet
from qwen3vl_train.data.sources.tar import stream_tar


class FileStream:
    """A `StreamSource` over files. state: number of the file, and the place in it, `{"file": 3, "place": {...}}`."""

    def __init__(self, name: str, files: list[str], media_root: str | None, rules: RowRules) -> None:
        self.name, self.files, self.media_root, self.rules = name, files, media_root, rules
        if any(suffix_of(file) != ".tar" for file in files):  # the media of a shard are in it
            check_media_root(name, media_root, rules)

    def rows(self, state: dict[str, Any] | None = None) -> Iterator[StreamRow]:
        """See `StreamSource.rows`."""
        first, place = (state["file"], state["place"]) if state else (0, None)
        for number in range(first, len(self.files)):
            path = self.files[number]
            for raw in _stream(path, self.rules, place if number == first else None):
                root = None if suffix_of(path) == ".tar" else self.media_root
                yield _checked(raw, self.rules, path, root, {"file": number, "place": raw.place})

    def fingerprint(self) -> dict[str, Any]:
        """Return the sizes of the files and a hash of their names without their folders, in order."""
        sizes = []
        for path in self.files:
            with explained(path):
                sizes.append(stamp(path)[0])
        names = json.dumps([os.path.basename(path) for path in self.files])
        return {"sizes": sizes, "names": hashlib.sha256(names.encode()).hexdigest()}


class HubStream:
    """A `StreamSource` over an iterable data set of `datasets`. state: its own, and the number of rows it stands at."""

    def __init__(
        self, name: str, media_root: str | None, rules: RowRules, *, split: str | None, subset: str | None
    ) -> None:
        self.name, self.media_root, self.rules = name, media_root, rules
        self.split, self.subset = split, subset
        check_media_root(name, media_root, rules)

    def rows(self, state: dict[str, Any] | None = None) -> Iterator[StreamRow]:
        """See `StreamSource.rows`."""
        # Undecoded: pictures stay bytes or paths, so that their size is read from their header alone.
        rows = load_rows(self.name, self.split, self.subset, streaming=True).decode(False)
        done, place = (state["row"], state["place"]) if state else (0, None)
        for number, (row, behind) in enumerate(stream_hub(rows, place), start=done + 1):
            raw = RawRow(row, number, {})
            yield _checked(raw, self.rules, self.name, self.media_root, {"row": number, "place": behind})

    def fingerprint(self) -> dict[str, Any]:
        """Return the name of the data set; the hub may change what stands behind it."""
        return {"name": self.name, "split": self.split, "subset": self.subset}


def _stream(path: str, rules: RowRules, place: Place | None) -> Iterator[RawRow]:
    if suffix_of(path) == ".parquet":
        return stream_parquet(path, rules, place)
    if suffix_of(path) == ".tar":
        return stream_tar(path, place)
    return stream_json(path, place)


def _checked(raw: RawRow, rules: RowRules, path: str, media_root: str | None, state: dict[str, Any]) -> StreamRow:
    if isinstance(raw.row, RowFault):
        return StreamRow(state, raw.row, raw.number, path)
    try:
        sample = rules.sample(raw.row, rules.sample_id(os.path.basename(path), raw.number), media_root, raw.find)
    except RowFault as fault:
        return StreamRow(state, fault, raw.number, path)
    return StreamRow(state, sample, raw.number, path)
