"""What a user writes to say which index a column gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gpu_lance.types import Metric


@dataclass
class BTree:
    """A scalar index for filters on a column of many different values."""


@dataclass
class Bitmap:
    """A scalar index for filters on a column of few different values."""


@dataclass
class LabelList:
    """A scalar index for filters on a column of lists, by their members."""


@dataclass
class Flat:
    """The exact index: every row is compared with the query, on the device.

    Parameters
    ----------
    distance_type : {"l2", "cosine", "dot"}, default "l2"
        The metric that the index is made for first; searches by another one make their own.

    Raises
    ------
    QueryError
        For another distance type.

    Examples
    --------
    >>> Flat(distance_type="cosine").metric.value
    'cosine'
    """

    distance_type: Literal["l2", "cosine", "dot"] = "l2"

    def __post_init__(self) -> None:
        Metric.parse(self.distance_type)

    @property
    def metric(self) -> Metric:
        """The distance type as a :class:`~gpu_lance.types.Metric`."""
        return Metric.parse(self.distance_type)
