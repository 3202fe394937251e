"""Exact MaxSim over a snapshot: an approximate pass proposes, float64 decides and proves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gpu_lance.device import as_tensor
from gpu_lance.errors import BadVectorError, QueryError
from gpu_lance.index.base import SearchResult
from gpu_lance.index.exact import EXTRA_CANDIDATES, Answer, check_k, fill
from gpu_lance.index.multi_rescore import ExactDocuments
from gpu_lance.index.multi_scan import MultiScan, Queries
from gpu_lance.index.multi_store import MultiSnapshot
from gpu_lance.index.ragged import bounds_of, groups, rows_of
from gpu_lance.index.rescore import (
    NO_ROW,
    normalised,
    norms,
    rank,
)
from gpu_lance.index.snapshot import TILE_BYTES, Mask
from gpu_lance.optional import require
from gpu_lance.types import Metric

if TYPE_CHECKING:
    import torch

    from gpu_lance.index.multi_rescore import Values

EXTRAS = "cpu|cuda13|cuda12"
MAX_QUERIES = 256
MAX_VECTORS = 1 << 14  # of queries in one pass


@dataclass(frozen=True, eq=False)
class MultiSearch:
    """Every document of a snapshot compared with every query.

    A document's distance is the sum, over the query's vectors, of the least distance of any of
    the document's vectors. Results do not depend on the device: distances in float32 only choose
    candidates, which are measured in float64 from the values that are stored, and every other
    document that could belong to the answer, within the rounding of the first pass, is measured
    too. Documents come in the order of (distance, row id); of equal distances the smallest row
    ids come back.

    A document without vectors, or with NaN or infinity in any of them, is never found. Under
    cosine a vector of zeros has no distance: it is nearest to nothing, so a document of nothing
    else is never found; one in a query is left out, and a query of nothing else finds nothing.

    Parameters
    ----------
    snapshot : MultiSnapshot
    metric : Metric
    stored : callable, optional
        Gives the stored vectors (t, d) of documents (n,), one after the other, where they are held
        narrower than that.
    """

    snapshot: MultiSnapshot
    metric: Metric
    stored: Values | None = None

    def search(
        self,
        queries: torch.Tensor,
        offsets: np.ndarray,
        k: int,
        *,
        allowed: Mask | None = None,
        lower: float | None = None,
        upper: float | None = None,
    ) -> SearchResult:
        """The k nearest documents of each query; see the class for their order.

        Parameters
        ----------
        queries : torch.Tensor
            (t, d), finite, on any device.
        offsets : numpy.ndarray
            (m + 1,) integers from 0 to t: query i has the vectors offsets[i] to offsets[i + 1].
        k : int
            At least 1; of any size.
        allowed : Mask, optional
            From :meth:`Snapshot.mask`: other documents are not found.
        lower, upper : float, optional
            Only documents with lower <= distance < upper count, compared in float32.

        Returns
        -------
        SearchResult
            On the host.

        Raises
        ------
        QueryError
            If k is below 1, the vectors have another length, the offsets do not fit, or a query
            has no vector.
        BadVectorError
            If a query holds NaN or infinity.
        OutOfDeviceMemoryError
            If not even one query fits on the device beside the documents.
        """
        torch = require("torch", extra=EXTRAS)
        snapshot = self.snapshot
        raw, bounds = checked(queries, offsets, k, snapshot.ndims, snapshot.device)
        result = SearchResult.empty(len(bounds) - 1, k)
        if snapshot.ready is not None:  # it may have been filled on another stream
            torch.cuda.current_stream(snapshot.device).wait_event(snapshot.ready)
        with torch.inference_mode():
            mask = snapshot.selection(self.metric, allowed)
            if (len(snapshot) if mask is None else mask.count) == 0:
                return result
            raw, bounds = self._directed(raw, bounds)
            scan = MultiScan(
                snapshot, self.metric, mask, narrowed=self.stored is not None,
                lower=-math.inf if lower is None else float(np.float32(lower)),
                upper=math.inf if upper is None else float(np.float32(upper)),
            )  # fmt: skip
            # the distances of all documents to some queries, and temporaries of their size
            most = max(1, min(MAX_QUERIES, TILE_BYTES // (16 * len(snapshot))))

            def answer(start: int, stop: int) -> Answer:
                return self._block(raw, bounds[start : stop + 1], k, scan)

            def end(start: int, stop: int) -> int:
                return next(groups(bounds, start, stop, MAX_VECTORS))[1]

            fill(result, snapshot.device, most, answer, end)
        return result

    def _directed(self, raw: torch.Tensor, bounds: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        """The queries without vectors that have no direction, if that matters."""
        if self.metric is not Metric.COSINE:
            return raw, bounds
        kept = (raw != 0).any(dim=1)
        if bool(kept.all()):
            return raw, bounds
        return raw[kept], bounds_of(kept.cpu().numpy())[bounds]

    def _block(
        self, raw: torch.Tensor, bounds: np.ndarray, k: int, scan: MultiScan
    ) -> tuple[np.ndarray, np.ndarray]:
        """The answer for one block of queries: propose, rescore, prove."""
        torch = require("torch", extra=EXTRAS)
        raw, bounds = raw[bounds[0] : bounds[-1]], bounds - bounds[0]
        lengths = norms(raw).float().to(raw.device)
        if self.metric is Metric.COSINE:
            block = Queries(normalised(raw), torch.ones_like(lengths), bounds)
        else:
            block = Queries(raw, lengths, bounds)
        about = scan.distances(block)  # (m, n), infinite for what does not qualify
        off = scan.bound(block)  # (m, n) or (m, 1)
        scan.exclude(about, off)
        c = min(k + EXTRA_CANDIDATES, about.shape[1])
        near = about.topk(c, dim=1, largest=False)
        ids = np.full((len(about), k), NO_ROW, np.int64)
        distances = np.full((len(about), k), np.inf, np.float32)
        values = self.stored or self._held
        for line in range(len(about)):
            query = raw[bounds[line] : bounds[line + 1]]
            if not len(query):  # no direction at all
                continue
            exact = ExactDocuments(self.metric, query, values, self.snapshot.bounds)
            first = near.indices[line][near.values[line] < math.inf].cpu().numpy()
            answer = self._ranked(exact, first, k, scan)
            if len(first) == c < about.shape[1]:
                limit = self._limit(answer, about[line], off[line], k, scan)
                # not (the nearest it can be > limit): a NaN, which an overflow leaves, stays in
                maybe = ~((about[line] - off[line]) > limit) & (about[line] < math.inf)
                maybe[near.indices[line]] = False
                others = maybe.nonzero()[:, 0].cpu().numpy()
                if len(others):
                    answer = self._ranked(exact, others, k, scan, answer)
            ids[line], distances[line] = answer[0][0], answer[1][0]
        return ids, distances

    def _held(self, slots: np.ndarray) -> torch.Tensor:
        torch = require("torch", extra=EXTRAS)
        bounds = self.snapshot.bounds
        rows = torch.from_numpy(rows_of(bounds[slots], bounds[slots + 1]))
        return self.snapshot.gather(rows.to(self.snapshot.device))

    def _ranked(
        self,
        exact: ExactDocuments,
        slots: np.ndarray,
        k: int,
        scan: MultiScan,
        known: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest, (1, k) each, of some documents and of those that are known."""
        slots = np.sort(slots)  # neighbours in the matrix, and in Lance
        measured = exact.distances(slots)
        names = self.snapshot.row_ids[slots]
        inside = scan.inside(measured)
        names, measured = names[inside][None], measured[inside][None]
        if known is not None:
            names = np.concatenate([known[0], names], axis=1)
            measured = np.concatenate([known[1], measured], axis=1)
        return rank(names, measured, k)

    def _limit(
        self,
        answer: tuple[np.ndarray, np.ndarray],
        about: torch.Tensor,
        off: torch.Tensor,
        k: int,
        scan: MultiScan,
    ) -> float:
        """How far the k-th nearest document is at most."""
        if answer[0][0, -1] != NO_ROW:
            return float(answer[1][0, -1])
        # fewer than k of the candidates are within the bounds
        torch = require("torch", extra=EXTRAS)
        most = about + off
        surely = (about > -math.inf) & (most < scan.upper) & (about - off >= scan.lower)
        most = most[surely]
        if len(most) < k:
            return math.inf
        return float(torch.topk(most, k, largest=False).values[-1])


def checked(
    queries: torch.Tensor, offsets: np.ndarray, k: int, ndims: int, device: torch.device
) -> tuple[torch.Tensor, np.ndarray]:
    """The queries' vectors as float32 (t, d) on the device, and the offsets as int64.

    Raises
    ------
    QueryError
        If k is below 1, the vectors have another length, the offsets do not fit, or a query has
        no vector.
    BadVectorError
        If a query holds NaN or infinity.
    """
    torch = require("torch", extra=EXTRAS)
    check_k(k)
    raw = as_tensor(as_tensor(queries).to(torch.float32), device).contiguous()
    if raw.ndim != 2 or raw.shape[1] != ndims:
        raise QueryError(
            f"The queries' vectors have shape {tuple(raw.shape)}, but the column holds vectors of "
            f"{ndims} values."
        )
    bounds = np.asarray(offsets)
    if (
        bounds.ndim != 1
        or not len(bounds)
        or bounds.dtype.kind not in "iu"
        or bounds[0] != 0
        or bounds[-1] != len(raw)
        or (np.diff(bounds.astype(np.int64)) < 0).any()
    ):
        raise QueryError(
            f"The queries want ascending offsets from 0 to {len(raw)}, got {bounds.dtype} of "
            f"shape {bounds.shape}: {bounds.tolist()[:10]}."
        )
    bounds = bounds.astype(np.int64)
    empty = np.flatnonzero(np.diff(bounds) == 0)
    if len(empty):
        raise QueryError(f"Query {empty[0]} has no vectors; a query wants at least one.")
    finite = torch.isfinite(raw).all(dim=1)
    if not bool(finite.all()):
        bad = int((~finite).nonzero()[0, 0])
        query = int(np.searchsorted(bounds, bad, side="right")) - 1
        raise BadVectorError(f"Query {query} holds NaN or infinity; no row is near it.")
    return raw, bounds
