"""A table: one Lance dataset, its embedding functions, and its indexes on a device."""

from __future__ import annotations

import functools
import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from gpu_lance.embeddings import EmbeddingFunctionConfig, calls, fingerprint, get_registry
from gpu_lance.errors import BadInputError, GpuLanceError, QueryError, UnknownColumnError
from gpu_lance.index.config import Flat
from gpu_lance.index.resident import ResidentIndexes
from gpu_lance.ingest.embed import Policy, VectorColumn, vector_columns
from gpu_lance.ingest.pipeline import Kept, Pipeline, Report
from gpu_lance.ingest.progress import progress_callback
from gpu_lance.ingest.read import Source, read
from gpu_lance.ingest.rewrite import rewritten, touched
from gpu_lance.ingest.tables import Planned, plan_table
from gpu_lance.merge import LanceMergeInsertBuilder, MergeResult, merged_source
from gpu_lance.query import sql
from gpu_lance.storage import ChangedRows, Storage, first_line, operation_of
from gpu_lance.types import (
    AddResult,
    DeleteResult,
    Metric,
    OnBadVectors,
    Side,
    UpdateResult,
)

if TYPE_CHECKING:
    import lance
    import pandas as pd
    import polars as pl
    import torch

    from gpu_lance.index import ColumnIndex
    from gpu_lance.query import LanceQueryBuilder

logger = logging.getLogger(__name__)

INDEXES_KEY = b"gpu_lance.indexes"


class Table:
    """Rows in Lance, embedded on the way in and searched on the device; made by a connection.

    It may be used from several threads. The methods have LanceDB's names, arguments and results.

    Parameters
    ----------
    storage : Storage
        The dataset.
    indexes : ResidentIndexes
        Where its vector columns are held, on the device to use.
    functions : mapping of str to EmbeddingFunctionConfig, optional
        The embedding functions that the table's metadata was made from, so that their session
        arguments (`device`, ...) hold for this table too.

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

    def __init__(
        self,
        storage: Storage,
        indexes: ResidentIndexes,
        functions: Mapping[str, EmbeddingFunctionConfig] | None = None,
    ) -> None:
        self._storage = storage
        self._indexes = indexes
        self._lock = threading.RLock()
        self._functions: tuple[bytes | None, dict[str, EmbeddingFunctionConfig]] | None = None
        self._checked: set[tuple[str, bytes | None, bytes | None]] = set()
        self.last_report: Report | None = None
        if functions is not None:
            self._functions = (_functions_key(storage.dataset().schema), dict(functions))

    # ------------------------------------------------------------ what it is

    @property
    def name(self) -> str:
        """The table's name."""
        return self._storage.name

    @property
    def uri(self) -> str:
        """Where the Lance dataset is."""
        return self._storage.uri

    @property
    def device(self) -> torch.device:
        """Where vectors are held and searched."""
        return self._indexes.device

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema of the version that is read."""
        return self.dataset().schema

    @property
    def version(self) -> int:
        """The version that is read: the latest, unless another was checked out."""
        return int(self.dataset().version)

    @property
    def embedding_functions(self) -> dict[str, EmbeddingFunctionConfig]:
        """By vector column the function that makes it; reading them loads no model.

        A function that is not available here raises when it is used, not before.
        """
        return dict(self._configs(self.schema))

    def __len__(self) -> int:
        return self.count_rows()

    def __repr__(self) -> str:
        return f"Table(name={self.name!r}, version={self.version}, uri={self.uri!r})"

    def dataset(self) -> lance.LanceDataset:
        """The Lance dataset at the version that is read."""
        return self._storage.dataset()

    def to_lance(self) -> lance.LanceDataset:
        """The Lance dataset at the version that is read, for everything that Lance can do."""
        dataset = self.dataset()
        return dataset.checkout_version(dataset.version)

    def column_index(self, column: str) -> ColumnIndex:
        """The index of a vector column; asking loads nothing.

        Raises
        ------
        UnknownColumnError
            If there is no such column, or it holds no vectors (a QueryError).
        """
        schema = self.schema
        if column not in schema.names:
            raise UnknownColumnError(
                f"Table '{self.name}' has no column {column!r}; it has {', '.join(schema.names)}."
            )
        kind = schema.field(column).type
        if not pa.types.is_fixed_size_list(kind):
            raise UnknownColumnError(f"Column {column!r} holds no vectors; its type is {kind}.")
        return self._indexes.of(column, kind.list_size)

    def default_metric(self, column: str) -> Metric:
        """The metric of the column's index configuration; l2 where it has none."""
        config = _index_configs(self.schema).get(column)
        return Metric.parse((config or {}).get("distance_type", "l2"))

    # --------------------------------------------------------------- reading

    def count_rows(self, filter: str | None = None) -> int:
        """The number of rows, or of those for which an SQL condition holds.

        Raises
        ------
        QueryError
            If Lance does not understand the condition.
        """
        if filter is None:
            return int(self.dataset().count_rows())
        return int(self._asked(lambda: self.dataset().count_rows(filter=sql.checked(filter))))

    def head(self, n: int = 5) -> pa.Table:
        """The first `n` rows."""
        return self.dataset().head(n)

    def to_arrow(self) -> pa.Table:
        """All rows as an Arrow table."""
        return self.dataset().to_table()

    def to_pandas(self) -> pd.DataFrame:
        """All rows as a pandas DataFrame."""
        return self.to_arrow().to_pandas()

    def to_polars(self) -> pl.LazyFrame:
        """All rows as a polars LazyFrame over the dataset."""
        import polars

        return polars.scan_pyarrow_dataset(self.to_lance(), allow_pyarrow_filter=False)

    def search(
        self,
        query: Any = None,
        vector_column_name: str | None = None,
        query_type: str = "auto",
        ordering_field_name: str | None = None,
        fts_columns: str | list[str] | None = None,
    ) -> LanceQueryBuilder:
        """Start a search; see :mod:`gpu_lance.query`.

        Parameters
        ----------
        query : object, optional
            A vector (list, numpy, torch, cupy), a text or another item that the column's
            embedding function takes, or a batch of either. None selects rows without ranking.
        vector_column_name : str, optional
            Needed if there are several vector columns.
        query_type : {"auto", "vector"}
        ordering_field_name, fts_columns
            Taken for LanceDB's signature; they belong to full-text search.

        Examples
        --------
        >>> import gpu_lance
        >>> table = gpu_lance.connect("memory://", device="cpu").create_table(
        ...     "t", {"n": [1, 2, 3], "vector": [[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]}
        ... )
        >>> table.search([2.1, 0.0]).where("n < 3").limit(1).select(["n"]).to_list()[0]["n"]
        2
        """
        from gpu_lance.query import search

        return search(
            self, query, vector_column_name, query_type, ordering_field_name, fts_columns
        )

    def embed_query(self, column: str, items: list[Any]) -> torch.Tensor:
        """Vectors (m, d) of m items on the device, by the column's embedding function.

        Raises
        ------
        QueryError
            If the column has no embedding function.
        BadInputError
            If an item cannot be embedded.
        FingerprintError
            If the column's vectors were made by another model.
        """
        schema = self.schema
        config = self._configs(schema).get(column)
        if config is None:
            raise QueryError(
                f"Column {column!r} has no embedding function, so a search needs a vector; pass "
                f"one, or make the table with a function for that column."
            )
        self._check_fingerprint(schema, column, config)
        ndims = schema.field(column).type.list_size
        made = calls.embed(
            config.function, items, Side.QUERY, ndims=ndims, device=self._indexes.device
        )
        if not made.valid.all():
            i = int((~made.valid).nonzero()[0][0])
            raise BadInputError(
                f"Query {i} cannot be embedded: {made.errors.get(i, 'it has no value')}."
            )
        return made.vectors

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
        columns = self._columns(schema, functions)
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

    def delete(self, where: str) -> DeleteResult:
        """Delete the rows for which an SQL condition holds.

        Raises
        ------
        QueryError
            If Lance does not understand the condition.
        """
        condition = sql.checked(where)
        dataset = self._asked(lambda: self._storage.delete(condition))
        return DeleteResult(int(dataset.version))

    def update(
        self,
        where: str | None = None,
        values: Mapping[str, Any] | None = None,
        *,
        values_sql: Mapping[str, str] | None = None,
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
        condition = None if where is None else sql.checked(where)
        expressions = {name: sql.checked(text, "value") for name, text in expressions.items()}
        base = self._storage.writable()
        schema, functions = base.schema, self._configs(base.schema)
        names = {*given, *expressions}
        follow = touched(self._columns(schema, functions), names)
        changed = ChangedRows()
        batches = rewritten(base, condition, given, expressions, follow, changed)
        again = {column.name: functions[column.name] for column in follow}
        columns = self._columns(schema, again)
        run = Pipeline(schema, columns, Policy(), self._indexes)
        dataset = run.write(
            Source(schema, batches),
            lambda stream: self._storage.replace_rows(base, condition, changed, stream, schema),
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
        sources = {name: config.source_column for name, config in functions.items()}
        source, schema = merged_source(data, base.schema, on, sources)
        functions = {
            name: config
            for name, config in functions.items()
            if name in schema.names and config.source_column in schema.names
        }
        run = Pipeline(schema, self._columns(schema, functions), policy, self._indexes)
        dataset, counts = run.write(
            source, lambda batches: self._storage.merge(on, batches, schema, apply)
        )
        self.last_report = run.report
        return MergeResult(
            int(dataset.version),
            counts["num_updated_rows"],
            counts["num_inserted_rows"],
            counts["num_deleted_rows"],
        )

    # -------------------------------------------------------------- versions

    def list_versions(self) -> list[dict[str, Any]]:
        """Every version: its number, time and metadata."""
        return list(self.dataset().versions())

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

    # --------------------------------------------------------------- indexes

    def create_index(
        self, column: str = "vector", *, config: Flat | None = None, **legacy: Any
    ) -> None:
        """Say how a vector column is searched by default.

        Parameters
        ----------
        column : str
        config : Flat, optional
            The exact index, with the metric of searches that name none.

        Raises
        ------
        QueryError
            For any other kind of index: approximate ones are not available yet, and exact search
            needs none.
        """
        if legacy or not isinstance(config or Flat(), Flat):
            raise QueryError(
                "Only config=Flat(distance_type=...) is available: approximate indexes are not, "
                "and exact search on the device needs none."
            )
        self.column_index(column)
        configs = _index_configs(self._storage.writable().schema)
        configs[column] = {"type": "FLAT", "distance_type": str((config or Flat()).metric)}
        self._storage.set_metadata({INDEXES_KEY.decode(): json.dumps(configs)})

    # --------------------------------------------------------------- helpers

    def close(self) -> None:
        """Free the device memory of this table's indexes; a later search loads them again."""
        self._indexes.close()

    def _asked(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (ValueError, OSError) as error:
            invalid = isinstance(error, ValueError) or "Invalid user input" in str(error)
            if isinstance(error, GpuLanceError) or not invalid:
                raise
            raise QueryError(f"The filter cannot be run: {first_line(error)}") from error

    def _configs(self, schema: pa.Schema) -> dict[str, EmbeddingFunctionConfig]:
        key = _functions_key(schema)
        with self._lock:
            if self._functions is None or self._functions[0] != key:
                self._functions = (key, get_registry().parse_functions(schema.metadata))
            return self._functions[1]

    def _columns(
        self, schema: pa.Schema, functions: Mapping[str, EmbeddingFunctionConfig]
    ) -> list[VectorColumn]:
        cosine = {
            name
            for name, config in _index_configs(schema).items()
            if config.get("distance_type") == Metric.COSINE
        }
        check = functools.partial(self._check_fingerprint, schema)
        return vector_columns(schema, functions, frozenset(cosine), check)

    def _check_fingerprint(
        self, schema: pa.Schema, column: str, config: EmbeddingFunctionConfig
    ) -> None:
        metadata = schema.metadata or {}
        key = (column, metadata.get(fingerprint.METADATA_KEY), _functions_key(schema))
        if key in self._checked:
            return
        stored = fingerprint.read(metadata).get(column)
        if stored is not None:
            actual = fingerprint.of(config.function)
            if actual is not None:
                fingerprint.check(column, stored, actual)
        self._checked.add(key)

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
            self._functions = (_functions_key(schema), dict(functions))
        take_in(self._indexes, dataset, schema, run.kept, list(functions))


def take_in(
    indexes: ResidentIndexes,
    dataset: lance.LanceDataset,
    schema: pa.Schema,
    kept: Kept,
    columns: Sequence[str],
) -> None:
    """Add the vectors of a commit to the indexes, straight from the tensors that were stored."""
    if not columns:
        return
    row_ids = new_row_ids(dataset)
    if row_ids is None:
        return
    for name in columns:
        part = kept.take(name, len(row_ids))
        if part is None:
            continue
        vectors, valid = part
        index = indexes.of(name, schema.field(name).type.list_size)
        index.append(dataset.version - 1, dataset, vectors, row_ids, valid)


def new_row_ids(dataset: lance.LanceDataset) -> Any:
    """The row ids, (n,) int64, of the fragments that the dataset's version added, in their order.

    None if the version before it is gone.
    """
    old: set[int] = set()
    if dataset.version > 1:
        operation = operation_of(dataset)
        if operation == "Append":
            try:
                before = dataset.checkout_version(dataset.version - 1)
            except (OSError, RuntimeError, ValueError):
                return None
            old = {fragment.fragment_id for fragment in before.get_fragments()}
        elif operation != "Overwrite":
            return None
    fragments = [f for f in dataset.get_fragments() if f.fragment_id not in old]
    if not fragments:
        return None
    scanner = dataset.scanner(columns=[], with_row_id=True, fragments=fragments)
    return scanner.to_table()["_rowid"].to_numpy().astype("int64")


def _functions_key(schema: pa.Schema) -> bytes | None:
    stored: bytes | None = (schema.metadata or {}).get(b"embedding_functions")
    return stored


def _index_configs(schema: pa.Schema) -> dict[str, dict[str, str]]:
    try:
        found = json.loads((schema.metadata or {}).get(INDEXES_KEY, b"{}"))
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}


def _as(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays(
        [batch.column(batch.schema.get_field_index(name)) for name in schema.names], schema=schema
    )


LanceTable = Table  # LanceDB's name for it
