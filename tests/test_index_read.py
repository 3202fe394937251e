"""Blocks of a vector column against what Lance's own tables say."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
import torch

from gpu_lance.errors import QueryError, SchemaError, StorageError
from gpu_lance.index import read
from gpu_lance.index.read import Block, read_blocks

D = 4


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "t.lance")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "BLOCK_BYTES", 7 * D * 4)


def rows(
    ids: Any, kind: pa.DataType | None = None, nulls: bool = False, values: bool = False
) -> pa.Table:
    """Vectors that begin with their id; every 5th null, or the 2nd value of every 3rd."""
    ids = np.arange(*ids) if isinstance(ids, tuple) else np.asarray(ids)
    x = np.random.default_rng(len(ids)).standard_normal((len(ids), D)).astype(np.float16)
    x[:, 0] = ids % 2048  # all that float16 can tell apart
    holes = np.zeros((len(ids), D), bool)
    holes[:, 1] = values & (ids % 3 == 0)
    flat = pa.array(x.ravel().astype(np.float64), mask=holes.ravel()).cast(kind or pa.float32())
    mask = pa.array(nulls & (ids % 5 == 0))
    vectors = pa.FixedSizeListArray.from_arrays(flat, D, mask=mask)
    return pa.table({"id": ids.astype(np.int64), "vector": vectors})


def create(path: str, data: pa.Table, **more: Any) -> lance.LanceDataset:
    return lance.write_dataset(data, path, **{"enable_stable_row_ids": True, **more})


def whole(blocks: Any) -> dict[int, tuple[int, Any]]:
    """By row id: version, and the vector or None. Blocks are not empty and ids come once."""
    found: dict[int, tuple[int, Any]] = {}
    for block in blocks:
        assert isinstance(block, Block)
        n = len(block.row_ids)
        assert n > 0
        assert block.vectors.shape == (n, D)
        assert block.row_ids.dtype == block.updated.dtype == np.int64
        valid = np.ones(n, bool) if block.valid is None else block.valid
        assert valid.dtype == bool
        assert block.valid is None or not block.valid.all()
        for i, row_id in enumerate(block.row_ids.tolist()):
            assert row_id not in found
            vector = block.vectors[i].tolist() if valid[i] else None
            found[row_id] = int(block.updated[i]), vector
    return found


def expected(dataset: lance.LanceDataset, where: str | None = None) -> dict[int, tuple[int, Any]]:
    columns = ["vector"] + ["_row_last_updated_at_version"] * dataset.has_stable_row_ids
    table = dataset.scanner(columns=columns, filter=where, with_row_id=True).to_table()
    versions = table[columns[1]].to_pylist() if len(columns) > 1 else [0] * len(table)
    vectors = [None if v is None or None in v else v for v in table["vector"].to_pylist()]
    return dict(zip(table["_rowid"].to_pylist(), zip(versions, vectors, strict=True), strict=True))


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
@pytest.mark.parametrize(("nulls", "values"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("n", [1, 63, 257])
def test_reads_what_is_stored(
    path: str, small_blocks: None, kind: pa.DataType, nulls: bool, values: bool, n: int
) -> None:
    create(path, rows((0, n), kind, nulls, values), max_rows_per_file=50)
    lance.dataset(path).delete("id % 10 = 3")
    lance.write_dataset(rows((n, n + 20), kind, nulls, values), path, mode="append")
    lance.dataset(path).update({"id": "id"}, where="id % 7 = 1")
    dataset = lance.dataset(path)
    want = expected(dataset)
    assert whole(read_blocks(dataset, "vector", D)) == want
    assert {version for version, _ in want.values()} >= {1, dataset.version}
    for block in read_blocks(dataset, "vector", D):
        assert block.vectors.dtype == kind.to_pandas_dtype()
    newer = {i: row for i, row in want.items() if row[0] > 2}
    assert 0 < len(newer) < len(want)
    assert whole(read_blocks(dataset, "vector", D, since=2)) == newer
    added = whole(read_blocks(dataset, "vector", D, since=2, inserted_only=True))
    assert added == {i: row for i, row in want.items() if i >= n}
    where = "id % 4 = 0 OR id > 100"
    assert whole(read_blocks(dataset, "vector", D, where=where)) == expected(dataset, where)
    assert whole(read_blocks(dataset, "vector", D, where="id < 0")) == {}


@pytest.mark.parametrize("count", [0, 1, 8, 150, 400])
@pytest.mark.parametrize("stable", [True, False])
@pytest.mark.parametrize("run_bytes", [0, 1 << 20])  # looked up, or picked from a scan
def test_reads_by_row_id(
    path: str,
    small_blocks: None,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    stable: bool,
    run_bytes: int,
) -> None:
    monkeypatch.setattr(read, "RUN_BYTES", run_bytes)
    create(
        path, rows((0, 400), nulls=True), max_rows_per_file=150, enable_stable_row_ids=stable
    ).delete("id % 10 = 3")
    dataset = lance.dataset(path)
    want = expected(dataset)
    all_ids = np.array(sorted(want))
    ids = np.random.default_rng(count).permutation(all_ids)[:count]
    chosen = {int(i): want[int(i)] for i in ids}
    assert whole(read_blocks(dataset, "vector", D, row_ids=ids)) == chosen
    if stable:  # deleted, never there, and twice
        odd = np.concatenate([ids, [3, 13, 10**9, -1], ids[:2]])
        assert whole(read_blocks(dataset, "vector", D, row_ids=odd)) == chosen


def test_ids_are_looked_up_or_picked_from_a_scan_by_what_is_faster(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = create(path, rows((0, 20000)))
    taken = []
    honest = lance.LanceDataset._take_rows

    def counted(self: Any, ids: Any, *arguments: Any, **more: Any) -> Any:
        taken.append(len(ids))
        return honest(self, ids, *arguments, **more)

    monkeypatch.setattr(lance.LanceDataset, "_take_rows", counted)
    for ids in (np.array([3, 9999]), np.arange(5000, 9000)):
        assert list(whole(read_blocks(dataset, "vector", D, row_ids=ids))) == ids.tolist()
    assert taken == [2, 4000]
    ids = np.arange(0, 20000, 4)
    assert list(whole(read_blocks(dataset, "vector", D, row_ids=ids))) == ids.tolist()
    assert taken == [2, 4000]


@pytest.mark.parametrize(("nulls", "values"), [(False, False), (True, True)])
def test_batches_that_begin_within_their_memory(nulls: bool, values: bool) -> None:
    data = rows((0, 40), pa.float64(), nulls, values)
    data = data.append_column("_rowid", data["id"].cast(pa.uint64()))
    (batch,) = data.to_batches()
    for start, n in ((0, 40), (7, 20), (39, 1)):
        block = read._block(batch.slice(start, n), "vector", D, 8)
        for i, vector in enumerate(batch["vector"].slice(start, n).to_pylist()):
            holed = vector is None or None in vector
            assert (block.valid is None or bool(block.valid[i])) is not holed
            assert holed or block.vectors[i].tolist() == vector
        assert block.row_ids.tolist() == list(range(start, start + n))


def test_an_empty_table(path: str) -> None:
    dataset = create(path, rows((0, 0)))
    assert list(read_blocks(dataset, "vector", D)) == []
    for more in ({"since": 0}, {"where": "id = 1"}, {"row_ids": np.array([1, 2])}):
        assert list(read_blocks(dataset, "vector", D, **more)) == []


def test_torch_takes_the_blocks_as_they_are_and_they_stay_small(path: str) -> None:
    dataset = create(path, rows((0, 300_000)))
    sizes, first = [], None
    for block in read_blocks(dataset, "vector", D):
        tensor = torch.from_numpy(block.vectors)  # warns where numpy calls the memory read-only
        assert tensor.data_ptr() == block.vectors.ctypes.data
        sizes.append(block.vectors.nbytes)
        first = first or block
    assert max(sizes) <= read.BLOCK_BYTES
    assert sum(sizes) == 300_000 * D * 4
    assert first is not None
    assert np.array_equal(first.vectors[:, 0], first.row_ids % 2048)  # still there


def test_a_reader_that_stops_early(path: str, small_blocks: None) -> None:
    blocks = iter(read_blocks(create(path, rows((0, 300))), "vector", D))
    assert next(blocks).row_ids[0] == 0
    del blocks


def test_bad_requests(path: str) -> None:
    dataset = create(path, rows((0, 9)))
    with pytest.raises(SchemaError, match=r"no column 'nope'; it has id, vector"):
        read_blocks(dataset, "nope", D)
    with pytest.raises(SchemaError, match=r"fixed_size_list.*wants a fixed-size list of 9 floats"):
        read_blocks(dataset, "vector", 9)
    with pytest.raises(SchemaError, match="int64"):
        read_blocks(dataset, "id", D)
    with pytest.raises(QueryError, match="one of since, row_ids and where"):
        read_blocks(dataset, "vector", D, since=1, where="id = 1")
    for where in ("nope = 1", "id =", "id = 'a'"):
        with pytest.raises(QueryError, match=r"filter .*cannot be run"):
            list(read_blocks(dataset, "vector", D, where=where))
    plain = create(path + "2", rows((0, 9)), enable_stable_row_ids=False)
    with pytest.raises(QueryError, match="no stable row ids"):
        read_blocks(plain, "vector", D, since=0)
    assert whole(read_blocks(plain, "vector", D)) == expected(plain)


@pytest.mark.parametrize("more", [{}, {"where": "id > 2"}, {"row_ids": np.array([1])}])
def test_damaged_files_are_named(path: str, more: dict[str, Any]) -> None:
    create(path, rows((0, 3000)))
    for file in Path(path, "data").iterdir():
        os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(StorageError, match="cannot be read"):
        list(read_blocks(lance.dataset(path), "vector", D, **more))
    for file in Path(path, "data").iterdir():
        file.unlink()
    with pytest.raises(StorageError, match="cannot be read"):
        list(read_blocks(lance.dataset(path), "vector", D, **more))
