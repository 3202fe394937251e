"""Which engine searches, and whether rows that pass a filter are gathered first.

Both are decided by a measurement on the rows themselves, made once per device and kind of search.
Tables below 16 MiB are not worth one: they take FAISS where there is FAISS.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from gpu_lance.index.engines import FEW_QUERIES, Block, Engine
from gpu_lance.index.faiss_binding import load_faiss
from gpu_lance.index.faiss_engine import FaissEngine
from gpu_lance.index.torch_engine import TorchEngine
from gpu_lance.optional import require
from gpu_lance.types import Metric

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

EXTRAS = "cpu|cuda13|cuda12"
WORTH_BYTES = 16 << 20  # of vectors; a smaller table is searched before it is measured
SAMPLE_BYTES = {False: 64 << 20, True: 16 << 20}  # few queries must not fit a cache; by `many`
MANY = 64  # queries in a measurement of many
ROUNDS = 5
CLEARLY = 0.75  # torch is taken where it needs less than that share of FAISS's time
CANDIDATES = 26  # of ten rows
SHARE = {False: 0.2, True: 0.5}  # of the rows, below which they are gathered, by `many`
SHARE_BY_FAISS_ON_CPU = {False: 0.25, True: 0.8}  # there it is far ahead of a masked product
BOUNDS = {False: (0.02, 0.4), True: (0.1, 1.0)}  # of that share, however noisy the machine is

Key = tuple["torch.dtype", int, bool, bool]  # dtype, bits of ndims, l2, many queries


@dataclass(frozen=True)
class Choice:
    """An engine for a kind of search, and why."""

    engine: Engine
    reason: str


class Planner:
    """Chooses engines on one device.

    Parameters
    ----------
    device : torch.device
    faiss : bool, default True
        False never uses FAISS.

    Raises
    ------
    IndexBackendError
        If the installed FAISS packages have overwritten each other.

    Examples
    --------
    >>> import torch
    >>> planner = Planner.of(torch.device("cpu"))
    >>> planner.engine(Metric.L2, torch.float32, 384, 1000, 1, 26, False).name
    'faiss knn'
    >>> planner.gathers(100_000, 100, 1, 384)
    True
    """

    _by_device: ClassVar[dict[str, Planner]] = {}
    _by_device_lock = threading.Lock()

    def __init__(self, device: torch.device, *, faiss: bool = True) -> None:
        torch = require("torch", extra=EXTRAS)
        # with its index: torch.device("cuda") is the current GPU
        self.device = device = torch.empty(0, device=device).device
        module, why = load_faiss(device) if faiss else (None, "FAISS was not wanted.")
        #: for masks, large c, and all that FAISS does not serve
        self.masked = TorchEngine(module if device.type == "cpu" else None)
        self._faiss = None if module is None else FaissEngine(module, device)
        self._why = why
        self._lock = threading.Lock()
        self._choices: dict[Key, Choice] = {}
        self._shares: dict[tuple[int, bool], float] = {}
        on_cpu = module is not None and device.type == "cpu"
        self._share = SHARE_BY_FAISS_ON_CPU if on_cpu else SHARE
        self._last = Choice(self._faiss or self.masked, why)

    @classmethod
    def of(cls, device: torch.device) -> Planner:
        """The planner of that device, one for the whole process."""
        torch = require("torch", extra=EXTRAS)
        name = str(torch.empty(0, device=device).device)
        with cls._by_device_lock:
            if name not in cls._by_device:
                cls._by_device[name] = cls(device)
            return cls._by_device[name]

    def engine(
        self,
        metric: Metric,
        block_dtype: torch.dtype,
        ndims: int,
        n: int,
        m: int,
        c: int,
        unit_norms: bool,
        sample: Callable[[], Block] | None = None,
    ) -> Engine:
        """The engine for m queries, c candidates each, over n rows without a mask.

        Parameters
        ----------
        unit_norms : bool
            Whether all rows are unit vectors; see :meth:`Engine.serves`.
        sample : callable, optional
            Gives the first rows to be searched, from which a slice is measured the first time
            that a search of this kind is worth it. Without it nothing is measured.
        """
        if self._faiss is None:
            return self.masked
        if not self._faiss.serves(metric, block_dtype, c, unit_norms):
            self._last = Choice(self.masked, _unserved(metric, block_dtype, c))
            return self.masked
        key = (block_dtype, ndims.bit_length(), metric is Metric.L2, m > FEW_QUERIES)
        choice = self._choices.get(key)
        if choice is None:
            choice = Choice(self._faiss, f"{self._why}, not measured")
            if sample is not None and n * ndims * block_dtype.itemsize >= WORTH_BYTES:
                choice = self._measured(key, metric, sample)
        self._last = choice
        return choice.engine

    def gathers(self, n: int, passing: int, m: int, ndims: int) -> bool:
        """Whether `passing` of n rows are gathered and searched; else all are, with a mask."""
        many = m > FEW_QUERIES
        return passing < n * self._shares.get((ndims.bit_length(), many), self._share[many])

    def info(self) -> dict[str, Any]:
        """``engine`` and ``reason`` of the last choice; ``gathered`` below which shares of rows."""
        shares = sorted(self._shares.items())
        gathered = [
            f"{'many queries' if many else 'few queries'}, {1 << (bits - 1)} dimensions or more: "
            f"below {share:.0%}"
            for (bits, many), share in shares
        ]
        return {
            "engine": self._last.engine.name, "reason": self._last.reason, "gathered": gathered,
        }  # fmt: skip

    def _measured(self, key: Key, metric: Metric, sample: Callable[[], Block]) -> Choice:
        with self._lock:
            if key not in self._choices:
                try:
                    self._choices[key] = self._measure(key, metric, sample())
                except Exception as error:  # no room, most likely; a search must not fail of it
                    logger.warning("index: the engines were not measured: %s", error)
                    assert self._faiss is not None
                    said = (str(error) or type(error).__name__).splitlines()[0]
                    reason = f"{self._why}, measuring failed: {said}"
                    self._choices[key] = Choice(self._faiss, reason)
            return self._choices[key]

    def _measure(self, key: Key, metric: Metric, block: Block) -> Choice:
        torch = require("torch", extra=EXTRAS)
        assert self._faiss is not None
        many = key[-1]
        n, ndims = block.vectors.shape
        rows = min(n, max(1, SAMPLE_BYTES[many] // (block.vectors.element_size() * ndims)))
        block = Block(block.vectors[:rows], block.norms[:rows])
        with torch.inference_mode():
            queries = block.vectors[: MANY if many else 1].float()
            if metric is Metric.COSINE:
                queries = queries / block.norms[: len(queries), None]
            lengths = torch.linalg.vector_norm(queries, dim=1)
            mask = torch.ones(rows, dtype=torch.bool, device=self.device)
            some = torch.arange(0, rows, 8, device=self.device)  # not neighbours
            ask = (block, metric, queries, lengths, CANDIDATES)
            fast, plain = self._faiss.nearest, self.masked.nearest
            faiss, torch_, dense, gathered = _best(
                self.device,
                ROUNDS,
                lambda: fast(*ask),
                lambda: plain(*ask),
                lambda: plain(*ask, mask=mask),
                lambda: fast(*ask, rows=some),
            )
        # a smaller difference may be another process's work, and the choice stands for good
        engine: Engine = self._faiss if faiss <= torch_ / CLEARLY else self.masked
        low, high = BOUNDS[many]
        share = dense / (gathered * rows / len(some))
        self._shares[key[1], many] = min(high, max(low, share))
        reason = (
            f"{self._why}; {len(queries)} queries over {rows} rows: {self._faiss.name} "
            f"{1e3 * faiss:.3g} ms, torch {1e3 * torch_:.3g} ms, masked {1e3 * dense:.3g} ms"
        )
        logger.info("index: %s on %s (%s)", engine.name, self.device, reason)
        return Choice(engine, reason)


def _best(device: torch.device, rounds: int, *works: Callable[[], Any]) -> list[float]:
    """Seconds of each, the best of interleaved rounds after one to warm up."""
    torch = require("torch", extra=EXTRAS)

    def wait() -> None:
        if device.type in ("cuda", "mps"):
            getattr(torch, device.type).synchronize()

    seconds = [float("inf")] * len(works)
    for turn in range(rounds + 1):
        for i, work in enumerate(works):
            wait()
            start = time.perf_counter()
            work()
            wait()
            if turn:
                seconds[i] = min(seconds[i], time.perf_counter() - start)
    return seconds


def _unserved(metric: Metric, block_dtype: torch.dtype, c: int) -> str:
    torch = require("torch", extra=EXTRAS)
    if block_dtype != torch.float32:
        return f"FAISS is not used over {str(block_dtype).removeprefix('torch.')}"
    if metric is Metric.COSINE:
        return "FAISS has no cosine of vectors that are not unit vectors"
    return f"FAISS gives fewer than {c} candidates"
