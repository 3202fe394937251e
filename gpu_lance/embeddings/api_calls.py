"""Embed many texts by requests that are limited in size, run at once, retried and divided."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue

import numpy as np

from gpu_lance.embeddings import retries
from gpu_lance.embeddings.api_connection import Connection
from gpu_lance.embeddings.api_failures import Failure, Then
from gpu_lance.embeddings.api_http import until

logger = logging.getLogger(__name__)

FEWEST = 256  # texts that are not worth being spread over several requests
PROBE = "A short sentence."  # which no server has a reason to refuse
CHECKED = 64  # refused texts after which the server is probed again
PATIENCE = 2.0  # seconds that an error waits for requests that are under way

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
        self._refusals = 0
        self._last: Failure | None = None
        self._accepted = False  # whether the server took any text
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
        if len(parts) == 1:
            self._part(texts, costs, *parts[0], out)
        else:
            self._at_once([partial(self._part, texts, costs, *part, out) for part in parts])
        if self._last is not None and not self._accepted:
            self._probe(self._last)
        return dict(sorted(self._refused.items()))

    def _at_once(self, jobs: list[Callable[[], None]]) -> None:
        """Run all in threads; the first error stops the others, and is raised."""
        waiting = iter(jobs)  # of a list, so threads may share it
        ended: SimpleQueue[BaseException | None] = SimpleQueue()

        def work() -> None:
            error = None
            try:
                with retries.interruptible(self._stop):
                    while (job := next(waiting, None)) is not None and not self._stop.is_set():
                        job()
            except BaseException as raised:
                error = raised
            ended.put(error)

        # daemons, since a server that hangs must not keep the process from ending
        threads = [
            threading.Thread(target=work, name=f"gpu-lance-api-{i}", daemon=True)
            for i in range(min(len(jobs), self._connection.throttle.concurrent))
        ]
        for thread in threads:
            thread.start()
        try:
            for _ in threads:
                if (error := ended.get()) is not None:
                    raise error
        except BaseException:
            self._stop.set()  # ends their waits
            end = time.monotonic() + PATIENCE
            for thread in threads:
                thread.join(max(0.0, end - time.monotonic()))
            raise

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
                self._accepted = self._connection.works = True
                with self._lock:
                    self._refused.update((start + place, reason) for place, reason in bad.items())
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
        paced = end = 0.0

        def once() -> tuple[np.ndarray, dict[int, str]]:
            nonlocal failure, paced, end
            asked = time.monotonic()
            with throttle.turn(tokens, self._stop):
                if failure is None:  # what the rate limit costs is not the server's fault
                    begun = time.monotonic()
                    paced, end = begun - asked, begun + self._time_budget
                try:
                    with until(end):
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

    def _refuse(self, place: int, failure: Failure) -> None:
        """One text by itself was refused: its own fault, if others are not refused."""
        with self._lock:
            self._refused[place] = failure.reason
            self._last = failure
            self._refusals += 1
            doubtful = self._refusals > 1 and not self._accepted
            again = self._refusals >= self._check_at
            if again:
                self._check_at *= 2
        if doubtful or again:
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
        self._accepted = self._connection.works = True
