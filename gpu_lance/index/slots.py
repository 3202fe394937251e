"""Which row lives in which slot of an engine, and which slots are dead."""

from __future__ import annotations

import numpy as np


class SlotMap:
    """Row ids by dense slot, with a live bit each; all of it on the host.

    Slots are given out in order and never reused before :meth:`compact`. A row id may stand in
    several slots, of which only the newest may be live: this is how an update looks.

    Examples
    --------
    >>> slots = SlotMap()
    >>> slots.add(np.array([7, 3]))
    >>> slots.remove(np.array([7, 99]))
    1
    >>> slots.find(np.array([3, 7])).tolist()
    [1, -1]
    """

    def __init__(self) -> None:
        self._row_ids = np.empty(0, np.int64)
        self._live = np.empty(0, bool)
        self._size = 0
        self.num_live = 0
        self._order: np.ndarray | None = None

    def __len__(self) -> int:
        return self._size

    @property
    def row_ids(self) -> np.ndarray:
        """(n,) int64, by slot, dead ones included."""
        return self._row_ids[: self._size]

    @property
    def live(self) -> np.ndarray:
        """(n,) bool, by slot."""
        return self._live[: self._size]

    @property
    def nbytes(self) -> int:
        order = 0 if self._order is None else self._order.nbytes
        return self._row_ids.nbytes + self._live.nbytes + order

    def add(self, row_ids: np.ndarray) -> None:
        """Give the next slots to those ids. An id that is live already must be removed first."""
        needed = self._size + len(row_ids)
        if needed > len(self._row_ids):
            room = max(needed, 2 * self._size)
            self._row_ids = np.concatenate(
                [self.row_ids, np.empty(room - self._size, np.int64)], dtype=np.int64
            )
            self._live = np.concatenate([self.live, np.zeros(room - self._size, bool)])
        self._row_ids[self._size : needed] = row_ids
        self._live[self._size : needed] = True
        self._size = needed
        self.num_live += len(row_ids)
        self._order = None

    def find(self, row_ids: np.ndarray) -> np.ndarray:
        """The live slot of each id, int64, -1 where there is none."""
        wanted = np.asarray(row_ids, np.int64)
        if self._size == 0 or len(wanted) == 0:
            return np.full(len(wanted), -1, np.int64)
        if self._order is None:  # stable: of equal ids the newest slot comes last
            self._order = np.argsort(self.row_ids, kind="stable")
        # the last of the equal ids, or one that is smaller than all
        at = np.searchsorted(self.row_ids, wanted, side="right", sorter=self._order) - 1
        slots: np.ndarray = self._order[np.maximum(at, 0)]
        found = (at >= 0) & (self.row_ids[slots] == wanted) & self.live[slots]
        return np.where(found, slots, -1)

    def remove(self, row_ids: np.ndarray) -> int:
        """Mark the slots of those ids dead; returns how many were live."""
        slots = np.unique(self.find(row_ids))
        slots = slots[slots >= 0]
        self._live[slots] = False
        self.num_live -= len(slots)
        return len(slots)

    def compact(self) -> np.ndarray:
        """Forget the dead slots. Returns the old slots that were kept, in their new order."""
        kept = np.flatnonzero(self.live)
        self._row_ids = self.row_ids[kept]
        self._live = np.ones(len(kept), bool)
        self._size = self.num_live = len(kept)
        self._order = None
        return kept
