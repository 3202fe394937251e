"""Turning a result into what the caller works with."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from gpu_lance.errors import MissingExtraError, QueryError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import lance
    import numpy as np
    import pandas as pd
    import polars as pl

T = TypeVar("T")


def flattened(table: pa.Table, flatten: int | bool | None) -> pa.Table:
    """Struct columns as one column for each of their fields.

    Parameters
    ----------
    table : pyarrow.Table
    flatten : int, bool or None
        True for all levels, a number for as many, False or None for none.

    Raises
    ------
    QueryError
        If a number is below 1.

    Examples
    --------
    >>> flattened(pa.table({"s": [{"a": 1}]}), True).column_names
    ['s.a']
    """
    if flatten is None or flatten is False:
        return table
    if flatten is not True and flatten < 1:
        raise QueryError(f"flatten is {flatten}; it must be True or a number of levels from 1 on.")
    levels = -1 if flatten is True else int(flatten)
    while levels and any(pa.types.is_struct(field.type) for field in table.schema):
        table = table.flatten()
        levels -= 1
    return table


def to_pandas(
    table: pa.Table,
    flatten: int | bool | None = None,
    blobs: Mapping[str, list[Any]] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """A pandas DataFrame; each vector is a numpy array.

    Parameters
    ----------
    table : pyarrow.Table
    flatten : int, bool or None
        See :func:`flattened`.
    blobs : mapping of str to list, optional
        Values to put in the place of a blob column's descriptions.
    **options
        For ``pyarrow.Table.to_pandas``.

    Raises
    ------
    MissingExtraError
        If pandas is not installed.
    """
    pandas = _installed("pandas")
    for name in blobs or {}:
        place = table.column_names.index(name)
        table = table.set_column(place, name, pa.nulls(table.num_rows))
    frame = flattened(table, flatten).to_pandas(**options)
    for name, values in (blobs or {}).items():
        frame[name] = pandas.Series(values, index=frame.index, dtype=object)
    return frame


def blob_columns(schema: pa.Schema, names: Sequence[str]) -> list[str]:
    """Those of the columns that Lance stores as blobs and returns as descriptions."""
    known = set(schema.names)
    return [name for name in names if name in known and _is_blob(schema.field(name))]


def fetch_blobs(
    dataset: lance.LanceDataset, row_ids: np.ndarray, columns: Sequence[str], as_bytes: bool
) -> dict[str, list[Any]]:
    """The blobs of those rows, as files to read from or as bytes; None where one is null."""
    ids = row_ids.tolist()
    found = {name: dataset.take_blobs(name, ids=ids) if ids else [] for name in columns}
    if not as_bytes:
        return found
    return {
        name: [None if file is None else file.readall() for file in files]
        for name, files in found.items()
    }


def _is_blob(field: pa.Field) -> bool:
    marked = (field.metadata or {}).get(b"lance-encoding:blob") == b"true"
    return marked or getattr(field.type, "extension_name", None) == "lance.blob.v2"


def to_polars(table: pa.Table) -> pl.DataFrame:
    """A polars DataFrame.

    Raises
    ------
    MissingExtraError
        If polars is not installed.
    """
    return _installed("polars").from_arrow(table)


def to_pydantic(table: pa.Table, model: type[T]) -> list[T]:
    """One instance of the model for each row."""
    return [model(**row) for row in table.to_pylist()]


def to_batches(table: pa.Table, batch_size: int | None) -> pa.RecordBatchReader:
    """A reader over the table in batches of at most that many rows."""
    batches = table.to_batches(max_chunksize=batch_size)
    return pa.RecordBatchReader.from_batches(table.schema, batches)


def _installed(module: str) -> Any:
    """The module, which no extra brings: whoever asks for its tables has it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise MissingExtraError(
            f"{module} is not installed. To get it: pip install {module}"
        ) from error
