"""Exact search over a snapshot: an engine proposes, float64 decides, and what is open is proven."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_lance.device import as_tensor, is_out_of_memory, release_cache
from gpu_lance.errors import BadVectorError, OutOfDeviceMemoryError, QueryError
from gpu_lance.index.base import SearchResult
from gpu_lance.index.engines import Best, Engine
from gpu_lance.index.planner import Planner
from gpu_lance.index.rescore import (
    NO_ROW,
    OVERFLOW,
    Rounding,
    error_bound,
    exact_distances,
    normalised,
    norms,
    rank,
    rounding_of,
    unit_roundoff,
)
from gpu_lance.index.scan import Scan
from gpu_lance.index.snapshot import Mask, Snapshot
from gpu_lance.optional import require
from gpu_lance.types import Metric

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

EXTRAS = "cpu|cuda13|cuda12"
EXTRA_CANDIDATES = 16
MAX_QUERIES = 256  # FAISS's temporary memory on a GPU is made for about that many
MAX_PAIRS = 4 << 20  # candidates in flight
MAX_CANDIDATES = 2048  # of an engine; beyond it torch scans
MAX_HIDDEN = 256  # that many rows that do not qualify are simply asked for on top
UNIT = 2.0**-20  # norms that near to 1 need no division under cosine


@dataclass(frozen=True, eq=False)
class ExactSearch:
    """Every row of a snapshot compared with every query.

    Results do not depend on the engine: an engine only proposes candidates, whose distances are
    computed in float64 from the values that are stored and rounded to float32, and the rows come
    in the order of (distance, row id). If rows that were not proposed could belong to the answer,
    within the engine's rounding, they are looked at too; so of equal distances the smallest row
    ids come back.

    A vector with NaN or infinity is left out, under every metric. Under cosine a zero vector has
    no distance, as in LanceDB: it is never found, and a zero query finds nothing.

    Parameters
    ----------
    snapshot : Snapshot
    metric : Metric
    planner : Planner
        Chooses the engine and the way through the rows.
    stored : callable, optional
        Gives the stored vectors (n, d) of slots (n,), where rows are held narrower than that.
    """

    snapshot: Snapshot
    metric: Metric
    planner: Planner
    stored: Callable[[torch.Tensor], torch.Tensor] | None = None

    def search(
        self,
        queries: torch.Tensor,
        k: int,
        *,
        allowed: Mask | None = None,
        lower: float | None = None,
        upper: float | None = None,
    ) -> SearchResult:
        """The k nearest rows of each query; see the class for their order.

        Parameters
        ----------
        queries : torch.Tensor
            (m, d), finite, on any device.
        k : int
            At least 1; of any size.
        allowed : Mask, optional
            From :meth:`Snapshot.mask`: other rows are not found.
        lower, upper : float, optional
            Only rows with lower <= distance < upper count, compared in float32.

        Returns
        -------
        SearchResult
            On the host.

        Raises
        ------
        QueryError
            If k is below 1 or the queries have another length.
        BadVectorError
            If a query holds NaN or infinity.
        OutOfDeviceMemoryError
            If not even one query fits on the device beside the rows.
        """
        torch = require("torch", extra=EXTRAS)
        raw = checked(queries, k, self.snapshot.ndims, self.snapshot.device)
        result = SearchResult.empty(len(raw), k)
        if self.snapshot.ready is not None:  # it may have been filled on another stream
            torch.cuda.current_stream(self.snapshot.device).wait_event(self.snapshot.ready)
        with torch.inference_mode():
            mask = self.snapshot.selection(self.metric, allowed)
            count = len(self.snapshot) if mask is None else mask.count
            if count == 0 or len(raw) == 0:
                return result
            scan = Scan(
                self.snapshot, self.metric, self.stored or self.snapshot.gather,
                self._rounding(),
                None if mask is None else mask.bits, count,
                lower=-math.inf if lower is None else float(np.float32(lower)),
                upper=math.inf if upper is None else float(np.float32(upper)),
            )  # fmt: skip
            most = max(1, min(MAX_QUERIES, MAX_PAIRS // min(count, k + EXTRA_CANDIDATES)))

            def answer(start: int, stop: int) -> Answer:
                return self._block(raw[start:stop], k, scan)

            fill(result, self.snapshot.device, most, answer)
        return result

    def _rounding(self, *, faiss: bool = False, divides: bool = True) -> Rounding:
        unit = unit_roundoff(self.snapshot.device, faiss=faiss)
        narrowed = self.stored is not None
        return rounding_of(self.snapshot, unit, narrowed=narrowed, divides=divides)

    def _block(self, raw: torch.Tensor, k: int, scan: Scan) -> tuple[np.ndarray, np.ndarray]:
        """The answer for one block of queries: propose, rescore, prove."""
        torch = require("torch", extra=EXTRAS)
        device = self.snapshot.device
        exact_norms = norms(raw)
        if self.metric is Metric.COSINE:
            queries, query_norms = normalised(raw), torch.ones(len(raw), device=device)
        else:
            queries, query_norms = raw, exact_norms.float().to(device)
        scan = replace(scan, gathers=self._gathers(scan, len(raw)))
        slots, edge, rounding = self._propose(queries, query_norms, k, scan)
        at = slots.cpu().numpy()
        of, place = (torch.from_numpy(found).to(device) for found in (at >= 0).nonzero())
        distances = np.full(at.shape, np.inf, np.float32)
        distances[at >= 0] = exact_distances(self.metric, raw, scan.values, of, slots[of, place])
        row_ids = self.snapshot.row_ids[np.maximum(at, 0)]
        outside = (at < 0) | ~scan.inside(distances)
        row_ids[outside] = NO_ROW
        distances[outside] = np.inf
        row_ids, distances = rank(row_ids, distances, k)
        proven = self._proven(row_ids, distances, exact_norms, edge, rounding, scan)
        open_ = np.flatnonzero(~proven)
        if len(open_):
            which = torch.from_numpy(open_).to(device)
            limits = np.where(row_ids[:, -1] == NO_ROW, np.inf, distances[:, -1])
            row_ids[open_], distances[open_] = scan.prove(
                raw[which], queries[which], query_norms[which], self.snapshot.row_ids, k,
                limits[open_].astype(np.float32),
            )  # fmt: skip
        return row_ids, distances

    def _gathers(self, scan: Scan, m: int) -> bool:
        if scan.mask is None:
            return False
        return self.planner.gathers(len(self.snapshot), scan.count, m, self.snapshot.ndims)

    def _propose(
        self, queries: torch.Tensor, query_norms: torch.Tensor, k: int, scan: Scan
    ) -> tuple[torch.Tensor, np.ndarray, Rounding]:
        """Candidates (m, c), the score beyond which all others lie (m,), and how exact it is."""
        m = len(queries)
        c = min(k + EXTRA_CANDIDATES, scan.count)
        everything = np.full(m, np.inf)
        if scan.lower > -math.inf or c > MAX_CANDIDATES:
            if scan.lower == -math.inf and c == scan.count:  # all that qualify
                return scan.slots()[None, :].expand(m, -1), everything, Rounding(0.0)
            scores, slots = scan.nearest(queries, query_norms, c)
            # +inf: fewer than c rows were within the bounds, so all of them are candidates
            return slots, scores[:, -1].cpu().double().numpy(), scan.rounding
        if c == scan.count and c <= MAX_HIDDEN:
            return scan.slots()[None, :].expand(m, -1), everything, Rounding(0.0)
        engine, hidden = self._engine(m, c, scan)
        divides = not engine.is_faiss or self.metric is not Metric.COSINE
        rounding = self._rounding(faiss=engine.is_faiss, divides=divides)
        scores, slots = self._ask(engine, queries, query_norms, c + hidden, scan, hidden == 0)
        last = scores[:, -1].cpu().double().numpy()  # in this order: MPS has no float64
        short = bool((slots < 0).any())  # an overflow; then nothing is certain
        complete = c == scan.count and not short
        edge = everything if complete else np.where(np.isfinite(last), last, -np.inf)
        if hidden:
            assert scan.mask is not None
            slots = slots.masked_fill(~scan.mask[slots.clamp(min=0)], -1)
        return slots, edge, rounding

    def _engine(self, m: int, c: int, scan: Scan) -> tuple[Engine, int]:
        """The engine, and how many rows to ask for on top since they may not qualify."""
        snapshot = self.snapshot
        size = len(snapshot)
        unit = snapshot.lengths.deviation <= UNIT
        hidden = 0 if scan.mask is None or scan.gathers else size - scan.count
        if hidden > MAX_HIDDEN or c + hidden > MAX_CANDIDATES:
            return self.planner.masked, 0
        engine = self.planner.engine(
            self.metric, snapshot.dtype, snapshot.ndims,
            scan.count if scan.gathers else size, m, c + hidden, unit,
            lambda: next(snapshot.blocks())[1],
        )  # fmt: skip
        return engine, hidden if engine.is_faiss else 0

    def _ask(
        self,
        engine: Engine,
        queries: torch.Tensor,
        query_norms: torch.Tensor,
        c: int,
        scan: Scan,
        masked: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The c best scores over all pieces, ascending (m, c), and their slots, -1 for none."""
        best, mask = Best(c), scan.mask if masked else None
        for first, block in self.snapshot.blocks():
            which: dict[str, torch.Tensor] = {}
            if mask is not None:
                here = mask[first : first + len(block)]
                which = {"rows": here.nonzero()[:, 0]} if scan.gathers else {"mask": here}
            scores, columns = engine.nearest(
                block, self.metric, queries, query_norms, min(c, len(block)), **which
            )
            best.add(scores, columns.add_(first).masked_fill_(columns < first, -1))
        return best.sorted()

    def _proven(
        self,
        row_ids: np.ndarray,
        distances: np.ndarray,
        query_norms: torch.Tensor,
        edge: np.ndarray,
        rounding: Rounding,
        scan: Scan,
    ) -> np.ndarray:
        """(m,) bool: no row that was not a candidate can be among the k nearest."""
        lengths = query_norms.cpu().numpy()
        complete = edge == np.inf
        if self.metric is Metric.COSINE:
            complete |= lengths == 0  # such a query has no distance to anything
        kth = np.where(row_ids[:, -1] == NO_ROW, np.inf, distances[:, -1].astype(np.float64))
        known = self.snapshot.lengths
        largest: Any = known.smallest if self.metric is Metric.COSINE else known.largest
        if self.metric is Metric.L2:  # a vector much longer than the query is far from it
            near = lengths * (1 + 1e-5) + np.sqrt(kth) * (1 + 1e-5) + 1e-19
            near = near * (1 + 2 * rounding.narrow) + 2 * rounding.tiny  # of what is held
            largest = np.minimum(largest, near)
        with np.errstate(over="ignore", invalid="ignore"):
            bound = error_bound(self.metric, self.snapshot.ndims, rounding, lengths, largest)
            nearest_other = (edge - np.asarray(bound)).astype(np.float32)
            certain = (nearest_other > kth) | (nearest_other >= scan.upper)
            if self.metric is not Metric.COSINE:
                fits = lengths * lengths + known.largest * known.largest < OVERFLOW
                certain &= fits
                complete &= fits | (rounding.unit == 0)
        proven: np.ndarray = complete | certain
        return proven


Answer = tuple[np.ndarray, np.ndarray]  # row ids and distances, as `rank` gives them


def fill(
    result: SearchResult,
    device: torch.device,
    most: int,
    answer: Callable[[int, int], Answer],
    end: Callable[[int, int], int] = lambda start, stop: stop,
) -> None:
    """Answer all queries of a result, block by block; with smaller ones when memory runs out.

    Parameters
    ----------
    result : SearchResult
        (m, k), to write to.
    most : int
        Queries in a block.
    answer : callable
        Answers the queries from start to stop.
    end : callable, optional
        Where a block from start ends, if before stop.

    Raises
    ------
    OutOfDeviceMemoryError
        If not even one query fits on the device.
    """
    start = 0
    while start < len(result.row_ids):
        stop = end(start, min(start + most, len(result.row_ids)))
        try:
            ids, distances = answer(start, stop)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if stop - start == 1:
                raise OutOfDeviceMemoryError(
                    f"One query does not fit on {device}: {error}"
                ) from error
            most = (stop - start) // 2
            logger.warning("index: out of memory, going on with %d queries a time", most)
            release_cache(device)  # FAISS cannot use what torch holds unused
            continue
        result.row_ids[start:stop] = np.where(ids == NO_ROW, -1, ids)
        result.distances[start:stop] = distances
        start = stop


def check_k(k: int) -> None:
    """Raise QueryError unless k is at least 1."""
    if k < 1:
        raise QueryError(f"The number of rows wanted is {k}; it must be at least 1.")


def checked(queries: torch.Tensor, k: int, ndims: int, device: torch.device) -> torch.Tensor:
    """The queries as float32 (m, d) on the device.

    Raises
    ------
    QueryError
        If k is below 1 or the queries have another length.
    BadVectorError
        If a query holds NaN or infinity.
    """
    torch = require("torch", extra=EXTRAS)
    check_k(k)
    raw = as_tensor(as_tensor(queries).to(torch.float32), device).contiguous()
    if raw.ndim != 2 or raw.shape[1] != ndims:
        raise QueryError(
            f"The queries have shape {tuple(raw.shape)}, but the column holds vectors of "
            f"{ndims} values."
        )
    finite = torch.isfinite(raw).all(dim=1)
    if not bool(finite.all()):
        bad = int((~finite).nonzero()[0, 0])
        raise BadVectorError(f"Query {bad} holds NaN or infinity; no row is near it.")
    return raw
