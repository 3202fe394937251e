"""Wait and try again, but only where trying again can help."""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import functools
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

R = TypeVar("R")

TIME_BUDGET = 600.0  # seconds, over all tries of one call
MAX_DELAY = 60.0  # seconds, between two tries, unless the server asks for more

_TRANSIENT_STATUS = frozenset({408, 409, 429})
# By name, so that no client library is imported: requests, httpx, httpx2, urllib3, aiohttp,
# botocore, openai, cohere, google.
_TRANSIENT_NAMES = frozenset(
    """
        APIConnectionError APITimeoutError ChunkedEncodingError ClientConnectionError
        ConnectError ConnectTimeout ConnectTimeoutError ConnectionClosedError ConnectionError
        DecodingError EndpointConnectionError IncompleteRead InternalServerError NetworkError
        PoolTimeout ProtocolError RateLimitError ReadError ReadTimeout ReadTimeoutError
        RemoteProtocolError ResourceExhausted ServerDisconnectedError ServerTimeoutError
        ServiceUnavailable Timeout TimeoutException TransportError WriteError WriteTimeout
    """.split()
)
# Errors that derive from a connection error and yet cannot be cured by waiting.
_PERMANENT_NAMES = frozenset(
    """
        AuthenticationError OfflineModeIsEnabled SSLCertVerificationError SSLError
        UnsupportedProtocol
    """.split()
)
_PERMANENT_TYPES = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ImportError,
    MemoryError,
    FileNotFoundError,
    PermissionError,
)

_waiting = threading.local()


def pause(seconds: float) -> None:
    """Wait; the one place where retries do, so that a test can replace it."""
    stop: threading.Event | None = getattr(_waiting, "stop", None)
    if stop is None:
        time.sleep(seconds)
    else:
        stop.wait(seconds)


@contextlib.contextmanager
def interruptible(stop: threading.Event) -> Iterator[None]:
    """Let `stop` end every :func:`pause` of this thread early, while the block runs.

    Examples
    --------
    >>> stop = threading.Event()
    >>> stop.set()
    >>> with interruptible(stop):
    ...     pause(3600)
    """
    before = getattr(_waiting, "stop", None)
    _waiting.stop = stop
    try:
        yield
    finally:
        _waiting.stop = before


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that an error carries, or None.

    Examples
    --------
    >>> status_of(ValueError("no status"))
    """
    response = getattr(error, "response", None)
    for holder in (error, response):
        for name in ("status_code", "status", "code", "http_status"):
            value = getattr(holder, name, None)
            if isinstance(value, int) and 100 <= value <= 599:
                return int(value)
    if isinstance(response, dict):  # botocore
        value = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return value if isinstance(value, int) else None
    return None


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed a little later.

    True for HTTP 408, 409, 429 and 5xx, for connection errors and for timeouts, whichever client
    library raises them. False for everything else: bad arguments, out of memory, missing files,
    401 and 403.

    Examples
    --------
    >>> is_transient(ConnectionResetError()), is_transient(ValueError("bad text"))
    (True, False)
    """
    status = status_of(error)
    if status is not None:
        return status in _TRANSIENT_STATUS or status >= 500
    names = {base.__name__ for base in type(error).__mro__}
    if isinstance(error, _PERMANENT_TYPES) or names & _PERMANENT_NAMES:
        return False
    if isinstance(error, ConnectionError | TimeoutError) or names & _TRANSIENT_NAMES:
        return True
    reason = getattr(error, "reason", None)  # urllib's URLError wraps the real error
    return isinstance(reason, BaseException) and reason is not error and is_transient(reason)


def retry_after(error: BaseException, now: float | None = None) -> float | None:
    """Return how many seconds the server asks to wait (``Retry-After``), or None.

    Parameters
    ----------
    error : BaseException
        What the client library raised.
    now : float, optional
        Unix time, for a header that holds a date.
    """
    headers: dict[str, str] = {}
    for holder in (getattr(error, "response", None), error):
        found = getattr(holder, "headers", None)
        if found is not None and hasattr(found, "items"):
            headers.update({str(key).lower(): str(value) for key, value in found.items()})
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * unit
        except (KeyError, ValueError):
            continue
        return seconds if 0 <= seconds < float("inf") else None
    try:
        when = email.utils.parsedate_to_datetime(headers["retry-after"])
    except (KeyError, ValueError, TypeError):
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=datetime.UTC)
    return max(0.0, when.timestamp() - (time.time() if now is None else now))


def retry_with_exponential_backoff(
    func: Callable[..., R],
    initial_delay: float = 1,
    exponential_base: float = 2,
    jitter: bool = True,
    max_retries: int = 7,
    *,
    max_delay: float = MAX_DELAY,
    time_budget: float = TIME_BUDGET,
    retriable: Callable[[BaseException], bool] = is_transient,
    sleep: Callable[[float], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Callable[..., R]:
    """Wrap `func` so that a transient error makes it wait and try again.

    Parameters
    ----------
    func : callable
        What to call.
    initial_delay : float
        Seconds before the first retry; each further one waits `exponential_base` times longer,
        up to `max_delay`.
    jitter : bool
        Wait up to twice as long, by chance, so that many clients do not return at once.
    max_retries : int
        Retries after the first try; 0 disables them.
    time_budget : float
        Seconds that all tries and waits may take together; no wait is begun that would pass it.
    retriable : callable
        Which errors to retry.
    sleep, clock : callable
        Replacements for tests.

    Returns
    -------
    callable
        Same arguments and result as `func`. An error that is not retriable passes unchanged and
        at once; when retries are used up, the last error is raised with a note on them.

    Examples
    --------
    >>> tries = []
    >>> def flaky():
    ...     tries.append(1)
    ...     if len(tries) < 3:
    ...         raise ConnectionResetError
    ...     return "done"
    >>> retry_with_exponential_backoff(flaky, sleep=lambda seconds: None)()
    'done'
    """

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> R:
        start, retries = clock(), 0
        while True:
            try:
                return func(*args, **kwargs)
            except Exception as error:
                if max_retries <= 0 or not retriable(error):
                    raise
                # an exponent without a bound would overflow a float
                delay = initial_delay * exponential_base ** min(retries, 64)
                delay = min(delay * (1 + random.random() if jitter else 1), max_delay)
                wait = retry_after(error) or delay
                spent = clock() - start
                if retries >= max_retries or spent + wait > time_budget:
                    error.add_note(f"Gave up after {retries} retries in {spent:.1f} s.")
                    raise
                retries += 1
                # the message of an API's error may quote a key: it stays out of the log
                logger.warning(
                    "%s%s: retry %d of %d in %.1f s",
                    type(error).__name__,
                    "" if (status := status_of(error)) is None else f" (HTTP {status})",
                    retries,
                    max_retries,
                    wait,
                )
            (sleep or pause)(wait)

    return wrapper


def retry(
    tries: int = 10,
    delay: float = 1,
    max_delay: float = 30,
    backoff: float = 3,
    jitter: float = 1,
    *,
    retriable: Callable[[BaseException], bool] = lambda error: True,
    sleep: Callable[[float], None] | None = None,
) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Decorate a function to be tried up to `tries` times, whatever it raises.

    Parameters
    ----------
    tries : int
        Calls in all, the first included.
    delay, backoff, jitter, max_delay : float
        Before retry i (from 0) it waits ``min(delay * backoff**i + jitter, max_delay)`` seconds.
    retriable : callable
        Which errors to retry; pass :func:`is_transient` for the cautious choice.
    sleep : callable, optional
        Replacement for tests.

    Examples
    --------
    >>> @retry(tries=2, delay=0, jitter=0)
    ... def once():
    ...     return 1
    >>> once()
    1
    """

    def decorate(func: Callable[..., R]) -> Callable[..., R]:
        @functools.wraps(func)
        def wrapped(*args: Any, **kwargs: Any) -> R:
            attempt = 0
            while True:
                try:
                    return func(*args, **kwargs)
                except Exception as error:
                    if attempt + 1 >= tries or not retriable(error):
                        raise
                wait = min(delay * backoff ** min(attempt, 64) + jitter, max_delay)
                attempt += 1
                (sleep or pause)(wait)

        return wrapped

    return decorate
