"""HTTP clients for API servers: an answer has a limit in time and size, redirects are refused."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

MOST_BYTES = 1 << 29  # 2,048 vectors of 3,072 numbers are less than a third of it

_deadline: ContextVar[float] = ContextVar("deadline", default=float("inf"))


class AnswerTimeout(TimeoutError):
    """The answer came too slowly."""


class AnswerTooLarge(ValueError):
    """The answer has more bytes than any list of vectors."""


@contextlib.contextmanager
def until(deadline: float) -> Iterator[None]:
    """Give up answers that are not whole at a moment of ``time.monotonic``."""
    token = _deadline.set(deadline)
    try:
        yield
    finally:
        _deadline.reset(token)


@functools.cache
def bounded(client: type) -> Any:
    """Derive a class of clients from ``httpx.Client``, or from its kin in a provider's library.

    The client's own timeout is for each part of an answer, of which there may be any number. It
    does not follow redirects: texts, and headers that hold secrets, would go to another server.
    """

    class Client(client):  # type: ignore[misc]
        def send(self, request: Any, **arguments: Any) -> Any:
            arguments.update(stream=True, follow_redirects=False)
            response = super().send(request, **arguments)
            try:
                content = _read(response)
            finally:
                response.close()
            headers = [
                (name, value)
                for name, value in response.headers.multi_items()
                if name.lower() not in ("content-encoding", "content-length", "transfer-encoding")
            ]
            return type(response)(
                response.status_code, headers=headers, content=content, request=request
            )

    return Client


def _read(response: Any) -> bytes:
    content = bytearray()
    for part in response.iter_bytes():
        content += part
        if len(content) > MOST_BYTES:
            raise AnswerTooLarge(f"more than {MOST_BYTES:,} bytes")
        if time.monotonic() > _deadline.get():
            raise AnswerTimeout
    return bytes(content)
