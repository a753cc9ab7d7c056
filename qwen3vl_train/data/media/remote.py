"""Media that are not on this machine's disk: web addresses where the recipe allows them, and remote media folders."""

import re
import socket
import ssl
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from qwen3vl_train.data.errors import MediaFault

MAX_BYTES = 512 << 20
"""Of one medium: a long clip in good quality. Its bytes are held in memory, in every worker at once."""
TIMEOUT_SECONDS = 60.0
"""For the whole of a download, however slowly it drips."""
MAX_REDIRECTS = 5
PAUSES_SECONDS = (0.25, 1.0)
"""Before each further try of a download that failed in a way that may pass."""
_NOW_AND_THEN = (408, 425, 429, 500, 502, 503, 504)  # answers of a server that may answer otherwise a second later
_BLOCK = 1 << 16


@dataclass(frozen=True)
class Remote:
    """A medium at a URL: http and https, or whatever fsspec reads (s3, gs, hf, ...). Nothing is read until `fetch`."""

    url: str

    def __str__(self) -> str:
        """The address as messages show it: no user, password or query, which may hold a key."""
        address = re.split("[?#]", self.url, maxsplit=1)[0]
        scheme, colon, rest = address.partition("://")
        host, slash, path = rest.partition("/")
        return f"{scheme}{colon}{host.rpartition('@')[2]}{slash}{path}"[:200]

    def fetch(self) -> bytes:
        """Read the whole of it, anew at every call; a fault that may pass by itself is tried again, see PAUSES_SECONDS.

        Raises MediaFault.
        """
        read = _over_http if is_web_address(self.url) else _through_fsspec
        deadline = time.monotonic() + TIMEOUT_SECONDS
        pauses = iter(PAUSES_SECONDS)
        while True:
            try:
                body = read(self.url, deadline)
            except _Unsteady as fault:
                pause = next(pauses, None)
                if pause is None or time.monotonic() + pause > deadline:
                    raise MediaFault(f"{self}: {fault}", kind="download_failed", transient=True) from None
                time.sleep(pause)
            except MediaFault as fault:
                raise MediaFault(f"{self}: {fault}", kind="download_failed", transient=True) from None
            else:
                if not body:
                    raise MediaFault(
                        f"{self}: is empty (0 bytes); copy the file again", kind="download_failed", transient=True
                    )
                return body


class _Unsteady(MediaFault):
    """What may be gone a second later."""


def is_web_address(path: str) -> bool:
    return path.lower().startswith(("http://", "https://"))


def reaches_web(url: str) -> bool:
    """Say whether to read a URL is to ask a web server, also through fsspec's `zip://a.png::https://...`."""
    return any(is_web_address(part) for part in url.split("::"))


def _over_http(url: str, deadline: float) -> bytes:
    """Fetch with nothing but http and https, through redirects too."""
    import http.client
    from urllib import request

    class OnlyWeb(request.HTTPRedirectHandler):
        max_redirections = MAX_REDIRECTS

        def redirect_request(self, req, fp, code, msg, headers, newurl):
            if not is_web_address(newurl):
                raise MediaFault(f"redirects to a {urlsplit(newurl).scheme[:20]} URL; give the address of the file")
            return super().redirect_request(req, fp, code, msg, headers, newurl)

    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler, request.HTTPHandler, request.HTTPSHandler, OnlyWeb, request.HTTPErrorProcessor,
        request.HTTPDefaultErrorHandler,
    ):  # fmt: skip
        opener.add_handler(handler())
    try:
        asked = request.Request(url, headers={"User-Agent": "qwen3vl_train"})
        with opener.open(asked, timeout=max(deadline - time.monotonic(), 0.001)) as reply:
            body = _limited(lambda: reply.read1(_BLOCK), deadline)
            announced = reply.headers.get("Content-Length", "")
            if announced.isdigit() and len(body) < int(announced):
                raise _Unsteady(f"ends after {len(body)} of {announced} bytes; check the address")
            return body
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, MediaFault):
            raise
        kind = _Unsteady if _may_pass(error) else MediaFault
        raise kind(f"cannot be downloaded ({error}); check the address") from None


def _may_pass(error: Exception) -> bool:
    """Say whether a download may succeed a second later. Lists of links hold many to hosts that are long gone."""
    import http.client

    cause = getattr(error, "reason", error)
    if isinstance(cause, socket.gaierror):
        return cause.errno == socket.EAI_AGAIN
    lasting = isinstance(error, ValueError | http.client.InvalidURL) or isinstance(cause, ssl.SSLCertVerificationError)
    return not lasting and getattr(error, "code", 503) in _NOW_AND_THEN


def _through_fsspec(url: str, deadline: float) -> bytes:
    """Fetch with whatever reads such addresses. deadline: is not kept, those set limits of their own."""
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            return _limited(lambda: file.read(_BLOCK), None)  # type: ignore[attr-defined]
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, MediaFault):
            raise
        known = isinstance(error, ValueError | ImportError | FileNotFoundError | PermissionError | IsADirectoryError)
        kind = MediaFault if known else _Unsteady
        raise kind(f"cannot be read ({error}); check the path and media_root") from None


def _limited(read, deadline: float | None) -> bytes:
    blocks, size = [], 0
    while block := read():
        size += len(block)
        if size > MAX_BYTES:
            raise MediaFault(f"is larger than {MAX_BYTES >> 20} MiB; make it smaller or store it on disk")
        if deadline is not None and time.monotonic() > deadline:
            raise MediaFault(f"took more than {TIMEOUT_SECONDS:g} s; store it on disk")
        blocks.append(block)
    return b"".join(blocks)
