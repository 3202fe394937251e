"""What a query may be: a vector, an item, or several of either."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpu_lance.errors import BadInputError, QueryError, QueryTypeError
from gpu_lance.query.inputs import check_finite, parse_queries

CPU = torch.device("cpu")
VALUES = [0.5, -1.0, 3.0]

ONE: dict[str, Any] = {
    "list": VALUES,
    "tuple": tuple(VALUES),
    "numpy float16": np.array(VALUES, np.float16),
    "numpy float64": np.array(VALUES),
    "numpy, strided": np.repeat(VALUES, 2)[::2],
    "numpy, foreign byte order": np.array(VALUES, ">f4"),
    "numpy objects": np.array(VALUES, object),
    "decimals and fractions": [Decimal("0.5"), -1, Fraction(3)],
    "numpy scalars": [np.float32(value) for value in VALUES],
    "torch": torch.tensor(VALUES),
    "torch bfloat16": torch.tensor(VALUES).bfloat16(),
    "torch with gradient": torch.tensor(VALUES, requires_grad=True),
    "arrow": pa.array(VALUES),
    "chunked arrow": pa.chunked_array([VALUES[:1], VALUES[1:]]),
    "arrow list scalar": pa.array([VALUES])[0],
    "arrow fixed-size scalar": pa.array([VALUES], pa.list_(pa.float32(), 3))[0],
    "pandas": pd.Series(VALUES),
    "polars": pl.Series(VALUES),
    "one row": np.array([VALUES]),
    "a list of one": [VALUES],
}


@pytest.mark.parametrize("kind", ONE)
def test_one_vector_of_any_kind(kind: str) -> None:
    queries = parse_queries(ONE[kind])
    assert (len(queries), queries.ndims, queries.batch) == (1, 3, False)
    assert (queries.items, queries.kind()) == (None, "1 vector")
    tensor = queries.tensor(CPU)
    assert (tensor.dtype, tensor.tolist()) == (torch.float32, [VALUES])


SEVERAL: dict[str, Any] = {
    "lists": [VALUES, VALUES[::-1]],
    "tuples": (tuple(VALUES), tuple(VALUES[::-1])),
    "numpy": np.array([VALUES, VALUES[::-1]]),
    "list of numpy": [np.array(VALUES), np.array(VALUES[::-1])],
    "torch": torch.tensor([VALUES, VALUES[::-1]]),
    "list of torch": [torch.tensor(VALUES), torch.tensor(VALUES[::-1])],
    "numpy and lists": [VALUES, np.array(VALUES[::-1])],
    "torch and lists": [torch.tensor(VALUES), VALUES[::-1]],
    "arrow": pa.array([VALUES, VALUES[::-1]], pa.list_(pa.float32(), 3)),
    "list of arrow": [pa.array(VALUES), pa.array(VALUES[::-1])],
    "pandas": pd.Series([VALUES, VALUES[::-1]]),
    "numpy objects": np.array([VALUES, VALUES[::-1]], object),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_several_vectors_of_any_kind(kind: str) -> None:
    queries = parse_queries(SEVERAL[kind])
    assert (len(queries), queries.ndims, queries.batch) == (2, 3, True)
    assert queries.kind() == "2 vectors"
    assert queries.tensor(CPU).tolist() == [VALUES, VALUES[::-1]]


def test_items() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    for one in ("a", b"a", "", image, object()):
        queries = parse_queries(one)
        assert queries.items is not None
        assert queries.items[0] is one
        assert (len(queries), queries.batch, queries.ndims) == (1, False, None)
    assert parse_queries("a").kind() == "1 text"
    assert parse_queries(image).kind() == "1 item"
    for several in (["a", "b"], ("a", "b"), np.array(["a", "b"]), pd.Series(["a", "b"])):
        queries = parse_queries(several)
        assert (queries.items, queries.batch, queries.kind()) == (["a", "b"], True, "2 texts")
    one = parse_queries(["a"])
    assert (one.items, one.batch) == (["a"], True)
    assert parse_queries(pa.array(["a", "b"])).items == ["a", "b"]
    assert parse_queries(pa.scalar("a")).items == ["a"]


def test_the_callers_vector_may_change_afterwards() -> None:
    vector = np.array(VALUES, np.float32)
    queries = parse_queries(vector)
    vector[:] = 9
    assert queries.tensor(CPU).tolist() == [VALUES]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ([], "is empty"),
        ((), "is empty"),
        (np.empty(0), "is empty"),
        (np.empty((0, 3)), "is empty"),
        (np.empty((3, 0)), "is empty"),
        ([[]], "is empty"),
        ([[1.0, 2.0], [1.0]], "Query 1 has 1 values and query 0 has 2"),
        ([np.ones(2), np.ones(3)], "Query 1 has 3 values and query 0 has 2"),
        ([[1.0, 2.0], "a"], "Query 1 is a str, and query 0 is a vector"),
        (["a", [1.0, 2.0]], "Query 1 is a list, and query 0 is a str"),
        (["a", np.ones(2)], "Query 1 is an ndarray"),
        (["a", 5], "Query 1 is an int"),
        (["a", None], "Query 1 is None"),
        ([None], "Query 0 is None"),
        ([1.0, "2"], "no number: str"),
        ([True, False], "no number: bool"),
        ([1.0, None], "no number: NoneType"),
        ([1.0, [2.0]], "no number"),
        ([[[1.0]]], "axes"),
        ([1.0, 1j], "no number"),
        (np.array([1j, 2.0]), "real numbers, got complex"),
        (np.array([True, False]), "real numbers, got bool"),
        (torch.tensor([1j, 2.0]), "real numbers"),
        (torch.tensor([True, False]), "real numbers"),
        (np.array(["2024-01-01"], "M8[D]"), "real numbers"),
        (pd.Series([], dtype=float), "is empty"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_what_is_no_query(query: Any, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        parse_queries(query)


@pytest.mark.parametrize("query", [5, 1.5, True, 1j, {"a": 1}, {1, 2}, np.float32(1), np.array(1)])
def test_what_has_the_wrong_type(query: Any) -> None:
    with pytest.raises(QueryTypeError, match="pass a vector"):
        parse_queries(query)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (5, "The query is an int; pass"),
        ({"a": 1}, "The query is a dict; pass"),
        ([VALUES, 5], "Query 1 is an int, and query 0 is a vector;"),
        (["a", 5], "Query 1 is an int, and query 0 is a str;"),
        (["a", np.ones(3)], "Query 1 is an ndarray, and"),
    ],
)
def test_types_are_named_with_their_article(query: Any, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        parse_queries(query)


@pytest.mark.parametrize("query", ["a\ud800", ["ok", "\udfff"]])
def test_lone_surrogates_are_no_text(query: Any) -> None:
    with pytest.raises(BadInputError, match="has a lone surrogate at character [01]"):
        parse_queries(query)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39, -1e300])
@pytest.mark.parametrize("make", [list, np.array, torch.tensor], ids=["list", "numpy", "torch"])
def test_what_is_not_finite_in_float32_is_named(value: float, make: Any) -> None:
    with pytest.raises(QueryError, match="Query 1 holds .* at position 2; no distance"):
        parse_queries([make([0.0, 0.0, 0.0]), make([0.0, 0.0, value])]).tensor(CPU)


def test_finite_vectors_pass() -> None:
    check_finite(torch.tensor([[0.0, -0.0, 3e38]]))


@given(st.lists(st.floats(allow_nan=False, width=32), min_size=1))
def test_any_floats_come_through_unchanged(values: list[float]) -> None:
    assert parse_queries(values).vectors.tolist() == [values]
