"""What Lance does for a table besides its rows: columns, scalar indexes, compaction, clean-up."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from gpu_lance.embeddings import fingerprint, get_registry
from gpu_lance.errors import (
    BadInputError,
    GpuLanceError,
    QueryError,
    SchemaError,
    UnknownColumnError,
    WrongTypeError,
)
from gpu_lance.index import metadata as index_metadata
from gpu_lance.index.config import Flat
from gpu_lance.ingest.tables import check_names
from gpu_lance.lance_errors import asking, first_line
from gpu_lance.query import sql
from gpu_lance.table_reader import TableReader
from gpu_lance.types import ColumnsResult, Metric

if TYPE_CHECKING:
    import lance

logger = logging.getLogger(__name__)

SCALAR_INDEXES = ("BTREE", "BITMAP", "LABEL_LIST")
SCALAR_CONFIGS = {"BTree": "BTREE", "Bitmap": "BITMAP", "LabelList": "LABEL_LIST"}
# LanceDB's, for approximate indexes and for waiting for them
VECTOR_SETTINGS = {
    "ef_construction", "index_cache_size", "m", "max_iterations", "num_bits", "sample_rate",
    "target_partition_size", "train", "wait_timeout",
}  # fmt: skip
KEPT_FOR = timedelta(days=7)  # how long LanceDB keeps old versions
LONGEST = timedelta(days=36_500)  # longer ones do not fit Lance's microseconds


class Maintained(TableReader):
    """The half of :class:`gpu_lance.table.Table` that changes how rows are stored, not the rows."""

    # --------------------------------------------------------------- columns

    def add_columns(
        self, transforms: Mapping[str, str] | pa.Field | list[pa.Field] | pa.Schema
    ) -> ColumnsResult:
        """Add columns that are computed by SQL, or hold nulls.

        Parameters
        ----------
        transforms : dict of str to str, or Arrow fields
            SQL expressions over the other columns by name, or the fields of columns of nulls.

        Raises
        ------
        QueryError
            If an expression is not a whole one, or Lance does not understand it.
        SchemaError
            For a name that there is already, or that no column can have.

        Examples
        --------
        >>> import gpu_lance
        >>> table = gpu_lance.connect("memory://", device="cpu").create_table("t", [{"n": 2}])
        >>> table.add_columns({"double": "n * 2"}).version
        2
        >>> table.search().to_list()
        [{'n': 2, 'double': 4}]
        """
        added: Any
        if isinstance(transforms, Mapping):
            added = {name: sql.checked(text, "expression") for name, text in transforms.items()}
            names = list(added)
        else:
            fields = [transforms] if isinstance(transforms, pa.Field) else transforms
            if not isinstance(fields, list | tuple | pa.Schema) or not all(
                isinstance(field, pa.Field) for field in fields
            ):
                raise WrongTypeError(
                    "add_columns takes a dict of SQL expressions by column, or Arrow fields, got "
                    f"a {type(transforms).__name__}."
                )
            added = list(fields)
            names = [field.name for field in added]
        if not names:
            return ColumnsResult(self.version)
        self._check_new(names, self._storage.writable().schema.names)
        with asking("new column"):
            self._storage.run(lambda ds: ds.add_columns(added))
        return ColumnsResult(self.version)

    def alter_columns(self, *alterations: Mapping[str, Any]) -> ColumnsResult:
        """Rename columns, or change their type or whether they take nulls.

        Parameters
        ----------
        *alterations : dict
            ``path`` names the column; ``rename`` (str), ``data_type`` (pyarrow.DataType) and
            ``nullable`` (bool) say what to change.

        Raises
        ------
        SchemaError
            For the source or vector column of an embedding function, which knows them by name; for
            a new name that no column can have.
        """
        if not alterations:
            return ColumnsResult(self.version)
        used = self._used_columns()
        schema = self._storage.writable().schema
        indexes, names = index_metadata.read(schema.metadata), schema.names
        for alteration in alterations:
            if not isinstance(alteration, Mapping):
                raise WrongTypeError(
                    f"A change is a dict with path and what to change, got {alteration!r}."
                )
            _check_alteration(alteration)
            column = str(alteration.get("path")).strip("`")
            if "rename" in alteration and column in names:
                names.remove(column)
                self._check_new([str(alteration["rename"])], names)
                names.append(str(alteration["rename"]))
                if column in indexes:
                    indexes[names[-1]] = indexes.pop(column)
            if column in used and not set(alteration) <= {"path", "nullable"}:
                raise SchemaError(
                    f"Column {column!r} belongs to the embedding function of {used[column]!r}, so "
                    "it keeps its name and type. Drop that vector column first."
                )
        changes: list[Any] = [
            {"name" if key == "rename" else key: value for key, value in alteration.items()}
            for alteration in alterations
        ]
        with asking("change"):
            self._storage.run(lambda ds: ds.alter_columns(*changes))
        if indexes != index_metadata.read(schema.metadata):
            self._storage.set_metadata(index_metadata.written(indexes))
        return ColumnsResult(self.version)

    def drop_columns(self, columns: Iterable[str]) -> ColumnsResult:
        """Remove columns; with a vector column goes its embedding function.

        Raises
        ------
        UnknownColumnError
            For a column that the table does not have.
        SchemaError
            For the source of a vector column that stays.
        """
        names = [columns] if isinstance(columns, str) else list(columns)
        if not names:
            return ColumnsResult(self.version)
        schema = self._storage.writable().schema
        for name in names:
            root = name.split(".")[0]
            if root not in schema.names:
                raise UnknownColumnError(
                    f"Table '{self.name}' has no column {name!r}; it has {', '.join(schema.names)}."
                )
            for vector, config in self._configs(schema).items():
                if name in config.columns and vector not in names:
                    raise SchemaError(
                        f"Column {name!r} is the source of {vector!r}; drop that column too."
                    )
        with asking("change"):
            self._storage.run(lambda ds: ds.drop_columns(names))
        self._forget(schema, names)
        return ColumnsResult(self.version)

    def _check_new(self, names: list[str], others: list[str]) -> None:
        check_names(pa.schema([pa.field(name, pa.null()) for name in names]))
        if there := [name for name in names if name in others]:
            raise SchemaError(
                f"Table '{self.name}' has a column {', '.join(map(repr, there))} already."
            )

    def _used_columns(self) -> dict[str, str]:
        """The columns that embedding functions read and write, each with the vector column."""
        used: dict[str, str] = {}
        for vector, config in self._configs(self._storage.writable().schema).items():
            used.update(dict.fromkeys((*config.columns, vector), vector))
        return used

    def _forget(self, schema: pa.Schema, names: list[str]) -> None:
        """Take what the metadata says of those vector columns away."""
        metadata = schema.metadata or {}
        changed: dict[str, str | None] = {}
        functions = self._configs(schema)
        if any(name in functions for name in names):
            left = [config for name, config in functions.items() if name not in names]
            changed["embedding_functions"] = None
            for key, value in (get_registry().get_table_metadata(left) or {}).items():
                changed[str(key)] = value.decode() if isinstance(value, bytes) else str(value)
        stored = fingerprint.read(metadata)
        if any(name in stored for name in names):
            kept = {name: value for name, value in stored.items() if name not in names}
            changed[fingerprint.METADATA_KEY.decode()] = json.dumps(kept)
        indexes = index_metadata.read(metadata)
        if any(name in indexes for name in names):
            kept_indexes = {name: value for name, value in indexes.items() if name not in names}
            changed.update(index_metadata.written(kept_indexes))
        if changed:
            self._storage.set_metadata(changed)

    # --------------------------------------------------------------- indexes

    def create_index(
        self,
        column: str | None = None,
        num_partitions: int | None = None,
        num_sub_vectors: int | None = None,
        vector_column_name: str = "vector",
        replace: bool = True,
        accelerator: str | None = None,
        *,
        config: Any = None,
        name: str | None = None,
        metric: str | None = None,
        index_type: str = "IVF_PQ",
        **settings: Any,
    ) -> None:
        """Say how a vector column is searched by default, or let Lance index another column.

        A vector column is searched exactly whatever is asked for: approximate indexes are not
        available yet, and of one only the metric is kept.

        Parameters
        ----------
        column : str, optional
            The column. Without `config` it may be the metric, LanceDB's first argument of old.
        config : object
            ``Flat`` or one of LanceDB's vector indexes, for its ``distance_type``; ``BTree``,
            ``Bitmap`` or ``LabelList`` for a column to filter by. This package's and LanceDB's
            objects do.
        name : str, optional
            Of a scalar index.
        metric : {"l2", "cosine", "dot"}
            In LanceDB's older style, without `config`.
        vector_column_name, index_type
            Of the older style.
        num_partitions, num_sub_vectors, accelerator, **settings
            Of approximate indexes; taken, and of no effect.
        replace : bool
            Whether an index that is there is made again.

        Raises
        ------
        UnknownColumnError
            If there is no such column, or it holds no vectors.
        QueryError
            For another metric, or a full-text index.
        BadInputError
            For another kind of index.
        TypeError
            For a setting that no index has.

        Examples
        --------
        >>> import gpu_lance
        >>> from gpu_lance.index import BTree, Flat
        >>> table = gpu_lance.connect("memory://", device="cpu").create_table(
        ...     "t", [{"n": 1, "vector": [3.0, 4.0]}]
        ... )
        >>> table.create_index("vector", config=Flat(distance_type="cosine"))
        >>> table.create_index("n", config=BTree())
        >>> round(table.search([6.0, 8.0]).where("n = 1").to_list()[0]["_distance"], 6)
        0.0
        """
        if unknown := sorted(settings.keys() - VECTOR_SETTINGS):
            raise WrongTypeError(f"create_index has no argument {', '.join(unknown)}.")
        schema = self.schema
        if config is None and column in schema.names and column not in list(Metric):
            if not pa.types.is_fixed_size_list(schema.field(column).type):
                self.create_scalar_index(str(column), replace=replace, name=name)  # as LanceDB
                return
            vector_column_name, column = str(column), None
        kind = str(index_type) if config is None else type(config).__name__
        if kind in SCALAR_CONFIGS:
            self.create_scalar_index(
                column or vector_column_name, replace=replace, name=name,
                index_type=SCALAR_CONFIGS[kind],
            )  # fmt: skip
            return
        if kind.upper() in ("FTS", "FM"):
            raise QueryError("Full-text indexes are not available yet.")
        if config is None:
            asked: Any = metric or column or "l2"
            target = vector_column_name
        else:
            asked = getattr(config, "distance_type", None)
            target = column or vector_column_name
        vector = kind == "Flat" or kind.upper().startswith(("IVF", "HNSW", "CAGRA"))
        if not vector or not isinstance(asked, str):
            raise BadInputError(
                f"{config or index_type!r} is no kind of index; use Flat, BTree, Bitmap or "
                "LabelList of gpu_lance.index, or one of LanceDB's."
            )
        flat = Flat(distance_type=asked)  # type: ignore[arg-type]
        self.column_index(target)
        if kind != "Flat":
            logger.warning(
                "Column %r is searched exactly, by %s: approximate indexes such as %s are not "
                "available yet.",
                target,
                flat.metric,
                kind,
            )
        metadata = self._storage.writable().schema.metadata
        self._storage.set_metadata(index_metadata.updated(metadata, target, flat))

    def create_scalar_index(
        self,
        column: str,
        *,
        replace: bool = True,
        index_type: str = "BTREE",
        name: str | None = None,
    ) -> None:
        """Let Lance index a column, so that filters on it need no scan.

        Parameters
        ----------
        column : str
        replace : bool
            Whether an index that is there is made again, rather than an error.
        index_type : {"BTREE", "BITMAP", "LABEL_LIST"}
        name : str, optional
            ``<column>_idx`` if not given.

        Notes
        -----
        LanceDB 0.40, whose Lance is older, does not keep a B-tree of ours right when it updates or
        optimizes the table: where it writes too, take ``BITMAP``, or make the index again.

        Raises
        ------
        UnknownColumnError
            If there is no such column.
        BadInputError
            For another type of index, or a column that it cannot index.
        """
        kind = str(index_type).upper().replace("-", "_")
        if kind not in SCALAR_INDEXES:
            raise BadInputError(
                f"index_type is {index_type!r}; it must be one of "
                f"{', '.join(map(repr, SCALAR_INDEXES))}."
            )
        schema = self._storage.writable().schema
        if not isinstance(column, str) or column.split(".")[0] not in schema.names:
            raise UnknownColumnError(
                f"Table '{self.name}' has no column {column!r}; it has {', '.join(schema.names)}."
            )

        def create(dataset: lance.LanceDataset) -> None:
            dataset.create_scalar_index(column, kind, name=name, replace=replace)  # type: ignore[arg-type]

        try:
            self._storage.run(create)
        except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
            if isinstance(error, GpuLanceError):
                raise
            raise BadInputError(
                f"Column {column!r} cannot be indexed: {first_line(error)}."
            ) from error
        if kind == "BTREE" and any(_is_new_btree(index) for index in self._lance_indexes()):
            logger.warning(
                "Table %r has a B-tree that LanceDB 0.40 does not keep right: if LanceDB updates "
                "or optimizes the table, make the index again, or use index_type='BITMAP'.",
                self.name,
            )

    def _lance_indexes(self) -> list[Any]:
        return list(self._storage.latest().describe_indices())

    def drop_index(self, name: str) -> None:
        """Remove one of Lance's indexes by its name.

        Raises
        ------
        BadInputError
            If there is none of that name.
        """
        names = [index.name for index in self._lance_indexes()]
        if name not in names:
            raise BadInputError(
                f"Table '{self.name}' has no index {name!r}; it has {', '.join(names) or 'none'}."
            )
        self._storage.run(lambda ds: ds.drop_index(name))

    # ---------------------------------------------------------------- upkeep

    def compact_files(self, **options: Any) -> Any:
        """Join small files and leave deleted rows out; gives Lance's metrics.

        Parameters
        ----------
        **options
            Of Lance's ``dataset.optimize.compact_files``.
        """
        return self._storage.run(lambda ds: ds.optimize.compact_files(**options))

    def cleanup_old_versions(
        self, older_than: timedelta | None = None, *, delete_unverified: bool = False
    ) -> Any:
        """Delete versions that are older than `older_than`, 7 days by default.

        Tagged versions stay. Gives Lance's statistics.

        Parameters
        ----------
        older_than : timedelta, optional
        delete_unverified : bool
            Also files that may belong to a write that is going on.

        Raises
        ------
        BadInputError
            If `older_than` is negative or no timedelta.
        """
        age = _checked_age(older_than)
        return self._storage.run(
            lambda ds: ds.cleanup_old_versions(
                age,
                delete_unverified=delete_unverified,
                error_if_tagged_old_versions=False,
            )
        )

    def optimize(
        self, *, cleanup_older_than: timedelta | None = None, delete_unverified: bool = False
    ) -> None:
        """Compact files, bring scalar indexes up to date, and clean up old versions.

        B-trees that LanceDB made stay as they are, since it could not keep them right afterwards;
        rows that they lack are found by a scan.

        Parameters
        ----------
        cleanup_older_than : timedelta, optional
            7 days if not given.
        delete_unverified : bool
            See :meth:`cleanup_old_versions`.
        """
        _checked_age(cleanup_older_than)
        self.compact_files()
        names = [
            index.name
            for index in self._lance_indexes()
            if index.index_type != "BTree" or _is_new_btree(index)
        ]
        if names:
            self._storage.run(lambda ds: ds.optimize.optimize_indices(index_names=names))
        self.cleanup_old_versions(cleanup_older_than, delete_unverified=delete_unverified)


def _is_new_btree(index: Any) -> bool:
    """Whether it is a B-tree in a form that LanceDB 0.40 does not know."""
    return index.index_type == "BTree" and any(part.index_version > 0 for part in index.segments)


def _checked_age(older_than: timedelta | None) -> timedelta:
    age = KEPT_FOR if older_than is None else older_than
    if not isinstance(age, timedelta) or not timedelta(0) <= age <= LONGEST:
        raise BadInputError(
            f"The age is {older_than!r}; it must be a timedelta of 0 to {LONGEST.days} days."
        )
    return age


def _check_alteration(alteration: Mapping[str, Any]) -> None:
    kinds = {"path": str, "rename": str, "data_type": pa.DataType, "nullable": bool}
    if unknown := sorted(map(str, alteration.keys() - kinds)):
        raise BadInputError(
            f"A change of a column has no {', '.join(map(repr, unknown))}; it may have "
            f"{', '.join(kinds)}."
        )
    for key, value in alteration.items():
        if not isinstance(value, kinds[key]):
            raise WrongTypeError(
                f"The {key} of a changed column is a {kinds[key].__name__}, got {value!r}."
            )
