"""What the benchmarks share: taking turns, figures, what else the machine did, the CSV file."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import itertools
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np

Side: TypeAlias = Callable[["np.ndarray"], tuple[float, "np.ndarray"]]  # queries: ms and ids
Times: TypeAlias = dict[str, list[list[float]]]  # ms, by side, round and search


def quantile(values: Iterable[float], share: float) -> float:
    """The value below which that share of the values lies, one of them; the median between two."""
    ordered = sorted(values)
    if share == 0.5:
        return statistics.median(ordered)
    return ordered[round(share * (len(ordered) - 1))]


def spread(values: Sequence[float], digits: int) -> dict[str, float]:
    """p20, p50 and p80, rounded."""
    return {f"p{p}": round(quantile(values, p / 100), digits) for p in (20, 50, 80)}


def turns(
    sides: dict[str, Side], rounds: list[list[np.ndarray]], fewer: dict[str, int] | None = None
) -> tuple[Times, dict[str, list[list[np.ndarray]]]]:
    """Let the sides take turns: milliseconds and ids, by side, round and search.

    `fewer` has the sides that answer only the first so many searches of a round.
    """
    times: Times = {name: [] for name in sides}
    found: dict[str, list[list[np.ndarray]]] = {name: [] for name in sides}
    for side in sides.values():
        side(rounds[0][0])
    for number, searches in enumerate(rounds):
        names = list(sides)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            some = searches[: (fewer or {}).get(name, len(searches))]
            answers = [sides[name](queries) for queries in some]
            times[name].append([ms for ms, _ in answers])
            found[name].append([ids for _, ids in answers])
    return times, found


def flat(times: list[list[float]]) -> list[float]:
    """All rounds' times in one list."""
    return list(itertools.chain.from_iterable(times))


def over(times: Times, name: str, base: str = "gpu_lance") -> float:
    """How many times the base's time a side takes: the median over rounds of medians."""
    pairs = zip(times[name], times[base], strict=True)
    return statistics.median(statistics.median(a) / statistics.median(b) for a, b in pairs)


def extra(times: Times, name: str, base: str) -> float:
    """How many milliseconds a side takes more than the base: the median over rounds."""
    pairs = zip(times[name], times[base], strict=True)
    return statistics.median(statistics.median(a) - statistics.median(b) for a, b in pairs)


def figures(times: list[float], queries: int, **more: Any) -> dict[str, Any]:
    """The row of one side: milliseconds a search, queries a second."""
    rate = round(1e3 * queries / quantile(times, 0.5), 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return {
        **more, "queries": queries, "searches": len(times), "queries_per_s": rate,
        **{f"{name}_ms": value for name, value in spread(times, 3).items()}, "peak_mb": peak,
    }  # fmt: skip


def show(row: dict[str, Any], name: str) -> None:
    """Print a row of figures."""
    print(
        f"    {name:>24}: {row['queries_per_s']:9.1f} queries/s, {row['p50_ms']:.3f} ms a search "
        f"({row['p20_ms']:.3f} to {row['p80_ms']:.3f})",
        flush=True,
    )


def stamp(libraries: Sequence[str], device: str = "cpu") -> dict[str, str]:
    """The date, the device and the versions that figures belong to."""
    cpu = f"{os.cpu_count()} cores, {platform.machine()}"
    if device.startswith("cuda"):
        import torch

        device = torch.cuda.get_device_name(device)
    return {
        "date": datetime.date.today().isoformat(),
        "device": f"{device}, {cpu}",
        **{name: _version(name) for name in libraries},
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def write_csv(path: Path, rows: Sequence[dict[str, Any]], stamp: dict[str, str]) -> None:
    """The rows, each with the stamp; a row may lack columns that others have."""
    fields = dict.fromkeys(name for row in rows for name in row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*fields, *stamp])
        writer.writeheader()
        writer.writerows({**row, **stamp} for row in rows)


class Others:
    """How much of the machine other processes used meanwhile, from 0 to 1; None off Linux.

    A benchmark of milliseconds on a busy machine measures its scheduler.
    """

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        try:
            parts = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        ticks = os.sysconf("SC_CLK_TCK")
        idle = (int(parts[3]) + int(parts[4])) / ticks
        own = os.times()
        children = own.children_user + own.children_system
        return sum(map(int, parts)) / ticks, idle, time.process_time() + children

    def share(self, helpers: float = 0.0) -> float | None:
        """Of the time since it was made; `helpers` are CPU seconds of processes of our own."""
        now = self._now()
        if now is None or self._start is None:
            return None
        total, idle, own = (b - a for a, b in zip(self._start, now, strict=True))
        return round(max(0.0, (total - idle - own - helpers) / total), 3) if total else 0.0
