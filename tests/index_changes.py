"""What can happen to a table of ids, words and vectors, and how an index follows it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import lance
import pyarrow as pa
from lance.fragment import write_fragments

Changes = dict[str, tuple[str, Callable[[lance.LanceDataset, str], Any]]]


class Rows(Protocol):
    """Makes the rows with ids from start to stop."""

    def __call__(self, start: int, stop: int, *, seed: int | None = None) -> pa.Table: ...


def changes(rows: Rows, column: str) -> Changes:
    """By name, the kind of refresh that a change wants, and the change of a dataset at a path.

    The table has 200 rows, the last 80 of them of its second version.
    """

    def append(ds: lance.LanceDataset, path: str) -> None:
        lance.write_dataset(rows(300, 350), path, mode="append")

    def merge_some_columns(ds: lance.LanceDataset, path: str) -> None:
        some = rows(10, 20, seed=6).select(["id", column])
        ds.merge_insert("id").when_matched_update_all().execute(some)

    def delete_and_compact(ds: lance.LanceDataset, path: str) -> None:
        ds.delete("id < 50")
        ds.optimize.compact_files()

    def rename_there_and_back(ds: lance.LanceDataset, path: str) -> None:
        ds.alter_columns({"path": column, "name": "v"})
        ds.alter_columns({"path": "v", "name": column})

    def add_column_and_delete(ds: lance.LanceDataset, path: str) -> None:
        ds.add_columns({"twice": "id * 2"})
        ds.delete("id = 3")

    def another_file(ds: lance.LanceDataset, path: str) -> None:
        """Commit, as adding a column would be, other data files under the same column."""
        fragments = []
        for fragment in ds.get_fragments():
            old = fragment.metadata
            (new,) = write_fragments(rows(0, old.physical_rows, seed=55), path)
            fragments.append(dataclasses.replace(old, files=new.files))
        operation = lance.LanceOperation.Merge(fragments, ds.lance_schema)
        lance.LanceDataset.commit(path, operation, read_version=ds.version)

    def overwrite(ds: lance.LanceDataset, path: str) -> None:
        lance.write_dataset(rows(0, 90, seed=8), path, mode="overwrite")

    def restore(ds: lance.LanceDataset, path: str) -> None:
        ds.delete("id < 99")
        lance.dataset(path, version=1).restore()

    def clean_up(ds: lance.LanceDataset, path: str) -> None:
        ds.delete("id < 9")
        ds.delete("id < 12")
        lance.dataset(path).cleanup_old_versions(older_than=timedelta(0))

    return {
        "append": ("delta", append),
        "delete": ("delta", lambda ds, path: ds.delete("id % 5 = 0")),
        "delete most": ("delta", lambda ds, path: ds.delete("id > 10")),
        "delete all": ("delta", lambda ds, path: ds.delete("true")),
        "update": ("delta", lambda ds, path: ds.update({"word": "'new'"}, where="id < 9")),
        "vectors to null": ("delta", lambda ds, path: ds.update({column: "NULL"}, where="id < 30")),
        "merge insert": ("delta", lambda ds, path: merged(ds, rows(150, 260, seed=5))),
        "merge some columns": ("delta", merge_some_columns),
        "compact": ("delta", lambda ds, path: ds.optimize.compact_files()),
        "delete and compact": ("delta", delete_and_compact),
        "scalar index": ("unchanged", lambda ds, path: ds.create_scalar_index("id", "BTREE")),
        "metadata": ("unchanged", lambda ds, path: ds.update_schema_metadata({"a": "b"})),
        "config": ("unchanged", lambda ds, path: ds.update_config({"a": "b"})),
        "add column": ("unchanged", lambda ds, path: ds.add_columns({"twice": "id * 2"})),
        "drop column": ("unchanged", lambda ds, path: ds.drop_columns(["word"])),
        "rename there and back": ("unchanged", rename_there_and_back),
        "add column and delete": ("delta", add_column_and_delete),
        "another file under the column": ("rebuild", another_file),
        "overwrite": ("rebuild", overwrite),
        "restore": ("difference", restore),
        "cleaned up": ("difference", clean_up),
    }


def merged(dataset: lance.LanceDataset, data: pa.Table) -> None:
    """Update the rows whose ids there are, and insert the others."""
    merge = dataset.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
    merge.execute(data)
