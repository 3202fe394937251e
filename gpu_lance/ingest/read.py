"""Read any data that a table takes as a stream of small record batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from gpu_lance.errors import BadInputError, SchemaError
from gpu_lance.ingest.align import align
from gpu_lance.ingest.infer import infer_schema
from gpu_lance.ingest.sources import open_data

MAX_ROWS = 8192


@dataclass(frozen=True)
class Source:
    """Data on its way into a table.

    Parameters
    ----------
    schema : pyarrow.Schema
        The columns that the data has: with the types of the schema given to :func:`read` where it
        knows them, else with those that a new table gets.
    batches : iterator of pyarrow.RecordBatch
        Each of 1 to `max_rows` rows. Can be read once.
    num_rows : int or None
        How many rows there are, if that is known beforehand.
    """

    schema: pa.Schema
    batches: Iterator[pa.RecordBatch]
    num_rows: int | None = None


def read(data: Any, schema: pa.Schema | None = None, *, max_rows: int = MAX_ROWS) -> Source:
    """Read `data` in batches, one ahead at most.

    Parameters
    ----------
    data : object
        A list of dicts or LanceModels; a dict of columns (lists, or arrays of numpy, torch or
        cupy on any device, (n, d) for vectors); a pandas or polars DataFrame, a polars LazyFrame;
        a pyarrow Table, RecordBatch, RecordBatchReader, Dataset or Scanner; a Lance dataset; a
        Hugging Face Dataset, or DatasetDict (which gets a column ``split``); or an iterator of
        rows, lists of rows or any of the tables. Vectors in rows may be lists or arrays.
    schema : pyarrow.Schema, optional
        The table's schema. Values are converted towards its types, but the batches need
        :func:`~gpu_lance.ingest.align.align` to have them. Without it the data decides: all of it
        if it is a list or a dict, the first batch if it is a stream, the class if the rows are
        LanceModels; the batches then have ``Source.schema``, but for those of LanceModels, and
        for vector columns with wrong lengths, which stay lists.
    max_rows : int
        Rows of a batch at most.

    Returns
    -------
    Source
        Slices of Arrow data share its memory; Python rows are converted a batch at a time.

    Raises
    ------
    UnsupportedDataError
        A TypeError, for data of another kind.
    BadInputError
        For a value that Arrow cannot take (it names row and column), and for no data without a
        schema. Streams raise it while their batches are read.
    SchemaError
        While batches are read, for a column that does not fit the first batch.

    Examples
    --------
    >>> source = read([{"text": "a", "vector": [1.0, 2.0]}, {"text": "b", "vector": None}])
    >>> source.schema.field("vector").type, source.num_rows
    (FixedSizeListType(fixed_size_list<item: float>[2]), 2)
    >>> next(source.batches).column("text").to_pylist()
    ['a', 'b']
    """
    if max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {max_rows}.")
    opened = open_data(data, schema, max_rows)
    batches: Iterator[pa.RecordBatch] = (part for part in opened.batches if part.num_rows)
    first = next(batches, None)
    declared = schema if schema is not None else opened.schema
    if first is None:
        if declared is None:
            raise BadInputError(
                "There is no data and no schema, so the columns are unknown: pass rows, or a "
                "schema for an empty table."
            )
        return Source(declared, iter(()), 0)
    batches = itertools.chain([first], batches)
    if schema is not None:
        return Source(_known(first.schema, schema), batches, opened.num_rows)
    if opened.model and opened.schema is not None:
        return Source(opened.schema, batches, opened.num_rows)
    target = infer_schema(first, opened.known)
    return Source(target, _conform(batches, target), opened.num_rows)


def _known(found: pa.Schema, schema: pa.Schema) -> pa.Schema:
    fields = [schema.field(field.name) if field.name in schema.names else field for field in found]
    return pa.schema(fields, metadata=schema.metadata)


def _conform(batches: Iterator[pa.RecordBatch], target: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Every batch with the columns of the first one."""
    done = 0
    for batch in batches:
        try:
            fitted = align(batch, target, first_row=done)
        except (BadInputError, SchemaError) as error:
            if done == 0:
                raise
            raise SchemaError(
                f"{error} That is in the rows from {done} on, and the rows before decided the "
                "schema; pass another one if it is to hold both."
            ) from error
        yield fitted
        done += batch.num_rows
