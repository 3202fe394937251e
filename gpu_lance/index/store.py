"""The resident store of a vector column: the writer's side of its chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_lance.errors import BadVectorError
from gpu_lance.index.chunks import ChunkStore, picked
from gpu_lance.index.snapshot import Snapshot
from gpu_lance.optional import require

if TYPE_CHECKING:
    import torch

    from gpu_lance.index.read import Block

EXTRAS = "cpu|cuda13|cuda12"


class ResidentStore(ChunkStore[Snapshot]):
    """A growing matrix with one row a slot: its writer's side, for one thread at a time.

    See :class:`~gpu_lance.index.chunks.ChunkStore` for the parameters.

    Examples
    --------
    >>> import torch
    >>> store = ResidentStore(2, torch.float32, torch.device("cpu"))
    >>> store.add(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), np.array([7, 9]))
    >>> before = store.publish()
    >>> store.remove(np.array([7]))
    1
    >>> before.num_live, store.publish().num_live
    (2, 1)
    """

    def add(
        self,
        vectors: torch.Tensor | np.ndarray,
        row_ids: np.ndarray,
        updated: np.ndarray | int = 0,
        valid: np.ndarray | None = None,
    ) -> None:
        """Add vectors under row ids that are not live here.

        Null vectors and those with NaN or infinity are left out; so are those of float64 with a
        value that float32 does not reach.

        Parameters
        ----------
        vectors : torch.Tensor or numpy.ndarray
            (n, d), of any float type, preferably a tensor on the device, or an array that was
            read. Not kept, not changed.
        row_ids : numpy.ndarray
            (n,) integers.
        updated : numpy.ndarray or int
            (n,) int64, the version of each row's last change.
        valid : numpy.ndarray, optional
            (n,) bool, False for null vectors.

        Raises
        ------
        BadVectorError
            If the shapes do not fit.
        NoRoomError
            If the memory plan has no room; some of the rows may be in.
        DoesNotNarrowError
            If a value is beyond what the rows are held in, or a vector would become zero.
        """
        n = len(row_ids)
        if vectors.shape != (n, self.ndims) or (valid is not None and len(valid) != n):
            raise BadVectorError(
                f"The index holds vectors of {self.ndims} values and got {n} row ids with vectors "
                f"of shape {tuple(vectors.shape)}; both must fit."
            )
        torch = require("torch", extra=EXTRAS)
        ids = np.asarray(row_ids, np.int64)
        when = np.broadcast_to(np.asarray(updated, np.int64), (n,))
        if valid is not None and not valid.all():
            whole = np.ascontiguousarray(valid, bool)
            vectors = picked(vectors, whole)
            ids, when = ids[whole], when[whole]
        with torch.inference_mode():
            while len(ids):
                at = self._current(len(ids))
                room = self._chunks[at].room - self._used[at]
                kept = self._fill(at, vectors[:room])
                new, changed = ids[:room], when[:room]
                if kept is not None:
                    new, changed = new[kept], changed[kept]
                self._slots.add(new, changed)
                vectors, ids, when = vectors[room:], ids[room:], when[room:]
        self._published = None

    def add_block(self, block: Block) -> None:
        """See :meth:`ChunkStore.add_block`."""
        self.add(block.vectors, block.row_ids, block.updated, block.valid)

    def _current(self, rows: int) -> int:
        """The chunk that takes the next rows; a new one if all are full."""
        for at in range(len(self._chunks)):
            if self._used[at] < self._chunks[at].room:
                return at
        return self._grow(min(rows, self._most))

    def _snapshot(self, *common: Any) -> Snapshot:
        return Snapshot(*common)

    def _slots_of(self, at: int) -> int:
        return self._used[at]

    def _kept(self, first: int, stop: int) -> np.ndarray:
        return self._slots.live[first:stop]
