"""The engine that needs only torch: a product, a mask and a top-k, on any device."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from gpu_lance.errors import IndexBackendError
from gpu_lance.index.engines import (
    EXTRAS,
    FEW_QUERIES,
    LONGEST,
    SHORTEST,
    Best,
    Block,
    checked,
    gathered,
)
from gpu_lance.index.threads import in_slices
from gpu_lance.optional import require
from gpu_lance.types import Metric

if TYPE_CHECKING:
    import torch

SCORE_BYTES = 64 << 20  # of scores and temporaries of their size in flight
CACHED_SCORE_BYTES = 16 << 20  # on the CPU: new memory and its page faults cost more than tiles
WIDE_BYTES = 4 << 20  # of float16 rows widened at a time on the CPU; it stays in the cache
LOOP_BYTES = 3 << 18  # of float32 rows that a core reads again for each query


class TorchEngine:
    """A product and a top-k, in tiles of bounded bytes, on any device of torch.

    Parameters
    ----------
    faiss : module, optional
        On the CPU the products of few queries are FAISS's, which reads the rows at the speed of
        the memory; torch's product takes three times as long.

    Examples
    --------
    >>> import torch
    >>> from gpu_lance.index.engines import Block
    >>> block = Block(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([0.0, 5.0]))
    >>> query = torch.tensor([[3.0, 3.0]])
    >>> scores, columns = TorchEngine().nearest(block, Metric.L2, query, query.norm(dim=1), 1)
    >>> round(scores.item(), 3), columns.item()
    (1.0, 1)
    """

    name = "torch"
    is_faiss = False

    def __init__(self, faiss: Any = None) -> None:
        self._faiss = faiss

    def serves(self, metric: Metric, block_dtype: torch.dtype, c: int, unit_norms: bool) -> bool:
        return True

    def nearest(
        self,
        block: Block,
        metric: Metric,
        queries: torch.Tensor,
        query_norms: torch.Tensor,
        c: int,
        *,
        rows: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Engine.nearest`; `mask`, (n,) bool, is False for rows that do not count."""
        torch = require("torch", extra=EXTRAS)
        checked(block, queries, query_norms, c)
        n, m = len(block), len(queries)
        if rows is not None:
            if mask is not None:
                raise IndexBackendError("An engine wants rows or a mask, not both.")
            return gathered(self, block, metric, queries, query_norms, c, rows)
        if mask is not None and (mask.shape != (n,) or mask.dtype != torch.bool):
            raise IndexBackendError(
                f"A mask wants ({n},) bool, got {tuple(mask.shape)} {mask.dtype}."
            )
        if n == 0 or m == 0:
            return queries.new_empty((m, 0)), queries.new_empty((m, 0), dtype=torch.int64)
        safe = block.is_safe(metric, query_norms)
        factors = queries * -2 if metric is Metric.L2 else -queries
        most = CACHED_SCORE_BYTES if queries.device.type == "cpu" else SCORE_BYTES
        step = max(1, most // (16 * m))
        best = Best(c)
        for start in range(0, n, step):
            stop = min(start + step, n)
            scores = self.products(factors, block.vectors[start:stop])
            here = None if mask is None else mask[start:stop]
            _finish(scores, metric, block.norms[start:stop], here, safe)
            near, at = scores.topk(min(c, stop - start), dim=1, largest=False)
            best.add(near, at.add_(start))
        scores, columns = best.sorted()
        if mask is not None:
            columns.masked_fill_(scores == math.inf, -1)
        if metric is Metric.L2:
            scores.add_((query_norms * query_norms)[:, None])
        else:
            scores.add_(1)
        if not safe:  # adding may have overflowed, which changes the order
            scores, at = _lowest(scores).masked_fill_(columns < 0, math.inf).sort(dim=1)
            columns = columns.gather(1, at)
        return scores, columns

    def products(self, queries: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """Inner products in float32, (m, n), of (m, d) float32 queries and (n, d) vectors."""
        torch = require("torch", extra=EXTRAS)
        m, (n, ndims) = len(queries), vectors.shape
        loops = self._faiss is not None and vectors.device.type == "cpu" and m <= FEW_QUERIES
        if vectors.dtype == torch.float32:
            if not loops:
                return queries @ vectors.T
            out = queries.new_empty((m, n))
            in_slices(n, 4 * ndims, lambda a, b: self._loop(queries, vectors[a:b], out[:, a:b]))
            return out
        out = queries.new_empty((m, n))
        most = WIDE_BYTES if vectors.device.type == "cpu" else SCORE_BYTES
        step = min(n, max(1, most // (4 * ndims)))
        buffer = queries.new_empty((step, ndims))
        for start in range(0, n, step):
            part = vectors[start : start + step]
            part = buffer[: len(part)].copy_(part)
            if loops:
                self._loop(queries, part, out[:, start : start + step])
            else:
                torch.mm(queries, part.T, out=out[:, start : start + step])
        return out

    def _loop(self, queries: torch.Tensor, vectors: torch.Tensor, out: torch.Tensor) -> None:
        """Contiguous queries and vectors; each line of `out` is contiguous, too."""
        pointer, (n, ndims) = self._faiss.cast_integer_to_float_ptr, vectors.shape
        step = n if len(queries) == 1 else max(1, LOOP_BYTES // (4 * ndims))
        x, line = vectors.data_ptr(), 4 * out.stride(0)
        for start in range(0, n, step):
            rows = pointer(x + 4 * ndims * start)
            for i in range(len(queries)):
                self._faiss.fvec_inner_products_ny(
                    pointer(out.data_ptr() + line * i + 4 * start),
                    pointer(queries.data_ptr() + 4 * ndims * i),
                    rows,
                    ndims,
                    min(step, n - start),
                )


def _finish(
    scores: torch.Tensor,
    metric: Metric,
    norms: torch.Tensor,
    mask: torch.Tensor | None,
    safe: bool,
) -> None:
    """Make (m, t) negated products into distances, but for what is the same for all rows."""
    torch = require("torch", extra=EXTRAS)
    extra = norms * norms if metric is Metric.L2 else None
    if metric is Metric.COSINE:
        usual = (norms >= SHORTEST) & (norms <= LONGEST)
        scores.mul_(torch.where(usual, 1 / norms, math.inf))
    if safe and mask is not None:  # so it costs no pass of its own under l2
        extra = torch.where(mask, 0.0 if extra is None else extra, math.inf)
    if extra is not None:
        scores.add_(extra)
    if not safe:
        _lowest(scores)
        if mask is not None:
            scores.masked_fill_(~mask, math.inf)


def _lowest(scores: torch.Tensor) -> torch.Tensor:
    """What is not a finite number becomes -inf, in place."""
    return scores.nan_to_num_(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
