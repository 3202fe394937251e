"""Small checked types that the layers share."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from gpu_lance.errors import BadInputError, QueryError

if TYPE_CHECKING:
    from collections.abc import Collection

    import torch


def type_of(value: object) -> str:
    """The name of a value's type, with its article.

    Examples
    --------
    >>> type_of(1), type_of("a")
    ('an int', 'a str')
    """
    name = type(value).__name__
    spoken = name == "ndarray" or name[:1].lower() in "aeiou"
    return f"{'an' if spoken else 'a'} {name}"


class Metric(StrEnum):
    """How the distance of two vectors is measured; a smaller distance is nearer.

    ``l2`` is the *squared* Euclidean distance, ``cosine`` is 1 - cos(a, b), ``dot`` is 1 - a·b.
    These are the values that LanceDB returns.
    """

    L2 = "l2"
    COSINE = "cosine"
    DOT = "dot"

    @classmethod
    def parse(cls, value: str | Metric) -> Metric:
        """Return the metric of that name, in any case; ``euclidean`` and ``ip`` are aliases.

        Raises
        ------
        QueryError
            For another name.

        Examples
        --------
        >>> Metric.parse("Cosine") is Metric.COSINE
        True
        """
        name = str(value).lower()
        name = {"euclidean": "l2", "ip": "dot", "inner_product": "dot"}.get(name, name)
        try:
            return cls(name)
        except ValueError:
            raise QueryError(
                f"Unknown distance type {value!r}; it is one of 'l2', 'cosine', 'dot'."
            ) from None


class Modality(StrEnum):
    """What kind of thing an item is."""

    TEXT = "text"
    IMAGE = "image"
    AUDIO = "audio"
    VIDEO = "video"


class Side(StrEnum):
    """Which side of the search an item is embedded for."""

    SOURCE = "source"
    QUERY = "query"


class OnBadVectors(StrEnum):
    """What happens to a row whose vector cannot be used."""

    ERROR = "error"
    DROP = "drop"
    FILL = "fill"
    NULL = "null"

    @classmethod
    def parse(cls, value: str | OnBadVectors) -> OnBadVectors:
        """Return the member of that name.

        Raises
        ------
        BadInputError
            For another name (a ValueError).

        Examples
        --------
        >>> OnBadVectors.parse("drop").value
        'drop'
        """
        try:
            return cls(str(value))
        except ValueError:
            names = ", ".join(repr(str(member)) for member in cls)
            raise BadInputError(
                f"on_bad_vectors is {value!r}; it must be one of {names}."
            ) from None


@dataclass(frozen=True)
class AddResult:
    """What :meth:`Table.add` did: the version that it made."""

    version: int


@dataclass(frozen=True)
class DeleteResult:
    """What :meth:`Table.delete` did: the version that it made, and how many rows it deleted."""

    version: int
    num_deleted_rows: int = 0


@dataclass(frozen=True)
class UpdateResult:
    """What :meth:`Table.update` did: how many rows changed, and the version that it made."""

    rows_updated: int
    version: int


@dataclass(frozen=True)
class ColumnsResult:
    """What adding, altering or dropping columns did: the version that it made."""

    version: int


@dataclass(frozen=True)
class ListTablesResponse:
    """A page of table names; `page_token` asks for the next one, None where there is none."""

    tables: list[str]
    page_token: str | None = None


@dataclass(frozen=True)
class Embeddings:
    """Vectors of a list of items, in the items' order, on the device that made them.

    Parameters
    ----------
    vectors : torch.Tensor
        (n, d), float32 or float16: one an item. A row whose item could not be embedded holds
        zeros. With `offsets` (t, d): any number an item.
    valid : numpy.ndarray
        (n,), bool, on the host: False where the item was null or bad.
    errors : dict of int to str
        The reason for each bad item, by its position. A null item is not an error.
    offsets : numpy.ndarray, optional
        (n + 1,), int64, on the host: item i has the vectors from ``offsets[i]`` to
        ``offsets[i + 1]``, none if it is not valid.

    Examples
    --------
    >>> import torch
    >>> offsets = np.array([0, 2, 2])
    >>> len(Embeddings(torch.zeros(2, 8), np.array([True, False]), offsets=offsets))
    2
    """

    vectors: torch.Tensor
    valid: np.ndarray
    errors: dict[int, str] = field(default_factory=dict)
    offsets: np.ndarray | None = None

    def __post_init__(self) -> None:
        count = self.vectors.shape[0]
        if self.offsets is not None and int(self.offsets[-1]) == count:
            count = len(self.offsets) - 1
        if self.vectors.ndim != 2 or self.valid.shape != (count,):
            offsets = "" if self.offsets is None else f", offsets {self.offsets.shape}"
            raise ValueError(
                f"Embeddings wants vectors (n, d) and valid (n,), or vectors (t, d) with offsets "
                f"(n + 1,) that end with t; got {tuple(self.vectors.shape)} and "
                f"{self.valid.shape}{offsets}."
            )

    def __len__(self) -> int:
        return len(self.valid)


def lone_surrogate(text: str) -> int | None:
    """Where the first character stands that UTF-8 cannot store; None if there is none.

    Examples
    --------
    >>> lone_surrogate("fine"), lone_surrogate("a" + chr(0xD800))
    (None, 1)
    """
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def free_name(name: str, taken: Collection[str]) -> str:
    """A name for a column of ours beside the caller's.

    Examples
    --------
    >>> free_name("__place", ["id", "__place"])
    '__place_'
    """
    while name in taken:
        name += "_"
    return name
