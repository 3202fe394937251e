"""A table: one Lance dataset, its embedding functions, and its indexes on a device."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from gpu_lance.embeddings import EmbeddingFunctionConfig
from gpu_lance.errors import BadInputError
from gpu_lance.handover import take_in
from gpu_lance.index import metadata as index_metadata
from gpu_lance.ingest.pipeline import Pipeline, Report
from gpu_lance.ingest.progress import progress_callback
from gpu_lance.ingest.read import Source, read
from gpu_lance.ingest.rewrite import rewritten, touched
from gpu_lance.ingest.tables import Planned, plan_table
from gpu_lance.ingest.vector_column import Policy, VectorColumn, vector_columns
from gpu_lance.lance_errors import asking, reading
from gpu_lance.maintenance import Maintained
from gpu_lance.merge import LanceMergeInsertBuilder, MergeResult, merged_source
from gpu_lance.query import sql
from gpu_lance.storage import ChangedRows
from gpu_lance.table_reader import functions_key
from gpu_lance.types import AddResult, DeleteResult, Metric, OnBadVectors, UpdateResult

if TYPE_CHECKING:
    import lance

logger = logging.getLogger(__name__)


class Table(Maintained):
    """Rows in Lance, embedded on the way in and searched on the device; made by a connection.

    It may be used from several threads. The methods have LanceDB's names, arguments and results.

    Examples
    --------
    >>> import gpu_lance
    >>> db = gpu_lance.connect("memory://", device="cpu")
    >>> table = db.create_table("points", [{"id": 1, "vector": [0.0, 1.0]}])
    >>> table.add([{"id": 2, "vector": [3.0, 1.0]}]).version
    2
    >>> table.search([3.0, 1.5]).limit(1).to_list()[0]["id"]
    2
    """

    last_report: Report | None = None

    # --------------------------------------------------------------- writing

    def add(
        self,
        data: Any,
        mode: str = "append",
        on_bad_vectors: str = "error",
        fill_value: float = 0.0,
        progress: bool | Callable[..., Any] | Any = None,
    ) -> AddResult:
        """Add rows as one version, embedding those that have no vector.

        Parameters
        ----------
        data : object
            Rows or columns of any kind that :func:`gpu_lance.ingest.read.read` takes. A column may
            be missing if it takes nulls. Vectors that are given are kept; missing ones, also in a
            partly null column, are made from their source; a null source leaves a null vector.
        mode : {"append", "overwrite"}
            ``overwrite`` replaces the rows; the columns and embedding functions stay, unless the
            data has other columns, whose schema then replaces the old one.
        on_bad_vectors : {"error", "drop", "fill", "null"}
            For vectors with NaN, infinity, a wrong length, or zero norm where the column is
            searched by cosine, and for items that cannot be embedded.
        fill_value : float
            Every element of a filled vector.
        progress : bool, callable or tqdm bar, optional
            True shows a bar. A callable gets a dict with ``output_rows``, ``total_rows``,
            ``elapsed_seconds`` and ``done``.

        Returns
        -------
        AddResult
            The new version; the old one if there was nothing to add.

        Raises
        ------
        BadInputError, BadVectorError, SchemaError, UnsupportedDataError
            If the data does not fit; the table is then as it was.
        FingerprintError
            If the column's vectors were made by another model.
        """
        if mode not in ("append", "overwrite"):
            raise BadInputError(f"mode is {mode!r}; it must be 'append' or 'overwrite'.")
        policy = Policy(OnBadVectors.parse(on_bad_vectors), fill_value)
        before = self._storage.writable()
        schema, functions = before.schema, self._configs(before.schema)
        source = read(data, schema)
        if mode == "overwrite" and not set(source.schema.names) <= set(schema.names):
            planned = self._replanned(source, schema, functions)
            schema, source = planned.schema, planned.source
            functions = planned.functions
        if source.num_rows == 0 and mode == "append":
            return AddResult(int(before.version))
        columns = self._columns(before, schema, functions)
        with progress_callback(progress, source.num_rows) as report:
            run = Pipeline(schema, columns, policy, self._indexes, report)
            write = self._storage.append if mode == "append" else self._storage.overwrite
            dataset = run.write(source, lambda batches: write(batches, schema))
        self._written(dataset, schema, functions, run)
        return AddResult(int(dataset.version))

    def _replanned(
        self,
        source: Source,
        schema: pa.Schema,
        functions: Mapping[str, EmbeddingFunctionConfig],
    ) -> Planned:
        """What the table becomes when its rows are replaced by ones with other columns."""
        reader = pa.RecordBatchReader.from_batches(
            source.schema, (_as(batch, source.schema) for batch in source.batches)
        )
        return plan_table(reader, None, list(functions.values()))

    def delete(self, where: str, parameters: Sequence[Any] | None = None) -> DeleteResult:
        """Delete the rows for which an SQL condition holds.

        Parameters
        ----------
        where : str
        parameters : sequence, optional
            Values for the ``?`` of the condition, as in ``delete("owner = ?", [name])``. They stay
            data, whatever they hold.

        Raises
        ------
        QueryError
            If Lance does not understand the condition.
        """
        condition = sql.condition(where, parameters)
        with asking("filter"):
            deleted, dataset = self._storage.delete(condition)
        return DeleteResult(int(dataset.version), deleted)

    def update(
        self,
        where: str | None = None,
        values: Mapping[str, Any] | None = None,
        *,
        values_sql: Mapping[str, str] | None = None,
        parameters: Sequence[Any] | None = None,
    ) -> UpdateResult:
        """Give rows new values; where a source column changes, its vector is made again.

        Parameters
        ----------
        where : str, optional
            An SQL condition; None for every row.
        values : mapping of str to object, optional
            Python values by column.
        values_sql : mapping of str to str, optional
            SQL expressions over the old row, by column.
        parameters : sequence, optional
            Values for the ``?`` of `where`, which stay data.

        Returns
        -------
        UpdateResult
            Rows keep their row ids.

        Raises
        ------
        ValueError
            Unless exactly one of `values` and `values_sql` is given.
        SchemaError
            For a column that the table does not have.
        CommitConflictError
            If another writer changed the same rows meanwhile; nothing was changed.

        Examples
        --------
        >>> import gpu_lance
        >>> table = gpu_lance.connect("memory://", device="cpu").create_table(
        ...     "t", [{"n": 1, "vector": [0.0, 0.0]}]
        ... )
        >>> table.update(where="n = 1", values={"n": 5}).rows_updated
        1
        """
        if (values is None) == (values_sql is None):
            raise BadInputError("update takes either values or values_sql, and one of them.")
        given, expressions = dict(values or {}), dict(values_sql or {})
        if not given and not expressions:
            raise BadInputError("update was given no column to change.")
        condition = None if where is None else sql.condition(where, parameters)
        expressions = {name: sql.checked(text, "value") for name, text in expressions.items()}
        base = self._storage.writable()
        schema, functions = base.schema, self._configs(base.schema)
        names = {*given, *expressions}
        follow = touched(self._columns(base, schema, functions), names)
        changed = ChangedRows()
        batches = rewritten(base, condition, given, expressions, follow, changed)
        again = {column.name: functions[column.name] for column in follow}
        # vectors that stay are not judged: another writer may have stored what `add` refuses
        columns = [c for c in self._columns(base, schema, again) if c.name in {*names, *again}]
        run = Pipeline(schema, columns, Policy(), self._indexes)
        dataset = run.write(
            Source(schema, batches),
            lambda stream: self._storage.replace_rows(base, changed, stream, schema),
        )
        self.last_report = run.report
        return UpdateResult(len(changed.row_ids), int(dataset.version))

    def merge_insert(self, on: str | Sequence[str]) -> LanceMergeInsertBuilder:
        """Describe an update and insert by key; see :class:`LanceMergeInsertBuilder`.

        Parameters
        ----------
        on : str or sequence of str
            The key columns.
        """
        return LanceMergeInsertBuilder(self, [on] if isinstance(on, str) else list(on))

    def _merge(self, on: list[str], data: Any, policy: Policy, apply: Any) -> MergeResult:
        base = self._storage.writable()
        functions = self._configs(base.schema)
        sources = {name: config.columns for name, config in functions.items()}
        source, schema = merged_source(data, base.schema, on, sources)
        functions = {
            name: config
            for name, config in functions.items()
            if name in schema.names and set(config.columns) <= set(schema.names)
        }
        run = Pipeline(schema, self._columns(base, schema, functions), policy, self._indexes)

        def write(batches: Iterator[pa.RecordBatch]) -> tuple[lance.LanceDataset, dict[str, int]]:
            with asking("merge"):
                return self._storage.merge(on, batches, schema, apply)

        dataset, counts = run.write(source, write)
        self.last_report = run.report
        return MergeResult(
            int(dataset.version),
            counts["num_updated_rows"],
            counts["num_inserted_rows"],
            counts["num_deleted_rows"],
            counts.get("num_attempts", 1),
        )

    # -------------------------------------------------------------- versions

    def list_versions(self) -> list[dict[str, Any]]:
        """Every version: its number, time and metadata."""
        with reading():
            return [dict(version) for version in self.dataset().versions()]

    def checkout(self, version: int | str) -> None:
        """Read that version or tag from now on; the table cannot be written to meanwhile."""
        self._storage.checkout(version)

    def checkout_latest(self) -> None:
        """Read the latest version again, and allow writing."""
        self._storage.checkout_latest()

    def restore(self, version: int | str | None = None) -> None:
        """Make an older version, or the one that is checked out, the newest one.

        Raises
        ------
        ValueError
            If no version is given and none is checked out, or there is no such version.
        """
        self._storage.restore(version)

    @property
    def tags(self) -> Any:
        """Names for versions: ``create(tag, version)``, ``update``, ``delete``, ``list()``."""
        return self._storage.latest().tags

    # --------------------------------------------------------------- helpers

    def _columns(
        self,
        base: lance.LanceDataset,
        schema: pa.Schema,
        functions: Mapping[str, EmbeddingFunctionConfig],
    ) -> list[VectorColumn]:
        metrics = index_metadata.metrics(base)
        cosine = frozenset(name for name, metric in metrics.items() if metric is Metric.COSINE)
        check = functools.partial(self._check_fingerprint, schema)
        return vector_columns(schema, functions, cosine, check)

    def _written(
        self,
        dataset: lance.LanceDataset,
        schema: pa.Schema,
        functions: Mapping[str, EmbeddingFunctionConfig],
        run: Pipeline,
    ) -> None:
        """Let the indexes take in the new rows from the device, and remember how it went."""
        self.last_report = run.report
        with self._lock:
            self._functions = (functions_key(schema), dict(functions))
        take_in(self._indexes, dataset, schema, run.kept, list(functions))


def _as(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays(
        [batch.column(batch.schema.get_field_index(name)) for name in schema.names], schema=schema
    )


LanceTable = Table  # LanceDB's name for it
