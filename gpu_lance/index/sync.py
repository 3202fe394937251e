"""What differs between the rows that are held of a Lance dataset and another version of it.

Lance tells two ways. Its history names what each version did and which rows it deleted:
`changes` follows it forward, for next to nothing. And each row carries the version of its last
change: `difference` compares that row by row, between any two versions. Each knows of the
operations that the other or itself is blind to, and says so: then the column is read anew.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import lance
import numpy as np
import pyarrow as pa

from gpu_lance.errors import SchemaError
from gpu_lance.index.read import ROW_ADDRESS, ROW_ID, UPDATED, fields_below
from gpu_lance.lance_errors import asking, first_line, reading

# what these do to a row, its version of last change tells, and the delta
ROW_OPERATIONS = {"Append", "Delete", "Update", "Rewrite"}
# these touch no row; Project may drop or rename columns, which the column's field id shows
QUIET_OPERATIONS = {"CreateIndex", "UpdateConfig", "Project"}
# new columns, or an operation that pylance has no class for (reserving fragment ids before a
# compaction is one): quiet if the files under the column are the same before and after
OPAQUE_OPERATIONS = {"Merge", "BaseOperation"}

GONE = (OSError, RuntimeError, ValueError)  # what pylance raises for a version that is not there


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


class Held:
    """A mark, and the data files that were under the column.

    Parameters
    ----------
    mark : Mark
    dataset : lance.LanceDataset
        At that version, by a handle that nobody moves on.
    """

    def __init__(self, mark: Mark, dataset: lance.LanceDataset) -> None:
        self.mark = mark
        self._dataset = dataset

    @classmethod
    def of(cls, dataset: lance.LanceDataset, column: str) -> Held:
        """What is held once the column was read; reads no file and costs 0.1 ms.

        Raises
        ------
        SchemaError
            If the dataset has no such column.
        """
        return cls(Mark.of(dataset, column), dataset.checkout_version(dataset.version))

    @functools.cached_property
    def files(self) -> Mapping[int, tuple[str, ...]]:
        """By fragment, the files with the column's values, each name being used only once."""
        return _files(self._dataset, self.mark.field_id)


@dataclass(frozen=True)
class Changes:
    """What happened between two versions, by Lance's history.

    Parameters
    ----------
    deleted : numpy.ndarray
        (n,) int64 row ids.
    since : int or None
        Rows inserted or updated after this version are to be read again; None if no row was.
    inserted_only : bool
        Whether the updates were of other columns, so that only rows inserted after `since` need
        be read.
    """

    deleted: np.ndarray
    since: int | None
    inserted_only: bool = False


@dataclass(frozen=True)
class Difference:
    """What differs between the rows held and those of another version.

    Parameters
    ----------
    gone : numpy.ndarray
        (n,) int64 row ids that are held and are not in the version, or may have another vector
        there.
    read : numpy.ndarray
        (n,) int64 row ids to read there: new ones, and those that may have another vector.
    """

    gone: np.ndarray
    read: np.ndarray


def _field_id(dataset: lance.LanceDataset, column: str) -> int:
    for field in dataset.lance_schema.fields():
        if field.name() == column:
            return int(field.id())
    raise SchemaError(
        f"The table has no column {column!r}; it has {', '.join(dataset.schema.names)}."
    )


def _files(dataset: lance.LanceDataset, field_id: int) -> dict[int, tuple[str, ...]]:
    found, fields = {}, fields_below(dataset, field_id)
    for fragment in dataset.get_fragments():
        meta = fragment.metadata
        paths = [file.path for file in meta.files if fields.intersection(file.fields)]
        paths += [str(overlay) for overlay in meta.overlays]
        found[meta.id] = tuple(paths)
    return found


# ------------------------------------------------------------------------ the history


def changes(dataset: lance.LanceDataset, held: Held, column: str) -> Changes | str:
    """What happened between `held` and the dataset's version, or why that is not known.

    Parameters
    ----------
    dataset : lance.LanceDataset
        At the version to go to.
    held : Held
        What the index holds.
    column : str
        The vector column.

    Returns
    -------
    Changes or str
        The reason, as half a sentence, if the history does not tell.

    Examples
    --------
    >>> vector = pa.FixedSizeListArray.from_arrays(pa.array([0, 0, 3, 4], pa.float32()), 2)
    >>> dataset = lance.write_dataset(
    ...     pa.table({"vector": vector}), "memory://", enable_stable_row_ids=True
    ... )
    >>> held = Held.of(dataset, "vector")
    >>> changes(dataset, held, "vector")
    'version 1 is not newer than 1'
    """
    mark = held.mark
    now = Mark.of(dataset, column)
    if now.version <= mark.version:
        return f"version {now.version} is not newer than {mark.version}"
    if now.field_id != mark.field_id:
        return "the column was replaced"
    own = dataset.checkout_version(now.version)  # Lance locks the handle for its history
    try:
        if Mark.of(own.checkout_version(mark.version), column) != mark:
            return "the table was replaced"
        operations = _operations(own, mark.version)
    except (*GONE, SchemaError) as error:
        return f"its history is gone ({first_line(error)})"
    names = [name for name, _ in operations]
    for version, (name, operation) in enumerate(operations, mark.version + 1):
        reason = _unseen(own, version, name, operation, now.field_id)
        if reason is not None:
            return reason
    if not ROW_OPERATIONS.intersection(names):
        return Changes(np.empty(0, np.int64), None)
    if not dataset.has_stable_row_ids:
        return "it has no stable row ids"
    try:
        reader = own.delta(compared_against=mark.version).get_deleted_row_ids()
        deleted = _int64(reader.read_all()[ROW_ID])
    except GONE as error:
        return f"its history is gone ({first_line(error)})"
    # if rows were only moved or deleted there is none to read, which a scan finds out cheaply
    fields = fields_below(dataset, now.field_id)
    elsewhere = all(_elsewhere(op, fields) for name, op in operations if name == "Update")
    return Changes(deleted, mark.version, elsewhere)


def _operations(dataset: lance.LanceDataset, after: int) -> list[tuple[str, Any]]:
    """Name and operation of each version from `after` to the dataset's."""
    count = dataset.version - after
    try:
        found = dataset.delta(compared_against=after).list_transactions()
    except TypeError:  # see _operation
        return [_operation(dataset, after + 1 + i) for i in range(count)]
    if len(found) != count:
        raise ValueError(f"{count - len(found)} of {count} versions are missing")
    return [(type(each.operation).__name__, each.operation) for each in found]


def _operation(dataset: lance.LanceDataset, version: int) -> tuple[str, Any]:
    """Name and operation of a version."""
    try:
        transaction = dataset.read_transaction(version)
    except TypeError as error:
        # pylance cannot show the compaction of a table with a scalar index; its name is all
        # that is needed
        if "RewrittenIndex" not in str(error):
            raise ValueError(first_line(error)) from error
        return "Rewrite", None
    if transaction is None:
        raise ValueError(f"version {version} has no transaction")
    return type(transaction.operation).__name__, transaction.operation


def _unseen(
    dataset: lance.LanceDataset, version: int, name: str, operation: Any, field_id: int
) -> str | None:
    """Why a version may have changed vectors of rows without marking the rows as changed."""
    if name in OPAQUE_OPERATIONS:
        return (
            None
            if _same_files(dataset, version, field_id)
            else f"version {version} rewrote the column"
        )
    if name not in ROW_OPERATIONS | QUIET_OPERATIONS:
        return f"version {version} was made by {name}"
    if name == "Update":
        named = list(operation.fields_modified)
        fields = fields_below(dataset, field_id)
        in_place = bool(fields.intersection(named)) or (
            operation.update_mode == "rewrite_columns" and not named
        )
        marked = set(operation.updated_fragment_offsets or ())
        if in_place and not marked.issuperset(f.id for f in operation.updated_fragments):
            return f"version {version} rewrote the column"
    return None


def _elsewhere(update: Any, column: set[int]) -> bool:
    """Whether an update is known to have left the column as it was.

    Lance lists the fields that an update set, to keep rewritten rows in the indexes of the other
    columns; a merge lists all of them.
    """
    fields = list(update.fields_for_preserving_frag_bitmap)
    return (
        update.update_mode == "rewrite_rows"
        and bool(fields)
        and column.isdisjoint(fields)
        and column.isdisjoint(update.fields_modified)
    )


def _same_files(dataset: lance.LanceDataset, version: int, field_id: int) -> bool:
    """Whether a version has the rows and the column's data files of the one before it."""
    try:
        before, after = (_rows_and_files(dataset, v, field_id) for v in (version - 1, version))
    except GONE:
        return False
    return before == after


def _rows_and_files(dataset: lance.LanceDataset, version: int, field_id: int) -> list[Any]:
    own = dataset.checkout_version(version)
    deletions = [fragment.metadata.deletion_file for fragment in own.get_fragments()]
    return [_files(own, field_id), deletions]


# --------------------------------------------------------------------- row by row


def difference(
    dataset: lance.LanceDataset,
    held: Held,
    column: str,
    row_ids: np.ndarray,
    updated: np.ndarray,
) -> Difference | str:
    """What differs between rows that are held and the dataset's version, older or newer.

    A row id with the same version of its last change has the same vector, in one history: that
    is relied on if the history between the two versions is there and nothing in it rewrote the
    column behind the rows' back. Otherwise it counts only for rows in data files that both
    versions have, which never change.

    Parameters
    ----------
    dataset : lance.LanceDataset
        At the version to go to.
    held : Held
        Where the rows are from.
    column : str
        The vector column.
    row_ids : numpy.ndarray
        (n,) int64, of the live rows held, each once.
    updated : numpy.ndarray
        (n,) int64, the versions of their last changes, as they were when the vectors were read.

    Returns
    -------
    Difference or str
        The reason, as half a sentence, if the column is better read anew.

    Raises
    ------
    StorageError
        If a file is missing or damaged.

    Examples
    --------
    >>> vector = pa.FixedSizeListArray.from_arrays(pa.array([0, 0, 3, 4], pa.float32()), 2)
    >>> dataset = lance.write_dataset(
    ...     pa.table({"vector": vector}), "memory://", enable_stable_row_ids=True
    ... )
    >>> held = Held.of(dataset, "vector")
    >>> difference(dataset, held, "vector", np.array([0, 5]), np.array([1, 1]))
    Difference(gone=array([5]), read=array([1]))
    """
    if not dataset.has_stable_row_ids:
        return "it has no stable row ids"
    now = Mark.of(dataset, column)
    if now.field_id != held.mark.field_id:
        return "the column was replaced"
    own = dataset.checkout_version(now.version)
    try:
        if Mark.of(own.checkout_version(held.mark.version), column) != held.mark:
            return "the table was replaced"
        doubt = _doubt(own, held.mark.version, now.version, now.field_id)
    except SchemaError:
        return "the table was replaced"
    except GONE as error:
        with reading():
            latest = own.latest_version
        if held.mark.version > latest:
            return "the table was put back to an earlier state"
        doubt = f"its history is gone ({first_line(error)})"
    files = _files(own, now.field_id)
    same = [
        fragment
        for fragment, paths in files.items()
        if held.files.get(fragment, () if doubt else paths) == paths
    ]
    with reading():
        table = own.scanner(columns=[UPDATED], with_row_id=True, with_row_address=True).to_table()
    there = _int64(table[ROW_ID])
    place = _places(row_ids, there)
    kept = place >= 0
    kept[kept] = updated[place[kept]] == _int64(table[UPDATED], missing=-1)[kept]
    if len(same) < len(files):
        kept &= np.isin(_int64(table[ROW_ADDRESS]) >> 32, same)
    read = there[~kept]
    if 2 * len(read) > len(there):
        return doubt or "most rows changed"
    stays = np.zeros(len(row_ids), bool)
    stays[place[kept]] = True
    return Difference(np.asarray(row_ids)[~stays], read)


def _doubt(dataset: lance.LanceDataset, one: int, other: int, field_id: int) -> str | None:
    """Why the versions of last changes are not to be relied on between two versions."""
    for version in _between(dataset, one, other):
        reason = _unseen(dataset, version, *_operation(dataset, version), field_id)
        if reason is not None:
            return reason
    return None


def _between(dataset: lance.LanceDataset, one: int, other: int) -> Iterator[int]:
    """The versions that lead from the last common state to one or the other of two versions.

    A version goes on from the one before it, and a restored one from where it was restored to.
    """
    while one != other:
        one, other = min(one, other), max(one, other)
        name, operation = _operation(dataset, other)
        if name == "Restore":
            other = int(operation.version)
        else:
            yield other
            other -= 1


def _places(row_ids: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Where in `row_ids` (n,) each of `there` (m,) is (m,) int64; -1 if it is not."""
    if not len(row_ids) or not len(there):
        return np.full(len(there), -1)
    highest = int(max(row_ids.max(), there.max()))
    if highest < 8 * (len(row_ids) + len(there)):  # a table is faster, if most of it is used
        table = np.full(highest + 1, -1)
        table[row_ids] = np.arange(len(row_ids))
        return table[there]
    order = np.argsort(row_ids, kind="stable")
    place = np.searchsorted(row_ids, there, sorter=order)
    place[place == len(row_ids)] = 0
    place = order[place]
    return np.where(row_ids[place] == there, place, -1)


def matching_row_ids(dataset: lance.LanceDataset, where: str | None) -> np.ndarray:
    """Row ids (n,) int64 for which an SQL condition holds; Lance uses its scalar indexes.

    None holds for every row.

    Raises
    ------
    QueryError
        If Lance does not understand the condition, with its words.
    """
    with asking(f"filter {where!r}"):
        table = dataset.scanner(columns=[], filter=where, with_row_id=True).to_table()
    return _int64(table[ROW_ID])


def _int64(numbers: pa.ChunkedArray, *, missing: int = 0) -> np.ndarray:
    if numbers.null_count:
        numbers = numbers.fill_null(missing)
    found: np.ndarray = numbers.to_numpy().astype(np.int64, copy=False)
    return found
