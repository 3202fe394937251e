"""Every kind of data that a table takes, as a stream of record batches.

Objects of optional libraries are told by the module of their class, so that none is imported.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.dataset

from gpu_lance.errors import BadInputError, SchemaTypeError, UnsupportedDataError
from gpu_lance.ingest.arrays import is_array
from gpu_lance.ingest.columns import Opened, open_columns, open_pandas
from gpu_lance.ingest.infer import infer_types
from gpu_lance.ingest.rows import (
    column_names,
    is_model,
    is_row,
    row_values,
    rows_to_batch,
)

KINDS = (
    "a list of dicts or LanceModels, a dict of columns, a pandas or polars DataFrame, a pyarrow "
    "Table, RecordBatch, RecordBatchReader, Dataset or Scanner, a Lance dataset, a Hugging Face "
    "Dataset or DatasetDict, or an iterator of any of these"
)


def open_data(data: Any, schema: pa.Schema | None, max_rows: int) -> Opened:
    """Find out what `data` is; see :func:`gpu_lance.ingest.read.read`.

    Examples
    --------
    >>> [batch.num_rows for batch in open_data([{"a": i} for i in range(5)], None, 2).batches]
    [2, 2, 1]
    """
    if isinstance(data, pa.RecordBatch):
        data = pa.Table.from_batches([data])
    if isinstance(data, pa.Table):
        return Opened(_table_batches(data, max_rows), data.num_rows, data.schema)
    if isinstance(data, pa.RecordBatchReader):
        return Opened(_split(data, max_rows), None, data.schema)
    if isinstance(data, pa.dataset.Dataset):  # a Lance dataset is one
        # read-ahead counts in whole row groups, and so it decides how much memory is taken
        options: dict[str, Any] = {"batch_size": max_rows, "batch_readahead": 2}
        reader = data.scanner(**options, fragment_readahead=1).to_reader()
        return Opened(_split(reader, max_rows), data.count_rows(), reader.schema)
    if isinstance(data, pa.dataset.Scanner):
        reader = data.to_reader()
        return Opened(_split(reader, max_rows), None, reader.schema)
    library, kind = type(data).__module__.split(".")[0], type(data).__name__
    if library == "polars" and kind == "DataFrame":
        return open_data(data.to_arrow(), schema, max_rows)
    if library == "polars" and kind == "LazyFrame":
        frames = data.collect_batches(chunk_size=max_rows, maintain_order=True)
        return Opened(_item_batches(iter(frames), schema, max_rows))
    if library == "pandas" and kind == "DataFrame":
        return open_pandas(data, schema, max_rows)
    if library == "datasets" and isinstance(data, dict):
        return _open_splits(data, schema, max_rows)
    if library == "datasets" and hasattr(data, "with_format") and hasattr(data, "__len__"):
        # not data.data, which knows nothing of a shuffle or a selection
        tables = data.with_format("arrow").iter(batch_size=max_rows)
        return Opened(
            _item_batches(tables, schema, max_rows), len(data), data.features.arrow_schema
        )
    if is_model(data):
        raise BadInputError(f"One {kind} is not a list of rows: pass [{kind.lower()}].")
    if isinstance(data, Mapping):
        return open_columns(data, schema, max_rows)
    if isinstance(data, list | tuple):
        return _open_list(data, schema, max_rows)
    if hasattr(data, "__arrow_c_stream__"):
        return open_data(pa.RecordBatchReader.from_stream(data), schema, max_rows)
    unfit = isinstance(data, str | bytes | bytearray | memoryview | type) or is_array(data)
    if unfit or not isinstance(data, Iterable):
        hint = " Name its column: {'vector': array}." if is_array(data) else ""
        raise UnsupportedDataError(
            f"Data of type {type(data).__name__} cannot be read into a table.{hint} It takes "
            f"{KINDS}."
        )
    iterator = iter(data)
    first = next(iterator, None)
    declared = _model_schema(first) if schema is None else None
    items = iterator if first is None else itertools.chain([first], iterator)
    batches = _item_batches(items, declared if schema is None else schema, max_rows)
    return Opened(batches, None, declared, declared is not None)


def _table_batches(table: pa.Table, max_rows: int) -> Iterator[pa.RecordBatch]:
    for start in range(0, table.num_rows, max_rows):
        # slices share the table's memory; only rows at the edge of two chunks are copied
        yield from table.slice(start, max_rows).combine_chunks().to_batches()


def _split(batches: Iterable[pa.RecordBatch], max_rows: int) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        for start in range(0, batch.num_rows, max_rows):
            yield batch.slice(start, max_rows)


def _open_list(data: Any, schema: pa.Schema | None, max_rows: int) -> Opened:
    if not data:
        return Opened(iter(()), 0)
    if not is_row(data[0]):
        return Opened(_item_batches(iter(data), schema, max_rows))
    if schema is None and (declared := _model_schema(data[0])) is not None:
        return Opened(_item_batches(iter(data), declared, max_rows), len(data), declared, True)
    names, known = None, None
    if schema is None and len(data) > max_rows and isinstance(data[0], Mapping):
        # the rows are all here: no need to let the first ones decide
        for position, row in enumerate(data):
            row_values(row, position)
        names = column_names(data, 0)
        known = infer_types({name: [row.get(name) for row in data] for name in names}, max_rows)
    rows = all(is_row(item) for item in data)
    batches = _item_batches(iter(data), schema, max_rows, names)
    return Opened(batches, len(data) if rows else None, known=known)


def _model_schema(row: Any) -> pa.Schema | None:
    """The Arrow schema of a LanceModel's class."""
    if not is_model(row) or not hasattr(type(row), "to_arrow_schema"):
        return None
    return type(row).to_arrow_schema()


def _item_batches(
    items: Iterator[Any], schema: pa.Schema | None, max_rows: int, names: list[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Rows are gathered into batches; lists are taken apart; tables pass on in their order."""
    rows: list[Any] = []
    done = 0
    for item in items:
        for part in item if isinstance(item, list | tuple) else (item,):
            if type(part) is dict or (is_row(part) and not _is_splits(part)):
                rows.append(part)
                if len(rows) == max_rows:
                    yield rows_to_batch(rows, schema, done, names)
                    done += len(rows)
                    rows = []
                continue
            if part is None or isinstance(part, str | bytes | int | float) or is_array(part):
                row_values(part, done + len(rows))  # raises: it says which row is no row
            if rows:
                yield rows_to_batch(rows, schema, done, names)
                done += len(rows)
                rows = []
            for batch in open_data(part, schema, max_rows).batches:
                yield batch
                done += batch.num_rows
    if rows:
        yield rows_to_batch(rows, schema, done, names)


def _is_splits(part: Any) -> bool:
    return isinstance(part, dict) and type(part).__module__.split(".")[0] == "datasets"


def _open_splits(data: dict[str, Any], schema: pa.Schema | None, max_rows: int) -> Opened:
    opened = {name: open_data(part, schema, max_rows) for name, part in data.items()}
    declared = [part.schema for part in opened.values() if part.schema is not None]
    if any(other != declared[0] for other in declared[1:]):
        raise SchemaTypeError(
            "The splits of the DatasetDict have different schemas; add them one by one."
        )
    counts = [part.num_rows for part in opened.values()]
    total = None if None in counts else sum(count for count in counts if count is not None)
    batches = (_with_split(batch, name) for name, part in opened.items() for batch in part.batches)
    first = declared[0] if declared else None
    if first is not None and "split" not in first.names:
        first = first.append(pa.field("split", pa.utf8()))
    return Opened(batches, total, first)


def _with_split(batch: pa.RecordBatch, name: str) -> pa.RecordBatch:
    if "split" in batch.schema.names:
        return batch
    return batch.append_column("split", pa.array([name] * batch.num_rows, pa.utf8()))
