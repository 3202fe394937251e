"""The same class definitions give the same Arrow schemas here and in LanceDB."""

from __future__ import annotations

import enum
import typing
from datetime import date, datetime
from typing import Annotated, Any, List, Literal, Optional, Tuple, Union  # noqa: UP035

import numpy as np
import pyarrow as pa
import pytest
from pydantic import BaseModel, Field, conlist, create_model

import gpu_lance.embeddings as our_embeddings
import gpu_lance.pydantic as ours
from gpu_lance.errors import SchemaTypeError

theirs = pytest.importorskip("lancedb.pydantic")
their_embeddings = pytest.importorskip("lancedb.embeddings")


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class TextColor(str, enum.Enum):  # noqa: UP042  (the older way, still in use)
    RED = "red"


class Rank(enum.IntEnum):
    LOW = 1


class Ratio(enum.Enum):
    HALF = 0.5


class Author(BaseModel):
    name: str
    born: Optional[date] = None  # noqa: UP045
    tags: list[str] = []


class Book(BaseModel):
    author: Author
    others: list[Author]
    main: Author | None = None


EQUAL = {
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "bytes": bytes,
    "date": date,
    "datetime": datetime,
    "datetime with a zone": (datetime, Field(json_schema_extra={"tz": "Europe/Berlin"})),
    "list of datetime with a zone": (list[datetime], Field(json_schema_extra={"tz": "UTC"})),
    "optional datetime with a zone": (datetime | None, Field(json_schema_extra={"tz": "UTC"})),
    "other extras": (datetime, Field(json_schema_extra={"note": "x"})),
    "list": list[int],
    "typing.List": List[str],  # noqa: UP006
    "typing.Tuple": Tuple[float, ...],  # noqa: UP006
    "tuple": tuple[int, ...],
    "pair": tuple[float, float],
    "list of lists": list[list[int]],
    "list of optional": list[int | None],
    "list of Optional": list[Optional[str]],  # noqa: UP045
    "optional list of optional": list[int | None] | None,
    "Optional": Optional[int],  # noqa: UP045
    "Union with None": Union[None, str],  # noqa: UP007
    "pipe": bytes | None,
    "constrained": Annotated[int, Field(ge=0)],
    "conlist": conlist(float, min_length=2, max_length=2),
    "default": (int, 3),
    "alias": (int, Field(alias="other")),
    "struct": Author,
    "optional struct": Author | None,
    "struct in struct": Book,
    "list of structs": list[Author],
    "str enum": Color,
    "str-mixin enum": TextColor,
    "int enum": Rank,
    "float enum": Ratio,
    "optional enum": Color | None,
    "list of enums": list[Color],
}

VECTORS = {
    "vector": lambda lib: lib.Vector(3),
    "float16 vector": lambda lib: lib.Vector(3, pa.float16()),
    "uint8 vector": lambda lib: lib.Vector(16, value_type=pa.uint8()),
    "vector without nulls": lambda lib: lib.Vector(3, nullable=False),
    "optional vector without nulls": lambda lib: Optional[lib.Vector(3, nullable=False)],  # noqa: UP045
    "optional vector": lambda lib: Optional[lib.Vector(3)],  # noqa: UP045
    "list of vectors": lambda lib: list[lib.Vector(3)],
    "multivector": lambda lib: lib.MultiVector(3),
    "float64 multivector without nulls": lambda lib: lib.MultiVector(3, pa.float64(), False),
    "optional multivector": lambda lib: Optional[lib.MultiVector(3)],  # noqa: UP045
}


def schema_of(library, annotation):
    field = annotation if isinstance(annotation, tuple) else (annotation, ...)
    return create_model("Row", __base__=library.LanceModel, column=field).to_arrow_schema()


@pytest.mark.parametrize("annotation", EQUAL.values(), ids=EQUAL.keys())
def test_equal_schemas(annotation):
    assert schema_of(ours, annotation).equals(schema_of(theirs, annotation), check_metadata=True)


@pytest.mark.parametrize("make", VECTORS.values(), ids=VECTORS.keys())
def test_equal_vector_schemas(make):
    mine = schema_of(ours, make(ours))
    assert mine.equals(schema_of(theirs, make(theirs)), check_metadata=True)


def test_a_type_that_differs_is_seen_by_this_comparison():
    assert not schema_of(ours, int).equals(schema_of(theirs, float))
    assert not schema_of(ours, int).equals(schema_of(theirs, int | None))


@pytest.mark.parametrize(
    "annotation",
    [set[int], dict[str, int], list, List, tuple, Any, int | str, object, complex, np.ndarray],  # noqa: UP006
    ids=str,
)
def test_both_refuse(annotation):
    def model(library):
        config = {"arbitrary_types_allowed": True}
        return type(
            "Row",
            (library.LanceModel,),
            {"__annotations__": {"column": annotation}, "model_config": config},
        )

    with pytest.raises(TypeError):
        model(theirs).to_arrow_schema()
    with pytest.raises(SchemaTypeError, match=r"'Row\.column'"):
        model(ours).to_arrow_schema()


BEYOND = {
    "a Literal": Literal["a", "b"],
    "constrained items": list[Annotated[int, Field(ge=0)]],
}


@pytest.mark.parametrize("annotation", BEYOND.values(), ids=BEYOND.keys())
def test_what_only_we_take(annotation):
    with pytest.raises(TypeError):
        schema_of(theirs, annotation)
    assert schema_of(ours, annotation).names == ["column"]


class Mixed(enum.Enum):
    TEXT = "a"
    NUMBER = 1


# lancedb makes a type that cannot hold the values: the first item's, or text
@pytest.mark.parametrize("annotation", [tuple[int, str], Mixed], ids=str)
def test_what_only_lancedb_takes(annotation):
    assert schema_of(theirs, annotation).names == ["column"]
    with pytest.raises(SchemaTypeError):
        schema_of(ours, annotation)


def functions(embeddings):
    class Length(embeddings.TextEmbeddingFunction):
        def generate_embeddings(self, texts):
            return [[float(len(text)), 0.0] for text in texts]

        def ndims(self):
            return 2

    embeddings.register("compat-pydantic-length")(Length)
    return Length.create(), Length.create()


@pytest.fixture
def pair():
    """(library, two functions of it) for both libraries; registries are left as found."""
    registries = our_embeddings.get_registry(), their_embeddings.get_registry()
    kept = [dict(registry._functions) for registry in registries]
    yield (ours, functions(our_embeddings)), (theirs, functions(their_embeddings))
    for registry, known in zip(registries, kept, strict=True):
        registry._functions.clear()
        registry._functions.update(known)


def wired(library, functions):
    one, two = functions

    class Row(library.LanceModel):
        id: int
        title: str = one.SourceField()
        body: str = two.SourceField()
        title_vector: list[float] = one.VectorField()
        body_vector: library.Vector(two.ndims()) = two.VectorField()
        again: List[float] | None = one.VectorField(default=None)  # noqa: UP006

    return Row


def test_embedding_fields_are_equal(pair):
    (_, mine), (_, other) = pair
    assert mine[0] == mine[1] and mine[0] is not mine[1]  # told apart by identity
    rows = [wired(library, functions) for library, functions in pair]
    assert rows[0].to_arrow_schema().equals(rows[1].to_arrow_schema())
    wiring = [
        sorted((c.vector_column, c.source_column) for c in row.parse_embedding_functions())
        for row in rows
    ]
    assert wiring[0] == wiring[1]
    assert ("again", "title") in wiring[0]
    for row, used in zip(rows, (mine, other), strict=True):
        by_column = {c.vector_column: c.function for c in row.parse_embedding_functions()}
        assert by_column["body_vector"] is used[1]


def test_lancedb_still_wires_two_pairs_of_one_function_wrongly(pair):
    """If this fails, LanceDB has mended it, and our pairing should be compared with theirs."""

    def sources(library, function):
        class Row(library.LanceModel):
            a: str = function.SourceField()
            b: str = function.SourceField()
            a_vector: list[float] = function.VectorField()
            b_vector: list[float] = function.VectorField()

        return {c.vector_column: c.source_column for c in Row.parse_embedding_functions()}

    (_, mine), (_, other) = pair
    assert sources(theirs, other[0]) == {"a_vector": "b", "b_vector": "b"}
    assert sources(ours, mine[0]) == {"a_vector": "a", "b_vector": "b"}


def test_public_names_are_theirs():
    names = {
        name
        for name, value in vars(theirs).items()
        if getattr(value, "__module__", None) == theirs.__name__ and not name.startswith("_")
    }
    assert names <= set(ours.__all__)
    assert {"LanceModel", "Vector", "MultiVector", "is_nullable"} <= names


@pytest.mark.parametrize("function", ["get_extras", "is_nullable"])
def test_helpers_agree(function):
    fields = [
        create_model("Row", c=(int, Field(json_schema_extra={"tz": "UTC"}))).model_fields["c"],
        create_model("Row", c=(int | None, None)).model_fields["c"],
        create_model("Row", c=(typing.Union[int, str, None], None)).model_fields["c"],  # noqa: UP007
    ]
    arguments = ("tz",) if function == "get_extras" else ()
    for field in fields:
        assert getattr(ours, function)(field, *arguments) == getattr(theirs, function)(
            field, *arguments
        )


def test_rows_are_dumped_alike():
    rows = [
        create_model(
            "Row", __base__=lib.LanceModel, n=(int, Field(alias="other")), v=(lib.Vector(2), ...)
        )(other=1, v=(1, 2))
        for lib in (ours, theirs)
    ]
    dumped = [lib.model_to_dict(row) for lib, row in zip((ours, theirs), rows, strict=True)]
    assert dumped[0] == dumped[1] == {"n": 1, "v": [1.0, 2.0]}
    assert [row.field_names() for row in rows] == [["n", "v"]] * 2
    assert repr(rows[0].v) == repr(rows[1].v)
