"""ColumnIndex against a float64 brute force over what Lance says the table holds."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
import torch
from index_changes import changes

from gpu_lance.errors import BadVectorError, IndexBackendError, QueryError, SchemaError
from gpu_lance.index import ColumnIndex, SearchResult
from gpu_lance.index import column as column_module
from gpu_lance.index import follow as follow_module
from gpu_lance.index.store import ResidentStore
from gpu_lance.types import Metric

D = 6
CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)
QUERIES = np.random.default_rng(99).standard_normal((4, D)).astype(np.float32)


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")


@pytest.fixture
def index(device: torch.device) -> Iterator[ColumnIndex]:
    with ColumnIndex("vector", D, device) as made:
        yield made


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "t.lance")


def rows(
    start: int, stop: int, *, null: tuple[int, ...] = (), seed: int | None = None, type_: Any = None
) -> pa.Table:
    n = stop - start
    rng = np.random.default_rng(start if seed is None else seed)
    flat = rng.standard_normal(n * D).astype(np.float32)
    kind = pa.list_(type_ or pa.float32(), D)
    vectors = [None if start + i in null else flat[i * D : (i + 1) * D].tolist() for i in range(n)]
    return pa.table(
        {
            "id": pa.array(range(start, stop), pa.int64()),
            "word": pa.array([f"w{i % 10}" for i in range(start, stop)]),
            "vector": pa.array(vectors, pa.list_(pa.float32(), D)).cast(kind),
        }
    )


def create(path: str, data: pa.Table, *, stable: bool = True, **more: Any) -> lance.LanceDataset:
    return lance.write_dataset(data, path, enable_stable_row_ids=stable, **more)


def expected(
    dataset: lance.LanceDataset,
    k: int,
    metric: Metric = Metric.L2,
    where: str | None = None,
    lower: float = -np.inf,
    upper: float = np.inf,
) -> SearchResult:
    table = dataset.scanner(columns=["vector"], filter=where, with_row_id=True).to_table()
    ids = table["_rowid"].to_numpy().astype(np.int64)
    kept = np.array([v is not None for v in table["vector"].to_pylist()], bool)
    x = np.array([v for v in table["vector"].to_pylist() if v is not None], np.float64)
    x, ids, q = x.reshape(-1, D), ids[kept], QUERIES.astype(np.float64)
    if metric is Metric.L2:
        d = ((q[:, None] - x[None]) ** 2).sum(-1)
    elif metric is Metric.DOT:
        d = 1 - q @ x.T
    else:
        lengths = np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(x, axis=1)[None]
        d = 1 - q @ x.T / lengths
    result = SearchResult.empty(len(q), k)
    for line, row in enumerate(d.astype(np.float32)):
        inside = (row >= lower) & (row < upper)
        order = np.lexsort((ids[inside], row[inside]))[:k]
        result.row_ids[line, : len(order)] = ids[inside][order]
        result.distances[line, : len(order)] = row[inside][order]
    return result


def check(
    index: ColumnIndex,
    dataset: lance.LanceDataset,
    metric: Metric = Metric.L2,
    k: int = 10,
    **more: Any,
) -> None:
    """Assert that a search gives what brute force does over the dataset's version."""
    got = index.search(dataset, torch.from_numpy(QUERIES).to(index.device), k, metric, **more)
    want = expected(dataset, k, metric, **more)
    np.testing.assert_array_equal(got.row_ids, want.row_ids)
    np.testing.assert_allclose(got.distances, want.distances, rtol=2e-7, atol=1e-12)


def kind(index: ColumnIndex) -> str:
    return str(index.info()["refresh"]["kind"])


@pytest.mark.parametrize("n", [1, 63, 100, 257])
@pytest.mark.parametrize("metric", list(Metric))
def test_loads_and_searches(n: int, metric: Metric, index: ColumnIndex, path: str) -> None:
    dataset = create(path, rows(0, n, null=(3, 50)))
    for k in (1, 10, n + 5):
        check(index, dataset, metric, k)
    info = index.info()
    assert info["rows"] == n - sum(i < n for i in (3, 50))
    assert info["version"] == dataset.version
    assert info["step"] == "float32"
    assert info["scanned"] == info["rows"]
    assert kind(index) == "rebuild"


def test_all_metrics_are_of_one_store_that_reads_the_table_once(
    index: ColumnIndex, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = create(path, rows(0, 200, null=(7,)))
    reads = []
    honest = follow_module.read_blocks

    def counted(*arguments: Any, **more: Any) -> Any:
        reads.append(1)
        return honest(*arguments, **more)

    monkeypatch.setattr(follow_module, "read_blocks", counted)
    for metric in (Metric.DOT, Metric.L2, Metric.COSINE):
        check(index, dataset, metric)
    assert len(reads) == 1
    dataset.delete("id < 20")
    dataset.update({"word": "'x'"}, where="id = 30")
    dataset = lance.write_dataset(rows(200, 230), path, mode="append")
    for metric in Metric:
        check(index, dataset, metric)
    assert len(reads) == 2
    assert kind(index) == "delta"


def test_empty_table_and_table_of_nulls(index: ColumnIndex, path: str) -> None:
    dataset = create(path, rows(0, 3).slice(0, 0))
    assert index.search(dataset, torch.zeros(2, D), 3, Metric.L2).row_ids.tolist() == [[-1] * 3] * 2
    assert index.search(
        dataset, torch.zeros(2, D), 3, Metric.L2, where="id > 1"
    ).counts.tolist() == [0, 0]
    dataset = lance.write_dataset(rows(0, 4, null=(0, 1, 2, 3)), path, mode="append")
    check(index, dataset)
    dataset = lance.write_dataset(rows(4, 40), path, mode="append")
    check(index, dataset)
    assert kind(index) == "delta"


CHANGES = {
    **changes(rows, "vector"),
    "update vector": (
        "delta",
        lambda ds, p: ds.update({"vector": "[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]"}, where="id < 3"),
    ),
    "replace the column": (
        "rebuild",
        lambda ds, p: (
            ds.drop_columns(["vector"]),
            ds.add_columns({"vector": "arrow_cast(NULL, 'FixedSizeList(6, Float32)')"}),
        ),
    ),
    "replace it by an empty column": (
        "rebuild",
        lambda ds, p: (
            ds.drop_columns(["vector"]),
            ds.add_columns(pa.field("vector", pa.list_(pa.float32(), D))),
        ),
    ),
    "another float type": (
        "rebuild",
        lambda ds, p: ds.alter_columns({"path": "vector", "data_type": pa.list_(pa.float16(), D)}),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_follows_every_change(name: str, index: ColumnIndex, path: str) -> None:
    create(path, rows(0, 120))
    dataset = lance.write_dataset(rows(120, 200, null=(150,)), path, mode="append")
    check(index, dataset)
    wanted, change = CHANGES[name]
    change(lance.dataset(path), path)  # by another handle
    dataset = lance.dataset(path)
    check(index, dataset)
    assert kind(index) == wanted
    assert index.info()["version"] == dataset.version
    if dataset.schema.equals(rows(0, 1).schema):
        dataset = lance.write_dataset(rows(500, 520), path, mode="append")
        assert dataset.count_rows("id >= 500") == 20
    check(index, dataset)


def test_many_changes_at_once(index: ColumnIndex, path: str) -> None:
    dataset = create(path, rows(0, 300))
    check(index, dataset)
    for step in range(6):
        dataset = lance.write_dataset(rows(300 + 20 * step, 320 + 20 * step), path, mode="append")
        dataset.delete(f"id % 7 = {step}")
        dataset.update({"vector": "[1, 2, 3, 4, 5, 6]"}, where=f"id % 50 = {step}")
    dataset.optimize.compact_files()
    dataset = lance.dataset(path)
    check(index, dataset, k=300)
    assert kind(index) == "delta"


def test_older_versions_are_searched_as_they_were(index: ColumnIndex, path: str) -> None:
    create(path, rows(0, 50))
    lance.dataset(path).delete("id < 10")
    lance.write_dataset(rows(50, 80), path, mode="append")
    for version in (3, 1, 2, 3, 1):
        check(index, lance.dataset(path, version=version), k=60)


def test_a_reader_behind_an_appending_writer_costs_no_rebuild(
    index: ColumnIndex, path: str
) -> None:
    old = create(path, rows(0, 50))
    check(index, old)
    new = lance.write_dataset(rows(50, 80), path, mode="append")
    check(index, new, k=60)
    refreshed = index.info()["refresh"]
    assert refreshed["kind"] == "delta"
    check(index, old, k=60)
    check(index, old, k=60, where="id < 40")
    assert index.info()["scanned"] == 40
    for handle in (new, lance.dataset(path)):  # the same version by another handle
        check(index, handle, k=60)
        assert index.info()["refresh"] == refreshed
    new.delete("id = 4")
    new.update({"vector": "[1, 2, 3, 4, 5, 6]"}, where="id = 7")
    check(index, lance.dataset(path), k=60)
    refreshed = index.info()["refresh"]
    for dataset in (old, new, lance.dataset(path, version=2)):
        check(index, dataset, k=60)
    assert index.info()["refresh"] == refreshed


def test_two_versions_by_turns_read_what_differs_once(
    index: ColumnIndex, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(path, rows(0, 100))
    lance.dataset(path).update({"vector": "[1, 2, 3, 4, 5, 6]"}, where="id < 5")
    lance.dataset(path).delete("id = 50")
    new, old = lance.dataset(path), lance.dataset(path, version=1)
    check(index, new)
    read: list[int] = []
    honest = follow_module.read_blocks

    def counted(*arguments: Any, **more: Any) -> Any:
        for block in honest(*arguments, **more):
            read.append(len(block.row_ids))
            yield block

    monkeypatch.setattr(follow_module, "read_blocks", counted)
    for _ in range(3):
        check(index, old, k=100)
        assert kind(index) == "difference"
        check(index, new, k=100)
    assert sum(read) == 6


def test_a_table_made_anew_under_the_same_path(index: ColumnIndex, path: str) -> None:
    check(index, create(path, rows(0, 50)))
    shutil.rmtree(path)
    dataset = create(path, rows(0, 50, seed=77))
    assert dataset.version == 1
    check(index, dataset)
    shutil.rmtree(path)
    create(path, rows(0, 50, seed=78))
    dataset = lance.write_dataset(rows(50, 60), path, mode="append")
    check(index, dataset)
    assert "replaced" in index.info()["refresh"]["reason"]


def test_without_stable_row_ids_it_rebuilds_and_says_so_once(
    index: ColumnIndex, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = create(path, rows(0, 100), stable=False, max_rows_per_file=40)
    check(index, dataset)
    with caplog.at_level(logging.WARNING, logger="gpu_lance"):
        dataset.update_config({"a": "b"})
        check(index, lance.dataset(path))
        assert kind(index) == "unchanged"
        assert not caplog.records
        dataset.delete("id < 20")
        check(index, lance.dataset(path))
        assert kind(index) == "rebuild"
        lance.dataset(path).update({"word": "'a'"}, where="id = 30")
        check(index, lance.dataset(path))
        lance.dataset(path).optimize.compact_files()
        check(index, lance.dataset(path))
        check(index, lance.write_dataset(rows(100, 120), path, mode="append"))
    assert ["stable row ids" in record.message for record in caplog.records] == [True]


# -------------------------------------------------------------------- appending


def appended(path: str, data: pa.Table) -> tuple[int, lance.LanceDataset, Any, np.ndarray]:
    """Commit rows, and what `append` takes: version before, dataset, tensor, row ids."""
    before = lance.dataset(path).version
    dataset = lance.write_dataset(data, path, mode="append")
    table = dataset.scanner(
        columns=["vector"], filter=f"_row_created_at_version > {before}", with_row_id=True
    ).to_table()
    vectors = [v or [0.0] * D for v in table["vector"].to_pylist()]
    return before, dataset, torch.tensor(vectors), table["_rowid"].to_numpy().astype(np.int64)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*arguments: Any, **more: Any) -> Any:
        raise AssertionError("the vectors were read from Lance")

    monkeypatch.setattr(follow_module, "read_blocks", read)


def test_append_takes_the_tensors(index: ColumnIndex, path: str, unread: None) -> None:
    create(path, rows(0, 1).slice(0, 0))
    before, dataset, vectors, ids = appended(path, rows(0, 40, null=(3,)))
    index.append(before, dataset, vectors.to(index.device), ids, np.arange(40) != 3)
    assert index.info()["rows"] == 39
    check(index, dataset)
    check(index, dataset, Metric.COSINE)
    older = dataset
    before, dataset, vectors, ids = appended(path, rows(40, 90))
    index.append(before, dataset, vectors.to(index.device), ids)
    for metric in Metric:
        check(index, dataset, metric)
    check(index, older)
    assert index.info()["version"] == dataset.version == 3


def test_append_after_create_and_overwrite(index: ColumnIndex, path: str, unread: None) -> None:
    for data, mode in ((rows(0, 40), "create"), (rows(0, 30, seed=4), "overwrite")):
        dataset = create(path, data, mode=mode)
        table = dataset.scanner(columns=["vector"], with_row_id=True).to_table()
        index.append(
            dataset.version - 1,
            dataset,
            torch.tensor(table["vector"].to_pylist()).to(index.device),
            table["_rowid"].to_numpy().astype(np.int64),
        )
        assert kind(index) == "append"
        check(index, dataset)


def test_append_does_nothing_where_it_cannot_know(index: ColumnIndex, path: str) -> None:
    create(path, rows(0, 40))
    before, dataset, vectors, ids = appended(path, rows(40, 60))
    index.append(before, dataset, vectors, ids)  # nothing held, and there are older rows
    assert index.info()["version"] is None
    check(index, dataset)
    lance.dataset(path).delete("id < 5")  # somebody else between what is held and our commit
    before, dataset, vectors, ids = appended(path, rows(60, 80))
    index.append(before, dataset, vectors, ids)
    assert index.info()["version"] == 2
    check(index, dataset, k=80)
    before, dataset, vectors, ids = appended(path, rows(80, 90))
    index.append(before - 1, dataset, vectors, ids)  # not the version before
    assert index.info()["version"] == before
    check(index, dataset, k=80)


def test_append_to_a_table_that_was_replaced(index: ColumnIndex, path: str) -> None:
    check(index, create(path, rows(0, 40)))
    shutil.rmtree(path)
    create(path, rows(0, 40, seed=9))
    before, dataset, vectors, ids = appended(path, rows(40, 60))
    index.append(before, dataset, vectors, ids)
    check(index, dataset, k=60)


def test_append_without_memory_is_left_to_the_next_search(
    index: ColumnIndex, path: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    check(index, create(path, rows(0, 40)))
    before, dataset, vectors, ids = appended(path, rows(40, 60))
    with monkeypatch.context() as patch:

        def full(*arguments: Any) -> None:
            raise RuntimeError("CUDA error: out of memory")

        patch.setattr(ResidentStore, "add", full)
        index.append(before, dataset, vectors, ids)
        assert "dropped after an add" in caplog.text
        with pytest.raises(IndexBackendError, match="does not fit"):
            check(index, dataset)
    check(index, dataset)


def test_half_a_change_is_never_searched(
    index: ColumnIndex, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(index, create(path, rows(0, 40)))
    dataset = lance.write_dataset(rows(40, 60), path, mode="append")
    with monkeypatch.context() as patch:

        def broken(*arguments: Any, **more: Any) -> Any:
            yield from ()
            raise OSError("the disk is gone")

        patch.setattr(follow_module, "read_blocks", broken)
        with pytest.raises(OSError, match="disk"):
            check(index, dataset)
    assert index.info()["version"] is None
    check(index, dataset)


# ---------------------------------------------------------------------- filters


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize(
    "where",
    ["id < 0", "id = 17", "id < 4", "word = 'w3'", "id % 2 = 0", "id >= 5", "id >= 0 OR id = 9"],
)
def test_filters(where: str, metric: Metric, index: ColumnIndex, path: str) -> None:
    dataset = create(path, rows(0, 400, null=(17, 40)))
    check(index, dataset, metric, where=where)
    assert index.info()["scanned"] <= dataset.count_rows(where)
    check(index, dataset, metric, where=where, lower=0.5, upper=4.0)
    dataset.update({"word": "'w3'"}, where="id < 9")
    check(index, lance.dataset(path), metric, where=where)


def test_filters_are_remembered_for_a_version(
    index: ColumnIndex, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = create(path, rows(0, 100))
    asked = []
    honest = column_module.matching_row_ids

    def counted(dataset: lance.LanceDataset, where: str) -> np.ndarray:
        asked.append(where)
        return honest(dataset, where)

    monkeypatch.setattr(column_module, "matching_row_ids", counted)
    for _ in range(3):
        check(index, dataset, where="id < 50")
    assert asked == ["id < 50"]
    for bound in range(30):
        check(index, dataset, where=f"id < {bound}")
    check(index, dataset, where="id < 50")
    assert asked[-1] == "id < 50"  # forgotten meanwhile
    dataset.delete("id = 2")
    check(index, lance.dataset(path), where="id < 50")
    assert len(asked) == 33


def test_a_remembered_filter_goes_with_the_slots(index: ColumnIndex, path: str) -> None:
    create(path, rows(0, 1).slice(0, 0))
    before, dataset, vectors, ids = appended(path, rows(0, 60))
    order = np.arange(60)[::-1].copy()  # held in another order than a scan gives
    index.append(before, dataset, vectors[order].to(index.device), ids[order])
    for _ in range(2):
        check(index, dataset, where="id < 20")
        index.close()


@pytest.mark.parametrize("where", ["nope = 1", "id =", "id = 'a'", "1", "id IN (SELECT 1)"])
def test_bad_filters(where: str, index: ColumnIndex, path: str) -> None:
    dataset = create(path, rows(0, 10))
    with pytest.raises(QueryError) as caught:
        index.search(dataset, torch.zeros(1, D), 1, Metric.L2, where=where)
    assert where in str(caught.value)
    assert ".rs:" not in str(caught.value)
    assert "\n" not in str(caught.value)
    check(index, dataset)


@pytest.mark.parametrize("type_", [pa.float16(), pa.float64()])
def test_other_float_types(type_: pa.DataType, index: ColumnIndex, path: str) -> None:
    dataset = create(path, rows(0, 150, type_=type_, null=(2,)))
    for metric in Metric:
        check(index, dataset, metric, k=30)
        check(index, dataset, metric, where="id % 3 = 0", lower=0.5)
    assert index.info()["step"] == ("float16" if type_ == pa.float16() else "float32")


# ------------------------------------------------------------------- bad requests


def test_bad_requests(device: torch.device, path: str) -> None:
    dataset = create(path, rows(0, 10))
    good = torch.zeros(1, D)
    with pytest.raises(SchemaError, match="no column 'nope'"):
        ColumnIndex("nope", D, device).search(dataset, good, 1, Metric.L2)
    with pytest.raises(SchemaError, match="fixed-size list of 7"):
        ColumnIndex("vector", 7, device).search(dataset, torch.zeros(1, 7), 1, Metric.L2)
    with pytest.raises(SchemaError, match="int64"):
        ColumnIndex("id", D, device).search(dataset, good, 1, Metric.L2)
    index = ColumnIndex("vector", D, device)
    with pytest.raises(QueryError, match="at least 1"):
        index.search(dataset, good, 0, Metric.L2)
    with pytest.raises(QueryError, match="6 values"):
        index.search(dataset, torch.zeros(1, 5), 1, Metric.L2)
    with pytest.raises(BadVectorError, match="NaN"):
        index.search(dataset, good * float("nan"), 1, Metric.L2)
    check(index, dataset)


def test_close_and_search_again(index: ColumnIndex, path: str) -> None:
    dataset = create(path, rows(0, 30))
    check(index, dataset)
    index.close()
    assert (index.info()["rows"], index.info()["bytes"], index.info()["version"]) == (0, 0, None)
    check(index, dataset)


# ------------------------------------------------------------------------ threads


def test_threads_search_while_another_writes(index: ColumnIndex, path: str) -> None:
    """Each result is that of the version that was asked for, whatever the writer does."""
    create(path, rows(0, 200))
    stop, failures, searches = threading.Event(), [], [0]
    reads: list[int] = []

    def search() -> None:
        try:
            while not stop.is_set():
                dataset = lance.dataset(path)
                check(index, dataset, k=15)
                check(index, dataset, Metric.COSINE, k=5, where="id % 2 = 0")
                reads.append(dataset.version)
                searches[0] += 1
        except BaseException as error:  # the main thread raises it
            failures.append(error)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for step in range(12):
        before, dataset, vectors, ids = appended(path, rows(200 + 10 * step, 210 + 10 * step))
        index.append(before, dataset, vectors.to(index.device), ids)
        if step % 4 == 3:
            dataset.delete(f"id = {step}")
        time.sleep(0.02)
    deadline = time.monotonic() + 20
    while searches[0] < 12 and not failures and time.monotonic() < deadline:
        time.sleep(0.01)
    stop.set()
    for thread in threads:
        thread.join(30)
    assert not failures, failures[0]
    assert searches[0] >= 12
    assert len(set(reads)) > 1
    check(index, lance.dataset(path), k=400)
