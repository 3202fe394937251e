"""A column's rows on the device, brought to the version of the table that a search asks for."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from gpu_lance.device import is_out_of_memory, release_cache
from gpu_lance.errors import IndexBackendError
from gpu_lance.index.chunks import ChunkStore, DoesNotNarrowError, NoRoomError
from gpu_lance.index.plan import Home, Plan, Step, plan
from gpu_lance.index.read import Block, check_column, read_blocks
from gpu_lance.index.snapshot import Snapshot
from gpu_lance.index.store import ResidentStore
from gpu_lance.index.sync import Changes, Difference, Held, Mark, changes, difference
from gpu_lance.optional import require
from gpu_lance.storage import operation_of

if TYPE_CHECKING:
    import lance
    import torch

    from gpu_lance.index.budget import Budget

logger = logging.getLogger(__name__)

EXTRAS = "cpu|cuda13|cuda12"
Sn = TypeVar("Sn", bound=Snapshot)
KEPT_VERSIONS = 64
KEPT_BYTES = 64 << 20  # of what versions have of their own, beside the rows


@dataclass(frozen=True)
class Refresh:
    """What bringing the rows to a version took.

    Parameters
    ----------
    kind : str
        ``none``, ``unchanged``, ``append``, ``delta``, ``difference``, ``rebuild`` or ``streamed``.
    reason : str or None
        Why not by the delta.
    seconds : float
    """

    kind: str = "none"
    reason: str | None = None
    seconds: float = 0.0


class Following(ABC, Generic[Sn]):
    """Holds the rows of one column at the versions that were asked for last.

    One store serves all versions that it can tell apart by live bits: rows that a version adds go
    to fresh slots, and snapshots of earlier versions stay as they are. It goes from one version to
    another by Lance's delta where that is known to be complete, by comparing row ids and the
    versions of their last change where it is not, and by reading the column anew where neither
    can be trusted. What does not fit the memory budget is not held at all.

    Any number of threads may use it: asking for a version that is held waits for nobody.

    Parameters
    ----------
    column : str
        Name of the vector column.
    ndims : int
        Length of its vectors.
    device : torch.device
        Where they are searched.
    budget : Budget
        What the memory is counted by.
    """

    def __init__(self, column: str, ndims: int, device: torch.device, budget: Budget) -> None:
        self.column = column
        self.ndims = ndims
        self.device = device
        self.budget = budget
        self.plan: Plan | None = None
        self.refresh = Refresh()
        self._lock = threading.RLock()
        self._store: ChunkStore[Sn] | None = None
        self._held: Held | None = None
        self._kept: OrderedDict[Mark, Sn] = OrderedDict()
        self._allowance = 0  # bytes of the plan that no chunk has taken yet
        self._narrows = True
        self._warned = False

    @property
    def version(self) -> int | None:
        """The version that the rows were brought to last; None if nothing is held."""
        held = self._held
        return None if held is None else held.mark.version

    @property
    def store(self) -> ChunkStore[Sn] | None:
        """The rows of that version, if they are held."""
        return self._store

    @property
    def snapshot(self) -> Sn | None:
        """The same as a search sees them, which no other thread changes."""
        held = self._held
        return None if held is None else self._kept.get(held.mark)

    # ------------------------------------------------------- what columns differ in

    @abstractmethod
    def dtype(self, dataset: lance.LanceDataset) -> np.dtype:
        """Of the column's values as stored; SchemaError if it is no such column."""

    @abstractmethod
    def _expected(self, dataset: lance.LanceDataset, exactly: bool) -> int:
        """How many rows of the matrix the column takes; unless `exactly`, it may be a guess."""

    @abstractmethod
    def _make(self, dtype: torch.dtype, **how: Any) -> ChunkStore[Sn]:
        """An empty store."""

    @abstractmethod
    def _blocks(self, dataset: lance.LanceDataset, **which: Any) -> Iterator[Block]:
        """The column's rows, or some of them."""

    # ------------------------------------------------------------------ searching

    def at(self, dataset: lance.LanceDataset, mark: Mark) -> Sn | None:
        """The rows of the dataset's version; None if the column is not held.

        Parameters
        ----------
        dataset : lance.LanceDataset
        mark : Mark
            Of the dataset.
        """
        self.budget.touch(self)
        snapshot = self._kept.get(mark)
        if snapshot is not None:
            if len(self._kept) > 1 and self._lock.acquire(blocking=False):
                try:
                    if mark in self._kept:
                        self._kept.move_to_end(mark)
                finally:
                    self._lock.release()
            return snapshot
        with self._lock:
            if mark in self._kept:
                return self._kept[mark]
            start = time.perf_counter()
            kind, reason = "none", None
            try:
                if self._held is not None:
                    kind, reason = self._move(dataset, mark)
                if self._store is None:
                    kind = self._load(dataset, mark)
            except BaseException as error:
                self.drop()  # half a change is never searched
                if is_out_of_memory(error) and not isinstance(error, IndexBackendError):
                    raise IndexBackendError(
                        f"Column {self.column!r} does not fit on {self.device}: {error}. Free "
                        "memory there, or give it a smaller memory_budget."
                    ) from error
                raise
            self.refresh = Refresh(kind, reason, time.perf_counter() - start)
            logger.debug("index of %r: %s", self.column, self.refresh)
            return self._kept.get(mark)

    # ------------------------------------------------------------------- moving

    def _move(self, dataset: lance.LanceDataset, mark: Mark) -> tuple[str, str | None]:
        """Bring what is held to another version; everything is dropped where that cannot be."""
        assert self._held is not None
        assert self._store is not None
        forward = mark.version > self._held.mark.version
        found: Changes | Difference | str = changes(dataset, self._held, self.column)
        reason = found if isinstance(found, str) else None
        if isinstance(found, str):
            slots = self._store.slots
            live = slots.live
            found = difference(
                dataset, self._held, self.column, slots.row_ids[live], slots.updated[live]
            )
        try:
            if isinstance(found, Changes):
                self._store.remove(found.deleted)
                if found.since is not None:
                    self._read(dataset, since=found.since, inserted_only=found.inserted_only)
                kind = "delta" if found.since is not None else "unchanged"
            elif isinstance(found, Difference):
                self._store.remove(found.gone)
                if len(found.read):
                    self._read(dataset, row_ids=found.read)
                kind = "difference"
        except (NoRoomError, DoesNotNarrowError, RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                release_cache(self.device)
            elif not isinstance(error, NoRoomError | DoesNotNarrowError):
                raise
            found = str(error)
        if isinstance(found, str):
            self.drop()
            if not dataset.has_stable_row_ids and not self._warned:
                self._warned = True
                logger.warning(
                    "The table of column %r has no stable row ids, so its index is rebuilt after "
                    "every change. Tables created by gpu_lance have them; to get them, copy this "
                    "one into a new table.",
                    self.column,
                )
            return "rebuild", found
        self._publish(Held.of(dataset, self.column), sweep=forward)
        return kind, reason

    def _read(self, dataset: lance.LanceDataset, **which: object) -> None:
        """Take in rows that are new, or newer than what is held of them."""
        assert self._store is not None
        before, seen = len(self._store.slots), []
        for block in self._blocks(dataset, **which):
            self._store.add_block(block)
            seen += [block.row_ids.copy()] if before else []
        if seen:  # a vector that became null leaves its row too
            self._store.remove(np.concatenate(seen), before)

    def _publish(self, held: Held, *, sweep: bool = False) -> None:
        assert self._store is not None
        self._keep(held.mark, self._store.publish())
        self._held = held
        self.budget.settle(self)
        if sweep and self._store.wants_sweep:
            self._kept = OrderedDict({held.mark: self._store.publish()})
            for snapshot in self._store.sweep():
                self._kept = OrderedDict({held.mark: snapshot})
            self.budget.settle(self)

    def _keep(self, mark: Mark, snapshot: Sn) -> None:
        kept = OrderedDict(self._kept)  # readers look into the old one
        kept[mark] = snapshot
        kept.move_to_end(mark)
        size = sum(each.own_nbytes for each in kept.values())
        while len(kept) > 1 and (len(kept) > KEPT_VERSIONS or size > KEPT_BYTES):
            size -= kept.popitem(last=False)[1].own_nbytes
        self._kept = kept

    # ------------------------------------------------------------------ loading

    def _new_store(self, rows: int, dtype: np.dtype) -> ChunkStore[Sn] | None:
        """A store for so many rows, with its memory reserved; None if they are not to be held."""
        torch = require("torch", extra=EXTRAS)
        chosen = self.plan = plan(
            rows, self.ndims, dtype, self.device, self.budget, self, narrow=self._narrows
        )
        if chosen.step is Step.LANCE:
            return None
        if chosen.step is not Step(chosen.dtype.name) or chosen.dtype.itemsize < dtype.itemsize:
            logger.info("index of %r: %s", self.column, chosen.reason)
        self._allowance = chosen.nbytes
        host = chosen.home is Home.HOST
        store = self._make(
            getattr(torch, chosen.dtype.name),
            home=torch.device("cpu") if host else None,
            reserve=self._reserve,
            release=self._release,
        )
        store.expect(rows)
        return store

    def _reserve(self, size: int, needed: bool) -> bool:
        if size <= self._allowance:
            self._allowance -= size
            return True
        assert self.plan is not None
        return self.plan.place(self.budget).reserve(self, size, evict=needed)

    def _release(self, size: int) -> None:
        assert self.plan is not None
        self.plan.place(self.budget).release(self, size)

    def _load(self, dataset: lance.LanceDataset, mark: Mark) -> str:
        """Hold the dataset's version, in the form for which there is memory."""
        dtype = self.dtype(dataset)
        ran_out = exactly = False
        while True:
            try:
                self._store = self._new_store(self._expected(dataset, exactly), dtype)
                if self._store is None:
                    self._held = None
                    return "streamed"
                self._read(dataset)
                self._publish(Held.of(dataset, self.column))
                return "rebuild"
            except DoesNotNarrowError as error:
                logger.warning("index of %r: %s", self.column, error)
                self._narrows = False
            except NoRoomError as error:
                if exactly:
                    raise IndexBackendError(f"Column {self.column!r} grew: {error}") from error
                exactly = True  # there is more than was guessed
                logger.info("index of %r: %s Counting its rows", self.column, error)
            except (RuntimeError, MemoryError) as error:
                if ran_out or not is_out_of_memory(error):
                    raise
                ran_out = True
                logger.warning("index of %r: %s; planning again", self.column, error)
            self.drop()
            release_cache(self.device)

    # --------------------------------------------------------------- own commits

    def _append(
        self,
        before: int,
        dataset: lance.LanceDataset,
        count: int,
        rows: int,
        add: Callable[[ChunkStore[Sn], int], None],
    ) -> None:
        """See :meth:`gpu_lance.index.column.ColumnIndex.append`.

        `add` adds the `count` rows to a store, as last changed by a version; they take `rows` rows
        of the matrix.
        """
        with self._lock:
            start = time.perf_counter()
            mark = Mark.of(dataset, self.column)
            operation = operation_of(dataset)
            if mark.version != before + 1 or operation not in ("Append", "Overwrite"):
                return
            try:
                if self._held is None or operation == "Overwrite":
                    if dataset.count_rows() != count:
                        return
                    self.drop()
                    self._store = self._new_store(rows, self.dtype(dataset))
                elif not self._is_next(dataset, mark):
                    return
                if self._store is None:
                    return
                add(self._store, mark.version)
                self._publish(Held.of(dataset, self.column))
            except BaseException as error:
                self.drop()
                left = (IndexBackendError, NoRoomError, DoesNotNarrowError)
                if isinstance(error, left) or is_out_of_memory(error):
                    logger.warning("index of %r: dropped after an add: %s", self.column, error)
                    return
                raise
            self.refresh = Refresh("append", None, time.perf_counter() - start)

    def _is_next(self, dataset: lance.LanceDataset, mark: Mark) -> bool:
        """Whether the version before the dataset's is the very one that is held."""
        assert self._held is not None
        held = self._held.mark
        if held.version != mark.version - 1 or held.field_id != mark.field_id:
            return False
        try:
            return Mark.of(dataset.checkout_version(held.version), self.column) == held
        except (OSError, RuntimeError, ValueError):
            return False

    # ----------------------------------------------------------------- letting go

    def drop(self) -> None:
        """Hold nothing. Searches that run keep their snapshots to their end."""
        with self._lock:
            self._store = None
            self._held = None
            self._kept = OrderedDict()
            self._allowance = 0
            self.budget.release(self)

    def evict(self) -> bool:
        """Drop everything and say True; False at once if somebody is changing it."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            if self._store is not None and self._held is None:
                return False  # it is being filled further up this thread's stack
            self.drop()
            logger.info("index of %r: dropped for another column's sake", self.column)
            return True
        finally:
            self._lock.release()


class Follower(Following[Snapshot]):
    """Holds the rows of a column with one vector a row; see :class:`Following`."""

    def dtype(self, dataset: lance.LanceDataset) -> np.dtype:
        """See :meth:`Following.dtype`."""
        return np.dtype(f"f{check_column(dataset, self.column, self.ndims)}")

    def _expected(self, dataset: lance.LanceDataset, exactly: bool) -> int:
        return dataset.count_rows()

    def _make(self, dtype: torch.dtype, **how: Any) -> ResidentStore:
        return ResidentStore(self.ndims, dtype, self.device, **how)

    def _blocks(self, dataset: lance.LanceDataset, **which: Any) -> Iterator[Block]:
        return read_blocks(dataset, self.column, self.ndims, **which)

    def append(
        self,
        before: int,
        dataset: lance.LanceDataset,
        vectors: torch.Tensor,
        row_ids: np.ndarray,
        valid: np.ndarray | None = None,
    ) -> None:
        """See :meth:`gpu_lance.index.column.ColumnIndex.append`."""

        def add(store: ChunkStore[Snapshot], version: int) -> None:
            assert isinstance(store, ResidentStore)
            store.add(vectors, row_ids, version, valid)

        self._append(before, dataset, len(row_ids), len(row_ids), add)
