"""Vectors that are made from several columns, by a template."""

from __future__ import annotations

import datetime as dt
import enum
import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest

import gpu_lance
from gpu_lance.embeddings import EmbeddingFunctionConfig, TextEmbeddingFunction, get_registry
from gpu_lance.embeddings.template import LONGEST, parse
from gpu_lance.errors import BadInputError, SchemaError
from gpu_lance.ingest.template import check, has_text, render
from gpu_lance.pydantic import LanceModel, Vector
from gpu_lance.table import Table


class Seen(TextEmbeddingFunction):
    """How often a, b and c stand in a text; keeps the texts."""

    texts: ClassVar[list[str]] = []

    def ndims(self) -> int:
        return 3

    def generate_embeddings(self, texts: list[str], *args: Any, **kwargs: Any) -> list[Any]:
        self.texts.extend(texts)
        return [[float(text.count(letter)) for letter in "abc"] for text in texts]


@pytest.fixture(autouse=True)
def registered() -> None:
    get_registry().register("seen")(Seen)
    Seen.texts.clear()


@pytest.fixture
def db(tmp_path: Path) -> gpu_lance.db.LanceDBConnection:
    return gpu_lance.connect(tmp_path / "db", device="cpu")


def make(db: Any, template: str = "{title}\n{body}") -> Table:
    function = Seen.create()

    class Doc(LanceModel):
        id: int
        title: str | None = None
        body: str | None = None
        vector: Vector(3) = function.VectorField(template=template)

    return db.create_table("docs", schema=Doc)


def vectors(table: Table) -> dict[int, Any]:
    return {row["id"]: row["vector"] for row in table.to_arrow().to_pylist()}


# ------------------------------------------------------------ what a template is


@pytest.mark.parametrize(
    ("text", "columns", "rendered"),
    [
        ("{a}{b}", ("a", "b"), "12"),
        ("{b}: {a} and {b}", ("b", "a"), "2: 1 and 2"),
        ("{{{a}}} {{b}}", ("a",), "{1} {b}"),
        ("}}{{{a}", ("a",), "}{1"),
        ("%s\t{a}\\n", ("a",), "%s\t1\\n"),
        ("{with space}", ("with space",), "3"),
        ("é{a}你", ("a",), "é1你"),
        ("{__class__}", ("__class__",), "4"),
    ],
)
def test_reading_and_rendering(text: str, columns: tuple[str, ...], rendered: str) -> None:
    batch = pa.record_batch({"a": ["1"], "b": ["2"], "with space": ["3"], "__class__": ["4"]})
    template = parse(text)
    assert template.columns == columns
    assert render(template, batch).to_pylist() == [rendered]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "names no column"),
        ("plain", "names no column"),
        ("{{a}}", "names no column"),
        ("{}", r"has \{\}"),
        ("{a.b}", r"has \{a\.b\}; between braces stands the name of a column and nothing else"),
        ("{a.__class__.__init__.__globals__}", "nothing else"),
        ("{a[0]}", "nothing else"),
        ("{a!r}", r"has \{a!r\}"),
        ("{a:>10}", r"has \{a:>10\}"),
        ("{a:{b}}", r"has \{a:\{b\}\}"),
        ("{a", "cannot be read"),
        ("a}", "cannot be read"),
        ("{a}" + chr(0xD800), "cannot be read"),
        ("{a}" * LONGEST, "has at most 10,000 characters"),
        (7, "got a int"),
        (["{a}"], "got a list"),
        ("{title}" * 9, "names a column at most 8 times, got one that names 'title' 9 times"),
    ],
)
def test_a_template_that_is_none(text: Any, problem: str) -> None:
    with pytest.raises(SchemaError, match=problem):
        Seen.create().VectorField(template=text)
    with pytest.raises(SchemaError, match=problem):
        EmbeddingFunctionConfig(vector_column="v", function=Seen.create(), template=text)


class Color(enum.StrEnum):
    RED = "red"


DAY = dt.date(2024, 2, 29)
NOON = dt.datetime(2024, 2, 29, 12, 30)


@pytest.mark.parametrize(
    ("values", "kind", "text"),
    [
        (["a{b}"], pa.large_utf8(), "a{b}"),
        (["a"], pa.string_view(), "a"),
        ([-3], pa.int8(), "-3"),
        ([2**64 - 1], pa.uint64(), "18446744073709551615"),
        ([0.5], pa.float64(), "0.5"),
        ([np.float16(1.5)], pa.float16(), "1.5"),
        ([True], pa.bool_(), "true"),
        ([DAY], pa.date32(), "2024-02-29"),
        ([NOON], pa.timestamp("s"), "2024-02-29 12:30:00"),
        ([NOON], pa.timestamp("s", "UTC"), "2024-02-29 12:30:00Z"),
        ([dt.time(1, 2, 3)], pa.time32("s"), "01:02:03"),
        (["red"], pa.dictionary(pa.int32(), pa.utf8()), "red"),
    ],
    ids=str,
)
def test_columns_that_have_a_text(values: list[Any], kind: pa.DataType, text: str) -> None:
    column = pa.array([None, *values, None], kind).slice(1)
    batch = pa.record_batch({"a": column})
    assert has_text(kind)
    assert render(parse("<{a}>"), batch).to_pylist() == [f"<{text}>", None]


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.utf8()), pa.list_(pa.float32(), 2), pa.binary(), pa.struct({"a": pa.utf8()})],
    ids=str,
)
def test_columns_that_have_none(kind: pa.DataType) -> None:
    with pytest.raises(SchemaError, match=r"'\{a\}' of column 'v' reads column 'a' of type"):
        check(parse("{a}"), pa.schema({"a": kind, "v": pa.list_(pa.float32(), 3)}), "v")


def test_nulls_and_many_rows_are_rendered_as_python_would() -> None:
    rng = np.random.default_rng(0)
    n = 5_000
    words = np.array(["", "a", "é", "{x}", "long" * 30, None], dtype=object)
    titles, bodies = (words[rng.integers(0, len(words), n)].tolist() for _ in range(2))
    stars = [int(s) if s < 5 else None for s in rng.integers(0, 6, n)]
    batch = pa.record_batch(
        {"title": titles, "body": bodies, "stars": pa.array(stars, pa.int64())}
    ).slice(7)
    wanted = [
        None
        if t is None and b is None and s is None
        else f"{t or ''} ({'' if s is None else s}): {b or ''}"
        for t, b, s in zip(titles[7:], bodies[7:], stars[7:], strict=True)
    ]
    assert None in wanted
    assert render(parse("{title} ({stars}): {body}"), batch).to_pylist() == wanted
    assert len(render(parse("{title} ({stars}): {body}"), batch.slice(0, 0))) == 0


# ---------------------------------------------------------------- in a model


def test_a_template_in_a_model_may_name_marked_fields_too(db: Any) -> None:
    f = Seen.create()

    class Doc(LanceModel):
        color: Color
        day: dt.date
        text: str = f.SourceField()
        vector: Vector(3) = f.VectorField(template="{color} {day} {text}")
        plain: Vector(3) = f.VectorField()

    configs = {c.vector_column: c for c in Doc.parse_embedding_functions()}
    assert configs["vector"].columns == ("color", "day", "text")
    assert configs["vector"].source_column == "color"
    assert configs["plain"].columns == ("text",)
    table = db.create_table("t", schema=Doc)
    table.add([Doc(color=Color.RED, day=DAY, text="aa")])
    assert Seen.texts == ["red 2024-02-29 aa", "aa"]
    (row,) = table.to_arrow().to_pylist()
    assert (row["vector"], row["plain"]) == ([2.0, 0.0, 0.0], [2.0, 0.0, 0.0])
    json.dumps(Doc.model_json_schema(), default=str)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{nope}", r"The template '\{nope\}' of Doc\.vector names 'nope', which is no field"),
        ("{title} {vector}", "names that column itself"),
        ("{title} {other}", "names 'other', which an embedding function fills"),
        ("{title} {tags}", r"reads column 'tags' of type list"),
    ],
)
def test_a_template_that_does_not_fit_its_model(db: Any, template: str, problem: str) -> None:
    f = Seen.create()

    class Doc(LanceModel):
        title: str = f.SourceField()
        tags: list[str]
        other: Vector(3) = f.VectorField()
        vector: Vector(3) = f.VectorField(template=template)

    with pytest.raises(SchemaError, match=problem):
        db.create_table("t", schema=Doc)
    assert db.table_names() == []


# -------------------------------------------------------------- in a table


def test_rows_are_made_from_all_columns(db: Any) -> None:
    table = make(db)
    table.add(
        [
            {"id": 1, "title": "a", "body": "bb"},
            {"id": 2, "title": None, "body": "c"},
            {"id": 3, "title": None, "body": None},
            {"id": 4, "title": "", "body": None},
            {"id": 5, "title": "a", "body": "b", "vector": [9.0, 9.0, 9.0]},
        ]
    )
    table.add([{"id": 6, "body": "ccc"}])
    assert Seen.texts == ["a\nbb", "\nc", "\n", "\nccc"]
    assert vectors(table) == {
        1: [1.0, 2.0, 0.0], 2: [0.0, 0.0, 1.0], 3: None, 4: [0.0, 0.0, 0.0],
        5: [9.0, 9.0, 9.0], 6: [0.0, 0.0, 3.0],
    }  # fmt: skip
    assert table.search("ccc").limit(1).to_list()[0]["id"] == 6
    with pytest.raises(SchemaError, match=r"embedded from the template '\{title\}\\n\{body\}'"):
        table.add([{"id": 7}])


def test_the_template_is_stored_beside_the_model(db: Any) -> None:
    table = make(db)
    (entry,) = json.loads(table.schema.metadata[b"embedding_functions"])
    assert entry == {
        "name": "seen",
        "model": {},
        "source_column": "title",
        "vector_column": "vector",
        "template": "{title}\n{body}",
    }
    again = gpu_lance.connect(db.uri, device="cpu").open_table("docs")
    config = again.embedding_functions["vector"]
    assert (config.template, config.source_column) == ("{title}\n{body}", "title")
    again.add([{"id": 1, "title": "a", "body": "b"}])
    assert vectors(again) == {1: [1.0, 1.0, 0.0]}


@pytest.mark.parametrize("way", ["values", "sql"])
def test_an_update_of_any_column_makes_the_vector_again(db: Any, way: str) -> None:
    table = make(db)
    table.add([{"id": i, "title": "a", "body": "b"} for i in range(3)])
    Seen.texts.clear()

    def update(where: str, **new: str) -> None:
        if way == "values":
            table.update(where=where, values=new)
        else:
            table.update(where=where, values_sql={k: f"'{v}'" for k, v in new.items()})

    update("id = 0", body="cc")
    update("id = 1", title="b", body="b")
    update("id = 2", title="a", body="b")  # as it was
    assert Seen.texts == ["a\ncc", "b\nb"]
    assert vectors(table) == {0: [1.0, 0.0, 2.0], 1: [0.0, 2.0, 0.0], 2: [1.0, 1.0, 0.0]}
    assert table.search("cc").limit(1).to_list()[0]["id"] == 0


def test_an_update_to_null(db: Any) -> None:
    table = make(db)
    table.add([{"id": 1, "title": "a", "body": "b"}])
    table.update(values={"title": None})
    assert vectors(table) == {1: [0.0, 1.0, 0.0]}
    table.update(values={"body": None})
    assert vectors(table) == {1: None}


def test_a_merge_needs_all_columns_or_none(db: Any) -> None:
    table = make(db)
    table.add([{"id": 1, "title": "a", "body": "b"}])

    def merge(*rows: dict[str, Any]) -> None:
        steps = table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
        steps.execute(list(rows))

    merge({"id": 1, "title": "c", "body": "b"}, {"id": 2, "title": "b", "body": None})
    assert vectors(table) == {1: [0.0, 1.0, 1.0], 2: [0.0, 1.0, 0.0]}
    version = table.version
    with pytest.raises(SchemaError, match="made from title, body by a template.* has no body"):
        merge({"id": 1, "title": "a"})
    assert table.version == version
    merge({"id": 1, "title": "a", "vector": [7.0, 7.0, 7.0]})
    assert vectors(table)[1] == [7.0, 7.0, 7.0]


def test_an_overwrite_keeps_the_template(db: Any) -> None:
    table = make(db)
    table.add([{"id": 1, "title": "a", "body": "b"}])
    table.add([{"id": 2, "title": "b", "body": "b"}], mode="overwrite")
    assert vectors(table) == {2: [0.0, 2.0, 0.0]}
    rows = [{"id": 3, "title": "c", "body": "c", "stars": 5}]
    table.add(rows, mode="overwrite")
    assert vectors(table) == {3: [0.0, 0.0, 2.0]}
    table.add([{"id": 4, "title": "a", "body": "c", "stars": 5}])
    assert vectors(table)[4] == [1.0, 0.0, 1.0]
    with pytest.raises(SchemaError, match=r"The template .* names 'body', which is not there"):
        table.add([{"id": 3, "title": "c", "stars": 5, "more": 1}], mode="overwrite")


def test_columns_of_a_template_stay(db: Any) -> None:
    table = make(db)
    table.add([{"id": 1, "title": "a", "body": "b"}])
    table.add_columns({"twice": "id * 2"})
    for name in ("title", "body"):
        with pytest.raises(SchemaError, match="is the source of 'vector'"):
            table.drop_columns([name])
        with pytest.raises(SchemaError, match="belongs to the embedding function of 'vector'"):
            table.alter_columns({"path": name, "rename": "other"})
    table.add([{"id": 2, "title": "b", "body": "b", "twice": 4}])
    assert vectors(table)[2] == [0.0, 2.0, 0.0]
    table.drop_columns(["vector", "body"])
    assert table.embedding_functions == {}


def test_a_dropped_vector_leaves_the_templates_of_others(db: Any) -> None:
    f = Seen.create()

    class Doc(LanceModel):
        a: str
        b: str
        one: Vector(3) = f.VectorField(template="{a}{b}")
        two: Vector(3) = f.VectorField(template="{b} {a}")

    table = db.create_table("t", [Doc(a="a", b="b")])
    table.drop_columns(["one"])
    assert table.embedding_functions["two"].template == "{b} {a}"
    table.add([{"a": "c", "b": "c"}])
    assert Seen.texts[-1] == "c c"


def test_functions_given_to_create_table(db: Any) -> None:
    config = EmbeddingFunctionConfig(
        vector_column="vector", function=Seen.create(), template="{title}/{stars}"
    )
    data = pa.table({"title": ["a", None], "stars": [1, None]})
    table = db.create_table("t", data, embedding_functions=[config])
    assert table.to_arrow()["vector"].to_pylist() == [[1.0, 0.0, 0.0], None]
    # the schema names the functions, and a table is made from nothing else
    copy = db.create_table("copy", schema=table.schema)
    copy.add([{"title": "cc", "stars": 2}])
    assert Seen.texts == ["a/1", "cc/2"]
    wrong = EmbeddingFunctionConfig(
        vector_column="vector", function=Seen.create(), template="{title} {nope}"
    )
    with pytest.raises(SchemaError, match="'nope', which is not there; the columns are title, st"):
        db.create_table("no", data, embedding_functions=[wrong])
    with pytest.raises(SchemaError, match="of column 'title' names that column itself"):
        EmbeddingFunctionConfig(vector_column="title", function=Seen(), template="{title}")
    with pytest.raises(SchemaError, match="source_column is 'stars', and the first column"):
        EmbeddingFunctionConfig(
            vector_column="v", source_column="stars", function=Seen(), template="{title}{stars}"
        )


@pytest.mark.parametrize(
    "template", ["{title.__class__}", "{vector}", "none", 7, {"a": 1}, "{body}", "{title!r}"]
)
def test_a_table_with_a_bad_template_opens(db: Any, template: Any) -> None:
    """What a stranger's table says is not run, and does not keep the table shut."""
    table = make(db)
    table.add([{"id": 1, "title": "a", "body": "b"}])
    (entry,) = json.loads(table.schema.metadata[b"embedding_functions"])
    stored = json.dumps([{**entry, "template": template}])
    table.to_lance().update_schema_metadata({"embedding_functions": stored})
    again = gpu_lance.connect(db.uri, device="cpu").open_table("docs")
    assert again.search([1.0, 1.0, 0.0]).limit(1).to_list()[0]["id"] == 1
    with pytest.raises(SchemaError):
        again.search("a").to_list()
    with pytest.raises(SchemaError):
        again.add([{"id": 2, "title": "a", "body": "b"}])
    again.add([{"id": 2, "vector": [0.0, 0.0, 1.0]}])
    assert json.loads(again.schema.metadata[b"embedding_functions"])[0]["template"] == template


def test_an_error_names_the_template(db: Any) -> None:
    class Picky(Seen):
        def generate_embeddings(self, texts: list[str], *args: Any, **kwargs: Any) -> list[Any]:
            return [None if "bad" in text else [1.0, 1.0, 1.0] for text in texts]

    get_registry().register("picky")(Picky)
    config = EmbeddingFunctionConfig(
        vector_column="vector", function=Picky(), template="{title}: {body}"
    )
    schema = pa.schema({"title": pa.utf8(), "body": pa.utf8()})
    table = db.create_table("t", schema=schema, embedding_functions=[config])
    rows = [{"title": "x", "body": "good"}, {"title": "x", "body": "bad"}]
    with pytest.raises(BadInputError, match=r"Row 1, the template '\{title\}: \{body\}' cannot be"):
        table.add(rows)
    table.add(rows, on_bad_vectors="drop")
    assert table.to_arrow()["body"].to_pylist() == ["good"]


def test_a_long_column_goes_in_bounded_batches(db: Any) -> None:
    table = make(db)
    n = 20_000
    table.add({"id": range(n), "title": ["a"] * n, "body": ["b" * (i % 3) for i in range(n)]})
    stored = table.to_arrow()
    found = np.stack(stored["vector"].to_numpy())
    assert found[:, 0].tolist() == [1.0] * n
    assert found[:, 1].tolist() == [float(i % 3) for i in range(n)]
