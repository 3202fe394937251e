"""What a query may be, told apart once: vectors, or items to embed."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from gpu_lance.device import as_tensor
from gpu_lance.errors import BadInputError, QueryError, QueryTypeError
from gpu_lance.optional import require
from gpu_lance.types import lone_surrogate, type_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Queries:
    """One query or several, vectors or items.

    Parameters
    ----------
    vectors : numpy.ndarray or device array or None
        (m, d) numbers, where they were given as vectors.
    items : list or None
        m texts, images or other things to embed.
    batch : bool
        Whether results name the query that they answer: for a list of items, and for two or more
        vectors, as LanceDB does.
    offsets : numpy.ndarray, optional
        (m + 1,) int64, for a multivector column: query i has the vectors, of (t, d), from
        ``offsets[i]`` to ``offsets[i + 1]``.
    """

    vectors: Any = None
    items: list[Any] | None = None
    batch: bool = False
    offsets: np.ndarray | None = None

    def __len__(self) -> int:
        if self.items is not None:
            return len(self.items)
        return int(self.vectors.shape[0]) if self.offsets is None else len(self.offsets) - 1

    @property
    def ndims(self) -> int | None:
        """The length of the vectors; None for items."""
        return None if self.vectors is None else int(self.vectors.shape[1])

    def kind(self) -> str:
        """In words what the queries are, e.g. ``"2 vectors"``."""
        if self.offsets is not None:
            word = "multivector"
        elif self.items is None:
            word = "vector"
        elif all(isinstance(item, str) for item in self.items):
            word = "text"
        else:
            word = "item"
        return f"{len(self)} {word}{'s' if len(self) != 1 else ''}"

    def tensor(self, device: torch.device) -> torch.Tensor:
        """The vectors as float32 (m, d) on `device`.

        Raises
        ------
        QueryError
            If a value is NaN or infinite, also if only in float32.
        """
        torch = require("torch", extra="cpu|cuda13|cuda12")
        tensor = as_tensor(self.vectors).to(torch.float32)
        check_finite(tensor)
        return as_tensor(tensor, device)  # which waits for a copy to the host


@dataclass(frozen=True)
class QueryVectors:
    """The vectors of queries, on the device.

    Parameters
    ----------
    vectors : torch.Tensor
        (m, d), one a query, or (t, d) with offsets.
    offsets : numpy.ndarray, optional
        (m + 1,) int64, as of :class:`Queries`.
    """

    vectors: torch.Tensor
    offsets: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.vectors) if self.offsets is None else len(self.offsets) - 1


def check_finite(vectors: torch.Tensor) -> None:
    """Raise if a value of the query vectors (m, d) is not finite, naming the first.

    Raises
    ------
    QueryError
    """
    bad = ~vectors.isfinite()
    if bool(bad.any()):
        query, position = (int(i) for i in bad.nonzero()[0])
        value = float(vectors[query, position])
        raise QueryError(
            f"Query {query} holds {value} at position {position}; no distance to it is a number."
        )


def parse_queries(query: Any) -> Queries:
    """Tell what a query is.

    Parameters
    ----------
    query : object
        A str, bytes, image or other item; a vector as a list, tuple, numpy, torch, cupy, DLPack
        or Arrow array; several vectors as a list of those or a 2-d array; a list of items.

    Returns
    -------
    Queries

    Raises
    ------
    QueryError
        If it is empty, if the vectors differ in length, or if their values are no numbers.
    BadInputError
        If a text holds a lone surrogate.

    Examples
    --------
    >>> parse_queries([1, 2, 3]).vectors.shape, parse_queries(["a", "b"]).items
    ((1, 3), ['a', 'b'])
    """
    if isinstance(query, (str, bytes)):
        return _items([query], batch=False)
    if isinstance(query, pa.Scalar):
        return parse_queries(getattr(query, "values", None) or query.as_py())
    if isinstance(query, (pa.Array, pa.ChunkedArray)):
        query = query.to_pylist() if _nested(query) else query.to_numpy(zero_copy_only=False)
    elif _is_series(query):
        query = query.to_numpy()
    if isinstance(query, np.ndarray) and query.dtype.kind in "OUS":
        query = query.tolist()
    if isinstance(query, (list, tuple)):
        return _from_list(list(query))
    if isinstance(query, np.ndarray) or hasattr(query, "__dlpack__"):
        layout = str(getattr(query, "layout", "torch.strided"))
        if layout.startswith("torch.") and layout != "torch.strided":
            raise QueryError(f"A query is a dense tensor, got one of layout {layout}.")
        return _from_array(query)
    if isinstance(query, (numbers.Number, dict, set)):
        raise QueryTypeError(
            f"The query is {type_of(query)}; pass a vector, a text, or a list of either."
        )
    return _items([query], batch=False)


def parse_multi_queries(query: Any) -> Queries:
    """Tell what a query of a multivector column is.

    Parameters
    ----------
    query : object
        As of :func:`parse_queries`, but that several vectors, as a 2-d array or a list, are one
        query; several queries are a 3-d array or a list of 2-d ones, which may differ in length.

    Returns
    -------
    Queries
        With offsets, unless it holds items.

    Raises
    ------
    QueryError
        As :func:`parse_queries`, and if a query is empty.

    Examples
    --------
    >>> parse_multi_queries([[1, 2], [3, 4]]).offsets.tolist()
    [0, 2]
    >>> parse_multi_queries([[[1, 2], [3, 4]], [[5, 6]]]).offsets.tolist()
    [0, 2, 3]
    """
    if isinstance(query, pa.Array | pa.ChunkedArray) and _nested(query):
        query = query.to_pylist()
    if not _is_batch(query):
        one = parse_queries(query)
        if one.items is not None:
            return one
        return replace(one, batch=False, offsets=np.array([0, one.vectors.shape[0]]))
    parts = [parse_queries(part) for part in query]
    for position, part in enumerate(parts):
        if part.items is not None or part.ndims != parts[0].ndims:
            got = f"has {part.ndims} values a vector" if part.items is None else "is no vector"
            raise QueryError(
                f"Query {position} {got}, and query 0 has {parts[0].ndims}; all queries of a batch "
                "must be lists of vectors of one length."
            )
    lengths = [part.vectors.shape[0] for part in parts]
    if all(isinstance(part.vectors, np.ndarray) for part in parts):
        vectors: Any = np.concatenate([part.vectors for part in parts])
    else:
        torch = require("torch", extra="cpu|cuda13|cuda12")
        tensors = [as_tensor(part.vectors) for part in parts]
        vectors = torch.cat([tensor.to(tensors[0].device) for tensor in tensors])
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    return Queries(vectors=vectors, batch=True, offsets=offsets)


def _is_batch(query: Any) -> bool:
    """Whether it is several lists of vectors."""
    if getattr(query, "ndim", 0) == 3:
        return True
    if not isinstance(query, list | tuple) or not len(query):
        return False
    first = query[0]
    if isinstance(first, list | tuple):
        return bool(first) and (isinstance(first[0], list | tuple) or _is_vector(first[0]))
    return getattr(first, "ndim", 0) == 2 and (
        isinstance(first, np.ndarray) or hasattr(first, "__dlpack__")
    )


def _from_array(array: Any) -> Queries:
    if array.ndim == 1:
        return _vectors(array.reshape(1, -1))
    if array.ndim == 2:
        return _vectors(array)
    if array.ndim == 0:
        raise QueryTypeError("A single number is no query; pass a vector or a text.")
    return _items([array], batch=False)  # decoded media


def _from_list(values: list[Any]) -> Queries:
    if not values:
        raise QueryError("The query is empty; pass at least one vector or text.")
    first = values[0]
    if isinstance(first, numbers.Number):
        return _vectors(_numbers(values)[None, :])
    if isinstance(first, (list, tuple, pa.Array)) or _is_vector(first):
        rows = [_row(value, position) for position, value in enumerate(values)]
        for position, row in enumerate(rows):
            if row.shape != rows[0].shape:
                raise QueryError(
                    f"Query {position} has {len(row)} values and query 0 has {len(rows[0])}; all "
                    "queries of a batch must have the same length."
                )
        if isinstance(rows[0], np.ndarray):
            return _vectors(np.stack(rows))
        torch = require("torch", extra="cpu|cuda13|cuda12")
        return _vectors(torch.stack([as_tensor(row) for row in rows]))
    return _items(values, batch=True)


def _row(value: Any, position: int) -> Any:
    if isinstance(value, (list, tuple)):
        value = _numbers(list(value))
    elif isinstance(value, pa.Array):
        value = value.to_numpy(zero_copy_only=False)
    if not _is_vector(value):
        raise QueryError(
            f"Query {position} is {type_of(value)}, and query 0 is a vector; a batch holds one "
            "kind."
        )
    return value


def _numbers(values: list[Any]) -> np.ndarray:
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "fiu":
            array = _reals(values)
    except (TypeError, ValueError, OverflowError) as error:
        raise QueryError(f"A query vector holds something that is no number: {error}.") from error
    if array.ndim != 1:
        raise QueryError(
            f"A query has {array.ndim} axes more than a vector: a list of lists is a batch, and "
            "nothing is nested deeper."
        )
    with np.errstate(over="ignore"):  # beyond float32 is infinite, which is refused later
        return array.astype(np.float32)


def _reals(values: list[Any]) -> np.ndarray:
    """Numbers of Python's own kinds; asked for float64 at once, numpy would read "2" and None."""
    kinds = {type(value) for value in values}
    real = {kind for kind in kinds if issubclass(kind, numbers.Real | Decimal)} - {bool}
    if wrong := kinds - real:
        raise TypeError(", ".join(sorted(kind.__name__ for kind in wrong)))
    return np.asarray(values, dtype=np.float64)


def _vectors(array: Any) -> Queries:
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "fiu":
            raise QueryError(f"A query vector must hold real numbers, got {array.dtype}.")
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)  # a copy: the caller may go on to change theirs
    elif "complex" in str(array.dtype) or "bool" in str(array.dtype):
        raise QueryError(f"A query vector must hold real numbers, got {array.dtype}.")
    elif getattr(array, "is_meta", False) or getattr(array, "is_quantized", False):
        raise QueryError("A query must hold plain numbers, got a meta or quantized tensor.")
    rows, ndims = (int(n) for n in array.shape)
    if not rows or not ndims:
        raise QueryError(f"The query is empty: its shape is ({rows}, {ndims}).")
    return Queries(vectors=array, batch=rows > 1)


def _items(items: Sequence[Any], batch: bool) -> Queries:
    for position, item in enumerate(items):
        if item is None:
            raise QueryError(f"Query {position} is None, which is no query; leave it out.")
        if isinstance(item, (numbers.Number, list, tuple, dict, set)) or _is_vector(item):
            raise QueryError(
                f"Query {position} is {type_of(item)}, and query 0 is {type_of(items[0])}; a batch "
                "holds one kind."
            )
        place = lone_surrogate(item) if isinstance(item, str) else None
        if place is not None:
            raise BadInputError(
                f"Query {position} has a lone surrogate at character {place}, which is no text."
            )
    return Queries(items=list(items), batch=batch)


def _is_vector(value: Any) -> bool:
    array = isinstance(value, np.ndarray) or hasattr(value, "__dlpack__")
    return array and getattr(value, "ndim", 0) == 1


def _nested(array: pa.Array | pa.ChunkedArray) -> bool:
    kind = array.type
    return not (pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _is_series(value: Any) -> bool:
    module = type(value).__module__.partition(".")[0]
    return module in ("pandas", "polars") and type(value).__name__ == "Series"
