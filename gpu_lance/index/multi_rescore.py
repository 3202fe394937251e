"""The exact distances of documents that decide the order: float64, in one order of summation.

A document's distance is the sum, over the query's vectors, of the least distance of any vector of
the document. A product in float64 finds the few vectors that may be the nearest; their distances
are then summed in the order of :mod:`gpu_lance.index.rescore`, so that every device gives the same
bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gpu_lance.index.ragged import bounds_of, groups
from gpu_lance.index.rescore import (
    Rounding,
    error_bound,
    norms,
    pair_distances,
    tree_sum,
    wide,
)
from gpu_lance.optional import require
from gpu_lance.types import Metric

if TYPE_CHECKING:
    import torch

    # the stored vectors (t, d) of documents (n,), one after the other
    Values = Callable[[np.ndarray], torch.Tensor]

EXTRAS = "cpu|cuda13|cuda12"
PIECE_BYTES = 16 << 20  # of float64 vectors, and of their products, in flight
COLUMNS = 256  # query vectors at a time
FLOAT64 = Rounding(2.0**-53)


@dataclass(frozen=True, eq=False)
class ExactDocuments:
    """Measures documents for one query.

    Parameters
    ----------
    metric : Metric
    query : torch.Tensor
        (c, d) float32, as the user gave it; under cosine without vectors of zeros.
    values : callable
        Gives the stored vectors (t, d) of documents (n,), one document after the other.
    bounds : numpy.ndarray
        (n + 1,) int64, by slot: the document in slot i has bounds[i + 1] - bounds[i] vectors.
    """

    metric: Metric
    query: torch.Tensor
    values: Values
    bounds: np.ndarray

    def distances(self, slots: np.ndarray) -> np.ndarray:
        """The distances (n,) float32 of documents (n,), on the host.

        Under cosine each of them has a vector that is not zero.
        """
        torch = require("torch", extra=EXTRAS)
        out = np.empty(len(slots), np.float32)
        bounds = bounds_of(self.bounds[slots + 1] - self.bounds[slots])
        # no more documents than vectors: of each there is a distance to every query vector
        most = max(1, PIECE_BYTES // (8 * max(self.query.shape)))
        for start, stop in groups(bounds, 0, len(slots), most):
            least = self._least(slots[start:stop], bounds[start : stop + 1] - bounds[start])
            out[start:stop] = tree_sum(torch.from_numpy(least)).float().numpy()
        return out

    def _least(self, slots: np.ndarray, bounds: np.ndarray) -> np.ndarray:
        """(n, c) float64: the least distance of each document to each query vector."""
        stored, exact = self.values(slots), wide(self.query)
        least = np.full((len(slots), len(exact)), np.inf)
        step = max(1, PIECE_BYTES // (8 * max(exact.shape[1], min(COLUMNS, len(exact)))))
        for start in range(0, len(stored), step):  # a long document in several pieces
            stop = min(start + step, len(stored))
            x = wide(stored[start:stop]).to(exact.device)
            first = int(np.searchsorted(bounds, start, side="right")) - 1
            last = int(np.searchsorted(bounds, stop, side="left"))
            begins = np.maximum(bounds[first:last] - start, 0)
            for left in range(0, len(exact), COLUMNS):
                place = least[first:last, left : left + COLUMNS]
                found = self._nearest(x, exact[left : left + COLUMNS], begins)
                np.minimum(place, found, out=place)
        return least

    def _nearest(self, x: torch.Tensor, queries: torch.Tensor, begins: np.ndarray) -> np.ndarray:
        """(n, c) float64: the least distance, over the vectors x (t, d) of documents, to queries.

        The documents begin at the rows `begins` (n,).
        """
        torch = require("torch", extra=EXTRAS)
        c, cosine = len(queries), self.metric is Metric.COSINE
        lengths, query_lengths = norms(x), norms(queries)
        about = x @ queries.T  # (t, c)
        if self.metric is Metric.L2:
            about.mul_(-2).add_((lengths * lengths)[:, None]).add_(query_lengths * query_lengths)
        elif self.metric is Metric.DOT:
            about.neg_().add_(1)
        else:
            about.div_(-lengths[:, None] * query_lengths).add_(1)
            # one that is zero as float32 counts as zero
            about.masked_fill_((x.float() == 0).all(dim=1)[:, None], torch.inf)
        off = error_bound(self.metric, x.shape[1], FLOAT64, query_lengths[None], lengths[:, None])
        assert not isinstance(off, np.ndarray)
        off = off * 2  # of this product, and of the sum by halving
        most = by_document(about + off, begins, "min")
        of = np.repeat(np.arange(len(begins)), np.diff(begins, append=len(x)))
        limit = most[torch.from_numpy(of).to(most.device)]
        row, column = ((about - off <= limit) & (about < torch.inf)).nonzero(as_tuple=True)
        measured = np.empty(len(row))
        step = max(1, PIECE_BYTES // (16 * x.shape[1]))
        for start in range(0, len(row), step):
            part = slice(start, start + step)
            at = column[part]
            found = pair_distances(
                self.metric, x[row[part]], queries[at], query_lengths[at] if cosine else None
            )
            measured[part] = found.cpu().numpy()
        out = np.full(len(begins) * c, np.inf)
        np.minimum.at(out, of[row.cpu().numpy()] * c + column.cpu().numpy(), measured)
        return out.reshape(len(begins), c)


def by_document(values: torch.Tensor, begins: np.ndarray, which: str) -> torch.Tensor:
    """The largest or smallest value of each document, (n, c), of its rows in `values` (t, c).

    Parameters
    ----------
    values : torch.Tensor
        (t, c), of documents that follow each other.
    begins : numpy.ndarray
        (n,) int64, ascending: the first row of each; the last one ends where `values` does.
    which : str
        ``max`` or ``min``. NaN goes before everything.

    Examples
    --------
    >>> import torch
    >>> by_document(torch.tensor([[1.0], [3.0], [2.0]]), np.array([0, 2]), "max").tolist()
    [[3.0], [2.0]]
    """
    torch = require("torch", extra=EXTRAS)
    if values.device.type == "cpu":
        ufunc = np.maximum if which == "max" else np.minimum
        return torch.from_numpy(ufunc.reduceat(values.numpy(), begins, axis=0))
    counts = torch.from_numpy(np.diff(begins, append=len(values))).to(values.device)
    if values.device.type == "cuda":
        return torch.segment_reduce(values, which, lengths=counts, axis=0, unsafe=True)
    of = torch.arange(len(begins), device=values.device).repeat_interleave(counts)
    out = values.new_full(
        (len(begins), values.shape[1]), -torch.inf if which == "max" else torch.inf
    )
    return out.scatter_reduce_(0, of[:, None].expand_as(values), values, f"a{which}")
