"""A bounded queue between two stages that carries errors and the wish to stop, both ways."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Stopped(Exception):
    """The other side of a channel has given up; its own error says why."""


class Channel(Generic[T]):
    """At most `size` items on their way from one thread to another.

    The sender puts items and closes; the receiver iterates. If the sender closes with an error,
    the receiver raises it. If the receiver stops, the sender's next put raises :class:`Stopped`.

    Examples
    --------
    >>> channel = Channel(2)
    >>> channel.put("a")
    >>> channel.close()
    >>> list(channel)
    ['a']
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._stopped = False
        self._error: BaseException | None = None

    def put(self, item: T) -> None:
        """Wait for room and hand the item over; Stopped if nobody will take it."""
        with self._changed:
            while len(self._items) >= self._size and not self._stopped:
                self._changed.wait()
            if self._stopped:
                raise Stopped
            self._items.append(item)
            self._changed.notify_all()

    def close(self, error: BaseException | None = None) -> None:
        """No more items will come; with an error, the receiver drops what waits and raises it."""
        with self._changed:
            self._closed = True
            if error is not None:
                self._error = error
                self._items.clear()
            self._changed.notify_all()

    def stop(self) -> None:
        """The receiver wants no more."""
        with self._changed:
            self._stopped = True
            self._items.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        while True:
            with self._changed:
                while not self._items and not self._closed:
                    self._changed.wait()
                if self._error is not None:
                    raise self._error
                if not self._items:
                    return
                item = self._items.popleft()
                self._changed.notify_all()
            yield item


class Stage(threading.Thread, Generic[T]):
    """A thread that runs one function and keeps what it returned or raised.

    Examples
    --------
    >>> stage = Stage("answer", lambda: 42)
    >>> stage.result()
    42
    """

    def __init__(self, name: str, run: Callable[[], T]) -> None:
        super().__init__(name=f"gpu_lance-{name}", daemon=True)
        self._run = run
        self._result: T
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._run()
        except BaseException as error:
            self.error = error

    def result(self) -> T:
        """Wait for the end; the function's result, or its error."""
        self.join()
        if self.error is not None:
            raise self.error
        return self._result
