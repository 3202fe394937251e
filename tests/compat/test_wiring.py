"""Tables of templates and of several pairs of columns, opened and written by lancedb."""

from __future__ import annotations

import contextlib
import json
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import lancedb
import lancedb.embeddings
import lancedb.pydantic
import pytest

import gpu_lance
import gpu_lance.embeddings
import gpu_lance.pydantic
from gpu_lance.pydantic import LanceModel, Vector

NAME = "compat-wiring"


def letters_of(package: ModuleType) -> Any:
    class Letters(package.embeddings.TextEmbeddingFunction):
        def ndims(self) -> int:
            return 3

        def generate_embeddings(self, texts: list[str]) -> list[list[float]]:
            return [[float(text.count(letter)) for letter in "abc"] for text in texts]

    return Letters


@pytest.fixture(autouse=True)
def registered() -> None:
    for package in (gpu_lance, lancedb):
        package.embeddings.get_registry()._functions.pop(NAME, None)
        package.embeddings.register(NAME)(letters_of(package))


def stored(table: Any) -> list[dict[str, Any]]:
    return json.loads(table.schema.metadata[b"embedding_functions"])


def test_lancedb_keeps_a_template_through_its_own_writes(tmp_path: Path) -> None:
    f = gpu_lance.embeddings.get_registry().get(NAME).create()

    class Doc(LanceModel):
        id: int
        title: str | None = None
        body: str | None = None
        vector: Vector(3) = f.VectorField(template="{title}\n{body}")

    ours = gpu_lance.connect(tmp_path, device="cpu").create_table("t", schema=Doc)
    ours.add([{"id": 1, "title": "a", "body": "bb"}, {"id": 2, "title": "c", "body": None}])
    before = stored(ours)
    theirs = lancedb.connect(tmp_path, read_consistency_interval=timedelta(0)).open_table("t")
    assert theirs.search("abb").limit(1).to_list()[0]["id"] == 1
    assert theirs.embedding_functions["vector"].source_column == "title"

    theirs.add([{"id": 3, "title": "a", "body": "b", "vector": [0.0, 0.0, 9.0]}])
    theirs.update(where="id = 2", values={"body": "cc"})
    theirs.delete("id = 3")
    theirs.merge_insert("id").when_matched_update_all().execute(
        [{"id": 1, "title": "b", "body": "b", "vector": [0.0, 2.0, 0.0]}]
    )
    theirs.add_columns({"more": "id + 1"})
    theirs.optimize()
    # what the page warns of: of a row without a vector it embeds the first column alone
    theirs.add([{"id": 4, "title": "a", "body": "bbb", "more": 5}])
    assert stored(theirs) == before
    again = gpu_lance.connect(tmp_path, device="cpu").open_table("t")
    assert stored(again) == before
    assert again.embedding_functions["vector"].template == "{title}\n{body}"
    again.add([{"id": 5, "title": "a", "body": "ccc", "more": 6}])
    rows = {row["id"]: row["vector"] for row in again.to_arrow().to_pylist()}
    assert rows == {
        1: [0.0, 2.0, 0.0], 2: [0.0, 0.0, 1.0], 4: [1.0, 0.0, 0.0], 5: [1.0, 0.0, 3.0],
    }  # fmt: skip
    again.update(where="id = 4", values={"body": "b"})
    assert again.search("ab").limit(1).to_list()[0]["id"] == 4


def test_pairs_of_one_function_go_both_ways(tmp_path: Path) -> None:
    f = gpu_lance.embeddings.get_registry().get(NAME).create()

    class Doc(LanceModel):
        id: int
        title: str = f.SourceField()
        body: str = f.SourceField()
        title_vector: Vector(3) = f.VectorField()
        body_vector: Vector(3) = f.VectorField()

    ours = gpu_lance.connect(tmp_path, device="cpu").create_table("t", schema=Doc)
    ours.add([{"id": 1, "title": "a", "body": "b"}])
    theirs = lancedb.connect(tmp_path, read_consistency_interval=timedelta(0)).open_table("t")
    theirs.add([{"id": 2, "title": "b", "body": "c"}])
    again = gpu_lance.connect(tmp_path, device="cpu").open_table("t")
    again.add([{"id": 3, "title": "c", "body": "a"}])
    rows = {
        row["id"]: (row["title_vector"], row["body_vector"]) for row in again.to_arrow().to_pylist()
    }
    a, b, c = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]
    assert rows == {1: (a, b), 2: (b, c), 3: (c, a)}
    for table in (theirs, again):
        for letter, by_title, by_body in (("a", 1, 3), ("b", 2, 1), ("c", 3, 2)):
            for column, wanted in (("title_vector", by_title), ("body_vector", by_body)):
                found = table.search(letter, vector_column_name=column).limit(1).to_list()
                assert found[0]["id"] == wanted, (letter, column)


@pytest.mark.parametrize("maker", [gpu_lance, lancedb])
@pytest.mark.parametrize(
    ("there", "given", "opens"),
    [
        (1, 1, True),
        (None, None, True),
        (1, 2, False),
        (1, None, False),
        (None, 1, False),
    ],
)
def test_exist_ok_opens_the_same_tables_in_both(
    maker: ModuleType, there: int | None, given: int | None, opens: bool, tmp_path: Path
) -> None:
    def schema(package: ModuleType, retries: int | None) -> Any:
        class Doc(package.pydantic.LanceModel):
            if retries is None:
                text: str
                vector: package.pydantic.Vector(3)
            else:
                f = package.embeddings.get_registry().get(NAME).create(max_retries=retries)
                text: str = f.SourceField()
                vector: package.pydantic.Vector(3) = f.VectorField()
                del f

        return Doc

    maker.connect(tmp_path).create_table("t", schema=schema(maker, there))
    for opener in (gpu_lance, lancedb):
        db = opener.connect(tmp_path)
        with contextlib.nullcontext() if opens else pytest.raises(ValueError, match="schema|given"):
            assert db.create_table("t", schema=schema(opener, given), exist_ok=True).schema
