"""Embed many texts by requests that are limited in size, run at once, retried and divided."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

import numpy as np

from gpu_lance.embeddings import retries
from gpu_lance.embeddings.api_connection import Connection
from gpu_lance.embeddings.api_failures import Failure, Then
from gpu_lance.embeddings.throttle import Stopped

logger = logging.getLogger(__name__)

FEWEST = 256  # texts that are not worth being spread over several requests
PROBE = "A short sentence."  # which no server has a reason to refuse
CHECKED = 64  # refused texts after which the server is probed again

# Texts and their tokens in, (n, d) float32 and the reasons of bad rows out.
Ask = Callable[[list[str]], tuple[np.ndarray, dict[int, str]]]


def count_tokens(text: str) -> int:
    """Estimate the tokens of a text, rather too many than too few.

    A third of its letters where they are ASCII; more for others, up to two an emoji.

    Examples
    --------
    >>> count_tokens("to be or not to be"), count_tokens("猫が好き")
    (7, 7)
    """
    if text.isascii():
        return len(text) // 3 + 1
    return (2 * len(text.encode("utf-8", "replace")) - len(text)) // 3 + 1


def divide(
    costs: Sequence[int], *, most: int, tokens: int | None, item_tokens: int | None, at_once: int
) -> list[tuple[int, int]]:
    """Cut texts into requests, in order.

    Parameters
    ----------
    costs : sequence of int
        The tokens of each text.
    most, tokens : int
        Limits of a request.
    item_tokens : int
        A text of more goes alone, since it may be refused.
    at_once : int
        How many requests may be under way: many texts are spread over so many.

    Returns
    -------
    list of (int, int)
        Where each request begins and ends.

    Examples
    --------
    >>> divide([5, 5, 50, 5], most=10, tokens=100, item_tokens=20, at_once=4)
    [(0, 2), (2, 3), (3, 4)]
    """
    most = min(most, max(FEWEST, -(-len(costs) // at_once)))
    parts: list[tuple[int, int]] = []
    start, total = 0, 0
    for place, cost in enumerate(costs):
        alone = item_tokens is not None and cost > item_tokens
        over = tokens is not None and total + cost > tokens
        if place > start and (alone or over or place - start >= most):
            parts.append((start, place))
            start, total = place, 0
        total += cost
        if alone:
            parts.append((start, place + 1))
            start, total = place + 1, 0
    if start < len(costs):
        parts.append((start, len(costs)))
    return parts


class Calls:
    """The requests for one list of texts; the first failure stops them all.

    Parameters
    ----------
    connection : Connection
        Whose throttle and findings they share.
    ask : callable
        Sends one request; raises Failure.
    max_retries : int
    time_budget : float
        Seconds that one request and its retries may take.
    """

    def __init__(
        self, connection: Connection, ask: Ask, *, max_retries: int, time_budget: float
    ) -> None:
        self._connection = connection
        self._ask = ask
        self._max_retries = max_retries
        self._time_budget = time_budget
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._refused: dict[int, str] = {}
        self._doubted: list[Failure] = []
        self._check_at = CHECKED

    def run(
        self, texts: list[str], costs: list[int], parts: list[tuple[int, int]], out: np.ndarray
    ) -> dict[int, str]:
        """Write the vectors into `out` (n, d), and return the reasons of texts without one.

        Raises
        ------
        Failure
            The first that is not the fault of a single text.
        """

        def work(start: int, end: int) -> None:
            with retries.interruptible(self._stop):
                self._part(texts, costs, start, end, out)

        if len(parts) == 1:
            self._part(texts, costs, *parts[0], out)
        else:
            workers = min(len(parts), self._connection.throttle.concurrent)
            with ThreadPoolExecutor(workers, thread_name_prefix="gpu-lance-api") as pool:
                futures = [pool.submit(work, start, end) for start, end in parts]
                try:
                    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                    _raise_first(done)
                except BaseException:
                    self._stop.set()  # ends their waits; leaving the block waits for the rest
                    for future in futures:
                        future.cancel()
                    raise
        if self._doubted and not self._connection.works:
            self._probe(self._doubted[0])
        return dict(sorted(self._refused.items()))

    def _part(
        self, texts: list[str], costs: list[int], start: int, end: int, out: np.ndarray
    ) -> None:
        """One request; one that is refused is halved until the texts to blame are left."""
        waiting = [(start, end)]
        divided = blamed = False
        by_size = True
        largest = 0
        while waiting:
            start, end = waiting.pop()
            middle = (start + end) // 2
            most = self._connection.most
            if most is not None and end - start > most:
                waiting += [(middle, end), (start, middle)]
                continue
            refusal = None
            try:
                vectors, bad = self._answer(texts[start:end], sum(costs[start:end]))
            except Failure as failure:
                if failure.then is not Then.DIVIDE:
                    raise
                refusal = failure
            if refusal is None:
                out[start:end] = vectors
                largest = max(largest, end - start)
                self._connection.works = True
                for place, reason in bad.items():
                    self._blame(start + place, reason)
            elif end - start > 1:
                divided = True
                by_size = by_size and "token" not in refusal.mentions
                waiting += [(middle, end), (start, middle)]
            else:
                blamed = True
                self._refuse(start, refusal)
        if divided and not blamed and by_size:
            self._connection.most = min(largest, self._connection.most or largest)
            logger.info("The server takes at most about %d texts in a request.", largest)

    def _answer(self, texts: list[str], tokens: int) -> tuple[np.ndarray, dict[int, str]]:
        """Ask, and ask again while that can help."""
        throttle = self._connection.throttle
        failure: Failure | None = None
        paced = 0.0

        def once() -> tuple[np.ndarray, dict[int, str]]:
            nonlocal failure, paced
            asked = time.monotonic()
            with throttle.turn(tokens, self._stop):
                if failure is None:  # what the rate limit costs is not the server's fault
                    paced = time.monotonic() - asked
                try:
                    answer = self._ask(texts)
                except Failure as error:
                    failure = error
                    raise
            throttle.succeeded()
            return answer

        def rest(seconds: float) -> None:
            if failure is not None and failure.for_all:
                throttle.hold(seconds)
            else:
                retries.pause(seconds)

        return retries.retry_with_exponential_backoff(
            once,
            max_retries=self._max_retries,
            time_budget=self._time_budget,
            retriable=lambda error: isinstance(error, Failure) and error.then is Then.AGAIN,
            sleep=rest,
            clock=lambda: time.monotonic() - paced,
        )()

    def _blame(self, place: int, reason: str) -> None:
        with self._lock:
            self._refused[place] = reason

    def _refuse(self, place: int, failure: Failure) -> None:
        """One text by itself was refused: its own fault, if others are not refused."""
        self._blame(place, failure.reason)
        with self._lock:
            doubtful = not self._connection.works
            if doubtful:
                self._doubted.append(failure)
            again = len(self._refused) >= self._check_at
            if again:
                self._check_at *= 2
            ask = again or (doubtful and len(self._doubted) > 1)
        if ask:
            self._probe(failure)

    def _probe(self, failure: Failure) -> None:
        """Raise what was said of a text if the server refuses every text."""
        refused = None
        try:
            self._answer([PROBE], count_tokens(PROBE))
        except Failure as error:
            if error.then is not Then.DIVIDE:
                raise
            refused = error
        if refused is not None:
            raise Failure(
                f"the server refuses every text, also {PROBE!r}; of the last it said: "
                f"{refused.reason}",
                Then.GIVE_UP,
                failure.status_code,
            )
        self._connection.works = True
        with self._lock:
            self._doubted.clear()


def _raise_first(done: set[Future[None]]) -> None:
    """Raise what stopped the others, not what they said when they were stopped."""
    errors = [error for future in done if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
        raise error
