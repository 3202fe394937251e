"""Bring a batch into the shape of a table: its columns, their order, their types."""

from __future__ import annotations

from collections.abc import Callable, Set

import numpy as np
import pyarrow as pa

from gpu_lance.errors import BadInputError, SchemaError
from gpu_lance.ingest.lists import (
    as_list,
    convert,
    flat_values,
    is_list_like,
    is_multivector_type,
    is_vector_type,
    make_list,
    row_lengths,
    row_offsets,
    to_fixed,
    valid_rows,
)

NOTHING: frozenset[str] = frozenset()


def align(
    batch: pa.RecordBatch,
    schema: pa.Schema,
    *,
    allow_missing: Set[str] = NOTHING,
    first_row: int = 0,
) -> pa.RecordBatch:
    """The rows of `batch` with the columns of `schema`, in its order and types.

    Parameters
    ----------
    batch : pyarrow.RecordBatch
        Of any column order, with types that can be cast without loss.
    schema : pyarrow.Schema
        The table's schema.
    allow_missing : set of str
        Columns that are filled later: they may be absent, and then are absent from the result,
        and may hold nulls even if the table takes none.
    first_row : int
        Number of the batch's first row in the caller's data, for messages.

    Returns
    -------
    pyarrow.RecordBatch
        Other missing columns are null. A vector column in which some lengths are wrong is left a
        list, of the table's value type, for
        :func:`~gpu_lance.ingest.vectors.handle_bad_vectors` to decide about. A batch that fits
        already shares all its memory with the result.

    Raises
    ------
    SchemaError
        For a column that the table lacks, one that is missing and takes no nulls, or a type that
        cannot become the table's.
    BadInputError
        For a value that does not fit, or a null where none may be; it names column and row.

    Examples
    --------
    >>> schema = pa.schema({"text": pa.utf8(), "vector": pa.list_(pa.float32(), 2)})
    >>> batch = pa.record_batch({"vector": pa.array([[1.0, 2.0]]), "text": pa.array(["a"])})
    >>> align(batch, schema).schema.field("vector").type
    FixedSizeListType(fixed_size_list<item: float>[2])
    """
    _refuse_unknown(batch, schema)
    columns, fields = [], []
    for field in schema:
        index = batch.schema.get_field_index(field.name)
        if index < 0:
            if field.name in allow_missing:
                continue
            if not field.nullable:
                raise SchemaError(
                    f"Column {field.name!r} is missing from the data and takes no nulls; "
                    f"the data has {_listed(batch.schema.names)}."
                )
            column = pa.nulls(batch.num_rows, field.type)
        else:
            column = fit_column(batch.column(index), field, first_row)
            if field.name not in allow_missing:
                _refuse_nulls(column, field, field.name, first_row, None)
        columns.append(column)
        fields.append(field if field.type == column.type else field.with_type(column.type))
    aligned = pa.schema(fields, metadata=schema.metadata)
    if not columns:  # without a column Arrow forgets the number of rows
        return batch.select([]).replace_schema_metadata(schema.metadata)
    return pa.RecordBatch.from_arrays(columns, schema=aligned)


def fit_column(array: pa.Array, field: pa.Field, first_row: int = 0) -> pa.Array:
    """One column as the type of `field`; a vector column with wrong lengths stays a list.

    Raises
    ------
    SchemaError
        If the types have nothing to do with each other.
    BadInputError
        If a value does not fit, with its row.

    Examples
    --------
    >>> fit_column(pa.array([1, 2], pa.int8()), pa.field("n", pa.float32())).type
    DataType(float)
    """
    wanted = field.type
    if array.type == wanted:
        return array
    if isinstance(array, pa.ExtensionArray):
        return fit_column(array.storage, field, first_row)
    if isinstance(wanted, pa.BaseExtensionType):
        storage = fit_column(array, field.with_type(wanted.storage_type), first_row)
        return pa.ExtensionArray.from_storage(wanted, storage)
    if pa.types.is_null(array.type) or array.null_count == len(array):
        return pa.nulls(len(array), wanted)
    array = as_list(array) if is_list_like(array.type) else array
    _refuse_nested(array.type, wanted, field.name)
    if is_vector_type(wanted) and is_list_like(array.type):
        value_type = array.type.value_type
        if _is_number(value_type):
            return _fit_vectors(array, wanted)
        if pa.types.is_null(value_type):  # every list is empty
            return _fit_vectors(array.cast(pa.list_(wanted.value_field)), wanted)
    if is_multivector_type(wanted) and _is_nested_numbers(array.type):
        lengths = np.where(valid_rows(array), row_lengths(array), 0)
        vectors = _fit_vectors(as_list(array.flatten()), wanted.value_type)
        value_field = wanted.value_field.with_type(vectors.type)
        return make_list(vectors, lengths, valid_rows(array), value_field)
    try:
        return _cast(array, wanted)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        problem = error
    # not of a slice, of which Arrow would cast the values of all rows
    row = first_failure(
        len(array), lambda start, stop: _cast(array.take(pa.array(range(start, stop))), wanted)
    )
    if row is None or isinstance(problem, pa.ArrowNotImplementedError):
        first = int(np.flatnonzero(valid_rows(array))[0])
        raise SchemaError(
            f"Column {field.name!r} is {wanted} and cannot take {array.type}; "
            f"the first value is in row {first_row + first}."
        ) from problem
    value = array[row].as_py()
    raise BadInputError(
        f"Row {first_row + row}, column {field.name!r}: {shorten(value)} of type {array.type} "
        f"does not fit {wanted} ({_first_line(problem)})."
    ) from problem


def first_failure(rows: int, attempt: Callable[[int, int], object]) -> int | None:
    """The first row at which `attempt(start, stop)` raises; None if it raises nowhere.

    Prefixes are halved: a prefix fails if and only if it reaches the row in question.

    Examples
    --------
    >>> first_failure(9, lambda start, stop: [1 / (5 - i) for i in range(start, stop)])
    5
    """

    def fails(stop: int) -> bool:
        try:
            attempt(0, stop)
        except (pa.ArrowException, ValueError, TypeError, ArithmeticError):
            return True
        return False

    if not fails(rows):
        return None
    good, bad = 0, rows
    while bad - good > 1:
        middle = (good + bad) // 2
        if fails(middle):
            bad = middle
        else:
            good = middle
    return bad - 1


def shorten(value: object, limit: int = 60) -> str:
    """The repr of a value, cut so that it fits a message.

    Examples
    --------
    >>> shorten("a" * 100, 8)
    "'aaaa..."
    """
    if isinstance(value, str | bytes | bytearray | list | tuple) and len(value) > limit:
        value = value[:limit]
        return repr(value)[: limit - 3] + "..."
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _cast(array: pa.Array, wanted: pa.DataType) -> pa.Array:
    """Arrow's cast, but that fixed-size lists inside structs and lists may be null."""
    found = array.type
    if found == wanted:
        return array
    if pa.types.is_struct(found) and pa.types.is_struct(wanted):
        fields = [wanted.field(i) for i in range(wanted.num_fields)]
        places = [found.get_field_index(field.name) for field in fields]
        parts = array.flatten()  # unlike field(), null where the struct is
        children = [
            pa.nulls(len(array), field.type) if i < 0 else _cast(parts[i], field.type)
            for i, field in zip(places, fields, strict=True)
        ]
        mask = pa.array(~valid_rows(array)) if array.null_count else None
        return pa.StructArray.from_arrays(children, fields=fields, mask=mask)
    if is_list_like(found) and is_list_like(wanted):
        array = as_list(array)
        lengths = np.where(valid_rows(array), row_lengths(array), 0)
        if is_vector_type(wanted) and _is_number(found.value_type):
            if bool((lengths == wanted.list_size)[valid_rows(array)].all()):
                return to_fixed(array, wanted)
        elif pa.types.is_list(wanted) and pa.types.is_nested(wanted.value_type):
            values = _cast(array.flatten(), wanted.value_type)
            return make_list(values, lengths, valid_rows(array), wanted.value_field)
    return array.cast(wanted)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def _is_nested_numbers(kind: pa.DataType) -> bool:
    if not is_list_like(kind) or not is_list_like(kind.value_type):
        return False
    return _is_number(kind.value_type.value_type)


def _fit_vectors(array: pa.Array, wanted: pa.FixedSizeListType) -> pa.Array:
    valid = valid_rows(array)
    lengths = row_lengths(array)
    if bool((lengths == wanted.list_size)[valid].all()):
        return to_fixed(array, wanted)
    if pa.types.is_fixed_size_list(array.type):
        values = flat_values(array)
    else:
        offsets = row_offsets(array)
        values = array.values.slice(offsets[0], offsets[-1] - offsets[0])
    return make_list(convert(values, wanted.value_type), lengths, valid, wanted.value_field)


def _refuse_unknown(batch: pa.RecordBatch, schema: pa.Schema) -> None:
    names = batch.schema.names
    if unknown := [name for name in names if name not in schema.names]:
        raise SchemaError(
            f"The table has no column {_listed(unknown)}; it has {_listed(schema.names)}. "
            "Leave it out of the data, or add it to the table first."
        )
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise SchemaError(f"The data has more than one column {_listed(twice)}.")


def _refuse_nested(found: pa.DataType, wanted: pa.DataType, path: str) -> None:
    """Arrow's cast drops the fields of a struct that the target lacks: data would be lost."""
    if pa.types.is_struct(found) and pa.types.is_struct(wanted):
        known = {wanted.field(i).name: wanted.field(i) for i in range(wanted.num_fields)}
        for i in range(found.num_fields):
            child = found.field(i)
            if child.name not in known:
                raise SchemaError(
                    f"Column {path!r} has no field {child.name!r}; it has {_listed(list(known))}."
                )
            _refuse_nested(child.type, known[child.name].type, f"{path}.{child.name}")
    elif is_list_like(found) and is_list_like(wanted):
        _refuse_nested(found.value_type, wanted.value_type, path)


def _refuse_nulls(
    array: pa.Array, field: pa.Field, path: str, first_row: int, within: np.ndarray | None
) -> None:
    """`within` is True where the parent struct is there; where it is null, so are its fields."""
    if not field.nullable and (array.null_count or pa.types.is_null(array.type)):
        null = ~valid_rows(array)
        rows = np.flatnonzero(null if within is None else null & within)
        if len(rows):
            raise BadInputError(
                f"Row {first_row + int(rows[0])}, column {path!r}: null, but the column takes no "
                f"nulls ({len(rows)} such rows). Give a value, or make the column nullable."
            )
    if pa.types.is_struct(array.type):
        valid = valid_rows(array) if within is None else valid_rows(array) & within
        for i in range(array.type.num_fields):
            child = field.type.field(i)
            _refuse_nulls(array.field(i), child, f"{path}.{child.name}", first_row, valid)


def _listed(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names) or "no columns"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
