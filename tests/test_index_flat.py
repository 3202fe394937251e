"""FlatIndex against a float64 brute force, on every device and engine there is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gpu_lance.errors import BadVectorError, OutOfDeviceMemoryError, QueryError
from gpu_lance.index import Flat, FlatIndex
from gpu_lance.index.base import SearchResult
from gpu_lance.index.exact import MAX_CANDIDATES, ExactSearch
from gpu_lance.index.rescore import Rounding, error_bound, norms, rank, tree_sum
from gpu_lance.index.scan import Scan
from gpu_lance.index.snapshot import Mask
from gpu_lance.types import Metric

CPU = torch.device("cpu")
METRICS = ["l2", "cosine", "dot"]
CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")


@pytest.fixture(params=[True, False], ids=["faiss", "torch"])
def use_faiss(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def distances(queries: np.ndarray, vectors: np.ndarray, metric: str) -> np.ndarray:
    """(m, n) float32, computed in float64 from float32 vectors."""
    q, x = queries.astype(np.float64), vectors.astype(np.float64)
    if metric == "l2":
        out = ((q[:, None, :] - x[None, :, :]) ** 2).sum(-1)
    elif metric == "dot":
        out = 1 - q @ x.T
    else:
        with np.errstate(invalid="ignore"):
            lengths = np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(x, axis=1)[None, :]
            out = 1 - q @ x.T / lengths
    return out.astype(np.float32)


def brute(
    queries: np.ndarray,
    vectors: np.ndarray,
    row_ids: np.ndarray,
    k: int,
    metric: str,
    allowed: np.ndarray | None = None,
    lower: float = -np.inf,
    upper: float = np.inf,
) -> SearchResult:
    """The k nearest by (float32 distance, row id)."""
    result = SearchResult.empty(len(queries), k)
    for line, row in enumerate(distances(queries, vectors, metric)):
        keep = (row >= np.float32(lower)) & ((row < np.float32(upper)) | (upper == np.inf))
        if allowed is not None:
            keep &= allowed
        ids, near = row_ids[keep], row[keep]
        order = np.lexsort((ids, near))[:k]
        result.row_ids[line, : len(order)] = ids[order]
        result.distances[line, : len(order)] = near[order]
    return result


def assert_same(got: SearchResult, want: SearchResult, metric: str = "l2") -> None:
    np.testing.assert_array_equal(got.row_ids, want.row_ids)
    # cosine: numpy's float64 norms differ in the last bits, which shows beside a distance of 0
    np.testing.assert_allclose(
        got.distances, want.distances, rtol=2e-7, atol=1e-14 if metric == "cosine" else 1e-13
    )


def build(
    vectors: np.ndarray, metric: str, device: torch.device, use_faiss: bool, ids: np.ndarray
) -> FlatIndex:
    index = FlatIndex(vectors.shape[1], metric, device, use_faiss=use_faiss)
    index.add(torch.from_numpy(vectors).to(device), ids)
    return index


def sample(n: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = rng.permutation(np.arange(n) * 3 + 5).astype(np.int64)
    return rng.standard_normal((n, d)).astype(np.float32), ids


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [1, 3, 384])
@pytest.mark.parametrize("n", [1, 63, 100, 257])
def test_equals_brute_force(
    n: int, d: int, metric: str, device: torch.device, use_faiss: bool
) -> None:
    vectors, ids = sample(n, d, seed=n * d)
    queries = np.random.default_rng(9).standard_normal((7, d)).astype(np.float32)
    with build(vectors, metric, device, use_faiss, ids) as index:
        for k in (1, 10, n, n + 5):
            got = index.search(torch.from_numpy(queries).to(device), k)
            want = brute(queries, vectors, ids, k, metric)
            if metric == "cosine" and d == 1:  # only +1 and -1: the last bits decide ties
                np.testing.assert_allclose(got.distances, want.distances, atol=1e-12)
            else:
                assert_same(got, want, metric)
            assert got.counts.tolist() == [min(k, n)] * 7


def test_the_engine_is_the_one_wanted(device: torch.device) -> None:
    index = FlatIndex(4, "l2", device, use_faiss=False)
    assert index.info()["engine"] == "torch"
    assert "not wanted" in index.info()["reason"]
    assert index.info()["device"] == str(device)


def test_both_engines_give_the_same_bits(device: torch.device) -> None:
    vectors, ids = sample(2000, 64)
    queries = torch.randn(300, 64, generator=torch.Generator().manual_seed(1)).to(device)
    for metric in METRICS:
        with (
            build(vectors, metric, device, True, ids) as one,
            build(vectors, metric, device, False, ids) as two,
        ):
            a, b = one.search(queries, 10), two.search(queries, 10)
            np.testing.assert_array_equal(a.row_ids, b.row_ids)
            np.testing.assert_array_equal(a.distances, b.distances)


@pytest.mark.parametrize("metric", METRICS)
def test_all_rows_equal_gives_the_smallest_ids(
    metric: str, device: torch.device, use_faiss: bool
) -> None:
    vectors = np.tile(np.float32([0.3, -1.7, 2.9]), (1000, 1))
    ids = np.random.default_rng(2).permutation(1000).astype(np.int64)
    queries = torch.tensor([[0.1, 0.2, 0.3], [5.0, -4.0, 3.0]], device=device)
    with build(vectors, metric, device, use_faiss, ids) as index:
        got = index.search(queries, 10)
    assert got.row_ids.tolist() == [list(range(10))] * 2
    assert len(np.unique(got.distances[0])) == 1


@pytest.mark.parametrize("metric", METRICS)
def test_a_thousand_duplicates_among_others(
    metric: str, device: torch.device, use_faiss: bool
) -> None:
    vectors, _ = sample(3000, 8, seed=4)
    vectors[::3] = vectors[0]  # 1,000 copies, scattered
    ids = np.random.default_rng(5).permutation(3000).astype(np.int64)
    queries = np.stack([vectors[0], vectors[1], vectors[0] + np.float32(1e-4)])
    with build(vectors, metric, device, use_faiss, ids) as index:
        got = index.search(torch.from_numpy(queries).to(device), 20)
    want = brute(queries, vectors, ids, 20, metric)
    np.testing.assert_array_equal(got.row_ids, want.row_ids)


@pytest.mark.parametrize("metric", METRICS)
def test_near_duplicates_far_below_the_engines_error(
    metric: str, device: torch.device, use_faiss: bool
) -> None:
    rng = np.random.default_rng(6)
    base = rng.standard_normal(384).astype(np.float32)
    # a few float32 steps apart: float32 products cannot order these
    steps = rng.integers(-3, 4, (500, 384)) * (rng.random((500, 384)) < 0.02)
    vectors = (base * (1 + steps * 2.0**-23)).astype(np.float32)
    ids = rng.permutation(500).astype(np.int64)
    queries = (base + rng.standard_normal((5, 384)) * 0.3).astype(np.float32)
    with build(vectors, metric, device, use_faiss, ids) as index:
        got = index.search(torch.from_numpy(queries).to(device), 10)
    want = brute(queries, vectors, ids, 10, metric)
    np.testing.assert_array_equal(got.row_ids, want.row_ids)


@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_one_long_vector_and_numbers_that_overflow_float32(
    metric: str, device: torch.device, use_faiss: bool
) -> None:
    vectors, ids = sample(300, 5, seed=8)
    vectors[7] *= 1e6
    vectors[8] = 3e25  # its square is beyond float32
    queries = np.random.default_rng(1).standard_normal((4, 5)).astype(np.float32)
    with build(vectors, metric, device, use_faiss, ids) as index:
        for k in (3, 40, 300):
            got = index.search(torch.from_numpy(queries).to(device), k)
            with np.errstate(over="ignore"):
                want = brute(queries, vectors, ids, k, metric)
            np.testing.assert_array_equal(got.row_ids, want.row_ids)


def test_tiny_numbers_tie_at_zero_by_row_id(device: torch.device, use_faiss: bool) -> None:
    vectors = (np.random.default_rng(3).standard_normal((200, 4)) * 1e-30).astype(np.float32)
    ids = np.random.default_rng(4).permutation(200).astype(np.int64)
    with build(vectors, "l2", device, use_faiss, ids) as index:
        got = index.search(torch.zeros(1, 4, device=device), 5)
    assert got.row_ids.tolist() == [[0, 1, 2, 3, 4]]  # squares of 1e-30 are 0 in float32
    assert got.distances.tolist() == [[0.0] * 5]


def test_zero_vectors_under_cosine_have_no_distance(device: torch.device, use_faiss: bool) -> None:
    vectors = np.float32([[0, 0], [1, 0], [-1, 0]])
    with build(vectors, "cosine", device, use_faiss, np.arange(3)) as index:
        got = index.search(torch.tensor([[1.0, 0.0], [0.0, 0.0]], device=device), 3)
    assert got.row_ids.tolist() == [[1, 2, -1], [-1, -1, -1]]
    assert got.distances.tolist() == [[0.0, 2.0, np.inf], [np.inf] * 3]


def test_cosine_ignores_length(device: torch.device) -> None:
    vectors = np.float32([[3e-30, 4e-30], [3e30, 4e30], [4, 3]])
    with build(vectors, "cosine", device, True, np.arange(3)) as index:
        got = index.search(torch.tensor([[3.0, 4.0]], device=device), 3)
    assert got.row_ids[0, 2] == 2
    np.testing.assert_allclose(got.distances, [[0, 0, 0.04]], atol=1e-7)


def test_null_and_non_finite_vectors_are_left_out(device: torch.device, use_faiss: bool) -> None:
    vectors = np.float32([[0, 0], [np.nan, 0], [1, 1], [np.inf, 0], [2, 2]])
    index = FlatIndex(2, "l2", device, use_faiss=use_faiss)
    index.add(torch.from_numpy(vectors).to(device), np.arange(5), np.arange(5) != 2)
    assert len(index) == 2
    got = index.search(torch.zeros(1, 2, device=device), 5)
    assert got.row_ids.tolist() == [[0, 4, -1, -1, -1]]
    index.add(torch.zeros(1, 2, device=device), np.array([9]), np.array([False]))
    assert len(index) == 2


def test_removed_rows_are_never_found_and_are_swept_out(
    device: torch.device, use_faiss: bool
) -> None:
    vectors, ids = sample(400, 6)
    queries = np.random.default_rng(3).standard_normal((5, 6)).astype(np.float32)
    index = build(vectors, "l2", device, use_faiss, ids)
    rng = np.random.default_rng(7)
    alive = np.ones(400, bool)
    sizes = set()
    for count in (1, 30, 3, 40, 100, 200, 26):
        gone = rng.choice(np.flatnonzero(alive), count, replace=False)
        alive[gone] = False
        assert index.remove(np.append(ids[gone], 10**9)) == count
        assert index.remove(ids[gone]) == 0
        got = index.search(torch.from_numpy(queries).to(device), 12)
        assert_same(got, brute(queries, vectors, ids, 12, "l2", alive))
        assert len(index) == alive.sum()
        sizes.add(index.num_slots)
    assert len(sizes) > 2  # dead slots stayed for a while, and went
    assert index.num_slots == len(index) == 0
    index.add(torch.from_numpy(vectors).to(device), ids)
    assert_same(
        index.search(torch.from_numpy(queries).to(device), 12),
        brute(queries, vectors, ids, 12, "l2"),
    )


def test_an_updated_row_has_its_new_vector(device: torch.device, use_faiss: bool) -> None:
    vectors, ids = sample(100, 3)
    index = build(vectors, "l2", device, use_faiss, ids)
    for value in (50.0, 60.0):
        index.remove(ids[:1])
        index.add(torch.full((1, 3), value, device=device), ids[:1])
        got = index.search(torch.full((1, 3), value, device=device), 1)
        assert got.row_ids.tolist() == [[ids[0]]]
        assert got.distances.tolist() == [[0.0]]
    assert len(index) == 100
    everything = index.search(torch.zeros(1, 3, device=device), 200).row_ids
    assert sorted(everything[everything >= 0]) == sorted(ids)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99, 1.0])
def test_masks(share: float, metric: str, device: torch.device, use_faiss: bool) -> None:
    vectors, ids = sample(1200, 5, seed=1)
    queries = np.random.default_rng(3).standard_normal((6, 5)).astype(np.float32)
    allowed = np.random.default_rng(5).random(1200) < share
    with build(vectors, metric, device, use_faiss, ids) as index:
        mask = index.mask(ids[allowed])
        got = index.search(torch.from_numpy(queries).to(device), 10, allowed=mask)
        assert_same(got, brute(queries, vectors, ids, 10, metric, allowed), metric)
        index.remove(ids[:50])
        allowed[:50] = False
        got = index.search(torch.from_numpy(queries).to(device), 10, allowed=mask)
        assert_same(got, brute(queries, vectors, ids, 10, metric, allowed), metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("share", [0.1, 1.0])
def test_distance_range(share: float, metric: str, device: torch.device, use_faiss: bool) -> None:
    vectors, ids = sample(900, 4, seed=3)
    queries = np.random.default_rng(3).standard_normal((6, 4)).astype(np.float32)
    allowed = np.random.default_rng(5).random(900) < share
    near = np.sort(distances(queries[:1], vectors, metric)[0])
    ranges = [
        (None, float(near[30])),  # an upper bound that is a distance: not included
        (float(near[30]), None),  # a lower one is
        (float(near[30]), float(near[35])),
        (float(near[100]), float(near[800])),
        (float(near[30]), float(near[30])),
        (1e9, None),
    ]
    with build(vectors, metric, device, use_faiss, ids) as index:
        mask = index.mask(ids[allowed])
        for lower, upper in ranges:
            got = index.search(
                torch.from_numpy(queries).to(device), 10, allowed=mask, lower=lower, upper=upper
            )
            want = brute(
                queries, vectors, ids, 10, metric, allowed,
                -np.inf if lower is None else lower, np.inf if upper is None else upper,
            )  # fmt: skip
            if metric == "cosine":  # a bound taken from numpy's last bits may fall either way
                assert np.abs(got.counts - want.counts).max() <= 1
            else:
                assert_same(got, want, metric)


def test_a_range_whose_edge_is_crowded(device: torch.device, use_faiss: bool) -> None:
    """A hundred rows within rounding below the lower bound must not hide those above it."""
    vectors = np.zeros((300, 2), np.float32)
    vectors[:100, 0] = np.nextafter(np.float32(1), np.float32(0))
    vectors[100:150, 0] = 1
    vectors[150:, 0] = 2
    with build(vectors, "l2", device, use_faiss, np.arange(300)) as index:
        got = index.search(torch.zeros(1, 2, device=device), 60, lower=1.0)
    assert got.row_ids.tolist() == [list(range(100, 160))]


def test_k_beyond_what_faiss_gives(device: torch.device, use_faiss: bool) -> None:
    vectors, ids = sample(5000, 3)
    queries = np.random.default_rng(2).standard_normal((3, 3)).astype(np.float32)
    with build(vectors, "l2", device, use_faiss, ids) as index:
        for k in (MAX_CANDIDATES - 16, MAX_CANDIDATES - 15, MAX_CANDIDATES + 1, 6000):
            assert_same(
                index.search(torch.from_numpy(queries).to(device), k),
                brute(queries, vectors, ids, k, "l2"),
            )


def test_results_do_not_depend_on_the_batch(device: torch.device, use_faiss: bool) -> None:
    vectors, ids = sample(500, 16)
    queries = torch.randn(600, 16, generator=torch.Generator().manual_seed(3)).to(device)
    with build(vectors, "cosine", device, use_faiss, ids) as index:
        whole = index.search(queries, 5)
        for start, stop in ((0, 1), (255, 258), (599, 600)):
            part = index.search(queries[start:stop], 5)
            np.testing.assert_array_equal(part.row_ids, whole.row_ids[start:stop])
            np.testing.assert_array_equal(part.distances, whole.distances[start:stop])
        assert index.search(queries[:0], 5).row_ids.shape == (0, 5)


def test_float16_and_float64_vectors_and_strided_queries(device: torch.device) -> None:
    vectors, ids = sample(100, 4)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        given = torch.from_numpy(vectors).to(dtype)
        held = given.to(torch.float32).numpy()
        queries = torch.randn(3, 8, generator=torch.Generator().manual_seed(3))[:, ::2]
        index = FlatIndex(4, "l2", device)
        index.add(given.to(device), ids)
        assert_same(index.search(queries.to(device), 5), brute(queries.numpy(), held, ids, 5, "l2"))


def test_lower_matmul_precision_changes_nothing(device: torch.device) -> None:
    vectors, ids = sample(3000, 128)
    queries = np.random.default_rng(2).standard_normal((5, 128)).astype(np.float32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with build(vectors, "l2", device, False, ids) as index:
            got = index.search(torch.from_numpy(queries).to(device), 10)
    finally:
        torch.set_float32_matmul_precision(before)
    assert_same(got, brute(queries, vectors, ids, 10, "l2"))


@pytest.mark.parametrize("metric", METRICS)
def test_torchs_default_device_changes_nothing(metric: str, use_faiss: bool) -> None:
    vectors, ids = sample(500, 8)
    queries = np.random.default_rng(2).standard_normal((5, 8)).astype(np.float32)
    alive = np.ones(500, bool)
    alive[:200] = False  # so many that they are swept out
    with torch.device("meta"), build(vectors, metric, CPU, use_faiss, ids) as index:
        mask = index.mask(ids[::2])
        got = index.search(torch.from_numpy(queries), 10, allowed=mask, lower=0.1)
        assert_same(
            got, brute(queries, vectors, ids, 10, metric, np.arange(500) % 2 == 0, 0.1), metric
        )
        index.remove(ids[:200])
        got = index.search(torch.from_numpy(queries), 10)
        assert_same(got, brute(queries, vectors, ids, 10, metric, alive), metric)


def test_a_device_is_the_same_with_and_without_its_number() -> None:
    index = FlatIndex(2, "l2", torch.device("cpu", 0))
    index.add(torch.zeros(3, 2), np.arange(3))
    assert index.device == CPU
    assert index.search(torch.zeros(1, 2), 1).row_ids.tolist() == [[0]]


def test_bad_arguments(device: torch.device) -> None:
    index = FlatIndex(3, "l2", device)
    with pytest.raises(BadVectorError, match="3 values"):
        index.add(torch.zeros(2, 4), np.arange(2))
    with pytest.raises(BadVectorError, match="2 row ids"):
        index.add(torch.zeros(3, 3), np.arange(2))
    assert index.search(torch.zeros(2, 3, device=device), 4).row_ids.tolist() == [[-1] * 4] * 2
    index.add(torch.zeros(2, 3, device=device), np.arange(2))
    with pytest.raises(QueryError, match="at least 1"):
        index.search(torch.zeros(1, 3), 0)
    with pytest.raises(QueryError, match=r"\(1, 4\).*3 values"):
        index.search(torch.zeros(1, 4), 1)
    with pytest.raises(BadVectorError, match="Query 1"):
        index.search(torch.tensor([[0.0, 0, 0], [0, float("nan"), 0]]), 1)
    with pytest.raises(QueryError, match="mask"):
        index.search(torch.zeros(1, 3), 1, allowed=Mask(torch.ones(5, dtype=torch.bool), 5))
    with pytest.raises(QueryError, match="distance type"):
        FlatIndex(3, "hamming", device)


def test_close_empties_it(device: torch.device, use_faiss: bool) -> None:
    vectors, ids = sample(50, 3)
    with build(vectors, "l2", device, use_faiss, ids) as index:
        assert index.info()["rows"] == 50
        assert index.info()["bytes"] >= 50 * 16
    assert len(index) == 0
    assert index.search(torch.zeros(1, 3, device=device), 1).row_ids.tolist() == [[-1]]


def test_tiles_give_back_the_live_rows(device: torch.device, use_faiss: bool) -> None:
    vectors, ids = sample(100, 3)
    index = build(vectors, "l2", device, use_faiss, ids)
    index.remove(ids[10:20])
    found = {
        int(i): row.tolist() for part, x in index.tiles() for i, row in zip(part, x, strict=True)
    }
    keep = [i for i in range(100) if not 10 <= i < 20]
    assert found == {int(ids[i]): vectors[i].tolist() for i in keep}


def test_out_of_memory_halves_the_queries(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    vectors, ids = sample(100, 3)
    index = build(vectors, "l2", device, True, ids)
    whole = index.search(torch.from_numpy(vectors).to(device), 3)
    honest, seen = ExactSearch._block, []

    def limited(
        self: ExactSearch, raw: torch.Tensor, k: int, scan: Scan
    ) -> tuple[np.ndarray, np.ndarray]:
        if len(raw) > 30:
            raise RuntimeError("CUDA error: out of memory")
        seen.append(len(raw))
        return honest(self, raw, k, scan)

    monkeypatch.setattr(ExactSearch, "_block", limited)
    got = index.search(torch.from_numpy(vectors).to(device), 3)
    np.testing.assert_array_equal(got.row_ids, whole.row_ids)
    assert max(seen) <= 30
    assert sum(seen) == 100

    def none(
        self: ExactSearch, raw: torch.Tensor, k: int, scan: Scan
    ) -> tuple[np.ndarray, np.ndarray]:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(ExactSearch, "_block", none)
    with pytest.raises(OutOfDeviceMemoryError, match="One query"):
        index.search(torch.zeros(2, 3, device=device), 1)


# ------------------------------------------------------------------ the parts


def test_tree_sum_is_the_same_in_any_company() -> None:
    values = torch.randn(50, 77, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = tree_sum(values.clone())
    torch.testing.assert_close(whole, values.sum(1))
    for i in (0, 13, 49):
        assert tree_sum(values[i : i + 1].clone()).item() == whole[i].item()


def test_the_error_bound_holds_for_adverse_sums() -> None:
    rng = np.random.default_rng(0)
    for d in (1, 3, 100, 384):
        x, q = (
            (rng.standard_normal((n, d)) * 10.0 ** rng.integers(-3, 4, (n, d))).astype(np.float32)
            for n in (200, 20)
        )
        for metric in (Metric.L2, Metric.DOT):
            exact = distances_64(q, x, metric)
            running = np.zeros((20, 200), np.float32)  # the worst order: one by one
            qn, xn = norms(torch.from_numpy(q)).numpy(), norms(torch.from_numpy(x)).numpy()
            for j in range(d):
                running += q[:, j : j + 1] * x[:, j]
            if metric is Metric.L2:
                engine = (q * q).sum(1)[:, None] + (x * x).sum(1)[None] - 2 * running
            else:
                engine = 1 - running
            bound = error_bound(metric, d, Rounding(2.0**-24), qn[:, None], xn[None, :])
            assert (np.abs(engine - exact) <= np.asarray(bound)).all()


def distances_64(q: np.ndarray, x: np.ndarray, metric: Metric) -> np.ndarray:
    q, x = q.astype(np.float64), x.astype(np.float64)
    if metric is Metric.L2:
        return np.asarray(((q[:, None] - x[None]) ** 2).sum(-1))
    return np.asarray(1 - (q[:, None] * x[None]).sum(-1))


def test_rank_orders_by_distance_then_id_and_pads() -> None:
    missing = np.iinfo(np.int64).max
    ids = np.array([[9, 4, missing, 7]])
    near = np.array([[np.inf, 1, np.inf, 1]], np.float32)
    got_ids, got = rank(ids, near, 5)
    assert got_ids.tolist() == [[4, 7, 9, missing, missing]]  # a real row at +inf comes before none
    assert got.tolist() == [[1, 1, np.inf, np.inf, np.inf]]


def test_config() -> None:
    assert Flat().metric is Metric.L2
    assert Flat(distance_type="dot").metric is Metric.DOT
    with pytest.raises(QueryError, match="hamming"):
        Flat(distance_type="hamming")  # type: ignore[arg-type]
