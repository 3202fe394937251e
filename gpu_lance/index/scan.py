"""Exact search by torch over the pieces of a snapshot: what ranges, large k and proofs need."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gpu_lance.index.engines import LONGEST, SHORTEST
from gpu_lance.index.rescore import NO_ROW, Rounding, error_bound, exact_distances, rank
from gpu_lance.index.snapshot import TILE_BYTES, Snapshot, tile_rows
from gpu_lance.optional import require
from gpu_lance.types import Metric

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Scan:
    """One way through the rows of a snapshot that qualify.

    Parameters
    ----------
    snapshot : Snapshot
    metric : Metric
    values : callable
        Gives the stored vectors (n, d) of slots (n,).
    rounding : Rounding
        Of torch's products over what is held.
    mask : torch.Tensor or None
        (n,) bool, by slot: which qualify; None for all.
    count : int
        How many qualify.
    gathers : bool
        Whether those that qualify are gathered first.
    lower, upper : float
        Bounds on the distance, lower inclusive, upper exclusive; infinite for none.
    """

    snapshot: Snapshot
    metric: Metric
    values: Callable[[torch.Tensor], torch.Tensor]
    rounding: Rounding
    mask: torch.Tensor | None
    count: int
    gathers: bool = False
    lower: float = -math.inf
    upper: float = math.inf

    def slots(self) -> torch.Tensor:
        """The slots that qualify before any bound on the distance, (count,) int64."""
        torch = require("torch", extra="cpu|cuda13|cuda12")
        if self.mask is None:
            return torch.arange(len(self.snapshot), device=self.snapshot.device)
        return self.mask.nonzero()[:, 0]

    def inside(self, distances: np.ndarray) -> np.ndarray:
        """Which exact distances are within the bounds; NaN never is."""
        within: np.ndarray = distances >= self.lower
        return within if self.upper == math.inf else within & (distances < self.upper)

    def _tiles(
        self, step: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """Slots (t,), vectors (t, d), norms (t,), and which of them qualify (t,), None for all."""
        torch = require("torch", extra="cpu|cuda13|cuda12")
        if self.gathers:
            passing = self.slots()
            for start in range(0, len(passing), step):
                slots = passing[start : start + step]
                yield slots, self.snapshot.gather(slots), self.snapshot.norms_of(slots), None
            return
        for first, vectors, norms in self.snapshot.pieces():
            for start in range(0, len(vectors), step):
                stop = min(start + step, len(vectors))
                slots = torch.arange(first + start, first + stop, device=norms.device)
                here = None if self.mask is None else self.mask[first + start : first + stop]
                yield slots, vectors[start:stop], norms[start:stop], here

    def _scores(
        self, queries: torch.Tensor, query_norms: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """Tile by tile: slots (t,), scores (m, t), their error bounds, and which are ruled out.

        Ruled out, (m, t) or (1, t) bool or None, is what does not qualify or is certainly outside
        the distance bounds. A score that overflowed to infinity or NaN is not.
        """
        m, ndims = queries.shape
        # scores, their bounds and a few temporaries of their size stay within 256 MiB
        step = max(1, min(tile_rows(ndims), TILE_BYTES // (16 * m)))
        for slots, vectors, lengths, here in self._tiles(step):
            scores = queries @ vectors.to(queries.dtype).T  # (m, t)
            bound = error_bound(
                self.metric, ndims, self.rounding, query_norms[:, None], lengths[None, :]
            )
            assert not isinstance(bound, np.ndarray)
            if self.metric is Metric.L2:
                scores.mul_(-2).add_(lengths * lengths).add_((query_norms * query_norms)[:, None])
            elif self.metric is Metric.DOT:
                scores.neg_().add_(1)
            else:
                scores.div_(-lengths).add_(1)
                odd = (lengths < SHORTEST) | (lengths > LONGEST)
                bound = bound.expand_as(scores).masked_fill(odd, math.inf)
            out = None if here is None else ~here[None, :]
            if self.lower > -math.inf:
                below = scores + bound < self.lower
                out = below if out is None else out | below
            if self.upper < math.inf:
                above = scores - bound >= self.upper
                out = above if out is None else out | above
            yield slots, scores, bound, out

    def nearest(
        self, queries: torch.Tensor, query_norms: torch.Tensor, c: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The c best by score: scores (m, c), +inf for none, and slots (m, c), -1 for none."""
        torch = require("torch", extra="cpu|cuda13|cuda12")
        best = torch.empty((len(queries), 0), device=queries.device)
        at = torch.empty((len(queries), 0), dtype=torch.int64, device=queries.device)
        for slots, scores, bound, out in self._scores(queries, query_norms):
            scores.masked_fill_(scores.isnan() | bound.isinf(), -math.inf)  # may be anywhere
            if out is not None:
                scores.masked_fill_(out, math.inf)
            near, where = scores.topk(min(c, scores.shape[1]), dim=1, largest=False)
            best, at = torch.cat([best, near], dim=1), torch.cat([at, slots[where]], dim=1)
            if best.shape[1] > c:
                best, where = best.topk(c, dim=1, largest=False)
                at = at.gather(1, where)
        best, where = best.sort(dim=1)
        return best, at.gather(1, where).masked_fill_(best == math.inf, -1)

    def prove(
        self,
        raw: torch.Tensor,
        queries: torch.Tensor,
        query_norms: torch.Tensor,
        row_ids: np.ndarray,
        k: int,
        limits: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest by (distance, row id), looking at every row that could be among them.

        Parameters
        ----------
        raw : torch.Tensor
            (m, d) float32, the queries as given; `queries` are as the engine wants them.
        row_ids : numpy.ndarray
            (n,) int64, by slot.
        limits : numpy.ndarray
            (m,) float32: k qualifying rows are known to be at most that far; +inf if unknown.

        Returns
        -------
        row_ids, distances
            (m, k), padded as :func:`~gpu_lance.index.rescore.rank` does.
        """
        torch = require("torch", extra="cpu|cuda13|cuda12")
        limit = torch.from_numpy(limits).to(queries.device)
        if bool(torch.isinf(limit).any()):
            limit = torch.minimum(limit, self._limits(queries, query_norms, k))
        ids = np.full((len(queries), k), NO_ROW, np.int64)
        found = np.full((len(queries), k), np.inf, np.float32)
        for slots, scores, bound, out in self._scores(queries, query_norms):
            # not (nearest it can be > limit): a NaN, which an overflow leaves, stays in
            maybe = ~((scores - bound) > limit[:, None])
            if out is not None:
                maybe &= ~out
            of, column = maybe.nonzero(as_tuple=True)
            exact = exact_distances(self.metric, raw, self.values, of, slots[column])
            inside = self.inside(exact)
            names = row_ids[slots[column].cpu().numpy()]
            # line by line, as nonzero gives them
            starts = np.searchsorted(of.cpu().numpy(), np.arange(len(queries) + 1))
            for line in np.flatnonzero(np.diff(starts)):
                part = slice(starts[line], starts[line + 1])
                here = inside[part]
                ids[line : line + 1], found[line : line + 1] = rank(
                    np.concatenate([ids[line], names[part][here]])[None],
                    np.concatenate([found[line], exact[part][here]])[None],
                    k,
                )
        return ids, found

    def _limits(self, queries: torch.Tensor, query_norms: torch.Tensor, k: int) -> torch.Tensor:
        """(m,): the k-th smallest distance that a row within the bounds can have at most."""
        torch = require("torch", extra="cpu|cuda13|cuda12")
        best = queries.new_full((len(queries), k), math.inf)
        for _, scores, bound, out in self._scores(queries, query_norms):
            most = (scores + bound).nan_to_num_(nan=math.inf, posinf=math.inf)
            if out is not None:
                most.masked_fill_(out, math.inf)
            if self.lower > -math.inf:
                most.masked_fill_(~(scores - bound >= self.lower), math.inf)
            if self.upper < math.inf:
                most.masked_fill_(~(most < self.upper), math.inf)
            near = most.topk(min(k, most.shape[1]), dim=1, largest=False).values
            best = torch.cat([best, near], dim=1).topk(k, dim=1, largest=False).values
        return best[:, -1]
