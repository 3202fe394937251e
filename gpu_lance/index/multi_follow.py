"""A multivector column's rows on the device, brought to the version that a search asks for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_lance.index.chunks import CHUNK_BYTES, ChunkStore
from gpu_lance.index.follow import Following
from gpu_lance.index.multi_read import (
    Documents,
    check_multi_column,
    counted_vectors,
    expected_vectors,
    read_documents,
)
from gpu_lance.index.multi_store import MultiSnapshot, MultiStore, check_offsets

if TYPE_CHECKING:
    import lance
    import torch


class MultiFollower(Following[MultiSnapshot]):
    """Holds the documents of a multivector column; see :class:`Following`.

    How many vectors there are Lance does not say: it is guessed from their bytes on disk, and
    counted where that was too low and memory is short.
    """

    def dtype(self, dataset: lance.LanceDataset) -> np.dtype:
        """See :meth:`Following.dtype`."""
        return np.dtype(f"f{check_multi_column(dataset, self.column, self.ndims)}")

    def _expected(self, dataset: lance.LanceDataset, exactly: bool) -> int:
        if exactly:
            return self._with_ends(*counted_vectors(dataset, self.column, self.ndims))
        rows, guess = dataset.count_rows(), expected_vectors(dataset, self.column, self.ndims)
        return self._with_ends(guess, 4 * guess // max(1, rows))

    def _with_ends(self, vectors: int, longest: int) -> int:
        """With room at the end of each chunk, where the next document may not fit."""
        return vectors + longest * (vectors * self.ndims * 4 // (CHUNK_BYTES // 2))

    def _make(self, dtype: torch.dtype, **how: Any) -> MultiStore:
        return MultiStore(self.ndims, dtype, self.device, **how)

    def _blocks(self, dataset: lance.LanceDataset, **which: Any) -> Iterator[Documents]:
        return read_documents(dataset, self.column, self.ndims, **which)

    def append(
        self,
        before: int,
        dataset: lance.LanceDataset,
        vectors: torch.Tensor,
        offsets: np.ndarray,
        row_ids: np.ndarray,
        valid: np.ndarray | None = None,
    ) -> None:
        """See :meth:`gpu_lance.index.multi_column.MultiColumnIndex.append`."""
        bounds = np.asarray(offsets, np.int64)
        check_offsets(bounds, len(row_ids), vectors, self.ndims, valid)

        def add(store: ChunkStore[MultiSnapshot], version: int) -> None:
            assert isinstance(store, MultiStore)
            store.add(vectors, bounds, row_ids, version, valid)

        longest = int(np.diff(bounds).max(initial=0))
        self._append(before, dataset, len(row_ids), self._with_ends(len(vectors), longest), add)
