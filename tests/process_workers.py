"""The processes of tests/test_processes.py: `python process_workers.py ROLE FOLDER ...`.

A row is known by (writer, number), its vector follows from that, and it belongs to a batch of a
known size. So whoever sees rows can tell by itself whether batches are whole and distances right.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import gpu_lance
from gpu_lance import storage
from gpu_lance.errors import CommitConflictError

NAME, NDIMS = "t", 16
VECTOR = pa.list_(pa.float32(), NDIMS)
NUMBERS = ("writer", "number", "batch", "size")
SCHEMA = pa.schema([*((name, pa.int64()) for name in NUMBERS), ("vector", VECTOR)])
KEPT_ROWS = 3_000  # of more, the older half of a writer's batches is deleted
KEPT_FOR = timedelta(seconds=30)


def vectors(writer: np.ndarray, number: np.ndarray) -> np.ndarray:
    """(n, d) float32 in steps of 1/8, so that sums of their squares are exact in any order."""
    mixed = writer[:, None] * 7919 + number[:, None] * 104_729 + np.arange(NDIMS) * 1_299_709
    return ((mixed % 127 - 63) / 8).astype(np.float32)


def rows(writer: int, first: int, batch: int, size: int) -> pa.Table:
    """One batch: its rows count from `first`."""
    of, numbers = np.full(size, writer), np.arange(first, first + size)
    flat = pa.array(vectors(of, numbers).ravel())
    columns = [of, numbers, np.full(size, batch), np.full(size, size)]
    return pa.table(
        [*map(pa.array, columns), pa.FixedSizeListArray.from_arrays(flat, NDIMS)], schema=SCHEMA
    )


def say(*words: Any) -> None:
    """One line on standard output, written before anything else happens: it outlives a kill."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def write(folder: Path, writer: str, batches: str, pause: str) -> None:
    """Add batches, and say of each that was acknowledged up to which number the rows are stored.

    `pause` is the most seconds between two; without any, nobody else gets a commit in.
    """
    rng = random.Random(int(writer))
    table = gpu_lance.connect(folder, device="cpu").open_table(NAME)
    first = 0
    for batch in range(int(batches)):
        size = rng.randint(1, 40)
        table.add(rows(int(writer), first, batch, size))
        first += size
        say("added", batch, first)
        time.sleep(rng.uniform(0, float(pause)))


def maintain(folder: Path) -> None:
    """Delete whole batches, compact and clean up, until the file `stop` is there."""
    table = gpu_lance.connect(folder, device="cpu").open_table(NAME)
    while not (folder / "stop").exists():
        held = table.to_lance().to_table(columns=["writer", "batch"])
        todo: list[Any] = [table.compact_files, lambda: table.cleanup_old_versions(KEPT_FOR)]
        if held.num_rows > KEPT_ROWS:
            writer = int(pc.mode(held["writer"])[0]["mode"].as_py())
            last = int(np.median(held.filter(pc.field("writer") == writer)["batch"].to_numpy()))
            say("deleting", writer, last)
            todo.insert(0, lambda w=writer, b=last: _delete(table, w, b))
        for work in todo:
            try:
                work()
            except CommitConflictError as error:  # that is what it may say; the rest is a failure
                say("conflict", str(error).splitlines()[0])
        time.sleep(0.3)  # leaves the processors to the others


def _delete(table: Any, writer: int, last: int) -> None:
    table.delete("writer = ? AND batch <= ?", [writer, last])
    say("deleted", writer, last)


class Searcher:
    """Searches, and compares what it finds with the versions that it can have found it in."""

    def __init__(self, folder: Path) -> None:
        storage.METADATA_CACHE = 8 << 20  # full soon, so that what grows on is something else
        connection = gpu_lance.connect(folder, device="cpu")
        self.live, self.old = connection.open_table(NAME), connection.open_table(NAME)
        self.rng = np.random.default_rng(5)
        self.searches = 0
        self.versions: set[int] = set()
        self.known: dict[int, dict[str, np.ndarray]] = {}

    def of(self, version: int) -> dict[str, np.ndarray]:
        """The rows of a version, as Lance has them: each once, and every batch whole."""
        if version not in self.known:
            dataset = self.live.to_lance().checkout_version(version)
            table = dataset.scanner(columns=list(NUMBERS), with_row_id=True).to_table()
            found = {name: table[name].to_numpy().astype(np.int64) for name in table.column_names}
            keys = set(zip(found["writer"].tolist(), found["number"].tolist(), strict=True))
            assert len(np.unique(found["_rowid"])) == len(keys) == table.num_rows
            batches = np.stack([found["writer"], found["batch"], found["size"]])
            batches, counts = np.unique(batches, axis=1, return_counts=True)
            assert (batches[2] == counts).all(), f"version {version} has a part of a batch"
            self.known = {v: held for v, held in self.known.items() if v > version - 20}
            self.known[version] = found
        return self.known[version]

    def expected(self, version: int, query: np.ndarray, k: int) -> list[Any]:
        held = self.of(version)
        difference = vectors(held["writer"], held["number"]).astype(float) - query
        distances = (difference**2).sum(axis=1).astype(np.float32)
        order = np.lexsort((held["_rowid"], distances))[:k]
        columns = [held[name][order] for name in ("writer", "number", "_rowid")]
        return list(zip(*(column.tolist() for column in (*columns, distances[order])), strict=True))

    def check(self, table: Any, k: int, count: int) -> None:
        """One search of the table; `count` queries."""
        pinned = table is self.old
        before = table.version
        queries = self.rng.integers(-64, 64, (count, NDIMS)) / 8
        found = (
            table.search(queries if count > 1 else queries[0])
            .select(["writer", "number"]).with_row_id().limit(k).to_arrow()
        )  # fmt: skip
        after = before if pinned else table.version
        of = found["query_index"].to_numpy() if count > 1 else np.zeros(found.num_rows)
        columns = [found[name].to_pylist() for name in ("writer", "number", "_rowid", "_distance")]
        got: list[list[Any]] = [[] for _ in queries]
        for line, row in zip(of.astype(int).tolist(), zip(*columns, strict=True), strict=True):
            got[line].append(row)
        fitting = [
            version
            for version in range(before, after + 1)
            if got == [self.expected(version, query, k) for query in queries]
        ]
        assert fitting, self._complaint(got, before, after, queries, k)
        self.searches += 1
        self.versions.update(fitting[:1])

    def _complaint(
        self, got: list[Any], before: int, after: int, queries: np.ndarray, k: int
    ) -> str:
        lines = [f"k={k}, {len(queries)} queries, versions {before} to {after}"]
        for version in range(before, after + 1):
            for line, query in enumerate(queries):
                want = self.expected(version, query, k)
                missing, extra = set(want) - set(got[line]), set(got[line]) - set(want)
                lines.append(
                    f"version {version} has {len(self.of(version)['number'])} rows; query {line} "
                    f"found {len(got[line])}, missing {sorted(missing)[:3]}, "
                    f"extra {sorted(extra)[:3]}"
                )
        return "\n".join(lines[:20])

    def round(self) -> None:
        """A whole-table search, a nearest-rows search, a batch, and one of an older version."""
        self.check(self.live, 10, 1)
        self.check(self.live, 10, 3)
        newest = self.live.version
        self.old.checkout(max(1, newest - int(self.rng.integers(0, 6))))
        self.check(self.old, 5, 1)
        self.check(self.live, 1_000_000, 1)


def search(folder: Path) -> None:
    """Search until the file `stop` is there; a line a round: seconds, resident bytes, rows."""
    searcher = Searcher(folder)
    searcher.round()
    say("ready")
    start, page = time.monotonic(), os.sysconf("SC_PAGE_SIZE")
    stopping = False
    while not stopping:
        stopping = (folder / "stop").exists()  # then one round more
        searcher.round()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
        held = searcher.live.count_rows()
        say("round", json.dumps([time.monotonic() - start, resident, held, searcher.searches]))
    say("versions", len(searcher.versions))


if __name__ == "__main__":
    {"write": write, "maintain": maintain, "search": search}[sys.argv[1]](
        Path(sys.argv[2]), *sys.argv[3:]
    )
