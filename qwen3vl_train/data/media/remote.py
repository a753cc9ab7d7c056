"""Media that are not on local disk: web addresses where the recipe allows them, and remote media folders."""

import re
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from qwen3vl_train.data.errors import MediaFault

MAX_BYTES = 512 << 20
"""Of one medium: a long clip in good quality. Its bytes are held in memory, in every worker at once."""
TIMEOUT_SECONDS = 60.0
"""Limit on the duration of a download, however slowly it arrives."""
MAX_REDIRECTS = 5
RETRY_DELAYS_SECONDS = (0.25, 1.0)
"""Before each retry of a download that failed with a transient error."""
_TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)
_BLOCK = 1 << 16


@dataclass(frozen=True)
class Remote:
    """A medium at a URL: http and https, or whatever fsspec reads (s3, gs, hf, ...). Nothing is read until `fetch`."""

    url: str

    def __str__(self) -> str:
        """Return the address for messages, without user, password and query, which may contain a key."""
        address = re.split("[?#]", self.url, maxsplit=1)[0]
        scheme, colon, rest = address.partition("://")
        host, slash, path = rest.partition("/")
        return f"{scheme}{colon}{host.rpartition('@')[2]}{slash}{path}"[:200]

    def fetch(self) -> bytes:
        """Return all bytes, downloaded again at every call; transient errors are retried. Raise MediaFault."""
        read = _read_http if is_web_address(self.url) else _read_fsspec
        deadline = time.monotonic() + TIMEOUT_SECONDS
        delays = iter(RETRY_DELAYS_SECONDS)
        while True:
            try:
                body = read(self.url, deadline)
                if not body:
                    raise MediaFault("is empty (0 bytes); copy the file again")
                return body
            except MediaFault as fault:
                delay = next(delays, None) if fault.transient else None
                if delay is None or time.monotonic() + delay > deadline:
                    raise MediaFault(f"{self}: {fault}", kind="download_failed", transient=True) from None
                time.sleep(delay)


def is_web_address(path: str) -> bool:
    return path.lower().startswith(("http://", "https://"))


def uses_web(url: str) -> bool:
    """Return whether reading a URL asks a web server, also through fsspec's `zip://a.png::https://...`."""
    return any(is_web_address(part) for part in url.split("::"))


def _read_http(url: str, deadline: float) -> bytes:
    """Download over http and https alone, through redirects too."""
    import http.client
    from urllib import request

    class WebRedirects(request.HTTPRedirectHandler):
        max_redirections = MAX_REDIRECTS

        def redirect_request(self, req, fp, code, msg, headers, newurl):
            if not is_web_address(newurl):
                raise MediaFault(f"redirects to a {urlsplit(newurl).scheme[:20]} URL; give the address of the file")
            return super().redirect_request(req, fp, code, msg, headers, newurl)

    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler, request.HTTPHandler, request.HTTPSHandler, WebRedirects, request.HTTPErrorProcessor,
        request.HTTPDefaultErrorHandler,
    ):  # fmt: skip
        opener.add_handler(handler())
    try:
        asked = request.Request(url, headers={"User-Agent": "qwen3vl_train"})
        with opener.open(asked, timeout=max(deadline - time.monotonic(), 0.001)) as reply:
            body = _read_limited(lambda: reply.read1(_BLOCK), deadline)
            announced = reply.headers.get("Content-Length", "")
            if announced.isdigit() and len(body) < int(announced):
                raise MediaFault(f"ends after {len(body)} of {announced} bytes; check the address", transient=True)
            return body
    except MediaFault:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:
        fault = f"cannot be downloaded ({error}); check the address"
        raise MediaFault(fault, transient=_is_transient(error)) from None


def _is_transient(error: Exception) -> bool:
    """Return whether a retry may succeed. Unknown hosts are not retried: lists of links contain many that are gone."""
    import http.client

    cause = getattr(error, "reason", error)
    if isinstance(cause, socket.gaierror):
        return cause.errno == socket.EAI_AGAIN
    if isinstance(error, ValueError | http.client.InvalidURL) or isinstance(cause, ssl.SSLCertVerificationError):
        return False
    return getattr(error, "code", 503) in _TRANSIENT_STATUS


def _read_fsspec(url: str, deadline: float) -> bytes:
    """Download with the file system of the URL's protocol. It sets limits of its own; deadline is not enforced."""
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            return _read_limited(lambda: file.read(_BLOCK), None)  # type: ignore[attr-defined]
    except MediaFault:
        raise
    except (OSError, ValueError, ImportError) as error:
        permanent = ValueError | ImportError | FileNotFoundError | PermissionError | IsADirectoryError
        fault = f"cannot be read ({error}); check the path and media_root"
        raise MediaFault(fault, transient=not isinstance(error, permanent)) from None


def _read_limited(read: Callable[[], bytes], deadline: float | None) -> bytes:
    blocks, size = [], 0
    while block := read():
        size += len(block)
        if size > MAX_BYTES:
            raise MediaFault(f"is larger than {MAX_BYTES >> 20} MiB; make it smaller or store it on disk")
        if deadline is not None and time.monotonic() > deadline:
            raise MediaFault(f"took more than {TIMEOUT_SECONDS:g} s; store it on disk")
        blocks.append(block)
    return b"".join(blocks)
