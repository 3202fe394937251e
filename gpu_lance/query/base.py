"""What every search builder has: rows and columns to return, and in which form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeVar

from gpu_lance.errors import QueryError
from gpu_lance.query import results
from gpu_lance.query.settings import whole
from gpu_lance.query.spec import ColumnOrdering, QuerySpec
from gpu_lance.query.sql import condition

if TYPE_CHECKING:
    import lance
    import numpy as np
    import pandas as pd
    import polars as pl
    import pyarrow as pa

    from gpu_lance.query.source import SearchTarget

T = TypeVar("T")

BLOB_MODES = ("lazy", "bytes", "descriptions")


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
        made = condition(where, parameters)
        before = self._spec.where
        return self._set(where=made if before is None else f"{before} AND {made}")

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
        blob_mode: str = "lazy",
        timeout: timedelta | None = None,
        **kwargs: Any,
    ) -> pd.DataFrame:
        """Run the search and return a pandas DataFrame.

        Parameters
        ----------
        flatten : int or bool, optional
            How many levels of structs to turn into columns; True for all.
        blob_mode : str
            What a blob column holds: ``"lazy"`` files to read from, ``"bytes"``, or
            ``"descriptions"`` of where the blobs are, as in Arrow.
        timeout : timedelta, optional
        **kwargs
            For ``pyarrow.Table.to_pandas``.
        """
        if blob_mode not in BLOB_MODES:
            raise QueryError(
                f"blob_mode is {blob_mode!r}; it must be one of {', '.join(map(repr, BLOB_MODES))}."
            )
        table, dataset, row_ids = self._rows(timeout)
        columns = results.blob_columns(dataset.schema, table.column_names)
        if columns and blob_mode != "descriptions":
            blobs = results.fetch_blobs(dataset, row_ids, columns, blob_mode == "bytes")
            return results.to_pandas(table, flatten, blobs, **kwargs)
        return results.to_pandas(table, flatten, **kwargs)

    def to_list(self, *, timeout: timedelta | None = None) -> list[dict[str, Any]]:
        """Run the search and return a dict for each row."""
        return self.to_arrow(timeout=timeout).to_pylist()

    def to_polars(self, *, timeout: timedelta | None = None) -> pl.DataFrame:
        """Run the search and return a polars DataFrame."""
        return results.to_polars(self.to_arrow(timeout=timeout))

    def to_pydantic(self, model: type[T], *, timeout: timedelta | None = None) -> list[T]:
        """Run the search and return an instance of the model for each row."""
        return results.to_pydantic(self.to_arrow(timeout=timeout), model)

    @abstractmethod
    def _rows(self, timeout: timedelta | None) -> tuple[pa.Table, lance.LanceDataset, np.ndarray]:
        """The result, the dataset that it is of, and the row ids (n,) of its rows."""

    def _set(self, **changes: Any) -> Self:
        self._spec = replace(self._spec, **changes)
        return self
