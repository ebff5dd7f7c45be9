"""Fetches images from http and https URLs, within bounds of time, size, redirects and schemes.

    URL -> one request, watched by a timer -> bytes, or a redirect and the same again

An address a stranger names must not hold a worker for hours, fill its memory or read its files. A server
that takes URLs from strangers passes `public_only` too, so that they cannot ask for what only it can reach.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import string
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

MAX_REDIRECTS = 5

URL_SCHEMES = ("http", "https")


class FetchError(ValueError):
    """A URL that gives no body, with the reason in one line."""


def fetch_url(url: str, *, max_bytes: int, timeout_s: float, public_only: bool = False) -> bytes:
    """Fetch a URL, following a few redirects by hand so that each meets the same checks.

    Args:
        url: An http or https URL.
        max_bytes: Limit on the body, checked while it is read.
        timeout_s: Time for everything together, redirects included.
        public_only: Connect to public addresses alone, not to loopback, private or link-local ones, whatever
            the names resolve to; proxies of the environment are not used then.

    Raises:
        FetchError: No connection, no complete answer in time, a status other than 2xx, too many bytes or
            redirects, a redirect to another scheme, or an address that is not public.
    """
    first = _show(url)
    deadline = time.monotonic() + timeout_s
    for _ in range(MAX_REDIRECTS + 1):
        _check_scheme(url)
        try:
            with _open_url(url, deadline, public_only) as response:
                location = response.headers.get("Location")
                if not (300 <= response.status < 400 and location):
                    return _read_body(response, _show(url), max_bytes)
            url = urljoin(url, location)
        except (OSError, http.client.HTTPException, ValueError) as error:
            # ValueError: an impossible host or port, or our own. Hanging up shows as any of these, so the
            # clock is asked first.
            if time.monotonic() >= deadline:
                raise FetchError(f"no complete answer in {timeout_s:g} s from {_show(url)}") from error
            if isinstance(error, FetchError):
                raise
            raise FetchError(f"cannot fetch {_show(url)}: {getattr(error, 'reason', error)}") from error
    raise FetchError(f"more than {MAX_REDIRECTS} redirects from {first}")


def _check_scheme(url: str) -> None:
    scheme = url.partition(":")[0].lower()
    if scheme not in URL_SCHEMES:
        raise FetchError(f"unsupported URL scheme {scheme!r}; expected {' or '.join(URL_SCHEMES)}")


def _read_body(response: http.client.HTTPResponse, shown_url: str, max_bytes: int) -> bytes:
    """Read at most `max_bytes`, however long the answer is or says it is."""
    if not 200 <= response.status < 300:
        raise FetchError(f"HTTP {response.status} for {shown_url}")
    declared = response.length
    _check_num_bytes(declared or 0, max_bytes)
    data = response.read(max_bytes + 1)
    _check_num_bytes(len(data), max_bytes)
    if declared is not None and len(data) < declared:
        raise FetchError(f"truncated: {len(data)} of {declared} bytes from {shown_url}")
    return data


def _check_num_bytes(num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise FetchError(f"image of {num_bytes} bytes or more exceeds the limit of {max_bytes} bytes")


def _show(url: str) -> str:
    """Cut a URL for a message; its query goes first, as it may hold a signature."""
    return shorten_source(url.partition("?")[0])


def shorten_source(source: str) -> str:
    """Cut a URL or path to a single line of at most 120 characters, for a message."""
    shown = source if len(source) <= 120 else source[:117] + "..."
    return shown if shown.isprintable() else repr(shown)


class _Watch:
    """The deadline of one fetch and the sockets to shut at it.

    A socket timeout bounds each read, not their sum: a server that sends a byte every few seconds
    would hold a worker for hours. So a timer shuts the socket, which ends any read in progress.
    """

    def __init__(self, deadline: float, public_only: bool) -> None:
        self.deadline = deadline
        self.public_only = public_only
        self.sockets: list[socket.socket] = []

    def check(self) -> float:
        """Return the seconds left, at least a little over none."""
        remaining_s = self.deadline - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError("timed out")
        return remaining_s

    def hang_up(self) -> None:
        for connection in self.sockets:
            with contextlib.suppress(OSError):  # Already closed.
                connection.shutdown(socket.SHUT_RDWR)


def _connect_to_public(address: tuple[str, int], *options: Any) -> socket.socket:
    """Connect as `socket.create_connection` does, to an address that was checked, not to a name.

    A name that is resolved once to be checked and again to connect can give two answers.
    """
    host, port = address
    found = {str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    public = sorted(ip for ip in found if is_public(ip))
    if len(public) < len(found):
        raise FetchError(f"{shorten_source(host)} is not a public address")
    return socket.create_connection((public[0], port), *options)


def is_public(ip: str) -> bool:
    """Tell whether an IP address belongs to the public internet, seeing through IPv6 forms of IPv4 ones."""
    address = ipaddress.ip_address(ip.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if address in _NAT64:
            inner = ipaddress.IPv4Address(address.packed[-4:])
        if inner is not None:
            address = inner
    return address.is_global and not address.is_multicast


_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class _WatchedHTTPConnection(http.client.HTTPConnection):
    """A connection that shows its socket to the timer that has to hang up."""

    def __init__(self, host: str, *, watch: _Watch, **options: Any) -> None:
        super().__init__(host, **options)
        self._watch = watch
        if watch.public_only:
            self._create_connection = _connect_to_public

    def connect(self) -> None:
        super().connect()
        self._watch.sockets.append(self.sock)
        self._watch.check()  # The timer may have run just before there was a socket.


class _WatchedHTTPSConnection(_WatchedHTTPConnection, http.client.HTTPSConnection):
    """The same over TLS."""


class _WatchedHandler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens http and https through watched connections."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_WatchedHTTPConnection, req, watch=self._watch)  # type: ignore[arg-type]

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_WatchedHTTPSConnection, req, watch=self._watch)  # type: ignore[arg-type]


@contextlib.contextmanager
def _open_url(url: str, deadline: float, public_only: bool) -> Iterator[http.client.HTTPResponse]:
    """Open one URL, without redirects; a `TimeoutError` ends what is not over at the deadline."""
    watch = _Watch(deadline, public_only)
    opener = urllib.request.OpenerDirector()  # Bare: no handlers for file, ftp, redirects or errors.
    opener.add_handler(urllib.request.ProxyHandler({} if public_only else None))
    opener.add_handler(_WatchedHandler(watch))
    request = urllib.request.Request(_quote_url(url), headers={"User-Agent": "vlmray", "Accept": "image/*"})
    timer = threading.Timer(watch.check(), watch.hang_up)
    timer.daemon = True
    timer.start()
    try:
        with opener.open(request, timeout=watch.check()) as response:
            yield response
        watch.check()  # Without a declared length, a body cut short by hanging up looks complete.
    finally:
        timer.cancel()


def _quote_url(url: str) -> str:
    """Percent-encode spaces and letters beyond ASCII, as browsers do; leave the rest as written."""
    parts = urlsplit(url)
    path, query = (quote(part, safe=string.punctuation) for part in (parts.path, parts.query))
    return urlunsplit((parts.scheme, parts.netloc, path, query, ""))
