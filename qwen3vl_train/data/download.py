"""Media that are not on this machine's disk: web addresses where the recipe allows them, and remote media folders."""

import re
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from qwen3vl_train.data.faults import MediaFault

MAX_BYTES = 512 << 20
"""Of one medium: a long clip in good quality. Its bytes are held in memory, in every worker at once."""
TIMEOUT_SECONDS = 60.0
"""For the whole of a download, however slowly it drips."""
MAX_REDIRECTS = 5
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
        """Read the whole of it, anew at every call. Raises MediaFault."""
        try:
            body = _over_http(self.url) if is_web_address(self.url) else _through_fsspec(self.url)
        except MediaFault as fault:
            raise MediaFault(f"{self}: {fault}") from None
        if not body:
            raise MediaFault(f"{self}: is empty (0 bytes); copy the file again")
        return body


def is_web_address(path: str) -> bool:
    return path.lower().startswith(("http://", "https://"))


def reaches_web(url: str) -> bool:
    """Say whether to read a URL is to ask a web server, also through fsspec's `zip://a.png::https://...`."""
    return any(is_web_address(part) for part in url.split("::"))


def _over_http(url: str) -> bytes:
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
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        asked = request.Request(url, headers={"User-Agent": "qwen3vl_train"})
        with opener.open(asked, timeout=TIMEOUT_SECONDS) as reply:
            return _limited(lambda: reply.read1(_BLOCK), deadline)
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, MediaFault):
            raise
        raise MediaFault(f"cannot be downloaded ({error}); check the address") from None


def _through_fsspec(url: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            return _limited(lambda: file.read(_BLOCK), None)  # type: ignore[attr-defined]
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, MediaFault):
            raise
        raise MediaFault(f"cannot be read ({error}); check the path and media_root") from None


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
