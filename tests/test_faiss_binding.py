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
from gpu_lance.index.engines import Block
from gpu_lance.index.faiss_binding import MAX_K, GpuResources, load_faiss
from gpu_lance.index.faiss_engine import FaissEngine
from gpu_lance.index.planner import Planner
from gpu_lance.types import Metric

faiss = pytest.importorskip("faiss")
CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(
    not (torch.cuda.is_available() and hasattr(faiss, "GpuIndexFlat")),
    reason="needs a CUDA device and a FAISS that is built for it",
)


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


# ---------------------------------------------------- nothing changes for others


def test_the_blas_threshold_is_ours_only_while_we_search() -> None:
    before = faiss.cvar.distance_compute_blas_threshold
    assert before != 1
    with faiss_binding.blas_threshold.at(faiss, 1):
        with faiss_binding.blas_threshold.at(faiss, 1):
            assert faiss.cvar.distance_compute_blas_threshold == 1
        assert faiss.cvar.distance_compute_blas_threshold == 1
    assert faiss.cvar.distance_compute_blas_threshold == before
    engine = FaissEngine(faiss, CPU)
    rows = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    block, queries = Block(rows, rows.norm(dim=1)), torch.zeros(9, 3)

    def search() -> None:
        for _ in range(50):
            engine.nearest(block, Metric.L2, queries, torch.zeros(9), 5)

    threads = [threading.Thread(target=search) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with pytest.raises(IndexBackendError):
        engine.nearest(block, Metric.L2, queries, torch.zeros(9), MAX_K + 1)
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

    class Nothing:
        def __init__(self, *_: Any) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    fake = SimpleNamespace(
        StandardGpuResources=Resources,
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


def test_a_session_is_on_torchs_current_stream(pretend: SimpleNamespace) -> None:
    resources = GpuResources.of(pretend, 0)
    assert pretend.log == [("temp", 512 << 20), ("pinned", 0), ("init", 0)]
    with resources.session():
        assert pretend.log[-1] == ("stream", (0, 77))


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
            GpuResources.of(pretend, 0)
    assert GpuResources.of(pretend, 0).handle is not None
    assert [name for name, _ in pretend.log].count("temp") == 2


@pytest.mark.gpu
@needs_cuda
def test_a_gpu_is_searched_from_many_threads() -> None:
    device = torch.device("cuda", 0)
    module, reason = load_faiss(device)
    assert module is not None, reason
    rows = torch.randn(5000, 16, device=device)
    block, queries = Block(rows, rows.norm(dim=1)), rows[:50].contiguous()
    engine, failures = FaissEngine(module, device), list[BaseException]()

    def found(metric: Metric) -> torch.Tensor:
        return engine.nearest(block, metric, queries, block.norms[:50], 5)[1].cpu()

    wanted = {metric: found(metric) for metric in (Metric.L2, Metric.DOT)}

    def search(metric: Metric) -> None:
        try:
            for _ in range(50):
                assert torch.equal(found(metric), wanted[metric])
        except BaseException as error:  # the main thread raises it
            failures.append(error)

    threads = [threading.Thread(target=search, args=(metric,)) for metric in [*wanted] * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    assert wanted[Metric.L2][:, 0].tolist() == list(range(50))
