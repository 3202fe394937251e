"""Helpers for writing embedding functions, under the names that LanceDB gives them."""

from __future__ import annotations

import collections
import functools
import logging
import math
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, Union

import numpy as np
import pyarrow as pa

from gpu_lance.embeddings.fetch import url_retrieve
from gpu_lance.embeddings.inputs import as_list
from gpu_lance.embeddings.retries import is_transient, retry, retry_with_exponential_backoff
from gpu_lance.errors import MissingKeyError

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "AUDIO",
    "DATA",
    "IMAGES",
    "TEXT",
    "FunctionWrapper",
    "RateLimiter",
    "api_key_not_found_help",
    "as_list",
    "is_transient",
    "retry",
    "retry_with_exponential_backoff",
    "url_retrieve",
    "weak_lru",
]

logger = logging.getLogger(__name__)

R = TypeVar("R")

DATA: TypeAlias = Union[pa.Table, "pd.DataFrame"]
TEXT: TypeAlias = str | list[str] | pa.Array | pa.ChunkedArray | np.ndarray
IMAGES: TypeAlias = str | bytes | list[str] | list[bytes] | pa.Array | pa.ChunkedArray | np.ndarray
AUDIO: TypeAlias = str | bytes | list[str] | list[bytes] | pa.Array | pa.ChunkedArray | np.ndarray


class RateLimiter:
    """Decorator that lets at most `max_calls` calls begin in any `period`; the others wait.

    Parameters
    ----------
    max_calls : float
        Rounded down, and at least 1.
    period : float
        Seconds.
    sleep, clock : callable
        Replacements for tests.

    Examples
    --------
    >>> @RateLimiter(max_calls=100, period=1.0)
    ... def embed(text):
    ...     return len(text)
    >>> embed("four")
    4
    """

    def __init__(
        self,
        max_calls: float = 1,
        period: float = 1.0,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.period = period
        self.max_calls = max(1, min(sys.maxsize, math.floor(max_calls)))
        self._sleep, self._clock = sleep, clock
        self._starts: collections.deque[float] = collections.deque()
        self._lock = threading.Lock()

    def __call__(self, func: Callable[..., R]) -> Callable[..., R]:
        @functools.wraps(func)
        def wrapper(*args: Any, **kwargs: Any) -> R:
            wait = self._reserve()
            if wait > 0:
                self._sleep(wait)
            return func(*args, **kwargs)

        return wrapper

    def _reserve(self) -> float:
        """Take the next free moment and return the seconds until then."""
        with self._lock:
            start = now = self._clock()
            if len(self._starts) >= self.max_calls:
                start = max(now, self._starts.popleft() + self.period)
            self._starts.append(start)
        return start - now


class FunctionWrapper:
    """Give a plain ``list -> list of vectors`` function batching, retries and a rate limit.

    Parameters
    ----------
    func : callable
        Takes a list of items, returns one vector for each.

    Examples
    --------
    >>> wrapped = FunctionWrapper(lambda texts: [[len(text)] for text in texts]).batch_size(2)
    >>> wrapped(["a", "bb", "ccc"])
    [[1], [2], [3]]
    """

    def __init__(self, func: Callable[[list[Any]], Any]) -> None:
        self.func = func
        self.rate_limiter_kwargs: dict[str, float] = {}
        self.retry_kwargs: dict[str, Any] = {}
        self._limiter: RateLimiter | None = None
        self._batch_size: int | None = None
        self._progress = False

    def __call__(self, text: Any) -> list[Any]:
        embed: Callable[[list[Any]], Any] = self.func
        if self.retry_kwargs:
            embed = retry(**self.retry_kwargs)(embed)
        if self._limiter is not None:
            embed = self._limiter(embed)
        return [vector for batch in self.to_batches(as_list(text)) for vector in embed(batch)]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(func={self.func})"

    def rate_limit(self, max_calls: float = 0.9, period: float = 1.0) -> FunctionWrapper:
        """Let at most `max_calls` batches begin in `period` seconds, over all calls."""
        self.rate_limiter_kwargs = {"max_calls": max_calls, "period": period}
        self._limiter = RateLimiter(max_calls=max_calls, period=period)
        return self

    def retry(
        self,
        tries: int = 10,
        delay: float = 1,
        max_delay: float = 30,
        backoff: float = 3,
        jitter: float = 1,
    ) -> FunctionWrapper:
        """Try a batch again when it raises; see :func:`retry`."""
        self.retry_kwargs = {
            "tries": tries,
            "delay": delay,
            "max_delay": max_delay,
            "backoff": backoff,
            "jitter": jitter,
        }
        return self

    def batch_size(self, batch_size: int) -> FunctionWrapper:
        """Call the function with at most `batch_size` items; all at once if never set."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
        self._batch_size = batch_size
        return self

    def show_progress(self) -> FunctionWrapper:
        """Show a progress bar of the batches."""
        self._progress = True
        return self

    def to_batches(self, arr: Any) -> Iterator[Any]:
        """Yield slices of at most `batch_size` items."""
        size = self._batch_size or max(1, len(arr))
        starts: Any = range(0, len(arr), size)
        if self._progress:
            from tqdm.auto import tqdm

            starts = tqdm(starts)
        for start in starts:
            yield arr[start : start + size]


def weak_lru(maxsize: int = 128) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Decorate a method to remember its last `maxsize` results without keeping objects alive.

    Results are kept by object identity and arguments, so they survive a change of the object's
    hash, and go when the object goes.

    Examples
    --------
    >>> class Square:
    ...     @weak_lru(maxsize=2)
    ...     def of(self, x):
    ...         return x * x
    >>> Square().of(3)
    9
    """

    def decorate(func: Callable[..., R]) -> Callable[..., R]:
        cache: collections.OrderedDict[Any, R] = collections.OrderedDict()
        owners: dict[int, weakref.finalize[Any, Any]] = {}
        lock = threading.RLock()  # a finaliser may run while this very thread holds it

        def forget(owner: int) -> None:
            with lock:
                owners.pop(owner, None)
                for key in [key for key in cache if key[0] == owner]:
                    cache.pop(key, None)

        @functools.wraps(func)
        def inner(self: Any, *args: Any, **kwargs: Any) -> R:
            key = (id(self), args, tuple(sorted(kwargs.items())))
            with lock:
                if id(self) not in owners:
                    owners[id(self)] = weakref.finalize(self, forget, id(self))
                    owners[id(self)].atexit = False
                if key in cache:
                    cache.move_to_end(key)
                    return cache[key]
            value = func(self, *args, **kwargs)
            with lock:
                cache[key] = value
                while len(cache) > maxsize:
                    cache.popitem(last=False)
            return value

        return inner

    return decorate


def api_key_not_found_help(provider: str) -> None:
    """Raise MissingKeyError (a ValueError) that names the environment variable to set.

    Examples
    --------
    >>> api_key_not_found_help("openai")
    Traceback (most recent call last):
    gpu_lance.errors.MissingKeyError: No API key for openai: set the environment variable \
OPENAI_API_KEY, or pass api_key='$var:name' after registry.set_var('name', key).
    """
    logger.error("Could not find an API key for %s", provider)
    name = provider.upper().replace("-", "_")
    raise MissingKeyError(
        f"No API key for {provider}: set the environment variable {name}_API_KEY, or pass "
        "api_key='$var:name' after registry.set_var('name', key)."
    )
