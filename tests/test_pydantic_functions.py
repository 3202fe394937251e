"""Models whose vectors are made by embedding functions."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import create_model

import gpu_lance
from gpu_lance.embeddings import TextEmbeddingFunction, get_registry
from gpu_lance.errors import EmbeddingError, SchemaError, SchemaTypeError
from gpu_lance.pydantic import LanceModel, Vector


class Count(TextEmbeddingFunction):
    """How often each of `letters` stands in a text."""

    letters: str = "ab"

    def ndims(self) -> int:
        return len(self.letters)

    def generate_embeddings(self, texts: list[str], *args: Any, **kwargs: Any) -> list[Any]:
        return [[float(text.count(letter)) for letter in self.letters] for text in texts]


@pytest.fixture(autouse=True)
def registered() -> None:
    get_registry().register("count")(Count)


def test_a_function_fills_its_column_and_is_named_in_the_metadata() -> None:
    function = Count.create(letters="abc")

    class Doc(LanceModel):
        id: int
        text: str = function.SourceField()
        vector: Vector(function.ndims()) = function.VectorField()

    schema = Doc.to_arrow_schema()
    assert schema.field("vector").type == pa.list_(pa.float32(), 3)
    assert schema.field("vector").nullable
    configs = Doc.parse_embedding_functions()
    assert [(c.vector_column, c.source_column, c.function) for c in configs] == [
        ("vector", "text", function)
    ]
    db = gpu_lance.connect("memory://", device="cpu")
    table = db.create_table("t", schema=Doc)
    stored = json.loads(table.schema.metadata[b"embedding_functions"])
    assert stored == [
        {
            "name": "count",
            "model": {"letters": "abc"},
            "source_column": "text",
            "vector_column": "vector",
        }
    ]
    table.add([Doc(id=1, text="aab"), Doc(id=2, text="c", vector=[9.0, 9.0, 9.0])])
    table.add([{"id": 3, "text": "cc"}])
    found = {row.id: list(row.vector) for row in table.search().to_pydantic(Doc)}
    assert found == {1: [2.0, 1.0, 0.0], 2: [9.0, 9.0, 9.0], 3: [0.0, 0.0, 2.0]}
    assert table.search("ccc").limit(1).to_pydantic(Doc)[0].id == 3
    assert db.open_table("t").embedding_functions["vector"].function == function


def test_plain_lists_get_the_length_of_their_function() -> None:
    one, two = Count.create(letters="ab"), Count.create(letters="abc")

    class Doc(LanceModel):
        title: str = one.SourceField()
        body: str | None = two.SourceField(default=None)
        title_vector: list[float] = one.VectorField()
        body_vector: list[float] | None = two.VectorField()

    schema = Doc.to_arrow_schema()
    assert schema.field("title_vector").type == pa.list_(pa.float32(), 2)
    assert schema.field("body_vector").type == pa.list_(pa.float32(), 3)
    table = gpu_lance.connect("memory://", device="cpu").create_table("t", schema=Doc)
    table.add([Doc(title="ab", body="cab"), Doc(title="b")])
    assert table.to_arrow().to_pylist() == [
        {"title": "ab", "body": "cab", "title_vector": [1.0, 1.0], "body_vector": [1.0, 1.0, 1.0]},
        {"title": "b", "body": None, "title_vector": [0.0, 1.0], "body_vector": None},
    ]
    found = table.search("b", vector_column_name="title_vector").limit(1).to_pydantic(Doc)
    assert found[0].title == "b"


def test_wirings() -> None:
    f = Count.create()

    def wired(**fields: Any) -> list[tuple[str, str]]:
        kinds = {"s": (str, f.SourceField), "v": (list[float], f.VectorField), "o": (str, None)}
        made = {
            name: (kinds[kind][0], kinds[kind][1]() if kinds[kind][1] else ...)
            for name, kind in fields.items()
        }
        model = create_model("Doc", __base__=LanceModel, **made)
        return [(c.source_column, c.vector_column) for c in model.parse_embedding_functions()]

    assert wired(text="s", vector="v") == [("text", "vector")]
    assert wired(text="s", a="v", b="v") == [("text", "a"), ("text", "b")]
    assert wired(x="s", y="s", a="v", b="v") == [("x", "a"), ("y", "b")]
    assert wired(text="o") == []
    with pytest.raises(SchemaError, match="'vector' of Doc is a VectorField without a source"):
        wired(text="o", vector="v")
    with pytest.raises(SchemaError, match="sources x, y, z and fills a, b"):
        wired(x="s", y="s", z="s", a="v", b="v")


def test_a_vector_field_names_its_source() -> None:
    f, g = Count.create(), Count.create(letters="abc")

    def wired(**fields: Any) -> list[tuple[str, str]]:
        made = {
            name: (str, f.SourceField()) if kind == "s"
            else (str, ...) if kind == "o"
            else (list[float], f.VectorField(**kind))
            for name, kind in fields.items()
        }  # fmt: skip
        model = create_model("Doc", __base__=LanceModel, **made)
        return [(c.source_column, c.vector_column) for c in model.parse_embedding_functions()]

    x, y = {"source": "x"}, {"source": "y"}
    assert wired(x="s", y="s", v=y) == [("y", "v")]
    assert wired(x="s", y="s", a=y, b=x, c=y) == [("y", "a"), ("x", "b"), ("y", "c")]
    assert wired(x="o", y="o", a=y, b=x) == [("y", "a"), ("x", "b")]
    assert wired(x="s", y="o", a=y, b={}) == [("y", "a"), ("x", "b")]
    assert wired(x="s", y="s", a={}, b={}, c={"template": "{x}{y}"}) == [
        ("x", "a"), ("y", "b"), ("x", "c"),
    ]  # fmt: skip
    with pytest.raises(SchemaError, match=r"cannot be told what 'b' is made from.*source='\.\.\.'"):
        wired(x="s", y="s", a=y, b={})
    with pytest.raises(SchemaError, match="made from 'z', which is no field of it; it has x, v"):
        wired(x="s", v={"source": "z"})
    for source in ("v", "w"):
        with pytest.raises(SchemaError, match=f"made from '{source}', which an embedding function"):
            wired(x="s", v={"source": source}, w={})
    with pytest.raises(SchemaError, match="a source .*'x'.* or a template .* not both"):
        f.VectorField(source="x", template="{x}")
    with pytest.raises(SchemaError, match="source is the name of a column, got a list"):
        f.VectorField(source=["x", "y"])

    class Doc(LanceModel):
        text: str = f.SourceField()
        other: list[float] = g.VectorField(source="text")
        vector: list[float] = f.VectorField()

    assert [c.source_column for c in Doc.parse_embedding_functions()] == ["text", "text"]


def test_two_sources_and_two_vectors_of_one_function(tmp_path: Path) -> None:
    f = Count.create()

    class Doc(LanceModel):
        id: int
        x: str | None = f.SourceField(default=None)
        y: str | None = f.SourceField(default=None)
        vx: Vector(2) = f.VectorField()
        vy: Vector(2) = f.VectorField()

    table = gpu_lance.connect(tmp_path, device="cpu").create_table("t", schema=Doc)
    table.add([{"id": 1, "x": "a", "y": "b"}, {"id": 2, "x": "bb", "y": None}])
    again = gpu_lance.connect(tmp_path, device="cpu").open_table("t")
    again.update(where="id = 1", values={"y": "aab"})
    again.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(
        [{"id": 2, "y": "b"}, {"id": 3, "y": "a"}]
    )
    again.add([{"id": 4, "x": "ab", "y": "abb", "vy": [5.0, 5.0]}])
    rows = {r["id"]: (r["vx"], r["vy"]) for r in again.to_arrow().to_pylist()}
    assert rows == {
        1: ([1.0, 0.0], [2.0, 1.0]), 2: ([0.0, 2.0], [0.0, 1.0]),
        3: (None, [1.0, 0.0]), 4: ([1.0, 1.0], [5.0, 5.0]),
    }  # fmt: skip
    for column, wanted in (("vx", 1), ("vy", 3)):
        found = again.search("a", vector_column_name=column).limit(1).to_list()
        assert found[0]["id"] == wanted


def test_a_source_without_a_vector_is_only_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    f = Count.create()

    class Doc(LanceModel):
        text: str = f.SourceField()

    assert Doc.parse_embedding_functions() == []
    assert "nothing is embedded from it" in caplog.text


@pytest.mark.parametrize("ndims", [0, -1, None, 2.5, "3", True])
def test_a_function_that_does_not_know_its_length(ndims: Any) -> None:
    class Odd(Count):
        def ndims(self) -> Any:
            return ndims

    f = Odd.create()
    model = create_model(
        "Doc", __base__=LanceModel, text=(str, f.SourceField()), v=(list[float], f.VectorField())
    )
    with pytest.raises(EmbeddingError, match=r"Odd\.ndims\(\) returned .*at least 1"):
        model.to_arrow_schema()


@pytest.mark.parametrize("annotation", [str, int, list[int], list[str], bytes])
def test_a_function_fills_vectors_only(annotation: Any) -> None:
    f = Count.create()
    model = create_model(
        "Doc", __base__=LanceModel, text=(str, f.SourceField()), v=(annotation, f.VectorField())
    )
    with pytest.raises(SchemaTypeError, match=r"Doc\.v.*list\[float\] or Vector\(dim\)"):
        model.to_arrow_schema()


def test_a_vector_that_its_function_does_not_fit(tmp_path: Path) -> None:
    f = Count.create(letters="abc")

    class Doc(LanceModel):
        text: str = f.SourceField()
        vector: Vector(5) = f.VectorField()

    db = gpu_lance.connect(tmp_path, device="cpu")
    with pytest.raises(SchemaError, match=r"'vector' has 5 dimensions, .* Count have 3"):
        db.create_table("t", schema=Doc)
    assert db.table_names() == []


def test_a_model_needs_no_model_library() -> None:
    """The class is made, and its schema, without a model being loaded."""
    f = get_registry().get("sentence-transformers").create(name="all-MiniLM-L6-v2")

    class Doc(LanceModel):
        text: str = f.SourceField()
        vector: list[float] = f.VectorField()

    before = set(sys.modules)
    assert Doc.to_arrow_schema().field("vector").type.list_size == 384
    assert not {"transformers", "sentence_transformers"} & (set(sys.modules) - before)
