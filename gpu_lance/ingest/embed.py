"""Fill the vector columns of a batch: what is given stays, what is missing is embedded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from gpu_lance.device import HostCopy, start_host_copy
from gpu_lance.embeddings import calls
from gpu_lance.embeddings.notes import noted
from gpu_lance.errors import BadInputError, SchemaError
from gpu_lance.ingest.align import align
from gpu_lance.ingest.lists import valid_rows
from gpu_lance.ingest.multivectors import assembled, filling, matrix_of
from gpu_lance.ingest.vector_column import Policy, VectorColumn
from gpu_lance.ingest.vectors import arrow_to_matrix, checked_fill, vectors_to_arrow
from gpu_lance.optional import require
from gpu_lance.types import Embeddings, OnBadVectors, Side

if TYPE_CHECKING:
    import torch


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
        if column.function is None or column.name in names or set(column.sources) & set(names):
            continue
        raise SchemaError(
            f"Column {column.name!r} is embedded from {column.made_from}, and the data has "
            f"neither; it has {', '.join(names) or 'no columns'}."
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
            bad = column.bad(given)
            if bad.any():
                batch = batch.filter(pa.array(~bad))
                missing = {name: rows[~bad] for name, rows in missing.items()}
        batch = column.handled(batch, policy, first_row)
    prepared = Prepared(batch, first_row)
    for column in columns:
        if column.function is None:
            continue
        absent = column.name not in batch.schema.names
        rows = np.ones(batch.num_rows, bool) if absent else missing.get(column.name)
        if rows is None or not rows.any():
            continue
        source = column.items(batch)
        rows = rows & valid_rows(source)
        if not rows.any():
            continue
        if column.check is not None:
            column.check()
        items = (source if rows.all() else source.filter(pa.array(rows))).to_pylist()
        with noted(_what(column), column.name, column.maker):
            ready = calls.prepare(column.maker, items, Side.SOURCE)
        prepared.wanted.append((column, rows, ready))
    return prepared


def embed(prepared: Prepared, device: torch.device) -> Embedded:
    """Do the device part, and start the one copy of the vectors to the host.

    The tensors have the type of their column, so that they are what is stored.
    """
    torch = require("torch", extra="cpu|cuda13|cuda12")
    result = Embedded(prepared)
    for column, rows, ready in prepared.wanted:
        with noted(_what(column), column.name, column.maker):
            made = calls.finish(
                column.maker, ready, ndims=column.ndims, device=device, multi=column.multi
            )
        kind = {"halffloat": torch.float16, "double": torch.float64}.get(
            str(column.vector_type.value_type), torch.float32
        )
        if device.type == "mps" and kind is torch.float64:
            kind = torch.float32  # which has no float64; the host widens it
        made = replace(made, vectors=made.vectors.to(kind))
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
        fill = np.empty(0, np.int64)
        if made.errors:
            positions = np.flatnonzero(rows)
            bad = {int(positions[i]): reason for i, reason in made.errors.items()}
            _refuse(bad, column, first_row, policy)
            if policy.on_bad is OnBadVectors.DROP:
                drop[list(bad)] = True
            elif policy.on_bad is OnBadVectors.FILL:
                fill = np.array(sorted(bad))
        put = _documents if column.multi else _vectors
        array = put(batch, column, rows, made, copy.wait(), fill, policy)
        batch = _with_column(batch, schema, column.name, array)
        if policy.on_bad is OnBadVectors.DROP:
            drop |= column.bad(array)
        else:
            batch = column.handled(batch, policy, first_row)
    if drop.any():
        batch = batch.filter(pa.array(~drop))
    return _finished(batch, schema, first_row)


def _given(batch: pa.RecordBatch, column: VectorColumn) -> pa.Array | None:
    """What the batch holds of a column beside the rows that were embedded; None if nothing."""
    index = batch.schema.get_field_index(column.name)
    if index < 0 or batch.column(index).null_count == batch.num_rows:
        return None
    return batch.column(index)


def _vectors(
    batch: pa.RecordBatch,
    column: VectorColumn,
    rows: np.ndarray,
    made: Embeddings,
    host: np.ndarray,
    fill: np.ndarray,
    policy: Policy,
) -> pa.Array:
    """A column of one vector a row: given ones, made ones (m, d), and filled rows."""
    if rows.all():
        matrix, valid = host, made.valid
    else:
        given = _given(batch, column)
        if given is None:
            matrix = np.zeros((batch.num_rows, column.ndims), host.dtype)
            valid = np.zeros(batch.num_rows, bool)
        else:
            old, valid = arrow_to_matrix(given)
            matrix = np.array(old)
        matrix[rows] = host
        valid[rows] = made.valid
    if len(fill):
        matrix = matrix.copy()  # the memory may be a cache of the function's
        dtype = np.dtype(column.vector_type.value_type.to_pandas_dtype())
        matrix[fill] = checked_fill(policy.fill_value, dtype, column.name)
        valid = valid.copy()
        valid[fill] = True
    return vectors_to_arrow(matrix, valid, column.type)


def _documents(
    batch: pa.RecordBatch,
    column: VectorColumn,
    rows: np.ndarray,
    made: Embeddings,
    host: np.ndarray,
    fill: np.ndarray,
    policy: Policy,
) -> pa.Array:
    """A column of any number of vectors a row, of the same parts."""
    assert made.offsets is not None
    valid = np.flatnonzero(rows)[made.valid]
    parts = [(valid, host, np.diff(made.offsets)[made.valid])]
    given = _given(batch, column)
    if given is not None:
        there = valid_rows(given) & ~rows
        parts.append((np.flatnonzero(there), *matrix_of(given.filter(pa.array(there)))))
    if len(fill):
        parts.append(filling(fill, column.type, policy.fill_value, column.name))
    return assembled(batch.num_rows, parts, column.type)


def _refuse(bad: dict[int, str], column: VectorColumn, first_row: int, policy: Policy) -> None:
    if policy.on_bad is not OnBadVectors.ERROR:
        return
    row, reason = min(bad.items())
    more = f" ({len(bad)} such rows)" if len(bad) > 1 else ""
    raise BadInputError(
        f"Row {first_row + row}, {_what(column)} cannot be embedded: {reason}{more}. Pass "
        "on_bad_vectors='null' to store such rows without a vector, or 'drop' to leave them out."
    )


def _what(column: VectorColumn) -> str:
    """What is embedded for a column, in words."""
    return f"column {column.source!r}" if column.template is None else column.made_from


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
