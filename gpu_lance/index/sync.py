"""What changed in a Lance dataset, and reading a vector column in bounded memory.

Lance's delta tells changed rows exactly, but only between versions of one unbroken history with
stable row ids, and only for operations that it sees. Everything else answers "unknown" here, with
the reason, and the index is read anew.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import lance
import numpy as np
import pyarrow as pa

from gpu_lance.errors import QueryError, SchemaError
from gpu_lance.lance_errors import batches_of, first_line, reading

READ_ROWS = 8192

# what the rows' vectors are after these, the delta knows
ROW_OPERATIONS = {"Append", "Delete", "Update", "Rewrite"}
# these touch no row; Project may drop or rename columns, which the column's field id shows
QUIET_OPERATIONS = {"CreateIndex", "UpdateConfig", "Project"}
# new columns, or an operation that pylance has no class for (reserving fragment ids before a
# compaction is one): quiet if the files under the column are the same before and after
OPAQUE_OPERATIONS = {"Merge", "BaseOperation"}


@dataclass(frozen=True)
class Mark:
    """Which state of which dataset an index holds.

    A dataset that was dropped and created anew under the same path counts its versions from 1
    again; the time of the commit tells the two apart. The field id tells a column from a later
    one of the same name.

    Parameters
    ----------
    version : int
    committed : datetime
    field_id : int
    """

    version: int
    committed: datetime
    field_id: int

    @classmethod
    def of(cls, dataset: lance.LanceDataset, column: str) -> Mark:
        """The mark of a dataset at its version; reads no file.

        Raises
        ------
        SchemaError
            If the dataset has no such column.
        """
        version = dataset.get_version()
        return cls(version["version"], version["timestamp"], _field_id(dataset, column))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Changes:
    """The difference between two versions.

    Parameters
    ----------
    deleted : numpy.ndarray
        (n,) int64 row ids.
    since : int or None
        Rows inserted or updated after this version are to be read again; None if no row was.
    """

    deleted: np.ndarray
    since: int | None


def _field_id(dataset: lance.LanceDataset, column: str) -> int:
    for field in dataset.lance_schema.fields():
        if field.name() == column:
            return int(field.id())
    raise SchemaError(
        f"The table has no column {column!r}; it has {', '.join(dataset.schema.names)}."
    )


def changes(dataset: lance.LanceDataset, held: Mark, column: str) -> Changes | str:
    """What happened between `held` and the dataset's version, or why that is not known.

    Parameters
    ----------
    dataset : lance.LanceDataset
        At the version to go to.
    held : Mark
        What the index holds.
    column : str
        The vector column.

    Returns
    -------
    Changes or str
        The reason, as half a sentence, if the column must be read anew.
    """
    now = Mark.of(dataset, column)
    if now.version <= held.version:
        return f"version {now.version} is not newer than {held.version}"
    if now.field_id != held.field_id:
        return "the column was replaced"
    try:
        before = dataset.checkout_version(held.version)
        if Mark.of(before, column) != held:
            return "the table was replaced"
        transactions = dataset.delta(compared_against=held.version).list_transactions()
    except (OSError, RuntimeError, ValueError, SchemaError) as error:
        return f"its history is gone ({first_line(error)})"
    except TypeError as error:  # pylance cannot read the compaction of a table with a B-tree
        return f"its history cannot be read ({first_line(error)})"
    if len(transactions) != now.version - held.version:
        return "its history has gaps"
    names = [type(transaction.operation).__name__ for transaction in transactions]
    for version, name in enumerate(names, held.version + 1):
        if name in OPAQUE_OPERATIONS and not _same_files(dataset, version, now.field_id):
            return f"version {version} rewrote the column"
        if name not in ROW_OPERATIONS | QUIET_OPERATIONS | OPAQUE_OPERATIONS:
            return f"version {version} is a {name}"
    if not ROW_OPERATIONS.intersection(names):
        return Changes(np.empty(0, np.int64), None)
    if not dataset.has_stable_row_ids:
        return "it has no stable row ids"
    try:
        reader = dataset.delta(compared_against=held.version).get_deleted_row_ids()
        deleted = _int64(reader.read_all()["_rowid"])
    except (OSError, RuntimeError, ValueError) as error:
        return f"its history is gone ({first_line(error)})"
    # if rows were only moved or deleted there is none to read, which this scan finds out cheaply
    return Changes(deleted, held.version)


def _same_files(dataset: lance.LanceDataset, version: int, field_id: int) -> bool:
    """Whether a version has the rows and the column's data files of the one before it."""
    try:
        before, after = (_files(dataset, v, field_id) for v in (version - 1, version))
    except (OSError, RuntimeError, ValueError):
        return False
    return before == after


def _files(dataset: lance.LanceDataset, version: int, field_id: int) -> list[Any]:
    found: list[Any] = []
    for fragment in dataset.checkout_version(version).get_fragments():
        meta = fragment.metadata
        paths = [file.path for file in meta.files if field_id in file.fields]
        found.append((fragment.fragment_id, paths, meta.deletion_file, meta.overlays))
    return found


def read_vectors(
    dataset: lance.LanceDataset,
    column: str,
    ndims: int,
    since: int | None = None,
    block_bytes: int = 64 << 20,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The vectors of a column in blocks of bounded size.

    Parameters
    ----------
    dataset : lance.LanceDataset
    column : str
    ndims : int
    since : int, optional
        Only rows inserted or updated after that version; needs stable row ids.
    block_bytes : int
        Most bytes of float32 vectors in a block.

    Yields
    ------
    vectors : numpy.ndarray
        (n, d) float32, from any float type. Overwritten by the next block.
    row_ids : numpy.ndarray
        (n,) int64.
    valid : numpy.ndarray
        (n,) bool, False where the vector, or a value of it, is null.

    Raises
    ------
    SchemaError
        Unless the column is a fixed-size list of `ndims` floats.
    """
    _field_id(dataset, column)
    kind = dataset.schema.field(column).type
    if not (
        pa.types.is_fixed_size_list(kind)
        and pa.types.is_floating(kind.value_type)
        and kind.list_size == ndims
    ):
        raise SchemaError(
            f"Column {column!r} has type {kind}; the index wants a fixed-size list of {ndims} "
            "floats."
        )
    newer = None if since is None else f"_row_last_updated_at_version > {since}"
    scan = functools.partial(
        dataset.to_batches, columns=[column], filter=newer, with_row_id=True, batch_size=READ_ROWS
    )
    room = max(1, min(block_bytes // (4 * ndims), max(dataset.count_rows(), 1)))
    vectors = np.empty((room, ndims), np.float32)
    row_ids, valid, used = np.empty(room, np.int64), np.empty(room, bool), 0
    for whole in batches_of(scan):
        while whole.num_rows:
            batch = whole.slice(0, room - used)
            whole = whole.slice(batch.num_rows)
            stop = used + batch.num_rows
            with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite
                vectors[used:stop], valid[used:stop] = _matrix(batch[column], ndims)
            row_ids[used:stop] = batch["_rowid"].to_numpy()
            used = stop
            if used == room:
                yield vectors, row_ids, valid
                used = 0
    if used:
        yield vectors[:used], row_ids[:used], valid[:used]


def _matrix(array: pa.FixedSizeListArray, ndims: int) -> tuple[np.ndarray, np.ndarray]:
    """A view of the values (n, d), and which rows are whole (n,)."""
    n = len(array)
    values = array.values.slice(array.offset * ndims, n * ndims)
    valid = np.ones(n, bool) if array.null_count == 0 else array.is_valid().to_numpy(False)
    if values.null_count:
        whole = values.is_valid().to_numpy(False).reshape(n, ndims)
        valid = valid & whole.all(axis=1)
    return values.to_numpy(zero_copy_only=False).reshape(n, ndims), valid


def matching_row_ids(dataset: lance.LanceDataset, where: str) -> np.ndarray:
    """Row ids (n,) int64 for which an SQL condition holds; Lance uses its scalar indexes.

    Raises
    ------
    QueryError
        If Lance does not understand the condition, with its words.
    """
    try:
        with reading():
            table = dataset.scanner(columns=[], filter=where, with_row_id=True).to_table()
    except ValueError as error:
        raise QueryError(f"The filter {where!r} cannot be run: {first_line(error)}") from error
    return _int64(table["_rowid"])


def _int64(row_ids: pa.ChunkedArray) -> np.ndarray:
    numbers: np.ndarray = row_ids.to_numpy().astype(np.int64)
    return numbers
