"""WebDataset's tar shards: neighbouring files of one key are a row. Nothing is ever unpacked, names are only compared.

`0001.jpg`, `0001.json`: the JSON object is the row, and its media are files of the same key, by name (`0001.jpg`), by
ending (`jpg`), or, where the row names none, all of them in their order. Without a JSON file the row is made of the
other files by their endings: {"jpg": ..., "txt": "A cat"}, for `columns: {image: jpg, answer: txt}`.
"""

import hashlib
import os
import tarfile
from array import array
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import numpy as np

from qwen3vl_train.data.errors import MediaFault, RowFault
from qwen3vl_train.data.media.remote import MAX_BYTES
from qwen3vl_train.data.rows.formats import holds_media
from qwen3vl_train.data.rows.parse import MAX_ROW_BYTES, RowRules, decode_row
from qwen3vl_train.data.sources.base import FileSource, Place, RawRow
from qwen3vl_train.data.sources.files import damaged, explained, is_compressed, open_file, read_span, unpacked

_IMAGES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "jp2", "avif"}
_VIDEOS = {"mp4", "mov", "mkv", "webm", "avi", "mpg", "mpeg", "m4v"}
_TEXTS = {"txt", "text", "caption", "cls"}
_MAX_MEMBERS = 10_000
"""Of one row: more than the media that a row may have, and few enough to be listed in memory."""


class _Member(NamedTuple):
    """One file of an archive. ending: behind the first dot of its name. start: of its content."""

    name: str
    ending: str
    start: int
    size: int


class _Group(NamedTuple):
    """The members of one row, and where they begin and the next row's do."""

    key: str
    members: list[_Member]
    start: int
    end: int


class TarSource(FileSource):
    """One shard, plain or compressed. Its index is where each row begins; headers are read again with the row."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        media_root: str | os.PathLike[str] | None = None,
        rules: RowRules | None = None,
    ) -> None:
        """Read all headers once. Raises ValueError for a damaged archive, and for links and devices in one.

        media_root is not looked into: the media of a shard are in it.
        """
        super().__init__(path, None, rules)
        self.plain = self._plain()
        starts, digest = array("q"), hashlib.sha256()
        with open_file(self.plain) as file, explained(self.name):
            size = self._note_stamp(self.plain)
            for group in _groups(file, self.name, 0):
                starts.append(group.start)
                for member in group.members:
                    digest.update(f"{member.name}\0{member.size}\0".encode(errors="backslashreplace"))
        self._starts = np.asarray(starts)
        self._fingerprint = {"size": size, "members": digest.hexdigest()}

    def __len__(self) -> int:
        return len(self._starts)

    def raw(self, row: int) -> RawRow:
        """Return row 0..len-1 unchecked. Raises RowFault."""
        self._check_unchanged()
        try:
            with open_file(self.plain) as file:
                file.seek(int(self._starts[row]))
                group = next(_groups(file, self.name, row), None)
        except ValueError as error:
            raise RowFault(str(error), kind="read_error", transient=True) from None
        if group is None:
            raise RowFault(
                f"{self.name}: ends before row {row + 1}; copy the shard again", kind="read_error", transient=True
            )
        return _row_of(group, self.plain, row + 1)

    def row_number(self, row: int) -> int:
        return row + 1

    def fingerprint(self) -> dict[str, Any]:
        """Return the size of the shard and a hash of the names and sizes of its files."""
        return dict(self._fingerprint)


def stream_tar(path: str, place: Place | None) -> Iterator[RawRow]:
    """Yield the rows of a shard from a place on. Raises ValueError where it is damaged."""
    plain = str(unpacked(path)) if is_compressed(path) else path
    done = place["row"] if place else 0
    with open_file(plain) as file:
        file.seek(place["byte"] if place else 0)
        for number, group in enumerate(_groups(file, path, done), start=done + 1):
            try:
                yield _row_of(group, plain, number)
            except RowFault as fault:
                yield RawRow(fault, number, {"byte": group.end, "row": number})


def _groups(file: IO[bytes], path: str, rows: int) -> Iterator[_Group]:
    """Yield the rows from where the file stands; `rows` were before. Raises ValueError where it is damaged."""
    done, members, key, start = rows, [], None, 0
    try:
        with explained(path), tarfile.open(fileobj=file, mode="r:") as tar:
            last = -1
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else it keeps every header it has seen
                if info.offset <= last or info.size < 0:
                    raise tarfile.ReadError("a header points backwards")
                last = info.offset
                if info.isdir():
                    continue
                if not info.isreg() or info.issparse():
                    raise ValueError(
                        f"{path}: {info.name[:200]!r} is a link, a device or sparse; pack plain files alone"
                    )
                its_key, ending = _split_name(info.name)
                if its_key != key:
                    if key is not None:
                        yield _Group(key, members, start, info.offset)
                        done += 1
                    key, members, start = its_key, [], info.offset
                if len(members) <= _MAX_MEMBERS:
                    members.append(_Member(info.name, ending, info.offset_data, info.size))
            if key is not None:
                yield _Group(key, members, start, tar.offset)
                done += 1
            _check_end(file, tar.offset)
    except (tarfile.TarError, EOFError, OverflowError) as error:
        raise ValueError(damaged(path, done, error)) from None


def _check_end(file: IO[bytes], place: int) -> None:
    """Refuse an archive that just stops: tarfile takes a header it cannot read for the end."""
    file.seek(place)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("no end mark")


def _split_name(name: str) -> tuple[str, str]:
    """Return key and ending: `a/0001.seg.png` -> `a/0001`, `seg.png`."""
    folder, _, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return f"{folder}/{stem}", ending.lower()


def _row_of(group: _Group, plain: str, number: int) -> RawRow:
    """Make a row of the files of one key. Raises RowFault."""
    if len(group.members) > _MAX_MEMBERS:
        raise RowFault(
            f"more than {_MAX_MEMBERS:,} files of the key {group.key[:100]!r}; split the row", kind="too_long"
        )
    found: dict[str, Any] = {}
    row: Any = None
    for member in group.members:
        if member.ending == "json":
            row = decode_row(_content(member, plain, MAX_ROW_BYTES))
        elif member.ending in _TEXTS:
            found[member.ending] = _text(_content(member, plain, MAX_ROW_BYTES), member.name)
        else:
            found[member.ending] = member.name
    images = [member.name for member in group.members if member.ending.rpartition(".")[2] in _IMAGES]
    videos = [member.name for member in group.members if member.ending.rpartition(".")[2] in _VIDEOS]
    if isinstance(row, dict):
        row = {**found, **({} if holds_media(row) else {"images": images, "videos": videos}), **row}
    elif row is None:
        row = {**found, "images": images, "videos": videos}

    def find(name: str) -> bytes:
        for member in group.members:
            if name in (member.name, member.name.rpartition("/")[2], member.ending):
                return _content(member, plain, MAX_BYTES)
        listed = ", ".join(member.name for member in group.members[:6])
        raise MediaFault(
            f"{name[:200]}: not among the files of its row in the shard ({listed}); name one of them",
            kind="missing_file",
        )

    return RawRow(row, number, {"byte": group.end, "row": number}, find)


def _content(member: _Member, plain: str, limit: int) -> bytes:
    if member.size > limit:
        raise MediaFault(
            f"{member.name[:200]}: {member.size >> 20} MiB are more than {limit >> 20} MiB; make it smaller",
            kind="too_long",
        )
    try:
        content = read_span(plain, member.start, member.size)
    except OSError as error:
        raise MediaFault(
            f"{member.name[:200]}: cannot be read ({error}); check the disk or the address",
            kind="read_error",
            transient=True,
        ) from None
    if len(content) != member.size:
        raise MediaFault(f"{member.name[:200]}: the shard ends in it; copy the shard again", kind="read_error")
    return content


def _text(content: bytes, name: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise RowFault(f"{name[:200]}: not UTF-8 (byte {error.start}); save it as UTF-8", kind="invalid_json") from None
