"""MaxSim over a store of documents, against numpy in float64: equal to the last bit."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from multi_model import METRICS, nearest, ragged, some_documents

from gpu_lance.errors import BadVectorError, QueryError
from gpu_lance.index import multi_rescore, multi_scan, multi_search
from gpu_lance.index.multi_rescore import by_document
from gpu_lance.index.multi_search import MultiSearch
from gpu_lance.index.multi_store import MultiSnapshot, MultiStore
from gpu_lance.index.ragged import rows_of
from gpu_lance.types import Metric

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DTYPES = [np.float16, np.float32, np.float64]


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=["as it is", "in small pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With bounds so small that every loop goes round more than once."""
    if request.param != "as it is":
        monkeypatch.setattr(multi_scan, "PRODUCT_BYTES", {"cpu": 2000})
        monkeypatch.setattr(multi_scan, "OTHER_PRODUCT_BYTES", 2000)
        monkeypatch.setattr(multi_scan, "COLUMNS", 3)
        monkeypatch.setattr(multi_rescore, "PIECE_BYTES", 3000)
        monkeypatch.setattr(multi_rescore, "COLUMNS", 2)
        monkeypatch.setattr(multi_search, "TILE_BYTES", 3000)
        monkeypatch.setattr(multi_search, "MAX_VECTORS", 7)


class Case:
    """Documents in a store, and what must be found of them."""

    def __init__(
        self,
        documents: Sequence[np.ndarray | None],
        ndims: int,
        device: torch.device,
        dtype: Any = np.float32,
        held: torch.dtype | None = None,
        chunk_bytes: int = 1 << 30,
    ) -> None:
        self.documents, self.ndims = list(documents), ndims
        self.row_ids = list(
            np.random.default_rng(5).permutation(3 * len(documents))[: len(documents)]
        )
        kind = torch.float16 if dtype is np.float16 else torch.float32
        self.store = MultiStore(ndims, held or kind, device, chunk_bytes=chunk_bytes)
        there = [np.zeros((0, ndims), dtype) if d is None else d for d in documents]
        vectors, offsets = ragged(there, ndims, dtype)
        valid = np.array([d is not None for d in documents])
        half = len(there) // 2  # in two goes, as blocks of a column come
        for part in (slice(0, half), slice(half, len(there))):
            a, b = int(offsets[part.start]), int(offsets[part.stop])
            self.store.add(
                vectors[a:b], offsets[part.start : part.stop + 1] - a,
                np.array(self.row_ids[part], np.int64), 1, valid[part],
            )  # fmt: skip
        self.wide = held is not None or dtype is np.float64

    @property
    def snapshot(self) -> MultiSnapshot:
        return self.store.publish()

    def stored(self, slots: np.ndarray) -> torch.Tensor:
        """What a look-up in Lance gives."""
        by_id = dict(zip(self.row_ids, self.documents, strict=True))
        found = [by_id[row_id] for row_id in self.snapshot.row_ids[slots]]
        return torch.from_numpy(np.concatenate(found))

    def check(self, metric: str, queries: Sequence[np.ndarray], k: int, **more: Any) -> None:
        search = MultiSearch(self.snapshot, Metric(metric), self.stored if self.wide else None)
        vectors, offsets = ragged(queries, self.ndims, np.float32)
        allowed = more.pop("only", None)
        mask = None if allowed is None else self.snapshot.mask(np.array(sorted(allowed), np.int64))
        got = search.search(torch.from_numpy(vectors), offsets, k, allowed=mask, **more)
        kept = [
            None if allowed is not None and row_id not in allowed else document
            for row_id, document in zip(self.row_ids, self.documents, strict=True)
        ]
        for i, query in enumerate(queries):
            ids, distances = nearest(metric, query, kept, self.row_ids, k, **more)
            missing = k - len(ids)
            assert got.row_ids[i].tolist() == [*ids, *[-1] * missing]
            assert got.distances[i].tolist() == [*distances, *[np.inf] * missing]


def some_queries(rng: np.random.Generator, lengths: Sequence[int], ndims: int) -> list[np.ndarray]:
    return [rng.standard_normal((c, ndims)).astype(np.float32) for c in lengths]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "ndims"), [(1, 1), (63, 3), (100, 16), (40, 257)])
def test_finds_what_numpy_finds(
    n: int, ndims: int, metric: str, dtype: Any, device: torch.device
) -> None:
    rng = np.random.default_rng(n)
    case = Case(some_documents(rng, n, ndims, dtype), ndims, device, dtype)
    queries = some_queries(rng, [1, 5, 2, 9], ndims)
    for k in (1, 7, n + 3):
        case.check(metric, queries, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
def test_in_pieces_of_any_size(metric: str, dtype: Any, device: torch.device, pieces: None) -> None:
    rng = np.random.default_rng(10)
    case = Case(some_documents(rng, 30, 4, dtype), 4, device, dtype)
    case.check(metric, some_queries(rng, [1, 8, 2], 4), 6)


@pytest.mark.parametrize("metric", METRICS)
def test_from_no_vector_to_five_thousand(metric: str, device: torch.device) -> None:
    rng = np.random.default_rng(1)
    lengths = [*rng.integers(0, 301, 20).tolist(), 5000, 0, 1]
    documents: list[np.ndarray | None] = [
        rng.standard_normal((length, 24)).astype(np.float32) for length in lengths
    ]
    case = Case(documents, 24, device, chunk_bytes=400_000)
    assert case.snapshot.lengths.zeros is False
    assert len(case.snapshot.chunks) > 2  # the longest has one to itself
    assert case.snapshot.num_vectors == sum(lengths)
    case.check(metric, some_queries(rng, [32, 3, 300], 24), 10)


@pytest.mark.parametrize("metric", METRICS)
def test_of_equal_documents_the_smallest_row_ids(
    metric: str, device: torch.device, pieces: None
) -> None:
    one = np.random.default_rng(2).integers(-2, 3, (4, 6)).astype(np.float32)
    same: list[np.ndarray | None] = [np.roll(one, i % 4, axis=0) for i in range(50)]
    case = Case(same, 6, device)
    case.check(metric, some_queries(np.random.default_rng(3), [3, 2], 6), 10)


@pytest.mark.parametrize("metric", METRICS)
def test_nearly_equal_documents_are_told_apart(metric: str, device: torch.device) -> None:
    """Closer than float32 tells: only what is measured in float64 is in the right order."""
    rng = np.random.default_rng(4)
    one = rng.standard_normal((5, 64))
    near: list[np.ndarray | None] = [
        (one + 1e-6 * rng.standard_normal((5, 64))).astype(np.float32) for _ in range(150)
    ]
    for held in (None, torch.float16):
        case = Case(near, 64, device, held=held)
        case.check(metric, some_queries(rng, [4, 1], 64), 20)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("held", [None, torch.float16])
def test_bounds_and_masks(
    metric: str, held: torch.dtype | None, device: torch.device, pieces: None
) -> None:
    rng = np.random.default_rng(6)
    documents = [
        d
        for d in some_documents(rng, 80, 8)
        if d is None or np.abs(d[np.isfinite(d)]).max(initial=0) < 100
    ]
    case = Case(documents, 8, device, held=held)
    queries = some_queries(rng, [3, 1], 8)
    distances = sorted(nearest(metric, queries[0], documents, case.row_ids, 99)[1])
    low, high = float(distances[9]), float(distances[30])
    few = set(case.row_ids[::9])
    most = set(case.row_ids[:-7])
    for only in (None, few, most, set()):
        case.check(metric, queries, 5, only=only)
        case.check(metric, queries, 60, only=only, lower=low)
        case.check(metric, queries, 5, only=only, upper=high)
        case.check(metric, queries, 12, only=only, lower=low, upper=high)
    case.check(metric, queries, 5, lower=high, upper=low)


@pytest.mark.parametrize("metric", METRICS)
def test_removed_documents_and_sweeping(metric: str, device: torch.device) -> None:
    rng = np.random.default_rng(7)
    documents = some_documents(rng, 120, 5)
    case = Case(documents, 5, device, chunk_bytes=6000)
    queries = some_queries(rng, [2, 4], 5)
    before = MultiSearch(case.snapshot, Metric(metric))
    ask = torch.from_numpy(queries[0]), np.array([0, 2]), 200
    first = before.search(*ask)
    case.store.remove(np.array(case.row_ids[::2]))
    left = set(case.row_ids[1::2])
    case.check(metric, queries, 50, only=left)
    assert case.store.wants_sweep
    vectors, chunks = case.snapshot.num_vectors, len(case.snapshot.chunks)
    for _ in case.store.sweep():
        case.check(metric, queries, 50, only=left)
    assert not case.store.wants_sweep
    assert case.snapshot.num_vectors == vectors == sum(case.snapshot.used)
    assert len(case.snapshot.chunks) < chunks
    again = before.search(*ask)  # what was published stays as it was
    assert again.row_ids.tolist() == first.row_ids.tolist()
    case.store.add(np.ones((3, 5), np.float32), np.array([0, 3]), np.array([999]))
    case.row_ids.append(999)
    case.documents.append(np.ones((3, 5), np.float32))
    case.check(metric, queries, 50, only={*left, 999})


@pytest.mark.parametrize("scale", [1e-25, 1e-18, 1e15, 1e19, 1e37])
@pytest.mark.parametrize("metric", METRICS)
def test_vectors_whose_squares_float32_does_not_hold(
    metric: str, scale: float, device: torch.device
) -> None:
    rng = np.random.default_rng(8)
    documents: list[np.ndarray | None] = [
        (rng.standard_normal((3, 4)) * (scale if i % 3 else 1)).astype(np.float32)
        for i in range(60)
    ]
    case = Case(documents, 4, device)
    queries = some_queries(rng, [2, 3], 4)
    case.check(metric, [queries[0], (queries[1] * scale).astype(np.float32)], 8)


def test_zeros_under_cosine(device: torch.device) -> None:
    zero, one = np.zeros((1, 3), np.float32), np.array([[1, 2, 2]], np.float32)
    documents: list[np.ndarray | None] = [zero, np.concatenate([zero, one, zero]), one, -one]
    case = Case(documents, 3, device)
    mixed = np.concatenate([zero, one])
    case.check("cosine", [one, zero, mixed, -mixed], 4)
    search = MultiSearch(case.snapshot, Metric.COSINE)
    found = search.search(torch.from_numpy(mixed), np.array([0, 2]), 4)
    assert found.counts.tolist() == [3]
    assert found.distances[0, 0] == 0
    for metric in ("l2", "dot"):
        case.check(metric, [one, zero, mixed], 4)


def test_float64_that_float32_does_not_reach(device: torch.device) -> None:
    documents: list[np.ndarray | None] = [
        np.array([[1e-60, 0], [1, 1]]), np.array([[1e-60, 0]]), np.array([[1e60, 1]]),
        np.array([[1, 1 + 1e-12]]),
    ]  # fmt: skip
    case = Case(documents, 2, device, np.float64)
    for metric in METRICS:
        case.check(metric, [np.array([[1, 1], [2, 0]], np.float32)], 4)


def test_bad_requests() -> None:
    case = Case([np.ones((2, 3), np.float32)], 3, torch.device("cpu"))
    search = MultiSearch(case.snapshot, Metric.L2)
    two = torch.ones(2, 3)
    for offsets in ([0, 1], [0, 3], [1, 2], [0, 2, 1, 2], [], [[0, 2]], [0.0, 2.0]):
        with pytest.raises(QueryError, match="offsets from 0 to 2"):
            search.search(two, np.array(offsets), 1)
    with pytest.raises(QueryError, match="Query 1 has no vectors"):
        search.search(two, np.array([0, 1, 1, 2]), 1)
    with pytest.raises(QueryError, match="vectors of 3 values"):
        search.search(torch.ones(2, 4), np.array([0, 2]), 1)
    with pytest.raises(QueryError, match="at least 1"):
        search.search(two, np.array([0, 2]), 0)
    bad = two.clone()
    bad[1, 0] = float("inf")
    with pytest.raises(BadVectorError, match="Query 1 holds NaN or infinity"):
        search.search(bad, np.array([0, 1, 2]), 1)
    assert search.search(torch.ones(0, 3), np.array([0]), 2).row_ids.shape == (0, 2)
    wrong = ([0, 1], [0, 2, 1], [1, 2], [0, 2, 2])
    for offsets in wrong:
        with pytest.raises(BadVectorError, match="ascending offsets"):
            case.store.add(two, np.array(offsets), np.array([5]))


def test_by_document_and_what_cuda_has_for_it() -> None:
    values = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    begins = np.array([0, 1, 7, 49])
    lengths = torch.from_numpy(np.diff(begins, append=50))
    for which in ("min", "max"):
        theirs = torch.segment_reduce(values, which, lengths=lengths, axis=0, unsafe=True)
        assert torch.equal(by_document(values, begins, which), theirs)
    assert rows_of(np.array([4, 9, 0]), np.array([6, 9, 2])).tolist() == [4, 5, 0, 1]


def test_memory_is_bounded() -> None:
    """Searching takes little beside the vectors, however many there are and are asked for."""
    rng = np.random.default_rng(9)
    ndims, length, n = 64, 50, 6000
    vectors = rng.standard_normal((n * length, ndims), np.float32)
    store = MultiStore(ndims, torch.float32, torch.device("cpu"))
    store.expect(len(vectors))
    store.add(vectors, np.arange(n + 1) * length, np.arange(n))
    assert sum(chunk.nbytes for chunk in store.publish().chunks) > 70 << 20
    queries = torch.from_numpy(vectors[:400].copy())
    search = MultiSearch(store.publish(), Metric.COSINE)
    search.search(queries[:32], np.array([0, 32]), 10)
    tracemalloc.start()
    found = search.search(queries, np.arange(9) * 50, 10)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.row_ids[:, 0].tolist() == list(range(8))
    assert peak < 32 << 20  # of numpy's; torch's is bounded by the same constants
