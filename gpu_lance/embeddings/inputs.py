"""Bring whatever a caller embeds into one shape: a list of items."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from gpu_lance.types import lone_surrogate


def as_list(items: Any) -> list[Any]:
    """Return `items` as a list; one item by itself becomes a list of one.

    Parameters
    ----------
    items : str, bytes, list, tuple, pyarrow, numpy, pandas or polars column, or one item
        Text or anything else. A numpy array is taken by its first axis. Missing values become
        None.

    Examples
    --------
    >>> as_list("one"), as_list(("a", "b")), as_list(np.array(["x", "y"]))
    (['one'], ['a', 'b'], ['x', 'y'])
    """
    if isinstance(items, list):
        return items
    if items is None or isinstance(items, str | bytes | bytearray | memoryview | Mapping):
        return [items]
    if isinstance(items, pa.Scalar):
        return [items.as_py()]
    if isinstance(items, pa.Array | pa.ChunkedArray):
        return list(items.to_pylist())
    if isinstance(items, np.ndarray):
        if items.ndim == 0:
            return [items.item()]
        return items.tolist() if items.ndim == 1 else list(items)
    if hasattr(items, "isna") and hasattr(items, "tolist"):  # pandas: NaN is its null
        missing = items.isna().tolist()
        return [None if gone else item for item, gone in zip(items.tolist(), missing, strict=True)]
    if hasattr(items, "to_list"):  # polars
        return list(items.to_list())
    # a PIL image is no iterable, and a tensor by itself is one item
    if isinstance(items, Iterable) and not hasattr(items, "__array_interface__"):
        return list(items)
    return [items]


def usable(
    items: Sequence[Any], fault: Callable[[Any], str | None]
) -> tuple[list[Any], np.ndarray, dict[int, str]]:
    """Leave out null and bad items.

    Parameters
    ----------
    items : sequence
        Null items are None.
    fault : callable
        Says why an item is bad; None if it is not.

    Returns
    -------
    (list, numpy.ndarray, dict of int to str)
        The good items; where each stood, (m,) int64; and the reason for each bad one, by position.

    Examples
    --------
    >>> good, positions, errors = usable(["a", None, 3, "b"], text_fault)
    >>> good, positions.tolist(), errors
    (['a', 'b'], [0, 3], {2: 'it is a int, not text'})
    """
    good: list[Any] = []
    positions: list[int] = []
    errors: dict[int, str] = {}
    for position, item in enumerate(items):
        if item is None:
            continue
        if reason := fault(item):
            errors[position] = reason
        else:
            good.append(item)
            positions.append(position)
    return good, np.asarray(positions, np.int64), errors


def text_fault(item: Any) -> str | None:
    """Return why `item` is no text that a tokenizer can take, or None if it is.

    Examples
    --------
    >>> text_fault("fine"), text_fault(3)
    (None, 'it is a int, not text')
    >>> text_fault(chr(0xD800))
    'it holds a lone surrogate at character 0, which is no text; decode the bytes again'
    """
    if not isinstance(item, str):
        return f"it is a {type(item).__name__}, not text"
    place = lone_surrogate(item)
    if place is None:
        return None
    return (
        f"it holds a lone surrogate at character {place}, which is no text; decode the bytes again"
    )
