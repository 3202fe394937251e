"""The approximate distances of all documents to some queries, by torch, tile by tile."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_lance.index.engines import LONGEST, OVERFLOW, SHORTEST
from gpu_lance.index.exact import UNIT
from gpu_lance.index.multi_rescore import by_document
from gpu_lance.index.multi_store import MultiSnapshot
from gpu_lance.index.ragged import bounds_of, groups, rows_of
from gpu_lance.index.rescore import error_bound, rounding_of, unit_roundoff
from gpu_lance.index.snapshot import Mask, tile_rows
from gpu_lance.index.threads import in_slices
from gpu_lance.optional import require
from gpu_lance.types import Metric

if TYPE_CHECKING:
    import torch

    # vectors (t, d) and norms (t,) on the device, and where in them each document begins (n,)
    Piece = tuple[torch.Tensor, torch.Tensor, np.ndarray]
    Pieces = Callable[[], Iterator[Piece]]

EXTRAS = "cpu|cuda13|cuda12"
# of products in flight: on the CPU few enough to stay in a cache, and enough that the threads of
# a product do not meet too often
PRODUCT_BYTES = {"cpu": 8 << 20}
OTHER_PRODUCT_BYTES = 64 << 20
WIDE_BYTES = 4 << 20  # of float16 vectors widened at a time on the CPU
COLUMNS = 1024  # query vectors in one product
# below which share of the documents those that qualify are gathered, by how many query vectors
# there are at least: the product grows with them, the copy does not
GATHERED = ((128, 0.9), (16, 0.5), (0, 0.25))


@dataclass(frozen=True, eq=False)
class Queries:
    """Some queries, as the products want them.

    Parameters
    ----------
    vectors : torch.Tensor
        (t, d) float32 on the device; unit vectors under cosine.
    norms : torch.Tensor
        (t,) float32.
    bounds : numpy.ndarray
        (m + 1,) int64 from 0 to t: query i has the vectors bounds[i] to bounds[i + 1].
    """

    vectors: torch.Tensor
    norms: torch.Tensor
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @functools.cached_property
    def counts(self) -> torch.Tensor:
        """(m, 1) float32: how many vectors each query has."""
        torch = require("torch", extra=EXTRAS)
        counts = torch.from_numpy(np.diff(self.bounds)).float()
        return counts[:, None].to(self.vectors.device)

    @functools.cached_property
    def longest(self) -> torch.Tensor:
        """(m, 1) float32: the largest norm of each query's vectors."""
        return self._each(lambda lengths: lengths.max(initial=0))

    @functools.cached_property
    def squares(self) -> torch.Tensor:
        """(m, 1) float32: the sum of the squared norms of each query's vectors."""
        return self._each(lambda lengths: (lengths * lengths).sum())

    def _each(self, of: Callable[[np.ndarray], Any]) -> torch.Tensor:
        torch = require("torch", extra=EXTRAS)
        norms = self.norms.cpu().numpy()
        with np.errstate(over="ignore"):
            found = [of(norms[a:b]) for a, b in itertools.pairwise(self.bounds)]
        return torch.from_numpy(np.array(found, np.float32))[:, None].to(self.vectors.device)

    def members(self, start: int, stop: int) -> torch.Tensor:
        """(m, stop - start) float32: 1 where one of these vectors is of the query, else 0."""
        torch = require("torch", extra=EXTRAS)
        of = np.searchsorted(self.bounds, np.arange(start, stop), side="right") - 1
        out = torch.zeros((len(self), stop - start))
        out[torch.from_numpy(of), torch.arange(stop - start)] = 1
        return out.to(self.vectors.device)


@dataclass(frozen=True, eq=False)
class MultiScan:
    """One way through the documents of a snapshot that qualify.

    Parameters
    ----------
    snapshot : MultiSnapshot
    metric : Metric
    mask : Mask or None
        Which documents qualify; None for all.
    narrowed : bool
        Whether they are held narrower than they are stored.
    lower, upper : float
        Bounds on the distance, lower inclusive, upper exclusive; infinite for none.
    """

    snapshot: MultiSnapshot
    metric: Metric
    mask: Mask | None
    narrowed: bool = False
    lower: float = -math.inf
    upper: float = math.inf

    def inside(self, distances: np.ndarray) -> np.ndarray:
        """Which exact distances are within the bounds; NaN never is."""
        within: np.ndarray = distances >= self.lower
        return within if self.upper == math.inf else within & (distances < self.upper)

    # ------------------------------------------------------------------ distances

    def distances(self, queries: Queries) -> torch.Tensor:
        """(m, n) float32, by slot; +inf where a document does not qualify, -inf where unknown."""
        torch = require("torch", extra=EXTRAS)
        device, m = self.snapshot.device, len(queries)
        best = torch.full((m, len(self.snapshot)), -math.inf, device=device)
        total = len(queries.vectors)
        blocks = [(a, min(a + COLUMNS, total)) for a in range(0, total, COLUMNS)]
        factors = queries.vectors * 2 if self.metric is Metric.L2 else queries.vectors
        members = [queries.members(*block) for block in blocks]
        for slots, pieces in self._tiles(min(COLUMNS, total)):
            for (a, b), member in zip(blocks, members, strict=True):
                nearest = None  # (b - a, documents)
                for vectors, norms, begins in pieces():
                    found = self._nearest(factors[a:b], vectors, norms, begins)
                    nearest = found if nearest is None else torch.maximum(nearest, found)
                assert nearest is not None
                summed = member @ nearest
                if a:
                    summed += best[:, slots]
                best[:, slots] = summed
        best.neg_().add_(queries.squares if self.metric is Metric.L2 else queries.counts)
        best.nan_to_num_(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
        if self.mask is not None:
            best.masked_fill_(~self.mask.bits, math.inf)
        return best

    def _nearest(
        self, queries: torch.Tensor, vectors: torch.Tensor, norms: torch.Tensor, begins: np.ndarray
    ) -> torch.Tensor:
        """(c, n): the largest similarity of each document's vectors to the queries (c, d)."""
        torch = require("torch", extra=EXTRAS)
        vectors = vectors.to(torch.float32)
        zeros = self.metric is Metric.COSINE and self.snapshot.lengths.zeros
        if vectors.device.type != "cpu":
            scores = vectors @ queries.T  # (t, c)
            if self.metric is Metric.L2:
                scores.sub_((norms * norms)[:, None])
            elif self._divides:
                scores.div_(norms[:, None])
            if zeros:
                scores.masked_fill_(norms[:, None] == 0, -math.inf)
            return by_document(scores, begins, "max").T
        c, t = len(queries), len(vectors)
        scores = self._room(c, t)
        torch.mm(queries, vectors.T, out=scores)
        array = scores.numpy()
        out = np.empty((c, len(begins)), np.float32)
        extra = (norms * norms).numpy() if self.metric is Metric.L2 else norms.numpy()

        def part(start: int, stop: int) -> None:
            lines = array[start:stop]
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                if self.metric is Metric.L2:
                    lines -= extra
                elif self._divides:
                    lines /= extra
            if zeros:
                lines[:, extra == 0] = -math.inf
            np.maximum.reduceat(lines, begins, axis=1, out=out[start:stop])

        in_slices(c, 4 * t, part)
        return torch.from_numpy(out)

    @property
    def _divides(self) -> bool:
        return self.metric is Metric.COSINE and self.snapshot.lengths.deviation > UNIT

    def _room(self, c: int, t: int) -> torch.Tensor:
        """(c, t) of memory that is used again: fresh pages cost more than the product."""
        torch = require("torch", extra=EXTRAS)
        if not self._buffers or len(self._buffers[0]) < c * t:
            self._buffers[:] = [torch.empty(c * t)]
        return self._buffers[0][: c * t].view(c, t)

    @functools.cached_property
    def _buffers(self) -> list[torch.Tensor]:
        return []

    # ---------------------------------------------------------------------- tiles

    def _tiles(self, columns: int) -> Iterator[tuple[slice | torch.Tensor, Pieces]]:
        """Documents, and a function that gives their vectors in pieces of bounded size.

        A tile is of several documents in one piece, or of one long document in several.
        """
        snapshot, step = self.snapshot, self._step(columns)
        share = next(share for least, share in GATHERED if columns >= least)
        if self.mask is not None and self.mask.count < share * len(snapshot):
            bounds = snapshot.bounds
            slots = self.mask.bits.nonzero()[:, 0]
            passing = slots.cpu().numpy()
            begins, ends = bounds[passing], bounds[passing + 1]
            behind = bounds_of(ends - begins)
            for start, stop in groups(behind, 0, len(passing), step):
                rows = rows_of(begins[start:stop], ends[start:stop])
                places = behind[start:stop] - behind[start]
                gathered = functools.partial(self._gathered, rows, places, step)
                yield slots[start:stop], gathered
            return
        bits = None if self.mask is None else self.mask.bits.cpu().numpy()
        for at, (first_row, used) in enumerate(zip(snapshot.offsets, snapshot.used, strict=False)):
            first, last = np.searchsorted(snapshot.bounds, [first_row, first_row + used])
            for start, stop in groups(snapshot.bounds, int(first), int(last), step):
                if bits is None or bits[start:stop].any():
                    begin, end = (int(snapshot.bounds[i]) - first_row for i in (start, stop))
                    places = snapshot.bounds[start:stop] - snapshot.bounds[start]
                    yield (
                        slice(start, stop),
                        functools.partial(self._part, at, begin, end, places, step),
                    )

    def _step(self, columns: int) -> int:
        """How many vectors a piece has at most."""
        ndims, kind = self.snapshot.ndims, self.snapshot.device.type
        step = min(
            tile_rows(ndims), PRODUCT_BYTES.get(kind, OTHER_PRODUCT_BYTES) // (4 * max(1, columns))
        )
        if kind == "cpu" and self.snapshot.dtype.itemsize == 2:
            step = min(step, WIDE_BYTES // (4 * ndims))
        return max(1, step)

    def _part(
        self, at: int, begin: int, end: int, places: np.ndarray, step: int
    ) -> Iterator[Piece]:
        chunk = self.snapshot.chunks[at]
        for start in range(begin, end, step):
            part = slice(start, min(start + step, end))
            vectors = chunk.vectors[part].to(self.snapshot.device, non_blocking=True)
            yield vectors, chunk.norms[part], places

    def _gathered(self, rows: np.ndarray, places: np.ndarray, step: int) -> Iterator[Piece]:
        torch = require("torch", extra=EXTRAS)
        for start in range(0, len(rows), step):
            part = torch.from_numpy(rows[start : start + step]).to(self.snapshot.device)
            yield self.snapshot.gather(part), self.snapshot.norms_of(part), places

    # ----------------------------------------------------------------- the proof

    def bound(self, queries: Queries) -> torch.Tensor:
        """How far the distances may be off: (m, n), or (m, 1) if it is the same for all.

        A document's distance is off by no more than those of its vectors, for each of the query's
        vectors, and by the rounding of their sum, which is that of so many more products.
        """
        torch = require("torch", extra=EXTRAS)
        snapshot, device = self.snapshot, self.snapshot.device
        ndims = snapshot.ndims + int(np.diff(queries.bounds).max(initial=0)) + 4
        unit = unit_roundoff(device, faiss=False)
        divides = self.metric is not Metric.COSINE or self._divides
        rounding = rounding_of(snapshot, unit, narrowed=self.narrowed, divides=divides)
        if self.metric is Metric.COSINE:
            known = snapshot.lengths
            off = error_bound(self.metric, ndims, rounding, queries.longest, known.smallest)
            assert not isinstance(off, np.ndarray)
            off = off * queries.counts
            if known.smallest < SHORTEST or known.largest > LONGEST:
                odd = (snapshot.shortest < SHORTEST) | (snapshot.longest > LONGEST)
                off = off.expand(-1, len(snapshot))
                off = off.masked_fill(torch.from_numpy(odd).to(device), math.inf)
            return off
        longest = torch.from_numpy(snapshot.longest).to(device)[None]
        off = error_bound(self.metric, ndims, rounding, queries.longest, longest)
        assert not isinstance(off, np.ndarray)
        off = off * queries.counts
        fits = queries.longest * queries.longest + longest * longest < OVERFLOW
        return off.masked_fill_(~fits, math.inf)

    def exclude(self, distances: torch.Tensor, off: torch.Tensor) -> None:
        """Make what is certainly outside the bounds infinite, in place; NaN is uncertain."""
        if self.lower > -math.inf:
            distances.masked_fill_(distances + off < self.lower, math.inf)
        if self.upper < math.inf:
            distances.masked_fill_(distances - off >= self.upper, math.inf)
