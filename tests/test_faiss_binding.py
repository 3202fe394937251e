"""Finding FAISS or saying why not, and handing it tensors by pointer."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gpu_lance.errors import IndexBackendError, MissingExtraError
from gpu_lance.index import FlatIndex, faiss_binding
from gpu_lance.index.faiss_binding import MAX_K, FaissStore, GpuResources, load_faiss
from gpu_lance.index.planner import Planner
from gpu_lance.types import Metric

faiss = pytest.importorskip("faiss")
CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(
    not (torch.cuda.is_available() and hasattr(faiss, "GpuIndexFlat")),
    reason="needs a CUDA device and a FAISS that is built for it",
)


def store_of(rows: torch.Tensor, metric: Metric = Metric.L2) -> FaissStore:
    store = FaissStore(faiss, rows.shape[1], rows.device, metric)
    store.add(rows)
    return store


# -------------------------------------------------------------------- finding it


def test_without_faiss_torch_searches_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str, extra: str) -> ModuleType:
        if module == "faiss":
            raise MissingExtraError("faiss is not installed. To get it: pip install it")
        return importlib.import_module(module)

    monkeypatch.setattr(faiss_binding, "require", missing)
    monkeypatch.setattr(Planner, "_by_device", {})
    index = FlatIndex(2, "l2", CPU)
    index.add(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), np.array([4, 5]))
    assert index.search(torch.tensor([[3.0, 3.0]]), 2).row_ids.tolist() == [[5, 4]]
    assert index.info()["engine"] == "torch"
    assert "faiss is not installed" in index.info()["reason"]


def test_a_broken_faiss_shows_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: str, extra: str) -> ModuleType:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(faiss_binding, "require", broken)
    monkeypatch.setattr(Planner, "_by_device", {})
    with pytest.raises(ImportError, match="libcudart") as caught:
        FlatIndex(2, "l2", CPU)
    assert not isinstance(caught.value, MissingExtraError)


def test_doubled_faiss_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_binding, "_installed_wheels", lambda: ["faiss-cpu", "faiss-gpu"])
    with pytest.raises(IndexBackendError, match=r"faiss-cpu and faiss-gpu.*pip uninstall"):
        load_faiss(CPU)


def test_what_is_left_of_a_faiss_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", ModuleType("faiss"))
    with pytest.raises(IndexBackendError, match="remains of one"):
        load_faiss(CPU)


def test_which_faiss_serves_which_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    assert load_faiss(CPU) == (faiss, f"faiss {faiss.__version__}")
    assert load_faiss(torch.device("mps"))[1] == "FAISS does not run on mps."
    parts: dict[str, Any] = {"IndexFlat": 1, "__version__": "9", "get_num_gpus": lambda: 1}
    for extra, reason in (
        ({}, "for the CPU only"),
        ({"GpuIndexFlat": 1, "get_num_gpus": lambda: 0}, "sees 0 GPUs"),
        ({"GpuIndexFlat": 1}, None),
    ):
        monkeypatch.setitem(sys.modules, "faiss", SimpleNamespace(**{**parts, **extra}))
        module, said = load_faiss(cuda)
        assert (module is None) == (reason is not None)
        assert reason is None or reason in said
    assert load_faiss(torch.device("cuda", 1))[0] is None  # one GPU: there is no second


def test_the_installed_wheel_is_found_once() -> None:
    assert len(faiss_binding._installed_wheels()) == 1


# ---------------------------------------------------------------------- the store


@pytest.mark.parametrize("metric", [Metric.L2, Metric.DOT])
def test_scores_are_distances(metric: Metric) -> None:
    rows = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    queries = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    scores, slots = store_of(rows, metric).candidates(queries, 40)
    exact = torch.cdist(queries, rows) ** 2 if metric is Metric.L2 else 1 - queries @ rows.T
    torch.testing.assert_close(scores, exact.gather(1, slots), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores, exact.sort(dim=1).values, atol=1e-5, rtol=1e-5)


def test_cpu_tiles_are_views_of_its_memory() -> None:
    rows = torch.arange(24.0).view(8, 3)
    store = store_of(rows)
    tiles = list(store.tiles(3))
    assert [start for start, _ in tiles] == [0, 3, 6]
    assert torch.equal(torch.cat([tile for _, tile in tiles]), rows)
    step = tiles[1][1].data_ptr() - tiles[0][1].data_ptr()
    assert step == 3 * 3 * 4
    assert tiles[0][1].data_ptr() != rows.data_ptr()


def test_reserve_takes_the_memory_once() -> None:
    store = FaissStore(faiss, 3, CPU, Metric.L2)
    store.reserve(1000)
    assert len(store) == 0
    store.add(torch.zeros(10, 3))
    where = next(store.tiles(1))[1].data_ptr()
    store.add(torch.ones(990, 3))
    assert len(store) == 1000
    assert next(store.tiles(1))[1].data_ptr() == where


def test_keep_and_gather() -> None:
    rows = torch.arange(30.0).view(10, 3)
    store = store_of(rows)
    assert torch.equal(store.gather(torch.tensor([9, 0, 0])), rows[[9, 0, 0]])
    store.keep(torch.tensor([1, 4, 8]))
    assert torch.equal(next(store.tiles(9))[1], rows[[1, 4, 8]])
    store.close()
    assert len(store) == 0


def test_wrong_tensors_are_refused_before_their_pointer_is_taken() -> None:
    store = store_of(torch.zeros(4, 3))
    with pytest.raises(IndexBackendError, match="float64"):
        store.add(torch.zeros(2, 3, dtype=torch.float64))
    with pytest.raises(IndexBackendError, match="contiguous: False"):
        store.candidates(torch.zeros(3, 4).T[:2], 1)
    with pytest.raises(IndexBackendError, match=str(MAX_K)):
        store.candidates(torch.zeros(1, 3), MAX_K + 1)


# ---------------------------------------------------- nothing changes for others


def test_the_blas_threshold_is_ours_only_while_we_search() -> None:
    before = faiss.cvar.distance_compute_blas_threshold
    assert before != 1
    with faiss_binding._blas_threshold.lowered(faiss):
        with faiss_binding._blas_threshold.lowered(faiss):
            assert faiss.cvar.distance_compute_blas_threshold == 1
        assert faiss.cvar.distance_compute_blas_threshold == 1
    assert faiss.cvar.distance_compute_blas_threshold == before
    store = store_of(torch.randn(100, 3))
    threads = [
        threading.Thread(target=lambda: [store.candidates(torch.zeros(9, 3), 5) for _ in range(50)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with pytest.raises(IndexBackendError):
        store.candidates(torch.zeros(1, 3), MAX_K + 1)
    assert faiss.cvar.distance_compute_blas_threshold == before


def test_faiss_is_not_patched_and_lazy_import_loads_nothing() -> None:
    code = (
        "import sys, gpu_lance.index as i\n"
        "assert not {'torch', 'faiss', 'lance'} & set(sys.modules), sys.modules.keys()\n"
        "i.Flat()\n"
        "assert not {'torch', 'faiss'} & set(sys.modules)\n"
        "import torch, numpy\n"
        "x = i.FlatIndex(2, 'l2', torch.device('cpu'))\n"
        "x.add(torch.zeros(3, 2), numpy.arange(3))\n"
        "x.search(torch.zeros(1, 2), 2)\n"
        "assert 'faiss' in sys.modules and 'faiss.contrib.torch_utils' not in sys.modules\n"
        "assert 'torch_replacement' not in sys.modules['faiss'].IndexFlat.search.__name__\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -------------------------------------------------------------------------- CUDA


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A FAISS whose GPU classes run on the CPU, with the signatures of the GPU wheel.

    It shows that the GPU branch makes the calls it should, under its lock and on a stream that
    was set; whether a GPU likes them, the tests marked ``gpu`` show.
    """
    log: list[tuple[str, Any]] = []

    class Resources:
        def setTempMemory(self, size: int) -> None:
            log.append(("temp", size))

        def setPinnedMemory(self, size: int) -> None:
            log.append(("pinned", size))

        def setDefaultStream(self, device: int, stream: int) -> None:
            log.append(("stream", (device, stream)))

        def getDefaultStream(self, device: int) -> int:
            log.append(("init", device))
            return 0

    class Index:
        def __init__(self, resources: Resources, d: int, metric: int, config: Any) -> None:
            assert isinstance(resources, Resources)
            assert (config.device, config.use_cuvs) == (0, False)
            self.inner = faiss.IndexFlat(d, metric)

        def __getattr__(self, name: str) -> Any:
            # what the GPU class has; get_xb, codes and remove_ids it has not
            assert name in {
                "ntotal", "add_c", "search_c", "reconstruct_n_c", "reconstruct_batch_c", "reset",
            }, name  # fmt: skip
            if name != "ntotal":
                assert log[-1][0] == "stream"
                log.append((name, None))
            return getattr(self.inner, name)

    class Nothing:
        def __init__(self, *_: Any) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    fake = SimpleNamespace(
        GpuIndexFlat=Index,
        GpuIndexFlatConfig=SimpleNamespace,
        StandardGpuResources=Resources,
        METRIC_L2=faiss.METRIC_L2,
        METRIC_INNER_PRODUCT=faiss.METRIC_INNER_PRODUCT,
        cast_integer_to_float_ptr=faiss.cast_integer_to_float_ptr,
        cast_integer_to_idx_t_ptr=faiss.cast_integer_to_idx_t_ptr,
        cast_integer_to_cudastream_t=lambda stream: stream,
        log=log,
    )
    monkeypatch.setattr(torch.cuda, "device", Nothing)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77)
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: log.append(("released", None)))
    monkeypatch.setattr(GpuResources, "_by_device", {})
    return fake


def test_the_gpu_branch_makes_the_right_calls(pretend: SimpleNamespace) -> None:
    store = FaissStore(pretend, 3, torch.device("cuda", 0), Metric.L2)
    assert pretend.log[:3] == [("temp", 512 << 20), ("pinned", 0), ("init", 0)]
    assert store.name == "faiss GpuIndexFlat"
    store.device = CPU  # the tensors of this test
    rows = torch.arange(30.0).view(10, 3)
    store.reserve(10)
    store.add(rows)
    assert torch.equal(store.candidates(rows[:2].contiguous(), 3)[1][:, 0], torch.tensor([0, 1]))
    assert torch.equal(torch.cat([tile.clone() for _, tile in store.tiles(4)]), rows)
    assert torch.equal(store.gather(torch.tensor([9, 2])), rows[[9, 2]])
    store.keep(torch.tensor([0, 5, 9]))
    assert torch.equal(next(store.tiles(5))[1], rows[[0, 5, 9]])
    store.close()
    assert len(store) == 0
    assert {stream for name, stream in pretend.log if name == "stream"} == {(0, 77)}
    assert {"add_c", "search_c", "reconstruct_n_c", "reconstruct_batch_c", "reset"} <= {
        name for name, _ in pretend.log
    }


def test_resources_are_shared_by_the_indexes_of_a_device(pretend: SimpleNamespace) -> None:
    assert GpuResources.of(pretend, 0) is GpuResources.of(pretend, 0)
    assert [name for name, _ in pretend.log].count("temp") == 1


def test_torch_gives_back_what_the_resources_need(
    pretend: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700 << 20, 1 << 40))
    GpuResources.of(pretend, 0)
    assert [name for name, _ in pretend.log] == ["temp", "pinned", "released", "init"]


def test_resources_that_did_not_get_their_memory_are_not_used_again(
    pretend: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Any, device: int) -> int:
        raise RuntimeError("cudaMalloc error out of memory [2]")

    with monkeypatch.context() as patch:
        patch.setattr(pretend.StandardGpuResources, "getDefaultStream", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            FaissStore(pretend, 3, torch.device("cuda", 0), Metric.L2)
    assert len(FaissStore(pretend, 3, torch.device("cuda", 0), Metric.L2)) == 0
    assert [name for name, _ in pretend.log].count("temp") == 2


@pytest.mark.gpu
@needs_cuda
def test_on_a_gpu_tensors_stay_there_and_streams_are_obeyed() -> None:
    device = torch.device("cuda", 0)
    module, reason = load_faiss(device)
    assert module is not None, reason
    store = FaissStore(module, 64, device, Metric.L2)
    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side):  # made and added on a stream that is not the default one
        rows = torch.randn(20000, 64, device=device)
        store.add(rows)
        _, slots = store.candidates(rows[:100].contiguous(), 1)
    torch.cuda.current_stream(device).wait_stream(side)
    assert slots.device == device
    assert slots[:, 0].tolist() == list(range(100))
    assert torch.equal(torch.cat([tile.clone() for _, tile in store.tiles(3000)]), rows)
    picked = torch.tensor([7, 19999, 7], device=device)
    assert torch.equal(store.gather(picked), rows[picked])
    store.keep(picked[:2])
    assert torch.equal(next(store.tiles(5))[1], rows[picked[:2]])
    store.close()


@pytest.mark.gpu
@needs_cuda
def test_two_gpu_indexes_searched_from_many_threads() -> None:
    device = torch.device("cuda", 0)
    stores = [FaissStore(load_faiss(device)[0], 16, device, m) for m in (Metric.L2, Metric.DOT)]
    rows = torch.randn(5000, 16, device=device)
    failures: list[BaseException] = []
    for store in stores:
        store.add(rows)
    wanted = [store.candidates(rows[:50].contiguous(), 5)[1].cpu() for store in stores]

    def search(which: int) -> None:
        try:
            for _ in range(50):
                found = stores[which].candidates(rows[:50].contiguous(), 5)[1].cpu()
                assert torch.equal(found, wanted[which])
        except BaseException as error:  # the main thread raises it
            failures.append(error)

    threads = [threading.Thread(target=search, args=(i % 2,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
