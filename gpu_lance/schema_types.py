"""Python types of pydantic fields as Arrow types."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import PurePath
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, PydanticUndefinedAnnotation, RootModel
from pydantic.fields import FieldInfo

from gpu_lance.embeddings.vector_field import ndims_of
from gpu_lance.errors import SchemaTypeError

# A subclass stands before its base: bool is an int, datetime a date.
_SCALARS: dict[type, pa.DataType] = {
    bool: pa.bool_(),
    int: pa.int64(),
    float: pa.float64(),
    str: pa.utf8(),
    bytes: pa.binary(),
    datetime: pa.timestamp("us"),
    date: pa.date32(),
    time: pa.time64("us"),
    timedelta: pa.duration("us"),
}

_ONE_TYPE = "the one type that its values have"
_HINTS: tuple[tuple[Any, str], ...] = (
    (np.ndarray, "Vector(dim)"),
    (np.generic, "int, float or bool"),
    (complex, "two float fields"),
    (Decimal, "float, or str to keep every digit"),
    (UUID, "str"),
    (PurePath, "str"),
    (bytearray, "bytes"),
    (list, "list[T] with the type of its items"),
    (tuple, "list[T] with the type of its items"),
    (Mapping, "a nested pydantic model, or str that holds JSON"),
    (typing.Iterable, "list[T] with the type of its items"),
    (type(None), "Optional[T] with the type of its values"),
)


class FixedSizeListMixin(ABC):
    """What a type of fixed-size vectors says about itself."""

    @staticmethod
    @abstractmethod
    def dim() -> int:
        """The number of dimensions."""

    @staticmethod
    @abstractmethod
    def value_arrow_type() -> pa.DataType:
        """The Arrow type of one element."""

    @staticmethod
    def nullable() -> bool:
        """Whether the column takes nulls."""
        return True

    @staticmethod
    def is_multi_vector() -> bool:
        """Whether a value is a list of such vectors."""
        return False


def get_extras(field: FieldInfo, key: str) -> Any:
    """What `json_schema_extra` of a pydantic field holds under `key`; None if nothing.

    Examples
    --------
    >>> from pydantic import Field
    >>> get_extras(Field(json_schema_extra={"tz": "UTC"}), "tz")
    'UTC'
    """
    extra = field.json_schema_extra
    return extra.get(key) if isinstance(extra, Mapping) else None


def is_nullable(field: FieldInfo) -> bool:
    """Whether the column of a pydantic field takes nulls.

    It does for Optional types, for nullable vectors, and for lists that an embedding function
    fills.

    Examples
    --------
    >>> class Doc(BaseModel):
    ...     text: str
    ...     note: str | None
    >>> is_nullable(Doc.model_fields["text"]), is_nullable(Doc.model_fields["note"])
    (False, True)
    """
    inner, nullable = split_optional(field.annotation)
    if nullable or (is_filled(field) and _is_float_list(inner)):
        return True
    if _is_subclass(inner, RootModel):
        return is_nullable(inner.model_fields["root"])
    return _is_subclass(inner, FixedSizeListMixin) and inner.nullable()


def is_filled(field: FieldInfo) -> bool:
    """Whether an embedding function fills the field."""
    return get_extras(field, "vector_column_for") is not None


def fields_of(model: type[BaseModel], path: str = "") -> dict[str, FieldInfo]:
    """The fields of a pydantic model by name, forward references resolved.

    Raises
    ------
    SchemaTypeError
        If a forward reference names nothing that is known by now.
    """
    if not getattr(model, "__pydantic_complete__", True):
        try:
            model.model_rebuild()
        except PydanticUndefinedAnnotation as error:
            raise SchemaTypeError(
                f"{path or model.__name__} refers to {error.name!r}, which is not defined; define "
                f"it, or call {model.__name__}.model_rebuild() where it is."
            ) from error
    return model.model_fields


def model_to_fields(
    model: type[BaseModel], path: str = "", above: tuple[type, ...] = ()
) -> list[pa.Field]:
    """The Arrow fields of a pydantic model; see :func:`gpu_lance.pydantic.pydantic_to_schema`.

    Parameters
    ----------
    model : pydantic model class
    path : str
        Where it was found, for messages, e.g. ``"Doc.author"``; its own name for none.
    above : tuple of type
        The models that it is nested in.
    """
    path = path or model.__name__
    if model in above:
        raise SchemaTypeError(
            f"Field {path!r} holds {model.__name__} inside itself, and a column cannot be nested "
            "without end; store the other row's key instead."
        )
    fields = []
    for name, field in fields_of(model, path).items():
        kind = _FieldType(f"{path}.{name}", field, (*above, model)).arrow()
        fields.append(pa.field(name, kind, is_nullable(field)))
    return fields


def split_optional(annotation: Any) -> tuple[Any, bool]:
    """A type without its aliases, annotations and None, and whether None was in it.

    Examples
    --------
    >>> split_optional(typing.Optional[typing.Annotated[int, "any"]])
    (<class 'int'>, True)
    """
    annotation = _unwrap(annotation)
    if not _is_union(annotation):
        return annotation, False
    members = [_unwrap(member) for member in typing.get_args(annotation)]
    others = tuple(member for member in members if member is not type(None))
    if len(others) == len(members):
        return annotation, False
    if len(others) == 1:
        return split_optional(others[0])[0], True
    return typing.Union[others], True  # noqa: UP007  (built at run time)


@dataclasses.dataclass(frozen=True)
class _FieldType:
    """The Arrow type of one field; `path` names it, `above` are the models around it."""

    path: str
    field: FieldInfo
    above: tuple[type, ...]

    def arrow(self) -> pa.DataType:
        inner, _ = split_optional(self.field.annotation)
        if is_filled(self.field):
            return self._vector(inner)
        return self.of(inner)

    def of(self, annotation: Any) -> pa.DataType:
        inner, _ = split_optional(annotation)
        origin, args = typing.get_origin(inner), typing.get_args(inner)
        if origin is list and args:
            return pa.list_(self.of(args[0]))
        if origin is tuple and args:
            return pa.list_(self._tuple_item(inner, args))
        if origin is typing.Literal:
            return self._values(inner, args)
        if _is_subclass(inner, RootModel):
            return dataclasses.replace(self, field=fields_of(inner)["root"]).arrow()
        if _is_subclass(inner, BaseModel):
            fields = model_to_fields(inner, self.path, self.above)
            if not fields:
                raise SchemaTypeError(
                    f"Field {self.path!r} is a {inner.__name__}, which has no fields to store."
                )
            return pa.struct(fields)
        if _is_subclass(inner, FixedSizeListMixin):
            vector = pa.list_(inner.value_arrow_type(), inner.dim())
            return pa.list_(vector) if inner.is_multi_vector() else vector
        if _is_subclass(inner, enum.Enum):
            kind = self._values(inner, [member.value for member in inner])
            return pa.dictionary(pa.int32(), kind) if kind == pa.utf8() else kind
        return self._scalar(inner)

    def _scalar(self, inner: Any) -> pa.DataType:
        for known, kind in _SCALARS.items():
            if _is_subclass(inner, known) and not _is_subclass(inner, np.generic):
                if known is datetime:
                    return pa.timestamp("us", tz=get_extras(self.field, "tz"))
                return kind
        raise self._unsupported(inner, _hint(inner))

    def _vector(self, inner: Any) -> pa.DataType:
        """The type of a field that an embedding function fills."""
        if _is_float_list(inner):
            function = get_extras(self.field, "vector_column_for")
            return pa.list_(pa.float32(), ndims_of(function))
        if _is_subclass(inner, FixedSizeListMixin):
            return self.of(inner)
        raise self._unsupported(
            inner, "list[float] or Vector(dim), since an embedding function fills it"
        )

    def _tuple_item(self, inner: Any, args: tuple[Any, ...]) -> pa.DataType:
        kinds = [self.of(arg) for arg in args if arg is not Ellipsis]
        if any(kind != kinds[0] for kind in kinds):
            raise self._unsupported(
                inner, "a nested pydantic model, since the items are of several types"
            )
        return kinds[0]

    def _values(self, inner: Any, values: typing.Sequence[Any]) -> pa.DataType:
        """The type of the values of an Enum or a Literal."""
        found = {type(value.value if isinstance(value, enum.Enum) else value) for value in values}
        kinds = [self._scalar(kind) for kind in sorted(found - {type(None)}, key=str)]
        if not kinds or any(kind != kinds[0] for kind in kinds):
            raise self._unsupported(inner, "values that are all str, or all int")
        return kinds[0]

    def _unsupported(self, inner: Any, remedy: str) -> SchemaTypeError:
        shown = inner.__name__ if isinstance(inner, type) and inner.__name__ else str(inner)
        if typing.get_origin(inner) is not None:
            shown = str(inner)
        return SchemaTypeError(
            f"Field {self.path!r} has the type {shown}, for which there is no Arrow type; use "
            f"{remedy}."
        )


def _hint(inner: Any) -> str:
    kind = typing.get_origin(inner) or inner
    if not isinstance(kind, type):
        return _ONE_TYPE
    if dataclasses.is_dataclass(kind) or typing.is_typeddict(kind) or hasattr(kind, "_fields"):
        return "a nested pydantic model (a subclass of pydantic.BaseModel)"
    return next((remedy for base, remedy in _HINTS if issubclass(kind, base)), _ONE_TYPE)


def _unwrap(annotation: Any) -> Any:
    """The type under ``Annotated``, NewType and ``type`` aliases."""
    while True:
        if typing.get_origin(annotation) is typing.Annotated:
            annotation = typing.get_args(annotation)[0]
        elif type(annotation).__name__ == "TypeAliasType":  # typing's or typing_extensions'
            annotation = annotation.__value__
        elif isinstance(annotation, typing.NewType):
            annotation = annotation.__supertype__
        else:
            return annotation


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _is_float_list(annotation: Any) -> bool:
    # not by ==, which tells typing.List[float] from list[float]
    return typing.get_origin(annotation) is list and typing.get_args(annotation) == (float,)


def _is_subclass(candidate: Any, base: type) -> bool:
    # list[int] is no class, and a class whose metaclass refuses the question is none of ours
    if not isinstance(candidate, type) or typing.get_origin(candidate) is not None:
        return False
    return issubclass(candidate, base)
