"""Give the vectors of a commit to the indexes, from the tensors that were stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gpu_lance.ingest.lists import vector_length
from gpu_lance.storage import operation_of

if TYPE_CHECKING:
    import lance
    import pyarrow as pa

    from gpu_lance.index.resident import ResidentIndexes
    from gpu_lance.ingest.pipeline import Kept


def take_in(
    indexes: ResidentIndexes,
    dataset: lance.LanceDataset,
    schema: pa.Schema,
    kept: Kept,
    columns: Sequence[str],
) -> None:
    """Add the vectors of a commit to the indexes, straight from the tensors that were stored."""
    if not columns:
        return
    row_ids = new_row_ids(dataset)
    if row_ids is None:
        return
    for name in columns:
        part = kept.take(name, len(row_ids))
        if part is None:
            continue
        kind = schema.field(name).type
        ndims, before = vector_length(kind), dataset.version - 1
        assert ndims is not None
        if part.offsets is None:
            index = indexes.of(name, ndims)
            index.append(before, dataset, part.vectors, row_ids, part.valid)
        else:
            many = indexes.of_multi(name, ndims)
            many.append(before, dataset, part.vectors, part.offsets, row_ids, part.valid)


def new_row_ids(dataset: lance.LanceDataset) -> Any:
    """The row ids, (n,) int64, of the fragments that the dataset's version added, in their order.

    None if the version before it is gone.
    """
    old: set[int] = set()
    if dataset.version > 1:
        operation = operation_of(dataset)
        if operation == "Append":
            try:
                before = dataset.checkout_version(dataset.version - 1)
            except (OSError, RuntimeError, ValueError):
                return None
            old = {fragment.fragment_id for fragment in before.get_fragments()}
        elif operation != "Overwrite":
            return None
    fragments = [f for f in dataset.get_fragments() if f.fragment_id not in old]
    if not fragments:
        return None
    scanner = dataset.scanner(columns=[], with_row_id=True, fragments=fragments)
    return scanner.to_table()["_rowid"].to_numpy().astype("int64")
