"""Vectors on a device with row ids, searched exactly, without a table behind them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_lance.index.base import SearchResult, VectorIndex
from gpu_lance.index.exact import ExactSearch
from gpu_lance.index.planner import Planner
from gpu_lance.index.snapshot import Mask, tile_rows
from gpu_lance.index.store import ResidentStore
from gpu_lance.optional import require
from gpu_lance.types import Metric

if TYPE_CHECKING:
    import torch


class FlatIndex(VectorIndex):
    """Every row compared with every query, on the device that holds the vectors.

    What a table's column is searched with, for vectors that are in no table; see
    :class:`~gpu_lance.index.exact.ExactSearch` for the order of the results and for what is left
    out.

    Parameters
    ----------
    ndims : int
        Length of a vector.
    metric : Metric or str
        ``l2`` (squared), ``cosine`` or ``dot``.
    device : torch.device
        Where the vectors live.
    dtype : torch.dtype, optional
        float32 or float16: how they are held. Values are rounded to it. None for float32.
    use_faiss : bool, default True
        False takes torch even where FAISS is there.

    Raises
    ------
    IndexBackendError
        If the installed FAISS packages have overwritten each other.

    Examples
    --------
    >>> import numpy as np, torch
    >>> with FlatIndex(2, "l2", torch.device("cpu")) as index:
    ...     index.add(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), np.array([10, 20]))
    ...     index.search(torch.tensor([[3.0, 3.0]]), k=2).row_ids.tolist()
    [[20, 10]]
    """

    def __init__(
        self,
        ndims: int,
        metric: Metric | str,
        device: torch.device,
        *,
        dtype: torch.dtype | None = None,
        use_faiss: bool = True,
    ) -> None:
        torch = require("torch", extra="cpu|cuda13|cuda12")
        self.ndims = int(ndims)
        self.metric = Metric.parse(metric)
        self._dtype = torch.float32 if dtype is None else dtype
        self._store = ResidentStore(self.ndims, self._dtype, device)
        self.device = self._store.device
        self._planner = Planner.of(self.device) if use_faiss else Planner(self.device, faiss=False)

    def __len__(self) -> int:
        return len(self._store)

    @property
    def num_slots(self) -> int:
        """How many slots there are, dead ones included."""
        return len(self._store.slots)

    def reserve(self, rows: int) -> None:
        """Announce that `rows` rows are coming, so that the memory is taken once."""
        self._store.expect(rows)

    def add(
        self, vectors: torch.Tensor, row_ids: np.ndarray, valid: np.ndarray | None = None
    ) -> None:
        """Add vectors under row ids that are not in the index.

        Parameters
        ----------
        vectors : torch.Tensor
            (n, d), of any float dtype, preferably on the index's device. Not kept, not changed.
        row_ids : numpy.ndarray
            (n,) integers.
        valid : numpy.ndarray, optional
            (n,) bool, False for null vectors, which are left out.

        Raises
        ------
        BadVectorError
            If the shapes do not fit.
        """
        self._store.add(vectors.detach(), row_ids, 0, valid)

    def remove(self, row_ids: np.ndarray) -> int:
        """Remove rows; see :meth:`VectorIndex.remove`. Many dead slots are swept out."""
        removed = self._store.remove(row_ids)
        if self._store.wants_sweep:
            for _ in self._store.sweep():
                pass
        return removed

    def mask(self, row_ids: np.ndarray) -> Mask:
        """The slots of those row ids, for `allowed`."""
        return self._store.publish().mask(row_ids)

    def search(
        self,
        queries: torch.Tensor,
        k: int,
        *,
        allowed: Mask | None = None,
        lower: float | None = None,
        upper: float | None = None,
    ) -> SearchResult:
        """The k nearest rows; see :meth:`gpu_lance.index.exact.ExactSearch.search`."""
        snapshot = self._store.publish()
        live = snapshot.live_mask
        if allowed is not None and live is not None and len(allowed.bits) == len(snapshot):
            allowed = allowed & live  # it may be from before
        exact = ExactSearch(snapshot, self.metric, self._planner)
        return exact.search(queries, k, allowed=allowed, lower=lower, upper=upper)

    def tiles(self) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Live rows in bounded pieces: row ids (t,), vectors (t, d), valid until the next piece."""
        torch = require("torch", extra="cpu|cuda13|cuda12")
        snapshot, step = self._store.publish(), tile_rows(self.ndims, self._dtype.itemsize)
        for first, vectors, _ in snapshot.pieces():
            for start in range(0, len(vectors), step):
                some = vectors[start : start + step]
                slots = slice(first + start, first + start + len(some))
                ids = snapshot.row_ids[slots]
                if snapshot.live is not None:
                    live = snapshot.live[slots]
                    ids, some = ids[live], some[torch.from_numpy(live).to(some.device)]
                yield ids, some

    @property
    def nbytes(self) -> int:
        """Bytes of the vectors, norms, row ids and live bits."""
        return self._store.nbytes

    def info(self) -> dict[str, Any]:
        """Device, engine and why, metric, rows, bytes."""
        return {
            "device": str(self.device),
            "metric": str(self.metric),
            "rows": len(self),
            "bytes": self.nbytes,
            **self._planner.info(),
        }

    def close(self) -> None:
        """Free the memory; the index is empty afterwards."""
        self._store = ResidentStore(self.ndims, self._dtype, self.device)
