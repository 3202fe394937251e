"""Download one URL without opening the private network to whoever wrote the URL."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from gpu_lance.errors import FetchError, RefusedURLError

TIMEOUT = 30.0  # seconds
MAX_BYTES = 64 * 2**20
_MAX_REDIRECTS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def url_retrieve(
    url: str,
    *,
    timeout: float = TIMEOUT,
    max_bytes: int = MAX_BYTES,
    allow_private: bool = False,
) -> bytes:
    """Return what an ``http`` or ``https`` URL holds.

    The host name is resolved once, every address it has is checked, and the connection goes to a
    checked address, so a name that changes its mind in between gains nothing. Each redirect is
    checked again. Proxies of the environment are not used, since they would resolve names anew.

    Parameters
    ----------
    url : str
        What to download.
    timeout : float
        Seconds for connecting and for each answer of the server, and for the whole body.
    max_bytes : int
        Larger bodies are refused, whatever length the server announces.
    allow_private : bool
        Also connect to loopback, private, link-local and other non-public addresses.

    Returns
    -------
    bytes
        The body.

    Raises
    ------
    RefusedURLError
        For another scheme, an address that is not public, or too large a body.
    FetchError
        If the download fails or is too slow (a ConnectionError, as in LanceDB).
    """
    deadline = time.monotonic() + timeout
    for _ in range(_MAX_REDIRECTS + 1):
        found = _get(_checked(url), deadline, max_bytes, allow_private)
        if isinstance(found, bytes):
            return found
        url = urljoin(url, found)
    raise FetchError(f"{_shown(url)} was redirected more than {_MAX_REDIRECTS} times.", 302)


def is_public(address: str) -> bool:
    """Whether an IP address is on the public internet, also where IPv6 wraps an IPv4 one.

    Examples
    --------
    >>> is_public("93.184.215.14"), is_public("127.0.0.1"), is_public("::ffff:10.0.0.1")
    (True, False, False)
    """
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
        if inner is None and ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _shown(url: str) -> str:
    """The URL without its credentials and query, which may hold a signature."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _checked(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  (raises for a port that is none)
    except ValueError as error:
        raise RefusedURLError(f"This is no URL that can be fetched: {error}.") from None
    if parts.scheme not in ("http", "https"):
        raise RefusedURLError(
            f"Only http and https URLs are fetched, got the scheme {parts.scheme!r}."
        )
    if not parts.hostname or any(char <= " " for char in url):
        raise RefusedURLError(f"{_shown(url)} has no host, or holds white space.")
    return parts


def _address(parts: SplitResult, port: int, allow_private: bool) -> str:
    host = parts.hostname or ""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise FetchError(f"The host {host!r} was not found: {error}.") from error
    addresses = [str(info[4][0]) for info in found]
    if not allow_private:
        for address in addresses:
            if not is_public(address):
                raise RefusedURLError(
                    f"{_shown(parts.geturl())} leads to {address}, which is not a public address; "
                    "pass allow_private=True if you trust the URL."
                )
    return addresses[0]


def _connection(
    parts: SplitResult, timeout: float, allow_private: bool
) -> http.client.HTTPConnection:
    port = parts.port or (443 if parts.scheme == "https" else 80)
    address = _address(parts, port, allow_private)
    host = parts.hostname or ""
    connection = http.client.HTTPConnection(host, port, timeout=timeout)
    connection.sock = socket.create_connection((address, port), timeout=timeout)
    if parts.scheme == "https":
        context = ssl.create_default_context()
        connection.sock = context.wrap_socket(connection.sock, server_hostname=host)
        connection.default_port = 443  # keeps :443 out of the Host header
    return connection


def _get(parts: SplitResult, deadline: float, max_bytes: int, allow_private: bool) -> bytes | str:
    """Return the body, or the address of a redirect."""
    shown = _shown(parts.geturl())
    target = quote(parts.path or "/", safe="/%:=&~+!$,;'@()*")
    if parts.query:
        target += "?" + quote(parts.query, safe="/%:=&~+!$,;'@()*?")
    try:
        connection = _connection(parts, _left(deadline, shown), allow_private)
        try:
            connection.request("GET", target, headers={"User-Agent": "gpu-lance"})
            response = connection.getresponse()
            location = response.getheader("Location")
            if response.status in _REDIRECTS and location:
                return location
            if response.status != 200:
                raise FetchError(f"{shown} answered HTTP {response.status}.", response.status)
            return _body(response, connection, deadline, max_bytes, shown)
        finally:
            connection.close()
    except (FetchError, RefusedURLError):
        raise
    except (OSError, http.client.HTTPException) as error:
        raise FetchError(f"{shown} could not be downloaded: {error!r}.") from error


def _body(
    response: http.client.HTTPResponse,
    connection: http.client.HTTPConnection,
    deadline: float,
    max_bytes: int,
    shown: str,
) -> bytes:
    announced = response.length
    chunks: list[bytes] = []
    size = 0
    while True:
        left = _left(deadline, shown)
        if connection.sock is not None:
            connection.sock.settimeout(left)
        # read1 returns after one receive, so a server that drips cannot outlast the deadline
        chunk = response.read1(1 << 16)
        if not chunk:
            break
        size += len(chunk)
        if size > max_bytes:
            raise RefusedURLError(
                f"{shown} is larger than {max_bytes:,} bytes; allow more with max_bytes=."
            )
        chunks.append(chunk)
    if announced is not None and size != announced:
        raise FetchError(f"{shown} ended after {size:,} of {announced:,} bytes.")
    return b"".join(chunks)


def _left(deadline: float, shown: str) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise FetchError(f"{shown} took longer than its timeout.")
    return left
