"""One worker per device, which runs every search there and runs together what waits together.

FAISS's objects on a GPU abort the process if two threads use them, so a device has one thread that
searches. On the CPU that means one team of OpenMP threads, however many threads the program has.
While a search runs, others come; those that may share a pass over the vectors then do.

The thread starts at the first search and ends when nothing has come for a while.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import functools
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from gpu_lance.device import check_threads
from gpu_lance.errors import DeviceError, QueryError
from gpu_lance.index.base import SearchResult
from gpu_lance.optional import require

if TYPE_CHECKING:
    import torch

    Run = Callable[[torch.Tensor, int], SearchResult]

logger = logging.getLogger(__name__)

EXTRAS = "cpu|cuda13|cuda12"
MAX_TOGETHER = 256  # queries; a pass over the vectors costs about the same up to there
# A larger k than was asked for costs its own top-k and rescoring, for every query of the run. Up to
# a few hundred that is little beside the pass that is saved; a thousand cost more than the pass.
SMALL_K = 64
K_FACTOR = 4
# Callers that were answered together come back one by one within moments, and the first would get a
# pass to itself: wait for them that share of the last run's time. Nobody waits after a lone search.
LINGER = 0.1
LINGER_SECONDS = 0.02
IDLE_SECONDS = 5.0
LOOK_SECONDS = 0.5
EXIT_SECONDS = 30.0  # how long the end of the program waits for the search that runs
GRACE_SECONDS = 5.0  # after that, how long other threads' searches wait before they fail


@dataclass(frozen=True)
class WorkerInfo:
    """What a worker has done so far.

    Parameters
    ----------
    requests : int
        Searches that were run, each counted once.
    runs : int
        Calls that this took, those included that failed.
    largest : int
        The most queries in one call.
    """

    requests: int
    runs: int
    largest: int


class _Request:
    """One call of :meth:`Worker.search` that waits for its result."""

    __slots__ = (
        *("abandoned", "done", "error", "k", "key", "queries", "ready"),
        *("result", "rows", "run", "shape"),
    )

    def __init__(self, key: Hashable, queries: torch.Tensor, k: int, run: Run, ready: Any) -> None:
        self.key = key
        self.queries = queries
        self.k = k
        self.run = run
        self.ready = ready  # the event after which the queries may be read, on CUDA
        self.rows = len(queries)
        self.shape = (queries.shape[1], queries.dtype, queries.device)  # equal in one run
        self.result: SearchResult | None = None
        self.error: BaseException | None = None
        self.abandoned = False
        self.done = threading.Lock()  # held until the result is there
        self.done.acquire()

    def finish(self) -> None:
        """Let go of what the caller gave, so that only the caller keeps it, and wake the caller."""
        if hasattr(self, "run"):
            del self.run, self.queries
            self.done.release()

    def outcome(self) -> SearchResult:
        if self.error is not None:
            error, self.error = self.error, None
            try:
                raise error
            finally:
                del error  # else its traceback would hold this frame, and this frame the error
        assert self.result is not None
        return self.result


class Worker:
    """Runs the searches of one device, one at a time; see :meth:`of`.

    Parameters
    ----------
    device : torch.device
        With its index, for CUDA.

    Examples
    --------
    >>> import numpy as np, torch
    >>> rows = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    >>> def run(queries, k):
    ...     nearest = torch.cdist(queries, rows).square().topk(k, largest=False)
    ...     return SearchResult(nearest.indices.numpy(), nearest.values.numpy())
    >>> worker = Worker.of(torch.device("cpu"))
    >>> worker.search("my rows", torch.tensor([[3.0, 3.0]]), 2, run).row_ids.tolist()
    [[1, 0]]
    """

    _of: ClassVar[dict[torch.device, Worker]] = {}

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._inbox: queue.SimpleQueue[_Request] = queue.SimpleQueue()
        self._starting = threading.RLock()
        self._thread: threading.Thread | None = None
        self._turn = threading.Lock()  # held while a search runs
        self._owner: int | None = None  # the thread that holds it
        self._pid = 0  # of the process whose end is looked after
        self._ending: float | None = None  # when that began
        self._last, self._took = 1, 0.0  # requests and seconds of the last run
        self._requests = self._runs = self._largest = 0

    @classmethod
    def of(cls, device: torch.device) -> Worker:
        """The worker of a device: the same in the whole process, made without starting anything."""
        torch = require("torch", extra=EXTRAS)
        device = torch.empty(0, device=device).device  # "cuda" is the current GPU
        return cls._of.get(device) or cls._of.setdefault(device, cls(device))

    def info(self) -> WorkerInfo:
        """How many searches and runs there were."""
        return WorkerInfo(self._requests, self._runs, self._largest)

    # ---------------------------------------------------------------- the caller

    def search(self, key: Hashable, queries: torch.Tensor, k: int, run: Run) -> SearchResult:
        """Have `run` called on the worker's thread, and wait for what it gives.

        Calls with equal keys that wait at the same time may become one: their queries are
        concatenated, `run` is that of the first, k is the largest, and each caller gets its own
        rows and its first k columns. Other keys wait their turn, in the order in which they came.

        If a merged run fails, each of its requests is run by itself, so that an error reaches
        only the caller whose request it is. Called from within `run`, it runs at once. `run` must
        not wait for another thread that searches on this device.

        Parameters
        ----------
        key : hashable
            Equal where one call of `run` could serve both: the same snapshot, metric and filter.
        queries : torch.Tensor
            (m, d). On CUDA the worker waits for what the caller's current stream has queued. They
            must not be changed before the result is there.
        k : int
            At least 1.
        run : callable
            ``run(queries, k)`` gives the `SearchResult` of (m, k), on the host, when everything it
            queued is done. It runs under ``torch.inference_mode()``, on CUDA with the worker's own
            stream as the current one. Its first k columns must be the result of a smaller k.

        Returns
        -------
        SearchResult
            (m, k).

        Raises
        ------
        QueryError
            If the queries are not a matrix or k is below 1.
        DeviceError
            In a process that was forked after a search, and in other threads than the main one
            while the interpreter ends.
        """
        check_threads()
        if queries.ndim != 2 or k < 1:
            raise QueryError(
                f"A search wants queries of shape (m, d) and k >= 1, got {tuple(queries.shape)} "
                f"and k = {k}."
            )
        ready = None
        if self.device.type == "cuda":
            torch = require("torch", extra=EXTRAS)
            ready = torch.cuda.current_stream(self.device).record_event()
        request = _Request(key, queries, k, run, ready)
        if self._owner == threading.get_ident():
            return self._here(request)
        try:
            self._inbox.put(request)
            if self._thread is None and not self._start():
                request.abandoned = True  # a thread of another caller may come upon it
                with self._my_turn():
                    return self._here(_Request(key, queries, k, run, ready))
            while not request.done.acquire(timeout=LOOK_SECONDS):
                pass  # here a Ctrl-C is seen that came before the wait began, or on Windows
        except BaseException:  # such as a KeyboardInterrupt: nobody waits for it any more
            request.abandoned = True
            raise
        return request.outcome()

    def _start(self) -> bool:
        """Start the thread; False if the system or an ending interpreter gives none."""
        with self._starting:
            if self._thread is not None:
                return True
            if self._pid != os.getpid():
                self._pid = os.getpid()
                atexit.register(self._end)
            self._thread = threading.Thread(
                target=self._serve, name=f"gpu_lance search {self.device}", daemon=True
            )
            try:
                self._thread.start()
            except RuntimeError:
                self._thread = None
                return False
            except BaseException:  # if it runs already, it leaves when it finds that out
                self._thread = None
                raise
            return True

    def _here(self, request: _Request) -> SearchResult:
        """Run it in this thread, whose turn it is."""
        with self._settings():
            self._alone(request)
        return request.outcome()

    # ------------------------------------------------------------ taking a turn

    @contextlib.contextmanager
    def _my_turn(self) -> Iterator[None]:
        # without an end the thread would be in torch when the interpreter goes, which aborts
        while not self._turn.acquire(timeout=self._patience()):
            if self._ending is not None and not self._patience():
                raise DeviceError("The interpreter is ending; it does not search any more.")
        self._owner = threading.get_ident()
        try:
            yield
        finally:
            self._owner = None
            self._turn.release()

    def _patience(self) -> float:
        """Seconds to wait for a turn before looking whether there will be one."""
        if self._ending is None:
            return GRACE_SECONDS
        return max(0.0, self._ending + GRACE_SECONDS - time.monotonic())

    def _end(self) -> None:
        """Let the search that runs end, and no other begin; at the exit of the interpreter.

        Later exit handlers may still search: the turn belongs to their thread from now on.
        """
        if self._pid == os.getpid() and self._turn.acquire(timeout=EXIT_SECONDS):
            self._owner = threading.get_ident()
        self._ending = time.monotonic()

    # ---------------------------------------------------------------- the thread

    @functools.cached_property
    def _stream(self) -> Any:
        torch = require("torch", extra=EXTRAS)
        return torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    @contextlib.contextmanager
    def _settings(self) -> Iterator[None]:
        torch = require("torch", extra=EXTRAS)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            if self._stream is not None:
                stack.enter_context(torch.cuda.device(self.device))
                stack.enter_context(torch.cuda.stream(self._stream))
            yield

    def _serve(self) -> None:
        """What the thread does: answer what comes, until nothing has come for a while."""
        waiting: deque[_Request] = deque()
        group: list[_Request] = []
        try:
            with self._settings():
                while self._gather(waiting):
                    group = self._choose(waiting)
                    with self._my_turn():
                        self._answer(group)
                    group = []  # idle, it holds on to nothing
        except BaseException as error:  # not of a search, whose errors go to its caller
            if self._ending is None:
                logger.warning("search worker of %s: %r", self.device, error)
            self._resign()
            while not self._inbox.empty():
                waiting.append(self._inbox.get())
            reason = str(error) if isinstance(error, DeviceError) else repr(error)
            for request in (*group, *waiting):
                request.error = DeviceError(f"No search on {self.device}: {reason}")
                request.finish()

    def _gather(self, waiting: deque[_Request]) -> bool:
        """Wait until there is a request, and take all that came; False if it is time to leave."""
        if not waiting:
            try:
                waiting.append(self._inbox.get(timeout=IDLE_SECONDS))
            except queue.Empty:
                return not self._resign()
        with contextlib.suppress(queue.Empty):
            while True:
                waiting.append(self._inbox.get_nowait())
        end = time.perf_counter() + min(LINGER * self._took, LINGER_SECONDS)
        with contextlib.suppress(queue.Empty):
            while len(waiting) < self._last and (left := end - time.perf_counter()) > 0:
                waiting.append(self._inbox.get(timeout=left))
        return True

    def _resign(self) -> bool:
        """Whether this thread may leave. A caller that puts a request looks for a thread later."""
        me = threading.current_thread()
        with self._starting:
            if self._thread is me:
                self._thread = None
                if not self._inbox.empty():
                    self._thread = me
                    return False
            return True

    @staticmethod
    def _choose(waiting: deque[_Request]) -> list[_Request]:
        """Take the first request and those that may share its run out of `waiting`."""
        alive = [request for request in waiting if not request.abandoned]
        if not alive:
            waiting.clear()
            return []
        first, *others = alive
        group, rest, rows = [first], [], first.rows
        low = high = max(first.k, SMALL_K)
        for request in others:
            k = max(request.k, SMALL_K)
            if (
                request.key == first.key
                and request.shape == first.shape
                and rows + request.rows <= MAX_TOGETHER
                and max(high, k) <= K_FACTOR * min(low, k)
            ):
                group.append(request)
                rows += request.rows
                low, high = min(low, k), max(high, k)
            else:
                rest.append(request)
        waiting.clear()
        waiting.extend(rest)
        return group

    def _answer(self, group: list[_Request]) -> None:
        start = time.perf_counter()
        if len(group) > 1 and self._together(group):
            for request in group:
                request.finish()
        else:
            given: list[BaseException] = []
            for request in group:
                if not request.abandoned:
                    self._alone(request)
                    request.error = _own(request.error, given)
                request.finish()
            given.clear()  # tracebacks may hold this frame
        self._last, self._took = len(group), time.perf_counter() - start

    def _alone(self, request: _Request) -> None:
        self._requests += 1
        try:
            self._wait_for([request])
            request.result = self._call(request.run, request.queries, request.k)
        except BaseException as error:  # the caller's, even if it is a SystemExit
            request.error = error

    def _together(self, group: list[_Request]) -> bool:
        """One run for all; False if it failed, whoever it was that made it fail."""
        torch = require("torch", extra=EXTRAS)
        try:
            self._wait_for(group)
            queries = torch.cat([request.queries for request in group])
            k = max(request.k for request in group)
            found = self._call(group[0].run, queries, k)
            if found.row_ids.shape != (len(queries), k):
                return False
            start = 0
            for request in group:
                part = slice(start, start + request.rows), slice(request.k)
                # copies: a caller may change its own, and keeps no other's alive
                request.result = SearchResult(
                    found.row_ids[part].copy(), found.distances[part].copy()
                )
                start += request.rows
        except BaseException as error:
            logger.debug("search worker: %d together failed: %r", len(group), error)
            return False
        self._requests += len(group)
        return True

    def _wait_for(self, group: list[_Request]) -> None:
        if self._stream is not None:
            for request in group:
                self._stream.wait_event(request.ready)

    def _call(self, run: Run, queries: torch.Tensor, k: int) -> SearchResult:
        self._runs += 1
        self._largest = max(self._largest, len(queries))
        return run(queries, k)


def _own(error: BaseException | None, given: list[BaseException]) -> BaseException | None:
    """The error, or a copy if another caller has it already: a traceback belongs to one thread."""
    if error is None:
        return None
    if any(error is other for other in given):
        try:
            error = copy.copy(error).with_traceback(error.__traceback__)
        except Exception:  # an exception whose arguments are not those of its class
            error = DeviceError(f"The search failed as another one did: {error!r}")
    given.append(error)
    return error
