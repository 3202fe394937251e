"""The sides of bench_search.py: this package, LanceDB and bare FAISS, over the same vectors.

LanceDB runs in a process of its own, so that neither side's threads and memory allocator are in
the other's way, and times itself there.
"""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

K = 10
BLOCK = 50_000  # rows that are made at a time
COLUMNS = ["id", "_distance"]
FRAGMENT = 250_000


class Corpus:
    """Vectors of one kind, in a table of Lance and, block by block, in memory.

    Columns: ``id`` counts the rows, ``rank`` is a shuffled count, so that ``rank < n`` picks n
    rows from all over the table, ``text`` is some other column, ``vector`` is float32.
    """

    def __init__(self, folder: Path, rows: int, ndims: int, data: str) -> None:
        self.folder = folder / f"{data}-{rows}"
        self.rows, self.ndims, self.data = rows, ndims, data
        self.path = self.folder / "bench.lance"
        self.rank = np.random.default_rng(2).permutation(rows)
        self._random = np.random.default_rng(3)

    @property
    def nbytes(self) -> int:
        """Of the vectors."""
        return self.rows * self.ndims * 4

    def blocks(self) -> Iterator[np.ndarray]:
        """The vectors, (n, d) float32 a block, the same each time."""
        random = np.random.default_rng(1)
        for start in range(0, self.rows, BLOCK):
            yield self._made(random, min(BLOCK, self.rows - start))

    def _made(self, random: np.random.Generator, n: int) -> np.ndarray:
        block = random.standard_normal((n, self.ndims), dtype=np.float32)
        if self.data == "unit":
            block /= np.linalg.norm(block, axis=1, keepdims=True)
        return block

    @functools.cached_property
    def matrix(self) -> np.ndarray:
        """All vectors, (n, d) float32."""
        return np.concatenate(list(self.blocks()))

    def queries(self, n: int) -> np.ndarray:
        """New query vectors, (n, d)."""
        return self._made(self._random, n)

    def batch(self, vectors: np.ndarray, start: int) -> pa.RecordBatch:
        """Rows for the table, from `start` on."""
        ids = np.arange(start, start + len(vectors))
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), self.ndims)
        rank = self.rank[ids] if ids[-1] < self.rows else ids
        return pa.record_batch(
            [pa.array(ids), pa.array(rank), pa.array([f"row {i}" for i in ids]), column],
            names=["id", "rank", "text", "vector"],
        )

    def write(self) -> None:
        """The table, written as a stream."""
        import lance

        def batches() -> Iterator[pa.RecordBatch]:
            start = 0
            for block in self.blocks():
                yield self.batch(block, start)
                start += len(block)

        stream = batches()
        first = next(stream)
        chained = (batch for part in ((first,), stream) for batch in part)
        shutil.rmtree(self.path, ignore_errors=True)
        lance.write_dataset(
            pa.RecordBatchReader.from_batches(first.schema, chained), str(self.path),
            enable_stable_row_ids=True, data_storage_version="2.2", max_rows_per_file=FRAGMENT,
        )  # fmt: skip


def as_query(queries: np.ndarray) -> Any:
    """One vector or a list of them, as both packages take them."""
    return queries[0] if len(queries) == 1 else list(queries)


class Ours:
    """This package, through its public API."""

    def __init__(self, corpus: Corpus, device: str, **options: Any) -> None:
        import gpu_lance

        self.db = gpu_lance.connect(corpus.folder, device=device, **options)
        self.table = self.db.open_table(corpus.path.stem)

    def search(self, queries: np.ndarray, metric: str = "l2", where: str | None = None) -> Any:
        """Milliseconds, and the ids (m, k)."""
        query = as_query(queries)
        start = time.perf_counter()
        search = self.table.search(query).distance_type(metric).limit(K).select(COLUMNS)
        table = (search if where is None else search.where(where)).to_arrow()
        took = time.perf_counter() - start
        return 1e3 * took, table["id"].to_numpy().reshape(len(queries), -1)

    def close(self) -> None:
        """Free the device's memory."""
        self.table.close()
        self.db.close()


# ---------------------------------------------------------------- LanceDB, in its own process


@functools.cache
def _lancedb_table(folder: str, name: str) -> Any:
    import lancedb

    return lancedb.connect(folder).open_table(name)


def _lancedb_search(
    folder: str, name: str, queries: np.ndarray, metric: str, where: str | None
) -> tuple[float, np.ndarray]:
    table, query = _lancedb_table(folder, name), as_query(queries)
    start = time.perf_counter()
    search = table.search(query).distance_type(metric).limit(K).select(COLUMNS)
    found = (search if where is None else search.where(where, prefilter=True)).to_arrow()
    took = time.perf_counter() - start
    return 1e3 * took, found["id"].to_numpy().reshape(len(queries), -1)


def _lancedb_threads(folder: str, name: str, queries: np.ndarray, threads: int) -> float:
    return in_threads(lambda q: _lancedb_search(folder, name, q, "l2", None), queries, threads)


def _lancedb_plan(folder: str, name: str, queries: np.ndarray) -> str:
    search = _lancedb_table(folder, name).search(as_query(queries)).limit(K).select(COLUMNS)
    return str(search.explain_plan())


def _cpu_seconds() -> float:
    return time.process_time()


class Theirs:
    """LanceDB's exact search of the same folder."""

    def __init__(self) -> None:
        # spawned: Lance's threads would not survive a fork
        self._pool = concurrent.futures.ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("spawn")
        )

    def _do(self, function: Any, *args: Any) -> Any:
        return self._pool.submit(function, *args).result()

    def search(
        self, corpus: Corpus, queries: np.ndarray, metric: str = "l2", where: str | None = None
    ) -> tuple[float, np.ndarray]:
        """Milliseconds, and the ids (m, k)."""
        place = str(corpus.folder), corpus.path.stem
        return self._do(_lancedb_search, *place, queries, metric, where)

    def threads(self, corpus: Corpus, queries: np.ndarray, threads: int) -> float:
        """Queries a second of that many threads."""
        place = str(corpus.folder), corpus.path.stem
        return self._do(_lancedb_threads, *place, queries, threads)

    def check_exact(self, corpus: Corpus) -> None:
        """Stop unless LanceDB's plan is a scan of all rows, for one query and for several."""
        for m in (1, 2):
            place = str(corpus.folder), corpus.path.stem
            plan = self._do(_lancedb_plan, *place, corpus.queries(m))
            if "KNNVectorDistance" not in plan or "ANN" in plan:
                raise SystemExit(f"LanceDB does not scan all rows, it plans:\n{plan}")

    def cpu_seconds(self) -> float:
        """CPU seconds of the process so far."""
        return self._do(_cpu_seconds)

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


# ------------------------------------------------------------------------------------ FAISS


class Bare:
    """FAISS's flat index over the vectors, in memory, without a table."""

    def __init__(self, corpus: Corpus, metric: str, device: str) -> None:
        import faiss

        self._faiss, self._cosine = faiss, metric == "cosine"
        kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
        if device.startswith("cuda"):
            self._resources = faiss.StandardGpuResources()
            self._index = faiss.GpuIndexFlat(self._resources, corpus.ndims, kind)
        else:
            self._index = faiss.IndexFlat(corpus.ndims, kind)
        for block in corpus.blocks():
            self._index.add(self._unit(block))

    def _unit(self, vectors: np.ndarray) -> np.ndarray:
        if self._cosine:
            return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors

    def search(self, queries: np.ndarray, threshold: int) -> tuple[float, np.ndarray]:
        """Milliseconds, and the ids (m, k).

        From `threshold` queries on the CPU uses BLAS: FAISS's own is 20, and 1 is always.
        """
        before = self._faiss.cvar.distance_compute_blas_threshold
        self._faiss.cvar.distance_compute_blas_threshold = threshold
        queries = self._unit(queries)
        try:
            start = time.perf_counter()
            _, ids = self._index.search(queries, K)
            return 1e3 * (time.perf_counter() - start), ids
        finally:
            self._faiss.cvar.distance_compute_blas_threshold = before


def in_threads(search: Any, queries: np.ndarray, threads: int) -> float:
    """Queries a second of that many threads, each with its share of the queries, one at a time."""
    shares = [queries[i::threads] for i in range(threads)]

    def run(share: np.ndarray) -> None:
        for i in range(len(share)):
            search(share[i : i + 1])

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        for done in [pool.submit(run, share) for share in shares]:
            done.result()
        return len(queries) / (time.perf_counter() - start)


# ------------------------------------------------------------------------------ the same ids


def exact(
    corpus: Corpus, query: np.ndarray, metric: str, passing: np.ndarray | None = None
) -> np.ndarray:
    """The ids of the nearest by (float64 distance rounded to float32, id), by numpy alone."""
    ids = np.arange(corpus.rows) if passing is None else np.flatnonzero(passing)
    matrix = corpus.matrix if passing is None else corpus.matrix[ids]
    scores = matrix @ query
    if metric == "l2":
        scores = np.einsum("nd,nd->n", matrix, matrix) - 2 * scores
    elif metric == "dot":
        scores = -scores
    else:
        scores = -scores / np.linalg.norm(matrix, axis=1)
    near = ids[np.argpartition(scores, min(200, len(ids) - 1))[:200]]
    found = distances(corpus, query, metric, near).astype(np.float32)
    return near[np.lexsort((near, found))][:K]


def distances(corpus: Corpus, query: np.ndarray, metric: str, ids: np.ndarray) -> np.ndarray:
    """Distances of those rows in float64."""
    x, q = corpus.matrix[ids].astype(np.float64), query.astype(np.float64)
    if metric == "l2":
        return np.square(x - q).sum(axis=1)
    dots = x @ q
    return 1 - (
        dots / np.linalg.norm(x, axis=1) / np.linalg.norm(q) if metric == "cosine" else dots
    )


def agree(
    corpus: Corpus, queries: np.ndarray, metric: str, ours: np.ndarray, theirs: np.ndarray
) -> int:
    """How many queries have the same ids in the same order; stop if a difference is no tie.

    Both compute in float32 until ours rescores, so rows whose distances differ by less than its
    rounding may change places.
    """
    same = (ours == theirs).all(axis=1) if ours.shape == theirs.shape else np.zeros(1, bool)
    for i in np.flatnonzero(~same):
        if ours.shape != theirs.shape:
            raise SystemExit(f"{ours.shape} rows came back, and {theirs.shape} from the other.")
        a, b = (distances(corpus, queries[i], metric, ids[i]) for ids in (ours, theirs))
        x, q = np.linalg.norm(corpus.matrix[ours[i]], axis=1), np.linalg.norm(queries[i])
        scale = {"l2": x * x + q * q, "dot": x * q, "cosine": np.ones(len(x))}[metric]
        if (np.abs(a - b) > 2e-6 * scale).any():
            raise SystemExit(
                f"The rows of a query differ by more than rounding: {ours[i]} at {a}, and "
                f"{theirs[i]} at {b}. Nothing is reported."
            )
    return int(same.sum())
