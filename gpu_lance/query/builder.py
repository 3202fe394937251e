"""Builders: a search is described call by call, and runs when its result is asked for."""

from __future__ import annotations

import warnings
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self

from gpu_lance.errors import QueryError, QueryTypeError
from gpu_lance.query import execution, plan, results
from gpu_lance.query.base import LanceQueryBuilder
from gpu_lance.query.columns import choose_column, takes_several
from gpu_lance.query.inputs import parse_multi_queries, parse_queries
from gpu_lance.query.messages import refused
from gpu_lance.query.projection import ROW_ID
from gpu_lance.query.settings import bound, seconds, whole
from gpu_lance.query.spec import DEFAULT_LIMIT, QuerySpec, VectorSpec
from gpu_lance.types import Metric

if TYPE_CHECKING:
    import lance
    import numpy as np
    import pyarrow as pa

    from gpu_lance.query.inputs import QueryVectors
    from gpu_lance.query.source import SearchTarget

QUERY_TYPES = ("auto", "vector", "fts", "hybrid")


def search(
    target: SearchTarget,
    query: Any = None,
    vector_column_name: str | None = None,
    query_type: str = "auto",
    ordering_field_name: str | None = None,
    fts_columns: str | list[str] | None = None,
) -> LanceVectorQueryBuilder | LanceEmptyQueryBuilder:
    """Describe a search of a table.

    Parameters
    ----------
    target : SearchTarget
        The table.
    query : object, optional
        A text or another item to embed, a vector, or a list of either; None reads rows without a
        search. See :func:`gpu_lance.query.inputs.parse_queries`.
    vector_column_name : str, optional
        Needed where more than one vector column fits the query.
    query_type : str
        ``"auto"`` or ``"vector"``.
    ordering_field_name : str, optional
        Deprecated: use ``order_by``.
    fts_columns : str or list of str, optional
        For full-text search, which is not available yet.

    Returns
    -------
    LanceVectorQueryBuilder or LanceEmptyQueryBuilder

    Raises
    ------
    QueryError
        If the query, its type or the column cannot be searched.
    UnknownColumnError
        If the named column is not there.
    """
    if query_type not in QUERY_TYPES:
        raise QueryError(
            f"Invalid query_type {query_type!r}; it must be one of "
            f"{', '.join(map(repr, QUERY_TYPES))}."
        )
    if query_type == "fts" and query is not None and not isinstance(query, str):
        raise QueryTypeError(f"An 'fts' query must be a text, got a {type(query).__name__}.")
    if query_type == "hybrid" or fts_columns or (query_type == "fts" and query is not None):
        word = "Hybrid" if query_type == "hybrid" else "Full-text"
        raise QueryError(
            f"{word} search is not available yet; it comes in a later release. Use a vector "
            "search, as in search('some text') on a table with an embedding function."
        )
    builder: LanceVectorQueryBuilder | LanceEmptyQueryBuilder
    if query is None:
        builder = LanceEmptyQueryBuilder(target)
    else:
        dataset = target.dataset()
        several = takes_several(dataset.schema, vector_column_name)
        queries = parse_multi_queries(query) if several else parse_queries(query)
        column = choose_column(
            dataset.schema, vector_column_name, queries.ndims, target.embedding_functions
        )
        if not several and takes_several(dataset.schema, column):
            queries = parse_multi_queries(query)
        metric = target.default_metric(column, dataset)
        spec = VectorSpec(column=column, queries=queries, metric=metric)
        builder = LanceVectorQueryBuilder(target, spec)
    if ordering_field_name is not None:
        warnings.warn(
            "ordering_field_name is deprecated; use .order_by().", DeprecationWarning, stacklevel=3
        )
        builder.order_by([ordering_field_name])
    return builder


class LanceVectorQueryBuilder(LanceQueryBuilder):
    """A search for the rows whose vectors are nearest to one query or several.

    The result has the selected columns, then ``_distance``; of several queries, ``query_index``
    comes first. Rows are ordered by query, distance and row id.
    """

    _spec: VectorSpec

    def __init__(self, target: SearchTarget, spec: VectorSpec) -> None:
        super().__init__(target)
        self._spec = replace(spec, limit=DEFAULT_LIMIT if spec.limit is None else spec.limit)
        self._embedded: QueryVectors | None = None

    def limit(self, limit: int | None) -> Self:
        """Set the most rows to return, of each query; 10 unless set.

        Raises
        ------
        QueryError
            If it is None or below 1.
        """
        if limit is None or whole(limit, "limit", least=-(2**63)) < 1:
            raise QueryError(f"Limit is required for a vector search, and at least 1; got {limit}.")
        return self._set(limit=whole(limit, "limit"))

    def distance_type(self, distance_type: str) -> Self:
        """Set how distance is measured: ``"l2"`` (squared), ``"cosine"`` or ``"dot"``.

        Unless it is set, a search measures as the column's index does, and by l2 without one.

        Raises
        ------
        QueryError
            For another name.
        """
        return self._set(metric=Metric.parse(distance_type))

    def metric(self, metric: str) -> Self:
        """The same as :meth:`distance_type`."""
        return self.distance_type(metric)

    def distance_range(
        self, lower_bound: float | None = None, upper_bound: float | None = None
    ) -> Self:
        """Return only rows with lower_bound <= distance < upper_bound; None is no bound."""
        return self._set(
            lower=bound(lower_bound, "lower_bound"), upper=bound(upper_bound, "upper_bound")
        )

    def nprobes(self, nprobes: int) -> Self:
        """Set how many partitions an approximate index probes; an exact one has none."""
        number = whole(nprobes, "nprobes")
        return self._setting(minimum_nprobes=number, maximum_nprobes=number)

    def minimum_nprobes(self, minimum_nprobes: int) -> Self:
        """Set the partitions to probe always; see :meth:`nprobes`."""
        return self._setting(minimum_nprobes=whole(minimum_nprobes, "minimum_nprobes", least=1))

    def maximum_nprobes(self, maximum_nprobes: int) -> Self:
        """Set the partitions to probe at most, 0 for all; see :meth:`nprobes`."""
        return self._setting(maximum_nprobes=whole(maximum_nprobes, "maximum_nprobes"))

    def refine_factor(self, refine_factor: int) -> Self:
        """Set how many candidates an approximate index measures again, as a multiple of limit."""
        return self._setting(refine_factor=whole(refine_factor, "refine_factor"))

    def ef(self, ef: int) -> Self:
        """Set how many candidates a graph index keeps; an exact one has no use for it."""
        return self._setting(ef=whole(ef, "ef"))

    def bypass_vector_index(self) -> Self:
        """Ask for an exact search, which this is."""
        return self._setting(bypass_vector_index=True)

    def fast_search(self) -> Self:
        """Ask for indexed rows only: the index follows the table, so these are all rows."""
        return self._setting(fast_search=True)

    def to_arrow(self, *, timeout: timedelta | None = None) -> pa.Table:
        """Run the search and return a table.

        Parameters
        ----------
        timeout : timedelta, optional
            Looked at between the stages of the search.

        Raises
        ------
        QueryError
            If what was asked for does not fit the table.
        QueryTimeoutError
            If the timeout passes.
        """
        return self._run(timeout).table

    def to_batches(
        self, /, batch_size: int | None = None, *, timeout: timedelta | None = None
    ) -> pa.RecordBatchReader:
        """Run the search and return a reader of record batches of at most `batch_size` rows."""
        size = None if batch_size is None else whole(batch_size, "batch_size", least=1)
        return results.to_batches(self.to_arrow(timeout=timeout), size)

    def output_schema(self) -> pa.Schema:
        """The schema of the result; runs no search."""
        dataset = self._target.dataset()
        projection = execution.projection_of(self._spec, dataset)
        return execution.fetch(dataset, execution.Found.none(), projection).schema

    def explain_plan(self, verbose: bool | None = False) -> str:
        """How the search is run: on which device, by what, over how many rows.

        It runs the search, so that the figures are this one's, and fetches no row.
        """
        dataset = self._target.dataset()
        report = execution.Report()
        self._embedded = self._queries()
        execution.nearest(self._target, dataset, self._checked(), self._embedded, report)
        return self._describe(report, dataset, bool(verbose))

    def analyze_plan(self) -> str:
        """Run the search, and say how and how long each stage took."""
        outcome = self._run(None)
        return self._describe(outcome.report, outcome.dataset, verbose=True)

    def _describe(
        self, report: execution.Report, dataset: lance.LanceDataset, verbose: bool
    ) -> str:
        index = self._target.column_index(self._spec.column).info()
        return plan.describe(self._spec, report, index, dataset, verbose)

    def _run(self, timeout: timedelta | None) -> execution.Outcome:
        outcome = execution.search(
            self._target, self._checked(), self._embedded, execution.Deadline(seconds(timeout))
        )
        self._embedded = outcome.queries
        return outcome

    def _rows(self, timeout: timedelta | None) -> tuple[pa.Table, lance.LanceDataset, np.ndarray]:
        outcome = self._run(timeout)
        return outcome.table, outcome.dataset, outcome.row_ids

    def _queries(self) -> QueryVectors:
        if self._embedded is None:
            return execution.embed(self._target, self._spec)
        return self._embedded

    def _setting(self, **values: Any) -> Self:
        return self._set(settings={**self._spec.settings, **values})

    def _checked(self) -> VectorSpec:
        least = self._spec.settings.get("minimum_nprobes", 0)
        most = self._spec.settings.get("maximum_nprobes", 0)
        if most and least > most:
            raise QueryError(
                f"minimum_nprobes is {least} and maximum_nprobes is {most}; the maximum must not "
                "be smaller."
            )
        return self._spec


class LanceEmptyQueryBuilder(LanceQueryBuilder):
    """Rows of a table in its order, without a search."""

    def __init__(self, target: SearchTarget) -> None:
        super().__init__(target)
        self._spec = QuerySpec()

    def limit(self, limit: int | None) -> Self:
        """Set the most rows to return; None or a number below 1 returns all."""
        number = 0 if limit is None else whole(limit, "limit", least=-(2**63))
        return self._set(limit=number if number > 0 else None)

    def to_arrow(self, *, timeout: timedelta | None = None) -> pa.Table:
        """Read the rows and return a table."""
        return self.to_batches(timeout=timeout).read_all()

    def to_batches(
        self, /, batch_size: int | None = None, *, timeout: timedelta | None = None
    ) -> pa.RecordBatchReader:
        """Return a reader, which reads the rows as it is asked for batches."""
        size = None if batch_size is None else whole(batch_size, "batch_size", least=1)
        deadline = execution.Deadline(seconds(timeout))
        return execution.scan(self._target.dataset(), self._spec, size, deadline)

    def output_schema(self) -> pa.Schema:
        """The schema of the result; reads no row."""
        return execution.scan_schema(self._target.dataset(), self._spec)

    def explain_plan(self, verbose: bool | None = False) -> str:
        """Lance's plan for the scan."""
        dataset = self._target.dataset()
        with refused("query", dataset.schema.names):
            return execution.scanner_of(dataset, self._spec).explain_plan(bool(verbose))

    def analyze_plan(self) -> str:
        """Read the rows, and give Lance's plan with its measurements."""
        dataset = self._target.dataset()
        with refused("query", dataset.schema.names):
            return execution.scanner_of(dataset, self._spec).analyze_plan()

    def _rows(self, timeout: timedelta | None) -> tuple[pa.Table, lance.LanceDataset, np.ndarray]:
        dataset = self._target.dataset()
        asked = self._spec.row_id or (self._spec.columns and ROW_ID in self._spec.columns)
        spec = self._spec if asked else replace(self._spec, row_id=True)
        deadline = execution.Deadline(seconds(timeout))
        table = execution.scan(dataset, spec, None, deadline).read_all()
        row_ids = table[ROW_ID]
        return table if asked else table.drop_columns([ROW_ID]), dataset, row_ids.to_numpy()
