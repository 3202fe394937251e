"""The index of one vector column of a table, kept in step with its Lance dataset."""

from __future__ import annotations

import re
import threading
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import numpy as np

from gpu_lance.device import check_threads
from gpu_lance.index.base import SearchResult
from gpu_lance.index.budget import Budget
from gpu_lance.index.exact import ExactSearch, check_k
from gpu_lance.index.follow import Follower, Following
from gpu_lance.index.planner import Planner
from gpu_lance.index.read import read_blocks
from gpu_lance.index.snapshot import Mask, Snapshot
from gpu_lance.index.stream import lookup, stream
from gpu_lance.index.sync import Mark, matching_row_ids
from gpu_lance.index.worker import Worker
from gpu_lance.types import Metric

if TYPE_CHECKING:
    from types import TracebackType

    import lance
    import torch

Sn = TypeVar("Sn", bound=Snapshot)

CACHED_FILTERS = 16
CACHED_BYTES = 64 << 20
# what such a condition holds for is another thing each time; names of columns count too, which
# costs only the cache
_VOLATILE = re.compile(r"\b(now|today|random|rand|uuid|current_\w+)\b", re.IGNORECASE)


class FollowingIndex(ABC, Generic[Sn]):
    """What the indexes of columns have in common: filters, and what they hold.

    Parameters
    ----------
    column : str
        Name of the vector column.
    ndims : int
        Length of its vectors.
    device : torch.device
        Where the vectors are searched.
    follower : Following
        Holds the rows.
    """

    def __init__(
        self, column: str, ndims: int, device: torch.device, follower: Following[Sn]
    ) -> None:
        self.column = column
        self.ndims = int(ndims)
        self.device = device
        self._follower = follower
        # weak: a filter keeps no rows in memory
        self._filters: OrderedDict[tuple[Mark, str], tuple[weakref.ref[Sn], Mask]]
        self._filters = OrderedDict()
        self._filters_lock = threading.Lock()
        self._scanned = 0

    @abstractmethod
    def _engine(self) -> dict[str, Any]:
        """``engine`` and ``reason``."""

    def _answer(
        self,
        dataset: lance.LanceDataset,
        k: int,
        where: str | None,
        pad: bool,
        held: Callable[[Sn, Mask | None, bool, int], SearchResult],
        streamed: Callable[[], tuple[SearchResult, int]],
    ) -> SearchResult:
        """Search the dataset's version, as it is held or as it is read.

        Parameters
        ----------
        held : callable
            Searches a snapshot, given which rows are allowed, whether they are held narrower than
            they are stored, and a k that is no larger than makes sense.
        streamed : callable
            Searches what is read from Lance; gives how many rows that were, too.
        """
        check_threads()
        mark = Mark.of(dataset, self.column)
        snapshot = self._follower.at(dataset, mark)
        if snapshot is None:
            found, self._scanned = streamed()
        else:
            allowed = None if where is None else self._allowed(dataset, mark, snapshot, where)
            qualify = self._scanned = snapshot.num_live if allowed is None else allowed.count
            narrowed = snapshot.dtype.itemsize < self._follower.dtype(dataset).itemsize
            found = held(snapshot, allowed, narrowed, min(k, max(1, qualify)))
        return found.padded(k) if pad else found

    def _allowed(self, dataset: lance.LanceDataset, mark: Mark, snapshot: Sn, where: str) -> Mask:
        """The rows that meet a condition."""
        if _VOLATILE.search(where):
            return snapshot.mask(matching_row_ids(dataset, where))
        key = (mark, where)
        with self._filters_lock:
            cached = self._filters.get(key)
            if cached is not None and cached[0]() is snapshot:
                self._filters.move_to_end(key)
                return cached[1]
        made = snapshot.mask(matching_row_ids(dataset, where))
        with self._filters_lock:
            self._filters[key] = (weakref.ref(snapshot), made)
            self._filters.move_to_end(key)
            size = sum(len(mask.bits) for _, mask in self._filters.values())
            while len(self._filters) > 1 and (
                len(self._filters) > CACHED_FILTERS or size > CACHED_BYTES
            ):
                size -= len(self._filters.popitem(last=False)[1][1].bits)
        return made

    # -------------------------------------------------------------- the contents

    def info(self) -> dict[str, Any]:
        """What is held where.

        Returns
        -------
        dict
            ``column``, ``device``, ``engine`` and ``reason`` (why this engine), ``rows`` (that can
            be found), ``bytes``, ``version`` (None before the first search), ``step`` and ``plan``
            (how it is held, and why), ``refresh`` (``kind``, ``reason``, ``seconds`` of the last
            one) and ``scanned`` (rows that qualified in the last search).
        """
        follower = self._follower
        store, refresh, chosen = follower.store, follower.refresh, follower.plan
        engine = self._engine()
        return {
            "column": self.column,
            "device": str(self.device),
            "engine": engine["engine"],
            "reason": engine["reason"],
            "rows": 0 if store is None else len(store),
            "bytes": 0 if store is None else store.nbytes,
            "version": follower.version,
            "step": None if chosen is None else str(chosen.step),
            "plan": None if chosen is None else chosen.reason,
            "refresh": {
                "kind": refresh.kind, "reason": refresh.reason, "seconds": refresh.seconds,
            },
            "scanned": self._scanned,
        }  # fmt: skip

    def close(self) -> None:
        """Free the device memory. A later search loads the column again."""
        self._follower.drop()
        with self._filters_lock:
            self._filters.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class ColumnIndex(FollowingIndex[Snapshot]):
    """Searches one vector column of a table at the version that the caller asks for.

    The column's vectors are held on the device once, for every metric, in the form for which the
    memory budget has room; see :mod:`gpu_lance.index.plan`. Before a search they are brought to
    the dataset's version; see :class:`~gpu_lance.index.follow.Follower`. A search works on a
    snapshot of that version, so writers and searches of other versions disturb it in nothing. A
    column that is not held is read from Lance for each search, and the answer is the same.

    Any number of threads may use it. Their searches are computed by the device's one worker,
    those that wait at the same time together.

    Parameters
    ----------
    column : str
        Name of the vector column.
    ndims : int
        Length of its vectors.
    device : torch.device
        Where the vectors are searched.
    budget : Budget, optional
        What the memory is counted by; None for the one that everything on the device shares.

    Examples
    --------
    >>> import lance, numpy as np, pyarrow as pa, torch
    >>> vector = pa.FixedSizeListArray.from_arrays(pa.array([0, 0, 3, 4], pa.float32()), 2)
    >>> dataset = lance.write_dataset(
    ...     pa.table({"vector": vector}), "memory://", enable_stable_row_ids=True
    ... )
    >>> with ColumnIndex("vector", 2, torch.device("cpu")) as index:
    ...     index.search(dataset, torch.tensor([[3.0, 3.0]]), 1, Metric.L2).distances.tolist()
    [[1.0]]
    """

    _follower: Follower

    def __init__(
        self, column: str, ndims: int, device: torch.device, budget: Budget | None = None
    ) -> None:
        follower = Follower(column, int(ndims), device, budget or Budget.of(device))
        super().__init__(column, ndims, device, follower)
        self._planner = Planner.of(device)

    def _engine(self) -> dict[str, Any]:
        return self._planner.info()

    # ---------------------------------------------------------------- searching

    def search(
        self,
        dataset: lance.LanceDataset,
        queries: torch.Tensor,
        k: int,
        metric: Metric,
        *,
        where: str | None = None,
        lower: float | None = None,
        upper: float | None = None,
        pad: bool = True,
    ) -> SearchResult:
        """The `k` nearest rows of each query in the dataset's version.

        Parameters
        ----------
        dataset : lance.LanceDataset
            At the version to search.
        queries : torch.Tensor
            (m, d), finite, preferably on the index's device.
        k : int
            At least 1.
        metric : Metric
        where : str, optional
            An SQL condition; only rows that meet it are searched.
        lower, upper : float, optional
            Only rows with lower <= distance < upper count.
        pad : bool
            False leaves the result with fewer columns than `k` where fewer rows are searched.

        Returns
        -------
        SearchResult

        Raises
        ------
        QueryError
            If the condition, k or the queries' length is wrong, or the result is too large.
        BadVectorError
            If a query holds NaN or infinity.
        IndexBackendError
            If the device has no memory for what was planned.
        """
        metric = Metric.parse(metric)
        check_k(k)
        worker = Worker.of(self.device)

        def held(snapshot: Snapshot, allowed: Mask | None, narrowed: bool, k: int) -> SearchResult:
            stored = lookup(dataset, self.column, snapshot) if narrowed else None
            exact = ExactSearch(snapshot, metric, self._planner, stored)

            def run(some: torch.Tensor, k: int) -> SearchResult:
                return exact.search(some, k, allowed=allowed, lower=lower, upper=upper)

            key = (id(snapshot), metric, None if allowed is None else id(allowed), lower, upper)
            return worker.search(key, queries, k, run)

        def streamed() -> tuple[SearchResult, int]:
            def run(
                search: Callable[[torch.Tensor, int], SearchResult], some: torch.Tensor, k: int
            ) -> SearchResult:
                return worker.search(id(search), some, k, search)

            return stream(
                read_blocks(dataset, self.column, self.ndims, where=where), self.ndims, metric,
                self._planner, self.device, queries, k, lower, upper, run,
            )  # fmt: skip

        return self._answer(dataset, k, where, pad, held, streamed)

    def append(
        self,
        before: int,
        dataset: lance.LanceDataset,
        vectors: torch.Tensor,
        row_ids: np.ndarray,
        valid: np.ndarray | None = None,
    ) -> None:
        """Take in the rows of an own commit, straight from the tensors that were stored.

        If the index holds version `before` and the dataset is the version after it, they are
        added. If it holds nothing and they are all that the dataset has, they are what it holds.
        Otherwise nothing happens, and the next search reads what it needs. It never fails for
        want of memory: the rows are stored already, and the next search plans anew.

        Parameters
        ----------
        before : int
            The version that the rows were added to.
        dataset : lance.LanceDataset
            At the version that the commit made.
        vectors : torch.Tensor
            (n, d) as stored, on the device.
        row_ids : numpy.ndarray
            (n,) integers, in the same order.
        valid : numpy.ndarray, optional
            (n,) bool, False for null vectors.
        """
        check_threads()
        self._follower.append(before, dataset, vectors, row_ids, valid)
