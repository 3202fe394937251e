"""Which vector column a search means."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from gpu_lance.errors import QueryError, UnknownColumnError

if TYPE_CHECKING:
    from collections.abc import Collection


def vector_columns(schema: pa.Schema) -> dict[str, int]:
    """The columns that hold vectors, and their length; multivector columns among them.

    Examples
    --------
    >>> vector_columns(pa.schema({"id": pa.int64(), "v": pa.list_(pa.float32(), 3)}))
    {'v': 3}
    """
    found = {field.name: _ndims(field.type) for field in schema}
    return {name: ndims for name, ndims in found.items() if ndims is not None}


def choose_column(
    schema: pa.Schema, named: str | None, ndims: int | None, embedded: Collection[str]
) -> str:
    """The vector column to search.

    Parameters
    ----------
    schema : pyarrow.Schema
    named : str or None
        The column that the caller named.
    ndims : int or None
        Length of the query vectors; None for items, which are embedded.
    embedded : collection of str
        The vector columns that have an embedding function.

    Returns
    -------
    str
        A column of float vectors whose length is `ndims`, with an embedding function if that is
        None.

    Raises
    ------
    UnknownColumnError
        If the named column is not there.
    QueryError
        If no column fits, or more than one does and none was named.

    Examples
    --------
    >>> schema = pa.schema({"a": pa.list_(pa.float32(), 2), "b": pa.list_(pa.float32(), 3)})
    >>> choose_column(schema, None, 3, ())
    'b'
    """
    columns = vector_columns(schema)
    column = named if named is not None else _only(columns, ndims)
    if column not in schema.names:
        raise UnknownColumnError(
            f"There is no column {column!r} to search; the table has "
            f"{', '.join(schema.names) or 'none'}."
        )
    kind = schema.field(column).type
    if column not in columns:
        raise QueryError(
            f"Column {column!r} is {kind}, which holds no vectors"
            + (f"; the vector columns are {', '.join(columns)}." if columns else ".")
        )
    if not pa.types.is_floating(_vector_type(kind).value_type):
        raise QueryError(
            f"Column {column!r} is {kind}, which cannot be searched yet: this version searches "
            "vectors of floats."
        )
    if ndims is None and column not in embedded:
        raise QueryError(
            f"No embedding function for {column!r}, so only vectors can be searched there, and "
            "full-text search is not available yet. Pass a vector, or make the table with an "
            "embedding function for the column."
        )
    if ndims is not None and ndims != columns[column]:
        raise QueryError(
            f"The query has {ndims} dimensions and column {column!r} has {columns[column]}."
        )
    return column


def _only(columns: dict[str, int], ndims: int | None) -> str:
    if not columns:
        raise QueryError(
            "The table has no vector column (a fixed-size list of floats, or a list of such "
            "lists), so there is nothing to search."
        )
    fitting = [name for name, length in columns.items() if ndims in (None, length)]
    if len(columns) == 1:
        return next(iter(columns))
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        each = ", ".join(f"{name!r} has {length}" for name, length in columns.items())
        raise QueryError(f"The query has {ndims} dimensions, and no vector column does: {each}.")
    names = " and ".join(repr(name) for name in fitting)
    raise QueryError(
        f"There is more than one vector column, {names}: name one, as in search(query, "
        f"vector_column_name={fitting[0]!r})."
    )


def takes_several(schema: pa.Schema, named: str | None) -> bool:
    """Whether the named column, or the only vector column, has any number of vectors a row.

    Examples
    --------
    >>> takes_several(pa.schema({"v": pa.list_(pa.list_(pa.float32(), 3))}), None)
    True
    """
    columns = list(vector_columns(schema)) if named is None else [named]
    return (
        len(columns) == 1
        and columns[0] in schema.names
        and pa.types.is_list(schema.field(columns[0]).type)
    )


def _vector_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_list(kind) else kind


def _ndims(kind: pa.DataType) -> int | None:
    kind = _vector_type(kind)
    if not pa.types.is_fixed_size_list(kind):
        return None
    values = kind.value_type
    vector = pa.types.is_floating(values) or pa.types.is_uint8(values)
    return int(kind.list_size) if vector else None
