"""Builders: a search is described call by call, and runs when its result is asked for."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeVar

from gpu_lance.errors import QueryError, QueryTypeError
from gpu_lance.query import execution, plan, results
from gpu_lance.query.columns import choose_column
from gpu_lance.query.inputs import parse_queries
from gpu_lance.query.settings import bound, seconds, whole
from gpu_lance.query.spec import DEFAULT_LIMIT, ColumnOrdering, QuerySpec, VectorSpec
from gpu_lance.query.sql import bind, checked
from gpu_lance.types import Metric

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl
    import pyarrow as pa
    import torch

    from gpu_lance.query.source import SearchTarget

T = TypeVar("T")

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
        queries = parse_queries(query)
        column = choose_column(
            target.schema, vector_column_name, queries.ndims, target.embedding_functions
        )
        builder = LanceVectorQueryBuilder(target, VectorSpec(column=column, queries=queries))
    if ordering_field_name is not None:
        warnings.warn(
            "ordering_field_name is deprecated; use .order_by().", DeprecationWarning, stacklevel=2
        )
        builder.order_by([ordering_field_name])
    return builder


class LanceQueryBuilder(ABC):
    """What every search has: which rows and columns to return, and as what.

    Each method that sets something returns the builder, so that calls can be chained.
    """

    _spec: QuerySpec

    def __init__(self, target: SearchTarget) -> None:
        self._target = target

    @abstractmethod
    def limit(self, limit: int | None) -> Self:
        """Set the most rows to return, of each query."""

    def offset(self, offset: int | None) -> Self:
        """Skip that many rows, of each query; None or a negative number skips none."""
        number = 0 if offset is None else max(0, whole(offset, "offset", least=-(2**63)))
        return self._set(offset=number)

    def select(self, columns: list[str] | dict[str, Any]) -> Self:
        """Set the columns to return.

        Parameters
        ----------
        columns : list of str, or dict of str to str
            Names of columns, or SQL expressions by the name to give them.

        Raises
        ------
        QueryError
            For anything else; unknown names are found when the search runs.
        """
        if isinstance(columns, dict):
            return self._set(columns=dict(columns))
        if isinstance(columns, list) and all(isinstance(name, str) for name in columns):
            return self._set(columns=tuple(columns))
        raise QueryError(
            "select takes a list of column names, or a dict of SQL expressions by name, got a "
            f"{type(columns).__name__}."
        )

    def where(
        self,
        where: Any,
        parameters: Sequence[Any] | bool | None = None,
        prefilter: bool | None = None,
    ) -> Self:
        """Return only rows that meet a condition; repeated calls are joined by AND.

        Parameters
        ----------
        where : str
            An SQL condition. None adds none.
        parameters : sequence, optional
            Values for the ``?`` of the condition, as in ``where("owner = ?", [name])``. They stay
            data, whatever they hold.
        prefilter : bool, optional
            True, the default: the nearest of the rows that meet the condition are returned. False:
            the nearest rows are taken first, and those that do not meet it are dropped, so that
            fewer may be left.

        Raises
        ------
        QueryError
            If the condition is no single SQL expression, or values and parameters do not fit.
        """
        if isinstance(parameters, bool):  # LanceDB's second argument is prefilter
            parameters, prefilter = None, parameters
        if prefilter is not None:
            self._set(prefilter=bool(prefilter))
        if where is None:
            return self
        where = where.to_sql() if hasattr(where, "to_sql") else where
        if parameters is not None:
            if isinstance(parameters, (str, bytes)) or not isinstance(parameters, Sequence):
                raise QueryError(
                    "The parameters of a filter are a list, as in where('owner = ?', [name]), got "
                    f"a {type(parameters).__name__}."
                )
            if not isinstance(where, str):
                raise QueryError(f"A filter is SQL text, got a {type(where).__name__}.")
            where = bind(where, parameters)
        condition = checked(where)
        before = self._spec.where
        return self._set(where=condition if before is None else f"{before} AND {condition}")

    def with_row_id(self, with_row_id: bool = True) -> Self:
        """Set whether ``_rowid`` is returned."""
        return self._set(row_id=bool(with_row_id))

    def order_by(self, ordering: Sequence[Any] | None) -> Self:
        """Order the rows, of each query; a vector search orders the nearest rows that it found.

        Parameters
        ----------
        ordering : list of ColumnOrdering, or of str, or None
        """
        if isinstance(ordering, str):
            ordering = [ordering]
        return self._set(order_by=tuple(ColumnOrdering.parse(key) for key in ordering or ()))

    def rerank(self, reranker: Any = None, **options: Any) -> NoReturn:
        """Not available yet."""
        raise QueryError("Reranking is not available yet; it comes in a later release.")

    def text(self, text: Any) -> NoReturn:
        """Not available yet."""
        raise QueryError(
            "Hybrid search is not available yet; it comes in a later release. Pass a text to "
            "search() for a vector search."
        )

    def vector(self, vector: Any) -> NoReturn:
        """Not available: a vector is passed to ``search``."""
        raise QueryError(
            "Hybrid search is not available yet; it comes in a later release. Pass a vector to "
            "search() for a vector search."
        )

    @abstractmethod
    def to_arrow(self, *, timeout: timedelta | None = None) -> pa.Table:
        """Run the search and return a table."""

    @abstractmethod
    def to_batches(
        self, /, batch_size: int | None = None, *, timeout: timedelta | None = None
    ) -> pa.RecordBatchReader:
        """Run the search and return a reader of record batches of at most `batch_size` rows."""

    @abstractmethod
    def output_schema(self) -> pa.Schema:
        """The schema of the result; runs no search."""

    @abstractmethod
    def explain_plan(self, verbose: bool | None = False) -> str:
        """How the search is run, in words."""

    @abstractmethod
    def analyze_plan(self) -> str:
        """Run the search, and say how and how long each stage took."""

    def to_pandas(
        self,
        flatten: int | bool | None = None,
        *,
        timeout: timedelta | None = None,
        **kwargs: Any,
    ) -> pd.DataFrame:
        """Run the search and return a pandas DataFrame.

        Parameters
        ----------
        flatten : int or bool, optional
            How many levels of structs to turn into columns; True for all.
        timeout : timedelta, optional
        **kwargs
            For ``pyarrow.Table.to_pandas``.
        """
        return results.to_pandas(self.to_arrow(timeout=timeout), flatten, **kwargs)

    def to_list(self, *, timeout: timedelta | None = None) -> list[dict[str, Any]]:
        """Run the search and return a dict for each row."""
        return self.to_arrow(timeout=timeout).to_pylist()  # type: ignore[no-any-return]

    def to_polars(self, *, timeout: timedelta | None = None) -> pl.DataFrame:
        """Run the search and return a polars DataFrame."""
        return results.to_polars(self.to_arrow(timeout=timeout))

    def to_pydantic(self, model: type[T], *, timeout: timedelta | None = None) -> list[T]:
        """Run the search and return an instance of the model for each row."""
        return results.to_pydantic(self.to_arrow(timeout=timeout), model)

    def _set(self, **changes: Any) -> Self:
        self._spec = replace(self._spec, **changes)
        return self


class LanceVectorQueryBuilder(LanceQueryBuilder):
    """A search for the rows whose vectors are nearest to one query or several.

    The result has the selected columns, then ``_distance``; of several queries, ``query_index``
    comes first. Rows are ordered by query, distance and row id.
    """

    _spec: VectorSpec

    def __init__(self, target: SearchTarget, spec: VectorSpec) -> None:
        super().__init__(target)
        self._spec = replace(spec, limit=DEFAULT_LIMIT if spec.limit is None else spec.limit)
        self._embedded: torch.Tensor | None = None

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
        """Set how distance is measured: ``"l2"`` (squared; the default), ``"cosine"``, ``"dot"``.

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
        return self._run(timeout)[0]

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
        return plan.describe(self._spec, report, dataset, bool(verbose))

    def analyze_plan(self) -> str:
        """Run the search, and say how and how long each stage took."""
        _, report = self._run(None)
        return plan.describe(self._spec, report, self._target.dataset(), verbose=True)

    def _run(self, timeout: timedelta | None) -> tuple[pa.Table, execution.Report]:
        table, self._embedded, report = execution.search(
            self._target, self._checked(), self._embedded, execution.Deadline(seconds(timeout))
        )
        return table, report

    def _queries(self) -> torch.Tensor:
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
        return execution.scan(self._target, self._spec, size, deadline)

    def output_schema(self) -> pa.Schema:
        """The schema of the result; reads no row."""
        return self.to_batches().schema

    def explain_plan(self, verbose: bool | None = False) -> str:
        """Lance's plan for the scan."""
        dataset = self._target.dataset()
        scanner, _ = execution.scanner_of(dataset, self._spec)
        return scanner.explain_plan(bool(verbose))  # type: ignore[no-any-return]

    def analyze_plan(self) -> str:
        """Read the rows, and give Lance's plan with its measurements."""
        scanner, _ = execution.scanner_of(self._target.dataset(), self._spec)
        return scanner.analyze_plan()  # type: ignore[no-any-return]
