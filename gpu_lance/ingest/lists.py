"""List-like Arrow arrays seen as flat numpy values and row boundaries, wherever they start.

A slice of an Arrow list array shares its parent's values, and what lies under a null row is
arbitrary: everything here looks only at the rows of the slice, and trusts no null row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

MAX_INT32 = 2**31 - 1


def is_list_like(type_: pa.DataType) -> bool:
    """Whether `type_` is a list of any layout: fixed-size, 32 or 64 bit offsets, or a view.

    Examples
    --------
    >>> is_list_like(pa.list_(pa.float32(), 3)), is_list_like(pa.utf8())
    (True, False)
    """
    return bool(
        pa.types.is_fixed_size_list(type_)
        or pa.types.is_list(type_)
        or pa.types.is_large_list(type_)
        or pa.types.is_list_view(type_)
        or pa.types.is_large_list_view(type_)
    )


def is_vector_type(type_: pa.DataType) -> bool:
    """Whether a column of this type holds vectors: a fixed-size list of floats.

    Examples
    --------
    >>> is_vector_type(pa.list_(pa.float16(), 8)), is_vector_type(pa.list_(pa.int8(), 8))
    (True, False)
    """
    return bool(pa.types.is_fixed_size_list(type_) and pa.types.is_floating(type_.value_type))


def is_multivector_type(type_: pa.DataType) -> bool:
    """Whether a column of this type holds any number of vectors a row: a list of such lists.

    Examples
    --------
    >>> is_multivector_type(pa.list_(pa.list_(pa.float16(), 8)))
    True
    """
    return bool(pa.types.is_list(type_) and is_vector_type(type_.value_type))


def vector_length(type_: pa.DataType) -> int | None:
    """The length of the vectors in a column of this type; None if it holds none.

    Examples
    --------
    >>> vector_length(pa.list_(pa.list_(pa.float32(), 8))), vector_length(pa.utf8())
    (8, None)
    """
    if is_multivector_type(type_):
        type_ = type_.value_type
    return int(type_.list_size) if is_vector_type(type_) else None


def valid_rows(array: pa.Array) -> np.ndarray:
    """(n,) bool: True where the row is not null."""
    if array.null_count == 0:
        return np.ones(len(array), dtype=bool)
    return np.asarray(array.is_valid().to_numpy(zero_copy_only=False), dtype=bool)


def flat(values: pa.Array) -> np.ndarray:
    """The numbers of a primitive array, over its memory where none is null; a null float is NaN.

    Parameters
    ----------
    values : pyarrow.Array
        Floats or integers. A null integer, which has no NaN, becomes 0.
    """
    if values.null_count:
        missing = np.nan if pa.types.is_floating(values.type) else 0
        numbers = values.to_numpy(zero_copy_only=False)
        if numbers.dtype == object or pa.types.is_integer(values.type):
            values = values.fill_null(missing)
            return np.asarray(values.to_numpy(zero_copy_only=False))
        return np.asarray(numbers)
    return np.asarray(values.to_numpy(zero_copy_only=True))


def flat_values(array: pa.Array) -> pa.Array:
    """The values under the rows of a FixedSizeList slice, those under null rows included."""
    size = array.type.list_size
    return array.values.slice(array.offset * size, len(array) * size)


def as_list(array: pa.Array) -> pa.Array:
    """A list view as a List array of the same rows; another list array is returned as it is."""
    if not (pa.types.is_list_view(array.type) or pa.types.is_large_list_view(array.type)):
        return array
    # not by cast: Arrow's cast of a list view makes an array that fails its own validation
    lengths = pc.fill_null(array.value_lengths(), 0).to_numpy(zero_copy_only=False)
    return make_list(array.flatten(), lengths, valid_rows(array), array.type.value_field)


def make_list(
    values: pa.Array, lengths: np.ndarray, valid: np.ndarray, value_field: pa.Field
) -> pa.Array:
    """A List array over `values`, copying none of them; 64-bit offsets only if it needs them.

    Parameters
    ----------
    values : pyarrow.Array
        The values of all rows, one after the other; a null row may own some too.
    lengths : numpy.ndarray
        (n,), how many of them each row owns.
    valid : numpy.ndarray
        (n,) bool, False where the row is null.
    value_field : pyarrow.Field
        Name, nullability and type of the values.
    """
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    mask = None if valid.all() else pa.array(~valid)
    if offsets[-1] > MAX_INT32:
        kind: Any = pa.LargeListArray
        list_type = pa.large_list(value_field)
    else:
        kind, list_type = pa.ListArray, pa.list_(value_field)
        offsets = offsets.astype(np.int32)
    return kind.from_arrays(pa.array(offsets), values, type=list_type, mask=mask)


def row_offsets(array: pa.Array) -> np.ndarray:
    """(n + 1,) where each row of a List or LargeList slice begins in `array.values`."""
    return np.asarray(array.offsets.to_numpy(zero_copy_only=False))


def row_lengths(array: pa.Array) -> np.ndarray:
    """(n,) int64: values in each row; what is said of a null row means nothing."""
    if pa.types.is_fixed_size_list(array.type):
        return np.full(len(array), array.type.list_size, dtype=np.int64)
    return np.diff(row_offsets(array).astype(np.int64))


def to_fixed(array: pa.Array, type_: pa.FixedSizeListType) -> pa.Array:
    """A list array all of whose rows have the right length, as FixedSizeList of `type_`, numbers.

    Nothing is copied if no row is null and the values have the type already. The caller has
    checked the lengths.

    Examples
    --------
    >>> to_fixed(pa.array([[1.0, 2.0], None]), pa.list_(pa.float64(), 2)).to_pylist()
    [[1.0, 2.0], None]
    """
    size = type_.list_size
    if array.type == type_:
        return array
    if pa.types.is_fixed_size_list(array.type):
        return over_values(type_, convert(flat_values(array), type_.value_type), array)
    # the values of null rows are left out by flatten(), so that the others stand in a block
    values = convert(array.flatten(), type_.value_type)
    if array.null_count:
        matrix = np.zeros((len(array), size), dtype=type_.value_type.to_pandas_dtype())
        matrix[valid_rows(array)] = flat(values).reshape(-1, size)
        values = pa.array(matrix.reshape(-1), type=type_.value_type)
    return over_values(type_, values, array)


def over_values(type_: pa.FixedSizeListType, values: pa.Array, like: pa.Array) -> pa.Array:
    """A FixedSizeList array over `values`, null where the array `like` is."""
    bitmap = None if like.null_count == 0 else pack_bits(valid_rows(like))
    return pa.Array.from_buffers(type_, len(like), [bitmap], children=[values])


def pack_bits(valid: np.ndarray) -> pa.Buffer:
    """Arrow's validity bitmap of a (n,) bool array."""
    return pa.py_buffer(np.packbits(valid, bitorder="little"))


def convert(values: pa.Array, type_: pa.DataType) -> pa.Array:
    """`values` as `type_`; the same object if they have it.

    To floats nothing is refused: what does not fit becomes infinite, which the check for bad
    vectors finds. Other types are cast safely.
    """
    if values.type == type_:
        return values
    return values.cast(type_, safe=not pa.types.is_floating(type_))
