"""Merging rows by key: what is updated, inserted, deleted, embedded and left alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pyarrow as pa
import pytest

from gpu_lance.db import connect
from gpu_lance.embeddings import EmbeddingFunctionConfig, TextEmbeddingFunction
from gpu_lance.embeddings import register as register_function
from gpu_lance.errors import BadVectorError, QueryError, SchemaError
from gpu_lance.table import Table

SCHEMA = pa.schema(
    {
        "id": pa.int64(),
        "text": pa.utf8(),
        "n": pa.int64(),
        "vector": pa.list_(pa.float32(), 1),
    }
)


class Length(TextEmbeddingFunction):
    """The length of a text."""

    seen: ClassVar[list[str]] = []

    def ndims(self) -> int:
        return 1

    def generate_embeddings(self, texts: list[str], *args: Any, **kwargs: Any) -> list[Any]:
        self.seen.extend(texts)
        return [[float(len(text))] for text in texts]


@pytest.fixture
def table() -> Table:
    register_function("length-of-merge")(Length)
    config = EmbeddingFunctionConfig(
        vector_column="vector", source_column="text", function=Length.create()
    )
    table = connect("memory://", device="cpu").create_table(
        "t", schema=SCHEMA, embedding_functions=[config]
    )
    table.add([{"id": i, "text": "a" * i, "n": i} for i in (1, 2, 3)])
    Length.seen.clear()
    return table


def rows(table: Table) -> dict[int, tuple[Any, ...]]:
    found = table.to_arrow().to_pylist()
    return {r["id"]: (r["text"], r["n"], r["vector"] and r["vector"][0]) for r in found}


def test_update_and_insert_embed_the_new_texts(table: Table) -> None:
    merge = table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
    result = merge.execute([{"id": 2, "text": "bbbbb", "n": 20}, {"id": 9, "text": "c", "n": 9}])
    assert (result.num_updated_rows, result.num_inserted_rows, result.num_deleted_rows) == (1, 1, 0)
    assert result.version == table.version == 3
    assert rows(table) == {
        1: ("a", 1, 1.0),
        2: ("bbbbb", 20, 5.0),
        3: ("aaa", 3, 3.0),
        9: ("c", 9, 1.0),
    }
    assert sorted(Length.seen) == ["bbbbb", "c"]
    assert table.search([5.0]).limit(1).to_list()[0]["id"] == 2


def test_columns_that_the_data_lacks_keep_their_values(table: Table) -> None:
    table.merge_insert(["id"]).when_matched_update_all().execute([{"id": 1, "n": 100}])
    assert rows(table)[1] == ("a", 100, 1.0)
    assert Length.seen == []


def test_only_inserting_and_deleting(table: Table) -> None:
    table.merge_insert("id").when_not_matched_insert_all().execute(
        [{"id": 1, "text": "changed", "n": 0}, {"id": 4, "text": "dddd", "n": 4}]
    )
    assert rows(table)[1] == ("a", 1, 1.0) and rows(table)[4] == ("dddd", 4, 4.0)
    result = (
        table.merge_insert("id")
        .when_not_matched_by_source_delete("n < 3")
        .execute([{"id": 1, "text": "a", "n": 1}])
    )
    assert result.num_deleted_rows == 1 and sorted(rows(table)) == [1, 3, 4]


def test_a_condition_on_matched_rows(table: Table) -> None:
    table.merge_insert("id").when_matched_update_all(where="target.n > 1").execute(
        [{"id": 1, "text": "x", "n": 0}, {"id": 2, "text": "x", "n": 0}]
    )
    assert rows(table)[1] == ("a", 1, 1.0) and rows(table)[2] == ("x", 0, 1.0)


def broken() -> Iterator[pa.RecordBatch]:
    yield pa.record_batch({"id": pa.array([1])})
    raise ZeroDivisionError


def test_merges_that_cannot_be_run_change_nothing(table: Table) -> None:
    before = rows(table)
    with pytest.raises(ValueError, match="would do nothing"):
        table.merge_insert("id").execute([{"id": 1}])
    merge = table.merge_insert("id").when_matched_update_all()
    with pytest.raises(SchemaError, match="'id'"):
        merge.execute([{"n": 1}])
    with pytest.raises(SchemaError, match="'nope'"):
        merge.execute([{"id": 1, "nope": 1}])
    with pytest.raises(BadVectorError):
        merge.execute([{"id": 1, "vector": [float("nan")]}])
    with pytest.raises(QueryError):
        table.merge_insert("id").when_matched_update_all(where="a = 1) or (true")
    with pytest.raises(QueryError, match="multiple source rows match the same target row"):
        merge.execute([{"id": 1, "n": 1}, {"id": 1, "n": 2}])
    for condition in ("nope = 1", "target.n <"):
        with pytest.raises(QueryError, match="The merge cannot be run"):
            table.merge_insert("id").when_matched_update_all(where=condition).execute([{"id": 1}])
    with pytest.raises(ZeroDivisionError):
        merge.execute(pa.RecordBatchReader.from_batches(pa.schema({"id": pa.int64()}), broken()))
    assert rows(table) == before and table.version == 2
