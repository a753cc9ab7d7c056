"""Find rows of equal text and equal bytes of media. Bytes are read only if text and sizes are equal."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from PIL import Image

from qwen3vl_train.data.errors import LAST_RESORT, RowFault
from qwen3vl_train.data.media.folders import is_folder, list_frames
from qwen3vl_train.data.media.paths import ImageInput, path_or_bytes
from qwen3vl_train.data.rows.sample import ImagePart, Sample, TextPart, VideoPart
from qwen3vl_train.inspect.facts import SHOWN_ROWS, DuplicateFacts
from qwen3vl_train.inspect.training import Entry, RowRef
from qwen3vl_train.public_names import public_name


class DuplicateFinder:
    """Take rows one by one, then say which are equal. Keeps 16 bytes and a reference for each row."""

    def __init__(self, entries: list[Entry]) -> None:
        self._entries = entries
        self._first: dict[bytes, RowRef] = {}
        self._more: dict[bytes, list[RowRef]] = {}

    def add(self, key: bytes, ref: RowRef) -> None:
        """Add a row. key: `RowFacts.key`, equal if text and sizes are."""
        if self._first.setdefault(key, ref) is not ref:
            self._more.setdefault(key, []).append(ref)

    def _groups(self) -> Iterator[list[RowRef]]:
        """Yield rows of equal content, in the order in which they were added, without rows whose media are gone."""
        for key, refs in self._more.items():
            equal: dict[bytes, list[RowRef]] = {}
            for ref in (self._first[key], *refs):
                try:
                    with LAST_RESORT:
                        digest = _media_digest(self._entries[ref.entry].sample(ref))
                except RowFault:
                    continue
                equal.setdefault(digest, []).append(ref)
            yield from (group for group in equal.values() if len(group) > 1)

    def facts(self) -> list[DuplicateFacts]:
        """Return what repeats in each entry. Rows were added in the order of the entries, the training ones first."""
        repeats: list[list[tuple[str, str]]] = [[] for _ in self._entries]
        leaks: list[list[tuple[str, str]]] = [[] for _ in self._entries]

        def full_name(ref: RowRef) -> str:
            source = self._entries[ref.entry].files[ref.file].source
            return f"{public_name(source.name)}:{source.row_number(ref.row)}"

        for group in self._groups():
            first_of: dict[str, RowRef] = {}
            for ref in group:
                entry = self._entries[ref.entry]
                first = first_of.setdefault(entry.role, ref)
                if first is not ref:
                    repeats[ref.entry].append((entry.label(ref), full_name(first)))
                if entry.role == "eval" and "train" in first_of:
                    leaks[ref.entry].append((entry.label(ref), full_name(first_of["train"])))
        return [
            DuplicateFacts(len(same), same[:SHOWN_ROWS], len(leaked), leaked[:SHOWN_ROWS])
            for same, leaked in zip(repeats, leaks, strict=True)
        ]


def _media_digest(sample: Sample) -> bytes:
    digest = hashlib.sha256()
    for message in sample.messages:
        for part in message.content:
            if isinstance(part, TextPart):
                continue
            medium = part.image if isinstance(part, ImagePart) else part.video
            if isinstance(part, VideoPart):
                digest.update(hashlib.sha256(repr(replace(part, video="")).encode()).digest())  # its segment, its rate
                if isinstance(medium, str) and is_folder(medium, sample.media_root):
                    medium = list_frames(medium, sample.media_root)
            for one in medium if isinstance(medium, tuple) else (medium,):
                # Each digest has a fixed length, so that no two lists of media concatenate to the same bytes.
                digest.update(hashlib.sha256(_content(one, sample.media_root)).digest())
    return digest.digest()


def _content(source: ImageInput, media_root: str | None) -> bytes:
    """Return the content of a medium: the bytes of its file, or the pixels of an image in memory."""
    if isinstance(source, Image.Image):
        return source.tobytes()
    found = path_or_bytes(source, media_root)
    return found if isinstance(found, bytes) else Path(found).read_bytes()
