"""What an engine is: it finds the nearest rows of a plain matrix block on one device.

An engine computes in float32 and only proposes candidates; whoever calls rescores them and knows
how far a score may be off.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from gpu_lance.errors import IndexBackendError
from gpu_lance.optional import require
from gpu_lance.types import Metric

if TYPE_CHECKING:
    import torch

EXTRAS = "cpu|cuda13|cuda12"
OVERFLOW = 1e38  # a sum of squared norms below this cannot overflow a float32 score
SHORTEST, LONGEST = 1e-15, 1e15  # norms whose squares float32 adds up exactly enough
FEW_QUERIES = 4  # up to here FAISS's loop over the rows beats a matrix product on the CPU
GATHER_BYTES = 2 << 20, 12 << 20, 256 << 20  # at a time: few queries, many; on another device


@dataclass(frozen=True, eq=False)
class Block:
    """Vectors on a device: a piece of the resident matrix, or rows gathered from it.

    Parameters
    ----------
    vectors : torch.Tensor
        (n, d) float32 or float16, contiguous, finite.
    norms : torch.Tensor
        (n,) float32, their Euclidean norms, on the same device.

    Raises
    ------
    IndexBackendError
        Unless shapes, dtypes and devices are these.

    Examples
    --------
    >>> import torch
    >>> Block(torch.tensor([[3.0, 4.0]]), torch.tensor([5.0])).norm_range
    (5.0, 5.0)
    """

    vectors: torch.Tensor
    norms: torch.Tensor

    def __post_init__(self) -> None:
        torch = require("torch", extra=EXTRAS)
        x, norms = self.vectors, self.norms
        fits = x.ndim == 2 and norms.shape == x.shape[:1] and norms.device == x.device
        kinds = x.dtype in (torch.float32, torch.float16) and norms.dtype == torch.float32
        if not (fits and kinds and x.is_contiguous() and norms.is_contiguous()):
            raise IndexBackendError(
                f"A block wants contiguous (n, d) float32 or float16 vectors and (n,) float32 "
                f"norms on one device, got {tuple(x.shape)} {x.dtype} on {x.device} and "
                f"{tuple(norms.shape)} {norms.dtype} on {norms.device}."
            )

    def __len__(self) -> int:
        return len(self.vectors)

    @functools.cached_property
    def norm_range(self) -> tuple[float, float]:
        """Smallest and largest norm; waits for the device, once."""
        if len(self) == 0:
            return 1.0, 1.0
        low, high = self.norms.aminmax()
        return float(low), float(high)

    def is_safe(self, metric: Metric, query_norms: torch.Tensor) -> bool:
        """Whether every score is a number that means something, for these queries."""
        low, high = self.norm_range
        if metric is Metric.COSINE:
            return low >= SHORTEST and high <= LONGEST
        longest = float(query_norms.max()) if len(query_norms) else 0.0
        return high * high + longest * longest < OVERFLOW  # False for NaN


class Engine(Protocol):
    """Finds the nearest rows of a block."""

    name: str
    is_faiss: bool

    def serves(self, metric: Metric, block_dtype: torch.dtype, c: int, unit_norms: bool) -> bool:
        """Whether :meth:`nearest` may be asked for that.

        `unit_norms`: the norms of all rows are within 2**-20 of 1. Then an engine may take the
        inner product for the cosine, and whoever calls widens the error bound by that much.
        """

    def nearest(
        self,
        block: Block,
        metric: Metric,
        queries: torch.Tensor,
        query_norms: torch.Tensor,
        c: int,
        *,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The c nearest rows of each query.

        Parameters
        ----------
        block : Block
        metric : Metric
        queries : torch.Tensor
            (m, d) float32, contiguous, finite, on the block's device; unit vectors for cosine.
        query_norms : torch.Tensor
            (m,) float32.
        c : int
            At least 1.
        rows : torch.Tensor, optional
            (p,) int64, each once: only these rows of the block, gathered in bounded tiles.

        Returns
        -------
        scores : torch.Tensor
            (m, min(c, n or p)) float32, ascending: distances as the engine's float32 has them.
            A score that overflowed, and under cosine that of a row whose norm is not within
            [1e-15, 1e15], is -inf, so that such a row is always a candidate. A zero row has no
            cosine; whoever calls masks it out.
        columns : torch.Tensor
            Of the same shape, int64: rows of the block. -1, with the score +inf, is no row.

        Raises
        ------
        IndexBackendError
            For queries of another shape, dtype or device, and for more than the engine serves.
        """


class Best:
    """The c smallest scores of each query so far, over parts of the columns.

    Examples
    --------
    >>> import torch
    >>> best = Best(2)
    >>> best.add(torch.tensor([[1.0, 3.0]]), torch.tensor([[0, 1]]))
    >>> best.add(torch.tensor([[2.0]]), torch.tensor([[7]]))
    >>> best.sorted()[1].tolist()
    [[0, 7]]
    """

    def __init__(self, c: int) -> None:
        self._c = c
        self._parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._width = 0

    def add(self, scores: torch.Tensor, columns: torch.Tensor) -> None:
        """Take in (m, t) scores and columns; small parts are reduced together."""
        self._parts.append((scores, columns))
        self._width += scores.shape[1]
        if self._width > 4 * self._c + 256:
            self._parts = [self._reduced()]
            self._width = self._parts[0][0].shape[1]

    def _reduced(self) -> tuple[torch.Tensor, torch.Tensor]:
        torch = require("torch", extra=EXTRAS)
        if len(self._parts) == 1:
            scores, columns = self._parts[0]
        else:
            scores, columns = (torch.cat(parts, 1) for parts in zip(*self._parts, strict=True))
        if scores.shape[1] > self._c:
            scores, at = scores.topk(self._c, dim=1, largest=False)
            columns = columns.gather(1, at)
        return scores, columns

    def sorted(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (m, <= c) ascending, and their columns; something was added."""
        scores, columns = self._reduced()
        scores, at = scores.sort(dim=1)
        return scores, columns.gather(1, at)


def checked(block: Block, queries: torch.Tensor, query_norms: torch.Tensor, c: int) -> None:
    """Refuse what would make an engine read memory that is not the tensors'."""
    torch = require("torch", extra=EXTRAS)
    x, m = block.vectors, len(queries)
    if (
        queries.shape != (m, x.shape[1])
        or query_norms.shape != (m,)
        or queries.dtype != torch.float32
        or queries.device != x.device
        or not queries.is_contiguous()
        or c < 1
    ):
        raise IndexBackendError(
            f"An engine wants contiguous (m, {x.shape[1]}) float32 queries on {x.device}, (m,) "
            f"norms and c of at least 1, got {tuple(queries.shape)} {queries.dtype} on "
            f"{queries.device}, contiguous: {queries.is_contiguous()}, "
            f"{tuple(query_norms.shape)} norms and c = {c}."
        )


def gathered(
    engine: Engine,
    block: Block,
    metric: Metric,
    queries: torch.Tensor,
    query_norms: torch.Tensor,
    c: int,
    rows: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:meth:`Engine.nearest` over some rows, copied tile by tile into one buffer."""
    torch = require("torch", extra=EXTRAS)
    x, best = block.vectors, Best(c)
    few, many, elsewhere = GATHER_BYTES
    most = elsewhere if x.device.type != "cpu" else few if len(queries) <= FEW_QUERIES else many
    step = max(1, most // (x.element_size() * x.shape[1]))
    buffer = x.new_empty((min(step, len(rows)), x.shape[1]))
    best.add(*room(queries, 0))
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        part = buffer[: len(some)]
        torch.index_select(x, 0, some, out=part)
        tile = Block(part, block.norms.index_select(0, some))
        scores, columns = engine.nearest(tile, metric, queries, query_norms, c)
        best.add(scores, some[columns])
    return best.sorted()


def room(queries: torch.Tensor, c: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised scores and columns, (m, c), on the queries' device."""
    torch = require("torch", extra=EXTRAS)
    shape = (len(queries), c)
    return queries.new_empty(shape), queries.new_empty(shape, dtype=torch.int64)
