"""One worker per device: turns, merging, whose error it is, and how callers leave."""

from __future__ import annotations

import gc
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
import torch

from gpu_lance.errors import DeviceError, QueryError
from gpu_lance.index import worker as module
from gpu_lance.index.base import SearchResult
from gpu_lance.index.worker import MAX_TOGETHER, Worker

CPU = torch.device("cpu")
SECONDS = 60  # for what should come at once; a hang fails instead of stopping the tests
D = 8


def brute(rows: np.ndarray, queries: np.ndarray, k: int) -> SearchResult:
    """Squared distances of small whole numbers, which are exact in any order of summing."""
    distances = ((queries[:, None] - rows[None]) ** 2).sum(-1)
    result = SearchResult.empty(len(queries), k)
    for i, row in enumerate(distances):
        best = np.lexsort((np.arange(len(row)), row))[:k]
        result.row_ids[i, : len(best)] = best
        result.distances[i, : len(best)] = row[best]
    return result


class Rows:
    """A searchable set of rows that notes the queries, k and thread of each run."""

    def __init__(self, n: int = 50, seed: int = 0) -> None:
        self.rows = np.random.default_rng(seed).integers(-9, 10, (n, D)).astype(np.float32)
        self.runs: list[tuple[int, int]] = []
        self.threads: list[threading.Thread] = []

    def __call__(self, queries: torch.Tensor, k: int) -> SearchResult:
        self.runs.append((len(queries), k))
        self.threads.append(threading.current_thread())
        if bool(queries.isnan().any()):
            raise ValueError("a query holds NaN")
        return brute(self.rows, queries.numpy(), k)


class Inbox(queue.SimpleQueue):
    """Says when a request has come."""

    def __init__(self) -> None:
        # not a Semaphore: a Ctrl-C within its Python code leaves it locked
        self.arrived: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def put(self, item, block=True, timeout=None):
        super().put(item)
        self.arrived.put(True)


class Held:
    """A worker of its own that is kept busy until :meth:`go`."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.worker = Worker(CPU)
        self.worker._inbox = self.inbox = Inbox()
        self._pool = pool
        self._started, self._go = threading.Event(), threading.Event()
        self.first = self.ask("held", 1, 1, self._wait)
        assert self._started.wait(SECONDS)

    def _wait(self, queries: torch.Tensor, k: int) -> SearchResult:
        self._started.set()
        assert self._go.wait(SECONDS)
        return SearchResult.empty(len(queries), k)

    def ask(self, key: str, m: int, k: int, run: Callable, value: float | None = None) -> Future:
        """Start a search of `m` queries in a thread; when this returns, the request waits."""
        future = self._pool.submit(self.worker.search, key, queries_of(m, value), k, run)
        assert self.inbox.arrived.get(timeout=SECONDS)
        return future

    def go(self) -> None:
        self._go.set()
        self.first.result(SECONDS)


def queries_of(m: int, value: float | None = None) -> torch.Tensor:
    if value is not None:
        return torch.full((m, D), value)
    return torch.randint(-9, 10, (m, D)).float()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


@pytest.fixture
def held(pool: ThreadPoolExecutor) -> Iterator[Held]:
    held = Held(pool)
    yield held
    held.go()


def assert_same(got: SearchResult, wanted: SearchResult) -> None:
    np.testing.assert_array_equal(got.row_ids, wanted.row_ids)
    np.testing.assert_array_equal(got.distances, wanted.distances)
    assert (got.row_ids.dtype, got.distances.dtype) == (np.int64, np.float32)


# -------------------------------------------------------------------- results


@pytest.mark.parametrize("idle", [module.IDLE_SECONDS, 0.0], ids=["one thread", "always leaving"])
def test_many_threads_get_what_brute_force_gives(monkeypatch, pool, idle: float):
    """With no idle time the thread leaves and is started over and over, between the requests."""
    monkeypatch.setattr(module, "IDLE_SECONDS", idle)
    sets = [Rows(50, seed=1), Rows(400, seed=2), Rows(7, seed=3)]
    worker, each, together = Worker(CPU), 40, threading.Barrier(12)
    inside = threading.Lock()

    def run_of(rows: Rows) -> Callable[[torch.Tensor, int], SearchResult]:
        def run(queries: torch.Tensor, k: int) -> SearchResult:
            assert inside.acquire(blocking=False), "two searches at a time"
            with torch.no_grad():
                found = rows(queries, k)
            inside.release()
            return found

        return run

    runs = [run_of(rows) for rows in sets]

    def work(thread: int) -> None:
        random = np.random.default_rng(thread)
        together.wait(SECONDS)
        for _ in range(each):
            which, k = int(random.integers(3)), int(random.choice([1, 3, 10, 60, 300]))
            queries = random.integers(-9, 10, (int(random.integers(0, 5)), D)).astype(np.float32)
            found = worker.search(which, torch.from_numpy(queries), k, runs[which])
            assert_same(found, brute(sets[which].rows, queries, k))

    for future in [pool.submit(work, thread) for thread in range(12)]:
        future.result(SECONDS)
    info = worker.info()
    assert info.requests == 12 * each
    assert info.runs == sum(len(rows.runs) for rows in sets) <= info.requests
    assert info.largest == max(m for rows in sets for m, _ in rows.runs)


def test_the_worker_of_a_device_is_one(pool):
    start = threading.Barrier(8)

    def of(name: str) -> Worker:
        start.wait(SECONDS)
        return Worker.of(torch.device(name))

    found = list(pool.map(of, ["cpu", "cpu:0"] * 4))
    assert {id(worker) for worker in found} == {id(Worker.of(CPU))}


def test_bad_arguments_are_refused_before_they_wait():
    worker = Worker(CPU)
    for queries, k in ((torch.zeros(D), 1), (torch.zeros(1, D), 0)):
        with pytest.raises(QueryError, match=r"\(m, d\) and k >= 1, got \("):
            worker.search("t", queries, k, Rows())
    assert worker.info().requests == 0


def test_the_settings_of_the_callers_thread_do_not_matter():
    seen = []

    def run(queries: torch.Tensor, k: int) -> SearchResult:
        seen.append((torch.is_inference_mode_enabled(), torch.empty(0).device.type))
        return SearchResult.empty(len(queries), k)

    queries = torch.ones(1, D, requires_grad=True)
    with torch.device("meta"), torch.enable_grad(), torch.autocast("cpu"):
        Worker.of(CPU).search("t", queries, 3, run)
    assert seen == [(True, "cpu")]


# -------------------------------------------------------------------- merging


def test_what_waits_runs_together(held: Held):
    rows = Rows()
    futures = [(k, held.ask("t", 1, k, rows, value=k)) for k in range(1, 9)]
    held.go()
    results = [(k, future.result(SECONDS)) for k, future in futures]
    assert rows.runs == [(8, 8)]
    info = held.worker.info()
    assert (info.requests, info.runs, info.largest) == (9, 2, 8)
    for k, found in results:
        assert_same(found, brute(rows.rows, np.full((1, D), k, np.float32), k))
        found.row_ids[:] = 7  # a caller's own
    for k, found in results:
        assert found.row_ids.base is None or found.row_ids.base.size == found.row_ids.size
        assert found.row_ids.shape == (1, k)


def test_a_run_has_no_more_queries_than_pay(held: Held):
    rows = Rows()
    sizes = [100, MAX_TOGETHER + 1, 100, 100, 56, MAX_TOGETHER]
    futures = [held.ask("t", m, 3, rows) for m in sizes]
    held.go()
    assert [future.result(SECONDS).row_ids.shape for future in futures] == [(m, 3) for m in sizes]
    assert [m for m, _ in rows.runs] == [256, MAX_TOGETHER + 1, 100, MAX_TOGETHER]


def test_a_small_k_does_not_pay_for_a_large_one(held: Held):
    rows = Rows()
    futures = [(k, held.ask("t", 1, k, rows)) for k in (10, 257, 1, 256, 1024, 100_000, 1029)]
    held.go()
    assert [future.result(SECONDS).row_ids.shape[1] for _, future in futures] == [
        k for k, _ in futures
    ]
    assert rows.runs == [(3, 256), (2, 1024), (1, 100_000), (1, 1029)]


def test_keys_run_in_the_order_of_arrival(held: Held):
    order: list[str] = []

    def note(name: str) -> Callable[[torch.Tensor, int], SearchResult]:
        def run(queries: torch.Tensor, k: int) -> SearchResult:
            order.append(f"{name}{len(queries)}")
            return SearchResult.empty(len(queries), k)

        return run

    futures = [held.ask(key, 1, 5, note(key)) for key in "baabcaab"]
    held.go()
    for future in futures:
        future.result(SECONDS)
    assert order == ["b3", "a4", "c1"]


def test_queries_of_other_types_or_lengths_run_apart(held: Held):
    seen = []

    def run(queries: torch.Tensor, k: int) -> SearchResult:
        seen.append((queries.shape, queries.dtype))
        return SearchResult.empty(len(queries), k)

    every = [torch.ones(1, 4), torch.ones(1, 4).half(), torch.ones(1, 5), torch.ones(2, 4)]
    futures = []
    for queries in every:
        futures.append(held._pool.submit(held.worker.search, "t", queries, 1, run))
        assert held.inbox.arrived.get(timeout=SECONDS)
    held.go()
    for future in futures:
        future.result(SECONDS)
    assert seen == [((3, 4), torch.float32), ((1, 4), torch.float16), ((1, 5), torch.float32)]


# --------------------------------------------------------------------- errors


def test_an_error_reaches_only_the_caller_whose_it_is(held: Held):
    rows = Rows()
    values = [1.0, float("nan"), 2.0, float("nan"), 3.0]
    futures = [held.ask("t", 1, 4, rows, value) for value in values]
    held.go()
    errors = []
    for value, future in zip(values, futures, strict=True):
        if np.isnan(value):
            errors.append(future.exception(SECONDS))
        else:
            wanted = brute(rows.rows, np.full((1, D), value, np.float32), 4)
            assert_same(future.result(SECONDS), wanted)
    assert [m for m, _ in rows.runs] == [5, 1, 1, 1, 1, 1]
    assert held.worker.info().requests == 6
    for error in errors:
        assert isinstance(error, ValueError) and str(error) == "a query holds NaN"
        names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        assert names[-1] == "__call__" and "search" in names
        assert error.__context__ is None
    assert errors[0] is not errors[1]


class Odd(Exception):
    """Cannot be copied: its arguments are not those of its class."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one}{two}")


@pytest.mark.parametrize(
    ("error", "kinds"),
    [(KeyError("same"), {KeyError}), (Odd(4, 2), {Odd, DeviceError})],
    ids=["copied", "not to be copied"],
)
def test_no_two_callers_raise_one_object(held: Held, error: Exception, kinds: set[type]):
    def run(queries: torch.Tensor, k: int) -> SearchResult:
        raise error

    futures = [held.ask("t", 1, 1, run) for _ in range(3)]
    held.go()
    errors = [future.exception(SECONDS) for future in futures]
    assert len({id(one) for one in errors}) == 3
    assert {type(one) for one in errors} == kinds
    assert all(("42" if Odd in kinds else "same") in str(one) for one in errors)


def test_a_merged_result_of_the_wrong_shape_is_nobodys(held: Held):
    def run(queries: torch.Tensor, k: int) -> SearchResult:
        return SearchResult.empty(1, k)  # right for one query, wrong for two

    futures = [held.ask("t", 1, 2, run) for _ in range(2)]
    held.go()
    assert [future.result(SECONDS).row_ids.shape for future in futures] == [(1, 2), (1, 2)]
    assert held.worker.info().runs == 4


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError])
def test_no_exception_ends_the_worker(kind: type[BaseException]):
    worker, rows, threads = Worker(CPU), Rows(), []

    def run(queries: torch.Tensor, k: int) -> SearchResult:
        threads.append(threading.current_thread())
        raise kind("mine")

    with pytest.raises(kind, match="mine"):
        worker.search("t", queries_of(1), 1, run)
    worker.search("t", queries_of(1), 1, rows)
    assert threads == rows.threads


def test_a_failure_of_the_worker_itself_reaches_everyone(held: Held):
    class Unequal:
        __hash__ = object.__hash__

        def __eq__(self, other: object) -> bool:
            raise ArithmeticError("no key")

    rows = Rows()
    futures = [held.ask(Unequal(), 1, 1, rows) for _ in range(3)]
    held.go()
    for future in futures:
        error = future.exception(SECONDS)
        assert isinstance(error, DeviceError) and "no key" in str(error)
    assert_same(
        held.worker.search("t", torch.ones(1, D), 2, rows),
        brute(rows.rows, np.ones((1, D), np.float32), 2),
    )


# -------------------------------------------------------------------- callers


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals to a thread")
def test_a_caller_that_leaves_is_forgotten(held: Held):
    """A Ctrl-C in the main thread while its request waits."""
    rows, others = Rows(), Rows()
    future = held.ask("u", 1, 1, others)

    def interrupt() -> None:
        assert held.inbox.arrived.get(timeout=SECONDS)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        held.worker.search("t", queries_of(1), 1, rows)
    thread.join(SECONDS)
    after = held.ask("t", 2, 1, rows)
    held.go()
    future.result(SECONDS)
    after.result(SECONDS)
    assert rows.runs == [(2, 1)] and others.runs == [(1, 1)]
    assert held.worker.info().requests == 3


def test_a_search_inside_a_search_runs_at_once():
    worker, rows = Worker(CPU), Rows()

    def run(queries: torch.Tensor, k: int) -> SearchResult:
        inner = worker.search("inner", queries, k, rows)
        with pytest.raises(ValueError, match="NaN"):
            worker.search("inner", queries * float("nan"), k, rows)
        return inner

    queries = queries_of(2)
    assert_same(worker.search("outer", queries, 3, run), brute(rows.rows, queries.numpy(), 3))
    assert rows.threads[0] is not threading.current_thread()
    info = worker.info()
    assert (info.requests, info.runs, info.largest) == (3, 3, 2)


def test_nothing_is_kept_of_a_search():
    """A caller may free its index as soon as it has its result, or its error."""
    worker, held = Worker(CPU), []
    gc.collect()
    gc.disable()
    try:
        for value in (1.0, float("nan")):
            rows = Rows()
            queries = queries_of(1, value)
            held = [weakref.ref(rows), weakref.ref(queries)]
            try:
                worker.search("t", queries, 1, rows)
            except ValueError:
                assert np.isnan(value)
            del rows, queries
            assert [ref() for ref in held] == [None, None]
    finally:
        gc.enable()


def test_the_thread_starts_late_and_leaves_when_nothing_comes(monkeypatch):
    worker, rows = Worker(CPU), Rows()
    before = set(threading.enumerate())
    assert worker._thread is None
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.01)
    for _ in range(2):
        worker.search("t", queries_of(1), 1, rows)
        rows.threads[-1].join(SECONDS)
        assert worker._thread is None
    assert rows.threads[0] is not rows.threads[1]
    assert all(thread.daemon for thread in rows.threads)
    assert set(threading.enumerate()) <= before


def test_without_a_thread_the_caller_searches(monkeypatch):
    """As at a limit of threads, or late in an interpreter that ends."""

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    worker, rows = Worker(CPU), Rows()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        queries = queries_of(2)
        found = worker.search("t", queries, 3, rows)
        with pytest.raises(ValueError, match="NaN"):
            worker.search("t", queries * float("nan"), 3, rows)
    assert_same(found, brute(rows.rows, queries.numpy(), 3))
    worker.search("t", queries, 3, rows)
    assert [thread is threading.current_thread() for thread in rows.threads] == [True, True, False]


# ------------------------------------------------------------------ processes

COMMON = """
import atexit, os, sys, threading
import torch
from gpu_lance.errors import GpuLanceError
from gpu_lance.index.base import SearchResult
from gpu_lance.index.worker import Worker

rows = torch.ones(20_000, 64)
# made here: a daemon thread inside torch itself would end an interpreter that ends with an abort
queries = torch.ones(1, 64)
worker = Worker.of(torch.device("cpu"))

def run(queries, k):
    best = (queries @ rows.T).topk(k)
    return SearchResult(best.indices.numpy(), best.values.numpy())

def search():
    return int(worker.search("t", queries, 3, run).distances[0, 0])
"""

FORK = """
def child():
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            answer = search()
        except GpuLanceError as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writer, str(answer).encode())
        sys.exit(0)
    os.wait()
    return os.read(reader, 4096).decode()

print(child())
print(search())
print(child())
print(search())
"""

EXIT = """
def late():
    print("late", search(), flush=True)
    answer = []
    def work():
        try:
            answer.append(search())
        except GpuLanceError as error:
            answer.append(error)
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(60)
    print(type(answer[0]).__name__, answer[0])

import gpu_lance.index.worker as module
module.GRACE_SECONDS = 0.2
if sys.argv[1] == "late":
    atexit.register(late)
running = threading.Barrier(9)

def forever():
    search()
    running.wait()
    try:
        while True:
            search()
    except GpuLanceError:
        pass

for _ in range(8):
    threading.Thread(target=forever, daemon=True).start()
running.wait()
print("end", flush=True)
"""


def python(program: str, *arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", COMMON + program, *arguments],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_is_refused_and_does_not_wait():
    before, own, after, still = python(FORK)
    assert (before, own, still) == ("64", "64", "64")
    assert after.startswith("DeviceError: ") and "spawn" in after


def test_the_interpreter_ends_while_threads_search():
    assert python(EXIT, "at once") == ["end"]


def test_exit_handlers_may_search_and_wait_for_threads_that_do():
    end, late, other = python(EXIT, "late")
    assert (end, late) == ("end", "late 64")
    assert other.startswith("DeviceError ") and "The interpreter is ending" in other


# ----------------------------------------------------------------------- CUDA


@pytest.mark.gpu
def test_the_worker_waits_for_the_callers_stream():
    device = torch.device("cuda", torch.cuda.current_device())
    seen = []

    def run(queries: torch.Tensor, k: int) -> SearchResult:
        seen.append(torch.cuda.current_stream(device).cuda_stream)
        values = queries[:, :k].cpu().numpy()
        return SearchResult(values.astype(np.int64), values)

    side = torch.cuda.Stream(device)
    queries = torch.zeros(4, D, device=device)
    torch.cuda.synchronize(device)
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        queries += 3
        found = Worker.of(torch.device("cuda")).search("t", queries, 2, run)
    assert found.row_ids.tolist() == [[3, 3]] * 4
    assert Worker.of(device) is Worker.of(torch.device("cuda"))
    assert seen[0] not in (side.cuda_stream, torch.cuda.default_stream(device).cuda_stream)
