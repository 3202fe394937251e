"""One Lance dataset: a handle at the version to read, and every way to write a new version."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

import lance
import pyarrow as pa
from lance.fragment import RowIdSequence, write_fragments

from gpu_lance.errors import (
    BadInputError,
    StorageError,
    TableNotFoundError,
)
from gpu_lance.forks import ForkGuard
from gpu_lance.lance_errors import first_line, storing, writing

T = TypeVar("T")

FORMAT: Final = "2.2"  # LanceDB appends to a newer one and cannot read it back
REMOTE_INTERVAL = timedelta(seconds=5)
# Bytes of what Lance remembers of a table's versions and files. Its own limit is 1 GiB a handle,
# and a table that others write to fills it, at about 15 KB a version.
METADATA_CACHE = 64 << 20


_lance = ForkGuard()


def check_fork() -> None:
    """Refuse to write rows in a process that was forked from one that had a table open.

    Lance's threads do not come along, and its writer then often ends the process.

    Raises
    ------
    StorageError
    """
    if _lance.lost:
        raise StorageError(
            "This process was forked from one that had opened a table already, and Lance cannot "
            "write rows there. Start processes by 'spawn' (multiprocessing.get_context('spawn')), "
            "or fork before the first table is opened."
        )


def is_remote(uri: str) -> bool:
    """Whether `uri` names an object store rather than a folder or memory.

    Examples
    --------
    >>> is_remote("s3://bucket/db"), is_remote("./db"), is_remote("memory://")
    (True, False, False)
    """
    return "://" in uri and not uri.startswith(("memory://", "file://"))


def operation_of(dataset: lance.LanceDataset) -> str | None:
    """What made the dataset's version, e.g. ``"Append"``; None if that is not known."""
    try:
        # on a handle of its own, since Lance locks the handle for it
        own = dataset.checkout_version(dataset.version)
        transaction = own.read_transaction(own.version)
    except (OSError, RuntimeError, ValueError, TypeError):  # TypeError: see index.sync.changes
        return None
    return None if transaction is None else type(transaction.operation).__name__


@dataclass
class ChangedRows:
    """Which rows of a version get new values.

    Parameters
    ----------
    row_ids : list of int
        In the order in which the new values are written.
    offsets : dict of int to list of int
        By fragment, where in it they are.
    """

    row_ids: list[int] = field(default_factory=list)
    offsets: dict[int, list[int]] = field(default_factory=dict)

    def add(self, row_ids: pa.Array, addresses: pa.Array) -> None:
        """Note more rows, by Lance's ids and addresses."""
        self.row_ids.extend(row_ids.to_pylist())
        for address in addresses.to_pylist():
            self.offsets.setdefault(address >> 32, []).append(address & (2**32 - 1))


class Storage:
    """The dataset of one table: its latest version, or the one that was checked out.

    Safe to use from several threads. A dataset in memory exists only through its handle, so the
    handle is kept; one on disk is opened anew when somebody replaced it.

    Parameters
    ----------
    uri : str
        Of the dataset.
    name : str
        Of the table, for messages.
    storage_options : mapping of str to str, optional
        Passed to Lance for object stores.
    read_consistency_interval : timedelta, optional
        How long a handle is read from before Lance is asked for a newer version. None asks each
        time, or every 5 seconds on an object store.
    handle : lance.LanceDataset, optional
        A dataset that is open already.

    Raises
    ------
    TableNotFoundError
        If there is no dataset.
    """

    def __init__(
        self,
        uri: str,
        name: str,
        storage_options: Mapping[str, str] | None = None,
        read_consistency_interval: timedelta | None = None,
        handle: lance.LanceDataset | None = None,
    ) -> None:
        _lance.use()
        self.uri = uri
        self.name = name
        self.storage_options = dict(storage_options or {}) or None
        if read_consistency_interval is None and is_remote(uri):
            read_consistency_interval = REMOTE_INTERVAL
        self._interval = (read_consistency_interval or timedelta()).total_seconds()
        self._lock = threading.RLock()
        self._pinned: lance.LanceDataset | None = None
        self._latest = handle if handle is not None else self._open()
        self._asked = time.monotonic()
        self._manifest = self._stamp(self._latest)

    @classmethod
    def create(
        cls,
        uri: str,
        name: str,
        data: Iterator[pa.RecordBatch],
        schema: pa.Schema,
        *,
        overwrite: lance.LanceDataset | str | None = None,
        storage_options: Mapping[str, str] | None = None,
        read_consistency_interval: timedelta | None = None,
    ) -> Storage:
        """Write a new dataset with stable row ids, or a new first version over an old one.

        Raises
        ------
        TableExistsError
            If there is one already and `overwrite` is not given.
        """
        target = uri if overwrite is None else overwrite
        with _errors_of(data) as stream, writing(name):
            handle = _write(
                stream,
                schema,
                target,
                mode="create" if overwrite is None else "overwrite",
                storage_options=dict(storage_options or {}) or None,
            )
        return cls(uri, name, storage_options, read_consistency_interval, handle)

    def _open(self) -> lance.LanceDataset:
        try:
            return lance.dataset(self.uri, storage_options=self.storage_options, session=_session())
        except (ValueError, OSError) as error:
            if "not found" in str(error).lower() or isinstance(error, FileNotFoundError):
                raise TableNotFoundError(f"Table '{self.name}' was not found") from error
            raise StorageError(
                f"Table '{self.name}' cannot be opened: {first_line(error)}. Its files are damaged "
                f"or may not be read; put {self.uri} back from a copy, or drop the table."
            ) from error

    # ------------------------------------------------------------------ reading

    def dataset(self) -> lance.LanceDataset:
        """The version to read: the one that was checked out, else the latest.

        Raises
        ------
        TableNotFoundError
            If the table is gone.
        """
        with self._lock:
            return self._pinned if self._pinned is not None else self._refreshed()

    def latest(self) -> lance.LanceDataset:
        """The latest version, whatever was checked out; asks Lance each time."""
        with self._lock:
            return self._refreshed(now=True)

    @property
    def pinned(self) -> bool:
        """Whether a version is checked out, so that the table cannot be written to."""
        return self._pinned is not None

    def _refreshed(self, now: bool = False) -> lance.LanceDataset:
        if not now and time.monotonic() - self._asked < self._interval:
            return self._latest
        if self.uri.startswith("memory://"):
            newest = self._latest.latest_version
            if newest != self._latest.version:
                self._latest = self._latest.checkout_version(newest)
        elif self._manifest is None or self._stamp(self._latest) != self._manifest:
            self._hold(self._open())  # dropped, made anew or cleaned up by somebody
        else:
            try:
                newest = self._latest.latest_version
                if newest != self._latest.version:
                    self._hold(self._latest.checkout_version(newest))
            except (OSError, ValueError):  # it went this moment
                self._hold(self._open())
        self._asked = time.monotonic()
        return self._latest

    def _hold(self, dataset: lance.LanceDataset) -> None:
        self._latest = dataset
        self._manifest = self._stamp(dataset)
        self._asked = time.monotonic()

    def _stamp(self, dataset: lance.LanceDataset) -> tuple[int, int, int] | None:
        """What tells this version's manifest from that of a table made anew in its place."""
        if "://" in self.uri:
            return None if not self.uri.startswith("memory://") else (0, 0, 0)
        version = dataset.version
        for name in (f"{2**64 - 1 - version:020}.manifest", f"{version}.manifest"):
            with contextlib.suppress(OSError):
                status = os.stat(os.path.join(self.uri, "_versions", name))
                return status.st_ino, status.st_mtime_ns, status.st_size
        return None

    def checkout(self, version: int | str) -> None:
        """Read that version or tag from now on.

        Raises
        ------
        ValueError
            If there is no such version.
        """
        with self._lock:
            latest = self._refreshed(now=True)
            try:
                self._pinned = latest.checkout_version(version)
            except (OSError, ValueError, OverflowError) as error:
                raise BadInputError(
                    f"Table '{self.name}' has no version {version!r}. It may have been cleaned up; "
                    "list_versions() and tags.list() have those that there are."
                ) from error

    def checkout_latest(self) -> None:
        """Read the latest version again."""
        with self._lock:
            self._pinned = None

    # ------------------------------------------------------------------ writing

    def writable(self) -> lance.LanceDataset:
        """The latest version, to build a new one on.

        Raises
        ------
        ValueError
            While an older version is checked out.
        """
        with self._lock:
            if self._pinned is not None:
                raise BadInputError(
                    f"Table '{self.name}' is checked out at version {self._pinned.version}, which "
                    "cannot be modified; call checkout_latest() or restore() first."
                )
            return self._refreshed(now=True)

    def append(self, data: Iterator[pa.RecordBatch], schema: pa.Schema) -> lance.LanceDataset:
        """Commit the rows of `data` as one version and return the dataset at it.

        An exception of the iterator passes through, and nothing is committed.
        """
        return self._rows_written(data, schema, "append")

    def overwrite(self, data: Iterator[pa.RecordBatch], schema: pa.Schema) -> lance.LanceDataset:
        """Replace all rows and the schema, its metadata included, in one version."""
        return self._rows_written(data, schema, "overwrite")

    def _rows_written(
        self, data: Iterator[pa.RecordBatch], schema: pa.Schema, mode: str
    ) -> lance.LanceDataset:
        with _errors_of(data) as stream, writing(self.name):
            return self._committed(_write(stream, schema, self._own_handle(), mode=mode))

    def replace_rows(
        self,
        base: lance.LanceDataset,
        changed: ChangedRows,
        data: Iterator[pa.RecordBatch],
        schema: pa.Schema,
    ) -> lance.LanceDataset:
        """Commit new values of the rows in `changed`; they keep their row ids.

        Parameters
        ----------
        base : lance.LanceDataset
            The version that they were read from.
        changed : ChangedRows
            Which rows they are, filled in the order of `data` while `data` is read.
        data : iterator of pyarrow.RecordBatch
            Whole rows.
        schema : pyarrow.Schema

        Raises
        ------
        CommitConflictError
            If another writer changed the same rows meanwhile; nothing was changed.
        """
        with _errors_of(data) as stream, writing(self.name):
            fragments = write_fragments(
                pa.RecordBatchReader.from_batches(schema, stream), base, mode="append"
            )
        if not changed.row_ids:
            return base
        if base.has_stable_row_ids:
            done = 0
            for fragment in fragments:
                part = changed.row_ids[done : done + fragment.physical_rows]
                fragment.row_id_meta = RowIdSequence(part).to_inline_metadata()
                done += fragment.physical_rows
        removed, updated = [], []
        # not by the condition that found them: now() and random() would find others this time
        for fragment_id, offsets in sorted(changed.offsets.items()):
            stored = base.get_fragment(fragment_id)
            assert stored is not None  # its rows were just read
            after = stored.delete_rows(offsets)
            if after is None:
                removed.append(fragment_id)
            else:
                updated.append(after)
        operation = lance.LanceOperation.Update(
            removed_fragment_ids=removed,
            updated_fragments=updated,
            new_fragments=fragments,
            update_mode="rewrite_rows",
        )
        with writing(self.name):
            return self._committed(
                lance.LanceDataset.commit(base, operation, read_version=base.version)
            )

    def merge(
        self,
        on: list[str],
        data: Iterator[pa.RecordBatch],
        schema: pa.Schema,
        apply: Callable[[Any, pa.RecordBatchReader], dict[str, int]],
    ) -> tuple[lance.LanceDataset, dict[str, int]]:
        """Commit a merge by key; `apply` gets Lance's builder and the data, and returns counts."""
        dataset = self._own_handle()
        with _errors_of(data) as stream, writing(self.name):
            reader = pa.RecordBatchReader.from_batches(schema, stream)
            counts = apply(dataset.merge_insert(on), reader)
        return self._committed(dataset), counts

    def delete(self, where: str) -> tuple[int, lance.LanceDataset]:
        """Commit the deletion of the rows for which `where` holds: how many, and the dataset."""
        dataset = self._own_handle()
        with writing(self.name):
            result = dataset.delete(where)
        return int(result["num_deleted_rows"]), self._committed(dataset)

    def set_metadata(self, metadata: Mapping[str, str | None]) -> None:
        """Commit schema metadata beside what is there; None takes a key away."""
        dataset = self._own_handle()
        with writing(self.name):
            dataset.update_schema_metadata(dict(metadata))
        self._committed(dataset)

    def restore(self, version: int | str | None) -> lance.LanceDataset:
        """Commit the rows of an older version, or of the one checked out, as the newest one."""
        with self._lock:
            if version is None:
                if self._pinned is None:
                    raise BadInputError(
                        f"Table '{self.name}' is at its latest version; pass the version to "
                        "restore, or check it out first."
                    )
                old = self._pinned
            else:
                latest = self._refreshed(now=True)
                try:
                    old = latest.checkout_version(version)
                except (OSError, ValueError, OverflowError) as error:
                    raise BadInputError(
                        f"Table '{self.name}' has no version {version!r}. It may have been cleaned "
                        "up; list_versions() and tags.list() have those that there are."
                    ) from error
            with writing(self.name):
                old = old.checkout_version(old.version)
                old.restore()
            self._pinned = None
            return self._committed(self._refreshed(now=True))

    def run(self, change: Callable[[lance.LanceDataset], T]) -> T:
        """Let `change` commit something through a handle of the latest version.

        Parameters
        ----------
        change : callable
            Given a dataset that nobody else holds, e.g. ``lambda ds: ds.drop_columns(["a"])``.
        """
        check_fork()
        dataset = self._own_handle()
        with writing(self.name):
            result = change(dataset)
        self._committed(dataset)
        return result

    def _own_handle(self) -> lance.LanceDataset:
        """A handle for one write: Lance locks it meanwhile and moves it on to the new version."""
        dataset = self.writable()
        return dataset.checkout_version(dataset.version)

    def _committed(self, dataset: lance.LanceDataset) -> lance.LanceDataset:
        with self._lock:
            if dataset.version >= self._latest.version or self._stamp(self._latest) is None:
                self._hold(dataset)
        return dataset


def _write(
    data: Iterator[pa.RecordBatch],
    schema: pa.Schema,
    target: lance.LanceDataset | str,
    *,
    mode: str,
    storage_options: dict[str, str] | None = None,
) -> lance.LanceDataset:
    with storing():
        return lance.write_dataset(
            pa.RecordBatchReader.from_batches(schema, data),
            target,
            mode=mode,
            storage_options=storage_options,
            data_storage_version=None if mode == "append" else FORMAT,
            enable_stable_row_ids=mode != "append",
            session=None if isinstance(target, lance.LanceDataset) else _session(),
        )


def _session() -> Any:
    return lance.Session(  # type: ignore[attr-defined]
        metadata_cache_size_bytes=METADATA_CACHE
    )


@contextlib.contextmanager
def _errors_of(data: Iterator[pa.RecordBatch]) -> Iterator[Iterator[pa.RecordBatch]]:
    """The same stream; an exception that it raises comes out as itself, not as Lance's words."""
    check_fork()
    raised: list[BaseException] = []

    def guarded() -> Iterator[pa.RecordBatch]:
        try:
            yield from data
        except BaseException as error:
            raised.append(error)
            raise

    try:
        yield guarded()
    except Exception as error:
        if raised and error is not raised[0]:
            raise raised[0] from None
        raise


def local_path(uri: str) -> Path | None:
    """The folder that `uri` names; None if it is elsewhere.

    Examples
    --------
    >>> local_path("memory://x") is None
    True
    """
    if uri.startswith("file://"):
        return Path(uri.removeprefix("file://"))
    return None if "://" in uri else Path(uri)
