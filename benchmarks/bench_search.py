"""Exact search through `table.search`, ids fetched: queries a second beside LanceDB's exact search.

All sides search the same vectors in one run and take turns; medians of their times are compared.
Ours and LanceDB read the same table folder; bare FAISS has the matrix in memory and no table, so
the difference to it is what a table costs. Row ids are compared first: nothing is reported if one
differs by more than a tie.

    python benchmarks/bench_search.py [--cases exact,filtered,...] [--rounds 12] [--out results.csv]

Cases: exact, metrics, filtered, following, threads, memory, large.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from measuring import (
    Others,
    Side,
    extra,
    figures,
    flat,
    over,
    quantile,
    show,
    stamp,
    turns,
    write_csv,
)
from search_sides import Bare, Corpus, Ours, Theirs, agree, exact, in_threads

LIBRARIES = ("torch", "faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs", "lancedb", "pylance", "gpu-lance")
BURST = 5  # searches in a row, as a server has them
BATCH = 100
LEAST = {1: 7.0, BATCH: 10.0}  # times LanceDB's queries a second
OVERHEAD_MS = 1.5  # over bare FAISS, of one query
FILTERED = 2.0  # times the unfiltered search's time
LOAD_GB_S = 0.7
LOADS = 5
SHARES = (0.001, 0.01, 0.1, 0.5)


@dataclass
class Run:
    """What the cases share, and what they report."""

    folder: Path
    device: str
    rounds: int
    rows: int
    large: int
    ndims: int
    theirs: Theirs
    report: list[dict[str, Any]] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)

    @contextmanager
    def corpus(self, data: str, rows: int | None = None) -> Iterator[Corpus]:
        """A table that lasts as long as its case."""
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            corpus = Corpus(Path(place), rows or self.rows, self.ndims, data)
            corpus.write()
            yield corpus

    def want(self, what: str, value: float, least: float = 0.0, most: float = np.inf) -> None:
        """Note a target that was missed."""
        if not least <= value <= most:
            goal = f"at least {least:g}" if value < least else f"at most {most:g}"
            self.missed.append(f"{what} is {value:.2f}, wanted {goal}")


# ---------------------------------------------------------------------------------- the cases


def beside(
    run: Run, case: str, corpus: Corpus, ours: Ours, bare: Bare, metric: str, m: int,
    rounds: int, lancedb: bool = True, aims: bool = False,
) -> None:  # fmt: skip
    """One way of searching a table, every side of it."""
    others, cpu = Others(), run.theirs.cpu_seconds()
    burst = BURST if m == 1 else 2
    searches = [[corpus.queries(m) for _ in range(burst)] for _ in range(rounds)]
    sides: dict[str, Side] = {
        "gpu_lance": lambda q: ours.search(q, metric),
        "faiss": lambda q: bare.search(q, 20),
        "faiss blas": lambda q: bare.search(q, 1),
        "take": lambda q: taken(ours, bare, q),
    }
    if lancedb:
        sides["lancedb"] = lambda q: run.theirs.search(corpus, q, metric)
    times, found = turns(sides, searches, {"lancedb": 2 if m == 1 else 1, "take": 2})
    same = dict.fromkeys(sides, 0)
    for name in ("faiss", "faiss blas", "lancedb"):
        for one, ours_found, their_found in zip(
            searches, found["gpu_lance"], found.get(name, []), strict=name in found
        ):
            for queries, a, b in zip(one, ours_found, their_found, strict=False):
                same[name] += agree(corpus, queries, metric, a, b)
    for queries, ids in zip(searches[0], found["gpu_lance"][0], strict=True):
        if not np.array_equal(exact(corpus, queries[0], metric), ids[0]):
            raise SystemExit("The rows are not those of numpy in float64. Nothing is reported.")
    best = min(("faiss", "faiss blas"), key=lambda name: quantile(flat(times[name]), 0.5))
    noise = others.share(run.theirs.cpu_seconds() - cpu)
    print(f"\n{case}: {corpus.rows} x {corpus.ndims} {corpus.data}, {metric}, {m} at a time "
          f"(other processes took {noise} of the machine)")  # fmt: skip
    if lancedb:
        ratio = over(times, "lancedb")
        print(f"  {ratio:.2f}x LanceDB's queries/s; same order for "
              f"{same['lancedb']} of {m * sum(map(len, found['lancedb']))}")  # fmt: skip
        if aims:
            run.want(f"{case}, {m} at a time: times LanceDB's queries/s", ratio, LEAST[m])
    overhead = extra(times, "gpu_lance", best) / m
    print(f"  {overhead:+.3f} ms a query over bare FAISS ({best}), in which Lance's take of "
          f"{10 * m} rows is {quantile(flat(times['take']), 0.5) / m:.3f}")  # fmt: skip
    if aims and m == 1:
        run.want(f"{case}: ms a query over bare FAISS", overhead, -np.inf, OVERHEAD_MS)
    for name in sides:
        row = figures(
            flat(times[name]), m, case=case, side=name, rows=corpus.rows, ndims=corpus.ndims,
            data=corpus.data, metric=metric, others=noise,
            ours_over_it=None if name in ("gpu_lance", "take") else round(over(times, name), 3),
            overhead_ms=round(overhead, 3) if name == best else None,
            same_order=round(same[name] / m / sum(map(len, found[name])), 4)
            if name not in ("gpu_lance", "take") else None,
        )  # fmt: skip
        run.report.append(row)
        show(row, name)


def taken(ours: Ours, bare: Bare, queries: np.ndarray) -> tuple[float, np.ndarray]:
    """Lance's fetch of the rows alone, after a search that has been through the caches."""
    import pyarrow as pa

    _, ids = bare.search(queries, 1)
    dataset = ours.table.to_lance()
    start = time.perf_counter()
    dataset._take_rows(pa.array(ids.reshape(-1).astype(np.uint64)), columns=["id", "_rowid"])
    return 1e3 * (time.perf_counter() - start), ids


def case_exact(run: Run) -> None:
    """One query and batches of 100, by l2, of both kinds of vectors."""
    for data in ("normal", "unit"):
        with run.corpus(data) as corpus:
            run.theirs.check_exact(corpus)
            ours, bare = Ours(corpus, run.device), Bare(corpus, "l2", run.device)
            for m in (1, BATCH):
                rounds = run.rounds if m == 1 else max(2, run.rounds // 4)
                beside(run, "exact", corpus, ours, bare, "l2", m, rounds, aims=True)
            ours.close()


def case_metrics(run: Run) -> None:
    """The other metrics, one query at a time."""
    with run.corpus("normal") as corpus:
        ours = Ours(corpus, run.device)
        for metric in ("cosine", "dot"):
            bare = Bare(corpus, metric, run.device)
            beside(run, "metrics", corpus, ours, bare, metric, 1, max(2, run.rounds // 2))
        ours.close()


def case_filtered(run: Run) -> None:
    """A condition on an integer column: the first time, and once its bitmap is known."""
    with run.corpus("normal") as corpus:
        ours = Ours(corpus, run.device)
        wheres = {share: f"rank < {round(share * corpus.rows)}" for share in SHARES}
        fresh = itertools.count(1)
        for m in (1, BATCH):
            others, cpu = Others(), run.theirs.cpu_seconds()
            sides: dict[str, Side] = {"unfiltered": lambda q: ours.search(q)}
            for share, where in wheres.items():
                sides[f"{share:.1%}"] = lambda q, where=where: ours.search(q, where=where)
                if m == 1:
                    sides[f"{share:.1%} first"] = lambda q, where=where: ours.search(
                        q, where=f"{where} AND rank >= -{next(fresh)}"
                    )
                    sides[f"{share:.1%} lancedb"] = lambda q, where=where: run.theirs.search(
                        corpus, q, where=where
                    )
            burst = BURST if m == 1 else 2
            rounds = max(2, run.rounds // (1 if m == 1 else 4))
            searches = [[corpus.queries(m) for _ in range(burst)] for _ in range(rounds)]
            times, found = turns(sides, searches, {n: 1 for n in sides if " " in n})
            for share in SHARES:
                passing = corpus.rank < round(share * corpus.rows)
                for queries, ids in zip(searches[0], found[f"{share:.1%}"][0], strict=True):
                    if not np.array_equal(exact(corpus, queries[0], "l2", passing), ids[0]):
                        raise SystemExit(f"Filtered to {share:.1%}, the rows differ from numpy's.")
            noise = others.share(run.theirs.cpu_seconds() - cpu)
            print(f"\nfiltered: {corpus.rows} x {corpus.ndims} normal, l2, {m} at a time (other "
                  f"processes took {noise} of the machine)")  # fmt: skip
            for share in SHARES:
                ratio = over(times, f"{share:.1%}", "unfiltered")
                print(f"  {ratio:.2f}x the unfiltered search's time at {share:.1%}")
                run.want(f"filtered at {share:.1%}, {m}: times unfiltered", ratio, 0, FILTERED)
            for name in sides:
                row = figures(
                    flat(times[name]), m, case="filtered", side=name, rows=corpus.rows,
                    ndims=corpus.ndims, data="normal", metric="l2", others=noise,
                    time_over_unfiltered=round(over(times, name, "unfiltered"), 3),
                )  # fmt: skip
                run.report.append(row)
                show(row, name)
        ours.close()


def case_large(run: Run) -> None:
    """A table ten times as large: how fast it loads from warm files, how searching grows."""
    with run.corpus("normal", run.large) as corpus:
        loads, fills = [], []
        others = Others()
        for _ in range(LOADS):
            for file in corpus.path.rglob("*.lance"):
                with file.open("rb") as stream:
                    while stream.read(1 << 24):
                        pass
            start = time.perf_counter()
            np.empty(corpus.nbytes, np.uint8).fill(1)  # what the system takes to give the memory
            fills.append(1e3 * (time.perf_counter() - start))
            ours = Ours(corpus, run.device)
            first, _ = ours.search(corpus.queries(1))
            later = statistics.median(ours.search(corpus.queries(1))[0] for _ in range(3))
            loads.append(first - later)
            if len(loads) < LOADS:
                ours.close()
        rates = [corpus.nbytes / 1e6 / ms for ms in loads]
        rate = statistics.median(rates)
        print(f"\nlarge: {corpus.rows} x {corpus.ndims} loads at {rate:.2f} GB/s "
              f"({min(rates):.2f} to {max(rates):.2f}; new memory alone is filled at "
              f"{corpus.nbytes / 1e6 / statistics.median(fills):.2f}; other processes took "
              f"{others.share()} of the machine)")  # fmt: skip
        run.want("large: GB/s loaded", rate, LOAD_GB_S)
        run.report.append(
            figures(
                loads, 1, case="load", side="gpu_lance", rows=corpus.rows, ndims=corpus.ndims,
                data="normal", metric="l2", gb_per_s=round(rate, 3), others=others.share(),
            )
        )  # fmt: skip
        bare = Bare(corpus, "l2", run.device)
        for m in (1, BATCH):
            beside(
                run, "large", corpus, ours, bare, "l2", m, max(2, run.rounds // 4), lancedb=m == 1
            )
        ours.close()


def case_following(run: Run) -> None:
    """The first search after 1,000 rows changed, committed by this handle or by another."""
    import lance
    import pyarrow as pa

    n = 1000
    with run.corpus("normal") as corpus:
        ours = Ours(corpus, run.device)
        usual = statistics.median(ours.search(corpus.queries(1))[0] for _ in range(10))
        ids = itertools.count(corpus.rows, n)
        marks = itertools.count(1)

        def rows(start: int) -> Any:
            vectors = corpus.queries(n)
            return vectors, pa.Table.from_batches([corpus.batch(vectors, start)])

        def own_add() -> tuple[np.ndarray, int]:
            vectors, table = rows(start := next(ids))
            ours.table.add(table)
            return vectors[:1], start

        def append() -> tuple[np.ndarray, int]:
            vectors, table = rows(start := next(ids))
            lance.write_dataset(table, str(corpus.path), mode="append")
            return vectors[:1], start

        def update() -> tuple[np.ndarray, int]:
            mark = next(marks)
            lance.dataset(str(corpus.path)).update({"text": "'new'"}, where=f"id % 100 = {mark}")
            return corpus.matrix[mark : mark + 1], mark

        def update_vectors() -> tuple[np.ndarray, int]:
            vectors, table = rows(start := n * next(marks))
            merge = lance.dataset(str(corpus.path)).merge_insert("id").when_matched_update_all()
            merge.execute(table)
            return vectors[:1], start

        def delete() -> tuple[np.ndarray, int]:
            mark = next(marks)
            lance.dataset(str(corpus.path)).delete(f"id % 100 = {mark} AND id < {corpus.rows}")
            return corpus.matrix[mark : mark + 1], -mark

        others = Others()
        changes = (own_add, append, update, update_vectors, delete)
        times: dict[str, list[float]] = {change.__name__: [] for change in changes}
        for _ in range(max(3, run.rounds // 3)):
            for change in changes:
                query, expected = change()
                ms, found = ours.search(query)
                times[change.__name__].append(ms)
                if (found[0, 0] == abs(expected)) != (expected >= 0):
                    raise SystemExit(f"After {change.__name__}, {found[0, 0]} was found.")
        print(f"\nfollowing: the first search after {n} rows changed (a search takes "
              f"{usual:.1f} ms; other processes took {others.share()} of the machine)")  # fmt: skip
        for name, ms in times.items():
            row = figures(
                ms, 1, case="following", side=name, rows=corpus.rows, ndims=corpus.ndims,
                data="normal", metric="l2", others=others.share(),
            )  # fmt: skip
            run.report.append(row)
            show(row, name)
        ours.close()


def case_threads(run: Run) -> None:
    """Many threads searching at a time, each one query at a time."""
    with run.corpus("normal") as corpus:
        ours = Ours(corpus, run.device)
        ours.search(corpus.queries(1))
        others, cpu = Others(), run.theirs.cpu_seconds()
        counts = (1, 4, 16)
        rates: dict[tuple[str, int], list[float]] = {}
        for _ in range(max(2, run.rounds // 4)):
            for threads in counts:
                queries = corpus.queries(4 * max(counts))
                rate = in_threads(lambda q: ours.search(q), queries, threads)
                rates.setdefault(("gpu_lance", threads), []).append(rate)
                rate = run.theirs.threads(corpus, queries[: max(counts)], threads)
                rates.setdefault(("lancedb", threads), []).append(rate)
        noise = others.share(run.theirs.cpu_seconds() - cpu)
        print(f"\nthreads: {corpus.rows} x {corpus.ndims}, one query at a time each (other "
              f"processes took {noise} of the machine)")  # fmt: skip
        for (side, threads), found in rates.items():
            rate = statistics.median(found)
            print(f"    {side:>24}, {threads:2} threads: {rate:8.1f} queries/s in all")
            run.report.append(
                {
                    "case": "threads", "side": side, "rows": corpus.rows, "ndims": corpus.ndims,
                    "data": "normal", "metric": "l2", "queries": 1, "searches": len(found),
                    "threads": threads, "queries_per_s": round(rate, 1), "others": noise,
                }
            )  # fmt: skip
        ours.close()


def case_memory(run: Run) -> None:
    """A memory budget of a tenth of the vectors: slower, and the same rows."""
    import gpu_lance

    if "memory_budget" not in inspect.signature(gpu_lance.connect).parameters:
        print("\nmemory: left out, since connect takes no memory_budget")
        return
    with run.corpus("normal") as corpus:
        ours = Ours(corpus, run.device)
        small = Ours(corpus, run.device, memory_budget=corpus.nbytes // 10)
        sides: dict[str, Side] = {
            "gpu_lance": lambda q: ours.search(q),
            "a tenth": lambda q: small.search(q),
            "lancedb": lambda q: run.theirs.search(corpus, q),
        }
        others, cpu = Others(), run.theirs.cpu_seconds()
        searches = [[corpus.queries(1) for _ in range(2)] for _ in range(max(2, run.rounds // 2))]
        times, found = turns(sides, searches)
        for a, b in zip(found["gpu_lance"], found["a tenth"], strict=True):
            if not np.array_equal(a, b):
                raise SystemExit("With a tenth of the memory other rows were found.")
        noise = others.share(run.theirs.cpu_seconds() - cpu)
        ratio = over(times, "lancedb", "a tenth")
        print(f"\nmemory: with a tenth of it {ratio:.2f}x LanceDB's queries/s (other processes "
              f"took {noise} of the machine)")  # fmt: skip
        for name in sides:
            row = figures(
                flat(times[name]), 1, case="memory", side=name, rows=corpus.rows,
                ndims=corpus.ndims, data="normal", metric="l2", others=noise,
            )  # fmt: skip
            run.report.append(row)
            show(row, name)
        small.close()
        ours.close()


CASES = {
    "exact": case_exact,
    "metrics": case_metrics,
    "filtered": case_filtered,
    "following": case_following,
    "threads": case_threads,
    "memory": case_memory,
    "large": case_large,
}


def main() -> None:
    """Run the cases and write their table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--large", type=int, default=1_000_000, help="rows of the case large")
    parser.add_argument("--ndims", type=int, default=384)
    parser.add_argument("--device", default="cpu", help="cpu or cuda; ours and FAISS's")
    parser.add_argument("--folder", type=Path, help="where the tables go, for a time")
    parser.add_argument("--out", type=Path, help="a CSV file for the figures")
    args = parser.parse_args()
    if unknown := set(args.cases.split(",")) - CASES.keys():
        parser.error(f"there is no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    theirs = Theirs()
    try:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            run = Run(
                Path(folder), args.device, args.rounds, args.rows, args.large, args.ndims, theirs
            )
            for name in args.cases.split(","):
                CASES[name](run)
    finally:
        theirs.close()
    made = stamp(LIBRARIES, args.device)
    print("\n" + ", ".join(f"{name} {value}" for name, value in made.items()))
    if args.out:
        write_csv(args.out, run.report, made)
    if run.missed:
        raise SystemExit("Below the targets:\n  " + "\n  ".join(run.missed))


if __name__ == "__main__":
    main()
