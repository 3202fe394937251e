"""Which row lives in which slot of a store, and which slots are dead."""

from __future__ import annotations

import numpy as np


def find(
    row_ids: np.ndarray, live: np.ndarray | None, wanted: np.ndarray, order: list[np.ndarray]
) -> np.ndarray:
    """The live slot of each wanted id, int64, -1 where there is none.

    Parameters
    ----------
    row_ids : numpy.ndarray
        (n,) int64, by slot. An id may stand in several slots, of which only the last may be live.
    live : numpy.ndarray or None
        (n,) bool; None if every slot is.
    wanted : numpy.ndarray
        (m,) integers.
    order : list of numpy.ndarray
        Empty, or the sorting order of `row_ids` that an earlier call left here.
    """
    wanted = np.asarray(wanted, np.int64)
    if len(row_ids) == 0 or len(wanted) == 0:
        return np.full(len(wanted), -1, np.int64)
    if not order:  # stable: of equal ids the newest slot comes last; nearly sorted ids are quick
        order.append(np.argsort(row_ids, kind="stable"))
    # the last of the equal ids, or one that is smaller than all
    at = np.searchsorted(row_ids, wanted, side="right", sorter=order[0]) - 1
    slots: np.ndarray = order[0][np.maximum(at, 0)]
    found = (at >= 0) & (row_ids[slots] == wanted)
    if live is not None:
        found &= live[slots]
    return np.where(found, slots, -1)


class SlotMap:
    """Row ids by dense slot, with the version of each row's last change and a live bit.

    All of it is on the host. Slots are given out in order and never reused before
    :meth:`compact`. A row id may stand in several slots, of which only the newest may be live:
    this is how an update looks. Arrays that were handed out keep their row ids, since only places
    behind them are written.

    Examples
    --------
    >>> slots = SlotMap()
    >>> slots.add(np.array([7, 3]), np.array([1, 1]))
    >>> slots.remove(np.array([7, 99]))
    1
    >>> slots.find(np.array([3, 7])).tolist()
    [1, -1]
    """

    def __init__(self) -> None:
        self._row_ids = np.empty(0, np.int64)
        self._updated = np.empty(0, np.int64)
        self._live = np.empty(0, bool)
        self._size = 0
        self.num_live = 0
        self._order: list[np.ndarray] = []

    def __len__(self) -> int:
        return self._size

    @property
    def row_ids(self) -> np.ndarray:
        """(n,) int64, by slot, dead ones included."""
        return self._row_ids[: self._size]

    @property
    def updated(self) -> np.ndarray:
        """(n,) int64, by slot: the version of the row's last change."""
        return self._updated[: self._size]

    @property
    def live(self) -> np.ndarray:
        """(n,) bool, by slot."""
        return self._live[: self._size]

    @property
    def nbytes(self) -> int:
        arrays = (self._row_ids, self._updated, self._live, *self._order)
        return sum(array.nbytes for array in arrays)

    def add(self, row_ids: np.ndarray, updated: np.ndarray) -> None:
        """Give the next slots to those ids. An id that is live already must be removed first."""
        needed = self._size + len(row_ids)
        if needed > len(self._row_ids):
            room = max(needed, self._size + self._size // 2)
            self._row_ids = _grown(self.row_ids, room)
            self._updated = _grown(self.updated, room)
            self._live = _grown(self.live, room)
        self._row_ids[self._size : needed] = row_ids
        self._updated[self._size : needed] = updated
        self._live[self._size : needed] = True
        self._size = needed
        self.num_live += len(row_ids)
        if len(row_ids):
            self._order = []

    def find(self, row_ids: np.ndarray) -> np.ndarray:
        """The live slot of each id, int64, -1 where there is none."""
        return find(self.row_ids, self.live, row_ids, self._order)

    def remove(self, row_ids: np.ndarray, before: int | None = None) -> int:
        """Mark the slots of those ids dead; returns how many were live.

        Only slots smaller than `before` count, if it is given.
        """
        if before is None or before == self._size:
            slots = self.find(row_ids)
        else:
            slots = find(self.row_ids[:before], self.live[:before], row_ids, [])
        slots = np.unique(slots)
        slots = slots[slots >= 0]
        self._live[slots] = False
        self.num_live -= len(slots)
        return len(slots)

    def compact(self, start: int, stop: int) -> None:
        """Forget the dead slots from `start` to `stop`; the others move up, in their order."""
        kept = np.ones(self._size, bool)
        kept[start:stop] = self.live[start:stop]
        self._row_ids, self._updated = self.row_ids[kept], self.updated[kept]
        self._live = self.live[kept]
        self._size = len(self._row_ids)
        self._order = []


def _grown(array: np.ndarray, room: int) -> np.ndarray:
    bigger = np.empty(room, array.dtype)
    bigger[: len(array)] = array
    return bigger
