"""Clients of API servers: one a process for equal arguments, only to servers that are trusted."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from typing import Any
from urllib.parse import urlsplit

from gpu_lance.embeddings.throttle import Throttle
from gpu_lance.errors import BadInputError, RefusedURLError

KEPT = 32  # connections; the longest unused goes first, and closes when nobody uses it

_reading_a_table: ContextVar[bool] = ContextVar("reading_a_table", default=False)
_named: set[tuple[str, str, int | None]] = set()


class Connection:
    """A client and what was learned of its server; shared by all threads of a process.

    Parameters
    ----------
    client : object
        Of the provider's library; safe to use by threads.
    close : callable
        Closes it. Called when nobody uses the connection any more, or when the process ends.
    throttle : Throttle
        Paces all requests.
    secrets : dict of str to str
        What must never be shown, and what to show in its place.

    Notes
    -----
    Attributes that requests change: `works`, whether these arguments ever gave a vector;
    `ask_length`, whether the length of vectors is asked for; `plain`, whether vectors are asked for
    as lists since the server knows no base64; `most`, the most texts that it takes at once.
    """

    def __init__(
        self,
        client: Any,
        close: Callable[[], None],
        throttle: Throttle,
        secrets: dict[str, str],
    ) -> None:
        self.client = client
        self.throttle = throttle
        self.secrets = secrets
        self.works = False
        self.ask_length = False
        self.plain = False
        self.most: int | None = None
        self.close = weakref.finalize(self, close)


class Connections:
    """The connections of this process, by everything that decides how they are made."""

    def __init__(self) -> None:
        self._forget()
        self._left_behind: list[Any] = []
        if hasattr(os, "register_at_fork"):  # not on Windows
            os.register_at_fork(after_in_child=self._after_fork)

    def get(self, key: Hashable, make: Callable[[], Connection]) -> Connection:
        """Return the connection of that key; `make` makes it if there is none yet."""
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                found = self._kept[key] = make()
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return found

    def clear(self) -> None:
        """Close every connection; the next request makes a new one."""
        with self._lock:
            for connection in self._kept.values():
                connection.close()
            self._kept.clear()

    def __len__(self) -> int:
        return len(self._kept)

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, Connection] = OrderedDict()

    def _after_fork(self) -> None:
        # its sockets are the parent's: neither to be used nor to be closed here
        for connection in self._kept.values():
            connection.close.detach()
        self._left_behind.append(self._kept)
        self._forget()


CONNECTIONS = Connections()


def check_server(url: str, argument: str = "base_url") -> str:
    """Return the address of a server if it has no secret in it.

    Raises
    ------
    BadInputError
        For what is no http(s) address, or one with a user, a password, a query or a fragment.

    Examples
    --------
    >>> check_server("http://localhost:11434/v1")
    'http://localhost:11434/v1'
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise BadInputError(
            f"{argument} must be the http(s) address of a server, such as 'https://host/v1'."
        )
    if "@" in parts.netloc:
        raise BadInputError(
            f"{argument} holds a user or a password, which tables and logs would show; pass "
            "api_key='$var:name' instead."
        )
    if parts.query or parts.fragment:
        raise BadInputError(
            f"{argument} has a query or a fragment, which may hold a secret and which no client "
            "sends; leave them out."
        )
    return url


def origin_of(url: str) -> tuple[str, str, int | None]:
    """The part of an address that says which server it is."""
    parts = urlsplit(url)
    default = {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or default


@contextlib.contextmanager
def reading_a_table() -> Iterator[None]:
    """While it runs, the servers that arguments name are named by a table, not by the program."""
    token = _reading_a_table.set(True)
    try:
        yield
    finally:
        _reading_a_table.reset(token)


def trust(url: str) -> bool:
    """Note that the program named this server; False while a table is read."""
    if _reading_a_table.get():
        return False
    _named.add(origin_of(url))
    return True


def refuse_stranger(url: str, variable: str) -> None:
    """Refuse a server that only a table names: texts and a key would go to whoever wrote it.

    Parameters
    ----------
    url : str
        Its address.
    variable : str
        The environment variable that names a trusted one.

    Raises
    ------
    RefusedURLError
        Unless it is on this machine, in that variable, or was named by this program.
    """
    origin = origin_of(url)
    allowed = os.environ.get(variable)
    if origin in _named or _is_here(origin[1]) or (allowed and origin_of(allowed) == origin):
        return
    where = f"{origin[0]}://{urlsplit(url).netloc}"
    raise RefusedURLError(
        f"The table says that {where} makes its vectors, and nothing else does: texts and the key "
        f"are not sent there unasked. If you trust it, set the environment variable {variable} to "
        "its address, or make the function once in this program with create(base_url=...)."
    )


def _is_here(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
