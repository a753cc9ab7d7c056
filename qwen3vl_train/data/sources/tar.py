"""WebDataset's tar shards: consecutive files with one key are a row. Nothing is extracted to disk.

`0001.jpg`, `0001.json`: the JSON object (or list of messages) is the row, and its media are files of the same key: by
name (`0001.jpg`), also with the folder that it once had, by extension (`jpg`), or, where the row names none, all of
them in order: `0001.2.png` before `0001.10.png`. Without a JSON file the row consists of the other files by their
extensions: {"jpg": ..., "txt": "A cat"}, for `columns: {image: jpg, answer: txt}`. Hidden files are skipped.
"""

import hashlib
import re
import tarfile
from array import array
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import numpy as np

from qwen3vl_train.data.errors import LAST_RESORT, MediaFault, RowFault
from qwen3vl_train.data.media.remote import MAX_BYTES
from qwen3vl_train.data.rows.formats import names_media
from qwen3vl_train.data.rows.parse import MAX_ROW_BYTES, ResolveMedium, decode_row
from qwen3vl_train.data.sources.base import FileSource, Position, RawRow, is_turn
from qwen3vl_train.data.sources.files import damaged, is_compressed, naming_file, open_file, read_range, unpack

_IMAGES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "jp2", "avif", "heic", "heif"}
_VIDEOS = {"mp4", "mov", "mkv", "webm", "avi", "mpg", "mpeg", "m4v"}
_TEXTS = {"txt", "text", "caption", "cls"}
_HIDDEN = re.compile(r"(^|/)(__MACOSX|PaxHeaders?(\.\d+)?)/|(^|/)\.(?!\.?/)[^/]*$")
"""`._0001.jpg` holds what macOS knows of 0001.jpg; `.DS_Store` and `PaxHeader/0001.jpg` are no data either."""
_NUMBERS = re.compile(r"\d+")
_MAX_MEMBERS = 10_000
"""Of one row: more than the media that a row may have, and few enough to be listed in memory."""


class _Member(NamedTuple):
    """One file of an archive. extension: after the first dot of its name. start: of its content."""

    name: str
    extension: str
    start: int
    size: int


class _Group(NamedTuple):
    """The members of one row, and the offsets where this row and the next begin."""

    key: str
    members: list[_Member]
    start: int
    end: int


class TarSource(FileSource):
    """One shard, plain or compressed. Its index is the offset of each row; headers are read again with the row."""

    def _open(self) -> dict[str, Any]:
        self.uncompressed = self._uncompressed_path()
        starts, digest = array("q"), hashlib.sha256()
        with open_file(self.uncompressed) as file, naming_file(self.name):
            size = self._record_signature(self.uncompressed)
            for group in _groups(file, self.name, 0):
                starts.append(group.start)
                for member in group.members:
                    digest.update(f"{member.name}\0{member.size}\0".encode(errors="backslashreplace"))
        self._starts = np.asarray(starts)
        return {"size": size, "members": digest.hexdigest()}

    def __len__(self) -> int:
        return len(self._starts)

    def raw(self, row: int) -> RawRow:
        self._check_unchanged()
        try:
            with open_file(self.uncompressed) as file:
                file.seek(int(self._starts[row]))
                group = next(_groups(file, self.name, row), None)
        except ValueError as error:
            raise RowFault(str(error), kind="read_error", transient=True) from None
        if group is None:
            fault = f"{self.name}: ends before row {row + 1}; copy the shard again"
            raise RowFault(fault, kind="read_error", transient=True)
        return _make_row(group, self.uncompressed, row + 1)


def stream_tar(path: str, position: Position) -> Iterator[RawRow]:
    """Yield the rows of a shard from a position on. Raise ValueError where it is damaged."""
    uncompressed = str(unpack(path)) if is_compressed(path) else path
    with open_file(uncompressed) as file:
        file.seek(position["byte"])
        for number, group in enumerate(_groups(file, path, position["row"]), start=position["row"] + 1):
            try:
                with LAST_RESORT:
                    row = _make_row(group, uncompressed, number)
            except RowFault as fault:
                row = RawRow(fault, number, {"byte": group.end, "row": number})
            yield row


def _groups(file: IO[bytes], path: str, rows: int) -> Iterator[_Group]:
    """Yield the rows from the file's position on, after `rows` others. Raise ValueError where it is damaged."""
    done, members, key, start = rows, [], None, 0
    try:
        with naming_file(path), tarfile.open(fileobj=file, mode="r:") as tar:
            last = -1
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else it keeps every header it has seen
                if info.offset <= last or info.size < 0:
                    raise tarfile.ReadError("a header points backwards")
                last = info.offset
                if info.isdir() or _HIDDEN.search(info.name):
                    continue
                if not info.isreg() or info.issparse():
                    fault = "is a link, a device or sparse; pack only plain files"
                    raise ValueError(f"{path}: {info.name[:200]!r} {fault}")
                folder, _, base = info.name.rpartition("/")
                stem, _, extension = base.partition(".")  # `a/0001.seg.png`: key `a/0001`, extension `seg.png`
                if (next_key := f"{folder}/{stem}") != key:
                    if key is not None:
                        yield _Group(key, members, start, info.offset)
                        done += 1
                    key, members, start = next_key, [], info.offset
                if len(members) <= _MAX_MEMBERS:
                    members.append(_Member(info.name, extension.lower(), info.offset_data, info.size))
            if key is not None:
                yield _Group(key, members, start, tar.offset)
                done += 1
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # it takes an unreadable header for the end
                raise tarfile.ReadError("no end-of-archive block")
    except (tarfile.TarError, EOFError, OverflowError) as error:
        raise damaged(path, done, error) from None


def _make_row(group: _Group, path: str, number: int) -> RawRow:
    if len(group.members) > _MAX_MEMBERS:
        fault = f"more than {_MAX_MEMBERS:,} files of the key {group.key[:100]!r}; split the row"
        raise RowFault(fault, kind="too_long")
    found: dict[str, Any] = {}
    row: Any = None
    for member in group.members:
        if member.extension == "json":
            row = decode_row(_content(member, path, MAX_ROW_BYTES))
        elif member.extension in _TEXTS:
            try:
                found[member.extension] = _content(member, path, MAX_ROW_BYTES).decode()
            except UnicodeDecodeError as error:
                fault = f"{member.name[:200]}: not UTF-8 (byte {error.start}); save it as UTF-8"
                raise RowFault(fault, kind="invalid_json") from None
        else:
            found[member.extension] = member.name
    media = {
        column: [member.name for member in _in_order(group.members, extensions)]
        for column, extensions in (("images", _IMAGES), ("videos", _VIDEOS))
    }
    if isinstance(row, list) and row and all(map(is_turn, row)):
        row = {"messages": row}
    if isinstance(row, dict):
        row = {**found, **({} if names_media(row) else media), **row}
    elif row is None:
        row = {**found, **media}
    return RawRow(row, number, {"byte": group.end, "row": number}, _resolver(group, path))


def _in_order(members: list[_Member], extensions: set[str]) -> list[_Member]:
    """Return the members that are media of one kind, by number where their names differ in numbers alone."""
    found = [member for member in members if member.extension.rpartition(".")[2] in extensions]
    stems = [member.extension.rpartition(".")[0] for member in found]
    if len({_NUMBERS.sub("#", stem) for stem in stems}) > 1:
        return found
    numbers = [tuple(map(int, _NUMBERS.findall(stem))) for stem in stems]
    return [found[index] for index in sorted(range(len(found)), key=numbers.__getitem__)]


def _resolver(group: _Group, path: str) -> ResolveMedium:
    """Return a function: name of a medium in the row -> its content, of the files of the row's key."""
    asked: dict[str, str] = {}  # base name -> the name that the row has for it

    def resolve(name: str) -> bytes:
        base = name.replace("\\", "/").rpartition("/")[2]
        members = [member for member in group.members if name in (member.name, member.extension)]
        if not members:
            members = [member for member in group.members if base == member.name.rpartition("/")[2]]
            if len({member.name for member in members}) != 1 or asked.setdefault(base, name) != name:
                listed = ", ".join(member.name for member in group.members[:6])
                fault = f"{name[:200]}: not among the files of its row in the shard ({listed}); name one of them"
                raise MediaFault(fault, kind="missing_file")
        return _content(members[0], path, MAX_BYTES)

    return resolve


def _content(member: _Member, path: str, limit: int) -> bytes:
    name = member.name[:200]
    if member.size > limit:
        fault = f"{name}: {member.size >> 20} MiB are more than {limit >> 20} MiB; make it smaller"
        raise MediaFault(fault, kind="too_long")
    try:
        content = read_range(path, member.start, member.size)
    except OSError as error:
        fault = f"{name}: cannot be read ({error}); check the disk or the address"
        raise MediaFault(fault, kind="read_error", transient=True) from None
    if len(content) != member.size:
        raise MediaFault(f"{name}: the shard ends in it; copy the shard again", kind="read_error")
    return content
