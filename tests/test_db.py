"""Connections: names, creating, opening, dropping, and what is shared."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import gpu_lance
from gpu_lance.db import LanceDBConnection, connect
from gpu_lance.embeddings import EmbeddingFunctionConfig, TextEmbeddingFunction, get_registry
from gpu_lance.errors import (
    BadInputError,
    BadVectorError,
    DeviceError,
    SchemaError,
    TableExistsError,
    TableNotFoundError,
)
from gpu_lance.pydantic import LanceModel, Vector

ROWS = [{"id": 1, "vector": [1.0, 2.0]}, {"id": 2, "vector": [3.0, 4.0]}]


@pytest.fixture(params=["folder", "memory"])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> LanceDBConnection:
    return connect("memory://" if request.param == "memory" else tmp_path / "db", device="cpu")


def test_connect_is_public_and_makes_nothing(tmp_path: Path) -> None:
    db = gpu_lance.connect(tmp_path / "new" / "db")
    assert db.table_names() == [] and len(db) == 0
    assert not (tmp_path / "new").exists()
    assert db.uri == str(tmp_path / "new" / "db")


@pytest.mark.parametrize(
    "kwargs", [{"uri": None}, {"uri": "db://cloud"}, {"uri": "x", "api_key": "k"}]
)
def test_places_that_cannot_be_connected_to(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        connect(**kwargs)


LANCEDB_ONLY: dict[str, Any] = {
    "client_config": {"timeout_config": None},
    "host_override": "http://localhost:1",
    "manifest_enabled": True,
    "namespace_client_impl": "dir",
    "namespace_client_properties": {"root": "x"},
    "namespace_client_pushdown_operations": ["QueryTable"],
    "region": "us-east-1",
    "request_thread_pool": 2,
    "session": object(),
    "sql_host_override": "http://localhost:1",
}


@pytest.mark.parametrize("name", LANCEDB_ONLY)
def test_arguments_of_lancedb_that_mean_nothing_here(name: str, tmp_path: Path) -> None:
    given = {name: LANCEDB_ONLY[name]}
    for cloud in ({"uri": "db://cloud"}, {"uri": "db://cloud", "api_key": "k"}):
        with pytest.raises(BadInputError, match="LanceDB Cloud is not supported"):
            connect(**cloud, **given)
    for uri in (tmp_path, None):
        with pytest.raises(BadInputError, match=f"connect takes no {name}: "):
            connect(uri, **given)
    assert connect(tmp_path, **{name: None}).table_names() == []


def test_an_argument_that_nobody_knows(tmp_path: Path) -> None:
    for uri in (tmp_path, "db://cloud"):
        with pytest.raises(TypeError, match="unexpected keyword argument 'regoin'"):
            connect(uri, regoin="us-east-1")


def test_a_file_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    with pytest.raises(BadInputError, match="is a file"):
        connect(tmp_path / "f")


def test_a_relative_folder_stays_where_it_was(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    db = connect("./db", device="cpu")
    db.create_table("t", ROWS)
    os.makedirs("elsewhere")
    monkeypatch.chdir("elsewhere")
    assert db.table_names() == ["t"] and len(db["t"]) == 2
    assert (tmp_path / "db" / "t.lance").is_dir()


def test_tables_are_created_listed_opened_and_dropped(db: LanceDBConnection) -> None:
    for name in ("b", "a", "c.d-e_f"):
        db.create_table(name, ROWS)
    assert db.table_names() == list(db) == ["a", "b", "c.d-e_f"]
    assert db.table_names(limit=1) == ["a"] and db.table_names("a", 1) == ["b"]
    assert len(db) == 3 and "a" in db and "z" not in db
    assert db["a"].to_arrow()["id"].to_pylist() == [1, 2]
    db.drop_table("a")
    assert "a" not in db
    with pytest.raises(TableNotFoundError, match="Table 'a' was not found"):
        db.open_table("a")
    with pytest.raises(ValueError, match="Table 'a' was not found"):
        db.drop_table("a")
    db.drop_table("a", ignore_missing=True)
    db.drop_all_tables()
    assert db.table_names() == []


def test_a_taken_name(db: LanceDBConnection) -> None:
    db.create_table("t", ROWS)
    with pytest.raises(TableExistsError, match="Table 't' already exists"):
        db.create_table("t", ROWS)
    assert len(db.create_table("t", ROWS, exist_ok=True)) == 2
    assert len(db.create_table("t", schema=db["t"].schema, exist_ok=True)) == 2
    with pytest.raises(SchemaError, match="already exists with the columns"):
        db.create_table("t", schema=pa.schema({"other": pa.int64()}), exist_ok=True)
    other = db.create_table("t", [{"name": "x"}], mode="overwrite")
    assert other.schema.names == ["name"] and db["t"].count_rows() == 1
    with pytest.raises(ValueError, match="mode"):
        db.create_table("t", ROWS, mode="append")


class Scaled(TextEmbeddingFunction):
    factor: float = 1.0
    options: Any = None
    api_key: str | None = None
    batch_size: int | None = None

    @staticmethod
    def sensitive_keys() -> list[str]:
        return ["api_key"]

    def ndims(self) -> int:
        return 2

    def generate_embeddings(self, texts: list[str], *args: Any, **kwargs: Any) -> Any:
        return [[self.factor * len(text), 1.0] for text in texts]


class Other(Scaled):
    pass


@pytest.fixture
def functions() -> Iterator[None]:
    registry = get_registry()
    kept = dict(registry._functions)
    registry.register("db-scaled")(Scaled)
    registry.register("db-other")(Other)
    for name in ("key", "key2"):
        registry.set_var(name, f"sk-of-{name}")
    yield
    registry.reset()
    registry._functions.update(kept)


def described(
    cls: type[Scaled] | None = Scaled,
    source: str = "a",
    template: str | None = None,
    ndims: int = 2,
    **arguments: Any,
) -> pa.Schema:
    """A schema of two texts and a vector that is made of them."""
    schema = pa.schema(
        {"a": pa.string(), "b": pa.string(), "vector": pa.list_(pa.float32(), ndims)}
    )
    if cls is None:
        return schema
    config = EmbeddingFunctionConfig(
        vector_column="vector",
        source_column=source,
        function=cls.create(**arguments),
        template=template,
    )
    return schema.with_metadata(get_registry().get_table_metadata([config]))


@pytest.mark.parametrize(
    ("there", "given", "message"),
    [
        ({"factor": 1.0}, {"factor": 5.0}, "argument factor is 1.0 in the table and 5.0 in"),
        ({}, {"factor": 5.0}, "argument factor is not set in the table and 5.0 in"),
        ({"options": [1]}, {"options": {"n": 1}}, r"options is \[1\] in the table and {'n': 1} in"),
        (
            {"api_key": "$var:key"},
            {"api_key": "$var:key2"},
            r"\$var:key. in the .* .\$var:key2. in",
        ),
        (
            {},
            {"cls": Other},
            "table has 'db-scaled' of column 'a', .* has 'db-other' of column 'a'",
        ),
        ({}, {"source": "b"}, "'db-scaled' of column 'a', .* 'db-scaled' of column 'b'"),
        ({}, {"template": "{a} {b}"}, "of column 'a', .* of the template '{a} {b}'"),
        ({}, {"cls": None}, "the table has 'db-scaled' of column 'a', and what was given has none"),
        ({"cls": None}, {}, "what was given has 'db-scaled' of column 'a', and the table has none"),
        ({"cls": None}, {"cls": None, "ndims": 3}, r"'vector' is .*float>\[2\] in it and .*\[3\]"),
    ],
)
def test_a_table_that_exists_otherwise_than_it_is_described(
    db: LanceDBConnection, functions: None, there: Any, given: Any, message: str
) -> None:
    db.create_table("t", schema=described(**there))
    for data in (None, [{"a": "x", "b": "y"}]):
        with pytest.raises(SchemaError, match=message):
            db.create_table("t", data, described(**given), exist_ok=True)
    for arguments in (there, given):
        db.create_table("t", schema=described(**arguments), mode="overwrite")
        opened = db.create_table("t", schema=described(**arguments), exist_ok=True)
        assert opened.count_rows() == 0


def test_functions_that_are_given_for_a_table_that_exists_hold_for_it(
    db: LanceDBConnection, functions: None
) -> None:
    f = Scaled.create(factor=2.0, options=(1, 2), batch_size=3)

    class Doc(LanceModel):
        a: str = f.SourceField()
        vector: Vector(2) = f.VectorField()  # type: ignore[valid-type]

    db.create_table("t", [{"a": "xx"}], schema=Doc)
    plain = db.open_table("t").embedding_functions["vector"].function
    assert (plain.factor, plain.batch_size) == (2.0, None)
    table = db.create_table("t", [{"a": "x"}], schema=Doc, exist_ok=True)
    assert table.embedding_functions["vector"].function is f
    table.add([{"a": "xxx"}])
    assert table.to_arrow()["vector"].to_pylist() == [[4.0, 1.0], [6.0, 1.0]]
    assert table.embedding_functions["vector"].function is f
    config = EmbeddingFunctionConfig(
        vector_column="vector",
        source_column="a",
        function=Scaled.create(factor=2.0, options=[1, 2], batch_size=5),
    )
    schema = pa.schema({"a": pa.string()})  # the function's column is added to it
    table = db.create_table("t", schema=schema, exist_ok=True, embedding_functions=[config])
    assert table.embedding_functions["vector"].function.batch_size == 5


def test_a_stored_function_that_cannot_be_made_is_compared_too(
    db: LanceDBConnection, functions: None
) -> None:
    db.create_table("t", schema=described(factor=2.0))
    get_registry()._functions.pop("db-scaled")
    table = db.create_table("t", schema=db["t"].schema, exist_ok=True)
    assert list(table.embedding_functions) == ["vector"]
    with pytest.raises(SchemaError, match="what was given has none"):
        db.create_table("t", schema=described(None), exist_ok=True)


def test_data_of_a_table_that_exists_has_its_columns(db: LanceDBConnection) -> None:
    db.create_table("t", ROWS)
    for data, message in [
        ([{"id": 1}], "with the columns id, vector, and what was given has id"),
        ([{**ROWS[0], "x": 1}], "what was given has id, vector, x"),
        ([{**ROWS[0], "id": "1"}], "column 'id' is int64 in it and string"),
    ]:
        with pytest.raises(SchemaError, match=message):
            db.create_table("t", data, exist_ok=True)
    for data in (None, []):
        with pytest.raises(ValueError, match="data"):
            db.create_table("t", data, exist_ok=True)
    # beside a schema they are not looked at
    rows = (row for row in ROWS)
    assert len(db.create_table("t", rows, db["t"].schema, exist_ok=True)) == 2
    assert list(rows) == ROWS


@pytest.mark.parametrize("name", ["", "a/b", "..", ".", "a b", "../x", "a\\b", "ü", None, 3])
def test_names_that_no_table_can_have(db: LanceDBConnection, name: Any) -> None:
    for call in (lambda: db.create_table(name, ROWS), lambda: db.open_table(name)):
        with pytest.raises(BadInputError, match="name for a table"):
            call()
    with pytest.raises(BadInputError, match="name for a table"):
        db.drop_table(name)


def test_a_table_needs_data_or_a_schema(db: LanceDBConnection) -> None:
    with pytest.raises(ValueError, match="data or schema"):
        db.create_table("t")
    with pytest.raises(ValueError, match="no data and no schema"):
        db.create_table("t", [])
    with pytest.raises(TypeError, match="schema must be"):
        db.create_table("t", schema={"a": "int"})
    assert db.table_names() == []


def test_data_that_does_not_fit_makes_no_table(db: LanceDBConnection) -> None:
    with pytest.raises(BadVectorError):
        db.create_table("t", [{"vector": [1.0, 2.0]}, {"vector": [1.0, float("nan")]}])
    assert db.table_names() == [] and "t" not in db
    assert len(db.create_table("t", ROWS)) == 2


def test_a_schema_alone_makes_an_empty_table(db: LanceDBConnection) -> None:
    schema = pa.schema({"id": pa.int64(), "vector": pa.list_(pa.float32(), 2)})
    for given in ({"schema": schema}, {"data": schema}):
        table = db.create_table("t", mode="overwrite", **given)
        assert len(table) == 0 and table.schema == schema
    table.add(ROWS)
    assert len(table) == 2


def test_the_data_of_a_new_table_decides_its_columns(db: LanceDBConnection) -> None:
    table = db.create_table("t", {"n": [1, 2], "vector": np.ones((2, 4), np.float32)})
    assert table.schema.field("vector").type == pa.list_(pa.float32(), 4)
    assert table.version == 1


def test_tables_are_ordinary_lance_datasets(tmp_path: Path) -> None:
    connect(tmp_path, device="cpu").create_table("t", ROWS)
    dataset = lance.dataset(str(tmp_path / "t.lance"))
    assert dataset.count_rows() == 2 and dataset.has_stable_row_ids
    lance.write_dataset(pa.table({"x": [1]}), str(tmp_path / "other.lance"))
    db = connect(tmp_path, device="cpu")
    assert db.table_names() == ["other", "t"] and db["other"].head().to_pylist() == [{"x": 1}]


def test_a_file_uri_is_a_folder(tmp_path: Path) -> None:
    db = connect(f"file://{tmp_path}/db", device="cpu")
    db.create_table("t", ROWS)
    assert (tmp_path / "db" / "t.lance").is_dir() and db.table_names() == ["t"]


def test_handles_of_one_connection_share_the_index(db: LanceDBConnection) -> None:
    first, second = db.create_table("t", ROWS), db.open_table("t")
    assert first.column_index("vector") is second.column_index("vector")
    db.close()
    assert first.column_index("vector").info()["rows"] == 0


def test_a_device_that_is_not_there_is_an_error_when_it_is_used(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    db = connect(tmp_path, device="cuda")
    table = db.create_table("t", ROWS)
    with pytest.raises(DeviceError, match="cuda"):
        _ = table.device


def test_memory_is_not_shared_between_connections() -> None:
    one, two = connect("memory://", device="cpu"), connect("memory://", device="cpu")
    one.create_table("t", ROWS)
    assert "t" not in two
    two.create_table("t", ROWS[:1])
    assert (len(one["t"]), len(two["t"])) == (2, 1)
    one.drop_table("t")
    one.create_table("t", ROWS[:1])
    assert one["t"].version == 1


def test_a_read_interval_is_honoured(tmp_path: Path) -> None:
    connect(tmp_path, device="cpu").create_table("t", ROWS)
    patient = connect(tmp_path, read_consistency_interval=timedelta(hours=1), device="cpu")
    table = patient.open_table("t")
    assert len(table) == 2
    connect(tmp_path, device="cpu")["t"].add(ROWS)
    assert len(table) == 2
    assert len(connect(tmp_path, device="cpu")["t"]) == 4


def test_dropping_a_table_deletes_nothing_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "home" / "t").mkdir(parents=True)
    db = connect(tmp_path / "db")
    db.create_table("t", [{"id": 1}])
    (tmp_path / "db" / ".gpu_lance").symlink_to(tmp_path / "home", target_is_directory=True)
    db.drop_table("t")
    assert (tmp_path / "home" / "t").is_dir()
    assert db.table_names() == []


def test_tables_are_listed_in_pages(tmp_path: Path) -> None:
    db = connect(tmp_path, device="cpu")
    for name in "cabd":
        db.create_table(name, [{"n": 1}])
    assert db.list_tables().tables == ["a", "b", "c", "d"]
    seen, token = [], None
    while True:
        page = db.list_tables(page_token=token, limit=3)
        seen.append(page.tables)
        token = page.page_token
        if token is None:
            break
    assert seen == [["a", "b", "c"], ["d"]]
    assert db.list_tables([], None, 4).page_token is None
    with pytest.raises(ValueError, match="namespace"):
        db.list_tables(["x"])
    for limit in (-1, "a", 1.5):
        for call in (db.list_tables, db.table_names):
            with pytest.raises(ValueError, match="limit"):
                call(limit=limit)
