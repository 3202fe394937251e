"""The indexes of one table's vector columns on one device."""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, TypeVar

from gpu_lance.device import resolve_device
from gpu_lance.index.budget import Budget
from gpu_lance.index.column import ColumnIndex
from gpu_lance.index.multi_column import MultiColumnIndex

if TYPE_CHECKING:
    import torch

Index = TypeVar("Index", ColumnIndex, MultiColumnIndex)


class ResidentIndexes:
    """One index a vector column, made when it is first asked for.

    All handles of a table in one connection share it, so that a column is on the device once.

    Parameters
    ----------
    device : str or torch.device
        Resolved when it is first needed, so that opening a table does not wait for torch.
    budget : Budget, optional
        Of the memory that the columns take; None for the one that everything on the device shares.

    Examples
    --------
    >>> indexes = ResidentIndexes("cpu")
    >>> indexes.of("vector", 8) is indexes.of("vector", 8)
    True
    """

    def __init__(self, device: str | torch.device = "auto", budget: Budget | None = None) -> None:
        self._wanted = device
        self._budget = budget
        self._lock = threading.Lock()
        self._indexes: dict[str, ColumnIndex | MultiColumnIndex] = {}

    @functools.cached_property
    def device(self) -> torch.device:
        """Where the columns are held; DeviceError if it is not there."""
        return resolve_device(self._wanted)

    @functools.cached_property
    def budget(self) -> Budget:
        """What the columns reserve their memory in."""
        return Budget.of(self.device) if self._budget is None else self._budget

    def room(self) -> int:
        """Bytes of new vectors that may wait on the device for their commit."""
        known = self.budget.info()
        limit = known["free"] if known["limit"] is None else known["limit"]
        return int(min(known["free"], limit) // 4)

    def of(self, column: str, ndims: int) -> ColumnIndex:
        """The index of a column with one vector a row.

        A column whose vectors changed length gets a new one.
        """
        return self._of(ColumnIndex, column, ndims)

    def of_multi(self, column: str, ndims: int) -> MultiColumnIndex:
        """The index of a multivector column."""
        return self._of(MultiColumnIndex, column, ndims)

    def _of(self, kind: type[Index], column: str, ndims: int) -> Index:
        with self._lock:
            index = self._indexes.get(column)
            if not isinstance(index, kind) or index.ndims != ndims:
                if index is not None:
                    index.close()
                index = self._indexes[column] = kind(column, ndims, self.device, self.budget)
            return index

    def held(self) -> dict[str, ColumnIndex | MultiColumnIndex]:
        """Those that were asked for, by column."""
        with self._lock:
            return dict(self._indexes)

    def close(self) -> None:
        """Free their device memory; a later search loads its column again."""
        for index in self.held().values():
            index.close()
