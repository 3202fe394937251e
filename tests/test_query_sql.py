"""SQL text: parameters stay data, half-read conditions are refused, and Lance agrees."""

from __future__ import annotations

import datetime
import decimal
import enum
import uuid
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpu_lance
from gpu_lance.errors import BadInputError, QueryError
from gpu_lance.query.sql import bind, checked, literal, tokens, words
from gpu_lance.table import Table

MOMENT = datetime.datetime(2024, 2, 29, 12, 30, 1, 7)
UTC = datetime.UTC


class Color(enum.Enum):
    RED = "red"


@pytest.fixture(scope="module")
def table() -> Table:
    columns = {
        "id": [1, 2, 3],
        "name": ["O'Neil", 'a "b" ? c', None],
        "x": [-1.5, 0.0, float("nan")],
        "flag": [True, False, None],
        "raw": [b"\x00'", b"ab", None],
        "day": [MOMENT.date(), datetime.date(1969, 1, 1), None],
        "at": pa.array([MOMENT, datetime.datetime(1969, 1, 1), None], pa.timestamp("us")),
        "zoned": pa.array([MOMENT.replace(tzinfo=UTC), None, None], pa.timestamp("us", "UTC")),
        "big": pa.array([2**64 - 1, 0, None], pa.uint64()),
        "my col": ["semi;colon", "--", "/* x */"],
    }
    return gpu_lance.connect("memory://", device="cpu").create_table("t", columns)


def ids(table: Table, where: str, *parameters: Any) -> list[int]:
    return [row["id"] for row in table.search().where(where, list(parameters)).to_list()]


@pytest.mark.parametrize(
    ("where", "parameters", "expected"),
    [
        ("name = ?", ["O'Neil"], [1]),
        ("name = ?", ['a "b" ? c'], [2]),
        ("name = ?", ["' OR true OR name = '"], []),
        ("name = ?", ["x' --"], []),
        ("name = '?' OR id = ?", [2], [2]),
        ("`my col` = ?", ["semi;colon"], [1]),
        ("`my col` = ?", ["--"], [2]),
        ("`my col` = ?", ["/* x */"], [3]),
        ("name IS ?", [None], [3]),
        ("name IS NOT ?", [None], [1, 2]),
        ("id = ?", [2], [2]),
        ("id = ?", [np.int8(2)], [2]),
        ("id = ?", [pa.scalar(2)], [2]),
        ("id -? = 3", [-1], [2]),
        ("id IN ?", [[1, 3]], [1, 3]),
        ("id IN (?)", [(1, 3)], [1, 3]),
        ("id IN (?, ?)", [1, 2], [1, 2]),
        ("id IN ?", [np.array([2, 3])], [2, 3]),
        ("id IN ?", [pa.array([2])], [2]),
        ("name IN ?", [["O'Neil", "x"]], [1]),
        ("x = ?", [-1.5], [1]),
        ("x = ?", [np.float32(-1.5)], [1]),
        ("x = ?", [-0.0], [2]),
        ("x = ?", [float("nan")], [3]),
        ("x < ?", [float("-inf")], []),
        ("id = ?", [decimal.Decimal("2.00")], [2]),
        ("flag = ?", [True], [1]),
        ("flag = ?", [np.bool_(False)], [2]),
        ("raw = ?", [b"\x00'"], [1]),
        ("day = ?", [MOMENT.date()], [1]),
        ("at = ?", [MOMENT], [1]),
        ("at = ?", [np.datetime64(MOMENT)], [1]),
        ("at < ?", [datetime.datetime(1970, 1, 1)], [2]),
        ("zoned = ?", [MOMENT.replace(tzinfo=UTC)], [1]),
        ("zoned = ?", [MOMENT.replace(tzinfo=UTC).astimezone()], [1]),
        ("big = ?", [2**64 - 1], [1]),
        ("id > ?", [-(2**63)], [1, 2, 3]),
        ("id = ? /* ? */ AND name = ? -- ?", [1, "O'Neil"], [1]),
        ("id > ? AND id < ?", [1, 3], [2]),
    ],
)
def test_parameters_find_the_rows_that_hold_them(
    table: Table, where: str, parameters: list[Any], expected: list[int]
) -> None:
    assert ids(table, where, *parameters) == expected


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_any_text_stays_data(text: str) -> None:
    sql = bind("name = ?", [text])
    assert checked(sql) == f"({sql})"
    pieces = [piece for kind, piece in tokens(sql) if kind == "string"]
    assert len(pieces) == 1
    assert pieces[0][1:-1].replace("''", "'") == text


@given(value=st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats(allow_infinity=False)))
def test_any_number_is_one_expression(value: float) -> None:
    assert checked(f"x - {literal(value)} > 0").startswith("(x - ")
    assert "--" not in f"x -{literal(value)}"


@given(text=st.text("'\"ab? \\%_;-", max_size=8))
def test_texts_are_found_as_they_were_stored(text: str) -> None:
    table = gpu_lance.connect("memory://", device="cpu").create_table("t", [{"name": text}])
    assert len(table.search().where("name = ?", [text]).to_list()) == 1
    assert table.search().where("name = ?", [text + "x"]).to_list() == []


@pytest.mark.parametrize(
    ("where", "parameters", "message"),
    [
        ("id = ?", [], "1 parameters, and 0 values"),
        ("id = ?", [1, 2], "1 parameters, and 2 values"),
        ("id = 1", [1], "0 parameters, and 1 values"),
        ("id = '?'", [1], "0 parameters, and 1 values"),
        ("id = ?", [None], "write IS NULL"),
        ("id IN ?", [[]], "empty list"),
        ("id IN ?", [[1, None]], "write IS NULL"),
        ("id = ?", [object()], "object, which has no SQL literal"),
        ("id = ?", [{"a": 1}], "dict, which has no SQL literal"),
        ("id = ?", [2**64], "beyond 64 bits"),
        ("id = ?", [decimal.Decimal("NaN")], "finite"),
        ("id = ?", [decimal.Decimal("1e60")], "38 digits"),
        ("id = ?", ["\ud800"], "surrogate"),
        ("id = ?", "x", "parameters of a filter are a list"),
        (5, [1], "SQL text"),
    ],
)
def test_parameters_that_do_not_fit(
    table: Table, where: Any, parameters: Any, message: str
) -> None:
    with pytest.raises((QueryError, BadInputError), match=message):
        table.search().where(where, parameters)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("", "filter is empty"),
        ("   -- nothing", "filter is empty"),
        ("id = 1) OR (id = 2", "closes a parenthesis"),
        ("(id = 1", "opens a parenthesis"),
        ("name = 'x", "opens a quote '"),
        ('name = "x', 'opens a quote "'),
        ("`name = 1", "opens a quote `"),
        ("id = 1 /* x", "comment that it never closes"),
        ("id = 1; DELETE", "';'"),
        ("id = ?", "parameter '[?]' without a value"),
        ("id = $1", r"parameter '\$' without a value"),
        ("name = '\ud800'", "surrogate"),
        (None, "SQL text, got a NoneType"),
        (b"id = 1", "SQL text, got a bytes"),
    ],
)
def test_conditions_that_would_be_read_by_half(where: Any, message: str) -> None:
    with pytest.raises((QueryError, BadInputError), match=message):
        checked(where)


@pytest.mark.parametrize(
    "where",
    [
        "id = 1",
        "((id = 1))",
        "name = ') OR (' OR id = 1",
        "name = ';' OR id = 1",
        "name = '?' OR id = 1",
        "`id` = 1",
        "id = 1 -- ) comment ;",
        "id /* ( ? ; */ = 1",
        "name = 'O''Neil'",
        "id\n=\n1",
    ],
)
def test_conditions_that_are_whole(table: Table, where: str) -> None:
    assert [row["id"] for row in table.search().where(where).to_list()] == [1]
    assert table.count_rows(where) == 1


def test_lance_would_have_read_half_of_it(table: Table) -> None:
    """If this fails, Lance reports it itself, and `checked` may become simpler."""
    half = table.to_lance().to_table(filter="id = 1) OR (id = 2", columns=["id"])
    assert half["id"].to_pylist() == [1]


@pytest.mark.parametrize(
    "where",
    [
        "nope = 1",
        "id = ",
        "id = 1 AND",
        "id BETWEEN 1",
        "lower(id",
        "nope(id) = 1",
        "id + 1",
        "name > id",  # no number
        "id / 0 = 1",
        "sum(id) > 1",
        "N'a' = name",  # Lance panics
    ],
)
def test_what_lance_refuses_is_a_query_error_everywhere(table: Table, where: str) -> None:
    for call in (
        lambda: table.search().where(where).to_list(),
        lambda: table.count_rows(where),
        lambda: table.delete(where),
        lambda: table.update(where, {"id": 5}),
    ):
        with pytest.raises(QueryError):
            call()
    assert (table.version, len(table)) == (1, 3)


def test_enums_and_uuids() -> None:
    assert literal(Color.RED) == "'red'"
    number = uuid.UUID(int=7)
    assert literal(number) == f"'{number}'"


def test_words_name_every_column() -> None:
    assert words("lower(`my col`) = 'name' AND x > 1.5 -- id") >= {"my col", "x"}
    assert not words("lower(`my col`) = 'name' -- id") & {"name", "id"}
