"""Tables described by models: types, vectors, functions, and rows there and back."""

from __future__ import annotations

import copy
import enum
import json
import pickle
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NewType, Optional, Union
from uuid import UUID
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import BaseModel, Field, RootModel, ValidationError, create_model
from typing_extensions import TypedDict

import gpu_lance
from gpu_lance.errors import BadInputError, SchemaTypeError
from gpu_lance.pydantic import (
    LanceModel,
    MultiVector,
    Vector,
    get_extras,
    is_nullable,
    pydantic_to_schema,
    vector,
)

BERLIN = {"json_schema_extra": {"tz": "Europe/Berlin"}}
MOMENT = datetime(2024, 2, 29, 12, 30, 1, 7)


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Shape(enum.StrEnum):
    ROUND = "round"


class Rank(enum.IntEnum):
    LOW = 1


class Mixed(enum.Enum):
    TEXT = "a"
    NUMBER = 1


class Author(BaseModel):
    name: str
    born: date | None = None


class Tags(RootModel[list[str]]):
    pass


class Node(BaseModel):
    children: list[Node] = []


class Nothing(BaseModel):
    pass


class Pair(NamedTuple):
    a: int


class Typed(TypedDict):
    a: int


@dataclass
class Plain:
    a: int


UserId = NewType("UserId", int)

STRUCT = pa.struct([pa.field("name", pa.utf8(), False), pa.field("born", pa.date32())])
COLORS = pa.dictionary(pa.int32(), pa.utf8())

# annotation, Arrow type, nullable, a value, the value as Arrow gives it back
TYPES: dict[str, tuple[Any, pa.DataType, bool, Any, Any]] = {
    "int": (int, pa.int64(), False, 2**62, 2**62),
    "float": (float, pa.float64(), False, 1 / 3, 1 / 3),
    "str": (str, pa.utf8(), False, "ü", "ü"),
    "bool": (bool, pa.bool_(), False, True, True),
    "bytes": (bytes, pa.binary(), False, b"\0\xff", b"\0\xff"),
    "date": (date, pa.date32(), False, MOMENT.date(), MOMENT.date()),
    "time": (time, pa.time64("us"), False, MOMENT.time(), MOMENT.time()),
    "timedelta": (timedelta, pa.duration("us"), False, timedelta(1, 2, 3), timedelta(1, 2, 3)),
    "datetime": (datetime, pa.timestamp("us"), False, MOMENT, MOMENT),
    "datetime with a zone": (
        (datetime, Field(**BERLIN)),
        pa.timestamp("us", "Europe/Berlin"),
        False,
        MOMENT.replace(tzinfo=UTC),
        MOMENT.replace(tzinfo=UTC),
    ),
    "list": (list[int], pa.list_(pa.int64()), False, [1, 2], [1, 2]),
    "tuple": (tuple[str, ...], pa.list_(pa.utf8()), False, ("a", "b"), ["a", "b"]),
    "pair": (tuple[int, int], pa.list_(pa.int64()), False, (1, 2), [1, 2]),
    "lists in lists": (
        list[list[float]],
        pa.list_(pa.list_(pa.float64())),
        False,
        [[1.0], []],
        [[1.0], []],
    ),
    "list of optional": (list[int | None], pa.list_(pa.int64()), False, [1, None], [1, None]),
    "optional": (int | None, pa.int64(), True, None, None),
    "Optional": (Optional[str], pa.utf8(), True, None, None),  # noqa: UP045
    "None first": (Union[None, str], pa.utf8(), True, "a", "a"),  # noqa: UP007
    "annotated": (Annotated[int, Field(ge=0)], pa.int64(), False, 1, 1),
    "annotated optional": (Annotated[int, Field(ge=0)] | None, pa.int64(), True, None, None),
    "new type": (UserId, pa.int64(), False, 7, 7),
    "struct": (Author, STRUCT, False, Author(name="n"), {"name": "n", "born": None}),
    "optional struct": (Author | None, STRUCT, True, None, None),
    "list of structs": (
        list[Author],
        pa.list_(STRUCT),
        False,
        [Author(name="n", born=MOMENT.date())],
        [{"name": "n", "born": MOMENT.date()}],
    ),
    "root model": (Tags, pa.list_(pa.utf8()), False, Tags(["a"]), ["a"]),
    "str enum": (Color, COLORS, False, Color.BLUE, "blue"),
    "StrEnum": (Shape, COLORS, False, Shape.ROUND, "round"),
    "optional enum": (Color | None, COLORS, True, None, None),
    "list of enums": (list[Color], pa.list_(COLORS), False, [Color.RED], ["red"]),
    "int enum": (Rank, pa.int64(), False, Rank.LOW, 1),
    "literal": (Literal["a", "b"], pa.utf8(), False, "b", "b"),
    "int literal": (Literal[1, 2], pa.int64(), False, 2, 2),
    "optional literal": (Literal["a"] | None, pa.utf8(), True, None, None),
    "vector": (Vector(2), pa.list_(pa.float32(), 2), True, (1, 2), [1.0, 2.0]),
    "null vector": (Vector(2), pa.list_(pa.float32(), 2), True, None, None),
    "strict vector": (Vector(2, nullable=False), pa.list_(pa.float32(), 2), False, [1, 2], [1, 2]),
    "float16 vector": (Vector(2, pa.float16()), pa.list_(pa.float16(), 2), True, [1, 2], [1, 2]),
    "uint8 vector": (Vector(2, pa.uint8()), pa.list_(pa.uint8(), 2), True, [0, 255], [0, 255]),
    "multivector": (
        MultiVector(2),
        pa.list_(pa.list_(pa.float32(), 2)),
        True,
        [[1, 2], [3, 4]],
        [[1.0, 2.0], [3.0, 4.0]],
    ),
    "multivector of none": (MultiVector(2), pa.list_(pa.list_(pa.float32(), 2)), True, [], []),
}


def model_of(annotation: Any) -> type[LanceModel]:
    field = annotation if isinstance(annotation, tuple) else (annotation, ...)
    return create_model("Row", __base__=LanceModel, id=(int, ...), column=field)


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_is_stored_and_comes_back(kind: str) -> None:
    annotation, arrow, nullable, value, back = TYPES[kind]
    model = model_of(annotation)
    field = model.to_arrow_schema().field("column")
    assert (field.type, field.nullable) == (arrow, nullable)
    row = model(id=1, column=value)
    table = gpu_lance.connect("memory://", device="cpu").create_table("t", schema=model)
    table.add([row])
    assert table.schema.field("column").equals(field)
    assert table.to_arrow().to_pylist() == [{"id": 1, "column": back}]
    found = table.search().to_pydantic(model)
    assert found == [row]
    assert type(found[0]) is model
    by_data = gpu_lance.connect("memory://", device="cpu").create_table("t", [row])
    assert by_data.to_arrow().equals(table.to_arrow())


@pytest.mark.parametrize(
    ("annotation", "remedy"),
    [
        (int | str, "the one type that its values have"),
        (int | str | None, "the one type that its values have"),
        (Any, "the one type"),
        (object, "the one type"),
        (type(None), "Optional"),
        (dict[str, int], "nested pydantic model, or str that holds JSON"),
        (set[int], r"list\[T\]"),
        (list, r"list\[T\]"),
        (tuple, r"list\[T\]"),
        (tuple[int, str], "the items are of several types"),
        (complex, "two float fields"),
        (Decimal, "str to keep every digit"),
        (UUID, "str"),
        (Path, "str"),
        (np.ndarray, r"Vector\(dim\)"),
        (np.float32, "int, float or bool"),
        (Plain, "nested pydantic model"),
        (Typed, "nested pydantic model"),
        (Pair, "nested pydantic model"),
        (Mixed, "all str, or all int"),
        (Literal["a", 1], "all str, or all int"),
        (Nothing, "no fields to store"),
        (Node, "inside itself"),
        (list[dict[str, int]], "nested pydantic model"),
    ],
    ids=str,
)
def test_types_that_have_no_column_name_the_field_and_the_remedy(
    annotation: Any, remedy: str
) -> None:
    model = type(
        "Row",
        (LanceModel,),
        {
            "__annotations__": {"column": annotation},
            "__module__": __name__,
            "model_config": {"arbitrary_types_allowed": True},
        },
    )
    with pytest.raises(SchemaTypeError, match=rf"Row\.column.*{remedy}"):
        model.to_arrow_schema()
    with pytest.raises(TypeError):
        gpu_lance.connect("memory://").create_table("t", schema=model)


def test_what_is_no_model() -> None:
    for wrong in (5, "Row", Author(name="a"), dict):
        with pytest.raises(SchemaTypeError, match="made from a pydantic model class"):
            pydantic_to_schema(wrong)  # type: ignore[arg-type]
    Late = create_model("Late", __base__=LanceModel, other=("Undefined", ...))
    with pytest.raises(SchemaTypeError, match="'Undefined', which is not defined"):
        Late.to_arrow_schema()


def test_zones_come_back_as_moments() -> None:
    model = model_of((datetime, Field(**BERLIN)))
    table = gpu_lance.connect("memory://", device="cpu").create_table("t", schema=model)
    moment = datetime(2024, 7, 1, 12, tzinfo=ZoneInfo("America/New_York"))
    table.add([model(id=1, column=moment)])
    found = table.to_arrow()["column"][0].as_py()
    assert (found, found.hour) == (moment, 18)
    assert table.search().where("column = ?", [moment]).limit(1).to_list()[0]["id"] == 1


def test_helpers() -> None:
    fields = model_of((int | None, Field(json_schema_extra={"tz": "UTC"}))).safe_get_fields()
    assert get_extras(fields["column"], "tz") == "UTC"
    assert get_extras(fields["id"], "tz") is None
    assert (is_nullable(fields["column"]), is_nullable(fields["id"])) == (True, False)
    assert model_of(int).field_names() == ["id", "column"]
    with pytest.warns(DeprecationWarning, match="use Vector"):
        assert vector(3) is Vector(3)


# ------------------------------------------------------------------ vectors


@pytest.mark.parametrize(
    "value",
    [
        [0.5, 2.0],
        (0.5, 2.0),
        np.array([0.5, 2.0], np.float16),
        np.array([0.5, 2.0], np.float64),
        torch.tensor([0.5, 2.0]),
        torch.tensor([0.5, 2.0]).bfloat16(),
        pa.array([0.5, 2.0]),
        ["0.5", 2],
    ],
    ids=lambda value: type(value).__name__,
)
def test_vector_fields_take_arrays_of_any_kind(value: Any) -> None:
    row = model_of(Vector(2))(id=1, column=value)
    assert list(row.column) == [0.5, 2.0]
    assert repr(row.column) == "FixedSizeList(dim=2)"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], "1 dimensions instead of 2"),
        ([1.0, 2.0, 3.0], "3 dimensions instead of 2"),
        (np.ones(5), "5 dimensions instead of 2"),
        ([], "0 dimensions instead of 2"),
        (["a", 1.0], "valid number"),
        ([None, 1.0], "valid number"),
        ("ab", "list"),
        (5, "list"),
        ({"a": 1}, "list"),
        (np.ones((2, 2)), "valid number"),
    ],
)
def test_vectors_that_do_not_fit_are_validation_errors(value: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=rf"(?s)column.*{message}"):
        model_of(Vector(2))(id=1, column=value)
    with pytest.raises(ValueError, match=message):
        model_of(MultiVector(2))(id=1, column=[[1.0, 2.0], value])


def test_integer_vectors_are_checked_for_their_range() -> None:
    model = model_of(Vector(2, pa.uint8()))
    for wrong in ([0, 256], [-1, 0], [0.5, 0]):
        with pytest.raises(ValidationError):
            model(id=1, column=wrong)
    assert list(model(id=1, column=np.array([0, 255], np.uint8)).column) == [0, 255]


def test_null_vectors() -> None:
    assert model_of(Vector(2))(id=1, column=None).column is None
    with pytest.raises(ValidationError):
        model_of(Vector(2, nullable=False))(id=1, column=None)


@pytest.mark.parametrize("make", [Vector, MultiVector])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), BadInputError, "at least 1, got 0"),
        ((-3,), BadInputError, "at least 1, got -3"),
        ((2.0,), SchemaTypeError, "got a float"),
        (("2",), SchemaTypeError, "got a str"),
        ((True,), SchemaTypeError, "got a bool"),
        ((None,), SchemaTypeError, "got a NoneType"),
        ((2, pa.utf8()), SchemaTypeError, "pyarrow floats or integers"),
        ((2, np.float32), SchemaTypeError, "pyarrow floats or integers"),
        ((2, "float"), SchemaTypeError, "pyarrow floats or integers"),
    ],
)
def test_vector_types_that_cannot_be(
    make: Any, arguments: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(*arguments)


def test_a_vector_field_needs_its_dimension() -> None:
    with pytest.raises(SchemaTypeError, match=r"needs its dimension, e\.g\. Vector\(128\)"):
        create_model("Row", __base__=LanceModel, v=(Vector, ...))


def test_vectors_are_copied_pickled_and_shown_as_json() -> None:
    assert Vector(2) is Vector(2)
    assert Vector(2) is not Vector(3)
    row = model_of(Vector(2))(id=1, column=[1.0, 2.0])
    assert json.loads(row.model_dump_json()) == {"id": 1, "column": [1.0, 2.0]}
    again = pickle.loads(pickle.dumps(row.column))
    assert (list(again), type(again)) == ([1.0, 2.0], Vector(2))
    assert list(copy.deepcopy(row).column) == [1.0, 2.0]
