"""How many requests go to a server at once, and how fast; one throttle for all who ask it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from gpu_lance.embeddings import retries


class Stopped(Exception):
    """The work that a request belongs to was given up while it waited."""


class Throttle:
    """Let requests begin one after the other, as a server allows; shared by all threads.

    Requests are spaced evenly, so that no minute holds more than its share. When the server says
    that it is too much, every request waits, and fewer are under way at once for a while.

    Parameters
    ----------
    concurrent : int
        The most requests under way at once.
    requests_per_minute, tokens_per_minute : int, optional
        None for no limit.
    clock : callable
        Replacement for tests; waits go through ``retries.pause``.

    Examples
    --------
    >>> throttle = Throttle(concurrent=2)
    >>> with throttle.turn(tokens=10, stop=threading.Event()):
    ...     throttle.under_way
    1
    """

    def __init__(
        self,
        concurrent: int,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.concurrent = concurrent
        self.under_way = 0
        self._allowed = float(concurrent)
        self._per_request = 60 / requests_per_minute if requests_per_minute else 0.0
        self._per_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._next_request = self._next_token = self._held_until = 0.0
        self._clock = clock
        self._free = threading.Condition()

    @contextlib.contextmanager
    def turn(self, tokens: int, stop: threading.Event) -> Iterator[None]:
        """Wait until a request of so many tokens may begin; it ends with the block.

        Raises
        ------
        Stopped
            If `stop` is set by then.
        """
        with self._free:
            while self.under_way >= int(self._allowed) and not stop.is_set():
                self._free.wait(0.05)
            self.under_way += 1
        try:
            obeyed = self._obey(0.0)
            start = self._reserve(tokens)
            if start > 0:
                retries.pause(start)
            self._obey(obeyed)
            if stop.is_set():
                raise Stopped
            yield
        finally:
            with self._free:
                self.under_way -= 1
                self._free.notify()

    def hold(self, seconds: float) -> None:
        """Let no request begin for so long, and halve how many may be under way at once."""
        with self._free:
            now = self._clock()
            if now >= self._held_until:  # several refusals at once are one
                self._allowed = max(1.0, self._allowed / 2)
            self._held_until = max(self._held_until, now + seconds)

    def succeeded(self) -> None:
        """Note an answer: step by step as many requests as before may be under way."""
        with self._free:
            self._allowed = min(float(self.concurrent), self._allowed + 1 / self._allowed)
            self._free.notify()

    def _reserve(self, tokens: int) -> float:
        """Take the next free moment, and return the seconds until then."""
        with self._free:
            now = self._clock()
            start = max(now, self._next_request, self._next_token)
            self._next_request = start + self._per_request
            self._next_token = start + self._per_token * tokens
        return start - now

    def _obey(self, seen: float) -> float:
        """Wait as long as requests are held, unless until `seen`; return until when they were."""
        while (until := self._held_until) != seen and (left := until - self._clock()) > 0:
            seen = until
            retries.pause(left)
        return seen
