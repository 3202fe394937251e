"""Python rows and columns as Arrow: what is taken, what it becomes, what is refused."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import pathlib
from collections import OrderedDict
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

import gpu_lance
from gpu_lance.errors import BadInputError, SchemaError, UnsupportedDataError
from gpu_lance.ingest.rows import column_to_arrow, plain, rows_to_batch

VECTOR = pa.list_(pa.float32(), 3)
SCHEMA = pa.schema({"id": pa.int64(), "vector": VECTOR})
VALUES = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
MATRIX = np.array(VALUES)


class Color(enum.Enum):
    RED = "red"


class Rank(enum.IntEnum):
    LOW = 1


@dataclasses.dataclass
class Point:
    x: int
    y: float


class Author(BaseModel):
    name: str
    born: int | None = None


def stored(values: list[Any], kind: pa.DataType = VECTOR) -> list[Any]:
    """What a table holds after these values were added to a column of that type."""
    schema = pa.schema({"id": pa.int64(), "column": kind})
    table = gpu_lance.connect("memory://", device="cpu").create_table("t", schema=schema)
    table.add([{"id": i, "column": value} for i, value in enumerate(values)])
    assert table.schema.field("column").type == kind
    return [row["column"] for row in table.to_arrow().to_pylist()]


# ------------------------------------------------------------------ vectors

VECTORS: dict[str, list[Any]] = {
    "lists": VALUES,
    "tuples": [tuple(vector) for vector in VALUES],
    "ints": [[1, 2, 3], [4, 5, 6]],
    "numpy float16": list(MATRIX.astype(np.float16)),
    "numpy float32": list(MATRIX.astype(np.float32)),
    "numpy float64": list(MATRIX),
    "numpy int8": list(MATRIX.astype(np.int8)),
    "numpy, foreign byte order": list(MATRIX.astype(">f4")),
    "numpy, strided": list(np.repeat(MATRIX, 2, axis=1)[:, ::2]),
    "numpy, read-only": [np.frombuffer(MATRIX[i].tobytes()) for i in range(2)],
    "numpy scalars": [[np.float32(n) for n in vector] for vector in VALUES],
    "torch": list(torch.tensor(MATRIX)),
    "torch float16": list(torch.tensor(MATRIX).half()),
    "torch bfloat16": list(torch.tensor(MATRIX).bfloat16()),
    "torch with gradient": list(torch.tensor(MATRIX).requires_grad_().unbind()),
    "arrow arrays": [pa.array(vector) for vector in VALUES],
    "arrow scalars": list(pa.array(VALUES)),
    "numpy and lists": [MATRIX[0], VALUES[1]],
    "torch and numpy": [torch.tensor(MATRIX[0]), MATRIX[1]],
}


@pytest.mark.parametrize("kind", VECTORS)
@pytest.mark.parametrize("value_type", [pa.float16(), pa.float32(), pa.float64()], ids=str)
def test_vectors_in_any_container(kind: str, value_type: pa.DataType) -> None:
    assert stored(VECTORS[kind], pa.list_(value_type, 3)) == VALUES


@pytest.mark.parametrize("kind", VECTORS)
def test_null_vectors_among_them(kind: str) -> None:
    first, second = VECTORS[kind]
    assert stored([None, first, None, second]) == [None, VALUES[0], None, VALUES[1]]


def test_numbers_lose_no_more_than_the_type_of_the_column() -> None:
    third = [1 / 3] * 3
    for given_, wanted in [(third, np.float32), (np.array(third), np.float32)]:
        assert stored([given_])[0] == np.array(third, wanted).tolist()
    assert stored([third], pa.list_(pa.float64(), 3)) == [third]
    assert stored([third], pa.list_(pa.float16(), 3))[0] == np.array(third, np.float16).tolist()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([1.0, 2.0], "row 1 has 2 dimensions"),
        ([], "row 1 has 0 dimensions"),
        (np.ones(4), "row 1 has 4 dimensions"),
        (torch.ones(4), "row 1 has 4 dimensions"),
        ([1.0, "x", 2.0], "Row 1, column 'column'.*'x'"),
        (["1", "2", "3"], "Row 1, column 'column'|row 1"),
        ("1,2,3", "Row 1, column 'column'.*'1,2,3'"),
        (5, "Row 1, column 'column'.*5"),
        (MATRIX, "Row 1, column 'column'"),
        ({"a": 1.0}, "Row 1, column 'column'"),
        ([1.0, 2.0, 1j], "Row 1, column 'column'"),
        (np.array([1.0, 2.0, 1j]), "Row 1, column 'column'"),
        ([1.0, 2.0, 1e300], "row 1 has an infinite element, or one too large for float"),
        (np.array([1.0, 2.0, 1e300]), "row 1 has an infinite element"),
    ],
)
def test_vectors_that_are_none(bad: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stored([VALUES[0], bad])


@given(
    st.lists(
        st.one_of(
            st.none(), st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=2)
        ),
        min_size=1,
    )
)
def test_any_lists_of_floats_come_through_unchanged(values: list[Any]) -> None:
    made = column_to_arrow(values, "v", pa.list_(pa.float32(), 2))
    assert made.to_pylist() == values


# -------------------------------------------------------------- other types

UTC = datetime.UTC
MOMENT = datetime.datetime(2024, 2, 29, 12, 30, 1, 7)
NESTED = pa.struct({"name": pa.utf8(), "born": pa.int64()})

CASES: list[tuple[pa.DataType, Any, Any]] = [
    (pa.utf8(), "x", "x"),
    (pa.utf8(), Color.RED, "red"),
    (pa.utf8(), pathlib.PurePosixPath("a/b"), "a/b"),
    (pa.utf8(), np.str_("x"), "x"),
    (pa.large_utf8(), "x", "x"),
    (pa.dictionary(pa.int32(), pa.utf8()), "x", "x"),
    (pa.int64(), Rank.LOW, 1),
    (pa.int64(), np.int8(3), 3),
    (pa.int64(), True, 1),
    (pa.int64(), 3.0, 3),
    (pa.int64(), torch.tensor(3), 3),
    (pa.int8(), -128, -128),
    (pa.uint64(), 2**64 - 1, 2**64 - 1),
    (pa.float32(), 3, 3.0),
    (pa.float64(), np.float32(0.5), 0.5),
    (pa.float64(), decimal.Decimal("0.5"), 0.5),
    (pa.bool_(), np.bool_(True), True),
    (pa.binary(), b"\0\xff", b"\0\xff"),
    (pa.binary(), bytearray(b"ab"), b"ab"),
    (pa.date32(), MOMENT.date(), MOMENT.date()),
    (pa.timestamp("us"), MOMENT, MOMENT),
    (pa.timestamp("us"), np.datetime64(MOMENT), MOMENT),
    (pa.timestamp("us", "UTC"), MOMENT.replace(tzinfo=UTC), MOMENT.replace(tzinfo=UTC)),
    (pa.duration("us"), datetime.timedelta(seconds=1.5), datetime.timedelta(seconds=1.5)),
    (pa.list_(pa.utf8()), ("a", "b"), ["a", "b"]),
    (pa.list_(pa.utf8()), np.array(["a", "b"]), ["a", "b"]),
    (pa.list_(pa.int64()), np.array([1, 2]), [1, 2]),
    (pa.list_(pa.int64()), [], []),
    (pa.list_(pa.list_(pa.float32(), 2)), np.eye(2), [[1.0, 0.0], [0.0, 1.0]]),
    (NESTED, {"name": "n", "born": 1}, {"name": "n", "born": 1}),
    (NESTED, {"name": "n"}, {"name": "n", "born": None}),
    (NESTED, Author(name="n"), {"name": "n", "born": None}),
    (NESTED, OrderedDict(name="n", born=1), {"name": "n", "born": 1}),
    (pa.struct({"x": pa.int64(), "y": pa.float64()}), Point(1, 2.5), {"x": 1, "y": 2.5}),
    (pa.list_(NESTED), [Author(name="n", born=2)], [{"name": "n", "born": 2}]),
    (pa.struct({"v": VECTOR}), {"v": MATRIX[0]}, {"v": VALUES[0]}),
    (pa.struct({"in": NESTED}), {"in": {"born": 3}}, {"in": {"name": None, "born": 3}}),
]


@pytest.mark.parametrize(("kind", "value", "expected"), CASES, ids=lambda v: str(v)[:30])
def test_values_of_every_type(kind: pa.DataType, value: Any, expected: Any) -> None:
    assert stored([value, None, value], kind) == [expected, None, expected]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pa.int64(), 1.5),
        (pa.int64(), "x"),
        (pa.int64(), 2**63),
        (pa.int8(), 128),
        (pa.uint8(), -1),
        (pa.int64(), np.float32(1.5)),
        (pa.bool_(), "maybe"),
        (pa.utf8(), ["x"]),
        (pa.utf8(), object()),
        (pa.utf8(), "\ud83d"),
        (pa.utf8(), b"\xff"),
        (pa.binary(), 5),
        (pa.date32(), "yesterday"),
        (pa.timestamp("us"), "noon"),
        (pa.list_(pa.int64()), [1, "x"]),
        (pa.list_(pa.int64()), [1.5]),
        (pa.list_(pa.utf8()), ["a", "\ud83d"]),
        (NESTED, {"name": "n", "born": 1.5}),
        (NESTED, {"name": "n", "born": "x"}),
        (NESTED, {"name": "\ud83d"}),
        (NESTED, "x"),
    ],
    ids=lambda v: ascii(v)[:30],
)
def test_a_value_that_does_not_fit_is_named_with_its_row(kind: pa.DataType, value: Any) -> None:
    good = {pa.utf8(): "x", pa.bool_(): True, pa.binary(): b""}.get(kind)
    with pytest.raises(ValueError, match=r"(?s)[rR]ow 2.*column 'column'|'column'.*row 2"):
        stored([good, None, value, good], kind)


def test_a_field_that_the_struct_lacks_is_not_dropped() -> None:
    with pytest.raises(SchemaError, match=r"'column' has no field 'died'; it has 'name', 'born'"):
        stored([{"name": "n", "died": 5}], NESTED)
    with pytest.raises(SchemaError, match=r"'column\.in' has no field 'x'"):
        stored([{"in": {"x": 5}}], pa.struct({"in": NESTED}))


# --------------------------------------------------------------------- rows


def test_rows_of_every_kind() -> None:
    rows = [{"name": "a"}, MappingProxyType({"name": "b"}), Author(name="c", born=1)]
    assert rows_to_batch(rows).to_pylist() == [
        {"name": "a", "born": None},
        {"name": "b", "born": None},
        {"name": "c", "born": 1},
    ]


@pytest.mark.parametrize("row", [None, 5, "text", [1], (1, 2), {1, 2}, Author])
def test_what_is_no_row(row: Any) -> None:
    with pytest.raises(UnsupportedDataError, match="Row 7 is of type .*; a row is a dict"):
        rows_to_batch([{"a": 1}, row], first_row=6)


@pytest.mark.parametrize("key", [1, None, ("a",), b"a"])
def test_names_of_columns_are_text(key: Any) -> None:
    with pytest.raises(BadInputError, match="Row 1: column names are strings"):
        rows_to_batch([{"a": 1}, {key: 1}])


def test_rows_without_columns() -> None:
    with pytest.raises(BadInputError, match="Row 3 has no columns"):
        rows_to_batch([{}, {}], first_row=3)
    assert rows_to_batch([{}, {}], SCHEMA).to_pylist() == [{"id": None}] * 2


def test_missing_columns_are_null_where_they_may_be() -> None:
    strict = pa.schema([pa.field("id", pa.int64(), nullable=False), pa.field("n", pa.int64())])
    table = gpu_lance.connect("memory://", device="cpu").create_table("t", schema=strict)
    table.add([{"id": 1}, {"id": 2, "n": 5}])
    assert table.to_arrow().to_pylist() == [{"id": 1, "n": None}, {"id": 2, "n": 5}]
    with pytest.raises(SchemaError, match="'id' is missing from the data and takes no nulls"):
        table.add([{"n": 1}])
    with pytest.raises(BadInputError, match="Row 1, column 'id': null"):
        table.add([{"id": 1}, {"n": 1}])
    assert len(table) == 2


def test_the_callers_rows_are_not_changed() -> None:
    vector = np.ones(3)
    row = {"id": 1, "column": vector}
    table = gpu_lance.connect("memory://", device="cpu").create_table("t", [row])
    vector[:] = 7
    assert row["column"] is vector
    assert table.to_arrow()["column"].to_pylist() == [[1.0] * 3]


def test_plain_goes_into_everything() -> None:
    value = {"a": (Color.RED, {"b": [np.float32(0.5), Point(1, 2.0)]}), "s": {"x"}, "n": None}
    assert plain(value) == {"a": ["red", {"b": [0.5, {"x": 1, "y": 2.0}]}], "s": ["x"], "n": None}
