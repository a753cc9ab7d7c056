"""Damaged files, files that change, media that may not be reached: each has its stated answer."""

import gzip
import http.server
import json
import os
import pickle
import socket
import threading
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qwen3vl_train.config.fields import TrainSource
from qwen3vl_train.data.errors import MediaFault, RowFault
from qwen3vl_train.data.media import remote as download
from qwen3vl_train.data.media.image import image_size, load_rgb
from qwen3vl_train.data.rows import parse as rows
from qwen3vl_train.data.sources import JsonlSource, open_sources, open_stream
from tests.helpers import faults
from tests.helpers.row_files import KINDS, ROW, png, talks, texts, write_all, write_tar

LINES = "\n".join(ROW % f"{n} {n * n}" for n in range(500)).encode()


def faults_of(path: Path) -> set[str]:
    """The messages that opening the file by number and reading it as a stream stop with."""
    found = set()
    with pytest.raises(ValueError) as caught:
        open_sources(TrainSource(path=str(path)))
    found.add(str(caught.value))
    with pytest.raises(ValueError) as caught:
        list(open_stream(TrainSource(path=str(path))).rows())
    found.add(str(caught.value))
    return {message.replace(str(path), path.name) for message in found}


def test_truncated_gz_and_zst(tmp_path):
    packed = gzip.compress(LINES)
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
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
    assert not list(Path(os.environ["QWEN3VL_TRAIN_CACHE"]).glob("unpacked/*.jsonl.[0-9]*"))


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
    assert faults_of(tmp_path / "a.tar") == {
        "a.tar: is truncated or damaged after row 0 (empty file); copy the file again"
    }


def test_a_tar_with_links_is_refused(tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("1.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    assert faults_of(tmp_path / "a.tar") == {"a.tar: '1.jpg' is a link, a device or sparse; pack only plain files"}


def test_truncated_parquet(tmp_path):
    rows_of_file = [{"question": "?", "answer": f"{n} {n * n}"} for n in range(300)]
    pq.write_table(pa.Table.from_pylist(rows_of_file), tmp_path / "a.parquet", row_group_size=100)
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    (fault,) = faults_of(tmp_path / "a.parquet")
    assert fault.startswith("a.parquet: is not a complete Parquet file (Parquet magic bytes not found in footer")
    group = pq.ParquetFile(pa.BufferReader(whole)).metadata.row_group(1).column(0)
    start = group.dictionary_page_offset or group.data_page_offset
    (tmp_path / "b.parquet").write_bytes(whole[:start] + b"\xff" * 200 + whole[start + 200 :])
    (fault,) = faults_of(tmp_path / "b.parquet")
    assert fault.startswith("b.parquet: is truncated or damaged after row 100 (")


def test_damaged_arrays(tmp_path):
    file = tmp_path / "a.json"
    whole = json.dumps(talks(3))
    for text, why in (
        (whole[:-1], "row 4 of the array: the file ends after it"),
        (
            whole[:-20],
            "row 3 of the array: not JSON, or the file is truncated in it (",
        ),
        (whole.replace(', "conv', ' "conv', 1), "row 1 of the array: not JSON (Expecting ',' delimiter)"),
        (whole + " x", "row 4 of the array: there is more after the closing bracket"),
        ("[{} {}]", "row 2 of the array: no comma after it"),
        ("[" * 5000, "row 1 of the array: nested too deeply"),
    ):
        file.write_text(text)
        messages = set()
        for read in (lambda: JsonlSource(file), lambda: list(open_stream(TrainSource(path=str(file))).rows())):
            with pytest.raises(ValueError) as caught:
                read()
            messages.add(str(caught.value))
        (message,) = messages
        assert message.startswith(f"{file}: {why}"), message
        assert message.endswith("; fix the file, or write one object a line")
    file.write_bytes(b'[{"a": "\xff"}]')
    with pytest.raises(ValueError, match=r"row 1 of the array: not UTF-8; fix the file"):
        JsonlSource(file)


def test_a_file_that_changes_while_it_is_trained_on(tmp_path):
    for name, content in (("a.jsonl", (ROW % "a").encode()), ("a.json", json.dumps(talks(2)).encode())):
        (tmp_path / name).write_bytes(content)
        (source,) = open_sources(TrainSource(path=str(tmp_path / name)))
        source.sample(0)
        os.utime(tmp_path / name, ns=(1, 1))
        with pytest.raises(RowFault) as caught:
            source.sample(0)
        assert str(caught.value) == (
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
def test_a_file_that_was_unpacked_is_watched_too(tmp_path, kind):
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


def test_a_file_that_changes_while_it_is_unpacked(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((ROW % "a").encode()))
    faults.before_unpacking(lambda path: os.utime(path, ns=(1, 1)))
    with pytest.raises(ValueError) as caught:
        JsonlSource(tmp_path / "a.jsonl.gz")
    assert str(caught.value) == f"{tmp_path}/a.jsonl.gz: changed while it was unpacked; start again once it is complete"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "saved"])
@pytest.mark.parametrize("told", ["by the fingerprint", "by opening"])
def test_a_stream_notices_a_file_that_changes_while_it_is_read(tmp_path, kind, told):
    file = write_all(tmp_path)[kind]
    stream = open_stream(TrainSource(path=str(file)))
    if told == "by the fingerprint":
        assert stream.fingerprint()["times"] == [file.stat().st_mtime_ns]
    stream = pickle.loads(pickle.dumps(stream))
    rows = stream.rows()
    assert [next(rows).row_number for _ in range(3)] == [1, 2, 3]
    os.utime(file, ns=(1, 1))
    fault = f"{file} changed since it was opened (its time differs); put it back and resume, or start a new run"
    for read in (lambda: next(rows), lambda: next(stream.rows())):
        with pytest.raises(ValueError) as caught:
            read()
        assert str(caught.value) == fault


def test_a_stream_notices_a_file_that_is_cut_at_the_end_of_a_row(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    stream = open_stream(TrainSource(path=str(tmp_path / "a.jsonl")))
    stream.fingerprint()
    assert list(stream.rows()) == []
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"a.jsonl changed since it was opened \(0 bytes then, 1 now\); put it back"):
        list(stream.rows())


def test_a_fingerprint_of_a_stream_follows_the_times_of_its_files(tmp_path):
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
def test_a_shard_that_is_damaged_behind_its_own_back(tmp_path, junk, fault):
    """Its size and time are as they were. An end of the iterator would end the run early, and say nothing."""
    file = write_tar(tmp_path / "a.tar", [(f"{n}.json", (ROW % n).encode().ljust(500)) for n in range(3)])
    (source,) = open_sources(TrainSource(path=str(file)))
    time_ns, whole = file.stat().st_mtime_ns, file.read_bytes()
    file.write_bytes(whole[:1024] + junk * 1024 + whole[2048:])
    os.utime(file, ns=(time_ns, time_ns))
    assert [source.sample(row).messages[0].text for row in (0, 2)] == ["0", "2"]
    with pytest.raises(RowFault) as caught:
        source.sample(1)
    assert str(caught.value) == f"{file}: {fault}"


@pytest.mark.parametrize("damage", ["cut", "removed"])
def test_an_unpacked_table_that_is_damaged(tmp_path, damage):
    pq.write_table(pa.Table.from_pylist([{"question": "?", "answer": "x"}] * 3), tmp_path / "a.parquet")
    (source,) = open_sources(TrainSource(path=str(tmp_path / "a.parquet")))
    source = pickle.loads(pickle.dumps(source))  # as a worker process has it, which opens the copy itself
    copy = source._copy
    whole = copy.read_bytes()
    copy.write_bytes(whole[: len(whole) // 2]) if damage == "cut" else copy.unlink()
    with pytest.raises(RowFault) as caught:
        source.sample(1)
    assert str(caught.value).startswith(f"{tmp_path}/a.parquet: its copy {copy} cannot be read (")
    assert str(caught.value).endswith("); remove it and start again")


def test_a_copy_unpacked_before_a_change_is_not_taken_for_the_new_file(tmp_path):
    for text in ("first", "second"):
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((ROW % text).encode()))
        (source,) = open_sources(TrainSource(path=str(tmp_path / "a.jsonl.gz")))
        assert source.sample(0).messages[0].text == text


def test_a_row_too_long_to_be_held(tmp_path):
    faults.set_row_limits(row=1 << 20, block=1 << 16)
    (tmp_path / "a.jsonl").write_text(ROW % "a" + "\n" + ROW % ("x" * (20 << 20)) + "\n" + ROW % "b")
    tracemalloc.start()
    source = JsonlSource(tmp_path / "a.jsonl")
    assert len(list(open_stream(TrainSource(path=str(tmp_path / "a.jsonl"))).rows())) == 3
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 << 20  # what is held, its join, a block; never the row
    assert [source.sample(row).messages[0].text for row in (0, 2)] == ["a", "b"]
    for read in (lambda: source.sample(1), lambda: _second(tmp_path / "a.jsonl")):
        with pytest.raises(RowFault) as caught:
            read()
        assert str(caught.value) == "row of 20 MiB is longer than 1 MiB; split it"


def _second(file: Path):
    _, row, _ = open_stream(TrainSource(path=str(file))).rows()
    raise row.sample


def test_messages_about_paths(tmp_path):
    for path, fault in (
        (tmp_path / "none.jsonl", "no such file; check the paths under data"),
        (tmp_path / "none.parquet", "no such file; check the paths under data"),
        (tmp_path / "none.tar", "no such file; check the paths under data"),
        (tmp_path / "none.jsonl.gz", "no such file; check the paths under data"),
    ):
        with pytest.raises(ValueError) as caught:
            open_sources(TrainSource(path=str(path)))
        assert str(caught.value) == f"{path}: {fault}"
    with pytest.raises(ValueError) as caught:
        JsonlSource(tmp_path)
    assert str(caught.value) == f"{tmp_path}: not a file; check the paths under data"
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(ValueError) as caught:
        JsonlSource(tmp_path / "a.jsonl", tmp_path / "pictures")
    assert str(caught.value) == (
        f"{tmp_path}/a.jsonl: media_root {tmp_path}/pictures is not a folder; check the paths under data"
    )
    with pytest.raises(ValueError, match=r"^nosuch://a/b.jsonl: .*[Pp]rotocol not known"):
        open_sources(TrainSource(path="nosuch://a/b.jsonl"))


def test_rows_that_are_not_utf8_are_faults_of_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes((ROW % "a").encode() + b'\n{"\xff": 1}\n')
    source = JsonlSource(tmp_path / "a.jsonl")
    with pytest.raises(RowFault) as caught:
        source.sample(1)
    assert str(caught.value) == "not UTF-8 (byte 2 of the line); save the file as UTF-8"


class _Pictures(http.server.BaseHTTPRequestHandler):
    asked: ClassVar[Counter] = Counter()

    def do_GET(self):
        self.asked[self.path] += 1
        if self.path.startswith("/busy") and self.asked[self.path] <= int(self.path[-1]):
            return self.send_error(503)
        if self.path.startswith("/cut") and self.asked[self.path] <= int(self.path[-1]):
            return self._send(png(7)[:-20], announced=len(png(7)))
        if self.path.startswith("/drop") and self.asked[self.path] <= int(self.path[-1]):
            return None  # the connection closes without an answer
        if self.path.startswith(("/busy", "/cut", "/drop")):
            return self._send(png(7))
        if self.path == "/a.png":
            return self._send(png(7))
        if self.path == "/hop":
            return self._redirect("/a.png")
        if self.path == "/circle":
            return self._redirect("/circle")
        if self.path in ("/ftp", "/file"):
            return self._redirect(f"{self.path[1:]}:///etc/passwd")
        if self.path == "/large":
            return self._send(b"x" * 300_000)
        if self.path == "/empty":
            return self._send(b"")
        if self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(50):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.05)
            return None
        return self.send_error(404)

    def _send(self, body: bytes, announced: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(announced or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _redirect(self, to: str) -> None:
        self.send_response(302)
        self.send_header("Location", to)
        self.end_headers()

    def log_message(self, *_args) -> None:
        pass


@pytest.fixture(scope="module")
def address():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Pictures)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def ask(url: str, **rules):
    row = {"image": url, "question": "?", "answer": "x"}
    return rows.RowRules(**rules).sample(row, "a:1").messages[0].content[0].image


def test_web_addresses_are_fetched_only_where_allowed(address):
    for path in ("/a.png", "/hop"):
        image = ask(f"{address}{path}", allow_urls=True)
        assert image_size(image) == (32, 32)
        assert load_rgb(image)[0, 0, 0] == 7
    with pytest.raises(MediaFault) as caught:
        image_size(ask(f"{address}/a.png"))
    assert str(caught.value) == (
        f"image {address}/a.png: is a http URL and nothing is downloaded; give a local path or set allow_urls: true"
    )


@pytest.mark.parametrize("opened", [open_sources, open_stream])
def test_a_media_root_on_the_web_asks_for_allow_urls(address, tmp_path, opened):
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "a.png", "question": "?", "answer": "x"}))
    for root in (address, "HTTPS://example.org/pictures", f"simplecache::{address}"):
        with pytest.raises(ValueError) as caught:
            opened(TrainSource(path=str(tmp_path / "a.jsonl"), media_root=root))
        assert str(caught.value) == (
            f"{tmp_path}/a.jsonl: media_root {root} is a web address, and nothing is downloaded; set allow_urls: true, "
            "or media_root to a folder"
        )
    # By default the root is where the file is. Nobody is asked there before it is allowed.
    with pytest.raises(ValueError, match=r"^https://nobody.invalid/a.json: media_root https://nobody.invalid is a web"):
        opened(TrainSource(path="https://nobody.invalid/a.json"))
    with pytest.raises(ValueError, match=r"is a web address, and nothing is downloaded"):
        opened(TrainSource(path=str(tmp_path), split="train", media_root=address))
    found = opened(TrainSource(path=str(tmp_path / "a.jsonl"), media_root=address, allow_urls=True))
    image = (found[0].sample(0) if isinstance(found, list) else next(found.rows()).sample).messages[0].content[0].image
    assert image_size(image) == (32, 32)
    write_tar(tmp_path / "a.tar", [("1.json", (ROW % "a").encode())])
    assert opened(TrainSource(path=str(tmp_path / "a.tar"), media_root="https://nobody.invalid"))


def test_faults_of_downloads(address):
    faults.set_download_limits(num_bytes=200_000, seconds=0.5)
    with socket.socket() as taken:  # bound, not listening: nobody answers there
        taken.bind(("127.0.0.1", 0))
        silent = f"http://127.0.0.1:{taken.getsockname()[1]}/a.png"
        for url, fault in (
            (f"{address}/none?key=secret", f"{address}/none: cannot be downloaded (HTTP Error 404: Not Found); check "),
            (f"{address}/ftp", f"{address}/ftp: redirects to a ftp URL; give the address of the file"),
            (
                f"{address}/file",
                f"{address}/file: cannot be downloaded (HTTP Error 302: Found - Redirection to url 'file:",
            ),
            (f"{address}/circle", f"{address}/circle: cannot be downloaded (HTTP Error 302: "),
            (f"{address}/large", f"{address}/large: is larger than 0 MiB; make it smaller or store it on disk"),
            (f"{address}/empty", f"{address}/empty: is empty (0 bytes); copy the file again"),
            (f"{address}/slow", f"{address}/slow: took more than 0.5 s; store it on disk"),
            (silent, f"{silent}: cannot be downloaded (<urlopen error [Errno 111] Connection refused>); check"),
            ("http://[", "http://[: cannot be downloaded ("),
        ):
            with pytest.raises(MediaFault) as caught:
                image_size(ask(url, allow_urls=True))
            assert str(caught.value).startswith(fault), str(caught.value)
            assert "secret" not in str(caught.value)


def test_downloads_that_fail_in_passing_are_tried_again(address):
    faults.set_download_limits(pauses=(0.0, 0.01))
    for path in ("/busy2", "/cut2", "/drop2"):
        assert load_rgb(ask(f"{address}{path}", allow_urls=True)).shape == (3, 32, 32)
        assert _Pictures.asked[path] == 3
    for path, fault, asked in (
        ("/busy9", "cannot be downloaded (HTTP Error 503: Service Unavailable); check the address", 3),
        ("/cut9", f"ends after {len(png(7)) - 20} of {len(png(7))} bytes; check the address", 3),
        ("/gone", "cannot be downloaded (HTTP Error 404: Not Found); check the address", 1),
    ):
        with pytest.raises(MediaFault) as caught:
            image_size(ask(f"{address}{path}", allow_urls=True))
        assert str(caught.value) == f"{address}{path}: {fault}"
        assert caught.value.transient
        assert _Pictures.asked[path] == asked


def test_a_host_that_is_no_more_is_asked_for_once(monkeypatch):
    faults.set_download_limits(pauses=(0.0, 0.01))
    for number, tries in ((socket.EAI_NONAME, 1), (socket.EAI_AGAIN, 3)):
        asked = []

        def resolve(*arguments, number=number, asked=asked, **options):
            asked.append(arguments)
            raise socket.gaierror(number, "not known")

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        with pytest.raises(
            MediaFault, match=r"^http://nobody.invalid/a.png: cannot be downloaded \(.*not known.*\); check"
        ):
            download.Remote("http://nobody.invalid/a.png").fetch()
        assert len(asked) == tries


def test_other_addresses_are_tried_again_too(monkeypatch):
    faults.set_download_limits(pauses=(0.0, 0.01))
    fs, failures = fsspec.filesystem("memory"), []
    whole = type(fs)._open
    monkeypatch.setattr(type(fs), "_open", lambda self, *args, **options: failing() or whole(self, *args, **options))

    def failing():
        if failures:
            raise failures.pop()

    fs.pipe("/bucket/a.png", png(7))
    medium = download.Remote("memory://bucket/a.png")
    failures[:] = [OSError("slow down")] * 2
    assert medium.fetch() == png(7)
    for kind, left in ((OSError, 1), (PermissionError, 3)):
        failures[:] = [kind("slow down")] * 4
        with pytest.raises(MediaFault) as caught:
            medium.fetch()
        assert str(caught.value) == "memory://bucket/a.png: cannot be read (slow down); check the path and media_root"
        assert caught.value.transient
        assert len(failures) == left
    failures.clear()
    fs.rm("/bucket", recursive=True)
