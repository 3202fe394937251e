"""Dealing the rows of a matrix on the CPU out to threads.

A library's own threads meet at a barrier after each small piece of work, which on a busy machine
waits for whoever was not scheduled; and FAISS's share one query among them three times slower
than a single thread streams it. Threads of ours take one slice each and meet once.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from gpu_lance.optional import require

T = TypeVar("T")

SLICE_BYTES = 4 << 20  # a thread gets at least as much


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:  # the threads of a parent do not survive a fork
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="gpu_lance rows")


def in_slices(rows: int, row_bytes: int, work: Callable[[int, int], T]) -> list[T]:
    """The results of ``work(start, stop)`` for slices that make up all rows, in their order.

    As many threads as torch uses take part, the calling one among them.

    Parameters
    ----------
    rows : int
        At least 1.
    row_bytes : int
        That are read for each; small matrices are not worth a thread.
    work : callable
        Releases the interpreter's lock for most of its time. Its error is raised here, after
        all slices have ended.

    Examples
    --------
    >>> in_slices(10, 1, lambda start, stop: (start, stop))
    [(0, 10)]
    """
    torch = require("torch", extra="cpu|cuda13|cuda12")
    count = min(torch.get_num_threads(), rows, rows * row_bytes // SLICE_BYTES)
    if count <= 1:
        return [work(0, rows)]
    bounds = [rows * i // count for i in range(count + 1)]
    pool = _pool(os.getpid())
    others: list[Future[T]] = []
    with contextlib.suppress(RuntimeError):  # an interpreter that is ending takes no more
        for i in range(1, count):
            others.append(pool.submit(work, bounds[i], bounds[i + 1]))  # noqa: PERF401
    try:
        first = work(bounds[0], bounds[1])
        last = [work(bounds[i], bounds[i + 1]) for i in range(1 + len(others), count)]
    finally:
        for other in others:  # they hold pointers to the caller's tensors
            other.exception()
    return [first, *(other.result() for other in others), *last]
