"""Python rows and Python columns as Arrow batches."""

from __future__ import annotations

import dataclasses
import enum
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from gpu_lance.errors import BadInputError, UnsupportedDataError
from gpu_lance.ingest.align import first_failure, shorten
from gpu_lance.ingest.arrays import host_array, is_array, is_scalar, stack_arrays
from gpu_lance.ingest.lists import is_list_like
from gpu_lance.types import lone_surrogate

FAILURES = (pa.ArrowException, ValueError, TypeError, ArithmeticError)


def is_row(value: Any) -> bool:
    """Whether `value` is one row: a mapping or a pydantic object.

    Examples
    --------
    >>> is_row({"text": "a"}), is_row("a")
    (True, False)
    """
    return isinstance(value, dict | Mapping) or is_model(value)  # dict first: it is quick


def is_model(value: Any) -> bool:
    """Whether `value` is a pydantic object, told without importing pydantic."""
    return hasattr(value, "model_dump") and not isinstance(value, type)


def row_values(row: Any, position: int) -> Mapping[str, Any]:
    """The values of one row by column.

    Raises
    ------
    UnsupportedDataError
        If it is no row; the message says which one.
    """
    if isinstance(row, dict):
        return row
    if is_model(row):
        row = row.model_dump()
    if not isinstance(row, Mapping):
        raise UnsupportedDataError(
            f"Row {position} is of type {type(row).__name__}; a row is a dict or a LanceModel."
        )
    return row


def column_names(rows: Iterable[Mapping[str, Any]], first_row: int) -> list[str]:
    """Every key of the rows, in the order of first appearance."""
    names: dict[str, None] = {}
    for position, row in enumerate(rows):
        if names.keys() != row.keys():
            names.update(dict.fromkeys(row))
            if wrong := [name for name in row if not isinstance(name, str)]:
                raise BadInputError(
                    f"Row {first_row + position}: column names are strings, got {wrong[0]!r}."
                )
    return list(names)


def rows_to_batch(
    rows: Sequence[Any],
    schema: pa.Schema | None = None,
    first_row: int = 0,
    names: Sequence[str] | None = None,
) -> pa.RecordBatch:
    """A batch out of dicts or pydantic objects.

    Parameters
    ----------
    rows : sequence of mapping or pydantic object
        A key that a row lacks is null there.
    schema : pyarrow.Schema, optional
        Types of the columns that it knows; others are inferred.
    first_row : int
        Number of the first row in the caller's data, for messages.
    names : sequence of str, optional
        The columns, if more is known than these rows; else every key of the rows.

    Raises
    ------
    BadInputError
        For a value that Arrow cannot take, with row, column and type.
    UnsupportedDataError
        For a row that is no row.

    Examples
    --------
    >>> rows_to_batch([{"a": 1}, {"b": "x"}]).to_pylist()
    [{'a': 1, 'b': None}, {'a': None, 'b': 'x'}]
    """
    dicts = [row_values(row, first_row + i) for i, row in enumerate(rows)]
    found = column_names(dicts, first_row) if names is None else list(names)
    if not found:
        if schema is None or not len(schema):
            raise BadInputError(f"Row {first_row} has no columns: pass rows with at least one.")
        found = [schema.names[0]]  # a batch without columns would forget its rows
    columns = [
        column_to_arrow([row.get(name) for row in dicts], name, type_of(name, schema), first_row)
        for name in found
    ]
    return pa.RecordBatch.from_arrays(columns, names=found)


def column_to_arrow(
    values: Sequence[Any], name: str, wanted: pa.DataType | None = None, first_row: int = 0
) -> pa.Array:
    """A column out of Python values; arrays among them become lists without Python floats.

    Parameters
    ----------
    values : sequence
        Python values, or one numpy, torch or cupy array a row. None is null.
    name : str
        The column, for messages.
    wanted : pyarrow.DataType, optional
        The type that the table has. The result may be of another one that can be cast to it,
        e.g. lists of several lengths where vectors are wanted.
    first_row : int
        Number of the first row in the caller's data, for messages.

    Raises
    ------
    BadInputError
        For a value that Arrow cannot take, with row, column and type.

    Examples
    --------
    >>> column_to_arrow([[1, 2], [3]], "v", pa.list_(pa.float32(), 2)).type
    ListType(list<item: float>)
    """
    probe = next((value for value in values if value is not None), None)
    if probe is None:
        return pa.nulls(len(values), wanted or pa.null())
    if is_array(probe) and probe.ndim > 0:
        stacked = stack_arrays(values)
        if stacked is not None:
            return stacked
        # other shapes and mixtures go by way of Python below
    typed = None if wanted is None else _lenient(wanted)
    for type_ in dict.fromkeys((typed, None)):
        try:
            return _storable(pa.array(values, type=type_))
        except FAILURES:
            pass
    values = [plain(value) for value in values]
    problem: BaseException
    last = typed
    if wanted is not None and (not pa.types.is_integer(wanted) or _are_whole(values)):
        last = wanted
    for type_ in dict.fromkeys((typed, None, last)):
        try:
            return _storable(pa.array(values, type=type_))
        except FAILURES as error:
            problem = error
    raise _bad_value(values, name, wanted, first_row, problem) from problem


def plain(value: Any) -> Any:
    """`value` with only such parts as Arrow knows: enums by value, arrays as lists, and so on.

    Examples
    --------
    >>> import pathlib
    >>> plain({"path": pathlib.PurePosixPath("a"), "v": pa.array([1.0, 1.0])})
    {'path': 'a', 'v': [1.0, 1.0]}
    """
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if value is None or isinstance(value, str | bytes | int | float):
        return value
    if is_model(value):
        return plain(value.model_dump())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if is_scalar(value):
        return value
    if is_array(value):
        return host_array(value).tolist()
    if isinstance(value, pa.Scalar):
        return value.as_py()
    if isinstance(value, pa.Array | pa.ChunkedArray):
        return value.to_pylist()
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "to_list"):  # a pandas or polars series as one vector
        return plain(value.to_list())
    return value


def type_of(name: str, schema: pa.Schema | None) -> pa.DataType | None:
    """The type of that column in the schema, if it has it."""
    if schema is None or schema.get_field_index(name) < 0:
        return None
    return schema.field(name).type


def _storable(array: pa.Array | pa.ChunkedArray) -> pa.Array:
    """One array, since values of over 2 GB come in several chunks."""
    if not isinstance(array, pa.ChunkedArray):
        return array
    if pa.types.is_string(array.type):
        array = array.cast(pa.large_utf8())
    elif pa.types.is_binary(array.type):
        array = array.cast(pa.large_binary())
    return array.combine_chunks()


def _lenient(wanted: pa.DataType) -> pa.DataType | None:
    """The type to convert to so that nothing is lost on the way; None to infer it.

    Arrow cuts 1.5 to 1 when told to make integers, and so these are inferred and then cast. A
    vector of a wrong length must survive until the check for bad vectors.
    """
    if _has_integers(wanted) or isinstance(wanted, pa.BaseExtensionType):
        return None
    if pa.types.is_fixed_size_list(wanted):
        return pa.list_(wanted.value_field)
    return wanted


def _are_whole(values: Iterable[Any]) -> bool:
    """Whether all are integers or None, so that Arrow has nothing to cut off."""
    return all(value is None or isinstance(value, int | np.integer) for value in values)


def _has_integers(type_: pa.DataType) -> bool:
    if pa.types.is_integer(type_):
        return True
    if pa.types.is_struct(type_):
        # extra fields of a row would be dropped in silence, too
        return True
    return is_list_like(type_) and _has_integers(type_.value_type)


def _bad_value(
    values: list[Any],
    name: str,
    wanted: pa.DataType | None,
    first_row: int,
    problem: BaseException,
) -> BadInputError:
    row = first_failure(len(values), lambda start, stop: pa.array(values[start:stop], type=wanted))
    if row is None:
        row = first_failure(len(values), lambda start, stop: pa.array(values[start:stop])) or 0
    value = values[row]
    where = f"Row {first_row + row}, column {name!r}"
    if isinstance(problem, UnicodeEncodeError) or _has_surrogate(value):
        return BadInputError(
            f"{where}: the text holds a lone surrogate, which UTF-8 cannot store. Clean it with "
            "text.encode('utf-8', 'replace').decode()."
        )
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    target = f"wanted {wanted}" if wanted is not None else "Arrow has no type for this column"
    return BadInputError(
        f"{where}: got {shorten(value)} of type {kind}, {target} "
        f"({str(problem).splitlines()[0].rstrip('.')})."
    )


def _has_surrogate(value: Any) -> bool:
    if isinstance(value, str):
        return lone_surrogate(value) is not None
    if isinstance(value, Mapping):
        return any(_has_surrogate(item) for item in value.values())
    if isinstance(value, list):
        return any(_has_surrogate(item) for item in value)
    return False
