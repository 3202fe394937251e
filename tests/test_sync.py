"""Changes and differences against what Lance says that each version holds."""

from __future__ import annotations

import copy
import dataclasses
import re
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
        super().__init__()
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

    def __deepcopy__(self, memo: Any) -> Store:
        other = copy.copy(self)
        other.__dict__ = dict(self.__dict__)
        return other

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


def fresh(rng: np.random.Generator, nulls: bool = True) -> pa.Table:
    ids = [next(FRESH) for _ in range(rng.integers(1, 12))]
    return rows(ids, int(rng.integers(1 << 30)), nulls)


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
    "lancedb add": by_lancedb(lambda t, g: t.add(fresh(g, nulls=False))),
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
            .execute(rows(range(5, 15), int(g.integers(1 << 30)), nulls=False))
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


def history(
    path: str, rng: np.random.Generator, operations: dict[str, Operation], steps: int
) -> Iterator[str]:
    """Do random things to a new table, and yield the name of each when it is done."""
    create(path, rows(range(60)), max_rows_per_file=25)
    yield "create"
    for _ in range(steps):
        name = str(rng.choice(list(operations)))
        operations[name](path, rng)
        yield name


def follows(path: str, seed: int, operations: dict[str, Operation], steps: int) -> set[str]:
    """Go between all kinds of versions of a random table; the kinds of answers that came."""
    rng, done, stores, answers = np.random.default_rng(seed), [], [], set()
    for name in history(path, rng, operations, steps):
        done.append(name)
        stores.append(Store(lance.dataset(path)))
    follower = stores[0]
    versions = [each["version"] for each in lance.dataset(path).versions()]
    for version in [versions[-1], *rng.choice(versions, 8)]:
        dataset = lance.dataset(path, version=int(version))
        want = truth(dataset)
        for method in (Store.changes, Store.difference):
            store = copy.deepcopy(stores[rng.integers(len(stores))])
            start, before = store.held.mark.version, store.read
            found = method(store, dataset)
            answers.add(kind(found))
            if not isinstance(found, str):
                assert store.vectors() == want, f"{done}: {start} to {version}, {found}"
            if isinstance(found, Difference):
                assert 2 * (store.read - before) <= dataset.count_rows()
        if isinstance(follower.changes(dataset), str) and isinstance(
            follower.difference(dataset), str
        ):
            follower = Store(dataset)
        assert follower.vectors() == want, f"{done}: followed to {version}"
    return answers


def kind(found: Changes | Difference | str) -> str:
    if isinstance(found, str):
        return re.sub(r"\d+|\(.*\)", "N", found)
    return "inserted only" if getattr(found, "inserted_only", False) else type(found).__name__


@pytest.mark.parametrize("seed", range(12))
def test_follows_what_is_usually_done(path: str, seed: int) -> None:
    follows(path, seed, ORDINARY, 10)


@pytest.mark.parametrize("seed", range(100, 110))
def test_follows_what_is_seldom_done(path: str, seed: int) -> None:
    follows(path, seed, ORDINARY | ODD, 10)


# ------------------------------------------------------------- one thing at a time


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("append", "inserted only"),
        ("delete", "inserted only"),
        ("update other", "inserted only"),
        ("update all others", "inserted only"),
        ("update vector", "Changes"),
        ("merge words", "Changes"),
        ("compact", "inserted only"),
        ("add column", "Changes"),
        ("restore", "version N was made by Restore"),
        ("in place", "version N rewrote the column"),
        ("in place, marked", "Changes"),
        ("replaced files", "version N was made by DataReplacement"),
        ("replaced files by merge", "version N rewrote the column"),
        ("overwrite", "version N was made by Overwrite"),
        ("lancedb update other", "inserted only"),
        ("lancedb merge", "Changes"),
        ("lancedb optimize", "inserted only"),
    ],
)
def test_changes(path: str, name: str, answer: str) -> None:
    create(path, rows(range(60)), max_rows_per_file=25)
    lance.dataset(path).delete("id = 7")
    store, rng = Store(lance.dataset(path)), np.random.default_rng(1)
    read = store.read
    (ORDINARY | ODD)[name](path, rng)
    dataset = lance.dataset(path)
    found = store.changes(dataset)
    assert kind(found) == answer
    if not isinstance(found, str):
        assert store.vectors() == truth(dataset)
    if answer == "inserted only" or name == "add column":
        assert store.read - read == dataset.count_rows("id >= 1000")


def test_rows_of_an_update_of_other_columns_are_not_read_again(path: str) -> None:
    store = Store(create(path, rows(range(60))))
    dataset = lance.dataset(path)
    dataset.update({"word": "'x'"}, where="id < 30")
    lance.write_dataset(rows(range(60, 65), nulls=False), path, mode="append")
    lance.dataset(path).update({"word": "'y'"}, where="id >= 60")
    dataset, store.read = lance.dataset(path), 0
    assert kind(store.changes(dataset)) == "inserted only"
    assert store.read == 5
    assert store.vectors() == truth(dataset)
    dataset.update({"word": "'z'"}, where="id < 4")
    dataset.update({"vector": "[7, 7, 7]"}, where="id < 4")
    dataset.update({"word": "'z'"}, where="id < 4")
    store.read = 0
    assert kind(store.changes(lance.dataset(path))) == "Changes"
    assert store.read == 4
    assert store.vectors() == truth(lance.dataset(path))


def test_a_compaction_of_a_table_with_a_scalar_index_is_followed(path: str) -> None:
    dataset = create(path, rows(range(60)), max_rows_per_file=25)
    dataset.create_scalar_index("id", "BTREE")
    store = Store(dataset)
    dataset.delete("id < 9")
    dataset.optimize.compact_files()
    assert kind(store.changes(lance.dataset(path))) == "inserted only"
    assert store.vectors() == truth(lance.dataset(path))


def test_difference_reads_what_differs_and_no_more(path: str) -> None:
    create(path, rows(range(60), nulls=False), max_rows_per_file=25)
    dataset = lance.dataset(path)
    dataset.delete("id < 5")
    dataset.update({"vector": "[1, 2, 3]"}, where="id >= 50")
    dataset.optimize.compact_files()
    lance.write_dataset(rows(range(60, 64), nulls=False), path, mode="append")
    new, old = lance.dataset(path), lance.dataset(path, version=1)
    store = Store(new)
    found = store.difference(old)
    assert isinstance(found, Difference)
    assert sorted(found.gone.tolist()) == list(range(50, 64))
    assert sorted(found.read.tolist()) == [0, 1, 2, 3, 4, *range(50, 60)]
    assert store.vectors() == truth(old)
    old.restore()
    found = store.difference(lance.dataset(path))
    assert isinstance(found, Difference)
    assert len(found.gone) == len(found.read) == 0


def test_a_missing_history_is_crossed_by_the_files_that_stay(path: str) -> None:
    create(path, rows(range(60), nulls=False), max_rows_per_file=20)
    store = Store(lance.dataset(path))
    in_place(path, np.random.default_rng(0))
    lance.dataset(path).delete("id = 45")
    lance.dataset(path).cleanup_old_versions(older_than=timedelta(0))
    dataset = lance.dataset(path)
    assert "history is gone" in str(store.changes(dataset))
    found = store.difference(dataset)
    assert isinstance(found, Difference)
    assert sorted(found.read.tolist()) == list(range(20))
    assert store.vectors() == truth(dataset)
    in_place(path, np.random.default_rng(1))
    lance.dataset(path).optimize.compact_files()  # the rows do not tell, the files are gone
    lance.dataset(path).cleanup_old_versions(older_than=timedelta(0))
    assert "history is gone" in str(store.difference(lance.dataset(path)))


def test_a_rewrite_in_place_is_found_behind_a_compaction(path: str) -> None:
    create(path, rows(range(60), nulls=False), max_rows_per_file=20)
    store = Store(lance.dataset(path))
    in_place(path, np.random.default_rng(0))
    lance.dataset(path).optimize.compact_files()
    for method in (store.changes, store.difference):
        assert "rewrote the column" in str(method(lance.dataset(path)))


def test_another_table_under_the_path(path: str, tmp_path: Path) -> None:
    dataset = create(path, rows(range(60)))
    shutil.copytree(path, tmp_path / "copy")
    dataset.update({"vector": "[1, 1, 1]"}, where="id < 9")
    dataset.update({"word": "'x'"}, where="id = 50")
    store = Store(lance.dataset(path))
    # a copy of an earlier state takes its place, and then goes its own way
    shutil.rmtree(path)
    shutil.move(tmp_path / "copy", path)
    dataset = lance.dataset(path)
    dataset.update({"vector": "[2, 2, 2]"}, where="id < 9")
    assert store.difference(dataset) == "the table was put back to an earlier state"
    assert "not newer" in str(store.changes(dataset))
    dataset.update({"word": "'y'"}, where="id = 50")
    assert store.difference(lance.dataset(path)) == "the table was replaced"
    dataset.delete("id = 1")
    for method in (store.changes, store.difference):
        assert method(lance.dataset(path)) == "the table was replaced"
    shutil.rmtree(path)
    dataset = create(path, rows(range(60), 9))
    assert "put back" in str(store.difference(dataset))


def test_without_stable_row_ids_and_with_another_column(path: str) -> None:
    dataset = create(path, rows(range(20)), enable_stable_row_ids=False)
    store = Store(dataset)
    assert {updated for updated, _ in store.values()} == {0}
    dataset.delete("id = 1")
    for method in (store.changes, store.difference):
        assert method(lance.dataset(path)) == "it has no stable row ids"
    shutil.rmtree(path)
    dataset = create(path, rows(range(20)))
    store = Store(dataset)
    dataset.alter_columns({"path": "vector", "data_type": pa.list_(pa.float16(), D)})
    for method in (store.changes, store.difference):
        assert method(lance.dataset(path)) == "the column was replaced"
    dataset.drop_columns(["vector"])
    with pytest.raises(SchemaError, match="no column 'vector'"):
        store.changes(lance.dataset(path))


def test_row_ids_far_apart(path: str) -> None:
    dataset = create(path, rows(range(40), nulls=False))
    held = Held.of(dataset, "vector")
    ids = np.array([10**12, 39, 3, 10**15, 5])
    found = difference(dataset, held, "vector", ids, np.array([1, 1, 1, 1, 2]))
    assert found == "most rows changed"
    ids = np.concatenate([[10**12], np.arange(40)[::-1], [10**15]])
    updated = np.where(ids == 5, 2, 1)
    found = difference(dataset, held, "vector", ids, updated)
    assert isinstance(found, Difference)
    assert found.gone.tolist() == [10**12, 5, 10**15]
    assert found.read.tolist() == [5]


def test_marks_and_conditions(path: str) -> None:
    dataset = create(path, rows(range(40)))
    assert Mark.of(dataset, "vector") == Mark.of(lance.dataset(path), "vector")
    held = Held.of(dataset, "vector")
    dataset.delete("id = 3")
    assert list(held.files) == [0]  # of its own version, wherever the handle goes
    assert held.mark.version == 1
    assert matching_row_ids(dataset, "id < 5").tolist() == [0, 1, 2, 4]
    with pytest.raises(QueryError, match=r"filter 'nope = 1' cannot be run: .*nope"):
        matching_row_ids(dataset, "nope = 1")
