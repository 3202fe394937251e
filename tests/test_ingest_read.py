"""Every kind of data that a table takes gives the same rows, in small batches."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset
import pytest
import torch

import gpu_lance
from gpu_lance.errors import BadInputError, SchemaError, UnsupportedDataError
from gpu_lance.ingest.read import read
from gpu_lance.pydantic import LanceModel, Vector

N = 25
VECTOR = pa.list_(pa.float32(), 3)
SCHEMA = pa.schema({"id": pa.int64(), "text": pa.utf8(), "vector": VECTOR})
MATRIX = np.arange(3 * N, dtype=np.float32).reshape(N, 3)
ROWS = [{"id": i, "text": f"t{i}", "vector": MATRIX[i].tolist()} for i in range(N)]


class Row(LanceModel):
    id: int
    text: str
    vector: Vector(3)


def arrow() -> pa.Table:
    return pa.Table.from_pylist(ROWS, schema=SCHEMA)


def frame() -> pd.DataFrame:
    columns = {"id": range(N), "text": [f"t{i}" for i in range(N)], "vector": list(MATRIX)}
    return pd.DataFrame(columns, index=range(100, 100 + N))


def polars_frame() -> pl.DataFrame:
    return pl.DataFrame(ROWS, schema_overrides={"vector": pl.Array(pl.Float32, 3)})


class Capsule:
    """A table of a library that shares it by Arrow's protocol only, such as DuckDB."""

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return arrow().__arrow_c_stream__(requested_schema)


def hugging_face() -> Any:
    """What a Hugging Face Dataset offers, told by the name of its module."""

    def with_format(self: Any, kind: str) -> Any:
        assert kind == "arrow"
        return self

    def batched(self: Any, batch_size: int) -> Iterator[pa.Table]:
        for start in range(0, N, batch_size):
            yield arrow().slice(start, batch_size)

    features = type("Features", (dict,), {"arrow_schema": SCHEMA})()
    methods = {"with_format": with_format, "iter": batched, "__len__": lambda self: N}
    made = type("Dataset", (), {**methods, "features": features, "__module__": "datasets.x"})
    return made()


KINDS: dict[str, Callable[[], Any]] = {
    "dicts": lambda: ROWS,
    "tuple of dicts": lambda: tuple(ROWS),
    "models": lambda: [Row(**row) for row in ROWS],
    "dict of lists": lambda: {name: [row[name] for row in ROWS] for name in SCHEMA.names},
    "dict with numpy": lambda: {"id": np.arange(N), "text": frame()["text"], "vector": MATRIX},
    "dict with torch": lambda: {
        "id": torch.arange(N),
        "text": [f"t{i}" for i in range(N)],
        "vector": torch.from_numpy(MATRIX),
    },
    "pandas": frame,
    "polars": polars_frame,
    "polars lazy": lambda: polars_frame().lazy(),
    "table": arrow,
    "chunked table": lambda: pa.concat_tables([arrow()[:7], arrow()[7:8], arrow()[8:]]),
    "record batch": lambda: arrow().to_batches()[0],
    "reader": lambda: arrow().to_reader(),
    "dataset": lambda: pa.dataset.dataset(arrow()),
    "scanner": lambda: pa.dataset.dataset(arrow()).scanner(),
    "arrow protocol": Capsule,
    "hugging face": hugging_face,
    "iterator of rows": lambda: iter(ROWS),
    "iterator of models": lambda: (Row(**row) for row in ROWS),
    "iterator of lists": lambda: iter([ROWS[:4], [], ROWS[4:20], ROWS[20:]]),
    "iterator of batches": lambda: iter(arrow().to_batches(max_chunksize=4)),
    "iterator of tables": lambda: iter([arrow()[:9], arrow()[9:]]),
    "iterator of frames": lambda: iter([frame()[:9], frame()[9:]]),
    "mixed iterator": lambda: iter([ROWS[0], ROWS[1:3], arrow()[3:9], frame()[9:], *[[]]]),
    "list of batches": lambda: arrow().to_batches(max_chunksize=4),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [SCHEMA, None], ids=["schema", "inferred"])
@pytest.mark.parametrize("max_rows", [1, 7, 8192])
def test_every_kind_gives_the_same_rows(kind: str, given: pa.Schema | None, max_rows: int) -> None:
    source = read(KINDS[kind](), given, max_rows=max_rows)
    assert source.schema.names == ["id", "text", "vector"]
    assert source.num_rows in (N, None)
    batches = list(source.batches)
    assert all(1 <= batch.num_rows <= max_rows for batch in batches)
    found = [row for batch in batches for row in batch.to_pylist()]
    assert found == ROWS
    if given is None:
        assert source.schema.field("vector").type == VECTOR
        if "models" not in kind:
            assert all(batch.schema.equals(source.schema) for batch in batches)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_becomes_a_table_and_is_added(kind: str) -> None:
    db = gpu_lance.connect("memory://", device="cpu")
    table = db.create_table("t", KINDS[kind]())
    assert table.to_arrow().to_pylist() == ROWS
    table.add(KINDS[kind]())
    assert table.to_arrow().to_pylist() == ROWS + ROWS
    assert [row["id"] for row in table.search(MATRIX[7]).limit(2).to_list()] == [7, 7]


@pytest.mark.parametrize(
    "empty",
    [
        [],
        {},
        {"id": []},
        iter(()),
        iter([[], []]),
        arrow()[:0],
        arrow()[:0].to_reader(),
        frame()[:0],
        polars_frame()[:0],
        iter([arrow().to_batches()[0][:0]]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_data_without_rows(empty: Any) -> None:
    source = read(empty, SCHEMA)
    assert (list(source.batches), source.num_rows) == ([], 0)


def test_nothing_at_all_needs_a_schema() -> None:
    for nothing in ([], {}, iter(())):
        with pytest.raises(BadInputError, match="no data and no schema"):
            read(nothing)
    assert read(arrow()[:0]).schema.names == SCHEMA.names
    assert read(polars_frame()[:0]).schema.names == SCHEMA.names


@pytest.mark.parametrize("data", [None, 5, "text", b"bytes", MATRIX, torch.ones(2), Row, object()])
def test_what_is_no_data(data: Any) -> None:
    with pytest.raises(UnsupportedDataError, match="a list of dicts or LanceModels, a dict of"):
        read(data, SCHEMA)


def test_one_model_is_not_a_list_of_them() -> None:
    with pytest.raises(BadInputError, match=r"pass \[row\]"):
        read(Row(**ROWS[0]), SCHEMA)


# ---------------------------------------------------------------- inference


def inferred(data: Any, column: str) -> pa.DataType:
    return read(data).schema.field(column).type


def test_types_that_the_data_decides() -> None:
    assert inferred([{"n": 1}, {"n": None}], "n") == pa.int64()
    assert inferred([{"s": {"a": 1, "b": [1.5]}}], "s") == pa.struct(
        {"a": pa.int64(), "b": pa.list_(pa.float64())}
    )
    assert inferred({"tags": [["a"], [], None]}, "tags") == pa.list_(pa.utf8())
    assert inferred({"image_vector": [[1, 255]]}, "image_vector") == pa.list_(pa.uint8(), 2)
    assert inferred({"vector": [[1, -1]]}, "vector") == pa.list_(pa.float32(), 2)
    assert inferred({"embedding": MATRIX.astype(np.float16)}, "embedding") == pa.list_(
        pa.float16(), 3
    )
    assert inferred({"vector": [[1.0], [1.0, 2.0], [3.0, 4.0]]}, "vector").list_size == 2
    assert inferred({"numbers": [[1.0, 2.0]]}, "numbers") == pa.list_(pa.float64())


def test_categories_stay_categories() -> None:
    data = pd.DataFrame({"c": pd.Categorical(["a", "b", "a"]), "vector": list(MATRIX[:3])})
    source = read(data)
    assert pa.types.is_dictionary(source.schema.field("c").type)
    assert [row["c"] for batch in source.batches for row in batch.to_pylist()] == ["a", "b", "a"]
    table = gpu_lance.connect("memory://", device="cpu").create_table("t", data)
    table.add([{"c": "z", "vector": [0.0, 0.0, 0.0]}])
    assert table.to_arrow()["c"].to_pylist() == ["a", "b", "a", "z"]
    plain = pa.schema({"c": pa.utf8(), "vector": VECTOR})
    text = gpu_lance.connect("memory://", device="cpu").create_table("t", schema=plain)
    text.add(data)
    assert text.to_arrow()["c"].to_pylist() == ["a", "b", "a"]


def test_a_list_is_looked_at_whole_and_a_stream_by_its_first_batch() -> None:
    late = [{"x": 1, "y": None}] * 20 + [{"x": 2.5, "y": "a", "z": True}]
    source = read(late, max_rows=8)
    assert [field.type for field in source.schema] == [pa.float64(), pa.utf8(), pa.bool_()]
    found = [row for batch in source.batches for row in batch.to_pylist()]
    assert found[0] == {"x": 1.0, "y": None, "z": None}
    assert found[20] == {"x": 2.5, "y": "a", "z": True}
    stream = read(iter([{"x": 1}] * 20 + [{"x": 2.5}]), max_rows=8)
    with pytest.raises(SchemaError, match=r"Row 20, column 'x': 2\.5 .* from 16 on, .*decided"):
        list(stream.batches)
    stream = read(iter([{"x": 1}] * 20 + [{"x": "a"}]), max_rows=8)
    with pytest.raises(BadInputError, match="Row 20, column 'x': got 'a' of type str"):
        list(stream.batches)


def test_ragged_rows_have_the_columns_of_all() -> None:
    source = read([{"a": 1}, {"b": "x"}, {"a": 2, "c": [1.0]}])
    assert [row for batch in source.batches for row in batch.to_pylist()] == [
        {"a": 1, "b": None, "c": None},
        {"a": None, "b": "x", "c": None},
        {"a": 2, "b": None, "c": [1.0]},
    ]


@pytest.mark.parametrize("missing", [np.nan, None, pd.NA, pd.NaT])
def test_what_pandas_calls_missing_is_null(missing: Any) -> None:
    data = pd.DataFrame({"text": ["a", missing, "b"], "n": pd.array([1, None, 2], "Int64")})
    source = read(data, pa.schema({"text": pa.utf8(), "n": pa.int64()}))
    found = [row for batch in source.batches for row in batch.to_pylist()]
    assert [row["text"] for row in found] == ["a", None, "b"]
    assert [row["n"] for row in found] == [1, None, 2]


def test_a_frame_with_two_columns_of_one_name() -> None:
    data = pd.DataFrame([[1, 2]], columns=["a", "a"])
    with pytest.raises(BadInputError, match="more than one column a"):
        read(data)


# -------------------------------------------------------------- bad values


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("id", "nine hundred", "'nine hundred'"),
        ("id", 1.5, r"1\.5"),
        ("id", 2**63, "int"),
        ("text", ["a"], r"\['a'\]"),
        ("text", "\udc80", "surrogate"),
        ("text", object(), "object"),
        ("vector", ["x", "y", "z"], "x"),
        ("vector", 7, "7"),
        ("vector", [[1.0], [2.0], [3.0]], r"\[\[1"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_value_in_row_900_is_named(
    column: str, value: Any, message: str, stream: bool
) -> None:
    rows = [dict(ROWS[i % N]) for i in range(1000)]
    rows[900][column] = value
    table = gpu_lance.connect("memory://", device="cpu").create_table("t", schema=SCHEMA)
    with pytest.raises(ValueError, match=rf"(?s)Row 900, column '{column}'.*{message}"):
        table.add(iter(rows) if stream else rows)
    assert (len(table), table.version) == (0, 1)


def test_the_row_is_named_in_any_batch_of_any_kind() -> None:
    rows = [{"id": i, "vector": [1.0, 2.0, 3.0]} for i in range(30)]
    rows[23]["vector"] = [1.0]  # type: ignore[assignment]
    table = gpu_lance.connect("memory://", device="cpu").create_table("t", schema=SCHEMA)
    tables = [pa.Table.from_pylist(rows[i : i + 10]) for i in (0, 10, 20)]
    for data in (rows, iter(rows), iter([rows[:20], rows[20:]]), iter(tables), pd.DataFrame(rows)):
        with pytest.raises(ValueError, match="row 23 has 1 dimensions instead of 3"):
            table.add(data)
    with pytest.raises(UnsupportedDataError, match="Row 20 is of type str"):
        table.add(iter([rows[:20], "row"]))


# ----------------------------------------------------------------- laziness


def test_a_stream_is_read_as_far_as_it_is_asked_for() -> None:
    taken = 0

    def stream() -> Iterator[dict[str, Any]]:
        nonlocal taken
        for row in ROWS:
            taken += 1
            yield row

    source = read(stream(), SCHEMA, max_rows=5)
    assert taken == 5
    next(source.batches)
    next(source.batches)
    assert taken == 10


def test_batches_are_let_go_of() -> None:
    alive: list[weakref.ref[Any]] = []

    def stream() -> Iterator[pa.RecordBatch]:
        for _ in range(10):
            batch = arrow().to_batches()[0]
            alive.append(weakref.ref(batch))
            yield batch
            del batch

    most = 0
    for _ in read(stream(), SCHEMA).batches:
        most = max(most, sum(ref() is not None for ref in alive))
    assert len(alive) == 10
    assert most <= 3


def test_arrow_data_is_not_copied() -> None:
    table = arrow()
    address = table["vector"].chunk(0).values.buffers()[1].address
    batch = next(read(table, SCHEMA).batches)
    assert batch.column("vector").values.buffers()[1].address == address
    matrix = np.ones((4, 3), np.float32)
    batch = next(read({"vector": matrix}, pa.schema({"vector": VECTOR})).batches)
    assert batch.column("vector").values.buffers()[1].address == matrix.ctypes.data
