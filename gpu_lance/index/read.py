"""Reading a vector column: views of what Lance read, in small blocks, without a copy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import lance
import numpy as np
import pyarrow as pa

from gpu_lance.errors import QueryError, SchemaError
from gpu_lance.lance_errors import asking, batches_of

ROW_ID, ROW_ADDRESS = "_rowid", "_rowaddr"
CREATED, UPDATED = "_row_created_at_version", "_row_last_updated_at_version"

# A block that is still in the processor's cache when it is copied and measured.
BLOCK_BYTES = 2 << 20
# What Lance reads ahead. Its default of gigabytes comes from fresh memory page by page, which
# takes longer than the reading; what fits here is used again and again.
READ_AHEAD_BYTES = 16 << 20
# glibc gives buffers as large as Lance's back to the system, and so takes fresh pages for every
# one, until a buffer of this size was freed once in the process: the most that it adapts to.
LARGEST_KEPT_BYTES = (32 << 20) - (64 << 10)
WORTH_BYTES = 64 << 20
# Rows by id are looked up or picked out of a scan: a run of ids costs what so many bytes cost.
RUN_BYTES = 12 << 10


@dataclass(frozen=True)
class Block:
    """Some rows of a vector column.

    Parameters
    ----------
    vectors : numpy.ndarray
        (n, d) float16, float32 or float64, as stored: Lance's own memory where possible, so
        never to be written to. What a row that is not valid holds is undefined.
    row_ids : numpy.ndarray
        (n,) int64.
    updated : numpy.ndarray
        (n,) int64, the version that last changed each row; 0 without stable row ids.
    valid : numpy.ndarray or None
        (n,) bool, False where the vector, or a value in it, is null; None if none is.
    """

    vectors: np.ndarray
    row_ids: np.ndarray
    updated: np.ndarray
    valid: np.ndarray | None


def read_blocks(
    dataset: lance.LanceDataset,
    column: str,
    ndims: int,
    *,
    since: int | None = None,
    inserted_only: bool = False,
    row_ids: np.ndarray | None = None,
    where: str | None = None,
) -> Iterator[Block]:
    """The rows of a vector column, or some of them, in blocks of about 2 MiB.

    Parameters
    ----------
    dataset : lance.LanceDataset
        At the version to read.
    column : str
    ndims : int
    since : int, optional
        Only rows inserted or updated after that version; needs stable row ids.
    inserted_only : bool
        With `since`, only rows inserted after it.
    row_ids : numpy.ndarray, optional
        (n,) integers; only the rows with these ids, in no promised order. Ids that the dataset
        does not have are skipped, and repeated ones are read once.
    where : str, optional
        An SQL condition; only rows that meet it.

    Yields
    ------
    Block
        With at least one row.

    Raises
    ------
    SchemaError
        Unless the column is a fixed-size list of `ndims` floats.
    QueryError
        If Lance does not understand the condition, or more than one choice of rows is given.
    StorageError
        If a file is missing or damaged.

    Examples
    --------
    >>> vector = pa.FixedSizeListArray.from_arrays(pa.array([0, 0, 3, 4], pa.float32()), 2)
    >>> dataset = lance.write_dataset(pa.table({"vector": vector}), "memory://")
    >>> [block.vectors.tolist() for block in read_blocks(dataset, "vector", 2)]
    [[[0.0, 0.0], [3.0, 4.0]]]
    """
    width = check_column(dataset, column, ndims)
    rows = max(1, BLOCK_BYTES // (ndims * width))
    found = read_batches(
        dataset, column, rows, ndims * width,
        since=since, inserted_only=inserted_only, row_ids=row_ids, where=where,
    )  # fmt: skip
    return (_block(batch, column, ndims, width) for batch in found)


def known_ids(row_ids: np.ndarray) -> np.ndarray:
    """The ids, each once, ascending, without those that no row can have."""
    wanted = np.unique(np.asarray(row_ids, np.int64))
    return wanted[wanted >= 0]


def names_for(dataset: lance.LanceDataset, column: str) -> list[str]:
    """The column, and that of the versions of last changes if there is one."""
    return [column, UPDATED] if dataset.has_stable_row_ids else [column]


def condition_for(
    dataset: lance.LanceDataset,
    since: int | None,
    inserted_only: bool,
    row_ids: np.ndarray | None,
    where: str | None,
) -> str | None:
    """The condition for what :func:`read_blocks` is to read; None for `row_ids`, and for all."""
    if sum(choice is not None for choice in (since, row_ids, where)) > 1:
        raise QueryError("Give one of since, row_ids and where, or none of them.")
    if since is None:
        return where
    if not dataset.has_stable_row_ids:
        raise QueryError(
            "The table has no stable row ids, so Lance does not know which rows changed since "
            f"version {since}. Read the whole column."
        )
    return f"{CREATED if inserted_only else UPDATED} > {int(since)}"


def read_batches(
    dataset: lance.LanceDataset,
    column: str,
    rows: int,
    row_bytes: int,
    *,
    since: int | None = None,
    inserted_only: bool = False,
    row_ids: np.ndarray | None = None,
    where: str | None = None,
) -> Iterator[pa.RecordBatch]:
    """The batches that :func:`read_blocks` is made of, none of them empty.

    Parameters
    ----------
    rows : int
        In a batch, at most.
    row_bytes : int
        About what a value of the column takes.
    """
    condition = condition_for(dataset, since, inserted_only, row_ids, where)
    names = names_for(dataset, column)
    whole = dataset.count_rows()
    wanted = None if row_ids is None else known_ids(row_ids)
    if wanted is not None:
        if not len(wanted):
            return iter(())
        if _looked_up(wanted, whole, row_bytes):
            return take_batches(dataset, wanted, rows, names)
    scan = functools.partial(
        dataset.to_batches,
        columns=names,
        filter=condition,
        with_row_id=True,
        batch_size=rows,
        io_buffer_size=READ_AHEAD_BYTES,
    )
    # not for little, nor in memory: Lance keeps large buffers of small files there, which the
    # system would not have backed by memory
    if whole * row_bytes >= WORTH_BYTES and not _in_memory(dataset):
        np.empty(LARGEST_KEPT_BYTES, np.uint8)  # freed at once and never touched: see above
    batches = batches_of(scan) if where is None else _asked(scan)
    if wanted is not None:
        batches = (_picked(batch, wanted) for batch in batches)
    return (batch for batch in batches if batch.num_rows)


def _in_memory(dataset: lance.LanceDataset) -> bool:
    return str(dataset.uri).startswith("memory:")


def check_column(dataset: lance.LanceDataset, column: str, ndims: int) -> int:
    """The bytes of one value of a vector column.

    Raises
    ------
    SchemaError
        Unless the column is a fixed-size list of `ndims` floats.
    """
    kind = type_of(dataset, column)
    if not are_vectors(kind, ndims):
        raise SchemaError(
            f"Column {column!r} has type {kind}; the index wants a fixed-size list of {ndims} "
            "floats."
        )
    return int(kind.value_type.bit_width) // 8


def type_of(dataset: lance.LanceDataset, column: str) -> pa.DataType:
    """A column's type; SchemaError if the table has no such column."""
    if column not in dataset.schema.names:
        raise SchemaError(
            f"The table has no column {column!r}; it has {', '.join(dataset.schema.names)}."
        )
    return dataset.schema.field(column).type


def are_vectors(kind: pa.DataType, ndims: int) -> bool:
    """Whether values of a type are vectors of that length."""
    return bool(
        pa.types.is_fixed_size_list(kind)
        and pa.types.is_floating(kind.value_type)
        and kind.list_size == ndims
    )


def fields_below(dataset: lance.LanceDataset, field_id: int) -> set[int]:
    """The ids of a column's field and of all that is in it: a list's values are a field too."""
    found = {field_id}
    for field in dataset.lance_schema.fields():
        open_ = [field] if field.id() == field_id else []
        while open_:
            open_ += open_[0].children()
            found.add(int(open_.pop(0).id()))
    return found


def _asked(scan: Callable[[], Iterable[pa.RecordBatch]]) -> Iterator[pa.RecordBatch]:
    with asking("filter"):
        yield from scan()


def _looked_up(wanted: np.ndarray, whole: int, row_bytes: int) -> bool:
    """Whether looking ids up (n,) is faster than a scan of all rows."""
    runs = 1 + np.count_nonzero(np.diff(wanted) != 1)
    return bool(len(wanted) * row_bytes + runs * RUN_BYTES < max(whole, 1) * row_bytes)


def take_batches(
    dataset: lance.LanceDataset, wanted: np.ndarray, rows: int, names: list[str]
) -> Iterator[pa.RecordBatch]:
    """The rows with ascending ids `wanted`, in batches of at most `rows`."""
    # without the address Lance cannot take the version
    columns = [*names, ROW_ID, ROW_ADDRESS]

    def scan() -> Iterator[pa.RecordBatch]:
        for start in range(0, len(wanted), rows):
            ids = pa.array(wanted[start : start + rows].astype(np.uint64))
            yield from dataset._take_rows(ids, columns=columns).to_batches()

    return (batch for batch in batches_of(scan) if batch.num_rows)


def _picked(batch: pa.RecordBatch, wanted: np.ndarray) -> pa.RecordBatch:
    """The rows whose ids are `wanted`, ascending."""
    row_ids = _int64(batch[ROW_ID])
    place = np.searchsorted(wanted, row_ids)
    place[place == len(wanted)] = 0
    kept = wanted[place] == row_ids
    return batch if kept.all() else batch.filter(pa.array(kept))


class _Memory:
    """A piece of Arrow's memory for numpy, which would call it read-only; torch warns at that."""

    def __init__(self, owner: Any, address: int, shape: tuple[int, int], dtype: np.dtype) -> None:
        self._owner = owner
        self.__array_interface__ = {
            "data": (address, False),
            "shape": shape,
            "typestr": dtype.str,
            "version": 3,
        }


def matrix(
    array: pa.FixedSizeListArray, ndims: int, width: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """A view of the vectors (n, d), and which of them have no null (n,); None if all."""
    n = len(array)
    values = array.values.slice(array.offset * ndims, n * ndims)
    memory = values.buffers()[1]
    if memory is None or not n:  # no value at all
        return np.zeros((n, ndims), np.dtype(f"f{width}")), None if not n else np.zeros(n, bool)
    vectors = np.asarray(
        _Memory(memory, memory.address + values.offset * width, (n, ndims), np.dtype(f"f{width}"))
    )
    valid = None
    if array.null_count:
        valid = array.is_valid().to_numpy(zero_copy_only=False)
    if values.null_count:
        whole = values.is_valid().to_numpy(zero_copy_only=False).reshape(n, ndims).all(axis=1)
        valid = whole if valid is None else valid & whole
    return vectors, valid


def names_of(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
    """Row ids (n,) int64 of a batch, and the versions of the rows' last changes, 0 if unknown."""
    updated = np.zeros(batch.num_rows, np.int64)
    if UPDATED in batch.schema.names:
        updated = _int64(batch[UPDATED].fill_null(0))
    return _int64(batch[ROW_ID]), updated


def _block(batch: pa.RecordBatch, column: str, ndims: int, width: int) -> Block:
    vectors, valid = matrix(batch[column], ndims, width)
    return Block(vectors, *names_of(batch), valid)


def _int64(numbers: pa.Array) -> np.ndarray:
    view: np.ndarray = numbers.to_numpy(zero_copy_only=False).view(np.int64)
    return view
