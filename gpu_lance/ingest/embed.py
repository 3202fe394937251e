"""Fill the vector columns of a batch: what is given stays, what is missing is embedded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from gpu_lance.device import HostCopy, start_host_copy
from gpu_lance.embeddings import EmbeddingFunction, EmbeddingFunctionConfig, calls
from gpu_lance.errors import BadInputError, BadVectorError, SchemaError
from gpu_lance.ingest.align import align
from gpu_lance.ingest.lists import valid_rows
from gpu_lance.ingest.vectors import (
    arrow_to_matrix,
    bad_vectors,
    handle_bad_vectors,
    is_vector_type,
    vectors_to_arrow,
)
from gpu_lance.optional import require
from gpu_lance.types import Embeddings, OnBadVectors, Side

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class VectorColumn:
    """A vector column of a table, and what makes its vectors.

    Parameters
    ----------
    name : str
    type : pyarrow.FixedSizeListType
        Of float16, float32 or float64.
    function : EmbeddingFunction or None
        None if the caller gives the vectors.
    source : str or None
        The column that the function embeds.
    zero_is_bad : bool
        Whether a vector of zeros is bad: the column is searched by cosine.
    check : callable, optional
        Called before the function is used; it raises if its vectors would not fit the column's.
    """

    name: str
    type: pa.FixedSizeListType
    function: EmbeddingFunction | None = None
    source: str | None = None
    zero_is_bad: bool = False
    check: Callable[[], None] | None = None

    @property
    def ndims(self) -> int:
        """Length of its vectors."""
        return int(self.type.list_size)


@dataclass(frozen=True)
class Policy:
    """What becomes of vectors that cannot be used.

    Parameters
    ----------
    on_bad : OnBadVectors
    fill_value : float
    """

    on_bad: OnBadVectors = OnBadVectors.ERROR
    fill_value: float = 0.0


@dataclass
class Prepared:
    """A batch between its CPU part and its device part.

    Parameters
    ----------
    batch : pyarrow.RecordBatch
        With the table's columns; vector columns that were given are checked.
    first_row : int
        Number of its first row in the caller's data.
    wanted : list of (VectorColumn, (n,) bool, object)
        For each column with rows to embed: which, and what `calls.prepare` made of them.
    """

    batch: pa.RecordBatch
    first_row: int
    wanted: list[tuple[VectorColumn, np.ndarray, Any]] = field(default_factory=list)


@dataclass
class Embedded:
    """A batch whose vectors are on the device, and on their way to the host.

    Parameters
    ----------
    prepared : Prepared
    parts : list of (VectorColumn, (n,) bool, Embeddings, HostCopy)
    """

    prepared: Prepared
    parts: list[tuple[VectorColumn, np.ndarray, Embeddings, HostCopy]] = field(default_factory=list)


def check_sources(names: Sequence[str], columns: Sequence[VectorColumn]) -> None:
    """Refuse data with the columns `names` that has neither a vector nor what it is made from.

    Raises
    ------
    SchemaError
    """
    for column in columns:
        if column.function is None or column.name in names or column.source in names:
            continue
        raise SchemaError(
            f"Column {column.name!r} is embedded from {column.source!r}, and the data has neither; "
            f"it has {', '.join(names) or 'no columns'}."
        )


def prepare(
    batch: pa.RecordBatch,
    schema: pa.Schema,
    columns: list[VectorColumn],
    policy: Policy,
    first_row: int,
) -> Prepared:
    """Bring a batch into the table's shape and do the CPU part of the embedding.

    A vector that is given is kept, after `policy` was applied to it. A null vector, or one whose
    column is missing, is to be made from its source; a null source leaves it null.

    Raises
    ------
    SchemaError
        For columns that do not fit.
    BadInputError, BadVectorError
        For values that do not fit, with their row.
    """
    made = frozenset(column.name for column in columns if column.function is not None)
    batch = align(batch, schema, allow_missing=made, first_row=first_row)
    missing: dict[str, np.ndarray] = {}
    for column in columns:
        index = batch.schema.get_field_index(column.name)
        if index < 0:
            continue
        given = batch.column(index)
        if column.function is not None and given.null_count:
            missing[column.name] = ~valid_rows(given)
        if given.null_count == len(given):
            continue
        if policy.on_bad is OnBadVectors.DROP:
            bad = bad_vectors(given, column.ndims, zero_is_bad=column.zero_is_bad)
            if bad.any():
                batch = batch.filter(pa.array(~bad))
                missing = {name: rows[~bad] for name, rows in missing.items()}
        batch = handle_bad_vectors(
            batch, column.name, column.ndims, policy.on_bad, policy.fill_value,
            column.zero_is_bad, first_row,
        )  # fmt: skip
    prepared = Prepared(batch, first_row)
    for column in columns:
        if column.function is None:
            continue
        absent = column.name not in batch.schema.names
        rows = np.ones(batch.num_rows, bool) if absent else missing.get(column.name)
        if rows is None or not rows.any():
            continue
        source = batch.column(batch.schema.get_field_index(str(column.source)))
        rows = rows & valid_rows(source)
        if not rows.any():
            continue
        if column.check is not None:
            column.check()
        items = (source if rows.all() else source.filter(pa.array(rows))).to_pylist()
        prepared.wanted.append((column, rows, calls.prepare(column.function, items, Side.SOURCE)))
    return prepared


def embed(prepared: Prepared, device: torch.device) -> Embedded:
    """Do the device part, and start the one copy of the vectors to the host.

    The tensors have the type of their column, so that they are what is stored.
    """
    torch = require("torch", extra="cpu|cuda13|cuda12")
    result = Embedded(prepared)
    for column, rows, ready in prepared.wanted:
        assert column.function is not None
        made = calls.finish(column.function, ready, ndims=column.ndims, device=device)
        kind = {"halffloat": torch.float16, "double": torch.float64}.get(
            str(column.type.value_type), torch.float32
        )
        if device.type == "mps" and kind is torch.float64:
            kind = torch.float32  # which has no float64; the host widens it
        made = Embeddings(made.vectors.to(kind), made.valid, made.errors)
        result.parts.append((column, rows, made, start_host_copy(made.vectors)))
    return result


def complete(embedded: Embedded, schema: pa.Schema, policy: Policy) -> pa.RecordBatch:
    """Wait for the vectors and put them into the batch, in the table's schema.

    Raises
    ------
    BadInputError
        For an item that cannot be embedded, under ``error``; it names the row.
    BadVectorError
        For vectors with NaN, infinity or zero norm, under ``error``.
    """
    batch, first_row = embedded.prepared.batch, embedded.prepared.first_row
    n = batch.num_rows
    drop = np.zeros(n, bool)
    for column, rows, made, copy in embedded.parts:
        matrix, valid, fill = _scattered(batch, column, rows, made, copy.wait())
        if made.errors:
            positions = np.flatnonzero(rows)
            bad = {int(positions[i]): reason for i, reason in made.errors.items()}
            _refuse(bad, column, first_row, policy)
            if policy.on_bad is OnBadVectors.DROP:
                drop[list(bad)] = True
            elif policy.on_bad is OnBadVectors.FILL:
                fill[list(bad)] = True
        if fill.any():
            matrix = matrix.copy()  # the memory may be a cache of the function's
            matrix[fill] = _fill_value(policy, column)
            valid = valid | fill
        array = vectors_to_arrow(matrix, valid, column.type)
        batch = _with_column(batch, schema, column.name, array)
        if policy.on_bad is OnBadVectors.DROP:
            drop |= bad_vectors(array, column.ndims, zero_is_bad=column.zero_is_bad)
        else:
            batch = handle_bad_vectors(
                batch, column.name, column.ndims, policy.on_bad, policy.fill_value,
                column.zero_is_bad, first_row,
            )  # fmt: skip
    if drop.any():
        batch = batch.filter(pa.array(~drop))
    return _finished(batch, schema, first_row)


def _scattered(
    batch: pa.RecordBatch,
    column: VectorColumn,
    rows: np.ndarray,
    made: Embeddings,
    host: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The column's matrix (n, d), which rows are valid (n,), and no row to fill yet (n,)."""
    nothing = np.zeros(batch.num_rows, bool)
    if rows.all():
        return host, made.valid, nothing
    index = batch.schema.get_field_index(column.name)
    if index < 0 or batch.column(index).null_count == batch.num_rows:
        matrix = np.zeros((batch.num_rows, column.ndims), host.dtype)
        valid = nothing.copy()
    else:
        given, valid = arrow_to_matrix(batch.column(index))
        matrix = np.array(given)
    matrix[rows] = host
    valid[rows] = made.valid
    return matrix, valid, nothing


def _refuse(bad: dict[int, str], column: VectorColumn, first_row: int, policy: Policy) -> None:
    if policy.on_bad is not OnBadVectors.ERROR:
        return
    row, reason = min(bad.items())
    more = f" ({len(bad)} such rows)" if len(bad) > 1 else ""
    raise BadInputError(
        f"Row {first_row + row}, column {column.source!r} cannot be embedded: {reason}{more}. Pass "
        "on_bad_vectors='null' to store such rows without a vector, or 'drop' to leave them out."
    )


def _fill_value(policy: Policy, column: VectorColumn) -> Any:
    dtype = np.dtype(column.type.value_type.to_pandas_dtype())
    try:
        with np.errstate(over="ignore"):
            value = np.asarray(policy.fill_value, np.float64).astype(dtype)
        if value.ndim == 0 and np.isfinite(value):
            return value
    except (TypeError, ValueError):
        pass
    raise BadVectorError(
        f"fill_value is {policy.fill_value!r}; column {column.name!r} needs one finite number that "
        f"fits {dtype.name}."
    )


def _with_column(
    batch: pa.RecordBatch, schema: pa.Schema, name: str, array: pa.Array
) -> pa.RecordBatch:
    index = batch.schema.get_field_index(name)
    if index >= 0:
        return batch.set_column(index, schema.field(name), array)
    return batch.append_column(schema.field(name), array)


def _finished(batch: pa.RecordBatch, schema: pa.Schema, first_row: int) -> pa.RecordBatch:
    """The batch with exactly the table's columns; nulls only where the table takes them."""
    arrays = []
    for field_ in schema:
        index = batch.schema.get_field_index(field_.name)
        array = pa.nulls(batch.num_rows, field_.type) if index < 0 else batch.column(index)
        if array.null_count and not field_.nullable:
            row = int(np.flatnonzero(~valid_rows(array))[0])
            raise BadInputError(
                f"Row {first_row + row} has no vector for column {field_.name!r}, which takes no "
                "nulls: its source is null or was refused. Give a vector, or make the column "
                "nullable."
            )
        arrays.append(array)
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def vector_columns(
    schema: pa.Schema,
    functions: Mapping[str, EmbeddingFunctionConfig],
    cosine: frozenset[str] = frozenset(),
    check: Callable[[str, EmbeddingFunctionConfig], None] | None = None,
) -> list[VectorColumn]:
    """The vector columns of a schema, with the function and source column of each.

    Parameters
    ----------
    schema : pyarrow.Schema
    functions : mapping of str to EmbeddingFunctionConfig
        By vector column.
    cosine : frozenset of str
        Columns in which a vector of zeros is bad.
    check : callable, optional
        Called with a column and its function before that is used.

    Raises
    ------
    SchemaError
        If a function's column is missing or no fixed-size list of floats.
    """
    for name, config in functions.items():
        for column in (name, config.source_column):
            if column not in schema.names:
                raise SchemaError(
                    f"An embedding function is set for column {column!r}, which the table does "
                    f"not have; it has {', '.join(schema.names)}."
                )
        if not is_vector_type(schema.field(name).type):
            raise SchemaError(
                f"Column {name!r} has type {schema.field(name).type}; an embedding function fills "
                "a fixed-size list of floats."
            )
    found = []
    for field_ in schema:
        if not is_vector_type(field_.type):
            continue
        name, zero_is_bad = field_.name, field_.name in cosine
        own = functions.get(name)
        if own is None:
            found.append(VectorColumn(name, field_.type, zero_is_bad=zero_is_bad))
            continue
        checked = None if check is None else functools.partial(check, name, own)
        found.append(
            VectorColumn(name, field_.type, own.function, own.source_column, zero_is_bad, checked)
        )
    return found
