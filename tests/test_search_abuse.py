"""Searches by careless and hostile callers end in the right answer or in one clear exception."""

from __future__ import annotations

import math
import shutil
import threading
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
import torch

from gpu_lance.db import connect
from gpu_lance.errors import GpuLanceError, QueryError, SchemaError, StorageError
from gpu_lance.table import Table

ROWS, NDIMS = 300, 8


def vectors(rows: int = ROWS, ndims: int = NDIMS, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, ndims)).astype(np.float32)


def as_table(values: np.ndarray) -> pa.Table:
    vector = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    return pa.table({"n": np.arange(len(values)), "vector": vector})


@pytest.fixture
def table() -> Table:
    return connect("memory://", device="cpu").create_table("t", as_table(vectors()))


@pytest.mark.parametrize(
    "query",
    [
        torch.eye(NDIMS).to_sparse(),
        torch.ones(NDIMS).to_sparse(),
        torch.empty(NDIMS, device="meta"),
    ],
    ids=["sparse", "sparse vector", "meta"],
)
def test_tensors_without_plain_values(table: Table, query: Any) -> None:
    with pytest.raises(QueryError, match=r"dense tensor|plain numbers"):
        table.search(query).to_list()


def test_bounds_beyond_float32(table: Table) -> None:
    def found(lower: Any, upper: Any) -> int:
        return len(table.search(vectors()[0]).limit(ROWS).distance_range(lower, upper).to_list())

    most = float(np.finfo(np.float32).max)
    for huge in (1e300, 10**400, math.inf, most * (1 + 1e-6)):
        assert found(None, huge) == ROWS
        assert found(huge, None) == 0
        assert found(-huge, huge) == ROWS
        assert found(None, -huge) == 0
    assert found(-most, most) == ROWS


def test_many_equal_rows_and_many_queries() -> None:
    values = np.repeat(vectors(2), 2000, axis=0)
    table = connect("memory://", device="cpu").create_table("t", as_table(values))
    queries = vectors(40, seed=1)
    for metric in ("l2", "cosine", "dot"):
        found = table.search(queries).metric(metric).limit(7).to_arrow()["n"].to_numpy()
        for query, rows in zip(queries, found.reshape(40, 7), strict=True):
            distance = {
                "l2": ((values[[0, 2000]] - query) ** 2).sum(axis=1),
                "cosine": -(values[[0, 2000]] @ query) / np.linalg.norm(values[[0, 2000]], axis=1),
                "dot": -(values[[0, 2000]] @ query),
            }[metric]
            first = 2000 * int(distance[1] < distance[0])
            assert rows.tolist() == list(range(first, first + 7))


@pytest.mark.parametrize(
    "column",
    [pa.array([["a"] * 2] * 3, pa.list_(pa.utf8(), 2)), pa.array([[]] * 3, pa.list_(pa.int8(), 0))],
    ids=["texts", "nothing"],
)
def test_types_that_lance_cannot_store(column: pa.Array) -> None:
    db = connect("memory://", device="cpu")
    with pytest.raises(SchemaError, match="cannot store these types"):
        db.create_table("t", pa.table({"n": [1, 2, 3], "other": column}))
    assert db.table_names() == []


@pytest.mark.parametrize("budget", [None, 20_000, 1000])
def test_a_file_that_is_damaged_between_searches(tmp_path: Path, budget: int | None) -> None:
    values = vectors(900)
    connect(tmp_path, device="cpu").create_table("t", as_table(values))
    table = connect(tmp_path, device="cpu", memory_budget=budget).open_table("t")
    expected = table.search(values[5]).limit(3).select(["n"]).to_list()
    assert expected[0]["n"] == 5
    (file,) = (tmp_path / "t.lance" / "data").glob("*.lance")
    whole = file.read_bytes()
    for damaged in (b"\xa5" * 20_000 + whole[20_000:], whole[: len(whole) // 2], b""):
        file.write_bytes(damaged)
        table.close()
        for search in (table.search(values[5]), table.search(values[5]).where("n > 3")):
            with pytest.raises((StorageError, QueryError), match=r"cannot be read|is damaged"):
                search.limit(3).select(["n"]).to_list()
    file.write_bytes(whole)
    again = connect(tmp_path, device="cpu", memory_budget=budget).open_table("t")
    assert again.search(values[5]).limit(3).select(["n"]).to_list() == expected


def test_tables_that_come_and_go_under_searches(tmp_path: Path) -> None:
    db = connect(tmp_path, device="cpu", memory_budget="30 kB")
    old, new = vectors(200, seed=1), vectors(300, seed=2)
    query = old[7]
    answers = [
        np.argsort(((values - query) ** 2).sum(axis=1), kind="stable")[:3].tolist()
        for values in (old, new)
    ]
    table, stop, wrong = db.create_table("t", as_table(old)), threading.Event(), []
    seen: set[int] = set()

    def search() -> None:
        while not stop.is_set():
            try:
                table.list_versions()
                found = table.search(query).limit(3).to_arrow()["n"].to_pylist()
                seen.add(answers.index(found))
            except GpuLanceError:  # it is gone, or its files go this moment
                pass
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for values in [new, old] * 15:
        shutil.rmtree(tmp_path / "t.lance", ignore_errors=True)
        lance.write_dataset(as_table(values), tmp_path / "t.lance", enable_stable_row_ids=True)
        assert len(table) == len(values)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert seen
    assert table.search(query).limit(3).to_arrow()["n"].to_pylist() == answers[0]


@pytest.mark.parametrize("budget", [None, 1000])
def test_results_beyond_the_memory(budget: int | None) -> None:
    db = connect("memory://", device="cpu", memory_budget=budget)
    table = db.create_table("t", as_table(vectors(4000, 2)))
    queries = vectors(60_000, 2, seed=1)
    enormous = np.broadcast_to(queries[:1], (10_000_000, 2))
    with pytest.raises(QueryError, match=r"Up to 4000 rows for each of 10000000 queries take .*"):
        table.search(enormous).limit(10**9).select(["n"]).to_arrow()
    few = table.search(queries).where("n < 2").limit(10**9).select(["n"]).to_arrow()
    assert few["n"].to_numpy().reshape(-1, 2).sum(axis=1).tolist() == [1] * len(queries)
    none = table.search(queries).where("n < 0").limit(10**9).select(["n"]).to_arrow()
    assert none.num_rows == 0
