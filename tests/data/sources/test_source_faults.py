"""Damaged and changing files: the message of every fault."""

import gzip
import json
import os
import pickle
import tarfile
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qwen3vl_train.config.data_fields import TrainSource
from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.data.sources import JsonlSource, open_sources, open_stream
from qwen3vl_train.data.sources.files import unpack
from tests.helpers import faults
from tests.helpers.messages import message_of
from tests.helpers.row_files import KINDS, ROW, talks, texts, write_all, write_tar

LINES = "\n".join(ROW % f"{n} {n * n}" for n in range(500)).encode()


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package's cache for this test alone: which files it holds is asserted."""
    monkeypatch.setenv("QWEN3VL_TRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def faults_of(path: Path) -> set[str]:
    """Return the messages of opening the file as a source and of reading it as a stream."""
    entry = TrainSource(path=str(path))
    calls = (lambda: open_sources(entry), lambda: list(open_stream(entry).rows()))
    return {message_of(ValueError, call).replace(str(path), path.name) for call in calls}


def test_truncated_gz_and_zst(tmp_path, own_cache):
    packed = gzip.compress(LINES)
    (tmp_path / "a.jsonl.gz").write_bytes(packed[:200] + b"\xff" * 50 + packed[250:])
    (fault,) = {message.split(" row ")[0] for message in faults_of(tmp_path / "a.jsonl.gz")}
    assert fault == "a.jsonl.gz: is truncated or damaged after"
    assert all(message.endswith("; copy the file again") for message in faults_of(tmp_path / "a.jsonl.gz"))
    packed = pa.compress(LINES, codec="zstd", asbytes=True)
    (tmp_path / "a.jsonl.zst").write_bytes(packed[: len(packed) // 2])
    assert all(" is truncated or damaged after row " in fault for fault in faults_of(tmp_path / "a.jsonl.zst"))
    (tmp_path / "b.jsonl.gz").write_bytes(b"not gzip")
    assert faults_of(tmp_path / "b.jsonl.gz") == {
        "b.jsonl.gz: is truncated or damaged after row 0 (Not a gzipped file (b'no')); copy the file again"
    }
    assert {file.suffix for file in own_cache.glob("unpacked/*")} <= {".lock"}


def test_a_file_is_unpacked_twice_at_once_without_locks(tmp_path, own_cache):
    """On a shared cache whose file system has no locks, also by processes of one number."""
    faults.refuse_file_locks()
    (file := tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    others = iter([lambda: unpack(str(file))])
    faults.before_unpacking(lambda _: next(others, lambda: None)())
    assert unpack(str(file)).read_bytes() == LINES
    assert {path.suffix for path in own_cache.glob("unpacked/*")} == {".lock", ".jsonl"}


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz"])
def test_truncated_gz_keeps_the_rows_before_the_cut(tmp_path, name):
    rows = ["question,answer"] * name.startswith("a.csv") + [
        f"{n},{n * n}" if "csv" in name else ROW % f"{n} {n * n}" for n in range(500)
    ]
    packed = gzip.compress("\n".join(rows).encode())
    (tmp_path / name).write_bytes(packed[: len(packed) // 2])
    entry = TrainSource(path=str(tmp_path / name))
    (source,) = open_sources(entry)
    streamed = list(open_stream(entry).rows())
    assert 50 < len(source) == len(streamed) < 500
    last = len(source) - 1
    assert [source.sample(row) for row in range(last)] == [row.sample for row in streamed[:-1]]
    end = "; copy the file again"
    for fault in (message_of(RowFault, source.sample, last), str(streamed[-1].sample)):
        assert fault.startswith(f"{name} is truncated in row "), fault
        assert fault.endswith(end)
    assert list(open_stream(entry).rows(streamed[-1].state)) == [], "a run that resumes after the cut reads no more"
    assert [row.sample for row in open_stream(entry).rows(streamed[-3].state)][:1] == [streamed[-2].sample]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.tar.gz", "a.jsonl.zst"])
def test_bombs_are_not_unpacked(tmp_path, name):
    faults.set_row_limits(unpacked=1 << 20)
    content = bytes(8 << 20)
    packed = gzip.compress(content) if name.endswith("gz") else pa.compress(content, codec="zstd", asbytes=True)
    (tmp_path / name).write_bytes(packed)
    assert faults_of(tmp_path / name) == {
        f"{name}: unpacks to more than 1 GiB and 200 times its size, as no file of rows does; unpack it yourself if "
        "you trust it"
    }


def test_truncated_tar(tmp_path):
    members = [(f"{n}.json", (ROW % n).encode().ljust(2000)) for n in range(5)]
    whole = write_tar(tmp_path / "a.tar", members).read_bytes()
    for end, row, why in (
        (3 * 2560 + 100, 2, "no end-of-archive block"),  # in a header
        (3 * 2560 + 1000, 3, "unexpected end of data"),  # in a file
        (3 * 2560, 3, "no end-of-archive block"),  # between two files
    ):
        (tmp_path / "a.tar").write_bytes(whole[:end])
        (fault,) = faults_of(tmp_path / "a.tar")
        assert fault.startswith("a.tar: is truncated or damaged after row "), fault
        assert fault.endswith(f"({why}); copy the file again"), (row, fault)
    (tmp_path / "a.tar").write_bytes(whole[:3000] + b"\xff" * 500 + whole[3500:])
    assert faults_of(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(b"")
    fault = "a.tar: is truncated or damaged after row 0 (empty file); copy the file again"
    assert faults_of(tmp_path / "a.tar") == {fault}


def test_tar_with_links_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("1.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    assert faults_of(tmp_path / "a.tar") == {"a.tar: '1.jpg' is a link, a device or sparse; pack only plain files"}


def test_truncated_parquet(tmp_path):
    table = pa.Table.from_pylist([{"question": "?", "answer": f"{n} {n * n}"} for n in range(300)])
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    (fault,) = faults_of(tmp_path / "a.parquet")
    assert fault.startswith("a.parquet: is not a complete Parquet file (Parquet magic bytes not found in footer")
    group = pq.ParquetFile(pa.BufferReader(whole)).metadata.row_group(1).column(0)
    start = group.dictionary_page_offset or group.data_page_offset
    (tmp_path / "b.parquet").write_bytes(whole[:start] + b"\xff" * 200 + whole[start + 200 :])
    (fault,) = faults_of(tmp_path / "b.parquet")
    assert fault.startswith("b.parquet: is truncated or damaged after row 100 (row group 2: ")


def test_damaged_arrays(tmp_path):
    file = tmp_path / "a.json"
    whole = json.dumps(talks(3))
    for text, why in (
        (whole[:-1], "row 4 of the array: the file ends after it"),
        (whole[:-20], "row 3 of the array: not JSON, or the file is truncated in it ("),
        (whole.replace(', "conv', ' "conv', 1), "row 1 of the array: not JSON (Expecting ',' delimiter)"),
        (whole + " x", "row 4 of the array: there is more after the closing bracket"),
        ("[{} {}]", "row 2 of the array: no comma after it"),
        ("[" * 5000, "row 1 of the array: nested too deeply"),
    ):
        file.write_text(text)
        (message,) = faults_of(file)
        assert message.startswith(f"a.json: {why}"), message
        assert message.endswith("; fix the file, or write one object a line")
    file.write_bytes(b'[{"a": "\xff"}]')
    with pytest.raises(ValueError, match=r"row 1 of the array: not UTF-8; fix the file"):
        JsonlSource(file)


def test_change_of_an_indexed_file_is_noticed(tmp_path):
    for name, content in (("a.jsonl", (ROW % "a").encode()), ("a.json", json.dumps(talks(2)).encode())):
        (tmp_path / name).write_bytes(content)
        (source,) = open_sources(TrainSource(path=str(tmp_path / name)))
        source.sample(0)
        os.utime(tmp_path / name, ns=(1, 1))
        assert message_of(RowFault, source.sample, 0) == (
            f"{tmp_path}/{name} changed since it was indexed (its time differs); put it back and resume, or start a "
            "new run"
        )
    write_tar(tmp_path / "a.tar", [("1.json", (ROW % "a").encode())])
    (source,) = open_sources(TrainSource(path=str(tmp_path / "a.tar")))
    write_tar(tmp_path / "a.tar", [(f"{n}.json", (ROW % "a").encode()) for n in range(20)])
    with pytest.raises(RowFault, match=r"changed since it was indexed \(10240 bytes then, 30720 now\); put it back"):
        source.sample(0)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(RowFault, match=r"bytes then, No such file or directory now"):
        source.sample(0)


@pytest.mark.parametrize("kind", ["b.jsonl.gz", "b.jsonl.zst", "c.json.gz", "a.parquet", "b.tar.gz"])
def test_change_of_an_unpacked_file_is_noticed(tmp_path, kind):
    file = write_all(tmp_path)[kind]
    (source,) = open_sources(TrainSource(path=str(file)))
    source = pickle.loads(pickle.dumps(source))
    assert texts(source.sample(1)) == ["Nr 1?", "ü."]
    os.utime(file, ns=(1, 1))
    fault = f"{file} changed since it was indexed (its time differs); put it back and resume, or start a new run"
    with pytest.raises(RowFault) as caught:
        source.sample(1)
    assert str(caught.value) == fault
    assert caught.value.transient
    file.unlink()
    with pytest.raises(RowFault, match=r"bytes then, No such file or directory now"):
        source.sample(1)


def test_change_of_a_file_while_it_is_unpacked(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((ROW % "a").encode()))
    faults.before_unpacking(lambda path: os.utime(path, ns=(1, 1)))
    fault = f"{tmp_path}/a.jsonl.gz: changed while it was unpacked; start again once it is complete"
    assert message_of(ValueError, JsonlSource, tmp_path / "a.jsonl.gz") == fault


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "saved"])
@pytest.mark.parametrize("recorded", ["by the fingerprint", "by opening"])
def test_change_of_a_streamed_file_is_noticed(tmp_path, kind, recorded):
    file = write_all(tmp_path)[kind]
    stream = open_stream(TrainSource(path=str(file)))
    if recorded == "by the fingerprint":
        assert stream.fingerprint()["times"] == [file.stat().st_mtime_ns]
    stream = pickle.loads(pickle.dumps(stream))
    rows = stream.rows()
    assert [next(rows).row_number for _ in range(3)] == [1, 2, 3]
    os.utime(file, ns=(1, 1))
    fault = f"{file} changed since it was opened (its time differs); put it back and resume, or start a new run"
    for read in (lambda: next(rows), lambda: next(stream.rows())):
        assert message_of(ValueError, read) == fault


def test_truncation_of_a_streamed_file_is_noticed(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    stream = open_stream(TrainSource(path=str(tmp_path / "a.jsonl")))
    stream.fingerprint()
    assert list(stream.rows()) == []
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"a.jsonl changed since it was opened \(0 bytes then, 1 now\); put it back"):
        list(stream.rows())


def test_stream_fingerprint_changes_with_file_times(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(ROW % "x")
        os.utime(tmp_path / f"{name}.jsonl", ns=(5, 5))
    entry = TrainSource(path=str(tmp_path))
    first = open_stream(entry).fingerprint()
    assert open_stream(entry).fingerprint() == json.loads(json.dumps(first)) == first
    (tmp_path / "b.jsonl").write_text(ROW % "y")
    os.utime(tmp_path / "b.jsonl", ns=(6, 6))
    assert open_stream(entry).fingerprint() == {**first, "times": [5, 6]}


@pytest.mark.parametrize(
    ("junk", "fault"),
    [
        (b"\0", "ends before row 2; copy the shard again"),
        (b"\xff", "is truncated or damaged after row 1 (no end-of-archive block); copy the file again"),
    ],
)
def test_shard_damaged_without_a_new_signature(tmp_path, junk, fault):
    """Its size and time are unchanged. Ending the iterator would end the run early, without a message."""
    file = write_tar(tmp_path / "a.tar", [(f"{n}.json", (ROW % n).encode().ljust(500)) for n in range(3)])
    (source,) = open_sources(TrainSource(path=str(file)))
    time_ns, whole = file.stat().st_mtime_ns, file.read_bytes()
    file.write_bytes(whole[:1024] + junk * 1024 + whole[2048:])
    os.utime(file, ns=(time_ns, time_ns))
    assert [source.sample(row).messages[0].text for row in (0, 2)] == ["0", "2"]
    assert message_of(RowFault, source.sample, 1) == f"{file}: {fault}"


@pytest.mark.parametrize("damage", ["cut", "removed"])
def test_damaged_unpacked_table(tmp_path, damage):
    pq.write_table(pa.Table.from_pylist([{"question": "?", "answer": "x"}] * 3), tmp_path / "a.parquet")
    (source,) = open_sources(TrainSource(path=str(tmp_path / "a.parquet")))
    source = pickle.loads(pickle.dumps(source))  # as a worker process has it, which opens the copy itself
    copy = source._copy
    whole = copy.read_bytes()
    copy.write_bytes(whole[: len(whole) // 2]) if damage == "cut" else copy.unlink()
    fault = message_of(RowFault, source.sample, 1)
    assert fault.startswith(f"{tmp_path}/a.parquet: its copy {copy} cannot be read (")
    assert fault.endswith("); remove it and start again")


def test_unpacked_copy_is_not_reused_after_a_change(tmp_path):
    for text in ("first", "second"):
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((ROW % text).encode()))
        (source,) = open_sources(TrainSource(path=str(tmp_path / "a.jsonl.gz")))
        assert source.sample(0).messages[0].text == text


def test_too_long_row_is_not_held_in_memory(tmp_path):
    faults.set_row_limits(row=1 << 20, block=1 << 16)
    (tmp_path / "a.jsonl").write_text(ROW % "a" + "\n" + ROW % ("x" * (20 << 20)) + "\n" + ROW % "b")
    tracemalloc.start()
    source = JsonlSource(tmp_path / "a.jsonl")
    _, streamed, _ = open_stream(TrainSource(path=str(tmp_path / "a.jsonl"))).rows()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 << 20  # what is held, its join, a block; never the row
    assert [source.sample(row).messages[0].text for row in (0, 2)] == ["a", "b"]
    assert isinstance(streamed.sample, RowFault)
    fault = "row of 20 MiB is longer than 1 MiB; split it"
    assert str(streamed.sample) == message_of(RowFault, source.sample, 1) == fault


def test_messages_about_paths(tmp_path):
    for path in (f"{tmp_path}/none{ending}" for ending in (".jsonl", ".parquet", ".tar", ".jsonl.gz")):
        fault = f"{path}: no such file; check the paths under data"
        assert message_of(ValueError, open_sources, TrainSource(path=path)) == fault
    assert message_of(ValueError, JsonlSource, tmp_path) == f"{tmp_path}: not a file; check the paths under data"
    (tmp_path / "a.jsonl").write_text("")
    assert message_of(ValueError, JsonlSource, tmp_path / "a.jsonl", tmp_path / "pictures") == (
        f"{tmp_path}/a.jsonl: media_root {tmp_path}/pictures is not a folder; check the paths under data"
    )
    with pytest.raises(ValueError, match=r"^nosuch://a/b.jsonl: .*[Pp]rotocol not known"):
        open_sources(TrainSource(path="nosuch://a/b.jsonl"))


def test_invalid_utf8_is_a_fault_of_its_row(tmp_path):
    (tmp_path / "a.jsonl").write_bytes((ROW % "a").encode() + b'\n{"\xff": 1}\n')
    source = JsonlSource(tmp_path / "a.jsonl")
    assert message_of(RowFault, source.sample, 1) == "not UTF-8 (byte 2 of the line); save the file as UTF-8"
