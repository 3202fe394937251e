"""A user's function may return many things: what is a vector is taken, the rest is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from pydantic import PrivateAttr

from gpu_lance import connect
from gpu_lance.embeddings import (
    EmbeddingFunction,
    EmbeddingFunctionConfig,
    TextEmbeddingFunction,
    get_registry,
)
from gpu_lance.embeddings.calls import embed, prepare
from gpu_lance.errors import BadVectorError, EmbeddingError

CPU = torch.device("cpu")
ROWS = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]


class Returns(TextEmbeddingFunction):
    """Returns whatever it was made with."""

    _made: Any = PrivateAttr(default=None)
    _given: list[Any] = PrivateAttr(default_factory=list)

    def ndims(self) -> int:
        return 3

    def generate_embeddings(self, texts: list[str], *args: Any, **kwargs: Any) -> Any:
        self._given.append(list(texts))
        return self._made(texts) if callable(self._made) else self._made


class PerItem(EmbeddingFunction):
    """Embeds anything; its queries come one at a time, as LanceDB passes them."""

    _given: list[Any] = PrivateAttr(default_factory=list)

    def ndims(self) -> int:
        return 1

    def compute_source_embeddings(self, items: Any, *args: Any, **kwargs: Any) -> list[Any]:
        self._given.append(items)
        return [[float(len(item))] for item in items]

    def compute_query_embeddings(self, query: Any, *args: Any, **kwargs: Any) -> list[Any]:
        self._given.append(query)
        return [[-float(len(query))]]


def returning(made: Any) -> Returns:
    function = Returns(max_retries=0)
    function._made = made
    return function


def run(made: Any, items: list[Any] | None = None, side: str = "source") -> Any:
    return embed(returning(made), items or ["a", "b"], side, ndims=3, device=CPU)


GOOD: dict[str, Callable[[], Any]] = {
    "lists": lambda: ROWS,
    "tuples": lambda: tuple(map(tuple, ROWS)),
    "matrix": lambda: np.array(ROWS),
    "float16": lambda: np.array(ROWS, np.float16),
    "float32": lambda: np.array(ROWS, np.float32),
    "big endian": lambda: np.array(ROWS, ">f8"),
    "fortran": lambda: np.asfortranarray(np.array(ROWS)),
    "int": lambda: np.array(ROWS, np.int8),
    "ints in lists": lambda: [[1, 2, 3], [4, 5, 6]],
    "read only": lambda: pa.array(np.array(ROWS).ravel()).to_numpy().reshape(2, 3),
    "arrays": lambda: [np.array(row) for row in ROWS],
    "mixed": lambda: [np.array(ROWS[0]), ROWS[1]],
    "tensor": lambda: torch.tensor(ROWS),
    "bfloat16": lambda: torch.tensor(ROWS, dtype=torch.bfloat16),
    "with a gradient": lambda: torch.tensor(ROWS, requires_grad=True) * 1,
    "tensors": lambda: [torch.tensor(row) for row in ROWS],
    "tensor and list": lambda: [torch.tensor(ROWS[0]), ROWS[1]],
    "numpy numbers": lambda: [[np.float32(x) for x in row] for row in ROWS],
    "tensor numbers": lambda: [[torch.tensor(x) for x in row] for row in ROWS],
    "arrow": lambda: pa.array(ROWS, pa.list_(pa.float32(), 3)),
    "data frame": lambda: pd.DataFrame(ROWS),
}


@pytest.mark.parametrize("made", GOOD.values(), ids=GOOD.keys())
def test_all_forms_of_vectors_are_taken(made):
    for side in ("source", "query"):
        result = run(made(), side=side)
        assert result.vectors.dtype == torch.float32
        assert not result.vectors.requires_grad
        assert result.vectors.tolist() == ROWS
        assert result.valid.all()
        assert result.errors == {}


BAD: dict[str, tuple[Any, str]] = {
    "none": (None, "must return a list of vectors, got a NoneType"),
    "number": (3.5, "must return a list of vectors, got a float"),
    "generator": ((row for row in ROWS), "must return a list of vectors, got a generator"),
    "too few": (ROWS[:1], "returned 1 vectors for 2 items; it must return one for each"),
    "too many": ([*ROWS, ROWS[0]], "returned 3 vectors for 2 items"),
    "too long": ([[1.0] * 4] * 2, "vector of 4 numbers for item 0; the column wants 3"),
    "a long matrix": (np.ones((2, 4)), "vector of 4 numbers for item 0; the column wants 3"),
    "a long tensor": (torch.ones(2, 4), "vector of 4 numbers for item 0; the column wants 3"),
    "empty": ([[], []], "vector of 0 numbers for item 0"),
    "ragged": ([ROWS[0], [1.0]], "vector of 1 numbers for item 1; the column wants 3"),
    "ragged tensors": ([torch.ones(3), torch.ones(2)], "vector of 2 numbers for item 1"),
    "flat": ([1.0, 2.0], "returned 1.0 for item 0; a vector is a list of 3 numbers"),
    "a flat array": (np.ones(2), "returned .*1.0.* for item 0; a vector is a list of 3 numbers"),
    "a flat tensor": (torch.ones(2), r"returned tensor\(1.\) for item 0; a vector is a list"),
    "deep": (np.ones((2, 3, 1)), "lists within the vector of item 0;"),
    "strings": ([["1", "2", "3"]] * 2, "a vector for item 0 that holds '1'"),
    "array of strings": (np.full((2, 3), "1"), "a vector for item 0 that holds .*'1'"),
    "text": (["abc", "def"], "returned 'abc' for item 0; a vector is a list of 3 numbers"),
    "a hole": ([ROWS[0], [1.0, None, 2.0]], "a vector for item 1 that holds None"),
    "complex": ([[1j, 1.0, 1.0]] * 2, "a vector for item 0 that holds 1j"),
    "complex array": (np.ones((2, 3), complex), "a vector for item 0 that holds"),
    "complex tensor": (torch.ones(2, 3, dtype=torch.complex64), "item 0 that holds"),
    "a set": ({(1.0, 2.0, 3.0), (4.0, 5.0, 6.0)}, "must return a list of vectors, got a set"),
    "a dict": ({"a": 1, "b": 2}, "must return a list of vectors, got a dict"),
    "huge": ([[10**400, 1, 1]] * 2, "a vector for item 0 that holds"),
}


@pytest.mark.parametrize(("made", "message"), BAD.values(), ids=BAD.keys())
def test_what_is_no_vector_is_named(made, message):
    with pytest.raises(EmbeddingError, match=rf"^Returns .*{message}"):
        run(made)


def test_the_item_that_is_named_is_the_callers():
    with pytest.raises(EmbeddingError, match="for item 4; the column wants 3"):
        run([ROWS[0], [1.0]], [None, "a", None, None, "b"])


def test_an_item_without_a_vector_is_recorded():
    result = run([None, ROWS[1], None], ["a", "b", None, "c"])
    assert result.valid.tolist() == [False, True, False, False]
    assert result.vectors[1].tolist() == ROWS[1]
    reason = "Returns returned no vector for it"
    assert result.errors == {0: reason, 3: reason}
    assert run([None, None]).valid.tolist() == [False, False]


def test_null_and_bad_texts_are_never_given_to_a_function():
    function = returning(lambda texts: ROWS[: len(texts)])
    result = embed(function, [None, "a", chr(0xD800), 3, "b"], "source", ndims=3, device=CPU)
    assert function._given == [["a", "b"]]
    assert sorted(result.errors) == [2, 3]
    assert result.valid.tolist() == [False, True, False, False, True]
    embed(function, [None, chr(0xD800)], "source", ndims=3, device=CPU)
    assert len(function._given) == 1


def test_other_functions_get_items_of_any_kind():
    function = PerItem()
    result = embed(function, [b"abc", None, (1, 2), "x"], "source", ndims=1, device=CPU)
    assert result.vectors.flatten().tolist() == [3, 0, 2, 1]
    assert function._given == [[b"abc", (1, 2), "x"]]


def test_queries_go_one_at_a_time_unless_they_are_embedded_as_sources():
    function = PerItem()
    result = embed(function, ["abc", "d"], "query", ndims=1, device=CPU)
    assert result.vectors.flatten().tolist() == [-3, -1]
    assert function._given == ["abc", "d"]
    text = returning(ROWS)
    embed(text, ["abc", "d"], "query", ndims=3, device=CPU)
    assert text._given == [["abc", "d"]]


@pytest.mark.parametrize("made", [[], ROWS, None, 3.0], ids=["none", "two", "null", "number"])
def test_a_query_has_one_vector(made):
    class Wrong(PerItem):
        def compute_query_embeddings(self, query: Any, *args: Any, **kwargs: Any) -> Any:
            return made

    with pytest.raises(EmbeddingError, match=r"Wrong.compute_query_embeddings must return a list"):
        embed(Wrong(), ["a"], "query", ndims=1, device=CPU)


def test_preparing_calls_no_function():
    function = returning(ROWS)
    prepare(function, ["a", "b"], "source")
    assert function._given == []


def test_an_error_of_the_function_reaches_the_caller_unchanged():
    error = KeyError("their own")

    def fail(texts: list[str]) -> Any:
        raise error

    with pytest.raises(KeyError) as caught:
        run(fail)
    assert caught.value is error


# -- what a table makes of vectors that cannot be used


@pytest.mark.parametrize(
    "bad", [[float("nan"), 1.0, 1.0], [float("inf"), 1.0, 1.0], [1e300, 1.0, 1.0]], ids=str
)
def test_not_a_number_is_refused_or_dropped_as_asked(bad, tmp_path):
    get_registry().register("returns")(Returns)
    function = returning(lambda texts: [bad if t == "bad" else ROWS[0] for t in texts])
    config = EmbeddingFunctionConfig(
        source_column="text", vector_column="vector", function=function
    )
    table = connect(tmp_path).create_table(
        "t", schema=pa.schema({"text": pa.utf8()}), embedding_functions=[config]
    )
    rows = [{"text": "good"}, {"text": "bad"}]
    with pytest.raises(BadVectorError, match="[Rr]ow 1"):
        table.add(rows)
    assert table.count_rows() == 0
    table.add(rows, on_bad_vectors="drop")
    assert table.to_arrow()["text"].to_pylist() == ["good"]
    table.add(rows, on_bad_vectors="null")
    assert table.to_arrow()["vector"].to_pylist() == [ROWS[0], ROWS[0], None]
