"""What a caller may pass as `progress`: True, a function, or a tqdm bar."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def progress_callback(progress: Any, total: int | None) -> Iterator[Callable[[int], None] | None]:
    """A function to call with the number of rows done; None if nobody wants to know.

    Parameters
    ----------
    progress : bool, callable, tqdm-like or None
        True makes a bar. A function gets a dict with ``output_rows``, ``total_rows`` (or None),
        ``elapsed_seconds`` and ``done``. A bar has its ``total`` set and its ``update`` called.
    total : int or None
        Rows in all, if that is known.

    Examples
    --------
    >>> seen = []
    >>> with progress_callback(lambda p: seen.append((p["output_rows"], p["done"])), 5) as report:
    ...     report(5)
    >>> seen
    [(5, False), (5, True)]
    """
    if progress is None or progress is False:
        yield None
        return
    start, done, owned = time.perf_counter(), 0, None
    if progress is True:
        from tqdm.auto import tqdm

        progress = owned = tqdm(total=total, unit="row")
    bar = hasattr(progress, "update") and hasattr(progress, "n")
    if not bar and not callable(progress):
        raise TypeError(
            f"progress must be a bool, a function or a tqdm bar, got a {type(progress).__name__}."
        )

    def report(rows: int, finished: bool = False) -> None:
        nonlocal done
        if bar:
            if total is not None and getattr(progress, "total", None) is None:
                progress.total = total
            progress.update(rows - done)
        else:
            progress(
                {
                    "output_rows": rows,
                    "total_rows": total,
                    "elapsed_seconds": time.perf_counter() - start,
                    "done": finished,
                }
            )
        done = rows

    try:
        yield report
        if not bar:
            report(done, True)
    finally:
        if owned is not None:
            owned.close()
