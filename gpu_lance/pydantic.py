"""Tables described by pydantic models, with LanceDB's names.

A :class:`LanceModel` is a row; its class is a schema, and says which embedding function fills
which column.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from gpu_lance.embeddings.vector_field import as_lists
from gpu_lance.errors import BadInputError, SchemaError, SchemaTypeError
from gpu_lance.schema_types import (
    FixedSizeListMixin,
    fields_of,
    get_extras,
    is_nullable,
    model_to_fields,
)

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from gpu_lance.embeddings import EmbeddingFunctionConfig

__all__ = [
    "FixedSizeListMixin",
    "LanceModel",
    "MultiVector",
    "Vector",
    "get_extras",
    "is_nullable",
    "model_to_dict",
    "pydantic_to_schema",
    "vector",
]

logger = logging.getLogger(__name__)

FLOAT32 = pa.float32()


def Vector(
    dim: int, value_type: pa.DataType = FLOAT32, nullable: bool = True
) -> type[FixedSizeListMixin]:
    """A type for fields that hold one vector.

    Parameters
    ----------
    dim : int
        The number of dimensions.
    value_type : pyarrow.DataType
        Of one element: a float or an integer type.
    nullable : bool
        Whether the column takes nulls, and the field None.

    Returns
    -------
    type
        A subclass of list. Fields of it take lists, tuples and arrays of numpy, torch, cupy or
        pyarrow, on any device, and hold a list of numbers.

    Raises
    ------
    BadInputError, SchemaTypeError
        If `dim` is no positive integer, or `value_type` no type of numbers.

    Examples
    --------
    >>> class Point(LanceModel):
    ...     vector: Vector(2)
    >>> Point.to_arrow_schema().field("vector").type
    FixedSizeListType(fixed_size_list<item: float>[2])
    >>> list(Point(vector=(1, 2)).vector)
    [1.0, 2.0]
    """
    return _vector_type("Vector", _checked_dim(dim), _checked_type(value_type), bool(nullable))


def MultiVector(
    dim: int, value_type: pa.DataType = FLOAT32, nullable: bool = True
) -> type[FixedSizeListMixin]:
    """A type for fields that hold a list of any number of vectors, such as one for each token.

    Parameters and errors are those of :func:`Vector`. Fields of it take a list of vectors, or a
    2-d array.

    Examples
    --------
    >>> class Page(LanceModel):
    ...     patches: MultiVector(2)
    >>> Page.to_arrow_schema().field("patches").type
    ListType(list<item: fixed_size_list<item: float>[2]>)
    >>> list(Page(patches=[[1, 2], [3, 4]]).patches)
    [[1.0, 2.0], [3.0, 4.0]]
    """
    return _vector_type("MultiVector", _checked_dim(dim), _checked_type(value_type), bool(nullable))


def vector(dim: int, value_type: pa.DataType = FLOAT32) -> type[FixedSizeListMixin]:
    """The old name of :func:`Vector`."""
    warnings.warn(
        "gpu_lance.pydantic.vector() is deprecated; use Vector().",
        DeprecationWarning,
        stacklevel=2,
    )
    return Vector(dim, value_type)


def _no_dimension(*_: Any) -> Any:
    raise SchemaTypeError("A vector field needs its dimension, e.g. Vector(128).")


# pydantic asks a bare `vector: Vector` for its schema; without this its error is about functions
for _factory in (Vector, MultiVector):
    setattr(_factory, "__get_pydantic_core_schema__", _no_dimension)  # noqa: B010  (for mypy)


@functools.cache
def _vector_type(
    kind: str, dim: int, value_type: pa.DataType, nullable: bool
) -> type[FixedSizeListMixin]:
    """One class for the same arguments, so that fields of equal types are equal."""
    multi = kind == "MultiVector"

    class FixedSizeList(list[Any], FixedSizeListMixin):
        def __repr__(self) -> str:
            return f"{'MultiVector' if multi else 'FixedSizeList'}(dim={dim})"

        def __reduce__(self) -> tuple[Any, ...]:
            # the class has no name to be found by
            return _revive, (kind, dim, value_type, nullable, list(self))

        @staticmethod
        def dim() -> int:
            return dim

        @staticmethod
        def value_arrow_type() -> pa.DataType:
            return value_type

        @staticmethod
        def nullable() -> bool:
            return nullable

        @staticmethod
        def is_multi_vector() -> bool:
            return multi

        @classmethod
        def __get_pydantic_core_schema__(
            cls, _source: Any, _handler: GetCoreSchemaHandler
        ) -> CoreSchema:
            item: CoreSchema = core_schema.float_schema()
            if pa.types.is_integer(value_type):
                low, high = _integer_range(value_type)
                item = core_schema.int_schema(ge=low, le=high)
            one = core_schema.no_info_before_validator_function(
                functools.partial(_of_length, dim),
                core_schema.list_schema(item, min_length=dim, max_length=dim),
            )
            whole: CoreSchema = one
            if multi:
                whole = core_schema.no_info_before_validator_function(
                    as_lists, core_schema.list_schema(one)
                )
            made = core_schema.no_info_after_validator_function(cls, whole)
            return core_schema.nullable_schema(made) if nullable else made

    FixedSizeList.__name__ = FixedSizeList.__qualname__ = f"{kind}({dim})"
    return FixedSizeList


def _revive(
    kind: str, dim: int, value_type: pa.DataType, nullable: bool, values: list[Any]
) -> FixedSizeListMixin:
    make: Callable[[list[Any]], FixedSizeListMixin] = _vector_type(kind, dim, value_type, nullable)
    return make(values)


def _of_length(dim: int, value: Any) -> Any:
    value = as_lists(value)
    if isinstance(value, list | tuple) and len(value) != dim:
        raise PydanticCustomError(
            "vector_length",
            "The vector has {got} dimensions instead of {wanted}",
            {"got": len(value), "wanted": dim},
        )
    return value


def _integer_range(type_: pa.DataType) -> tuple[int, int]:
    bits = type_.bit_width
    if pa.types.is_unsigned_integer(type_):
        return 0, 2**bits - 1
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def _checked_dim(dim: Any) -> int:
    if isinstance(dim, bool) or not hasattr(dim, "__index__"):
        raise SchemaTypeError(
            f"The dimension of a vector is an integer, got a {type(dim).__name__}."
        )
    if dim < 1:
        raise BadInputError(f"The dimension of a vector is at least 1, got {dim}.")
    return int(dim)


def _checked_type(value_type: Any) -> pa.DataType:
    if isinstance(value_type, pa.DataType) and (
        pa.types.is_floating(value_type) or pa.types.is_integer(value_type)
    ):
        return value_type
    raise SchemaTypeError(
        f"The elements of a vector are pyarrow floats or integers, such as pa.float16(), got "
        f"{value_type!r}."
    )


def pydantic_to_schema(model: type[BaseModel]) -> pa.Schema:
    """The Arrow schema of a pydantic model.

    Parameters
    ----------
    model : pydantic model class
        Its field names are the columns; aliases count for nothing. Types:

        ===========================  ====================================================
        Python                       Arrow
        ===========================  ====================================================
        int, float, str, bool        int64, float64, utf8, bool
        bytes                        binary
        date, time, timedelta        date32, time64[us], duration[us]
        datetime                     timestamp[us]; with the time zone that
                                     ``Field(json_schema_extra={"tz": ...})`` names
        list[T], tuple[T, ...]       list
        a pydantic model             struct
        Vector, MultiVector          fixed-size list, list of fixed-size lists
        Enum of str, of int          dictionary<int32, utf8>, int64
        Literal                      the type of its values
        Optional[T], T | None        T, nullable
        ===========================  ====================================================

    Returns
    -------
    pyarrow.Schema
        Without metadata. ``list[float] = function.VectorField()`` is a fixed-size list of
        ``function.ndims()`` float32.

    Raises
    ------
    SchemaTypeError
        For another type; it names the field and what to use.

    Examples
    --------
    >>> class Doc(BaseModel):
    ...     text: str
    ...     stars: int | None
    >>> print(pydantic_to_schema(Doc))
    text: string not null
    stars: int64
    """
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise SchemaTypeError(f"A schema is made from a pydantic model class, got {model!r}.")
    return pa.schema(model_to_fields(model))


class LanceModel(BaseModel):
    """A row of a table; the class is the table's schema.

    A field from ``function.VectorField()`` may be left out of a row: it is filled when the row is
    added. Where a field has an alias, its name is accepted too, since the column bears it.

    Examples
    --------
    >>> import gpu_lance
    >>> class Point(LanceModel):
    ...     name: str
    ...     vector: Vector(2)
    >>> table = gpu_lance.connect("memory://").create_table("points", schema=Point)
    >>> _ = table.add([Point(name="a", vector=[1.0, 2.0])])
    >>> table.search([0.0, 0.0]).limit(1).to_pydantic(Point)
    [Point(name='a', vector=FixedSizeList(dim=2))]
    """

    model_config = ConfigDict(validate_by_name=True)

    @classmethod
    def to_arrow_schema(cls) -> pa.Schema:
        """The Arrow schema; see :func:`pydantic_to_schema`."""
        return pydantic_to_schema(cls)

    @classmethod
    def field_names(cls) -> list[str]:
        """The names of the fields, in order."""
        return list(cls.safe_get_fields())

    @classmethod
    def safe_get_fields(cls) -> dict[str, FieldInfo]:
        """The pydantic fields by name."""
        return fields_of(cls)

    @classmethod
    def parse_embedding_functions(cls) -> list[EmbeddingFunctionConfig]:
        """Which embedding function fills which column, from which others.

        ``VectorField(source=...)`` and ``VectorField(template=...)`` say what a vector is made
        from. For one that does not, the function's SourceField() does: a single source is that of
        all its vectors; of several sources the first makes the first vector, and so on, if there
        are as many of both and none is named by ``source=``.

        Raises
        ------
        SchemaError
            If it cannot be told which source a vector is made from, or a column that is named is
            not there or is made by a function itself.
        """
        from gpu_lance.embeddings import EmbeddingFunctionConfig

        sources, vectors = cls._marked("source_column_for"), cls._marked("vector_column_for")
        configs = []
        for column, function in vectors:
            field = cls.safe_get_fields()[column]
            template = get_extras(field, "vector_template")
            source = get_extras(field, "vector_source")
            if template is None and source is None:
                source = cls._source_of(column, function, sources, vectors)
            made: dict[str, Any] = {} if source is None else {"source_column": source}
            config = EmbeddingFunctionConfig(
                vector_column=column, function=function, template=template, **made
            )
            cls._check_named(config, {name for name, _ in vectors})
            configs.append(config)
        for source, function in sources:
            if not any(function is c.function and source in c.columns for c in configs):
                logger.warning(
                    "Field %s.%s is a SourceField of a function that makes no vector from it, so "
                    "nothing is embedded from it.",
                    cls.__name__,
                    source,
                )
        return configs

    @classmethod
    def _marked(cls, key: str) -> list[tuple[str, Any]]:
        found = ((name, get_extras(field, key)) for name, field in cls.safe_get_fields().items())
        return [(name, function) for name, function in found if function is not None]

    @classmethod
    def _source_of(
        cls,
        column: str,
        function: Any,
        sources: list[tuple[str, Any]],
        vectors: list[tuple[str, Any]],
    ) -> str:
        """The source of a VectorField that names none."""
        fields = cls.safe_get_fields()
        its_sources = [name for name, other in sources if other is function]
        its_vectors = [
            name
            for name, other in vectors
            if other is function and get_extras(fields[name], "vector_template") is None
        ]
        if len(its_sources) == 1:
            return its_sources[0]
        named = any(get_extras(fields[name], "vector_source") is not None for name in its_vectors)
        if len(its_sources) == len(its_vectors) and not named:
            return its_sources[its_vectors.index(column)]
        if not its_sources:
            raise SchemaError(
                f"Field {column!r} of {cls.__name__} is a VectorField without a source: give one "
                "other field the SourceField() of the same function object, or write "
                "VectorField(source='...')."
            )
        raise SchemaError(
            f"One embedding function of {cls.__name__} has the sources {', '.join(its_sources)} "
            f"and fills {', '.join(its_vectors)}, so it cannot be told what {column!r} is made "
            "from: write VectorField(source='...') for each of them."
        )

    @classmethod
    def _check_named(cls, config: EmbeddingFunctionConfig, vectors: set[str]) -> None:
        column, names = config.vector_column, cls.field_names()
        what = f"Field {column!r} of {cls.__name__} is made from "
        if config.template is not None:
            what = f"The template {config.template!r} of {cls.__name__}.{column} names "
        for name in config.columns:
            if name not in names:
                raise SchemaError(
                    f"{what}{name!r}, which is no field of it; it has {', '.join(names)}."
                )
            if name in vectors:
                raise SchemaError(
                    f"{what}{name!r}, which an embedding function fills; a vector is made from "
                    "other columns."
                )


def model_to_dict(model: BaseModel) -> dict[str, Any]:
    """The values of a pydantic object by field.

    Examples
    --------
    >>> class Doc(LanceModel):
    ...     text: str
    >>> model_to_dict(Doc(text="a"))
    {'text': 'a'}
    """
    return model.model_dump()
