"""Which engine is taken, why, and that asking is cheap."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import pytest
import torch

from gpu_lance.errors import MissingExtraError
from gpu_lance.index import faiss_binding, planner
from gpu_lance.index.engines import Block
from gpu_lance.index.planner import Planner
from gpu_lance.types import Metric

pytest.importorskip("faiss")
CPU = torch.device("cpu")
ROWS, NDIMS = 2000, 32


@pytest.fixture
def block() -> Block:
    x = torch.randn(ROWS, NDIMS, generator=torch.Generator().manual_seed(0))
    return Block(x, torch.linalg.vector_norm(x, dim=1))


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Planner:
    """A planner that finds every table worth a measurement."""
    monkeypatch.setattr(planner, "WORTH_BYTES", 0)
    return Planner(CPU)


def choose(planner_: Planner, m: int, block: Block, metric: Metric = Metric.L2) -> Any:
    ask = (metric, torch.float32, NDIMS, ROWS, m, 26, True)
    return planner_.engine(*ask, sample=lambda: block)


def slowed(monkeypatch: pytest.MonkeyPatch, engine: Any, seconds: float) -> list[int]:
    """Make an engine slower; gives the number of queries of each of its searches."""
    real, seen = engine.nearest, []

    def nearest(
        block: Block, metric: Metric, queries: torch.Tensor, *rest: Any, **more: Any
    ) -> Any:
        seen.append(len(queries))
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass
        return real(block, metric, queries, *rest, **more)

    monkeypatch.setattr(engine, "nearest", nearest)
    return seen


def test_one_planner_a_device() -> None:
    assert Planner.of(CPU) is Planner.of(torch.device("cpu"))


def test_small_tables_and_those_without_a_sample_are_not_measured(block: Block) -> None:
    ours = Planner(CPU)
    assert choose(ours, 1, block).is_faiss
    assert ours.engine(Metric.L2, torch.float32, 384, 10**6, 100, 26, False).is_faiss
    info = ours.info()
    assert info["engine"] == "faiss knn"
    assert info["reason"].startswith("faiss ") and info["reason"].endswith("not measured")
    assert info["gathered"] == []


@pytest.mark.parametrize("faster", ["faiss", "torch"])
@pytest.mark.parametrize("m", [1, 100])
def test_the_faster_engine_is_taken(
    eager: Planner, block: Block, monkeypatch: pytest.MonkeyPatch, faster: str, m: int
) -> None:
    slowed(monkeypatch, eager._faiss, 0.02 if faster == "torch" else 0)
    slowed(monkeypatch, eager.masked, 0.02 if faster == "faiss" else 0)
    engine = choose(eager, m, block)
    assert engine.name == ("faiss knn" if faster == "faiss" else "torch")
    info = eager.info()
    assert info["engine"] == engine.name
    assert f"{64 if m > 1 else 1} queries over 2000 rows: faiss knn" in info["reason"]
    assert "torch" in info["reason"] and "masked" in info["reason"]


def test_each_kind_is_measured_once(
    eager: Planner, block: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = slowed(monkeypatch, eager._faiss, 0)
    for _ in range(3):
        for m in (1, 4, 5, 100):
            for metric in Metric:
                choose(eager, m, block, metric)
    assert set(seen) == {1, planner.MANY}
    assert len(eager._choices) == 4  # few or many, l2 or a product
    rounds = len(seen)
    choose(eager, 1, block)
    assert len(seen) == rounds
    assert len(eager.info()["gathered"]) == 2


def test_threads_measure_once(
    eager: Planner, block: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = slowed(monkeypatch, eager._faiss, 0.001)
    runs = [threading.Thread(target=choose, args=(eager, 1, block)) for _ in range(6)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(seen) == 3 * (planner.ROUNDS + 1)  # one, and one with a tile gathered


def test_what_faiss_does_not_serve_goes_to_torch(eager: Planner, block: Block) -> None:
    for metric, dtype, c, unit, said in (
        (Metric.L2, torch.float16, 26, True, "float16"),
        (Metric.COSINE, torch.float32, 26, False, "not unit vectors"),
        (Metric.DOT, torch.float32, 5000, False, "fewer than 5000"),
    ):
        engine = eager.engine(metric, dtype, NDIMS, ROWS, 1, c, unit, sample=lambda: block)
        assert engine is eager.masked
        assert said in eager.info()["reason"]


def test_without_faiss_torch_searches_and_the_reason_is_said(
    block: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose(Planner(CPU, faiss=False), 1, block).name == "torch"

    def missing(module: str, extra: str) -> Any:
        if module == "faiss":
            raise MissingExtraError("faiss is not installed. To get it: pip install it")
        return torch

    monkeypatch.setattr(faiss_binding, "require", missing)
    ours = Planner(CPU)
    assert choose(ours, 1, block).name == "torch"
    assert "faiss is not installed" in ours.info()["reason"]


def test_a_measurement_that_fails_costs_nothing_but_itself(
    eager: Planner, block: Block, caplog: pytest.LogCaptureFixture
) -> None:
    tries = []

    def sample() -> Block:
        tries.append(1)
        raise RuntimeError("out of memory: tried to allocate 64 MiB")

    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            engine = eager.engine(
                Metric.L2, torch.float32, NDIMS, ROWS, 1, 26, False, sample=sample
            )
            assert engine.name == "faiss knn"
    assert len(tries) == 1
    assert "out of memory" in caplog.text
    assert "measuring failed: out of memory" in eager.info()["reason"]


def test_what_is_gathered(eager: Planner, block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Planner(CPU)
    for m in (1, 100):  # before anything is measured
        assert eager.gathers(ROWS, ROWS // 100, m, NDIMS)
        assert not eager.gathers(ROWS, ROWS * 9 // 10, m, NDIMS)
    slowed(monkeypatch, eager.masked, 0.05)  # now a mask is dear
    slowed(monkeypatch, other._faiss, 0.05)  # and there a gather
    least, most = planner.BOUNDS[False]
    for ours, share in ((eager, most), (other, least)):
        choose(ours, 1, block)
        assert ours.gathers(ROWS, int(ROWS * share) - 1, 1, NDIMS)
        assert not ours.gathers(ROWS, int(ROWS * share) + 1, 1, NDIMS)
        assert ours.gathers(ROWS, ROWS * 4 // 10, 100, NDIMS)  # not measured


def test_asking_is_cheap(eager: Planner, block: Block) -> None:
    choose(eager, 1, block)

    def seconds(work: Any) -> float:
        best = float("inf")
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(50):
                work()
            best = min(best, (time.perf_counter() - start) / 50)
        return best

    assert seconds(lambda: choose(eager, 1, block)) < 100e-6
    assert seconds(lambda: eager.gathers(ROWS, 10, 1, NDIMS)) < 100e-6


@pytest.mark.gpu
def test_on_a_gpu_it_measures_after_the_work_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "WORTH_BYTES", 0)
    ours = Planner(torch.device("cuda", 0))
    x = torch.randn(100_000, 128, device=ours.device)
    block = Block(x, torch.linalg.vector_norm(x, dim=1))
    for m in (1, 100):
        ours.engine(Metric.L2, torch.float32, 128, len(x), m, 26, False, sample=lambda: block)
        assert "measuring failed" not in ours.info()["reason"]
