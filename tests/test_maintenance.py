"""Columns, scalar indexes, compaction and clean-up: the table's index and functions follow."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import lancedb
import lancedb.index
import numpy as np
import pyarrow as pa
import pytest

import gpu_lance
from gpu_lance.db import connect
from gpu_lance.embeddings import TextEmbeddingFunction, fingerprint, get_registry, register
from gpu_lance.errors import (
    BadInputError,
    QueryError,
    SchemaError,
    UnknownColumnError,
    WrongTypeError,
)
from gpu_lance.index import Flat
from gpu_lance.pydantic import LanceModel, Vector
from gpu_lance.table import Table
from gpu_lance.types import Metric

TEXTS = [f"{'a' * (i % 7)}{'b' * (i % 5)}" for i in range(60)]


@pytest.fixture
def table(tmp_path: Path) -> Table:
    @register("upkeep")
    class Letters(TextEmbeddingFunction):
        def generate_embeddings(self, texts: list[str]) -> list[Any]:
            return [[float(t.count("a")), float(t.count("b"))] for t in texts]

        def ndims(self) -> int:
            return 2

    function = get_registry().get("upkeep").create()

    class Row(LanceModel):
        id: int
        text: str = function.SourceField()
        vector: Vector(2) = function.VectorField()
        other: Vector(2)

    made = connect(tmp_path, device="cpu").create_table("t", schema=Row)
    for start in range(0, 60, 20):
        rows = range(start, start + 20)
        made.add([{"id": i, "text": TEXTS[i], "other": [float(i), 1.0]} for i in rows])
    return made


def nearest(table: Table, query: Any, column: str = "vector", **where: str) -> list[int]:
    builder = table.search(query, column).limit(5)
    for condition in where.values():
        builder = builder.where(condition)
    return [row["id"] for row in builder.to_list()]


def brute(query: tuple[float, float], keep: Any = lambda i: True) -> list[int]:
    points = np.array([[t.count("a"), t.count("b")] for t in TEXTS], float)
    distances = ((points - query) ** 2).sum(axis=1)
    return [i for i in np.argsort(distances, kind="stable") if keep(i)][:5]


def test_columns_are_added_by_sql_or_empty(table: Table) -> None:
    before = nearest(table, "aab")
    assert table.add_columns({"twice": "id * 2"}).version == table.version
    table.add_columns(pa.field("note", pa.string()))
    table.add_columns([pa.field("x", pa.int32()), pa.field("y", pa.float32())])
    row = table.search().where("id = 7").select(["twice", "note", "x", "y"]).to_list()[0]
    assert row == {"twice": 14, "note": None, "x": None, "y": None}
    assert nearest(table, "aab") == before == brute((2, 1))
    with pytest.raises(QueryError, match="nope"):
        table.add_columns({"z": "nope + 1"})


def test_columns_are_renamed_and_retyped(table: Table) -> None:
    retyped = {"path": "id", "data_type": pa.int32()}
    table.alter_columns({"path": "other", "rename": "point"}, retyped)
    assert table.schema.field("id").type == pa.int32()
    assert nearest(table, [30.0, 1.0], "point") == [30, 29, 31, 28, 32]
    for change in ({"rename": "words"}, {"data_type": pa.large_string()}):
        for path in ("text", "`text`"):
            with pytest.raises(SchemaError, match="belongs to the embedding function of 'vector'"):
                table.alter_columns({"path": path, **change})
    with pytest.raises(QueryError, match="nope"):
        table.alter_columns({"path": "nope", "rename": "x"})
    table.add([{"id": 60, "text": "aaaaaaa", "point": [0.0, 0.0]}])
    assert nearest(table, "aaaaaaa")[0] == 60


def test_a_vector_column_is_dropped_with_its_function(table: Table) -> None:
    table.create_index("vector", config=Flat(distance_type="cosine"))
    with pytest.raises(SchemaError, match="source of 'vector'"):
        table.drop_columns(["text"])
    with pytest.raises(UnknownColumnError, match="nope"):
        table.drop_columns(["nope"])
    table.drop_columns(["vector"])
    assert table.embedding_functions == {}
    assert fingerprint.read(table.schema.metadata) == {}
    assert nearest(table, [30.0, 1.0], "other") == [30, 29, 31, 28, 32]
    table.add([{"id": 60, "text": "a", "other": [30.0, 1.0]}])
    assert table.search([30.0, 1.0]).limit(2).to_list()[1]["id"] == 60
    theirs = lancedb.connect(str(Path(table.uri).parent)).open_table("t")
    theirs.add([{"id": 61, "text": "a", "other": [30.0, 1.0]}])
    assert nearest(table, [30.0, 1.0], "other")[:3] == [30, 60, 61]
    table.drop_columns(["text", "id"])
    assert table.schema.names == ["other"]


@pytest.mark.parametrize(
    "columns", [["id", "text", "vector", "other"], ["vector", "id.x"], ["other", "vector.item"]]
)
def test_a_drop_that_fails_changes_nothing(table: Table, columns: list[str]) -> None:
    table.create_index("other", config=Flat(distance_type="cosine"))
    before, version = table.schema, table.version
    with pytest.raises(QueryError, match="change cannot be run"):
        table.drop_columns(columns)
    assert table.version == version
    assert table.schema.equals(before, check_metadata=True)
    assert nearest(table, "aab") == brute((2, 1))


def test_the_metric_goes_with_its_column(table: Table) -> None:
    for column in ("vector", "other"):
        table.create_index(column, config=Flat(distance_type="cosine"))
    table.alter_columns({"path": "other", "rename": "point"})
    assert table.default_metric("point") == "cosine"
    table.add_columns(pa.field("other", pa.list_(pa.float32(), 2)))
    assert table.default_metric("other") == "l2"
    table.drop_columns(["vector", "point"])
    table.add_columns(
        pa.schema([(name, pa.list_(pa.float32(), 2)) for name in ("vector", "point")])
    )
    assert table.default_metric("vector") == table.default_metric("point") == "l2"


@pytest.mark.parametrize("name", ["_distance", "_rowid", "", "a.b", "`x`", "id"])
def test_names_that_no_column_can_have(table: Table, name: str) -> None:
    version = table.version
    with pytest.raises(SchemaError):
        table.add_columns({name: "id * 2"})
    with pytest.raises(SchemaError):
        table.add_columns(pa.field(name, pa.int32()))
    with pytest.raises((SchemaError, QueryError)):
        table.alter_columns({"path": "other", "rename": name})
    assert table.version == version


@pytest.mark.parametrize("text", ["id) , (id", "id; drop", "(id", "", "?", 5, None])
def test_expressions_that_would_be_read_by_half(table: Table, text: Any) -> None:
    with pytest.raises(QueryError):
        table.add_columns({"z": text})
    assert table.schema.names == ["id", "text", "vector", "other"]


@pytest.mark.parametrize("given", [None, 5, "x", [("z", "id")], {"z": pa.int32()}])
def test_what_is_no_new_column(table: Table, given: Any) -> None:
    with pytest.raises(ValueError, match="add_columns takes|is SQL text"):
        table.add_columns(given)
    with pytest.raises(ValueError, match="is a dict with path"):
        table.alter_columns("id")  # type: ignore[arg-type]


def test_source_and_vector_go_together(table: Table) -> None:
    table.drop_columns(["vector", "text"])
    assert table.schema.names == ["id", "other"]
    assert len(table) == 60


@pytest.mark.parametrize("kind", ["BTREE", "bitmap"])
def test_a_filter_uses_a_scalar_index(table: Table, kind: str) -> None:
    expected = brute((2, 1), lambda i: 10 <= i < 40)
    assert nearest(table, "aab", where="id >= 10 AND id < 40") == expected
    table.create_scalar_index("id", index_type=kind)
    assert "ScalarIndexQuery" in table.to_lance().scanner(filter="id = 3").explain_plan()
    assert nearest(table, "aab", where="id >= 10 AND id < 40") == expected
    # rows that came after the index was made
    table.add([{"id": 11, "text": "aab", "other": [0.0, 0.0]}])
    assert nearest(table, "aab", where="id = 11")[0] == 11
    assert len(nearest(table, "aab", where="id = 11")) == 2
    table.optimize()
    assert len(nearest(table, "aab", where="id = 11")) == 2
    table.drop_index("id_idx")
    with pytest.raises(BadInputError, match="no index 'id_idx'"):
        table.drop_index("id_idx")


def test_what_cannot_be_indexed(table: Table) -> None:
    with pytest.raises(BadInputError, match="index_type"):
        table.create_scalar_index("id", index_type="HASH")
    with pytest.raises(UnknownColumnError, match="nope"):
        table.create_scalar_index("nope")
    with pytest.raises(BadInputError, match="vector"):
        table.create_scalar_index("vector")


def test_compaction_and_clean_up_change_no_answer(table: Table) -> None:
    table.delete("id % 3 = 0")
    expected = brute((2, 1), lambda i: i % 3)
    assert nearest(table, "aab") == expected
    ids = table.search().with_row_id(True).select(["id"]).to_arrow().sort_by("id")
    assert table.compact_files().fragments_removed >= 3
    assert nearest(table, "aab") == expected
    assert table.search().with_row_id(True).select(["id"]).to_arrow().sort_by("id") == ids
    versions = len(table.list_versions())
    table.tags.create("kept", 2)
    assert table.cleanup_old_versions(timedelta(0)).old_versions > 0
    assert len(table.list_versions()) < versions
    assert nearest(table, "aab") == expected
    table.checkout("kept")
    assert len(table) == 20
    with pytest.raises(ValueError, match="cannot be modified"):
        table.compact_files()


def test_arguments_that_are_none(table: Table) -> None:
    version = table.version
    for nothing in (
        lambda: table.add_columns({}),
        table.alter_columns,
        lambda: table.drop_columns([]),
    ):
        assert nothing().version == version
    for age in (5, timedelta(-1), timedelta.max, "7 days"):
        with pytest.raises(BadInputError, match="age"):
            table.cleanup_old_versions(age)  # type: ignore[arg-type]
        with pytest.raises(BadInputError, match="age"):
            table.optimize(cleanup_older_than=age)  # type: ignore[arg-type]
    with pytest.raises(UnknownColumnError):
        table.create_scalar_index(None)  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match="id.x"):
        table.create_scalar_index("id.x")
    for wrong in ({"rename": 5}, {"data_type": "int32"}, {"nullable": "no"}):
        with pytest.raises(WrongTypeError, match=next(iter(wrong))):
            table.alter_columns({"path": "id", **wrong})
    with pytest.raises(BadInputError, match="no 'name'"):  # Lance's word, which is LanceDB's rename
        table.alter_columns({"path": "id", "name": "a`b"})
    assert table.version == version
    table.create_scalar_index("id")
    with pytest.raises(BadInputError, match="already exists"):
        table.create_scalar_index("id", replace=False)
    table.create_scalar_index("id", replace=True)


def test_indexes_of_lancedb_become_exact_ones(
    table: Table, caplog: pytest.LogCaptureFixture
) -> None:
    table.create_index("vector", config=lancedb.index.IvfPq(distance_type="cosine"))
    assert "IvfPq" in caplog.text
    assert table.default_metric("vector") is Metric.COSINE
    table.create_index(metric="dot", num_partitions=2, num_sub_vectors=1, num_bits=8)
    assert table.default_metric("vector") is Metric.DOT
    table.create_index("l2", vector_column_name="other", index_type="IVF_HNSW_SQ", m=8)
    assert table.default_metric("other") is Metric.L2
    assert nearest(table, [30.0, 1.0], "other") == [30, 29, 31, 28, 32]
    table.create_index("other", metric="cosine")
    assert table.default_metric("other") is Metric.COSINE
    assert table.default_metric("vector") is Metric.DOT
    table.create_index("other")
    assert table.default_metric("other") is Metric.L2
    with pytest.raises(QueryError, match="Full-text"):
        table.create_index("text", config=lancedb.index.FTS())
    with pytest.raises(QueryError, match="hamming"):
        table.create_index("vector", config=lancedb.index.IvfPq(distance_type="hamming"))
    with pytest.raises(TypeError, match="num_particles"):
        table.create_index(num_particles=2)
    for config in (7, lancedb.index, Metric.L2):
        with pytest.raises(BadInputError, match="no kind of index"):
            table.create_index("vector", config=config)
    with pytest.raises(UnknownColumnError, match="'text' holds no vectors"):
        table.create_index("text", config=Flat())


@pytest.mark.parametrize("module", [gpu_lance.index, lancedb.index])
def test_scalar_indexes_by_configuration(table: Table, module: Any) -> None:
    table.create_index("id", config=module.BTree())
    table.create_index("text", config=module.Bitmap(), name="by_text")
    kinds = {index.name: index.index_type for index in table.to_lance().describe_indices()}
    assert {name: kind.upper() for name, kind in kinds.items()} == {
        "id_idx": "BTREE",
        "by_text": "BITMAP",
    }
    table.create_index("id", index_type="BTree", replace=True)
    table.create_index("id")  # LanceDB finds a kind for the column too


def test_double_quotes_name_columns_in_conditions(tmp_path: Path) -> None:
    rows = [
        {
            "id": i,
            "cat": "ab"[i % 2],
            "Camel Case": i,
            "s": {"x": i},
            'a"b': i,
            "vector": [float(i)] * 2,
        }
        for i in range(10)
    ]
    ours = connect(tmp_path, device="cpu").create_table("t", rows)
    theirs = lancedb.connect(str(tmp_path)).open_table("t")
    conditions = {
        "\"cat\" = 'a'": 5,
        '"Camel Case" = 3': 1,
        '"s"."x" = 2 OR s."x" = 4': 2,
        '"cat" = "cat" -- "': 10,
        '"cat" LIKE \'a%\' AND "id" > 2': 3,
        "cat = '\"a\"'": 0,
        "`cat` = 'a'": 5,
    }
    for condition, count in conditions.items():
        assert theirs.count_rows(condition) == count
        assert ours.count_rows(condition) == count, condition
        assert len(ours.search().where(condition).to_list()) == count
    assert ours.count_rows('"a""b" = 3') == 1
    for table in (ours, theirs):
        with pytest.raises(ValueError, match="No field named a"):
            table.count_rows('cat = "a"')
        selected = table.search([1.0, 1.0]).select({"u": '"cat"'}).limit(1).to_list()
        assert selected[0]["u"] == "cat"  # a text, in LanceDB too
    assert ours.update(where='"id" = 4', values={"cat": "z"}).rows_updated == 1
    assert ours.delete("\"cat\" <> 'a'").num_deleted_rows == 6
    assert sorted(row["id"] for row in ours.to_arrow().to_pylist()) == [0, 2, 6, 8]


def test_parameters_of_every_condition(table: Table) -> None:
    assert table.count_rows("text = ? OR id IN ?", ["aab", [1, 2]]) == 4
    name = "x' OR 'x' = 'x"
    assert table.count_rows("text = ?", [name]) == 0
    assert table.delete("text = ?", [name]).num_deleted_rows == 0
    assert table.update("text = ?", {"id": 0}, parameters=[name]).rows_updated == 0
    assert table.delete("id < ?", [10]).num_deleted_rows == 10
    assert table.update("id = ?", {"text": "bbb"}, parameters=[10]).rows_updated == 1
    assert nearest(table, "bbb")[0] == 10
    for call in (table.delete, table.count_rows):
        with pytest.raises(QueryError, match="without a value"):
            call("id = ?")
        with pytest.raises(QueryError, match="1 parameters, and 2 values"):
            call("id = ?", [1, 2])
        with pytest.raises(QueryError, match="list"):
            call("id = ?", "1")


def test_b_trees_of_lancedb_stay_as_they_are(
    table: Table, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = lancedb.connect(str(Path(table.uri).parent)).open_table("t")
    theirs.create_index("id", config=lancedb.index.BTree())
    table.add([{"id": 60 + i, "text": "a", "other": [0.0, 0.0]} for i in range(10)])
    table.optimize()
    (index,) = table.to_lance().describe_indices()
    assert [part.index_version for part in index.segments] == [0]
    assert table.count_rows("id >= 43") == 27
    theirs.checkout_latest()
    theirs.update(where="id = 50", values={"text": "b"})
    theirs.optimize()
    assert table.count_rows("id >= 43") == theirs.count_rows("id >= 43") == 27
    assert "B-tree" not in caplog.text
    table.create_scalar_index("id")
    assert "BITMAP" in caplog.text
