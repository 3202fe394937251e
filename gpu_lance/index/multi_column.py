"""The index of one multivector column of a table, kept in step with its Lance dataset."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_lance.device import check_threads
from gpu_lance.index.base import SearchResult
from gpu_lance.index.budget import Budget
from gpu_lance.index.column import FollowingIndex
from gpu_lance.index.exact import check_k
from gpu_lance.index.multi_follow import MultiFollower
from gpu_lance.index.multi_read import read_documents
from gpu_lance.index.multi_search import MultiSearch, checked
from gpu_lance.index.multi_store import MultiSnapshot, MultiStore
from gpu_lance.index.multi_stream import lookup, stored
from gpu_lance.index.snapshot import Mask
from gpu_lance.index.stream import merged, pieces
from gpu_lance.index.worker import Worker
from gpu_lance.types import Metric

if TYPE_CHECKING:
    import lance
    import torch


class MultiColumnIndex(FollowingIndex[MultiSnapshot]):
    """Searches one multivector column of a table at the version that the caller asks for.

    A row is a document of any number of vectors, and so is a query: the distance is the sum, over
    the query's vectors, of the least distance of any of the document's; see
    :class:`~gpu_lance.index.multi_search.MultiSearch`. All else is as with
    :class:`~gpu_lance.index.column.ColumnIndex`, and so are the parameters; but searches that wait
    at the same time run one after the other.

    Examples
    --------
    >>> import lance, numpy as np, pyarrow as pa, torch
    >>> kind = pa.list_(pa.list_(pa.float32(), 2))
    >>> documents = pa.array([[[0, 0], [3, 4]], [[9, 9]]], kind)
    >>> dataset = lance.write_dataset(
    ...     pa.table({"vectors": documents}), "memory://", enable_stable_row_ids=True
    ... )
    >>> query = torch.tensor([[3.0, 3.0], [0.0, 1.0]])
    >>> with MultiColumnIndex("vectors", 2, torch.device("cpu")) as index:
    ...     index.search(dataset, query, np.array([0, 2]), 1, Metric.L2).distances.tolist()
    [[2.0]]
    """

    _follower: MultiFollower

    def __init__(
        self, column: str, ndims: int, device: torch.device, budget: Budget | None = None
    ) -> None:
        follower = MultiFollower(column, int(ndims), device, budget or Budget.of(device))
        super().__init__(column, ndims, device, follower)

    def _engine(self) -> dict[str, Any]:
        return {"engine": "torch", "reason": "MaxSim is a product and a maximum over documents"}

    def search(
        self,
        dataset: lance.LanceDataset,
        queries: torch.Tensor,
        offsets: np.ndarray,
        k: int,
        metric: Metric,
        *,
        where: str | None = None,
        lower: float | None = None,
        upper: float | None = None,
        pad: bool = True,
    ) -> SearchResult:
        """The `k` nearest rows of each query in the dataset's version.

        See :meth:`gpu_lance.index.column.ColumnIndex.search` for the other parameters, and for
        what it raises.

        Parameters
        ----------
        queries : torch.Tensor
            (t, d), finite, preferably on the index's device.
        offsets : numpy.ndarray
            (m + 1,) integers from 0 to t: query i has the vectors offsets[i] to offsets[i + 1].

        Returns
        -------
        SearchResult
            (m, k).

        Raises
        ------
        QueryError
            Also if the offsets do not fit, or a query has no vector.
        """
        metric = Metric.parse(metric)
        check_k(k)
        worker = Worker.of(self.device)

        def run(search: MultiSearch, k: int, allowed: Mask | None = None) -> SearchResult:
            def one(some: torch.Tensor, k: int) -> SearchResult:
                return search.search(some, offsets, k, allowed=allowed, lower=lower, upper=upper)

            # a key of its own: what comes back has other rows than what is given
            return worker.search(object(), queries, k, one)

        def held(
            snapshot: MultiSnapshot, allowed: Mask | None, narrowed: bool, k: int
        ) -> SearchResult:
            values = lookup(dataset, self.column, snapshot) if narrowed else None
            return run(MultiSearch(snapshot, metric, values), k, allowed)

        def make(dtype: torch.dtype) -> MultiStore:
            return MultiStore(self.ndims, dtype, self.device)

        def parts() -> Iterator[tuple[int, SearchResult]]:
            blocks = read_documents(dataset, self.column, self.ndims, where=where)
            for snapshot, wide in pieces(blocks, make):
                search = MultiSearch(snapshot, metric, stored(snapshot, wide))
                rows = snapshot.num_live
                yield rows, run(search, min(k, max(1, rows)))

        def streamed() -> tuple[SearchResult, int]:
            _, bounds = checked(queries, offsets, k, self.ndims, self.device)
            return merged(parts(), len(bounds) - 1, k)

        return self._answer(dataset, k, where, pad, held, streamed)

    def append(
        self,
        before: int,
        dataset: lance.LanceDataset,
        vectors: torch.Tensor,
        offsets: np.ndarray,
        row_ids: np.ndarray,
        valid: np.ndarray | None = None,
    ) -> None:
        """Take in the rows of an own commit, straight from the tensors that were stored.

        See :meth:`gpu_lance.index.column.ColumnIndex.append`.

        Parameters
        ----------
        before : int
            The version that the rows were added to.
        dataset : lance.LanceDataset
            At the version that the commit made.
        vectors : torch.Tensor
            (t, d) as stored, on the device.
        offsets : numpy.ndarray
            (n + 1,) integers from 0 to t: row i has the vectors offsets[i] to offsets[i + 1].
        row_ids : numpy.ndarray
            (n,) integers, in the same order.
        valid : numpy.ndarray, optional
            (n,) bool, False for rows that are null.
        """
        check_threads()
        self._follower.append(before, dataset, vectors, offsets, row_ids, valid)

    def info(self) -> dict[str, Any]:
        """What is held where; see :meth:`gpu_lance.index.column.ColumnIndex.info`.

        Returns
        -------
        dict
            With ``vectors``, how many the rows have together.
        """
        snapshot = self._follower.snapshot
        return {**super().info(), "vectors": 0 if snapshot is None else snapshot.num_vectors}
