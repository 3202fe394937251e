"""Changes and differences against what Lance says that each version holds."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import lance
import lancedb
import numpy as np
import pyarrow as pa
import pytest
from lance.fragment import write_fragments

from gpu_lance.errors import QueryError, SchemaError
from gpu_lance.index.read import Block, read_blocks
from gpu_lance.index.sync import (
    Changes,
    Difference,
    Held,
    Mark,
    changes,
    difference,
    matching_row_ids,
)

D = 3
Operation = Callable[[str, np.random.Generator], Any]
LO = lance.LanceOperation


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "t.lance")


def rows(ids: Any, seed: int = 0, nulls: bool = True) -> pa.Table:
    ids = np.asarray(list(ids), np.int64)
    rng = np.random.default_rng([seed, *ids[:1]])
    flat = pa.array(rng.standard_normal(len(ids) * D), pa.float32())
    mask = pa.array((ids % 13 == 5) if nulls else np.zeros(len(ids), bool))
    vectors = pa.FixedSizeListArray.from_arrays(flat, D, mask=mask)
    return pa.table({"id": ids, "word": [f"w{i % 7}" for i in ids], "vector": vectors})


def create(path: str, data: pa.Table, **more: Any) -> lance.LanceDataset:
    return lance.write_dataset(data, path, **{"enable_stable_row_ids": True, **more})


class Store(dict[int, tuple[int, bytes]]):
    """What an index holds: by row id, version of last change and vector."""

    def __init__(self, dataset: lance.LanceDataset) -> None:
        self.held = Held.of(dataset, "vector")
        self.read = 0
        self.take(read_blocks(dataset, "vector", D))

    def take(self, blocks: Iterator[Block]) -> None:
        for block in blocks:
            valid = np.ones(len(block.row_ids), bool) if block.valid is None else block.valid
            self.read += len(valid)
            for i, row_id in enumerate(block.row_ids.tolist()):
                self.pop(row_id, None)
                if valid[i]:
                    self[row_id] = int(block.updated[i]), block.vectors[i].tobytes()

    def vectors(self) -> dict[int, bytes]:
        return {row_id: vector for row_id, (_, vector) in self.items()}

    def changes(self, dataset: lance.LanceDataset) -> Changes | str:
        found = changes(dataset, self.held, "vector")
        if isinstance(found, Changes):
            for row_id in found.deleted.tolist():
                self.pop(row_id, None)
            if found.since is not None:
                only = found.inserted_only
                blocks = read_blocks(dataset, "vector", D, since=found.since, inserted_only=only)
                self.take(blocks)
            self.held = Held.of(dataset, "vector")
        return found

    def difference(self, dataset: lance.LanceDataset) -> Difference | str:
        ids = np.array(list(self), np.int64)
        updated = np.array([version for version, _ in self.values()], np.int64)
        found = difference(dataset, self.held, "vector", ids, updated)
        if isinstance(found, Difference):
            for row_id in found.gone.tolist():
                del self[row_id]
            self.take(read_blocks(dataset, "vector", D, row_ids=found.read))
            self.held = Held.of(dataset, "vector")
        return found


def truth(dataset: lance.LanceDataset) -> dict[int, bytes]:
    table = dataset.scanner(columns=["vector"], with_row_id=True).to_table()
    pairs = zip(table["_rowid"].to_pylist(), table["vector"].to_pylist(), strict=True)
    return {i: np.array(v, np.float32).tobytes() for i, v in pairs if v is not None}


# --------------------------------------------------------- what is done to tables

FRESH = iter(range(1000, 10**9))


def some(rng: np.random.Generator) -> str:
    return f"id % {rng.integers(2, 9)} = {rng.integers(0, 3)}"


def fresh(rng: np.random.Generator) -> pa.Table:
    return rows([next(FRESH) for _ in range(rng.integers(1, 12))], int(rng.integers(1 << 30)))


def existing(path: str, rng: np.random.Generator) -> pa.Table:
    ids = lance.dataset(path).to_table(columns=["id"])["id"].to_numpy()
    chosen = rng.permutation(np.unique(ids))[: rng.integers(1, 12)]
    return rows(chosen, int(rng.integers(1 << 30)))


def merge(path: str, rng: np.random.Generator, *columns: str) -> None:
    data = existing(path, rng).select(columns) if columns else existing(path, rng)
    lance.dataset(path).merge_insert("id").when_matched_update_all().execute(data)


def upsert(path: str, rng: np.random.Generator) -> None:
    data = pa.concat_tables([existing(path, rng), fresh(rng)])
    job = lance.dataset(path).merge_insert("id").when_matched_update_all()
    job.when_not_matched_insert_all().execute(data)


def restore(path: str, rng: np.random.Generator) -> None:
    versions = [each["version"] for each in lance.dataset(path).versions()]
    lance.dataset(path, version=int(rng.choice(versions[-8:]))).restore()


def add_column(path: str, rng: np.random.Generator) -> None:
    lance.dataset(path).add_columns({f"c{next(FRESH)}": "id * 2"})


def drop_column(path: str, rng: np.random.Generator) -> None:
    extra = [n for n in lance.dataset(path).schema.names if n not in ("id", "word", "vector")]
    if extra:
        lance.dataset(path).drop_columns(extra[:1])


def in_place(path: str, rng: np.random.Generator, *, marked: bool = False) -> None:
    """What distributed writers do: new values for some rows, in new files of the fragment."""
    dataset = lance.dataset(path)
    fragment = dataset.get_fragments()[0]
    ids = fragment.to_table(columns=["id"], with_row_id=True)["_rowid"].to_pylist()[:3]
    data = pa.table({"_rowid": pa.array(ids, pa.uint64())})
    data = data.append_column("vector", rows(ids, int(rng.integers(1 << 30)))["vector"])
    meta, fields, offsets = fragment.update_columns(data, with_offsets=True)
    more = {"updated_fragment_offsets": {meta.id: offsets}} if marked else {}
    operation = LO.Update(
        updated_fragments=[meta], fields_modified=fields, update_mode="rewrite_columns", **more
    )
    lance.LanceDataset.commit(path, operation, read_version=dataset.version)


def replaced_files(path: str, rng: np.random.Generator, *, merge: bool = False) -> None:
    dataset = lance.dataset(path)
    metas = []
    for fragment in dataset.get_fragments():
        old = fragment.metadata
        data = dataset.schema.empty_table().slice(0, 0)
        data = rows(range(old.physical_rows), int(rng.integers(1 << 30)))
        for name in dataset.schema.names[3:]:
            data = data.append_column(name, data["id"])
        (new,) = write_fragments(data.cast(dataset.schema), path)
        metas.append(dataclasses.replace(old, files=new.files))
    operation: Any = LO.Merge(metas, dataset.lance_schema)
    if not merge:
        first = LO.DataReplacementGroup(metas[0].id, metas[0].files[0])
        operation = LO.DataReplacement([first])
    lance.LanceDataset.commit(path, operation, read_version=dataset.version)


def behind(path: str, rng: np.random.Generator) -> None:
    """Commits that were begun before others landed, so that Lance moves them."""
    stale = [lance.dataset(path) for _ in range(3)]
    lance.write_dataset(fresh(rng), path, mode="append")
    stale[0].update({"word": "'behind'"}, where=some(rng))
    stale[1].delete(f"id = {rng.integers(0, 60)}")
    lance.write_dataset(fresh(rng), stale[2], mode="append")


def by_lancedb(change: Callable[[Any, np.random.Generator], Any]) -> Operation:
    def operation(path: str, rng: np.random.Generator) -> None:
        where, name = path.removesuffix(".lance").rsplit("/", 1)
        change(lancedb.connect(where).open_table(name), rng)

    return operation


ORDINARY: dict[str, Operation] = {
    "append": lambda p, g: lance.write_dataset(fresh(g), p, mode="append"),
    "delete": lambda p, g: lance.dataset(p).delete(some(g) + " AND id % 3 = 1"),
    "update other": lambda p, g: lance.dataset(p).update({"word": "'new'"}, where=some(g)),
    "update all others": lambda p, g: lance.dataset(p).update({"word": "'all'"}),
    "update vector": lambda p, g: lance.dataset(p).update({"vector": "[1, 2, 3]"}, where=some(g)),
    "vector to null": lambda p, g: lance.dataset(p).update({"vector": "NULL"}, where="id % 9 = 8"),
    "merge": merge,
    "merge vectors": lambda p, g: merge(p, g, "id", "vector"),
    "merge words": lambda p, g: merge(p, g, "id", "word"),
    "upsert": upsert,
    "compact": lambda p, g: lance.dataset(p).optimize.compact_files(),
    "restore": restore,
    "add column": add_column,
    "drop column": drop_column,
    "behind": behind,
    "lancedb add": by_lancedb(lambda t, g: t.add(fresh(g))),
    "lancedb update": by_lancedb(
        lambda t, g: t.update(where=some(g), values={"vector": [4.0, 5.0, 6.0]})
    ),
    "lancedb update other": by_lancedb(
        lambda t, g: t.update(where=some(g), values={"word": "other"})
    ),
    "lancedb delete": by_lancedb(lambda t, g: t.delete("id % 11 = 3")),
    "lancedb optimize": by_lancedb(lambda t, g: t.optimize()),
    "lancedb merge": by_lancedb(
        lambda t, g: (
            t.merge_insert("id")
            .when_matched_update_all()
            .when_not_matched_insert_all()
            .execute(rows(range(5, 15), int(g.integers(1 << 30))))
        )
    ),
}
ODD: dict[str, Operation] = {
    "in place": in_place,
    "in place, marked": lambda p, g: in_place(p, g, marked=True),
    "replaced files": replaced_files,
    "replaced files by merge": lambda p, g: replaced_files(p, g, merge=True),
    "overwrite": lambda p, g: lance.write_dataset(rows(range(40), 3), p, mode="overwrite"),
    "cleanup": lambda p, g: lance.dataset(p).cleanup_old_versions(older_than=timedelta(0)),
    "b-tree": lambda p, g: lance.dataset(p).create_scalar_index("id", "BTREE"),
}


def history(path: str, seed: int, operations: dict[str, Operation], steps: int) -> list[str]:
    """A table after random operations; what was done."""
    rng = np.random.default_rng(seed)
    create(path, rows(range(60)), max_rows_per_file=25)
    names = []
    for _ in range(steps):
        names.append(str(rng.choice(list(operations))))
        try:
            operations[names[-1]](path, rng)
        except (OSError, ValueError, RuntimeError) as error:
            names[-1] += f" failed ({str(error)[:40]})"
    return names
