"""Data that comes column by column: dicts of columns and pandas DataFrames."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from gpu_lance.errors import BadInputError
from gpu_lance.ingest.arrays import array_to_arrow, host_array, is_array
from gpu_lance.ingest.infer import infer_types
from gpu_lance.ingest.rows import column_to_arrow, type_of


@dataclass(frozen=True)
class Opened:
    """Batches of at most `max_rows` rows, made as they are asked for.

    Parameters
    ----------
    batches : iterator of pyarrow.RecordBatch
        Typed as the data says, batch by batch.
    num_rows : int, optional
        None where only reading can tell.
    schema : pyarrow.Schema, optional
        What the data itself declares.
    model : bool
        Whether a LanceModel declares it: it is then the table's schema, word for word.
    known : pyarrow.Schema, optional
        Types of columns of Python values that were all at hand.
    """

    batches: Iterator[pa.RecordBatch]
    num_rows: int | None = None
    schema: pa.Schema | None = None
    model: bool = False
    known: pa.Schema | None = None


def open_columns(data: Mapping[str, Any], schema: pa.Schema | None, max_rows: int) -> Opened:
    columns: dict[str, Any] = {}
    for name, values in data.items():
        if not isinstance(name, str):
            raise BadInputError(f"Column names are strings, got {name!r}.")
        if values is None or isinstance(values, str | bytes | int | float | Mapping):
            raise BadInputError(
                f"Column {name!r} of the dict is a {type(values).__name__}, not a column. A single "
                "row goes into a list: [row]."
            )
        columns[name] = _column(values, name)
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name!r} {length}" for name, length in lengths.items())
        raise BadInputError(f"The columns have different lengths: {listed}.")
    num_rows = next(iter(lengths.values()), 0)
    if not columns or num_rows == 0:
        return Opened(iter(()), 0)
    return _open_arrays(columns, num_rows, schema, max_rows)


def _column(values: Any, name: str) -> Any:
    """A whole column that can be sliced: an Arrow array, or a list of Python values."""
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    if is_array(values):
        if values.ndim == 0:
            raise BadInputError(f"Column {name!r} is an array without rows (0-d).")
        column = array_to_arrow(values)
        return list(host_array(values)) if column is None else column
    if type(values).__module__.split(".")[0] == "polars" and hasattr(values, "to_arrow"):
        return values.to_arrow()
    if type(values).__module__.split(".")[0] == "pandas" and hasattr(values, "iloc"):
        return _pandas_column(values)
    if not isinstance(values, Iterable):
        raise BadInputError(f"Column {name!r} is a {type(values).__name__}, not a column.")
    return list(values)


def _open_arrays(
    columns: dict[str, Any], num_rows: int, schema: pa.Schema | None, max_rows: int
) -> Opened:
    known = None
    if schema is None and num_rows > max_rows:
        python = {name: values for name, values in columns.items() if isinstance(values, list)}
        known = infer_types(python, max_rows)
    return Opened(_column_batches(columns, num_rows, schema, max_rows), num_rows, known=known)


def _column_batches(
    columns: dict[str, Any], num_rows: int, schema: pa.Schema | None, max_rows: int
) -> Iterator[pa.RecordBatch]:
    for start in range(0, num_rows, max_rows):
        arrays = []
        for name, values in columns.items():
            part = values[start : start + max_rows]
            if isinstance(part, pa.ChunkedArray):
                part = part.chunk(0) if part.num_chunks == 1 else part.combine_chunks()
            elif not isinstance(part, pa.Array):
                part = column_to_arrow(part, name, type_of(name, schema), start)
            arrays.append(part)
        yield pa.RecordBatch.from_arrays(arrays, names=list(columns))


def open_pandas(frame: Any, schema: pa.Schema | None, max_rows: int) -> Opened:
    """Open a pandas DataFrame without its index.

    Examples
    --------
    >>> import pandas as pd
    >>> opened = open_pandas(pd.DataFrame({"a": [1.0, float("nan")]}), None, 10)
    >>> next(opened.batches).column("a").to_pylist()
    [1.0, None]
    """
    names = [str(name) for name in frame.columns]
    columns = {name: _pandas_column(frame.iloc[:, i]) for i, name in enumerate(names)}
    if len(columns) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise BadInputError(f"The DataFrame has more than one column {', '.join(twice)}.")
    if not columns or len(frame) == 0:
        declared = pa.Schema.from_pandas(frame, preserve_index=False).remove_metadata()
        return Opened(iter(()), 0, declared if len(declared) else None)
    return _open_arrays(columns, len(frame), schema, max_rows)


def _pandas_column(series: Any) -> Any:
    """Arrow for a column with a dtype; Python values, in which NaN is null, for one of objects."""
    if series.dtype != np.dtype(object):
        return pa.array(series, from_pandas=True)
    return [None if _is_missing(value) else value for value in series]


def _is_missing(value: Any) -> bool:
    if isinstance(value, float):
        return value != value
    return value is None or type(value).__name__ in ("NAType", "NaTType")
