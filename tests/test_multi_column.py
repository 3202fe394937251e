"""MultiColumnIndex against numpy over what Lance says the table holds, and against LanceDB."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lance
import lancedb
import numpy as np
import pyarrow as pa
import pytest
import torch
from index_changes import changes, merged
from multi_model import METRICS, distance, nearest, ragged, some_documents

from gpu_lance.errors import BadVectorError, IndexBackendError, QueryError, SchemaError
from gpu_lance.index import MultiColumnIndex
from gpu_lance.index import multi_follow as follow_module
from gpu_lance.index import multi_read as read_module
from gpu_lance.index.budget import Budget
from gpu_lance.index.multi_read import expected_vectors, read_documents
from gpu_lance.index.multi_store import MultiStore
from gpu_lance.index.resident import ResidentIndexes
from gpu_lance.types import Metric

D = 6
CPU = torch.device("cpu")
RNG = np.random.default_rng(99)
QUERIES = [RNG.standard_normal((c, D)).astype(np.float32) for c in (3, 1, 5)]
VECTORS, OFFSETS = ragged(QUERIES, D, np.float32)
TYPES = {np.float16: pa.float16(), np.float32: pa.float32(), np.float64: pa.float64()}


@pytest.fixture
def index() -> Iterator[MultiColumnIndex]:
    with MultiColumnIndex("vectors", D, CPU) as made:
        yield made


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "t.lance")


def column(documents: list[np.ndarray | None], dtype: Any = np.float32, ndims: int = D) -> pa.Array:
    there = [np.zeros((0, ndims)) if d is None else d for d in documents]
    flat, offsets = ragged(there, ndims, dtype)
    bounds = [None if d is None else int(o) for d, o in zip(documents, offsets, strict=False)]
    inner = pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), ndims)
    return pa.ListArray.from_arrays(pa.array([*bounds, int(offsets[-1])], pa.int32()), inner)


def rows(start: int, stop: int, *, seed: int | None = None, dtype: Any = np.float32) -> pa.Table:
    n, rng = stop - start, np.random.default_rng(start if seed is None else seed)
    return pa.table(
        {
            "id": pa.array(range(start, stop), pa.int64()),
            "word": pa.array([f"w{i % 10}" for i in range(start, stop)]),
            "vectors": column(some_documents(rng, n, D, dtype), dtype),
        }
    )


def create(path: str, data: pa.Table, *, stable: bool = True, **more: Any) -> lance.LanceDataset:
    return lance.write_dataset(data, path, enable_stable_row_ids=stable, **more)


def stored(
    dataset: lance.LanceDataset, where: str | None = None
) -> tuple[list[np.ndarray | None], list[int]]:
    """Documents and row ids, by way of Python's objects."""
    table = dataset.scanner(columns=["vectors"], filter=where, with_row_id=True).to_table()
    dtype = table.schema.field("vectors").type.value_type.value_type.to_pandas_dtype()
    found = [
        None if d is None else np.array(d, dtype).reshape(len(d), D)
        for d in table["vectors"].to_pylist()
    ]
    return found, table["_rowid"].to_pylist()


def check(
    index: MultiColumnIndex,
    dataset: lance.LanceDataset,
    metric: str = "l2",
    k: int = 10,
    where: str | None = None,
    **more: Any,
) -> None:
    """Assert that a search gives what numpy finds in the dataset's version, to the last bit."""
    got = index.search(
        dataset, torch.from_numpy(VECTORS), OFFSETS, k, Metric(metric), where=where, **more
    )
    documents, row_ids = stored(dataset, where)
    for i, query in enumerate(QUERIES):
        ids, distances = nearest(metric, query, documents, row_ids, k, **more)
        missing = k - len(ids)
        assert got.row_ids[i].tolist() == [*ids, *[-1] * missing]
        assert got.distances[i].tolist() == [*distances, *[np.inf] * missing]


def kind(index: MultiColumnIndex) -> str:
    return str(index.info()["refresh"]["kind"])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("metric", METRICS)
def test_loads_and_searches(metric: str, dtype: Any, index: MultiColumnIndex, path: str) -> None:
    dataset = create(path, rows(0, 120, dtype=dtype), max_rows_per_file=50)
    for k in (1, 10, 130):
        check(index, dataset, metric, k)
    check(index, dataset, metric, where="id % 3 = 0", lower=0.5)
    check(index, dataset, metric, where="id < 7", upper=9.5)
    info = index.info()
    findable = [d for d in stored(dataset)[0] if not np.isnan(distance("l2", QUERIES[0], d))]
    assert info["rows"] == len(findable)
    assert info["vectors"] == sum(map(len, findable))
    assert info["step"] == ("float16" if dtype is np.float16 else "float32")
    assert kind(index) == "rebuild"
    assert index.search(
        dataset, torch.from_numpy(VECTORS), OFFSETS, 500, Metric(metric), pad=False
    ).row_ids.shape == (3, info["rows"])  # fmt: skip


def test_empty_tables_and_tables_of_nothing(index: MultiColumnIndex, path: str) -> None:
    dataset = create(path, rows(0, 3).slice(0, 0))
    check(index, dataset)
    nothing = rows(0, 3).set_column(2, "vectors", column([None, np.zeros((0, D)), None]))
    dataset = lance.write_dataset(nothing, path, mode="append")
    check(index, dataset)
    check(index, lance.write_dataset(rows(4, 40), path, mode="append"), where="id > 5")
    assert kind(index) == "delta"


CHANGES = changes(rows, "vectors")


@pytest.mark.parametrize("name", CHANGES)
def test_follows_every_change(name: str, index: MultiColumnIndex, path: str) -> None:
    create(path, rows(0, 120))
    dataset = lance.write_dataset(rows(120, 200), path, mode="append")
    check(index, dataset)
    wanted, change = CHANGES[name]
    change(lance.dataset(path), path)  # by another handle
    dataset = lance.dataset(path)
    check(index, dataset, "cosine", 25)
    assert kind(index) == wanted
    assert index.info()["version"] == dataset.version


def test_old_versions_and_unstable_row_ids(index: MultiColumnIndex, path: str) -> None:
    create(path, rows(0, 50))
    lance.dataset(path).delete("id < 10")
    lance.write_dataset(rows(50, 80), path, mode="append")
    for version in (3, 1, 2, 3, 1):
        check(index, lance.dataset(path, version=version), k=60)
    other = create(path + "2", rows(0, 60), stable=False, max_rows_per_file=20)
    with MultiColumnIndex("vectors", D, CPU) as second:
        check(second, other)
        other.delete("id < 20")
        other.optimize.compact_files()
        check(second, lance.dataset(path + "2"), k=60)
        assert kind(second) == "rebuild"


def test_many_changes_sweep_the_dead_out(index: MultiColumnIndex, path: str) -> None:
    dataset = create(path, rows(0, 300))
    check(index, dataset)
    for step in range(4):
        merged(lance.dataset(path), rows(80 * step, 80 * step + 80, seed=70 + step))
        dataset = lance.dataset(path)
        check(index, dataset, k=20)
    store = index._follower.store
    assert isinstance(store, MultiStore)
    assert not store.wants_sweep
    snapshot = store.publish()
    assert sum(snapshot.used) < 1.25 * snapshot.num_vectors


# -------------------------------------------------------------------- appending


def committed(path: str, data: pa.Table, mode: str) -> tuple[Any, ...]:
    """Commit rows, and what `append` takes."""
    dataset = create(path, data, mode=mode)
    new = dataset.scanner(
        columns=["vectors"],
        filter=f"_row_created_at_version > {dataset.version - 1}",
        with_row_id=True,
    ).to_table()
    documents = [
        None if d is None else np.array(d).reshape(-1, D) for d in new["vectors"].to_pylist()
    ]
    there = [np.zeros((0, D)) if d is None else d for d in documents]
    vectors, offsets = ragged(there, D, np.float32)
    valid = np.array([d is not None for d in documents])
    ids = new["_rowid"].to_numpy().astype(np.int64)
    return dataset.version - 1, dataset, torch.from_numpy(vectors), offsets, ids, valid


def test_append_takes_the_tensors(
    index: MultiColumnIndex, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*arguments: Any, **more: Any) -> Any:
        raise AssertionError("the vectors were read from Lance")

    monkeypatch.setattr(follow_module, "read_documents", read)
    for start, mode in ((0, "create"), (40, "append"), (90, "append"), (10, "overwrite")):
        given = committed(path, rows(start, start + 40), mode)
        index.append(*given)
        assert kind(index) == "append"
        for metric in METRICS:
            check(index, given[1], metric)
    before, dataset, vectors, offsets, ids, _ = committed(path, rows(300, 310), "append")
    with pytest.raises(BadVectorError, match="ascending offsets"):
        index.append(before, dataset, vectors, offsets[:-1], ids)


def test_append_that_does_not_follow_is_left_to_the_next_search(
    index: MultiColumnIndex, path: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    check(index, create(path, rows(0, 40)))
    lance.dataset(path).delete("id < 5")
    given = committed(path, rows(60, 80), "append")
    index.append(*given)
    assert index.info()["version"] == 1
    check(index, given[1], k=80)
    with monkeypatch.context() as patch:

        def full(*arguments: Any) -> None:
            raise RuntimeError("CUDA error: out of memory")

        patch.setattr(MultiStore, "add", full)
        given = committed(path, rows(80, 90), "append")
        index.append(*given)
        assert "dropped after an add" in caplog.text
        with pytest.raises(IndexBackendError, match="does not fit"):
            check(index, given[1])
    check(index, given[1], k=80)


# ----------------------------------------------------------------------- memory


def answers(dataset: lance.LanceDataset, budget: Budget) -> tuple[list[Any], dict[str, Any]]:
    found = []
    with MultiColumnIndex("vectors", D, CPU, budget) as index:
        for metric in METRICS:
            for more in ({}, {"where": "id % 2 = 0"}, {"lower": 2.0, "upper": 30.0}):
                got = index.search(
                    dataset, torch.from_numpy(VECTORS), OFFSETS, 12, Metric(metric), **more
                )
                found.append((got.row_ids.tolist(), got.distances.tolist()))
        info = {**index.info(), "held": budget.held}
    assert budget.held == 0
    return found, info


@pytest.mark.parametrize("dtype", TYPES)
def test_the_same_answer_however_it_is_held(dtype: Any, path: str) -> None:
    dataset = create(path, rows(0, 400, dtype=dtype))
    check_with = MultiColumnIndex("vectors", D, CPU)
    check(check_with, dataset, "cosine")
    check_with.close()
    right, info = answers(dataset, Budget(CPU))
    whole = info["held"]
    steps = [info["step"]]
    for limit in (whole * 7 // 8, whole // 10, 0):
        found, info = answers(dataset, Budget(CPU, limit))
        assert found == right
        steps.append(info["step"])
    first = "float16" if dtype is np.float16 else "float32"
    narrower = "lance" if dtype is np.float16 else "float16"
    assert steps == [first, narrower, "lance", "lance"]


def test_more_vectors_than_the_bytes_on_disk_let_guess(path: str) -> None:
    """The deleted documents are the short ones, which the bytes on disk do not tell."""
    long = RNG.standard_normal((60, 500, D)).astype(np.float32)
    documents = [*np.ones((2000, 1, D), np.float32), *long]
    dataset = create(path, rows(0, 2060).set_column(2, "vectors", column(documents)))
    dataset.delete("id < 2000")
    assert expected_vectors(dataset, "vectors", D) < 1500
    query = torch.from_numpy(long[7, :2].copy()), np.array([0, 2]), 3, Metric.L2
    found = []
    for limit in (None, 1_600_000, 1_300_000, 100_000):
        with MultiColumnIndex("vectors", D, CPU, Budget(CPU, limit)) as index:
            got = index.search(dataset, *query)
            info = index.info()
            found.append((got.row_ids.tolist(), got.distances.tolist(), info["step"]))
            assert info["vectors"] == (30_000 if info["step"] != "lance" else 0)
    assert [each[:2] for each in found] == [found[0][:2]] * 4
    assert [each[2] for each in found] == ["float32", "float32", "float16", "lance"]


def test_values_that_float16_does_not_hold(path: str) -> None:
    documents = [np.full((2, D), 1e6), *some_documents(np.random.default_rng(3), 200, D)]
    dataset = create(path, rows(0, 201).set_column(2, "vectors", column(documents)))
    right, info = answers(dataset, Budget(CPU))
    found, info = answers(dataset, Budget(CPU, info["held"] * 7 // 8))
    assert found == right
    assert info["step"] == "lance"
    assert "float16 cannot hold" in info["plan"]


def test_rows_without_room_are_the_reason_of_a_rebuild(path: str) -> None:
    dataset = create(path, rows(0, 100))
    whole = answers(dataset, Budget(CPU))[1]["held"]
    with MultiColumnIndex("vectors", D, CPU, Budget(CPU, int(whole * 1.2))) as index:
        check(index, dataset)
        dataset = lance.write_dataset(rows(100, 250), path, mode="append")
        check(index, dataset)
        assert kind(index) in ("rebuild", "streamed")
        assert "no room" in index.info()["refresh"]["reason"]


# ---------------------------------------------------------------------- reading


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("remote", [False, True])
def test_reads_what_lance_holds(
    remote: bool, dtype: Any, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_module, "is_remote", lambda uri: remote)
    broken = pa.array(
        [[[1.0] * D, None], [[1.0] * (D - 1) + [None]], [[2.0] * D], None, []],
        pa.list_(pa.list_(pa.float64(), D)),
    ).cast(pa.list_(pa.list_(TYPES[dtype], D)))
    data = rows(500, 505, dtype=dtype).set_column(2, "vectors", broken)
    dataset = create(path, rows(0, 90, dtype=dtype), max_rows_per_file=40)
    dataset.delete("id = 4")
    dataset = lance.write_dataset(data, path, mode="append")

    def read(**which: Any) -> dict[int, Any]:
        found = {}
        for block in read_documents(dataset, "vectors", D, **which):
            assert block.vectors.dtype == dtype
            for i, row_id in enumerate(block.row_ids.tolist()):
                valid = block.valid is None or block.valid[i]
                part = block.vectors[block.offsets[i] : block.offsets[i + 1]]
                assert row_id not in found
                found[row_id] = part.astype(np.float64).tolist() if valid else None
        return found

    table = dataset.scanner(columns=["id", "vectors"], with_row_id=True).to_table().to_pylist()
    want = {
        row["_rowid"]: row["vectors"]
        if row["vectors"] is not None and all(v and None not in v for v in row["vectors"])
        else None
        for row in table
    }
    ids = {row["id"]: row["_rowid"] for row in table}
    np.testing.assert_equal(read(), want)
    some = [ids[i] for i in (70, 3, 501, 3)]
    most = [row_id for row_id in want if row_id % 10]  # picked out of a scan
    for chosen in (some, most):
        few = read(row_ids=np.array([*chosen, 10_000]))
        np.testing.assert_equal(few, {row_id: want[row_id] for row_id in chosen})
    np.testing.assert_equal(read(since=2), {ids[i]: want[ids[i]] for i in range(500, 505)})
    assert read(where="id < 3").keys() == {ids[i] for i in range(3)}
    with pytest.raises(QueryError, match="nope"):
        read(where="nope = 1")
    with pytest.raises(QueryError, match="Give one of"):
        read(where="id < 3", row_ids=np.array(some))
    with MultiColumnIndex("vectors", D, CPU) as index:
        got = index.search(
            dataset, torch.ones(1, D), np.array([0, 1]), 99, Metric.L2, where="id >= 500"
        )
    assert got.counts.tolist() == [1]


def test_bad_requests(path: str) -> None:
    dataset = create(path, rows(0, 10))
    one, ends = torch.zeros(1, D), np.array([0, 1])
    with pytest.raises(SchemaError, match="no column 'nope'"):
        MultiColumnIndex("nope", D, CPU).search(dataset, one, ends, 1, Metric.L2)
    with pytest.raises(SchemaError, match="fixed-size lists of 7"):
        MultiColumnIndex("vectors", 7, CPU).search(dataset, torch.zeros(1, 7), ends, 1, Metric.L2)
    with pytest.raises(SchemaError, match="int64"):
        MultiColumnIndex("id", D, CPU).search(dataset, one, ends, 1, Metric.L2)
    with MultiColumnIndex("vectors", D, CPU) as index:
        with pytest.raises(QueryError, match="6 values"):
            index.search(dataset, torch.zeros(1, 5), ends, 1, Metric.L2)
        with pytest.raises(QueryError, match="nope"):
            index.search(dataset, one, ends, 1, Metric.L2, where="nope = 1")
        with pytest.raises(BadVectorError, match="NaN"):
            index.search(dataset, one * float("nan"), ends, 1, Metric.L2)


def test_resident_indexes_know_both_kinds() -> None:
    indexes = ResidentIndexes("cpu")
    many = indexes.of_multi("v", 3)
    assert indexes.of_multi("v", 3) is many
    assert isinstance(many, MultiColumnIndex)
    one = indexes.of("v", 3)  # the column was replaced
    assert one is indexes.of("v", 3)
    assert indexes.of_multi("v", 4) is not many
    indexes.close()


# ------------------------------------------------------------------- all at once


def test_threads_search_while_rows_change(index: MultiColumnIndex, path: str) -> None:
    create(path, rows(0, 100))
    stop = threading.Event()
    failures: list[BaseException] = []

    def search(metric: str) -> None:
        try:
            while not stop.is_set():
                dataset = lance.dataset(path)
                check(index, dataset, metric, k=8)
                check(index, dataset, metric, k=5, where="id % 2 = 0")
                assert index.info()["vectors"] >= 0
        except BaseException as error:  # the main thread raises it
            failures.append(error)

    threads = [threading.Thread(target=search, args=(metric,)) for metric in METRICS]
    for thread in threads:
        thread.start()
    try:
        for step in range(6):
            index.append(*committed(path, rows(200 + 20 * step, 220 + 20 * step), "append"))
            merged(lance.dataset(path), rows(10 * step, 10 * step + 10, seed=step + 40))
            lance.dataset(path).delete(f"id = {step}")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    for failure in failures:
        raise failure
    check(index, lance.dataset(path))


@pytest.mark.parametrize("metric", METRICS)
def test_distances_are_those_of_lancedb(metric: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(12)
    documents = [rng.standard_normal((int(rng.integers(1, 20)), D)) for _ in range(300)]
    data = pa.table({"id": range(300), "vectors": column(documents)})
    theirs = lancedb.connect(tmp_path).create_table("t", data)
    dataset = lance.dataset(str(tmp_path / "t.lance"))
    with MultiColumnIndex("vectors", D, CPU) as index:
        got = index.search(dataset, torch.from_numpy(VECTORS), OFFSETS, 20, Metric(metric))
    for i, query in enumerate(QUERIES):
        search = theirs.search(query, vector_column_name="vectors").distance_type(metric)
        found = search.limit(20).with_row_id(True).to_arrow()
        assert found["_rowid"].to_pylist() == got.row_ids[i].tolist()
        np.testing.assert_allclose(found["_distance"], got.distances[i], rtol=1e-5, atol=1e-5)
