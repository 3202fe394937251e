"""How a search runs: embed, find the nearest rows on the device, fetch them from Lance.

Everything is asked of one dataset handle, so that the index and the rows that are returned belong
to one version. Vectors in the results stay in Arrow's memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import numpy as np
import pyarrow as pa
from lance.dataset import ColumnOrdering as LanceOrdering

from gpu_lance.errors import EmbeddingError, QueryTimeoutError
from gpu_lance.query.inputs import QueryVectors, check_finite
from gpu_lance.query.messages import refused
from gpu_lance.query.projection import (
    DISTANCE,
    QUERY_INDEX,
    ROW_ID,
    Projection,
    project,
)
from gpu_lance.query.scratch import Scratch, mentioned, take
from gpu_lance.query.sql import words

if TYPE_CHECKING:
    import lance

    from gpu_lance.index import ColumnIndex, MultiColumnIndex
    from gpu_lance.query.source import SearchTarget
    from gpu_lance.query.spec import QuerySpec, VectorSpec

_COMPUTED_FIELDS = {
    QUERY_INDEX: pa.field(QUERY_INDEX, pa.int32(), nullable=False),
    DISTANCE: pa.field(DISTANCE, pa.float32()),
    ROW_ID: pa.field(ROW_ID, pa.uint64()),
}


class Deadline:
    """When a search must be done; looked at between its stages.

    Parameters
    ----------
    seconds : float or None
        None never expires.

    Examples
    --------
    >>> Deadline(None).check("searching")
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._end = None if seconds is None else time.monotonic() + seconds

    def check(self, doing: str) -> None:
        """Raise if the time is up.

        Raises
        ------
        QueryTimeoutError
        """
        if self._end is not None and time.monotonic() >= self._end:
            raise QueryTimeoutError(
                f"The search was not done after its timeout of {self.seconds} s; it was {doing}."
            )


@dataclass(frozen=True)
class Found:
    """The rows that a search found, query by query, nearest first.

    Parameters
    ----------
    row_ids : numpy.ndarray
        (n,) int64.
    distances : numpy.ndarray
        (n,) float32.
    query_index : numpy.ndarray
        (n,) int32, ascending.
    """

    row_ids: np.ndarray
    distances: np.ndarray
    query_index: np.ndarray

    def __len__(self) -> int:
        return len(self.row_ids)

    @classmethod
    def none(cls) -> Found:
        """No row."""
        return cls(np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.int32))

    def at(self, places: np.ndarray) -> Found:
        """The rows at those places."""
        return Found(self.row_ids[places], self.distances[places], self.query_index[places])

    def page(self, offset: int, limit: int) -> Found:
        """Of each query, `limit` rows after the first `offset`."""
        starts = np.searchsorted(self.query_index, self.query_index, side="left")
        rank = np.arange(len(self)) - starts
        return self.at(np.flatnonzero((rank >= offset) & (rank - offset < limit)))


@dataclass
class Report:
    """What a search did, for `explain_plan` and `analyze_plan`.

    Parameters
    ----------
    version : int
        Of the table.
    k : int
        How many rows the index was asked for, of each query.
    found, returned : int
        Rows before and after a filter on the result, and paging.
    seconds : dict of str to float
        By stage.
    """

    version: int = 0
    k: int = 0
    found: int = 0
    returned: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """The result of a vector search, and what is needed to go on from it.

    Parameters
    ----------
    table : pyarrow.Table
    row_ids : numpy.ndarray
        (n,) int64, of the table's rows.
    dataset : lance.LanceDataset
        At the version that was searched.
    queries : QueryVectors
        For another run of the same queries.
    report : Report
    """

    table: pa.Table
    row_ids: np.ndarray
    dataset: lance.LanceDataset
    queries: QueryVectors
    report: Report


def embed(target: SearchTarget, spec: VectorSpec) -> QueryVectors:
    """The query vectors on the target's device.

    Raises
    ------
    QueryError
        If a value is not finite.
    EmbeddingError
        If the embedding function gives another number of vectors.
    """
    if spec.queries.items is None:
        return QueryVectors(spec.queries.tensor(target.device), spec.queries.offsets)
    made = target.embed_query(spec.column, spec.queries.items)
    if len(made) != len(spec.queries):
        raise EmbeddingError(
            f"The embedding function of {spec.column!r} gave vectors of {len(made)} queries for "
            f"{len(spec.queries)}."
        )
    check_finite(made.vectors)
    return QueryVectors(made.vectors, made.offsets)


def nearest(
    target: SearchTarget,
    dataset: lance.LanceDataset,
    spec: VectorSpec,
    queries: QueryVectors,
    report: Report,
) -> Found:
    """The nearest rows of each query, filtered, ordered and paged."""
    rows = dataset.count_rows()
    limit = rows if spec.limit is None else spec.limit
    # the clamp keeps a limit of a billion from reserving room for as many
    k = report.k = max(1, min(limit + spec.offset, rows))
    index = target.column_index(spec.column, dataset)
    where = spec.where if spec.prefilter else None
    if queries.offsets is None:
        result = cast("ColumnIndex", index).search(
            dataset, queries.vectors, k, spec.metric,
            where=where, lower=spec.lower, upper=spec.upper, pad=False,
        )  # fmt: skip
    else:
        result = cast("MultiColumnIndex", index).search(
            dataset, queries.vectors, queries.offsets, k, spec.metric,
            where=where, lower=spec.lower, upper=spec.upper, pad=False,
        )  # fmt: skip
    report.version = dataset.version
    counts = result.counts
    kept = result.row_ids >= 0
    found = Found(
        result.row_ids[kept],
        result.distances[kept],
        np.repeat(np.arange(len(counts), dtype=np.int32), counts),
    )
    report.found = len(found)
    where = None if spec.prefilter else spec.where
    if where is not None or spec.order_by:
        scratch = Scratch(
            dataset, found.row_ids, found.distances, found.query_index,
            mentioned(where, spec.order_by), spec.queries.batch,
        )  # fmt: skip
        found = found.at(scratch.places(where, spec.order_by))
    return found.page(spec.offset, limit) if spec.offset or len(found) > limit else found


def search(
    target: SearchTarget, spec: VectorSpec, queries: QueryVectors | None, deadline: Deadline
) -> Outcome:
    """Run a vector search.

    Parameters
    ----------
    target : SearchTarget
    spec : VectorSpec
    queries : QueryVectors or None
        Of an earlier run of the same queries.
    deadline : Deadline

    Returns
    -------
    Outcome

    Raises
    ------
    QueryError
        If what was asked for does not fit the table.
    QueryTimeoutError
        If the deadline passes.
    """
    report = Report()
    start = time.perf_counter()
    dataset = target.dataset()
    projection = projection_of(spec, dataset)
    if queries is None:
        queries = embed(target, spec)
        start = _lap(report, "embed", start)
        deadline.check("embedding the query")
    found = nearest(target, dataset, spec, queries, report)
    start = _lap(report, "search", start)
    deadline.check("searching the index")
    table = fetch(dataset, found, projection)
    _lap(report, "fetch", start)
    deadline.check("fetching rows from Lance")
    report.returned = table.num_rows
    return Outcome(table, found.row_ids, dataset, queries, report)


def projection_of(spec: VectorSpec, dataset: lance.LanceDataset) -> Projection:
    """The projection of a vector search.

    Raises
    ------
    QueryError
        If the dataset has no such column.
    """
    return project(
        spec.columns, dataset.schema,
        row_id=spec.row_id, distance=True, query_index=spec.queries.batch,
    )  # fmt: skip


def fetch(dataset: lance.LanceDataset, found: Found, projection: Projection) -> pa.Table:
    """The rows as a table, in the order in which they were found.

    Parameters
    ----------
    dataset : lance.LanceDataset
        At the version that was searched.
    found : Found
    projection : Projection
    """
    if projection.late and isinstance(projection.read, dict):
        scratch = Scratch(
            dataset, found.row_ids, found.distances, found.query_index,
            set().union(*(words(text) for text in projection.read.values())),
            QUERY_INDEX in projection.computed,
        )  # fmt: skip
        table = scratch.evaluate(projection.read)
    else:
        table = take(dataset, found.row_ids, projection.read)
    columns, fields = [], []
    for name in projection.output:
        if name == DISTANCE and name in projection.computed:
            columns.append(pa.chunked_array([pa.array(found.distances)]))
        elif name == QUERY_INDEX and name in projection.computed:
            columns.append(pa.chunked_array([pa.array(found.query_index)]))
        elif name == ROW_ID and name in projection.computed:
            columns.append(pa.chunked_array([pa.array(found.row_ids.astype(np.uint64))]))
        else:
            columns.append(table[name])
            fields.append(table.schema.field(name))
            continue
        fields.append(_COMPUTED_FIELDS[name])
    schema = pa.schema(fields, metadata=dataset.schema.metadata)
    return pa.Table.from_arrays(columns, schema=schema)


def scan(
    dataset: lance.LanceDataset, spec: QuerySpec, batch_size: int | None, deadline: Deadline
) -> pa.RecordBatchReader:
    """The rows of a table that meet a condition, without a search.

    Raises
    ------
    QueryError
        If what was asked for does not fit the table.
    QueryTimeoutError
        While reading, if the deadline passes.
    """
    scanner = scanner_of(dataset, spec, batch_size)
    schema = scan_schema(dataset, spec, scanner)
    names = dataset.schema.names
    with refused("query", names):
        reader = scanner.to_reader()

    def batches() -> Iterator[pa.RecordBatch]:
        while True:
            deadline.check("reading rows from Lance")
            try:
                with refused("query", names):
                    batch = reader.read_next_batch()
            except StopIteration:
                return
            yield batch.select(schema.names)

    return pa.RecordBatchReader.from_batches(schema, batches())


def scan_schema(
    dataset: lance.LanceDataset, spec: QuerySpec, scanner: lance.LanceScanner | None = None
) -> pa.Schema:
    """The schema of a scan's result: without the row id, if only the ordering needed it.

    `scanner` is that of the scan, where there is one already.

    Raises
    ------
    QueryError
        If what was asked for does not fit the table.
    """
    scanner = scanner or scanner_of(dataset, spec)
    with refused("query", dataset.schema.names):
        schema = scanner.projected_schema
    if spec.row_id or not spec.order_by or (spec.columns and ROW_ID in spec.columns):
        return schema
    return pa.schema([field for field in schema if field.name != ROW_ID], schema.metadata)


def scanner_of(
    dataset: lance.LanceDataset, spec: QuerySpec, batch_size: int | None = None
) -> lance.LanceScanner:
    """Lance's scanner for a query without vectors.

    Raises
    ------
    QueryError
        If what was asked for does not fit the table.
    """
    projection = project(spec.columns, dataset.schema, row_id=spec.row_id)
    order: list[LanceOrdering | str] = [
        LanceOrdering(key.column_name, ascending=key.ascending, nulls_first=key.nulls_first)
        for key in spec.order_by
    ]
    # Lance orders by a column that is not selected only where it may fetch by row id
    row_id = spec.row_id or (bool(order) and ROW_ID not in projection.output)
    read = projection.read
    with refused("query", dataset.schema.names):
        return dataset.scanner(
            columns=dict(read) if isinstance(read, dict) else list(read),
            filter=spec.where, limit=spec.limit, offset=spec.offset or None,
            with_row_id=row_id, order_by=order or None, batch_size=batch_size,
        )  # fmt: skip


def _lap(report: Report, stage: str, start: float) -> float:
    now = time.perf_counter()
    report.seconds[stage] = now - start
    return now
