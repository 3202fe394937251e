"""Columns with any number of vectors a row: to and from Arrow, and what becomes of bad rows."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from gpu_lance.errors import BadVectorError, SchemaError
from gpu_lance.ingest.lists import (
    flat,
    make_list,
    row_lengths,
    valid_rows,
)
from gpu_lance.ingest.vectors import (
    NAMED_ROWS,
    arrow_to_matrix,
    bad_vectors,
    checked_fill,
    reason_for,
    vectors_to_arrow,
)
from gpu_lance.types import OnBadVectors


def bad_multivectors(array: pa.Array, ndims: int, *, zero_is_bad: bool = False) -> np.ndarray:
    """Which rows hold vectors that cannot be stored as they are.

    Parameters
    ----------
    array : pyarrow.ListArray
        Of n rows, each a list of vectors or of lists of numbers; may be a slice.
    ndims : int
        The length that a vector must have.
    zero_is_bad : bool
        Whether a row whose vectors are all zero is bad: cosine has no value for it.

    Returns
    -------
    numpy.ndarray
        (n,) bool: True if one of the row's vectors is null, of a wrong length, or holds a NaN,
        infinite or null element. A null row, and one without vectors, is not bad.

    Examples
    --------
    >>> rows = pa.array([[[1.0, 2.0]], [[1.0, 2.0], [3.0]], None, []])
    >>> bad_multivectors(rows, 2).tolist()
    [False, True, False, False]
    """
    vectors, offsets = _parts(array)
    bad = bad_vectors(vectors, ndims) | ~valid_rows(vectors)
    rows = _any(bad, offsets)
    if zero_is_bad:
        zero = bad_vectors(vectors, ndims, zero_is_bad=True)
        rows |= (_sums(zero, offsets) == np.diff(offsets)) & (np.diff(offsets) > 0)
    return rows


def handle_bad_multivectors(
    batch: pa.RecordBatch,
    column: str,
    kind: pa.DataType,
    policy: OnBadVectors,
    fill_value: float = 0.0,
    zero_is_bad: bool = False,
    first_row: int = 0,
) -> pa.RecordBatch:
    """Apply `on_bad_vectors` to one multivector column, which comes out with type `kind`.

    Parameters and errors as of :func:`gpu_lance.ingest.vectors.handle_bad_vectors`; ``fill``
    gives a bad row one vector of `fill_value`.

    Examples
    --------
    >>> batch = pa.record_batch({"v": pa.array([[[1.0, 2.0]], [[3.0]]])})
    >>> kind = pa.list_(pa.list_(pa.float64(), 2))
    >>> handle_bad_multivectors(batch, "v", kind, OnBadVectors.FILL, 9.0).column("v").to_pylist()
    [[[1.0, 2.0]], [[9.0, 9.0]]]
    """
    index = batch.schema.get_field_index(column)
    array, ndims = batch.column(index), int(kind.value_type.list_size)
    bad = bad_multivectors(array, ndims, zero_is_bad=zero_is_bad)
    if not bad.any():
        return batch
    if policy is OnBadVectors.ERROR:
        raise BadVectorError(_complaint(array, column, ndims, bad, first_row))
    if policy is OnBadVectors.DROP:
        batch = batch.filter(pa.array(~bad))
        return _with(batch, index, _typed(batch.column(index), kind))
    if policy is OnBadVectors.NULL and not batch.schema.field(index).nullable:
        raise BadVectorError(
            f"on_bad_vectors='null' cannot be used on column {column!r}, which takes no nulls; "
            f"{_complaint(array, column, ndims, bad, first_row)}"
        )
    good = valid_rows(array) & ~bad
    parts = [(np.flatnonzero(good), *matrix_of(_typed(array.filter(pa.array(good)), kind)))]
    if policy is OnBadVectors.FILL:
        parts.append(filling(np.flatnonzero(bad), kind, fill_value, column))
    return _with(batch, index, assembled(len(array), parts, kind))


def matrix_of(array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The vectors of a multivector column end to end (t, d), and how many each row has (n,).

    Examples
    --------
    >>> kind = pa.list_(pa.list_(pa.float32(), 1))
    >>> vectors, lengths = matrix_of(pa.array([[[1.0], [2.0]], None], kind))
    >>> vectors.tolist(), lengths.tolist()
    ([[1.0], [2.0]], [2, 0])
    """
    lengths = np.where(valid_rows(array), row_lengths(array), 0)
    return arrow_to_matrix(array.flatten())[0], lengths


def filling(
    rows: np.ndarray, kind: pa.DataType, fill_value: float, column: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A part for :func:`assembled` that gives each of `rows` one vector of `fill_value`."""
    dtype = np.dtype(kind.value_type.value_type.to_pandas_dtype())
    shape = (len(rows), int(kind.value_type.list_size))
    value = checked_fill(fill_value, dtype, column)
    return rows, np.full(shape, value, dtype), np.ones(len(rows), np.int64)


def assembled(
    n: int,
    parts: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]],
    kind: pa.DataType,
) -> pa.Array:
    """A multivector column of n rows from parts; a row in no part is null.

    Parameters
    ----------
    n : int
    parts : iterable of (numpy.ndarray, numpy.ndarray, numpy.ndarray)
        Rows (m,), ascending; their vectors (t, d) end to end; how many each row has (m,).
        Vectors of one part that has all rows in order are not copied.
    kind : pyarrow.DataType
        A list of fixed-size lists of floats.

    Examples
    --------
    >>> kind = pa.list_(pa.list_(pa.float32(), 1))
    >>> part = (np.array([1]), np.ones((2, 1), np.float32), np.array([2]))
    >>> assembled(3, [part], kind).to_pylist()
    [None, [[1.0], [1.0]], None]
    """
    parts = [part for part in parts if len(part[0])]
    valid = np.zeros(n, bool)
    lengths = np.zeros(n, np.int64)
    for rows, vectors, counts in parts:
        if len(vectors) != counts.sum():
            raise SchemaError(f"A part has {len(vectors)} vectors, wanted {counts.sum()}.")
        valid[rows] = True
        lengths[rows] = counts
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    ndims = int(kind.value_type.list_size)
    if len(parts) == 1:
        matrix = parts[0][1]
    else:
        dtype = kind.value_type.value_type.to_pandas_dtype()
        matrix = np.empty((int(offsets[-1]), ndims), dtype)
        for rows, vectors, counts in parts:
            starts = offsets[rows] - (np.cumsum(counts) - counts)
            matrix[np.repeat(starts, counts) + np.arange(len(vectors))] = vectors
    values = vectors_to_arrow(matrix, None, kind.value_type)
    made = make_list(values, lengths, valid, kind.value_field)
    if pa.types.is_large_list(made.type):
        raise SchemaError(
            f"A batch of {n} rows has {len(values):,} vectors, more than a column of {kind} takes."
        )
    return made


def _parts(array: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """The vectors under the rows that are not null, and where each row's begin (n + 1,)."""
    lengths = np.where(valid_rows(array), row_lengths(array), 0)
    return array.flatten(), np.concatenate(([0], np.cumsum(lengths)))


def _sums(flags: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    before = np.concatenate(([0], np.cumsum(flags)))
    return before[offsets[1:]] - before[offsets[:-1]]


def _any(flags: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    return _sums(flags, offsets) > 0


def _typed(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """An array without bad rows as `kind`."""
    if array.type == kind:
        return array
    lengths = np.where(valid_rows(array), row_lengths(array), 0)
    values = pa.array(
        flat(array.flatten().flatten()).astype(
            kind.value_type.value_type.to_pandas_dtype(), copy=False
        )
    )
    vectors = pa.FixedSizeListArray.from_arrays(values, type=kind.value_type)
    return make_list(vectors, lengths, valid_rows(array), kind.value_field)


def _with(batch: pa.RecordBatch, index: int, array: pa.Array) -> pa.RecordBatch:
    return batch.set_column(index, batch.schema.field(index).with_type(array.type), array)


def _complaint(array: pa.Array, column: str, ndims: int, bad: np.ndarray, first_row: int) -> str:
    positions = np.flatnonzero(bad)
    named = []
    for i in positions[:NAMED_ROWS].tolist():
        vectors = array[i].values
        wrong = bad_vectors(vectors, ndims) | ~valid_rows(vectors)
        place = int(wrong.argmax())  # the first, if all are zeros
        why = reason_for(vectors[place], ndims) if vectors[place].is_valid else "is null"
        named.append(f"row {first_row + i}, of which vector {place} {why}")
    more = len(positions) - len(named)
    if more:
        named.append(f"{more} more")
    return (
        f"Bad vectors in column {column!r}: {'; '.join(named)}. Pass on_bad_vectors='drop' to "
        "leave such rows out, 'fill' with a fill_value to give them one such vector, or 'null'."
    )
