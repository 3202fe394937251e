"""The index of one vector column of a table, kept in step with its Lance dataset."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_lance.device import check_threads, free_memory, is_out_of_memory
from gpu_lance.errors import IndexBackendError
from gpu_lance.index.base import SearchResult, VectorIndex
from gpu_lance.index.flat import FlatIndex, block_bytes
from gpu_lance.index.sync import Changes, Mark, changes, matching_row_ids, read_vectors
from gpu_lance.optional import require
from gpu_lance.storage import operation_of
from gpu_lance.types import Metric

if TYPE_CHECKING:
    from types import TracebackType

    import lance
    import torch

logger = logging.getLogger(__name__)

HEADROOM = 1.1
CACHED_FILTERS = 16
KEPT_VERSIONS = 64
# what such a condition holds for is another thing each time; names of columns count too, which
# costs only the cache
_VOLATILE = re.compile(r"\b(now|today|random|rand|uuid|current_\w+)\b", re.IGNORECASE)


class ColumnIndex:
    """Searches one vector column of a table at the version that the caller asks for.

    It holds one :class:`FlatIndex` for each metric that was searched by, made on first use from
    the table, or from another one's vectors where those are the stored ones. Before a search it
    brings them to the dataset's version: by Lance's delta where that is known to be complete, by
    reading the column anew where it is not. While rows are only added, versions of a moment ago
    are still answered, so that searches in other threads are not disturbed by a writer.

    Any number of threads may use it; one at a time does.

    Parameters
    ----------
    column : str
        Name of the vector column.
    ndims : int
        Length of its vectors.
    device : torch.device
        Where the vectors are held and searched.

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

    def __init__(self, column: str, ndims: int, device: torch.device) -> None:
        self.column = column
        self.ndims = int(ndims)
        self.device = device
        self._lock = threading.RLock()
        self._indexes: dict[Metric, FlatIndex] = {}
        self._held: Mark | None = None
        # earlier versions that differ only by rows added since: the slots that they had
        self._earlier: OrderedDict[Mark, dict[Metric, int]] = OrderedDict()
        self._filters: OrderedDict[tuple[Mark, Metric, str], torch.Tensor] = OrderedDict()
        self._refresh: dict[str, Any] = {"kind": "none", "reason": None, "seconds": 0.0}
        self._scanned = 0
        self._warned = False

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

        Returns
        -------
        SearchResult

        Raises
        ------
        QueryError
            If the condition, k or the queries' length is wrong.
        BadVectorError
            If a query holds NaN or infinity.
        IndexBackendError
            If the column does not fit on the device.
        """
        metric = Metric.parse(metric)
        check_threads()
        with self._lock:
            visible = self._follow(dataset, metric)
            index = self._indexes[metric]
            allowed = None
            if where is not None:
                allowed = self._allowed(dataset, index, where)
            elif visible is not None:
                torch = require("torch", extra="cpu|cuda13|cuda12")
                allowed = torch.arange(index.num_slots, device=self.device) < visible
            self._scanned = len(index) if allowed is None else int(allowed.sum())
            return index.search(queries, k, allowed=allowed, lower=lower, upper=upper)

    def _allowed(self, dataset: lance.LanceDataset, index: FlatIndex, where: str) -> torch.Tensor:
        if _VOLATILE.search(where):
            return index.mask(matching_row_ids(dataset, where))
        key = (Mark.of(dataset, self.column), index.metric, where)
        cached = self._filters.get(key)
        if cached is None or len(cached) != index.num_slots:
            cached = index.mask(matching_row_ids(dataset, where))
            self._filters[key] = cached
            if len(self._filters) > CACHED_FILTERS:
                self._filters.popitem(last=False)
        self._filters.move_to_end(key)
        return cached

    # ---------------------------------------------------------------- following

    def _follow(self, dataset: lance.LanceDataset, metric: Metric) -> int | None:
        """Hold `metric` at the dataset's version.

        Returns the number of leading slots that this version has, or None for all.
        """
        wanted = Mark.of(dataset, self.column)
        if wanted in self._earlier and metric in self._earlier[wanted]:
            return self._earlier[wanted][metric]
        start = time.perf_counter()
        kind, reason = "none", None
        try:
            if self._held is not None and wanted != self._held:
                found = changes(dataset, self._held, self.column)
                if isinstance(found, Changes):
                    self._apply(dataset, found)
                    kind = "delta" if found.since is not None else "unchanged"
                    self._move_to(wanted)
                else:
                    reason = found
                    self._drop()
                    if not dataset.has_stable_row_ids and not self._warned:
                        self._warned = True
                        logger.warning(
                            "The table of column %r has no stable row ids, so its index is "
                            "rebuilt after every change. Tables created by gpu_lance have them; "
                            "to get them, copy this one into a new table.",
                            self.column,
                        )
            if metric not in self._indexes:
                kind = self._load(dataset, metric)
                self._held = wanted
        except BaseException as error:
            self._drop()  # half a change is never searched
            if is_out_of_memory(error) and not isinstance(error, IndexBackendError):
                raise IndexBackendError(
                    f"Column {self.column!r} does not fit on {self.device}: {error}. Free memory "
                    "there, or open the table with device='cpu'."
                ) from error
            raise
        if kind != "none":
            seconds = time.perf_counter() - start
            self._refresh = {"kind": kind, "reason": reason, "seconds": seconds}
            logger.debug("index of %r: %s (%s) in %.3f s", self.column, kind, reason, seconds)
        return None

    def _apply(self, dataset: lance.LanceDataset, found: Changes) -> None:
        self._remember()
        torch = require("torch", extra="cpu|cuda13|cuda12")
        removed = sum(index.remove(found.deleted) for index in self._indexes.values())
        if found.since is not None:
            for vectors, row_ids, valid in read_vectors(
                dataset, self.column, self.ndims, found.since
            ):
                removed += sum(index.remove(row_ids) for index in self._indexes.values())
                tensor = torch.from_numpy(vectors).to(self.device)
                for index in self._indexes.values():
                    index.add(tensor, row_ids, valid)
        if removed:
            self._earlier.clear()

    def _remember(self) -> None:
        """Note how many slots the held version has, before more are added."""
        if self._held is not None:
            self._earlier[self._held] = {m: i.num_slots for m, i in self._indexes.items()}
            while len(self._earlier) > KEPT_VERSIONS:
                self._earlier.popitem(last=False)

    def _move_to(self, wanted: Mark) -> None:
        self._held = wanted
        self._filters.clear()

    def _load(self, dataset: lance.LanceDataset, metric: Metric) -> str:
        """Make the index of a metric, at the version that is held or is the dataset's."""
        torch = require("torch", extra="cpu|cuda13|cuda12")
        rows = dataset.count_rows()
        self._check_memory(rows)
        index = FlatIndex(self.ndims, metric, self.device)
        index.reserve(rows)
        # cosine holds unit vectors, from which the stored ones cannot be had back
        raw = next((self._indexes[m] for m in (Metric.L2, Metric.DOT) if m in self._indexes), None)
        try:
            if raw is not None:
                for row_ids, tensor in raw.tiles():
                    index.add(tensor, row_ids)
            else:
                block = block_bytes(self.device)
                for vectors, row_ids, valid in read_vectors(
                    dataset, self.column, self.ndims, block_bytes=block
                ):
                    index.add(torch.from_numpy(vectors).to(self.device), row_ids, valid)
        except BaseException:
            index.close()
            raise
        self._indexes[metric] = index
        return "rebuild" if raw is None else "copy"

    def _check_memory(self, rows: int) -> None:
        needed = int(HEADROOM * FlatIndex.bytes_needed(rows, self.ndims, self.device))
        free = free_memory(self.device)
        if needed > free:
            remedy = (
                "Use a machine with more memory, or a shorter vector"
                if self.device.type == "cpu"
                else "Free memory there, or open the table with device='cpu'"
            )
            raise IndexBackendError(
                f"The index of column {self.column!r} ({rows} rows of {self.ndims} values) needs "
                f"{needed / 2**30:.2f} GiB on {self.device}, and {free / 2**30:.2f} GiB are free. "
                f"{remedy}."
            )

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
        added. If it holds nothing and they are all that the dataset has, an index by l2 is made.
        Otherwise nothing happens, and the next search reads what it needs. It never fails for
        want of memory: the rows are stored already, and the next search says what is missing.

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
        with self._lock:
            start = time.perf_counter()
            wanted = Mark.of(dataset, self.column)
            operation = operation_of(dataset)
            if wanted.version != before + 1 or operation not in ("Append", "Overwrite"):
                return
            try:
                if self._held is None or operation == "Overwrite":
                    if dataset.count_rows() != len(row_ids):
                        return
                    self._drop()
                    self._check_memory(len(row_ids))
                    self._indexes[Metric.L2] = FlatIndex(self.ndims, Metric.L2, self.device)
                elif self._is_next(dataset, wanted):
                    self._remember()
                else:
                    return
                for index in self._indexes.values():
                    index.add(vectors, row_ids, valid)
            except BaseException as error:
                self._drop()
                if isinstance(error, IndexBackendError) or is_out_of_memory(error):
                    logger.warning("index of %r: dropped after an add: %s", self.column, error)
                    return
                raise
            self._move_to(wanted)
            seconds = time.perf_counter() - start
            self._refresh = {"kind": "append", "reason": None, "seconds": seconds}

    def _is_next(self, dataset: lance.LanceDataset, wanted: Mark) -> bool:
        """Whether the version before the dataset's is the very one that is held."""
        held = self._held
        if held is None or held.version != wanted.version - 1 or held.field_id != wanted.field_id:
            return False
        try:
            return Mark.of(dataset.checkout_version(held.version), self.column) == held
        except (OSError, RuntimeError, ValueError):
            return False

    # -------------------------------------------------------------- the contents

    def index(self, metric: Metric) -> VectorIndex | None:
        """The index by that metric, if one is held."""
        return self._indexes.get(metric)

    def info(self) -> dict[str, Any]:
        """What is held where.

        Returns
        -------
        dict
            ``column``, ``device``, ``engine`` and ``reason`` (why this engine), ``metrics``,
            ``rows`` (that can be found), ``bytes``, ``version`` (None before the first search),
            ``refresh`` (``kind``, ``reason``, ``seconds`` of the last one) and ``scanned`` (rows
            that qualified in the last search).
        """
        with self._lock:
            parts = [index.info() for index in self._indexes.values()]
            return {
                "column": self.column,
                "device": str(self.device),
                "engine": parts[0]["engine"] if parts else None,
                "reason": parts[0]["reason"] if parts else None,
                "metrics": [part["metric"] for part in parts],
                "rows": max((part["rows"] for part in parts), default=0),
                "bytes": sum(part["bytes"] for part in parts),
                "version": None if self._held is None else self._held.version,
                "refresh": dict(self._refresh),
                "scanned": self._scanned,
            }

    def _drop(self) -> None:
        for index in self._indexes.values():
            index.close()
        self._indexes.clear()
        self._earlier.clear()
        self._filters.clear()
        self._held = None

    def close(self) -> None:
        """Free the device memory. A later search loads the column again."""
        with self._lock:
            self._drop()

    def __enter__(self) -> ColumnIndex:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
