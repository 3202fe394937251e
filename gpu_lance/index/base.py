"""What every vector index does, and what a search gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_lance.errors import QueryError
from gpu_lance.host_memory import available
from gpu_lance.index.sizes import show_bytes

if TYPE_CHECKING:
    import torch

    from gpu_lance.index.snapshot import Mask
    from gpu_lance.types import Metric

BYTES_PER_ROW = 40  # an id and a distance, and what merging and reading them takes
SURELY_THERE = 256 << 20


@dataclass(frozen=True)
class SearchResult:
    """The nearest rows of each query, on the host, nearest first.

    Parameters
    ----------
    row_ids : numpy.ndarray
        (m, k), int64. -1 where fewer than k rows qualify, always at the end of a row.
    distances : numpy.ndarray
        (m, k), float32, ascending. +inf beside a row id of -1.

    Examples
    --------
    >>> SearchResult.empty(2, 3).counts.tolist()
    [0, 0]
    """

    row_ids: np.ndarray
    distances: np.ndarray

    def __post_init__(self) -> None:
        if self.row_ids.ndim != 2 or self.row_ids.shape != self.distances.shape:
            raise ValueError(
                f"SearchResult wants two (m, k) arrays, got {self.row_ids.shape} and "
                f"{self.distances.shape}."
            )

    @classmethod
    def empty(cls, m: int, k: int) -> SearchResult:
        """The result of `m` queries for which no row qualifies; see :func:`check_room`."""
        check_room(m, k)
        return cls(np.full((m, k), -1, np.int64), np.full((m, k), np.inf, np.float32))

    def padded(self, k: int) -> SearchResult:
        """The result with k columns, where it has fewer."""
        m, width = self.row_ids.shape
        if width >= k:
            return self
        wider = SearchResult.empty(m, k)
        wider.row_ids[:, :width] = self.row_ids
        wider.distances[:, :width] = self.distances
        return wider

    @property
    def counts(self) -> np.ndarray:
        """How many rows were found for each query: (m,), int64."""
        counts: np.ndarray = (self.row_ids >= 0).sum(axis=1)
        return counts


def check_room(m: int, k: int) -> None:
    """Raise unless k rows for each of m queries fit in the host's memory.

    Raises
    ------
    QueryError
    """
    needed = BYTES_PER_ROW * m * k
    if needed > SURELY_THERE and needed > (free := available()):
        raise QueryError(
            f"Up to {k} rows for each of {m} queries take {show_bytes(needed)}, and "
            f"{show_bytes(free)} of memory are free. Give a smaller limit, or search fewer queries "
            "at a time."
        )


class VectorIndex(ABC):
    """Vectors with row ids on one device, searched by one metric.

    Distances are squared for l2, 1 - cos for cosine and 1 - a·b for dot. An index is used by one
    thread at a time; its owner holds the lock. It frees its device memory on :meth:`close`, and
    at the end of a ``with`` block.
    """

    metric: Metric
    ndims: int
    device: torch.device

    @abstractmethod
    def add(
        self, vectors: torch.Tensor, row_ids: np.ndarray, valid: np.ndarray | None = None
    ) -> None:
        """Add vectors (n, d), preferably on the index's device, under row ids (n,).

        Where `valid`, (n,) bool, is False the vector is null and is left out.
        """

    @abstractmethod
    def remove(self, row_ids: np.ndarray) -> int:
        """Remove those rows; ids that are not here are ignored. Returns how many were."""

    @abstractmethod
    def search(
        self,
        queries: torch.Tensor,
        k: int,
        *,
        allowed: Mask | None = None,
        lower: float | None = None,
        upper: float | None = None,
    ) -> SearchResult:
        """The `k` nearest allowed rows of each query with lower <= distance < upper."""

    @abstractmethod
    def mask(self, row_ids: np.ndarray) -> Mask:
        """What `search` takes as `allowed` so that only those rows qualify."""

    @abstractmethod
    def tiles(self) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """The rows that are held, in bounded pieces: row ids (t,), vectors (t, d) on the device."""

    @abstractmethod
    def info(self) -> dict[str, Any]:
        """Device, engine and why it was chosen, metric, rows, bytes."""

    @abstractmethod
    def close(self) -> None:
        """Free the device memory. The index is empty afterwards."""

    @abstractmethod
    def __len__(self) -> int:
        """How many rows can be found."""

    def __enter__(self) -> VectorIndex:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
