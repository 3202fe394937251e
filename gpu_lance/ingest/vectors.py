"""Vectors between numpy and Arrow without a copy, and what becomes of those that cannot be used."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from gpu_lance.errors import BadVectorError, SchemaError
from gpu_lance.ingest.lists import (
    as_list,
    flat,
    flat_values,
    is_list_like,
    is_vector_type,
    pack_bits,
    row_lengths,
    row_offsets,
    to_fixed,
    valid_rows,
)
from gpu_lance.types import OnBadVectors

__all__ = [
    "arrow_to_matrix",
    "bad_vectors",
    "handle_bad_vectors",
    "is_vector_type",
    "vectors_to_arrow",
]

NAMED_ROWS = 5  # bad rows that an error message lists


def bad_vectors(array: pa.Array, ndims: int, *, zero_is_bad: bool = False) -> np.ndarray:
    """Which rows hold a vector that cannot be stored as it is.

    Parameters
    ----------
    array : pyarrow.FixedSizeListArray, ListArray or LargeListArray
        Of n rows of float16, float32, float64 or integers; may be a slice.
    ndims : int
        The length that a vector must have.
    zero_is_bad : bool
        Whether a vector of zeros is bad too: cosine has no value for it.

    Returns
    -------
    numpy.ndarray
        (n,) bool: True for a wrong length, a NaN, infinite or null element, and for all zeros
        if `zero_is_bad`. A null row is missing, not bad.

    Raises
    ------
    SchemaError
        If the array holds no lists of numbers.

    Examples
    --------
    >>> rows = [[1.0, 2.0], [1.0], None, [float("nan"), 0.0], [0.0, 0.0]]
    >>> bad_vectors(pa.array(rows), 2, zero_is_bad=True).tolist()
    [False, True, False, True, True]
    """
    array = _require_vectors(array)
    valid = valid_rows(array)
    bad = row_lengths(array) != ndims
    if pa.types.is_fixed_size_list(array.type):
        if not bad.any():
            values = flat_values(array)
            shape = (len(array), ndims)
            wrong = _unusable(values)
            if wrong is not None:
                bad |= wrong.reshape(shape).any(axis=1)
            if zero_is_bad:
                bad |= ~(flat(values).reshape(shape) != 0).any(axis=1)
    else:
        offsets = row_offsets(array)
        values = array.values.slice(offsets[0], offsets[-1] - offsets[0])
        offsets = offsets - offsets[0]
        wrong = _unusable(values)
        if wrong is not None and wrong.any():
            bad |= _count(wrong, offsets) > 0
        if zero_is_bad:
            bad |= _count(flat(values) != 0, offsets) == 0
    return np.asarray(bad & valid)


def handle_bad_vectors(
    batch: pa.RecordBatch,
    column: str,
    ndims: int,
    policy: OnBadVectors,
    fill_value: float = 0.0,
    zero_is_bad: bool = False,
    first_row: int = 0,
) -> pa.RecordBatch:
    """Apply `on_bad_vectors` to one column, which comes out as a fixed-size list.

    Parameters
    ----------
    batch : pyarrow.RecordBatch
        As :func:`~gpu_lance.ingest.align.align` gives it: the column has the table's value type
        and is a fixed-size list, or a list if some lengths are wrong.
    column : str
        The vector column.
    ndims : int
        The length that a vector must have.
    policy : OnBadVectors
        ``error`` raises, ``drop`` removes the row, ``fill`` replaces the vector by `fill_value`,
        ``null`` replaces it by null.
    fill_value : float
        Every element of a filled vector.
    zero_is_bad : bool
        Whether a vector of zeros is bad.
    first_row : int
        Number of the batch's first row in the caller's data, for messages.

    Returns
    -------
    pyarrow.RecordBatch
        The batch itself if nothing had to change.

    Raises
    ------
    BadVectorError
        Under ``error``, with the first bad rows and why; under ``null`` if the column takes no
        nulls; under ``fill`` if `fill_value` is itself no finite number of the column's type.

    Examples
    --------
    >>> batch = pa.record_batch({"v": pa.array([[1.0, 2.0], [3.0]])})
    >>> handle_bad_vectors(batch, "v", 2, OnBadVectors.FILL, 9.0).column("v").to_pylist()
    [[1.0, 2.0], [9.0, 9.0]]
    """
    index = batch.schema.get_field_index(column)
    array = _require_vectors(batch.column(index), column)
    bad = bad_vectors(array, ndims, zero_is_bad=zero_is_bad)
    type_ = pa.list_(array.type.value_field, ndims)
    if not bad.any():
        if pa.types.is_fixed_size_list(array.type) and array.type.list_size == ndims:
            return batch
        if array.null_count == len(array):
            return _replace(batch, index, pa.nulls(len(array), type_))
        return _replace(batch, index, to_fixed(array, type_))
    if policy is OnBadVectors.ERROR:
        raise BadVectorError(_complaint(array, column, ndims, bad, first_row))
    if policy is OnBadVectors.DROP:
        kept = batch.filter(pa.array(~bad))
        return handle_bad_vectors(kept, column, ndims, policy)
    valid = valid_rows(array)
    good = valid & ~bad
    matrix = np.zeros((len(array), ndims), dtype=type_.value_type.to_pandas_dtype())
    matrix[good] = flat(array.filter(pa.array(good)).flatten()).reshape(-1, ndims)
    if policy is OnBadVectors.FILL:
        matrix[bad] = checked_fill(fill_value, matrix.dtype, column)
    else:
        if not batch.schema.field(index).nullable:
            raise BadVectorError(
                f"on_bad_vectors='null' cannot be used on column {column!r}, which takes no "
                f"nulls; {_complaint(array, column, ndims, bad, first_row)}"
            )
        valid = good
    return _replace(batch, index, vectors_to_arrow(matrix, valid, type_))


def vectors_to_arrow(
    matrix: np.ndarray, valid: np.ndarray | None, kind: pa.FixedSizeListType
) -> pa.FixedSizeListArray:
    """A column of vectors over the memory of a matrix.

    Parameters
    ----------
    matrix : numpy.ndarray
        (n, d), float16, float32, float64 or integers. Copied only if it is not contiguous or
        not of the column's value type; it must not be written to afterwards.
    valid : numpy.ndarray, optional
        (n,) bool, False where the row is null; None if none is.
    kind : pyarrow.FixedSizeListType
        The column's type, of size d.

    Raises
    ------
    SchemaError
        If the shapes do not fit each other.

    Examples
    --------
    >>> kind = pa.list_(pa.float32(), 2)
    >>> vectors_to_arrow(np.ones((2, 2), np.float32), np.array([True, False]), kind).to_pylist()
    [[1.0, 1.0], None]
    """
    if matrix.ndim != 2 or matrix.shape[1] != kind.list_size:
        raise SchemaError(
            f"A column of {kind} wants a matrix (n, {kind.list_size}), got {matrix.shape}."
        )
    rows = matrix.shape[0]
    if valid is not None and valid.shape != (rows,):
        raise SchemaError(f"valid must have the shape ({rows},), got {valid.shape}.")
    with np.errstate(over="ignore"):  # what overflows becomes infinite, and so a bad vector
        numbers = np.ascontiguousarray(matrix, dtype=kind.value_type.to_pandas_dtype())
    values = pa.array(numbers.reshape(-1), type=kind.value_type)
    bitmap = None if valid is None or valid.all() else pack_bits(valid.astype(bool))
    return pa.Array.from_buffers(kind, rows, [bitmap], children=[values])


def arrow_to_matrix(array: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """The vectors of a column as a matrix, and which of them are not null.

    Parameters
    ----------
    array : pyarrow.FixedSizeListArray or ChunkedArray of it
        Of n rows and size d; may be a slice.

    Returns
    -------
    matrix : numpy.ndarray
        (n, d), read-only and over the array's own memory if it has no nulls and one chunk. With
        nulls it is a copy in which a null row is zeros and a null element NaN.
    valid : numpy.ndarray
        (n,) bool.

    Raises
    ------
    SchemaError
        If the array is no fixed-size list.

    Examples
    --------
    >>> arrow_to_matrix(pa.array([[1.0, 2.0]], pa.list_(pa.float32(), 2)))
    (array([[1., 2.]], dtype=float32), array([ True]))
    """
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0) if array.num_chunks == 1 else array.combine_chunks()
    if not pa.types.is_fixed_size_list(array.type):
        raise SchemaError(f"A column of vectors is a fixed-size list, got {array.type}.")
    valid = valid_rows(array)
    matrix = flat(flat_values(array)).reshape(len(array), array.type.list_size)
    if not valid.all():
        matrix = np.where(valid[:, None], matrix, matrix.dtype.type(0))
    return matrix, valid


def _require_vectors(array: pa.Array, column: str | None = None) -> pa.Array:
    """The array, not a list view; an error unless it holds lists of numbers."""
    if is_list_like(array.type):
        value_type = array.type.value_type
        if pa.types.is_floating(value_type) or pa.types.is_integer(value_type):
            return as_list(array)
    name = "A vector column" if column is None else f"The vector column {column!r}"
    raise SchemaError(f"{name} holds lists of numbers, got {array.type}.")


def _unusable(values: pa.Array) -> np.ndarray | None:
    """(len,) bool: the NaN, infinite and null values; None if there can be none."""
    if not pa.types.is_floating(values.type):
        return ~valid_rows(values) if values.null_count else None
    numbers = flat(values)
    if numbers.dtype == np.float16:  # numpy's isfinite takes seven times as long as this
        return np.asarray((numbers.view(np.uint16) & 0x7C00) == 0x7C00)
    return np.asarray(~np.isfinite(numbers))


def _count(flags: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(n,) how many flags are set in each row."""
    before = np.zeros(len(flags) + 1, dtype=np.int64)
    np.cumsum(flags, out=before[1:])
    return np.asarray(before[offsets[1:]] - before[offsets[:-1]])


def checked_fill(fill_value: float, dtype: np.dtype, column: str) -> np.ndarray:
    """`fill_value` as a number of that dtype; BadVectorError if it is none, or not finite."""
    try:
        with np.errstate(over="ignore"):
            value = np.asarray(fill_value, dtype=np.float64).astype(dtype)
        if value.ndim == 0 and np.isfinite(value):
            return value
    except (TypeError, ValueError):
        pass
    raise BadVectorError(
        f"fill_value is {fill_value!r}; column {column!r} needs one finite number that fits "
        f"{dtype.name}."
    )


def _replace(batch: pa.RecordBatch, index: int, array: pa.Array) -> pa.RecordBatch:
    field = batch.schema.field(index).with_type(array.type)
    return batch.set_column(index, field, array)


def _complaint(array: pa.Array, column: str, ndims: int, bad: np.ndarray, first_row: int) -> str:
    """What is wrong with the first bad rows, and what can be passed to get past them."""
    positions = np.flatnonzero(bad)
    named = [
        f"row {first_row + int(i)} {reason_for(array[int(i)], ndims)}"
        for i in positions[:NAMED_ROWS]
    ]
    more = len(positions) - len(named)
    if more:
        named.append(f"{more} more")
    return (
        f"Bad vectors in column {column!r}: {', '.join(named)}. Pass on_bad_vectors='drop' to "
        "leave such rows out, 'fill' with a fill_value to replace the vectors, or 'null'."
    )


def reason_for(row: pa.Scalar, ndims: int) -> str:
    """In words what is wrong with a bad vector."""
    values = row.values
    if len(values) != ndims:
        return f"has {len(values)} dimensions instead of {ndims}"
    if values.null_count:
        return "has a null element"
    numbers = flat(values)
    if np.isnan(numbers).any():
        return "has a NaN"
    if np.isinf(numbers).any():
        return f"has an infinite element, or one too large for {values.type}"
    return "is all zeros, for which cosine is undefined"
