"""Downloads of media: allowed addresses, limits, retries, and the message of every fault."""

import contextlib
import http.server
import json
import socket
import threading
import time
from collections import Counter
from typing import ClassVar

import pytest

from qwen3vl_train.config.data_fields import TrainSource
from qwen3vl_train.data.errors import MediaFault
from qwen3vl_train.data.media.image import image_size, load_rgb
from qwen3vl_train.data.media.remote import Remote
from qwen3vl_train.data.rows.parse import RowRules
from qwen3vl_train.data.sources import open_sources, open_stream
from tests.helpers import faults
from tests.helpers.messages import message_of
from tests.helpers.row_files import ROW, png, write_tar

_DRIPS = {
    "/slow": (b"\r\n", b"x"),
    "/length": (b"Content-Length: 100000\r\n\r\n", b"x"),
    "/chunks": (b"Transfer-Encoding: chunked\r\n\r\n", b"0"),
    "/headers": (b"", b"X"),
}
"""What slow servers send: first, and then again and again."""


class _ImageServer(http.server.BaseHTTPRequestHandler):
    asked: ClassVar[Counter] = Counter()

    def do_GET(self):
        self.asked[self.path] += 1
        redirects = {"/hop": "/a.png", "/circle": "/circle", "/ftp": "ftp:///etc/passwd", "/file": "file:///etc/passwd"}
        bodies = {"/a.png": png(7), "/large": b"x" * 300_000, "/empty": b""}
        if self.path.startswith(("/busy", "/cut", "/drop")):
            if self.asked[self.path] > int(self.path[-1]):
                return self._send(png(7))
            if self.path.startswith("/busy"):
                return self.send_error(503)
            if self.path.startswith("/cut"):
                return self._send(png(7)[:-20], announced=len(png(7)))
            return None  # the connection closes without an answer
        if self.path in redirects:
            return self._redirect(redirects[self.path])
        if self.path in bodies:
            return self._send(bodies[self.path])
        if self.path in _DRIPS:
            return self._drip(*_DRIPS[self.path])
        if self.path.startswith("/to/"):
            return self._redirect(f"http://{self.path[4:]}:{self.server.server_address[1]}/a.png")
        return self.send_error(404)

    def _send(self, body: bytes, announced: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(announced or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _drip(self, beginning: bytes, drop: bytes) -> None:
        """Send something little again and again, until the client closes the connection."""
        with contextlib.suppress(OSError):
            self.wfile.write(b"HTTP/1.1 200 OK\r\n" + beginning)
            while True:
                self.wfile.write(drop)
                time.sleep(0.02)

    def _redirect(self, to: str) -> None:
        self.send_response(302)
        self.send_header("Location", to)
        self.end_headers()

    def log_message(self, *_args) -> None:
        pass


@pytest.fixture(scope="module")
def address():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _ImageServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def ask(url: str, **rules):
    row = {"image": url, "question": "?", "answer": "x"}
    return (
        RowRules(**{"allow_private_urls": rules.get("allow_urls", False), **rules})
        .sample(row, "a:1")
        .messages[0]
        .content[0]
        .image
    )


def test_web_addresses_are_fetched_only_where_allowed(address):
    for path in ("/a.png", "/hop"):
        image = ask(f"{address}{path}", allow_urls=True)
        assert image_size(image) == (32, 32)
        assert load_rgb(image)[0, 0, 0] == 7
    assert message_of(MediaFault, image_size, ask(f"{address}/a.png")) == (
        f"image {address}/a.png: is a http URL and nothing is downloaded; give a local path or set allow_urls: true"
    )


@pytest.mark.parametrize("opened", [open_sources, open_stream])
def test_media_root_on_the_web_needs_allow_urls(address, tmp_path, opened):
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "a.png", "question": "?", "answer": "x"}))
    for root in (address, "HTTPS://example.org/pictures", f"simplecache::{address}"):
        assert message_of(ValueError, opened, TrainSource(path=str(tmp_path / "a.jsonl"), media_root=root)) == (
            f"{tmp_path}/a.jsonl: media_root {root} is a web address, and nothing is downloaded; set allow_urls: true, "
            "or media_root to a folder"
        )
    # By default the root is the folder of the file. No request is sent before it is allowed.
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
    with socket.socket() as taken:  # bound, not listening, so nothing answers
        taken.bind(("127.0.0.1", 0))
        silent = f"http://127.0.0.1:{taken.getsockname()[1]}/a.png"
        for url, fault in (
            (f"{address}/none?key=secret", f"{address}/none?***: cannot be downloaded (HTTP Error 404: Not Found)"),
            (f"{address}/ftp", f"{address}/ftp: redirects to a ftp URL; give the address of the file"),
            (f"{address}/file", f"{address}/file: cannot be downloaded (HTTP Error 302: Found - Redirection to url "),
            (f"{address}/circle", f"{address}/circle: cannot be downloaded (HTTP Error 302: "),
            (f"{address}/large", f"{address}/large: is larger than 0 MiB; make it smaller or store it on disk"),
            (f"{address}/empty", f"{address}/empty: is empty (0 bytes); copy the file again"),
            (f"{address}/slow", f"{address}/slow: took more than 0.5 s; store it on disk"),
            (silent, f"{silent}: cannot be downloaded (<urlopen error [Errno 111] Connection refused>); check"),
            ("http://[", "http://[: cannot be downloaded ("),
        ):
            message = message_of(MediaFault, image_size, ask(url, allow_urls=True))
            assert message.startswith(fault), message
            assert "secret" not in message


@pytest.mark.parametrize("path", _DRIPS)
def test_deadline_holds_however_slowly_bytes_drip(address, path):
    faults.set_download_limits(seconds=0.3, pauses=())
    fault = f"{address}{path}: took more than 0.3 s; store it on disk"
    assert message_of(MediaFault, image_size, ask(f"{address}{path}", allow_urls=True)) == fault


REFUSED = "has the private address {}; set allow_private_urls: true if you trust the rows"


@pytest.mark.parametrize(
    ("host", "shown"),
    [("127.0.0.1", "127.0.0.1"), ("[::ffff:127.0.0.1]", "::ffff:127.0.0.1"), ("127.1", "127.0.0.1"),
     ("2130706433", "127.0.0.1"), ("169.254.169.254", "169.254.169.254"), ("10.1.2.3", "10.1.2.3"),
     ("0.0.0.0", "0.0.0.0"), ("[fe80::1]", "fe80::1"), ("[64:ff9b::a00:1]", "64:ff9b::a00:1"), ("[::1]", "::1"),
     ("100.64.0.1", "100.64.0.1"), ("224.0.0.1", "224.0.0.1")],
)  # fmt: skip
def test_private_addresses_are_refused(host, shown):
    with pytest.raises(MediaFault) as caught:
        Remote(f"http://{host}/a.png").fetch()
    assert str(caught.value).endswith(REFUSED.format(shown))
    assert (caught.value.kind, caught.value.transient) == ("forbidden_path", False)


def test_redirects_to_private_addresses_are_refused(address):
    port = address.rpartition(":")[2]
    image = ask(f"{address}/to/127.0.0.2", allow_urls=True, allow_private_urls=False)
    image = Remote(image.url, "127.0.0.1")  # as where media_root is there
    fault = f"{address}/to/127.0.0.2: its host 127.0.0.2 {REFUSED.format('127.0.0.2')}"
    assert message_of(MediaFault, image.fetch) == fault
    assert Remote(f"http://127.0.0.1:{port}/to/127.0.0.1", "127.0.0.1").fetch() == png(7)


def test_media_root_may_be_at_a_private_address(address):
    row = {"images": ["a.png", f"{address}/hop", "http://127.0.0.2/a.png"], "question": "?", "answer": "x"}
    images = [part.image for part in RowRules(allow_urls=True).sample(row, "a:1", address).messages[0].content[:3]]
    assert [image_size(image) for image in images[:2]] == [(32, 32)] * 2
    fault = f"image http://127.0.0.2/a.png: its host 127.0.0.2 {REFUSED.format('127.0.0.2')}"
    assert message_of(MediaFault, image_size, images[2]).removeprefix("image ") == fault.removeprefix("image ")


def test_proxy_may_be_private_and_its_targets_may_not(address, monkeypatch):
    monkeypatch.setenv("http_proxy", address)
    monkeypatch.delenv("no_proxy", raising=False)
    _ImageServer.asked.clear()
    assert message_of(MediaFault, Remote("http://10.0.0.1/a.png").fetch).endswith(REFUSED.format("10.0.0.1"))
    assert not _ImageServer.asked
    fault = "http://1.1.1.1/a.png: cannot be downloaded (HTTP Error 404: Not Found); check the address"
    assert message_of(MediaFault, Remote("http://1.1.1.1/a.png").fetch) == fault
    assert _ImageServer.asked == {"http://1.1.1.1/a.png": 1}


def test_downloads_with_transient_errors_are_retried(address):
    faults.set_download_limits(pauses=(0.0, 0.01))
    for path in ("/busy2", "/cut2", "/drop2"):
        assert load_rgb(ask(f"{address}{path}", allow_urls=True)).shape == (3, 32, 32)
        assert _ImageServer.asked[path] == 3
    for path, fault, asked in (
        ("/busy9", "cannot be downloaded (HTTP Error 503: Service Unavailable); check the address", 3),
        ("/cut9", f"ends after {len(png(7)) - 20} of {len(png(7))} bytes; check the address", 3),
        ("/gone", "cannot be downloaded (HTTP Error 404: Not Found); check the address", 1),
    ):
        with pytest.raises(MediaFault) as caught:
            image_size(ask(f"{address}{path}", allow_urls=True))
        assert str(caught.value) == f"{address}{path}: {fault}"
        assert caught.value.transient
        assert _ImageServer.asked[path] == asked


def test_unknown_host_is_asked_once(monkeypatch):
    faults.set_download_limits(pauses=(0.0, 0.01))
    for number, tries in ((socket.EAI_NONAME, 1), (socket.EAI_AGAIN, 3)):
        asked = []

        def resolve(*arguments, number=number, asked=asked, **options):
            asked.append(arguments)
            raise socket.gaierror(number, "not known")

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        fault = r"^http://nobody.invalid/a.png: cannot be downloaded \(.*not known.*\); check"
        with pytest.raises(MediaFault, match=fault):
            Remote("http://nobody.invalid/a.png").fetch()
        assert len(asked) == tries


def test_fsspec_downloads_are_retried(bucket, monkeypatch):
    faults.set_download_limits(pauses=(0.0, 0.01))
    failures, whole = [], type(bucket)._open
    monkeypatch.setattr(type(bucket), "_open", lambda self, *args, **more: failing() or whole(self, *args, **more))

    def failing():
        if failures:
            raise failures.pop()

    bucket.pipe("/bucket/a.png", png(7))
    medium = Remote("memory://bucket/a.png")
    failures[:] = [OSError("slow down")] * 2
    assert medium.fetch() == png(7)
    for kind, left in ((OSError, 1), (PermissionError, 3)):
        failures[:] = [kind("slow down")] * 4
        with pytest.raises(MediaFault) as caught:
            medium.fetch()
        assert str(caught.value) == "memory://bucket/a.png: cannot be read (slow down); check the path and media_root"
        assert caught.value.transient
        assert len(failures) == left
