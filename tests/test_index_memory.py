"""Columns under a memory budget: the same answers at every step of the ladder, and making room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
import torch

from gpu_lance.index import ColumnIndex
from gpu_lance.index.budget import Budget
from gpu_lance.index.plan import column_bytes
from gpu_lance.types import Metric

D = 6
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
QUERIES = np.random.default_rng(99).standard_normal((4, D)).astype(np.float32)


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")


def rows(start: int, stop: int, type_: pa.DataType) -> pa.Table:
    values = np.random.default_rng(start).standard_normal((stop - start, D)).astype(np.float32)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), D)
    nulls = pa.array([i == 2 for i in range(start, stop)])
    column = pa.FixedSizeListArray.from_arrays(vectors.values.cast(type_), D, mask=nulls)
    return pa.table({"id": pa.array(range(start, stop), pa.int64()), "vector": column})


def bytes_of(device: torch.device, columns: float) -> int:
    """A budget for so many columns of 500 rows as float32; as float16 one takes 0.57 to 0.74."""
    return int(columns * column_bytes(500, D, np.dtype(np.float32), device))


def last_step(device: torch.device) -> str:
    """How a column is held for which the device has no room."""
    return "host" if device.type == "cuda" else "lance"


def search(
    index: ColumnIndex,
    dataset: lance.LanceDataset,
    k: int = 10,
    metric: Metric = Metric.L2,
    **more: Any,
) -> tuple[list[list[int]], list[list[float]]]:
    found = index.search(dataset, torch.from_numpy(QUERIES).to(index.device), k, metric, **more)
    return found.row_ids.tolist(), found.distances.tolist()


@pytest.mark.parametrize("type_", [pa.float16(), pa.float32(), pa.float64()])
@pytest.mark.parametrize("share", [0.87, 0.52, 0.005])
def test_the_answer_is_that_of_a_column_held_as_stored(
    share: float, type_: pa.DataType, device: torch.device, tmp_path: Path
) -> None:
    limit = bytes_of(device, share)
    path = str(tmp_path / "t.lance")
    dataset = lance.write_dataset(rows(0, 500, type_), path, enable_stable_row_ids=True)
    steps = set()
    free = ColumnIndex("vector", D, device, Budget(device))
    with free, ColumnIndex("vector", D, device, Budget(device, limit)) as index:
        for turn in range(3):
            for metric in Metric:
                for k in (10, 600):
                    assert search(index, dataset, k, metric) == search(free, dataset, k, metric)
                more: dict[str, Any] = {"where": "id % 3 = 0", "lower": 0.5, "upper": 3.0}
                assert search(index, dataset, 9, metric, **more) == search(
                    free, dataset, 9, metric, **more
                )
            steps.add(index.info()["step"])
            dataset.delete(f"id % 50 = {turn}")
            dataset.update({"vector": "[1, 2, 3, 4, 5, 6]"}, where="id % 40 = 3")
            table = rows(500 + 20 * turn, 520 + 20 * turn, type_)
            dataset = lance.write_dataset(table, path, mode="append")
        assert free.info()["step"] == ("float16" if type_ == pa.float16() else "float32")
    assert steps == {"float16" if share == 0.87 else last_step(device)}


@pytest.mark.parametrize("row", [[1e6, 0, 0, 0, 0, 0], [1e-12, 0, 0, 0, 0, 0]])
def test_what_float16_cannot_hold_is_searched_from_lance(
    row: list[float], device: torch.device, tmp_path: Path
) -> None:
    path = str(tmp_path / "t.lance")
    lance.write_dataset(rows(0, 500, pa.float32()), path, enable_stable_row_ids=True)
    more = pa.table({"id": pa.array([900]), "vector": pa.array([row], pa.list_(pa.float32(), D))})
    before, dataset = lance.dataset(path), lance.write_dataset(more, path, mode="append")
    free = ColumnIndex("vector", D, device, Budget(device))
    with free, ColumnIndex("vector", D, device, Budget(device, bytes_of(device, 0.87))) as index:
        assert search(index, before) == search(free, before)
        assert index.info()["step"] == "float16"
        for metric in Metric:
            assert search(index, dataset, 600, metric) == search(free, dataset, 600, metric)
        assert index.info()["step"] == last_step(device)
        assert "float16 cannot hold its values" in index.info()["plan"]


def test_columns_make_room_for_each_other(device: torch.device, tmp_path: Path) -> None:
    budget = Budget(device, bytes_of(device, 2.6))
    made = [
        (
            ColumnIndex("vector", D, device, budget),
            lance.write_dataset(rows(0, 500, pa.float32()), str(tmp_path / name)),
        )
        for name in ("a.lance", "b.lance", "c.lance")
    ]
    answers = []
    for index, dataset in (*made, *made):
        answers.append(search(index, dataset))
        assert index.info()["step"] == "float32"
        assert 0 < budget.held <= bytes_of(device, 2.6)
    assert all(answer == answers[0] for answer in answers)
    assert [index.info()["rows"] for index, _ in made] == [0, 499, 499]
    for index, _ in made:
        index.close()
    assert budget.held == 0


def test_a_table_of_ten_times_the_budget(tmp_path: Path) -> None:
    """Through the public names, beside the same table without a budget."""
    import gpu_lance

    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((20_000, 32)).astype(np.float32)
    data = pa.table(
        {
            "id": pa.array(range(20_000)),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 32),
        }
    )
    queries = rng.standard_normal((3, 32)).astype(np.float32)
    path = str(tmp_path)
    with gpu_lance.connect(path) as plain, gpu_lance.connect(path, memory_budget="250 kB") as small:
        one, other = plain.create_table("t", data), small.open_table("t")
        for _ in range(2):
            for metric in ("l2", "cosine", "dot"):
                for where in (None, "id % 7 = 3"):
                    found = [
                        table.search(queries).distance_type(metric).where(where or "true").limit(9)
                        for table in (one, other)
                    ]
                    assert found[0].to_arrow() == found[1].to_arrow()
            assert "searched from Lance" in other.search(queries[0]).explain_plan()
            assert "as float32" in one.search(queries[0]).explain_plan()
            one.add([{"id": 20_000, "vector": queries[0].tolist()}])
