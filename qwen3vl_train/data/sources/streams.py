"""One entry of the recipe as a stream: its files one after the other, each row once, from any row on."""

import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.data.rows.parse import RowRules
from qwen3vl_train.data.sources.base import Place, RawRow, StreamRow, check_media_root, check_unchanged
from qwen3vl_train.data.sources.files import explained, is_url, stamp, suffix_of
from qwen3vl_train.data.sources.hub import find_on_hub, load_rows, stream_hub
from qwen3vl_train.data.sources.jsonl import stream_json
from qwen3vl_train.data.sources.parquet import stream_parquet
from qwen3vl_train.data.sources.tar import stream_tar


class FileStream:
    """A `StreamSource` over files. state: number of the file, and the place in it, `{"file": 3, "place": {...}}`."""

    def __init__(self, name: str, files: list[str], media_root: str | None, rules: RowRules) -> None:
        self.name, self.files, self.media_root, self.rules = name, files, media_root, rules
        if any(suffix_of(file) != ".tar" for file in files):  # the media of a shard are in it
            check_media_root(name, media_root, rules)
        self._stamps: dict[str, list[int | str]] = {}

    def rows(self, state: dict[str, Any] | None = None) -> Iterator[StreamRow]:
        """See `StreamSource.rows`. Raises ValueError, too, where a local file is not as it was at `fingerprint`, or
        when it was opened: the places of its rows mean nothing any more.
        """
        first, place = (state["file"], state["place"]) if state else (0, None)
        for number in range(first, len(self.files)):
            path = self.files[number]
            seen = None if is_url(path) else self._stamp(path)
            for raw in _stream(path, self.rules, place if number == first else None):
                if seen is not None:
                    check_unchanged(path, seen, "opened")
                root = None if suffix_of(path) == ".tar" else self.media_root
                yield _checked(raw, self.rules, path, root, {"file": number, "place": raw.place})
            if seen is not None:  # cut at the end of a row, it would just be shorter
                check_unchanged(path, seen, "opened")

    def fingerprint(self) -> dict[str, Any]:
        """Return sizes of the files, times of the local ones, and a hash of their names without their folders."""
        stamps = [self._stamp(path) for path in self.files]
        times = [None if is_url(path) else time for path, (_, time) in zip(self.files, stamps, strict=True)]
        names = json.dumps([os.path.basename(path) for path in self.files])
        hashed = hashlib.sha256(names.encode()).hexdigest()
        return {"sizes": [size for size, _ in stamps], "times": times, "names": hashed}

    def _stamp(self, path: str) -> list[int | str]:
        """Return the stamp of a file as it was when this was first asked."""
        if path not in self._stamps:
            with explained(path):
                self._stamps[path] = stamp(path)
        return self._stamps[path]


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
            raw = RawRow(row, number, {}, find_on_hub)
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
