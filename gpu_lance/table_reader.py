"""What a table is and reads: rows in Lance, its embedding functions, its indexes on a device."""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from gpu_lance.embeddings import (
    EmbeddingFunctionConfig,
    calls,
    fingerprint,
    get_registry,
    query_cache,
)
from gpu_lance.embeddings.notes import noted
from gpu_lance.errors import BadInputError, QueryError, UnknownColumnError
from gpu_lance.index import metadata as index_metadata
from gpu_lance.index.resident import ResidentIndexes
from gpu_lance.ingest.lists import is_multivector_type, vector_length
from gpu_lance.lance_errors import asking, reading
from gpu_lance.query import sql
from gpu_lance.storage import Storage
from gpu_lance.types import Embeddings, Metric

if TYPE_CHECKING:
    import lance
    import pandas as pd
    import polars as pl
    import torch

    from gpu_lance.index import ColumnIndex, MultiColumnIndex
    from gpu_lance.query import LanceQueryBuilder

logger = logging.getLogger(__name__)


class TableReader:
    """The reading half of :class:`gpu_lance.table.Table`.

    Parameters
    ----------
    storage : Storage
        The dataset.
    indexes : ResidentIndexes
        Where its vector columns are held, on the device to use.
    functions : mapping of str to EmbeddingFunctionConfig, optional
        The embedding functions that the table's metadata was made from, so that their session
        arguments (`device`, ...) hold for this table too.
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
        self._checked: set[Hashable] = set()
        if functions is not None:
            self._functions = (functions_key(storage.dataset().schema), dict(functions))

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

    def close(self) -> None:
        """Free the device memory of this table's indexes; a later search loads them again."""
        self._indexes.close()

    def resident_columns(self) -> dict[str, dict[str, Any]]:
        """What is held of each vector column that was searched or added to.

        Returns
        -------
        dict
            By column, as :meth:`gpu_lance.index.ColumnIndex.info` says it: ``step`` and ``plan``
            (how it is held, and why), ``bytes``, ``rows``, ``version``, ``device``, ``engine``.

        Examples
        --------
        >>> import gpu_lance
        >>> table = gpu_lance.connect("memory://", device="cpu").create_table(
        ...     "t", {"vector": [[0.0, 0.0], [1.0, 0.0]]}
        ... )
        >>> hits = table.search([1.0, 0.0]).limit(1).to_list()
        >>> table.resident_columns()["vector"]["step"]
        'float32'
        """
        return {name: index.info() for name, index in self._indexes.held().items()}

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

    def column_index(
        self, column: str, dataset: lance.LanceDataset | None = None
    ) -> ColumnIndex | MultiColumnIndex:
        """The index of a vector column; asking loads nothing.

        Parameters
        ----------
        column : str
        dataset : lance.LanceDataset, optional
            Whose column is meant; None for the version that is read.

        Raises
        ------
        UnknownColumnError
            If there is no such column, or it holds no vectors (a QueryError).
        """
        schema = (self.dataset() if dataset is None else dataset).schema
        if column not in schema.names:
            raise UnknownColumnError(
                f"Table '{self.name}' has no column {column!r}; it has {', '.join(schema.names)}."
            )
        kind = schema.field(column).type
        ndims = vector_length(kind)
        if ndims is None:
            raise UnknownColumnError(f"Column {column!r} holds no vectors; its type is {kind}.")
        if is_multivector_type(kind):
            return self._indexes.of_multi(column, ndims)
        return self._indexes.of(column, ndims)

    def default_metric(self, column: str, dataset: lance.LanceDataset | None = None) -> Metric:
        """The metric of searches that name none: that of the column's index, else l2."""
        dataset = self.dataset() if dataset is None else dataset
        return index_metadata.metrics(dataset).get(column, Metric.L2)

    # --------------------------------------------------------------- reading

    def count_rows(
        self,
        filter: str | None = None,  # noqa: A002
        parameters: Sequence[Any] | None = None,
    ) -> int:
        """The number of rows, or of those for which an SQL condition holds.

        Parameters
        ----------
        filter : str, optional
        parameters : sequence, optional
            Values for the ``?`` of the condition, which stay data.

        Raises
        ------
        QueryError
            If Lance does not understand the condition.
        """
        if filter is None:
            return int(self.dataset().count_rows())
        condition = sql.condition(filter, parameters)
        with asking("filter"):
            return int(self.dataset().count_rows(filter=condition))

    def head(self, n: int = 5) -> pa.Table:
        """The first `n` rows; BadInputError unless `n` is a whole number from 0."""
        if not isinstance(n, int) or n < 0:
            raise BadInputError(f"head takes a number of rows from 0, got {n!r}.")
        with reading():
            return self.dataset().head(min(n, self.count_rows()))

    def to_arrow(self) -> pa.Table:
        """All rows as an Arrow table."""
        with reading():
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

        return search(self, query, vector_column_name, query_type, ordering_field_name, fts_columns)

    def embed_query(self, column: str, items: list[Any]) -> Embeddings:
        """Vectors of items on the device, by the column's embedding function; all are valid.

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
        state = self._check_fingerprint(schema, column, config)
        kind = schema.field(column).type
        ndims, multi = vector_length(kind), is_multivector_type(kind)
        assert ndims is not None
        function = calls.suited(config.function, ndims, multi)
        device = self._indexes.device
        with noted("a query", column, function):
            made = query_cache.embed(
                function, items, ndims=ndims, device=device, multi=multi, state=state
            )
        if not made.valid.all():
            i = int((~made.valid).nonzero()[0][0])
            raise BadInputError(
                f"Query {i} cannot be embedded: {made.errors.get(i, 'it has no value')}."
            )
        return made

    # --------------------------------------------------------------- helpers

    def _configs(self, schema: pa.Schema) -> dict[str, EmbeddingFunctionConfig]:
        key = functions_key(schema)
        with self._lock:
            if self._functions is None or self._functions[0] != key:
                self._functions = (key, get_registry().parse_functions(schema.metadata))
            return self._functions[1]

    def _check_fingerprint(
        self, schema: pa.Schema, column: str, config: EmbeddingFunctionConfig
    ) -> Hashable:
        """Refuse another model than the column's; the function's state, if it was asked for."""
        metadata = schema.metadata or {}
        written = metadata.get(fingerprint.METADATA_KEY)
        if written is None:
            return None
        # a model that was saved anew to its folder is another one
        state = config.function.query_state()
        key = (column, written, functions_key(schema), state)
        if key not in self._checked:
            stored = fingerprint.read(metadata).get(column)
            actual = None if stored is None else fingerprint.of(config.function)
            fingerprint.check(column, stored, actual)
            self._checked.add(key)
        return state


def functions_key(schema: pa.Schema) -> bytes | None:
    """What a schema says of its embedding functions, for comparison with another."""
    stored: bytes | None = (schema.metadata or {}).get(b"embedding_functions")
    return stored
