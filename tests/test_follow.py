"""How a column's rows follow the table where something is missing: memory, room, all rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
import torch

from gpu_lance.index import ColumnIndex
from gpu_lance.index import follow as follow_module
from gpu_lance.index.budget import Budget
from gpu_lance.index.store import ResidentStore
from gpu_lance.index.sync import Mark
from gpu_lance.types import Metric

CPU = torch.device("cpu")
QUERY = torch.ones(1, 2)


def table(vectors: Any, type_: pa.DataType | None = None, start: int = 0) -> pa.Table:
    values = np.asarray(vectors, np.float64)
    flat = pa.array(values.ravel()).cast(type_ or pa.float32())
    return pa.table(
        {
            "id": pa.array(range(start, start + len(values)), pa.int64()),
            "vector": pa.FixedSizeListArray.from_arrays(flat, values.shape[1]),
        }
    )


def write(path: Path, data: pa.Table, mode: str = "create") -> lance.LanceDataset:
    return lance.write_dataset(data, str(path / "t.lance"), mode=mode, enable_stable_row_ids=True)


def found(index: ColumnIndex, dataset: lance.LanceDataset, k: int, **more: Any) -> list[int]:
    return index.search(dataset, QUERY, k, Metric.L2, **more).row_ids[0].tolist()


def test_a_zero_vector_and_then_no_row_at_all(tmp_path: Path) -> None:
    dataset = write(tmp_path, table([[0, 0], [1, 1]]))
    with ColumnIndex("vector", 2, CPU) as index:
        for expected in ([1, -1], [-1, -1]):
            ids = index.search(dataset, QUERY, 2, Metric.COSINE).row_ids
            assert ids.tolist() == [expected]
            dataset.delete("true")


@pytest.mark.parametrize("k", [2, 400])
def test_no_row_is_within_the_bounds_and_the_first_one_is_gone(k: int, tmp_path: Path) -> None:
    """Candidates of a float64 column are looked up in Lance: only rows that there are."""
    rows = np.random.default_rng(0).standard_normal((300, 2))
    dataset = write(tmp_path, table(rows, pa.float64()))
    with ColumnIndex("vector", 2, CPU) as index:
        found(index, dataset, k)
        dataset.delete("id = 0")
        assert found(index, dataset, k, lower=1e6) == [-1] * k


def test_no_memory_at_first_and_then_float16_cannot_hold_a_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.random.default_rng(0).standard_normal((500, 2))
    rows[7] = 1e6
    dataset = write(tmp_path, table(rows))
    read, failed = follow_module.read_blocks, []

    def first_fails(*args: Any, **which: Any) -> Any:
        if not failed:
            failed.append(True)
            raise MemoryError("no room")
        return read(*args, **which)

    monkeypatch.setattr(follow_module, "read_blocks", first_fails)
    with (
        ColumnIndex("vector", 2, CPU, Budget(CPU)) as free,
        ColumnIndex("vector", 2, CPU, Budget(CPU, 14_000)) as index,
    ):
        got = found(index, dataset, 500)
        assert failed
        assert index.info()["step"] == "lance"
        assert got == found(free, dataset, 500)


def test_what_filters_leave_with_old_versions_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow_module, "KEPT_BYTES", 40_000)
    dataset = write(tmp_path, table(np.eye(2)[np.arange(1000) % 2]))
    with ColumnIndex("vector", 2, CPU) as index:
        for turn in range(12):
            found(index, dataset, 3, where="id < 9")
            more = table([[0.5, turn]], start=1000 + turn)
            dataset = write(tmp_path, more, "append")
        kept = index._follower._kept
        assert 1 < len(kept) < 8
        assert sum(snapshot.own_nbytes for snapshot in kept.values()) < 40_000 + 9_000


def test_a_column_that_is_followed_is_not_the_least_recently_used(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    datasets = [write(path, table(np.ones((500, 2)))) for path in paths]
    budget = Budget(CPU, 36_000)  # two columns of 15 kB
    first, second, third = (ColumnIndex("vector", 2, CPU, budget) for _ in paths)
    for index, dataset in zip((first, second), datasets, strict=False):
        found(index, dataset, 1)
    datasets[0].delete("id = 3")  # takes no memory
    found(first, datasets[0], 1)
    found(third, datasets[2], 1)
    assert [index.info()["rows"] for index in (first, second, third)] == [499, 0, 500]


def test_rows_stay_where_they_are_if_there_is_no_memory_to_move_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(store: ResidentStore, rows: int) -> torch.Tensor:
        raise MemoryError("no room")

    dataset = write(tmp_path, table(np.arange(1000.0).reshape(500, 2)))
    budget = Budget(CPU)
    with ColumnIndex("vector", 2, CPU, budget) as index:
        found(index, dataset, 1)
        held = budget.held
        monkeypatch.setattr(ResidentStore, "_matrix", no_memory)
        dataset.delete("id % 2 = 0")
        assert found(index, dataset, 2) == [1, 3]
        assert budget.held == held
        monkeypatch.undo()
        dataset.delete("id = 1")
        assert found(index, dataset, 2) == [3, 5]
        assert budget.held < held / 2
    assert budget.held == 0


def test_what_is_only_handy_evicts_nobody_and_chunks_stay_few(tmp_path: Path) -> None:
    """A column that has more than half of the budget, to which rows are added one by one."""
    budget = Budget(CPU, 50_000)
    small = ColumnIndex("vector", 2, CPU, budget)
    (tmp_path / "small").mkdir()
    other = write(tmp_path / "small", table(np.ones((100, 2))))
    found(small, other, 1)
    dataset = write(tmp_path, table(np.ones((1000, 2))))
    with ColumnIndex("vector", 2, CPU, budget) as index:
        found(index, dataset, 1)
        for turn in range(20):
            dataset = write(tmp_path, table([[turn, 1]], start=1000 + turn), "append")
            found(index, dataset, 1)
            assert index.info()["refresh"]["kind"] == "delta"
        assert len(index._follower.at(dataset, Mark.of(dataset, "vector")).chunks) == 2
        dataset.delete("id % 10 != 0")  # moving the others together takes room for a moment
        found(index, dataset, 1)
        assert index.info()["rows"] == 102
        assert small.info()["rows"] == 100
    small.close()


def test_rows_that_find_no_room_are_the_reason_of_a_rebuild(tmp_path: Path) -> None:
    dataset = write(tmp_path, table(np.ones((100, 2))))
    with ColumnIndex("vector", 2, CPU, Budget(CPU, 4000)) as index:
        found(index, dataset, 1)
        dataset = write(tmp_path, table(np.ones((200, 2)), start=100), "append")
        assert found(index, dataset, 300) == list(range(300))
        assert index.info()["refresh"]["reason"] == "There is no room for 200 more rows."
