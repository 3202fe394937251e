"""Bad input through the public API: an error that says what to do, and a table left as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import gpu_lance
from gpu_lance.db import LanceDBConnection
from gpu_lance.embeddings import EmbeddingFunctionConfig, TextEmbeddingFunction, get_registry
from gpu_lance.errors import (
    BadInputError,
    BadVectorError,
    EmbeddingError,
    GpuLanceError,
    QueryError,
    SchemaError,
    UnknownProviderError,
    UnsupportedDataError,
)
from gpu_lance.pydantic import LanceModel, Vector
from gpu_lance.table import Table

NAN, INF = float("nan"), float("inf")
SCHEMA = pa.schema({"id": pa.int64(), "text": pa.utf8(), "vector": pa.list_(pa.float32(), 3)})


class Wayward(TextEmbeddingFunction):
    """(length, 1, 2) of a text; for texts with "bad" in them whatever `fault` says."""

    fault: str = "none"

    def ndims(self) -> int:
        return 3

    def generate_embeddings(self, texts: list[str], *args: Any, **kwargs: Any) -> Any:
        made: list[Any] = [[float(len(text)), 1.0, 2.0] for text in texts]
        if not any("bad" in text for text in texts):
            return made
        whole = {
            "too few": made[:-1],
            "too many": made + made,
            "nothing": None,
            "a number": 5,
            "a generator": iter(made),
            "flat": [1.0] * len(made),
            "deep": np.zeros((len(made), 1, 3)),
            "complex": np.zeros((len(made), 3), complex),
        }
        if self.fault in whole:
            return whole[self.fault]
        if self.fault == "raises":
            raise LookupError("the model has gone")
        one = {
            "none": [7.0] * 3,
            "no vector": None,
            "nan": [NAN, 0.0, 0.0],
            "infinite": [0.0, INF, 0.0],
            "beyond float32": [0.0, 1e300, 0.0],
            "long": [0.0] * 4,
            "short": [0.0] * 2,
            "text": ["a", "b", "c"],
            "digits": ["1", "2", "3"],
        }[self.fault]
        return [one if "bad" in text else vector for text, vector in zip(texts, made, strict=True)]


@pytest.fixture(autouse=True)
def registered() -> None:
    get_registry().register("wayward")(Wayward)


@pytest.fixture
def db() -> LanceDBConnection:
    return gpu_lance.connect("memory://", device="cpu")


def make(db: LanceDBConnection, fault: str = "none", rows: int = 2) -> Table:
    table = db.create_table("t", schema=SCHEMA, embedding_functions=[config(fault)])
    if rows:
        table.add([{"id": i, "text": "x" * i} for i in range(rows)])
    return table


def config(
    fault: str = "none", vector: str = "vector", source: str = "text", kind: Any = Wayward
) -> Any:
    function = kind.create(fault=fault)
    return EmbeddingFunctionConfig(vector_column=vector, source_column=source, function=function)


@pytest.fixture
def table(db: LanceDBConnection) -> Table:
    return make(db)


def refused(
    table: Table, call: Callable[[], Any], error: type[BaseException], message: str
) -> None:
    """The call raises, says what the message says, and changes nothing."""
    before = table.version, table.to_arrow()
    with pytest.raises(error, match=message):
        call()
    assert (table.version, table.to_arrow()) == before


# -------------------------------------------------------------------- data


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([{"id": 9, "text": "a", "vector": [1.0, 2.0]}], BadVectorError, "2 dimensions inst"),
        ({"id": [9], "vector": np.ones((1, 5))}, BadVectorError, "5 dimensions instead of 3"),
        ([{"id": 9, "vector": [1.0, NAN, 0.0]}], BadVectorError, "row 0 has a NaN"),
        ([{"id": 9, "vector": [1.0, INF, 0.0]}], BadVectorError, "infinite"),
        ([{"id": 9, "vector": [1.0, None, 0.0]}], BadVectorError, "NaN|null"),
        ([{"id": 9, "vector": ["a", "b", "c"]}], ValueError, "Row 0, column 'vector'"),
        ([{"id": 9, "vector": "abc"}], ValueError, "'vector'"),
        ([{"id": 9, "text": "a", "note": 1}], SchemaError, "no column 'note'; it has 'id', 'text'"),
        ([{"id": "nine", "text": "a"}], BadInputError, "Row 0, column 'id': 'nine'"),
        ([{"id": 1.5, "text": "a"}], BadInputError, r"Row 0, column 'id': 1\.5"),
        ([{"id": 2**70, "text": "a"}], BadInputError, "Row 0, column 'id'"),
        ([{"id": 9, "text": ["a"]}], ValueError, "'text'"),
        ([{"id": 9, "text": {"a": 1}}], ValueError, "'text'"),
        ([{"id": 9, "text": "lone \udfff"}], BadInputError, "Row 0, column 'text'.*surrogate"),
        ([{"id": 9}], SchemaError, "'vector' is embedded from 'text', and the data has neither"),
        ([{}], SchemaError, "'text'"),
        ([{1: 2}], BadInputError, "Row 0: column names are strings, got 1"),
        ([None], UnsupportedDataError, "Row 0 is of type NoneType"),
        ([{"id": 9, "text": "a"}, 5], UnsupportedDataError, "Row 1 is of type int"),
        ([[1, 2]], UnsupportedDataError, "Row 0 is of type int"),
        (None, UnsupportedDataError, "NoneType"),
        ("text", UnsupportedDataError, "str"),
        (b"text", UnsupportedDataError, "bytes"),
        (5, UnsupportedDataError, "int"),
        (np.ones((2, 3)), UnsupportedDataError, "Name its column"),
        (torch.ones(2, 3), UnsupportedDataError, "Name its column"),
        ({"id": 9, "text": "a"}, BadInputError, r"A single row goes into a list: \[row\]"),
        ({"id": [1, 2], "text": ["a"]}, BadInputError, "different lengths: 'id' 2, 'text' 1"),
        (
            pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["text", "text"]),
            SchemaError,
            "more than one column 'text'",
        ),
    ],
)
def test_data_that_cannot_be_added(
    table: Table, data: Any, error: type[Exception], message: str
) -> None:
    assert issubclass(error, ValueError | TypeError)  # what LanceDB's callers catch
    refused(table, lambda: table.add(data), error, message)


@pytest.mark.parametrize("nothing", [[], {}, iter(()), pa.table({"id": pa.array([], pa.int64())})])
def test_no_rows_make_no_version(table: Table, nothing: Any) -> None:
    before = table.version
    assert table.add(nothing).version == before == table.version


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"on_bad_vectors": "ignore"}, "on_bad_vectors is 'ignore'; .*'error', 'drop'"),
        ({"on_bad_vectors": None}, "on_bad_vectors is None"),
        ({"mode": "append!"}, "mode is 'append!'"),
    ],
)
def test_arguments_that_mean_nothing(table: Table, kwargs: dict[str, Any], message: str) -> None:
    refused(table, lambda: table.add([{"id": 9, "text": "a"}], **kwargs), BadInputError, message)


def test_text_of_any_length_is_embedded(table: Table) -> None:
    table.add([{"id": 8, "text": ""}, {"id": 9, "text": "ü" * 2**20}])
    found = {row["id"]: row["vector"][0] for row in table.to_arrow().to_pylist()}
    assert found == {0: 0.0, 1: 1.0, 8: 0.0, 9: float(2**20)}
    assert table.search("ü" * 2**20).limit(1).to_list()[0]["id"] == 9
    assert table.search("").limit(1).to_list()[0]["_distance"] == 0.0


@pytest.mark.parametrize("kind", ["rows", "batches", "lists"])
def test_a_source_that_breaks_half_way_writes_nothing(table: Table, kind: str) -> None:
    def data() -> Iterator[Any]:
        for i in range(20_000 if kind == "rows" else 3):
            if i == (15_000 if kind == "rows" else 2):
                raise OSError("the disk has a conflict with its cable")
            row = {"id": i, "text": "x"}
            yield {"rows": row, "lists": [row], "batches": pa.RecordBatch.from_pylist([row])}[kind]

    refused(table, lambda: table.add(data()), OSError, "^the disk has a conflict with its cable$")


def test_a_source_that_breaks_makes_no_table(db: LanceDBConnection) -> None:
    def data() -> Iterator[Any]:
        yield {"id": 1}
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        db.create_table("new", data())
    assert "new" not in db
    assert len(db.create_table("new", [{"id": 1}])) == 1


# ----------------------------------------------------------------- queries


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        ([1.0, 2.0], QueryError, "2 dimensions and column 'vector' has 3"),
        (np.zeros((2, 4)), QueryError, "4 dimensions and column 'vector' has 3"),
        ([[1.0, 2.0, 3.0], [1.0]], QueryError, "Query 1 has 1 values and query 0 has 3"),
        ([1.0, NAN, 0.0], QueryError, "Query 0 holds nan at position 1"),
        (np.array([[0, 0, 0], [0, 0, INF]]), QueryError, "Query 1 holds inf at position 2"),
        ([0.0, 0.0, 1e300], QueryError, "inf"),
        ([], QueryError, "empty"),
        (np.empty((0, 3)), QueryError, "empty"),
        ("lone \ud800", BadInputError, "Query 0 has a lone surrogate at character 5"),
        (["a", "lone \ud800"], BadInputError, "Query 1"),
        (["a", None], QueryError, "Query 1 is None"),
        (["a", [1.0, 2.0, 3.0]], QueryError, "Query 1"),
        (5, TypeError, "int"),
        ({"a": 1}, TypeError, "dict"),
        (np.zeros(3, complex), QueryError, "complex"),
        ([True, "a", 2], QueryError, "no number"),
    ],
)
def test_queries_that_cannot_be_run(
    table: Table, query: Any, error: type[Exception], message: str
) -> None:
    refused(table, lambda: table.search(query).to_list(), error, message)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda q: q.select(["nope"]), "no column 'nope' to select; the table has id, text"),
        (lambda q: q.where("nope = 1"), "nope"),
        (lambda q: q.where("id = "), "filter"),
        (lambda q: q.where("id = 1; DROP TABLE t"), "';'"),
        (lambda q: q.where("id = 1) OR (true"), "parenthesis"),
        (lambda q: q.where(""), "filter is empty"),
        (lambda q: q.where(7), "SQL text, got a int"),
        (lambda q: q.where("text = '\ud800'"), "surrogate"),
        (lambda q: q.limit(0), "at least 1; got 0"),
        (lambda q: q.limit(-1), "at least 1; got -1"),
        (lambda q: q.limit(1.5), "limit is 1.5; it must be a whole number"),
        (lambda q: q.limit("ten"), "limit is a str"),
        (lambda q: q.distance_type("manhattan"), "'l2', 'cosine', 'dot'"),
    ],
)
def test_settings_that_cannot_be_met(table: Table, ask: Callable[[Any], Any], message: str) -> None:
    refused(table, lambda: ask(table.search("x")).to_list(), ValueError, message)


def test_columns_that_cannot_be_searched(db: LanceDBConnection, table: Table) -> None:
    with pytest.raises(QueryError, match="no column 'nope' to search; the table has id, text"):
        table.search([1.0, 2.0, 3.0], vector_column_name="nope").to_list()
    with pytest.raises(QueryError, match="'text' is string, which holds no vectors"):
        table.search([1.0, 2.0, 3.0], vector_column_name="text").to_list()
    two = db.create_table("two", [{"a_vector": [1.0, 2.0], "b_vector": [3.0, 4.0]}])
    with pytest.raises(ValueError, match="more than one vector column, 'a_vector' and 'b_vector'"):
        two.search([1.0, 2.0]).to_list()
    found = two.search([1.0, 2.0], vector_column_name="b_vector").to_list()
    assert found[0]["_distance"] == 8.0
    with pytest.raises(ValueError, match="no vector column"):
        db.create_table("none", [{"a": 1}]).search([1.0]).to_list()


@pytest.mark.parametrize("k", [2, 100, 10**12, 10**30])
def test_a_limit_beyond_the_table_gives_the_table(table: Table, k: int) -> None:
    assert [row["id"] for row in table.search("x").limit(k).to_list()] == [1, 0]


@pytest.mark.parametrize("query", ["x", [1.0, 2.0, 3.0], [[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]])
def test_an_empty_table_has_no_rows_and_all_columns(db: LanceDBConnection, query: Any) -> None:
    search = make(db, rows=0).search(query).with_row_id()
    found = search.to_arrow()
    assert (found.num_rows, search.to_list(), len(search.to_pandas())) == (0, [], 0)
    batch = ["query_index"] if isinstance(query, list) and isinstance(query[0], list) else []
    assert found.schema.names == [*batch, "id", "text", "vector", "_distance", "_rowid"]
    assert found.schema.field("vector").type == pa.list_(pa.float32(), 3)
    assert found.schema.field("_distance").type == pa.float32()


# --------------------------------------------------------------- functions


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("too few", "Wayward returned 1 vectors for 2 items"),
        ("too many", "Wayward returned 4 vectors for 2 items"),
        ("nothing", "must return a list of vectors, got a NoneType"),
        ("a number", "must return a list of vectors, got a int"),
        ("a generator", "must return a list of vectors, got a list_iterator"),
        ("flat", "returned 1.0 for item 0"),
        ("deep", "returned lists within the vector of item 0"),
        ("complex", "for item 0 that holds"),
        ("long", "a vector of 4 numbers for item 1; the column wants 3"),
        ("short", "a vector of 2 numbers for item 1; the column wants 3"),
        ("text", "for item 1 that holds 'a'"),
        ("digits", "for item 1 that holds '1'"),
    ],
)
@pytest.mark.parametrize("policy", ["error", "null"])
def test_a_function_that_breaks_its_contract(
    db: LanceDBConnection, fault: str, message: str, policy: str
) -> None:
    table = make(db, fault)
    rows = [{"id": 8, "text": "fine"}, {"id": 9, "text": "bad"}]
    refused(table, lambda: table.add(rows, on_bad_vectors=policy), EmbeddingError, message)
    refused(table, lambda: table.search(["fine", "bad"]).to_list(), EmbeddingError, message)
    assert table.search("fine").limit(1).to_list()[0]["_distance"] == 9.0  # and it still works


def test_an_error_of_the_function_is_the_callers(db: LanceDBConnection) -> None:
    table = make(db, "raises")
    rows = [{"id": 9, "text": "bad"}]
    refused(table, lambda: table.add(rows), LookupError, "the model has gone")
    refused(table, lambda: table.update(values={"text": "bad"}), LookupError, "the model has gone")
    refused(table, lambda: table.search("bad").to_list(), LookupError, "the model has gone")


ROWS = [
    {"id": 1, "text": "fine"},
    {"id": 2, "text": "bad"},
    {"id": 3, "text": None},
    {"id": 4, "text": "given", "vector": [NAN, 0.0, 0.0]},
    {"id": 5, "text": "given", "vector": [1.0]},
    {"id": 6, "text": "given", "vector": [1.0, 2.0, 3.0]},
]
KEPT: dict[int, Any] = {1: [4.0, 1.0, 2.0], 3: None, 6: [1.0, 2.0, 3.0]}


@pytest.mark.parametrize("fault", ["no vector", "nan", "infinite", "beyond float32"])
@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("drop", KEPT),
        ("fill", {**KEPT, 2: [0.5] * 3, 4: [0.5] * 3, 5: [0.5] * 3}),
        ("null", {**KEPT, 2: None, 4: None, 5: None}),
    ],
)
def test_failed_and_bad_vectors_go_where_the_caller_says(
    db: LanceDBConnection, fault: str, policy: str, expected: dict[int, Any]
) -> None:
    table = make(db, fault, rows=0)
    refused(table, lambda: table.add(ROWS), BadVectorError, "row 3 has a NaN, row 4 has 1 dim")
    refused(table, lambda: table.add(ROWS[:3]), BadInputError, "[Rr]ow 1")
    table.add(ROWS, on_bad_vectors=policy, fill_value=0.5)
    assert {row["id"]: row["vector"] for row in table.to_arrow().to_pylist()} == expected
    with_vector = sorted(i for i, vector in expected.items() if vector is not None)
    found = table.search([0.0, 0.0, 0.0]).limit(10).to_list()
    assert sorted(row["id"] for row in found) == with_vector


@pytest.mark.parametrize("value", [NAN, INF, 1e300, "x", None, [1.0, 2.0, 3.0]])
@pytest.mark.parametrize("row", [{"id": 9, "text": "bad"}, {"id": 9, "vector": [1.0]}])
def test_a_fill_value_that_is_bad_itself(db: LanceDBConnection, value: Any, row: Any) -> None:
    table = make(db, "no vector")
    refused(
        table,
        lambda: table.add([row], on_bad_vectors="fill", fill_value=value),
        BadVectorError,
        "fill_value is",
    )


def test_functions_that_do_not_fit_the_columns(db: LanceDBConnection) -> None:
    class NoLength(Wayward):
        def ndims(self) -> Any:
            return None

    get_registry().register("no-length")(NoLength)
    text = pa.schema({"id": pa.int64(), "text": pa.utf8()})
    wide = text.append(pa.field("vector", pa.list_(pa.float32(), 5)))
    cases: list[tuple[pa.Schema, Any, str]] = [
        (text, config(source="nope"), "reads column 'nope', which is not there; .* id, text"),
        (text, config(vector="id"), "'id' has type int64"),
        (wide, config(), "'vector' has 5 dimensions, .* Wayward have 3"),
        (SCHEMA, config(source="vector"), "cannot be made from itself"),
        (text, config(kind=NoLength), "returned None"),
    ]
    for schema, wanted, message in cases:
        with pytest.raises((SchemaError, EmbeddingError), match=message):
            db.create_table("t", schema=schema, embedding_functions=[wanted])
    for junk in (config(), [Wayward.create()], "wayward"):
        with pytest.raises(UnsupportedDataError, match="list of EmbeddingFunctionConfig"):
            db.create_table("t", schema=text, embedding_functions=junk)
    assert db.table_names() == []


def test_a_model_whose_source_field_is_missing(db: LanceDBConnection) -> None:
    function = Wayward.create()

    class Row(LanceModel):
        text: str
        vector: Vector(3) = function.VectorField()

    with pytest.raises(SchemaError, match="VectorField without a source"):
        db.create_table("t", schema=Row)
    assert db.table_names() == []


def test_providers_that_are_not_there(db: LanceDBConnection) -> None:
    with pytest.raises(KeyError, match="Did you mean 'sentence-transformers'"):
        get_registry().get("sentence-transformer")

    class Unregistered(Wayward):
        pass

    with pytest.raises(UnknownProviderError, match="decorate the class with @register"):
        db.create_table("t", [{"text": "a"}], embedding_functions=[config(kind=Unregistered)])
    assert db.table_names() == []


@pytest.mark.parametrize("version", [99, -1, 10**30, "no-tag", None])
def test_versions_that_are_not_there(table: Table, version: Any) -> None:
    refused(table, lambda: table.checkout(version), BadInputError, "has no version")
    refused(table, lambda: table.restore(version), BadInputError, "version")


# ----------------------------------------------------------------- threads


def test_threads_that_add_at_once_lose_nothing(tmp_path: Any) -> None:
    table = make(gpu_lance.connect(tmp_path, device="cpu"), rows=0)
    failed: list[BaseException] = []
    start = threading.Barrier(3)

    def work(first: int) -> None:
        start.wait()
        try:
            for i in range(first, first + 5):
                table.add([{"id": i, "text": "x" * i}])
                with pytest.raises(GpuLanceError):
                    table.add([{"id": i, "vector": [1.0]}])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n * 10 + 1,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    ids = [n * 10 + 1 + i for n in range(3) for i in range(5)]
    found = {row["id"]: row["vector"][0] for row in table.to_arrow().to_pylist()}
    assert (found, table.version) == ({i: float(i) for i in ids}, 16)
    for i in ids:
        assert table.search("x" * i).limit(1).to_list()[0]["id"] == i
