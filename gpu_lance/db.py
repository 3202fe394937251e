"""Connect to a place and create, open, list and drop the tables in it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from gpu_lance.catalog import FolderCatalog, StoreCatalog, checked_name
from gpu_lance.device import check_device_name, resolve_device
from gpu_lance.embeddings import EmbeddingFunctionConfig, get_registry
from gpu_lance.errors import (
    BadInputError,
    TableExistsError,
    TableNotFoundError,
    WrongTypeError,
)
from gpu_lance.handover import take_in
from gpu_lance.index.budget import Budget
from gpu_lance.index.resident import ResidentIndexes
from gpu_lance.ingest.existing import check_same
from gpu_lance.ingest.pipeline import Pipeline
from gpu_lance.ingest.progress import progress_callback
from gpu_lance.ingest.tables import Planned, described, plan_table
from gpu_lance.ingest.vector_column import Policy, vector_columns
from gpu_lance.storage import Storage, is_remote
from gpu_lance.table import Table
from gpu_lance.types import ListTablesResponse, OnBadVectors, type_of

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

MEMORY = "memory://"

# Arguments of LanceDB's connect, for what is not here.
NOT_HERE = {
    "client_config", "host_override", "manifest_enabled", "namespace_client_impl",
    "namespace_client_properties", "namespace_client_pushdown_operations", "region",
    "request_thread_pool", "session", "sql_host_override",
}  # fmt: skip


def connect(
    uri: str | Path | None = None,
    *,
    api_key: str | None = None,
    read_consistency_interval: timedelta | None = None,
    storage_options: Mapping[str, str] | None = None,
    device: str | torch.device = "auto",
    memory_budget: int | str | None = None,
    **others: Any,
) -> LanceDBConnection:
    """Connect to a database; nothing is loaded, and the folder need not exist.

    Parameters
    ----------
    uri : str or Path
        A folder, ``memory://``, or an object store's URI such as ``s3://bucket/folder``.
    api_key : str, optional
        LanceDB Cloud's, which is refused: its tables are not files, so there is nothing to search
        here.
    read_consistency_interval : timedelta, optional
        How old the version may be that a table reads. None: always the latest, or up to 5 seconds
        old on an object store.
    storage_options : mapping of str to str, optional
        Passed to Lance for object stores.
    device : str or torch.device
        Where vectors are held and searched: ``"auto"``, ``"cuda"``, ``"cuda:1"``, ``"cpu"``.
        Whether it is there is found when something is first embedded or searched.
    memory_budget : int or str, optional
        The most memory of the device that resident vectors of this connection take: bytes, or
        text such as ``"8GiB"``, ``"500 MB"`` or ``"50%"`` of what the device has. Columns beyond
        it are narrowed, streamed, or searched in Lance, and those used least recently make room;
        ``explain_plan`` says which. None: the limit in the environment variable
        GPU_LANCE_MEMORY_BUDGET, which such connections share, or else what is free.
    **others
        LanceDB's other arguments, such as `region`, which are refused: they are for its cloud, its
        namespaces and its caches.

    Raises
    ------
    ValueError
        For LanceDB Cloud, an argument that means nothing here, a `uri` that is a file, or a
        `memory_budget` that is no size.
    TypeError
        For an argument that LanceDB does not know either.
    DeviceError
        For a device of another name.

    Examples
    --------
    >>> import gpu_lance
    >>> db = gpu_lance.connect("memory://")
    >>> table = db.create_table("t", [{"vector": [1.0, 2.0]}])
    >>> db.table_names(), "t" in db
    (['t'], True)
    """
    for name in others:
        if name not in NOT_HERE:
            raise TypeError(f"connect() got an unexpected keyword argument {name!r}")
    if api_key is not None or (isinstance(uri, str) and uri.startswith("db://")):
        raise BadInputError(
            "LanceDB Cloud is not supported: connect to a folder or an object store instead."
        )
    given = [name for name, value in others.items() if value is not None and value is not False]
    if given:
        raise BadInputError(
            f"connect takes no {' or '.join(given)}: LanceDB's cloud, namespaces and sessions are "
            "not supported. Leave it out."
        )
    if uri is None:
        raise BadInputError("connect needs a folder, 'memory://', or an object store's URI.")
    if not isinstance(uri, str | os.PathLike):
        raise WrongTypeError(f"connect takes a str or a Path, got {type_of(uri)}.")
    check_device_name(device)
    text = os.fspath(uri)
    if not text:
        raise BadInputError("connect got an empty path; '.' is the folder that you are in.")
    if read_consistency_interval is not None and not isinstance(
        read_consistency_interval, timedelta
    ):
        raise WrongTypeError(
            "read_consistency_interval is a datetime.timedelta or None, got a "
            f"{type(read_consistency_interval).__name__}."
        )
    return LanceDBConnection(
        text,
        read_consistency_interval=read_consistency_interval,
        storage_options=storage_options,
        device=device,
        memory_budget=memory_budget,
    )


class LanceDBConnection:
    """The tables in one place, and what of them is held on the device. Made by :func:`connect`.

    Tables that it opens share their resident vectors. Closing it, or leaving its ``with`` block,
    frees the device memory.
    """

    def __init__(
        self,
        uri: str,
        *,
        read_consistency_interval: timedelta | None = None,
        storage_options: Mapping[str, str] | None = None,
        device: str | torch.device = "auto",
        memory_budget: int | str | None = None,
    ) -> None:
        self._uri = uri
        self._interval = read_consistency_interval
        self._options = dict(storage_options or {}) or None
        self._wanted_device = device
        self._budget = None if memory_budget is None else Budget(device, memory_budget)
        self._lock = threading.RLock()
        self._resident: dict[str, ResidentIndexes] = {}
        # a dataset in memory lives as long as a handle of it
        self._memory: dict[str, Storage] = {}
        self._in_memory = uri.startswith(MEMORY)
        self._catalog: FolderCatalog | StoreCatalog
        if is_remote(uri) or self._in_memory:
            self._catalog = StoreCatalog(uri, storage_options)
        else:
            self._catalog = FolderCatalog(uri.removeprefix("file://"))

    @property
    def uri(self) -> str:
        """Where the tables are, as it was given."""
        return self._uri

    @property
    def read_consistency_interval(self) -> timedelta | None:
        """How old the version may be that a table reads; None for the latest."""
        return self._interval

    @property
    def device(self) -> torch.device:
        """Where vectors are held and searched."""
        return resolve_device(self._wanted_device)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(uri={self._uri!r})"

    # ---------------------------------------------------------------- listing

    def table_names(self, page_token: str | None = None, limit: int | None = None) -> list[str]:
        """The tables' names, sorted: those after `page_token`, at most `limit`."""
        _check_limit(limit)
        with self._lock:
            names = sorted(self._memory) if self._in_memory else self._catalog.names()
        if page_token:
            names = [name for name in names if name > page_token]
        return names[:limit]

    def list_tables(
        self,
        namespace_path: Sequence[str] | None = None,
        page_token: str | None = None,
        limit: int | None = None,
    ) -> ListTablesResponse:
        """The tables' names, sorted, a page at a time.

        Parameters
        ----------
        namespace_path : sequence of str, optional
            Only the root, [] or None: there are no others here.
        page_token : str, optional
            Of the page before.
        limit : int, optional
            The most names.

        Examples
        --------
        >>> import gpu_lance
        >>> db = gpu_lance.connect("memory://")
        >>> table = db.create_table("t", [{"n": 1}])
        >>> db.list_tables().tables
        ['t']
        """
        if namespace_path:
            raise BadInputError(f"There is no namespace {list(namespace_path)!r}: tables are flat.")
        _check_limit(limit)
        if not limit:
            return ListTablesResponse(self.table_names(page_token, limit))
        names = self.table_names(page_token, limit + 1)
        return ListTablesResponse(names[:limit], names[limit - 1] if len(names) > limit else None)

    def __len__(self) -> int:
        return len(self.table_names())

    def __contains__(self, name: object) -> bool:
        return name in self.table_names()

    def __iter__(self) -> Iterator[str]:
        return iter(self.table_names())

    def __getitem__(self, name: str) -> Table:
        return self.open_table(name)

    # --------------------------------------------------------------- creating

    def create_table(
        self,
        name: str,
        data: Any = None,
        schema: Any = None,
        mode: str = "create",
        exist_ok: bool = False,
        on_bad_vectors: str = "error",
        fill_value: float = 0.0,
        embedding_functions: Sequence[EmbeddingFunctionConfig] | None = None,
        *,
        storage_options: Mapping[str, str] | None = None,
        progress: Any = None,
    ) -> Table:
        """Make a table from data, from a schema, or from both.

        Parameters
        ----------
        name : str
            Of letters, digits, ``_``, ``-`` and ``.``.
        data : object, optional
            Anything that :meth:`Table.add` takes; or a LanceModel class, taken for the schema.
        schema : LanceModel class or pyarrow.Schema, optional
            Without it the data decides.
        mode : {"create", "overwrite"}
            ``overwrite`` replaces a table of that name, as a new version.
        exist_ok : bool
            Open the table if there is one, adding nothing. Its columns and embedding functions must
            be those of `schema`, or without it of the data; session arguments of the functions that
            are given, such as `device`, then hold for the table.
        on_bad_vectors, fill_value, progress
            As in :meth:`Table.add`.
        embedding_functions : sequence of EmbeddingFunctionConfig, optional
            Which function embeds which column, beside those that the schema names.
        storage_options : mapping of str to str, optional
            Beside those of the connection.

        Raises
        ------
        TableExistsError
            If there is such a table (a ValueError).
        SchemaError
            If there is such a table, and it has other columns or functions (a ValueError).
        BadInputError, BadVectorError, SchemaError, UnsupportedDataError
            If the data does not fit; no table is made.

        Examples
        --------
        >>> import gpu_lance
        >>> import pyarrow as pa
        >>> schema = pa.schema({"name": pa.utf8(), "vector": pa.list_(pa.float32(), 2)})
        >>> gpu_lance.connect("memory://").create_table("points", schema=schema).count_rows()
        0
        """
        checked_name(name)
        if mode not in ("create", "overwrite"):
            raise BadInputError(f"mode is {mode!r}; it must be 'create' or 'overwrite'.")
        policy = Policy(OnBadVectors.parse(on_bad_vectors), fill_value)
        exists = name in self
        if exists and mode == "create":
            if not exist_ok:
                raise TableExistsError(
                    f"Table '{name}' already exists. Open it with open_table, keep it with "
                    "exist_ok=True, or replace it with mode='overwrite'."
                )
            # rows are not added, so beside a schema they are not even read
            rows = data if schema is None else None
            columns, _, functions = described(rows, schema, embedding_functions)
            table = self._open(name, storage_options, functions)
            stored = get_registry().parse_functions(table.schema.metadata)
            check_same(name, (table.schema, stored), (columns, functions))
            return table
        planned = plan_table(data, schema, embedding_functions)
        functions = planned.functions
        columns = vector_columns(planned.schema, functions)
        indexes = ResidentIndexes(self._wanted_device, self._budget)
        with progress_callback(progress, planned.source.num_rows) as report:
            run = Pipeline(planned.schema, columns, policy, indexes, report)
            storage = run.write(
                planned.source,
                lambda batches: self._create(name, batches, planned, exists, storage_options),
            )
        with self._lock:
            old = self._resident.pop(name, None)
            if old is not None:
                old.close()
            self._resident[name] = indexes
            if self._in_memory:
                self._memory[name] = storage
        table = Table(storage, indexes, functions)
        table.last_report = run.report
        take_in(indexes, storage.dataset(), planned.schema, run.kept, list(functions))
        return table

    def _create(
        self,
        name: str,
        batches: Iterator[Any],
        planned: Planned,
        exists: bool,
        storage_options: Mapping[str, str] | None,
    ) -> Storage:
        old: Any = None
        if exists:
            old = self._memory[name].latest() if self._in_memory else self._catalog.uri(name)
        return Storage.create(
            self._memory_uri() if self._in_memory else self._catalog.uri(name),
            name,
            batches,
            planned.schema,
            overwrite=old,
            storage_options=self._merged(storage_options),
            read_consistency_interval=self._interval,
        )

    def open_table(self, name: str, *, storage_options: Mapping[str, str] | None = None) -> Table:
        """Open a table; no model is loaded and no vector is read.

        Raises
        ------
        TableNotFoundError
            If there is none of that name (a ValueError).
        """
        checked_name(name)
        return self._open(name, storage_options)

    def _open(
        self,
        name: str,
        storage_options: Mapping[str, str] | None,
        functions: Mapping[str, EmbeddingFunctionConfig] | None = None,
    ) -> Table:
        with self._lock:
            if self._in_memory:
                if name not in self._memory:
                    raise TableNotFoundError(f"Table '{name}' was not found")
                handle = self._memory[name].latest()
                storage = Storage(self._memory_uri(), name, None, self._interval, handle)
            else:
                storage = Storage(
                    self._catalog.uri(name), name, self._merged(storage_options), self._interval
                )
            indexes = self._resident.get(name)
            if indexes is None:
                indexes = self._resident[name] = ResidentIndexes(self._wanted_device, self._budget)
        return Table(storage, indexes, functions)

    # --------------------------------------------------------------- dropping

    def drop_table(self, name: str, ignore_missing: bool = False) -> None:
        """Delete a table with all its versions.

        Raises
        ------
        TableNotFoundError
            If there is none, unless `ignore_missing`.
        """
        checked_name(name)
        with self._lock:
            indexes = self._resident.pop(name, None)
            if indexes is not None:
                indexes.close()
            try:
                if not self._in_memory:
                    self._catalog.drop(name)
                elif self._memory.pop(name, None) is None:
                    raise TableNotFoundError(f"Table '{name}' was not found")
            except TableNotFoundError:
                if not ignore_missing:
                    raise

    def drop_all_tables(self) -> None:
        """Delete every table."""
        for name in self.table_names():
            self.drop_table(name, ignore_missing=True)

    # ---------------------------------------------------------------- closing

    def close(self) -> None:
        """Free the device memory of all tables; a later search loads them again."""
        with self._lock:
            for indexes in self._resident.values():
                indexes.close()

    def __enter__(self) -> LanceDBConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _merged(self, storage_options: Mapping[str, str] | None) -> dict[str, str] | None:
        return {**(self._options or {}), **(storage_options or {})} or None

    def _memory_uri(self) -> str:
        return MEMORY


def _check_limit(limit: int | None) -> None:
    if limit is not None and (not isinstance(limit, int) or limit < 0):
        raise BadInputError(f"limit is {limit!r}; it must be a whole number from 0.")


DBConnection: TypeAlias = LanceDBConnection  # LanceDB's name for any connection
