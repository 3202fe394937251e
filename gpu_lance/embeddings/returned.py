"""Check what a user's function returned, and put it into one tensor."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_lance.device import as_tensor
from gpu_lance.errors import EmbeddingError
from gpu_lance.optional import require

if TYPE_CHECKING:
    import torch


def as_rows(
    returned: Any, positions: list[int], ndims: int, name: str
) -> tuple[torch.Tensor, set[int]]:
    """Turn what a function returned into one vector an item, and say which items got none.

    Parameters
    ----------
    returned : list, array, Arrow column or data frame
        One vector, or None, for each item.
    positions : list of int
        Which items those are, for messages.
    ndims : int
        The length that a vector must have.
    name : str
        Of the function, for messages.

    Returns
    -------
    torch.Tensor
        (m, ndims), those that there are.
    set of int
        Places in `returned` without a vector.

    Raises
    ------
    EmbeddingError
        For another number of vectors, another length, or what is no number.

    Examples
    --------
    >>> as_rows([[1, 2], None], [0, 1], 2, "Mine")
    (tensor([[1., 2.]]), {1})
    """
    returned = _one_for_each(returned, positions, name)
    if getattr(returned, "ndim", None) == 2 and _is_numeric(returned):
        if returned.shape[1] != ndims:
            raise _wrong_length(name, positions[0], returned.shape[1], ndims)
        return _dense(returned), set()
    missing = {i for i, vector in enumerate(returned) if vector is None}
    present = [vector for vector in returned if vector is not None]
    if not present:
        return as_tensor(np.empty((0, ndims), np.float32)), missing
    try:
        rows = _stack(present)
    except (ValueError, TypeError, OverflowError):
        rows = None
    if rows is None or tuple(rows.shape[1:]) != (ndims,):
        raise _first_fault(returned, positions, ndims, name)
    return rows, missing


def as_parts(
    returned: Any, positions: list[int], ndims: int, name: str
) -> tuple[torch.Tensor, np.ndarray, set[int]]:
    """Turn what a function returned into any number of vectors an item.

    Parameters and errors as of :func:`as_rows`; each item may have one vector, or an array or
    list of vectors.

    Returns
    -------
    torch.Tensor
        (t, ndims), the vectors of all items end to end.
    numpy.ndarray
        (m,), how many each item has.
    set of int
        Places in `returned` without a vector.

    Examples
    --------
    >>> as_parts([[[1, 2], [3, 4]], [5, 6]], [0, 1], 2, "Mine")
    (tensor([[1., 2.],
            [3., 4.],
            [5., 6.]]), array([2, 1]), set())
    """
    torch = require("torch", extra="cpu|cuda13|cuda12")
    returned = _one_for_each(returned, positions, name)
    lengths = np.ones(len(positions), np.int64)
    if getattr(returned, "ndim", None) == 2 and _is_numeric(returned):
        # copied, since it may be a buffer that is filled again for the next items
        return as_rows(returned, positions, ndims, name)[0].clone(), lengths, set()
    parts = []
    for i, item in enumerate(returned):
        vectors = [] if item is None else item if _is_nested(item) else [item]
        lengths[i] = len(vectors)
        if len(vectors):
            rows, absent = as_rows(vectors, [positions[i]] * len(vectors), ndims, name)
            if absent:
                raise EmbeddingError(
                    f"{name} returned None among the vectors of item {positions[i]}; leave it out."
                )
            parts.append(rows)
    if not parts:
        parts.append(as_tensor(np.empty((0, ndims), np.float32)))
    rows = torch.cat([part.to(parts[0].device) for part in parts])
    return rows, lengths, set(np.flatnonzero(lengths == 0).tolist())


def listed(returned: Any, name: str) -> Any:
    """What a function returned as something with a length and an order.

    Examples
    --------
    >>> import pyarrow as pa
    >>> listed(pa.array([[1.0], None]), "Mine")
    [[1.0], None]
    """
    if hasattr(returned, "to_pylist"):  # Arrow
        returned = returned.to_pylist()
    elif hasattr(returned, "to_numpy"):  # a data frame, or a column of vectors
        returned = returned.to_numpy()
    if isinstance(returned, np.ma.MaskedArray) and returned.dtype.kind in "fiu":
        returned = np.ma.filled(returned.astype(np.float64), np.nan)
    if _length(returned) is None or isinstance(returned, Set | Mapping):  # no order
        raise EmbeddingError(
            f"{name} must return a list of vectors, got a {type(returned).__name__}."
        )
    if getattr(returned, "is_sparse", False) or getattr(returned, "is_meta", False):
        raise EmbeddingError(f"{name} returned a tensor that is not dense; call to_dense().")
    return returned


def _one_for_each(returned: Any, positions: list[int], name: str) -> Any:
    returned = listed(returned, name)
    if len(returned) != len(positions):
        raise EmbeddingError(
            f"{name} returned {len(returned)} vectors for {len(positions)} items; it must return "
            "one for each."
        )
    return returned


def _is_nested(item: Any) -> bool:
    """Whether an item's vectors are several, not one."""
    if hasattr(item, "ndim"):
        return bool(item.ndim > 1)
    return isinstance(item, list | tuple) and (not item or _length(item[0]) is not None)


def _stack(vectors: list[Any]) -> torch.Tensor | None:
    torch = require("torch", extra="cpu|cuda13|cuda12")
    if any(isinstance(vector, torch.Tensor) for vector in vectors):
        tensors = [as_tensor(vector) for vector in vectors]
        if len({tuple(tensor.shape) for tensor in tensors}) > 1 or tensors[0].is_complex():
            return None
        return torch.stack([tensor.to(tensors[0].device) for tensor in tensors])
    array = np.asarray(vectors)
    if not _is_numeric(array) and not (array.dtype == object and all(map(_is_number, array.flat))):
        return None
    return _dense(array)


def _dense(values: Any) -> torch.Tensor:
    if isinstance(values, np.ndarray):  # torch does not know all of its types
        with np.errstate(over="ignore"):  # what overflows becomes infinite, and so a bad vector
            values = values.astype(np.float32, copy=False)
    return as_tensor(values)


def _is_numeric(values: Any) -> bool:
    dtype = values.dtype
    # numpy would parse numbers out of strings and drop the imaginary part of complex ones
    kind = getattr(dtype, "kind", None)
    return kind in "fiub" if kind is not None else not dtype.is_complex


def _length(vector: Any) -> int | None:
    """How many numbers a vector has; None for what has no length, such as a number."""
    try:
        return None if isinstance(vector, str | bytes) else len(vector)
    except TypeError:
        return None


def _is_number(value: Any) -> bool:
    if isinstance(value, str | bytes) or np.ndim(value) or np.iscomplexobj(value):
        return False
    try:
        float(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def _first_fault(returned: Any, positions: list[int], ndims: int, name: str) -> EmbeddingError:
    for where, vector in zip(positions, returned, strict=True):
        if vector is None:
            continue
        length = _length(vector)
        if length is None:
            return EmbeddingError(
                f"{name} returned {_shown(vector)} for item {where}; a vector is a list of "
                f"{ndims} numbers."
            )
        if length and _is_nested(vector):
            return EmbeddingError(
                f"{name} returned lists within the vector of item {where}; a vector is a list of "
                f"{ndims} numbers, and several vectors go into a column of MultiVector({ndims})."
            )
        if length != ndims:
            return _wrong_length(name, where, length, ndims)
        for number in vector:
            if not _is_number(number):
                return EmbeddingError(
                    f"{name} returned a vector for item {where} that holds {_shown(number)}; a "
                    f"vector is a list of {ndims} numbers."
                )
    return EmbeddingError(f"{name} must return one list of {ndims} numbers for each item.")


def _wrong_length(name: str, where: int, got: int, ndims: int) -> EmbeddingError:
    return EmbeddingError(
        f"{name} returned a vector of {got} numbers for item {where}; the column wants {ndims}. "
        "Make ndims() return what the model gives, or use the function that made the column."
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"a {type(value).__name__}"
