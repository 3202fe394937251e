"""One dataset: following its versions, and committing new ones."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import lance
import pyarrow as pa
import pytest

from gpu_lance import storage as storage_module
from gpu_lance.errors import (
    BadInputError,
    CommitConflictError,
    StorageError,
    TableExistsError,
    TableNotFoundError,
)
from gpu_lance.storage import ChangedRows, Storage

SCHEMA = pa.schema({"id": pa.int64(), "text": pa.utf8()})


def batch(*ids: int) -> pa.RecordBatch:
    return pa.record_batch({"id": list(ids), "text": [f"t{i}" for i in ids]}, schema=SCHEMA)


def ids(storage: Storage) -> list[int]:
    return sorted(storage.dataset().to_table()["id"].to_pylist())


@pytest.fixture(params=["folder", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    uri = "memory://" if request.param == "memory" else str(tmp_path / "t.lance")
    return Storage.create(uri, "t", iter([batch(1, 2, 3)]), SCHEMA)


def test_a_new_dataset_has_stable_row_ids_and_a_format_that_lancedb_reads(storage: Storage) -> None:
    assert storage.dataset().has_stable_row_ids
    assert storage.dataset().data_storage_version == "2.2"


def test_create_refuses_to_write_over_a_table(tmp_path: Path) -> None:
    uri = str(tmp_path / "t.lance")
    Storage.create(uri, "t", iter([batch(1)]), SCHEMA)
    with pytest.raises(TableExistsError, match="Table 't' already exists"):
        Storage.create(uri, "t", iter([batch(2)]), SCHEMA)
    assert ids(Storage(uri, "t")) == [1]


@pytest.mark.parametrize("made", [True, False])
def test_what_lance_remembers_is_bounded(
    made: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "METADATA_CACHE", 100_000)
    uri = str(tmp_path / "t.lance")
    storage = Storage.create(uri, "t", iter([batch(1)]), SCHEMA)
    storage = storage if made else Storage(uri, "t")
    other = lance.dataset(uri)
    for i in range(40):
        other = lance.write_dataset(pa.table(batch(i).to_pydict()), other, mode="append")
        ids(storage)
    assert other.session().size_bytes() > 0  # it counts
    assert 0 < storage.dataset().session().size_bytes() < 150_000


def test_a_missing_table_is_said(tmp_path: Path) -> None:
    with pytest.raises(TableNotFoundError, match="Table 'nope' was not found"):
        Storage(str(tmp_path / "nope.lance"), "nope")


def test_each_write_is_one_version(storage: Storage) -> None:
    storage.append(iter([batch(4), batch(5)]), SCHEMA)
    assert storage.dataset().version == 2
    storage.delete("id = 1")
    assert storage.dataset().version == 3
    done = storage.run(lambda ds: ds.update({"text": "'x'"}, where="id = 2"))
    assert done["num_rows_updated"] == 1
    assert storage.dataset().version == 4
    storage.set_metadata({"k": "v"})
    assert storage.dataset().version == 5
    assert storage.dataset().schema.metadata == {b"k": b"v"}
    assert ids(storage) == [2, 3, 4, 5]
    storage.overwrite(iter([batch(9)]), SCHEMA)
    assert ids(storage) == [9]
    assert storage.dataset().has_stable_row_ids


def test_an_error_of_the_data_passes_through_and_commits_nothing(storage: Storage) -> None:
    def broken() -> Iterator[pa.RecordBatch]:
        yield batch(4)
        raise KeyError("the very error")

    with pytest.raises(KeyError, match="the very error"):
        storage.append(broken(), SCHEMA)
    assert ids(storage) == [1, 2, 3] and storage.dataset().version == 1


def test_another_handles_commits_are_seen(tmp_path: Path) -> None:
    uri = str(tmp_path / "t.lance")
    ours = Storage.create(uri, "t", iter([batch(1)]), SCHEMA)
    lance.write_dataset(pa.Table.from_batches([batch(2)]), uri, mode="append")
    assert ids(ours) == [1, 2]


def test_a_handle_may_be_read_from_for_a_while(tmp_path: Path) -> None:
    uri = str(tmp_path / "t.lance")
    Storage.create(uri, "t", iter([batch(1)]), SCHEMA)
    patient = Storage(uri, "t", read_consistency_interval=timedelta(hours=1))
    other = Storage(uri, "t")
    other.append(iter([batch(2)]), SCHEMA)
    assert ids(patient) == [1]
    assert patient.latest().count_rows() == 2
    patient.append(iter([batch(3)]), SCHEMA)
    assert ids(patient) == [1, 2, 3]


def test_a_table_made_anew_in_its_place_is_noticed(tmp_path: Path) -> None:
    uri = str(tmp_path / "t.lance")
    ours = Storage.create(uri, "t", iter([batch(1)]), SCHEMA)
    assert ids(ours) == [1]
    shutil.rmtree(uri)
    lance.write_dataset(pa.Table.from_batches([batch(7, 8)]), uri)
    assert ids(ours) == [7, 8]
    shutil.rmtree(uri)
    with pytest.raises(TableNotFoundError):
        ours.dataset()


def test_versions_are_read_and_restored(storage: Storage) -> None:
    storage.append(iter([batch(4)]), SCHEMA)
    storage.delete("id < 3")
    storage.checkout(1)
    assert storage.pinned and ids(storage) == [1, 2, 3]
    with pytest.raises(BadInputError, match="checked out at version 1"):
        storage.append(iter([batch(5)]), SCHEMA)
    with pytest.raises(BadInputError, match="checked out"):
        storage.delete("true")
    storage.restore(None)
    assert not storage.pinned and ids(storage) == [1, 2, 3]
    assert storage.dataset().version == 4
    storage.restore(2)
    assert ids(storage) == [1, 2, 3, 4]
    storage.checkout(3)
    storage.checkout_latest()
    assert storage.dataset().version == 5


def test_a_version_that_was_cleaned_up_meanwhile(tmp_path: Path) -> None:
    storage = Storage.create(str(tmp_path / "t.lance"), "t", iter([batch(1, 2, 3)]), SCHEMA)
    storage.checkout(1)
    other = Storage(storage.uri, "t")
    other.delete("id = 1")
    other.run(lambda ds: ds.cleanup_old_versions(timedelta(0)))
    with pytest.raises(StorageError, match="cannot be written"):
        storage.restore(None)
    storage.checkout_latest()
    assert ids(storage) == [2, 3]


def test_versions_that_are_not_there(storage: Storage) -> None:
    for call in (lambda: storage.checkout(99), lambda: storage.restore(99)):
        with pytest.raises(BadInputError, match="no version 99"):
            call()
    with pytest.raises(BadInputError, match="latest version"):
        storage.restore(None)
    assert ids(storage) == [1, 2, 3]


def replacement(base: lance.LanceDataset, where: str) -> tuple[ChangedRows, list[pa.RecordBatch]]:
    rows = base.scanner(filter=where, with_row_id=True, with_row_address=True).to_table()
    changed = ChangedRows()
    changed.add(rows["_rowid"], rows["_rowaddr"])
    new = rows.select(["id", "text"]).set_column(1, "text", pa.array(["new"] * len(rows)))
    return changed, new.cast(SCHEMA).to_batches()


def test_replaced_rows_keep_their_row_ids(storage: Storage) -> None:
    storage.append(iter([batch(4, 5)]), SCHEMA)
    storage.append(iter([batch(6)]), SCHEMA)
    base = storage.writable()
    before = base.to_table(columns=["id"], with_row_id=True).to_pydict()
    changed, new = replacement(base, "id in (2, 4, 6)")
    after = storage.replace_rows(base, changed, iter(new), SCHEMA)
    rows = after.to_table(with_row_id=True).to_pydict()
    where = dict(zip(before["id"], before["_rowid"], strict=True))
    assert dict(zip(rows["id"], rows["_rowid"], strict=True)) == where
    assert {i for i, t in zip(rows["id"], rows["text"], strict=True) if t == "new"} == {2, 4, 6}
    updated = after.delta(compared_against=base.version).get_updated_rows().read_all()
    assert sorted(updated["id"].to_pylist()) == [2, 4, 6]


def test_replacing_no_row_commits_nothing(storage: Storage) -> None:
    base = storage.writable()
    after = storage.replace_rows(base, ChangedRows(), iter(()), SCHEMA)
    assert after.version == base.version == storage.dataset().version


def test_a_row_that_another_writer_changed_is_a_conflict_and_nothing_is_written(
    storage: Storage,
) -> None:
    base = storage.writable()
    changed, new = replacement(base, "id = 2")
    storage.delete("id = 2")
    with pytest.raises(CommitConflictError, match="Try again"):
        storage.replace_rows(base, changed, iter(new), SCHEMA)
    assert ids(storage) == [1, 3] and storage.dataset().version == 2


def test_threads_that_append_lose_nothing(storage: Storage) -> None:
    def work(first: int) -> None:
        for i in range(first, first + 5):
            storage.append(iter([batch(i)]), SCHEMA)

    threads = [threading.Thread(target=work, args=(100 * t,)) for t in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [1, 2, 3] + [100 * t + i for t in range(1, 5) for i in range(5)]
    assert ids(storage) == expected and storage.dataset().version == 21
