"""Media that are not on local disk: web addresses where the recipe allows them, and remote media folders."""

import contextlib
import http.client
import io
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib import request
from urllib.parse import unquote, urlsplit

from qwen3vl_train.data.errors import MediaFault
from qwen3vl_train.public_names import public_name

MAX_BYTES = 512 << 20
"""Of one medium: a long clip in good quality. Its bytes are held in memory, in every worker at once."""
TIMEOUT_SECONDS = 60.0
"""Limit on the duration of a download, however slowly it arrives."""
MAX_REDIRECTS = 5
RETRY_DELAYS_SECONDS = (0.25, 1.0)
"""Before each retry of a download that failed with a transient error."""
_TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)
_BLOCK = 1 << 16
ANY_HOST = "*"
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


@dataclass(frozen=True)
class Remote:
    """A medium at a URL: http and https, or whatever fsspec reads (s3, gs, hf, ...). Nothing is read until `fetch`.

    private_host: the host of a web address that may have a private address, or ANY_HOST. No other may, be it that of
        the URL or of one that it redirects to: a row must not reach the services of the network that it is read in.
    """

    url: str
    private_host: str | None = None

    def __str__(self) -> str:
        """Return the address for messages, without user, password and query, which may contain a key."""
        return public_name(self.url)[:200]

    def fetch(self) -> bytes:
        """Return all bytes, downloaded again at every call; transient errors are retried. Raise MediaFault."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        delays = iter(RETRY_DELAYS_SECONDS)
        while True:
            try:
                is_web = is_web_address(self.url)
                body = _read_http(self.url, deadline, self.private_host) if is_web else _read_fsspec(self.url)
                if not body:
                    raise MediaFault("is empty (0 bytes); copy the file again")
                return body
            except MediaFault as fault:
                if fault.kind == "forbidden_path":
                    raise fault.at(str(self)) from None
                delay = next(delays, None) if fault.transient else None
                if delay is None or time.monotonic() + delay > deadline:
                    raise MediaFault(f"{self}: {fault}", kind="download_failed", transient=True) from None
                time.sleep(delay)


def is_web_address(path: str) -> bool:
    return path.lower().startswith(("http://", "https://"))


def uses_web(url: str) -> bool:
    """Return whether reading a URL asks a web server, also through fsspec's `zip://a.png::https://...`."""
    return any(is_web_address(part) for part in url.split("::"))


def web_host(url: str | None) -> str | None:
    """Return the host of a web address, in lower case without its port; None for any other text."""
    try:
        return urlsplit(url).hostname if url and is_web_address(url) else None
    except ValueError:
        return None


def _read_http(url: str, deadline: float, private_host: str | None) -> bytes:
    """Download over http and https alone, through redirects too, from no private address but that of private_host.

    The deadline holds for every byte: of the addresses that a name has, of the handshake, the headers and the body.
    """
    try:
        asked = request.Request(url, headers={"User-Agent": "qwen3vl_train"})
        with _opener(deadline, private_host).open(asked, timeout=_seconds_until(deadline)) as reply:
            body = _read_limited(lambda: reply.read1(_BLOCK), deadline)
            announced = reply.headers.get("Content-Length", "")
            if announced.isdigit() and len(body) < int(announced):
                raise MediaFault(f"ends after {len(body)} of {announced} bytes; check the address", transient=True)
            return body
    except MediaFault:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:
        if time.monotonic() >= deadline:
            raise _took_too_long() from None
        fault = f"cannot be downloaded ({error}); check the address"
        raise MediaFault(fault, transient=_is_transient(error)) from None


def _seconds_until(deadline: float) -> float:
    """Return the rest of the time, more than 0. Raise TimeoutError where there is none."""
    rest = deadline - time.monotonic()
    if rest <= 0:
        raise TimeoutError("timed out")
    return rest


class _WebRedirects(request.HTTPRedirectHandler):
    max_redirections = MAX_REDIRECTS

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not is_web_address(newurl):
            raise MediaFault(f"redirects to a {urlsplit(newurl).scheme[:20]} URL; give the address of the file")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _TimedReader(io.RawIOBase):
    """What a socket receives, each time within the rest of the deadline: many short waits are one long wait."""

    def __init__(self, connected: socket.socket, deadline: float) -> None:
        self._connected, self._deadline = connected, deadline
        self._raw = connected.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._connected.settimeout(_seconds_until(self._deadline))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _TimedResponse(http.client.HTTPResponse):
    """A response whose headers and body arrive before a deadline."""

    def __init__(self, deadline: float, connected: socket.socket, *args: Any, **more: Any) -> None:
        super().__init__(connected, *args, **more)
        self.fp.close()
        self.fp = io.BufferedReader(_TimedReader(connected, deadline))


class _Connections(request.HTTPHandler, request.HTTPSHandler):
    """Open each connection of a download, also those of its redirects."""

    def __init__(self, deadline: float, private_host: str | None) -> None:
        super().__init__()
        self._deadline, self._private_host = deadline, private_host

    def http_open(self, req: request.Request) -> Any:
        return self.do_open(partial(self._connection, http.client.HTTPConnection, req), req)  # type: ignore[arg-type]

    def https_open(self, req: request.Request) -> Any:
        return self.do_open(partial(self._connection, http.client.HTTPSConnection, req), req)  # type: ignore[arg-type]

    def _connection(self, make: Callable[..., Any], req: request.Request, host: str, **options: Any) -> Any:
        target = web_host(req.full_url)
        is_trusted = self._private_host is not None and self._private_host in (ANY_HOST, target)
        is_proxied = host != unquote(urlsplit(req.full_url).netloc)
        if is_proxied and not is_trusted and target:
            with contextlib.suppress(socket.gaierror):  # names that only the proxy knows
                _check_public(target, _addresses(target, 0))
        connection = make(host, **{**options, "timeout": _seconds_until(self._deadline)})
        connection.response_class = partial(_TimedResponse, self._deadline)
        # The addresses that are checked are those that are connected to: a name may have others at the next request.
        connection._create_connection = partial(_connect, self._deadline, is_trusted or is_proxied)
        return connection


def _connect(deadline: float, is_trusted: bool, address: tuple[str, int], *_: Any) -> socket.socket:
    """Connect to one of the addresses of a host; as `socket.create_connection`, within a deadline."""
    found, last = _addresses(*address), None
    if not is_trusted:
        _check_public(address[0], found)
    for family, kind, protocol, _name, one in found:
        connected = socket.socket(family, kind, protocol)
        try:
            connected.settimeout(_seconds_until(deadline))
            connected.connect(one)
            return connected
        except OSError as error:
            connected.close()
            last = error
    raise last or OSError("its host has no address")


def _addresses(host: str, port: int) -> list[Any]:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)


def _check_public(host: str, addresses: list[Any]) -> None:
    """Raise MediaFault for a host with an address that is not of the public Internet: rows may come from anyone."""
    for *_, (name, *_) in addresses:
        if not _is_public(ipaddress.ip_address(name.partition("%")[0])):
            fault = f"its host {host[:100]} has the private address {name}"
            raise MediaFault(f"{fault}; set allow_private_urls: true if you trust the rows", kind="forbidden_path")


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Return whether an address is of the public Internet, as is the IPv4 address within one of IPv6."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return _is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo and address.teredo[1])
        if inner:
            return _is_public(inner)
    return address.is_global and not address.is_multicast


def _opener(deadline: float, private_host: str | None) -> request.OpenerDirector:
    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler(), _Connections(deadline, private_host), _WebRedirects(), request.HTTPErrorProcessor(),
        request.HTTPDefaultErrorHandler(),
    ):  # fmt: skip
        opener.add_handler(handler)
    return opener


def _is_transient(error: Exception) -> bool:
    """Return whether a retry may succeed. Unknown hosts are not retried: lists of links contain many that are gone."""
    cause = getattr(error, "reason", error)
    if isinstance(cause, socket.gaierror):
        return cause.errno == socket.EAI_AGAIN
    if isinstance(error, ValueError | http.client.InvalidURL) or isinstance(cause, ssl.SSLCertVerificationError):
        return False
    return getattr(error, "code", 503) in _TRANSIENT_STATUS


def _read_fsspec(url: str) -> bytes:
    """Download with the file system of the URL's protocol, which sets limits of its own."""
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


def _took_too_long() -> MediaFault:
    return MediaFault(f"took more than {TIMEOUT_SECONDS:g} s; store it on disk")


def _read_limited(read: Callable[[], bytes], deadline: float | None) -> bytes:
    blocks, size = [], 0
    while block := read():
        size += len(block)
        if size > MAX_BYTES:
            raise MediaFault(f"is larger than {MAX_BYTES >> 20} MiB; make it smaller or store it on disk")
        if deadline is not None and time.monotonic() > deadline:
            raise _took_too_long()
        blocks.append(block)
    return b"".join(blocks)
