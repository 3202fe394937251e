"""A table's columns may have the names that are used inside, and those of results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpu_lance.db import LanceDBConnection, connect
from gpu_lance.embeddings import TextEmbeddingFunction, get_registry, register
from gpu_lance.pydantic import LanceModel, Vector, pydantic_to_schema
from gpu_lance.query import ColumnOrdering


@pytest.fixture
def db(tmp_path: Path) -> LanceDBConnection:
    return connect(tmp_path, device="cpu")


@pytest.mark.parametrize("name", ["n", "__place", "__row_id", "__query", "query_index"])
def test_a_search_keeps_to_the_tables_column(db: LanceDBConnection, name: str) -> None:
    rows = [{"id": i, name: 10 * i, "vector": [float(i), 0.0]} for i in range(6)]
    table = db.create_table("t", rows)

    def ids(builder: Any) -> list[int]:
        return [row["id"] for row in builder.limit(6).to_list()]

    def search() -> Any:
        return table.search([2.0, 0.0])

    assert ids(search().where(f"{name} >= 20 AND _distance < 5", prefilter=False)) == [2, 3, 4]
    assert ids(search().where(f"{name} >= 20", prefilter=False)) == [2, 3, 4, 5]
    assert ids(search().where("_rowid = 1", prefilter=False)) == [1]
    order = ColumnOrdering(column_name=name, ascending=False)
    assert ids(search().order_by([order])) == [5, 4, 3, 2, 1, 0]
    sums = search().select({"sum": f"{name} + _distance"}).limit(6).to_list()
    assert [row["sum"] for row in sums] == [20, 11, 31, 4, 44, 59]
    both = table.search([[2.0, 0.0], [5.0, 0.0]]).where("_distance < 2", prefilter=False)
    assert [(r["query_index"], r["id"]) for r in both.limit(6).to_list()] == [
        (0, 2), (0, 1), (0, 3), (1, 5), (1, 4),
    ]  # fmt: skip


@pytest.mark.parametrize("prefilter", [True, False])
@pytest.mark.parametrize("name", ["Year", "year", "YEAR", "`Year`"])
def test_a_filter_finds_a_column_in_another_case(
    db: LanceDBConnection, name: str, prefilter: bool
) -> None:
    table = db.create_table("t", [{"Year": i, "vector": [float(i)]} for i in range(4)])
    search = table.search([0.0]).where(f"{name} >= 2", prefilter=prefilter)
    assert [row["Year"] for row in search.to_list()] == [2, 3]


def test_an_update_keeps_a_column_of_an_inner_name(db: LanceDBConnection) -> None:
    @register("length")
    class Length(TextEmbeddingFunction):
        def generate_embeddings(self, texts: list[str]) -> list[Any]:
            return [[float(len(text))] for text in texts]

        def ndims(self) -> int:
            return 1

    function = get_registry().get("length").create()

    class Row(LanceModel):
        text: str = function.SourceField()
        other: str
        vector: Vector(1) = function.VectorField()

    schema = pydantic_to_schema(Row)
    schema = schema.set(1, schema.field("other").with_name("__before_text"))
    config = Row.parse_embedding_functions()
    table = db.create_table("t", schema=schema, embedding_functions=config)
    table.add([{"text": "ab", "__before_text": "kept"}])
    table.update(values_sql={"text": "text || 'c'"})
    assert table.search().to_list() == [{"text": "abc", "__before_text": "kept", "vector": [3.0]}]
