"""New values for stored rows, with the vectors of changed sources made again."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gpu_lance.errors import GpuLanceError, QueryError, SchemaError
from gpu_lance.ingest.align import fit_column
from gpu_lance.ingest.lists import valid_rows
from gpu_lance.ingest.read import MAX_ROWS
from gpu_lance.ingest.rows import column_to_arrow
from gpu_lance.ingest.vector_column import VectorColumn
from gpu_lance.lance_errors import batches_of, first_line
from gpu_lance.storage import ChangedRows
from gpu_lance.types import free_name

BEFORE = "__before_"


def touched(columns: list[VectorColumn], names: set[str]) -> list[VectorColumn]:
    """The vector columns that follow from a change of the columns `names`."""
    return [
        column
        for column in columns
        if column.function is not None
        and names.intersection(column.sources)
        and column.name not in names
    ]


def rewritten(
    base: lance.LanceDataset,
    where: str | None,
    values: Mapping[str, Any],
    values_sql: Mapping[str, str],
    follow: list[VectorColumn],
    changed: ChangedRows,
) -> Iterator[pa.RecordBatch]:
    """The rows for which `where` holds, with new values; vectors to be made again are null.

    Parameters
    ----------
    base : lance.LanceDataset
        The version to read.
    where : str or None
    values, values_sql : mapping
        New values by column: Python values, or SQL expressions over the old row.
    follow : list of VectorColumn
        Vector columns whose source gets new values: null where the source really changes.
    changed : ChangedRows
        Filled with the rows as they are read.

    Raises
    ------
    SchemaError
        For a column that the table does not have.
    QueryError
        If Lance does not understand the condition or an expression.
    """
    schema = base.schema
    for name in [*values, *values_sql]:
        if name not in schema.names:
            raise SchemaError(
                f"The table has no column {name!r} to update; it has {', '.join(schema.names)}."
            )
    columns = {name: values_sql.get(name, quoted(name)) for name in schema.names}
    sources = {name for column in follow for name in column.sources}
    before = {
        name: free_name(BEFORE + name, schema.names) for name in sources if name in values_sql
    }
    columns.update({before[name]: quoted(name) for name in before})
    try:
        scan = functools.partial(
            base.to_batches,
            columns=columns,
            filter=where,
            with_row_id=True,
            with_row_address=True,
            batch_size=MAX_ROWS,
        )
        for batch in batches_of(scan):
            if batch.num_rows:
                yield _changed(batch, schema, values, follow, before, changed)
    except GpuLanceError:
        raise
    except (OSError, ValueError) as error:
        raise QueryError(f"The update cannot be run: {first_line(error)}") from error


def quoted(name: str) -> str:
    """A column's name as SQL.

    Examples
    --------
    >>> quoted("my column")
    '`my column`'
    """
    return "`" + name.replace("`", "``") + "`"


def _changed(
    batch: pa.RecordBatch,
    schema: pa.Schema,
    values: Mapping[str, Any],
    follow: list[VectorColumn],
    before: Mapping[str, str],
    changed: ChangedRows,
) -> pa.RecordBatch:
    n = batch.num_rows
    changed.add(batch.column("_rowid"), batch.column("_rowaddr"))
    arrays = []
    for field in schema:
        array = batch.column(field.name)
        if field.name in values:
            one = column_to_arrow([values[field.name]], field.name, field.type)
            array = fit_column(one, field).take(pa.array(np.zeros(n, np.int64)))
        elif array.type != field.type:
            array = fit_column(array, field)
        arrays.append(array)
    for column in follow:
        at = schema.get_field_index(column.name)
        same = np.ones(n, bool)
        for source in column.sources:
            new = arrays[schema.get_field_index(source)]
            same &= _same(batch.column(before.get(source, source)), new)
        arrays[at] = pc.if_else(pa.array(same), arrays[at], pa.nulls(n, column.type))
    return pa.RecordBatch.from_arrays(arrays, names=schema.names)


def _same(old: pa.Array, new: pa.Array) -> np.ndarray:
    """(n,) bool: where the source is what it was, null counting as a value."""
    both = valid_rows(old) & valid_rows(new)
    neither = ~valid_rows(old) & ~valid_rows(new)
    try:
        equal = pc.fill_null(pc.equal(old, new.cast(old.type)), False)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):  # no order on such values
        return neither
    return np.asarray(equal.to_numpy(zero_copy_only=False) & both | neither, dtype=bool)
