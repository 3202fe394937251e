"""The schema that a new table gets from its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from gpu_lance.errors import GpuLanceError
from gpu_lance.ingest.align import fit_column
from gpu_lance.ingest.arrays import is_array
from gpu_lance.ingest.lists import as_list, flat, row_lengths, valid_rows
from gpu_lance.ingest.rows import column_to_arrow


def infer_schema(first: pa.RecordBatch, known: pa.Schema | None = None) -> pa.Schema:
    """The schema of a table made from data that begins with `first`.

    As in LanceDB, a list column with "vector" or "embedding" in its name becomes a fixed-size
    list of its most frequent length: of float32 for floats, of uint8 for integers that fit, else
    of float32. Fixed-size lists keep their type.

    Parameters
    ----------
    first : pyarrow.RecordBatch
        The first rows.
    known : pyarrow.Schema, optional
        Types found by :func:`infer_types`, which knew more rows.

    Examples
    --------
    >>> batch = pa.record_batch({"vector": pa.array([[1.0, 2.0], [3.0, 4.0]])})
    >>> infer_schema(batch).field("vector").type
    FixedSizeListType(fixed_size_list<item: float>[2])
    """
    fields = []
    for field, column in zip(first.schema, first.columns, strict=True):
        if known is not None and known.get_field_index(field.name) >= 0:
            column = fit_column(column, known.field(field.name))
        fields.append(field.with_type(_stored_type(field.name, column)))
    metadata = dict(first.schema.metadata or {})
    metadata.pop(b"pandas", None)  # it describes an index that is not stored
    return pa.schema(fields, metadata=metadata or None)


def infer_types(columns: Mapping[str, Sequence[Any]], head: int) -> pa.Schema:
    """Types that hold for whole columns of Python values, where the first rows may mislead.

    Parameters
    ----------
    columns : mapping of str to sequence
        All values of each column.
    head : int
        The rows of the first batch.

    Returns
    -------
    pyarrow.Schema
        Of the columns that it can tell: integers that turn to floats later, columns that begin
        with nulls or empty lists. Vectors in the first batch speak for themselves, and what
        cannot be told is reported when the row in question is converted.

    Examples
    --------
    >>> infer_types({"x": [1, 2, 2.5]}, head=2).field("x").type
    DataType(double)
    """
    fields = []
    for name, values in columns.items():
        first = next((i for i, value in enumerate(values) if value is not None), None)
        if first is None:
            continue
        try:
            if first >= head:
                probe = column_to_arrow(values[first : first + head], name)
                fields.append(pa.field(name, _stored_type(name, probe)))
            elif not _is_vector(values[first]):
                fields.append(pa.field(name, pa.infer_type(values)))
        except (pa.ArrowException, GpuLanceError, ValueError, TypeError, ArithmeticError):
            continue
    return pa.schema(fields)


def _is_vector(value: Any) -> bool:
    """Whether it is an array, or a list of floats at any depth, for which one look is enough."""
    while isinstance(value, list | tuple) and value:
        value = value[0]
        if isinstance(value, float):
            return True
    return is_array(value)


def _stored_type(name: str, column: pa.Array) -> pa.DataType:
    type_ = column.type
    if pa.types.is_string_view(type_):  # views are a layout for memory
        return pa.utf8()
    if pa.types.is_binary_view(type_):
        return pa.binary()
    if pa.types.is_list_view(type_) or pa.types.is_large_list_view(type_):
        column = as_list(column)
        type_ = column.type
    named = "vector" in name.lower() or "embedding" in name.lower()
    if not named or not (pa.types.is_list(type_) or pa.types.is_large_list(type_)):
        return type_
    lengths = row_lengths(column)[valid_rows(column)]
    lengths = lengths[lengths > 0]
    if not len(lengths):
        return type_
    found, counts = np.unique(lengths, return_counts=True)
    size = int(found[counts.argmax()])
    if pa.types.is_floating(type_.value_type):
        return pa.list_(pa.float32(), size)
    if pa.types.is_integer(type_.value_type):
        numbers = flat(column.flatten())
        small = bool((numbers >= 0).all() and (numbers <= 255).all())
        return pa.list_(pa.uint8() if small else pa.float32(), size)
    return type_
