"""Update and insert rows by key, embedding what is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from gpu_lance.errors import BadInputError, SchemaError
from gpu_lance.ingest.read import Source, read
from gpu_lance.ingest.vector_column import Policy
from gpu_lance.query import sql
from gpu_lance.types import OnBadVectors

if TYPE_CHECKING:
    from gpu_lance.table import Table


@dataclass(frozen=True)
class MergeResult:
    """What a merge did: the version that it made, and how many rows it wrote and deleted.

    `num_attempts` counts the tries that other writers made necessary.
    """

    version: int
    num_updated_rows: int
    num_inserted_rows: int
    num_deleted_rows: int
    num_attempts: int = 1

    @property
    def num_rows(self) -> int:
        """Rows that were inserted or updated."""
        return self.num_updated_rows + self.num_inserted_rows


class LanceMergeInsertBuilder:
    """A merge that is being described; made by :meth:`Table.merge_insert`, run by `execute`.

    Examples
    --------
    >>> import gpu_lance
    >>> table = gpu_lance.connect("memory://", device="cpu").create_table(
    ...     "t", [{"id": 1, "n": 1}]
    ... )
    >>> merge = table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
    >>> merge.execute([{"id": 1, "n": 5}, {"id": 2, "n": 6}]).num_inserted_rows
    1
    """

    def __init__(self, table: Table, on: Sequence[str]) -> None:
        self._table = table
        self._on = list(on)
        self._steps: list[tuple[str, tuple[Any, ...]]] = []

    def when_matched_update_all(self, *, where: str | None = None) -> LanceMergeInsertBuilder:
        """Replace rows whose key is in the data.

        Parameters
        ----------
        where : str, optional
            Only where this SQL condition holds; it may speak of ``target.`` and ``source.``.
        """
        condition = None if where is None else sql.checked(where)
        self._steps.append(("when_matched_update_all", (condition,)))
        return self

    def when_not_matched_insert_all(self) -> LanceMergeInsertBuilder:
        """Insert rows of the data whose key is new."""
        self._steps.append(("when_not_matched_insert_all", ()))
        return self

    def when_not_matched_by_source_delete(
        self, condition: str | None = None
    ) -> LanceMergeInsertBuilder:
        """Delete rows whose key is not in the data, if the SQL condition holds for them."""
        checked = None if condition is None else sql.checked(condition)
        self._steps.append(("when_not_matched_by_source_delete", (checked,)))
        return self

    def execute(
        self, new_data: Any, on_bad_vectors: str = "error", fill_value: float = 0.0
    ) -> MergeResult:
        """Run the merge as one version.

        Columns that the data does not have keep their values; vectors are made from their source
        where the data has it and no vector.

        Raises
        ------
        ValueError
            If no step was chosen.
        SchemaError
            If the key is not among the data's columns.
        QueryError
            If two rows of the data match one row, or Lance does not understand a condition.
        CommitConflictError
            If another writer changed the same rows meanwhile.
        """
        if not self._steps:
            raise BadInputError(
                "The merge would do nothing; call when_matched_update_all(), "
                "when_not_matched_insert_all() or when_not_matched_by_source_delete()."
            )
        policy = Policy(OnBadVectors.parse(on_bad_vectors), fill_value)
        return self._table._merge(self._on, new_data, policy, self._apply)

    def _apply(self, merge: Any, reader: pa.RecordBatchReader) -> dict[str, int]:
        for name, arguments in self._steps:
            getattr(merge, name)(*arguments)
        result: dict[str, int] = merge.execute(reader)
        return result


def merged_source(
    data: Any, schema: pa.Schema, on: Sequence[str], sources: dict[str, tuple[str, ...]]
) -> tuple[Source, pa.Schema]:
    """The data of a merge, and the part of the table's schema that it writes.

    Parameters
    ----------
    data : object
    schema : pyarrow.Schema
        The table's.
    on : sequence of str
        The key columns.
    sources : dict of str to tuple of str
        What each vector column that can be made is made from.

    Raises
    ------
    SchemaError
        If a key or another column is not there, or the data has some of a vector's sources: of a
        row that is updated the others are the table's.
    """
    source = read(data, schema)
    names = set(source.schema.names)
    if missing := [name for name in on if name not in names or name not in schema.names]:
        raise SchemaError(
            f"The key {', '.join(map(repr, missing))} is not a column of both the table and the "
            f"data, which has {', '.join(source.schema.names)}."
        )
    if unknown := [name for name in source.schema.names if name not in schema.names]:
        raise SchemaError(
            f"The table has no column {', '.join(map(repr, unknown))}; it has "
            f"{', '.join(schema.names)}."
        )
    for vector, columns in sources.items():
        there = [name for name in columns if name in names]
        if vector in names or not there:
            continue
        if len(there) < len(columns):
            lacking = [name for name in columns if name not in names]
            raise SchemaError(
                f"Column {vector!r} is made from {', '.join(columns)} by a template, and the data "
                f"of the merge has no {', '.join(lacking)}; give all of them, or the vector too."
            )
        names.add(vector)
    fields = [field for field in schema if field.name in names]
    return source, pa.schema(fields, metadata=schema.metadata)
