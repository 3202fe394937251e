"""Engines propose the nearest rows of a block: the same numbers from FAISS and torch."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpu_lance.errors import IndexBackendError
from gpu_lance.index import engines as base
from gpu_lance.index import threads, torch_engine
from gpu_lance.index.engines import Best, Block, Engine
from gpu_lance.index.faiss_binding import MAX_K, GpuResources, blas_threshold, load_faiss
from gpu_lance.index.faiss_engine import FaissEngine
from gpu_lance.index.rescore import OVERFLOW
from gpu_lance.index.torch_engine import TorchEngine
from gpu_lance.types import Metric

faiss = pytest.importorskip("faiss")
CPU = torch.device("cpu")
METRICS = list(Metric)
ENGINES = {
    "faiss": lambda: FaissEngine(faiss, CPU),
    "torch": TorchEngine,
    "torch with faiss": lambda: TorchEngine(faiss),
}
SIZES = (1, 63, 100, 257)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    return ENGINES[request.param]()


def block_of(vectors: torch.Tensor) -> Block:
    return Block(vectors, torch.linalg.vector_norm(vectors.float(), dim=1))


def problem(
    n: int, m: int, ndims: int = 24, *, dtype: torch.dtype = torch.float32, unit: bool = False
) -> tuple[Block, torch.Tensor, torch.Tensor]:
    """A block, unit queries, and their norms."""
    random = torch.Generator().manual_seed(n * 1000 + m)
    x = torch.randn(n, ndims, generator=random)
    q = torch.nn.functional.normalize(torch.randn(m, ndims, generator=random))
    x = torch.nn.functional.normalize(x) if unit else x
    return block_of(x.to(dtype)), q, torch.linalg.vector_norm(q, dim=1)


def exact(block: Block, metric: Metric, queries: torch.Tensor) -> torch.Tensor:
    """(m, n) distances in float64."""
    x, q = block.vectors.double(), queries.double()
    if metric is Metric.L2:
        return ((q[:, None] - x[None]) ** 2).sum(-1)
    if metric is Metric.COSINE:
        return 1 - torch.nn.functional.cosine_similarity(q[:, None], x[None], dim=-1, eps=0)
    return 1 - q @ x.T


def assert_nearest(found: tuple[torch.Tensor, torch.Tensor], wanted: torch.Tensor, c: int) -> None:
    """Scores are ascending distances, of columns that are all different, and the smallest."""
    scores, columns = found
    assert scores.shape == columns.shape == (len(wanted), min(c, wanted.shape[1]))
    assert (scores.dtype, columns.dtype) == (torch.float32, torch.int64)
    assert (scores.diff(dim=1) >= 0).all()
    assert all(len(set(line)) == len(line) for line in columns.tolist())
    torch.testing.assert_close(scores.double(), wanted.gather(1, columns), atol=2e-5, rtol=2e-5)
    smallest = wanted.sort(dim=1).values[:, : scores.shape[1]]
    torch.testing.assert_close(scores.double(), smallest, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n", SIZES)
def test_the_nearest_rows(engine: Engine, metric: Metric, n: int) -> None:
    for m, c in ((1, 5), (3, 26), (20, 26), (5, 300)):
        block, q, lengths = problem(n, m, unit=metric is Metric.COSINE)
        found = engine.nearest(block, metric, q, lengths, c)
        assert_nearest(found, exact(block, metric, q), c)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("m", [1, 3, 20])
def test_float16_blocks_and_rows_of_any_norm(metric: Metric, m: int) -> None:
    for engine in (TorchEngine(), TorchEngine(faiss)):
        for dtype in (torch.float16, torch.float32):
            block, q, lengths = problem(257, m, dtype=dtype)
            assert_nearest(
                engine.nearest(block, metric, q, lengths, 26), exact(block, metric, q), 26
            )


@pytest.mark.parametrize("metric", METRICS)
def test_tiles_and_slices_change_nothing(
    engine: Engine, metric: Metric, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype in (torch.float32, torch.float16):
        if engine.is_faiss and dtype == torch.float16:
            continue
        for m in (1, 3, 20):
            block, q, lengths = problem(257, m, dtype=dtype, unit=True)
            rows = torch.arange(0, 257, 3)
            ask = (block, metric, q, lengths, 30)
            wanted, some = engine.nearest(*ask), engine.nearest(*ask, rows=rows)
            with monkeypatch.context() as patch:
                patch.setattr(torch_engine, "CACHED_SCORE_BYTES", 16 * m * 50)
                patch.setattr(torch_engine, "WIDE_BYTES", 4 * 24 * 7)
                patch.setattr(torch_engine, "LOOP_BYTES", 4 * 24 * 11)
                patch.setattr(threads, "SLICE_BYTES", 24 * 4 * 60)
                patch.setattr(base, "GATHER_BYTES", (24 * 4 * 10,) * 3)
                patch.setattr(torch, "get_num_threads", lambda: 3)
                tiled, some_tiled = engine.nearest(*ask), engine.nearest(*ask, rows=rows)
            for ours, theirs in ((wanted, tiled), (some, some_tiled)):
                torch.testing.assert_close(ours[0], theirs[0], atol=1e-6, rtol=1e-6)
                assert (ours[1] == theirs[1]).float().mean() > 0.99  # ties may swap


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("m", [1, 3, 20])
def test_only_some_rows(engine: Engine, metric: Metric, m: int) -> None:
    block, q, lengths = problem(257, m, unit=True)
    rows = torch.randperm(257, generator=torch.Generator().manual_seed(1))[:40]
    wanted = exact(block, metric, q)
    scores, columns = engine.nearest(block, metric, q, lengths, 26, rows=rows)
    assert set(columns.unique().tolist()) <= set(rows.tolist())
    smallest = wanted[:, rows].sort(dim=1).values[:, :26]
    torch.testing.assert_close(scores.double(), smallest, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(scores.double(), wanted.gather(1, columns), atol=2e-5, rtol=2e-5)
    for few in (rows[:3], rows[:0]):
        scores, columns = engine.nearest(block, metric, q, lengths, 26, rows=few)
        assert columns.sort(dim=1).values.tolist() == [few.sort().values.tolist()] * m
        assert scores.shape == (m, len(few))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("m", [1, 20])
def test_a_masked_row_is_never_returned(metric: Metric, m: int) -> None:
    for engine in (TorchEngine(), TorchEngine(faiss)):
        block, q, lengths = problem(257, m)
        for share in (0.0, 0.02, 0.5, 1.0):
            mask = torch.rand(257, generator=torch.Generator().manual_seed(2)) < share
            scores, columns = engine.nearest(block, metric, q, lengths, 26, mask=mask)
            count = min(26, int(mask.sum()))
            assert (columns[:, count:] == -1).all() and (scores[:, count:] == math.inf).all()
            assert mask[columns[:, :count]].all()
            wanted = exact(block, metric, q).masked_fill(~mask, math.inf).sort(dim=1).values
            torch.testing.assert_close(scores.double(), wanted[:, :26], atol=2e-5, rtol=2e-5)


def test_nothing_to_find(engine: Engine) -> None:
    block, q, lengths = problem(10, 3)
    empty = Block(block.vectors[:0], block.norms[:0])
    assert engine.nearest(empty, Metric.L2, q, lengths, 5)[1].shape == (3, 0)
    assert engine.nearest(block, Metric.L2, q[:0], lengths[:0], 5)[1].shape[0] == 0


# ------------------------------------------------ scores that are not numbers


@pytest.mark.parametrize("metric", [Metric.L2, Metric.DOT])
@pytest.mark.parametrize("m", [1, 3, 20])
def test_what_overflows_is_always_a_candidate(engine: Engine, metric: Metric, m: int) -> None:
    block, q, _ = problem(100, m)
    x = block.vectors.clone()
    x[[7, 55]] = 3e38  # |x|² and some products are infinite, or infinity minus infinity
    x[55, ::2] *= -1
    q = q.clone()
    q[0] = 2e19 if metric is Metric.L2 else 3.0
    lengths = torch.linalg.vector_norm(q, dim=1)
    scores, columns = engine.nearest(block_of(x), metric, q, lengths, 5)
    assert (scores.diff(dim=1).nan_to_num(0.0) >= 0).all()
    assert not scores.isnan().any()
    if metric is Metric.L2:
        assert (
            (columns == 7).any(dim=1) & (columns == 55).any(dim=1) | (scores[:, -1] == -math.inf)
        ).all()
        assert (scores[:, :2] == -math.inf).all()
    else:  # what is finite has its place, what is not is in front
        product = q.double() @ x.double().T
        over = product.abs() > 3.4e38
        for line in range(m):
            lost = set(over[line].nonzero()[:, 0].tolist()) - set(columns[line].tolist())
            assert not lost


def test_odd_norms_are_always_candidates_under_cosine() -> None:
    for engine in (TorchEngine(), TorchEngine(faiss)):
        for m in (1, 3, 20):
            block, q, lengths = problem(100, m)
            x = block.vectors.clone()
            x[3] *= 1e-20
            x[9] *= 1e19
            x[12] = 0
            block = block_of(x)
            scores, columns = engine.nearest(block, Metric.COSINE, q, lengths, 10)
            assert (columns[:, :3].sort(dim=1).values == torch.tensor([3, 9, 12])).all()
            assert (scores[:, :3] == -math.inf).all() and scores[:, 3:].isfinite().all()
            mask = torch.ones(100, dtype=torch.bool)
            mask[12] = False
            scores, columns = engine.nearest(block, Metric.COSINE, q, lengths, 10, mask=mask)
            assert (columns[:, :2].sort(dim=1).values == torch.tensor([3, 9])).all()
            assert not (columns == 12).any() and scores[:, 2:].isfinite().all()


def test_the_overflow_limit_is_that_of_the_proof() -> None:
    assert base.OVERFLOW == OVERFLOW


# -------------------------------------------------------------- what they refuse


def test_what_faiss_serves() -> None:
    engine = FaissEngine(faiss, CPU)
    assert engine.serves(Metric.L2, torch.float32, MAX_K, False)
    assert engine.serves(Metric.DOT, torch.float32, 1, False)
    assert engine.serves(Metric.COSINE, torch.float32, 1, True)
    assert not engine.serves(Metric.COSINE, torch.float32, 1, False)
    assert not engine.serves(Metric.L2, torch.float32, MAX_K + 1, False)
    assert not engine.serves(Metric.L2, torch.float16, 1, True)
    assert TorchEngine().serves(Metric.COSINE, torch.float16, 10**6, False)
    block, q, lengths = problem(10, 1)
    with pytest.raises(IndexBackendError, match=str(MAX_K)):
        engine.nearest(block, Metric.L2, q, lengths, MAX_K + 1)
    half = Block(block.vectors.half(), block.norms)
    with pytest.raises(IndexBackendError, match="float16"):
        engine.nearest(half, Metric.L2, q, lengths, 1)


def test_bad_tensors_are_refused_before_their_pointer_is_taken(engine: Engine) -> None:
    block, q, lengths = problem(10, 4)
    for queries, norms, c in (
        (q.double(), lengths, 1),
        (q[:, :5].contiguous(), lengths, 1),
        (q.T.contiguous().T, lengths, 1),
        (q, lengths[:2], 1),
        (q, lengths, 0),
        (q.to("meta"), lengths, 1),
    ):
        with pytest.raises(IndexBackendError, match="An engine wants contiguous"):
            engine.nearest(block, Metric.L2, queries, norms, c)
    for x, norms in (
        (block.vectors.double(), block.norms),
        (block.vectors, block.norms[:3]),
        (block.vectors.T, block.norms),
        (block.vectors[0], block.norms),
        (block.vectors, block.norms.half()),
    ):
        with pytest.raises(IndexBackendError, match="A block wants"):
            Block(x, norms)
    with pytest.raises(IndexBackendError, match="A mask wants"):
        TorchEngine().nearest(block, Metric.L2, q, lengths, 1, mask=torch.ones(3).bool())
    with pytest.raises(IndexBackendError, match="not both"):
        TorchEngine().nearest(
            block, Metric.L2, q, lengths, 1, mask=torch.ones(10).bool(), rows=torch.arange(3)
        )


# ------------------------------------------------------------------------ threads


def test_slices_make_up_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    for rows in (1, 2, 3, 5, 1001):
        parts = threads.in_slices(rows, threads.SLICE_BYTES, lambda a, b: list(range(a, b)))
        assert [row for part in parts for row in part] == list(range(rows))
        assert len(parts) == min(rows, 4)
    assert len(threads.in_slices(1000, threads.SLICE_BYTES // 500 + 1, lambda a, b: None)) == 2
    assert len(threads.in_slices(1000, 1, lambda a, b: None)) == 1


def test_an_error_in_a_slice_waits_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for bad in (0, 1):
        failed, ended = threading.Event(), []

        def work(start: int, stop: int) -> None:
            if start == bad:  # noqa: B023
                failed.set()  # noqa: B023
                raise MemoryError("no room")
            assert failed.wait(30)  # noqa: B023
            ended.append(start)  # noqa: B023

        with pytest.raises(MemoryError, match="no room"):
            threads.in_slices(2, threads.SLICE_BYTES, work)
        assert ended == [1 - bad]


def test_slices_at_the_end_of_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools take no work any more when exit handlers run."""
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    monkeypatch.setattr(threads, "_pool", lambda process: pool)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    parts = threads.in_slices(9, threads.SLICE_BYTES, lambda a, b: list(range(a, b)))
    assert [row for part in parts for row in part] == list(range(9))


def test_faiss_settings_are_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "SLICE_BYTES", 100)
    before = faiss.cvar.distance_compute_blas_threshold, faiss.omp_get_max_threads()
    block, q, lengths = problem(257, 20)
    engine = FaissEngine(faiss, CPU)
    for m in (1, 20):
        engine.nearest(block, Metric.L2, q[:m], lengths[:m], 9)
    with blas_threshold.at(faiss, 5):
        assert faiss.cvar.distance_compute_blas_threshold == 5
        engine.nearest(block, Metric.L2, q, lengths, 9)
    assert (faiss.cvar.distance_compute_blas_threshold, faiss.omp_get_max_threads()) == before


def test_many_threads_search_at_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "SLICE_BYTES", 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    block, q, lengths = problem(257, 6)
    wanted = {m: engine.nearest(block, Metric.L2, q[:m], lengths[:m], 9)[1] for m in (1, 3, 6)}
    failed: list[int] = []

    def search(m: int) -> None:
        for _ in range(20):
            found = engine.nearest(block, Metric.L2, q[:m], lengths[:m], 9)[1]
            if not torch.equal(found, wanted[m]):
                failed.append(m)

    runs = [threading.Thread(target=search, args=(m,)) for m in (1, 3, 6) * 2]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert not failed


def test_best_keeps_the_smallest_of_many_parts() -> None:
    scores = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))
    best = Best(7)
    for start in range(0, 5000, 13):
        part = scores[:, start : start + 13]
        best.add(part, torch.arange(start, start + part.shape[1]).expand(3, -1))
    found, columns = best.sorted()
    assert torch.equal(found, scores.sort(dim=1).values[:, :7])
    assert torch.equal(scores.gather(1, columns), found)


# --------------------------------------------------------------------------- CUDA


class Parameters:
    """The fields of FAISS's GpuDistanceParams, and no others."""

    __slots__ = (
        "device", "dims", "ignoreOutDistances", "k", "metric", "metricArg", "numQueries",
        "numVectors", "outDistances", "outIndices", "outIndicesType", "queries",
        "queriesRowMajor", "queryType", "use_cuvs", "vectorNorms", "vectorType", "vectors",
        "vectorsRowMajor",
    )  # fmt: skip


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A FAISS whose bfKnn runs on the CPU; what a GPU says to it, the tests marked ``gpu`` show."""
    log: list[Any] = []

    class Resources:
        def setTempMemory(self, size: int) -> None: ...
        def setPinnedMemory(self, size: int) -> None: ...
        def getDefaultStream(self, device: int) -> int:
            return 0

        def setDefaultStream(self, device: int, stream: int) -> None:
            log.append(("stream", (device, stream)))

    def bf_knn(resources: Resources, args: Parameters) -> None:
        assert isinstance(resources, Resources)
        assert log[-1] == ("stream", (0, 77))
        log.append(("bfKnn", args))
        assert (args.vectorType, args.queryType, args.outIndicesType) == (1, 1, 1)
        assert args.vectorsRowMajor and args.queriesRowMajor
        assert (args.device, args.use_cuvs) == (0, False)
        sizes = (args.dims, args.numQueries, args.numVectors, args.k)
        out = (args.outDistances, args.outIndices)
        if args.metric == faiss.METRIC_L2:
            faiss.knn_L2sqr(args.queries, args.vectors, *sizes, *out, args.vectorNorms, None)
        else:
            assert not hasattr(args, "vectorNorms")
            faiss.knn_inner_product(args.queries, args.vectors, *sizes, *out)

    class Nothing:
        def __init__(self, *_: Any) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "device", Nothing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))
    monkeypatch.setattr(GpuResources, "_by_device", {})
    return SimpleNamespace(
        GpuDistanceParams=Parameters,
        StandardGpuResources=Resources,
        bfKnn=bf_knn,
        DistanceDataType_F32=1,
        IndicesDataType_I64=1,
        METRIC_L2=faiss.METRIC_L2,
        METRIC_INNER_PRODUCT=faiss.METRIC_INNER_PRODUCT,
        cast_integer_to_float_ptr=faiss.cast_integer_to_float_ptr,
        cast_integer_to_idx_t_ptr=faiss.cast_integer_to_idx_t_ptr,
        cast_integer_to_cudastream_t=lambda stream: stream,
        log=log,
    )


@pytest.mark.parametrize("metric", METRICS)
def test_the_gpu_branch_makes_the_right_calls(pretend: SimpleNamespace, metric: Metric) -> None:
    engine = FaissEngine(pretend, torch.device("cuda", 0))
    assert engine.name == "faiss bfKnn"
    for n, m, c in ((100, 1, 5), (257, 20, 26), (3, 2, 26)):
        block, q, lengths = problem(n, m, unit=True)
        found = engine.nearest(block, metric, q, lengths, c)
        assert_nearest(found, exact(block, metric, q), c)
        rows = torch.arange(0, n, 2)
        _, columns = engine.nearest(block, metric, q, lengths, c, rows=rows)
        assert (columns % 2 == 0).all() and columns.shape == (m, min(c, len(rows)))
    assert [name for name, _ in pretend.log] == ["stream", "bfKnn"] * 6


def test_faiss_built_for_gpus_has_these_fields() -> None:
    if not hasattr(faiss, "GpuDistanceParams"):
        pytest.skip("this FAISS is built for the CPU only")
    fields = {name for name in dir(faiss.GpuDistanceParams) if not name.startswith("_")}
    assert set(Parameters.__slots__) <= fields


@pytest.mark.gpu
@pytest.mark.skipif(not hasattr(faiss, "GpuIndexFlat"), reason="FAISS is built for the CPU only")
@pytest.mark.parametrize("metric", METRICS)
def test_on_a_gpu(metric: Metric) -> None:
    device = torch.device("cuda", 0)
    module, reason = load_faiss(device)
    assert module is not None, reason
    side = torch.cuda.Stream(device)
    for engine in (FaissEngine(module, device), TorchEngine()):
        for n, m, c in ((100, 1, 5), (20_000, 100, 26), (20_000, 1, MAX_K)):
            host, q, lengths = problem(n, m, unit=True)
            rows = torch.arange(0, n, 7)
            with torch.cuda.stream(side):  # what it reads is made on a stream of its own
                block = Block(host.vectors.to(device), host.norms.to(device))
                ask = (block, metric, q.to(device), lengths.to(device), c)
                found = engine.nearest(*ask)
                some = engine.nearest(*ask, rows=rows.to(device))
            torch.cuda.current_stream(device).wait_stream(side)
            assert found[0].device == found[1].device == device
            wanted = exact(host, metric, q)
            assert_nearest((found[0].cpu(), found[1].cpu()), wanted, c)
            smallest = wanted[:, rows].sort(dim=1).values[:, :c]
            torch.testing.assert_close(some[0].cpu().double(), smallest, atol=2e-5, rtol=2e-5)
