"""The schema of a table that is to be made: its columns, its embedding functions, its metadata."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from gpu_lance.embeddings import EmbeddingFunctionConfig, calls, fingerprint, get_registry
from gpu_lance.embeddings.template import parse
from gpu_lance.embeddings.vector_field import ndims_of
from gpu_lance.errors import GpuLanceError, SchemaError, UnsupportedDataError
from gpu_lance.ingest.align import shorten
from gpu_lance.ingest.lists import is_multivector_type, vector_length
from gpu_lance.ingest.read import Source, read
from gpu_lance.ingest.template import check as check_template

logger = logging.getLogger(__name__)

RESERVED = {
    "_distance",
    "_rowid",
    "_rowaddr",
    "_rowoffset",
    "_row_created_at_version",
    "_row_last_updated_at_version",
}


def is_model_class(value: Any) -> bool:
    """Whether `value` is a LanceModel class, told without importing pydantic."""
    return inspect.isclass(value) and hasattr(value, "to_arrow_schema")


@dataclass(frozen=True)
class Planned:
    """What a new table begins with.

    Parameters
    ----------
    schema : pyarrow.Schema
        With all metadata that is stored.
    source : Source
        Its first rows; none for an empty table.
    functions : dict of str to EmbeddingFunctionConfig
        By vector column.
    """

    schema: pa.Schema
    source: Source
    functions: dict[str, EmbeddingFunctionConfig]


def plan_table(
    data: Any,
    schema: Any,
    embedding_functions: Sequence[EmbeddingFunctionConfig] | None,
    kept: Mapping[bytes, bytes] | None = None,
) -> Planned:
    """Work out schema, functions and rows of a new table.

    Parameters
    ----------
    data : object
        Anything that :func:`~gpu_lance.ingest.read.read` takes, a schema, or None.
    schema : pyarrow.Schema or LanceModel class, optional
        Without it the data decides.
    embedding_functions : sequence of EmbeddingFunctionConfig, optional
        Beside those that a LanceModel or the schema's metadata names.
    kept : mapping of bytes to bytes, optional
        Other schema metadata to carry over.

    Raises
    ------
    ValueError
        If there is neither data nor a schema.
    SchemaError
        If a function's source column is missing, or its vector column is no vector column.
    """
    arrow, source, configs = described(data, schema, embedding_functions)
    metadata = {**(arrow.metadata or {}), **(kept or {})}
    metadata.update(get_registry().get_table_metadata(list(configs.values())) or {})
    metadata.update(fingerprint.to_metadata(_fingerprints(configs)))
    return Planned(arrow.with_metadata(metadata or None), source, configs)


def described(
    data: Any, schema: Any, embedding_functions: Sequence[EmbeddingFunctionConfig] | None = None
) -> tuple[pa.Schema, Source, dict[str, EmbeddingFunctionConfig]]:
    """The columns, rows and functions that the arguments of :func:`plan_table` describe.

    No model is looked at for what is stored of it; the schema's metadata is what was given.

    Raises
    ------
    ValueError, SchemaError
        As there.
    """
    if schema is None and (is_model_class(data) or isinstance(data, pa.Schema)):
        data, schema = None, data
    if data is None and schema is None:
        raise SchemaError("Either data or schema must be provided.")
    configs = {config.vector_column: config for config in _declared(data, schema)}
    configs.update({config.vector_column: config for config in _given(embedding_functions)})
    arrow = _arrow_schema(schema)
    if arrow is None:
        source = read(data)
        arrow = source.schema
    else:
        source = Source(arrow, iter(()), 0) if data is None else read(data, arrow)
    check_names(arrow)
    if not configs:
        configs = get_registry().parse_functions(arrow.metadata)
    return _with_vector_columns(arrow, configs), source, configs


def _given(functions: Any) -> Sequence[EmbeddingFunctionConfig]:
    if functions is None:
        return ()
    if not isinstance(functions, list | tuple) or not all(
        isinstance(config, EmbeddingFunctionConfig) for config in functions
    ):
        raise UnsupportedDataError(
            "embedding_functions is a list of EmbeddingFunctionConfig(vector_column=..., "
            f"source_column=..., function=...), got {shorten(functions)}."
        )
    return functions


def check_names(schema: pa.Schema) -> None:
    """Refuse columns that could not be stored, or not be searched.

    Raises
    ------
    SchemaError
    """
    names = schema.names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SchemaError(f"There is more than one column {', '.join(map(repr, twice))}.")
    for name in names:
        if name in RESERVED:
            raise SchemaError(
                f"{name!r} is the name of a column that every search or table has already; give "
                "the column another one."
            )
        if not name or "." in name or "`" in name:
            raise SchemaError(
                f"{name!r} is no name for a column: it may not be empty or have a '.' or a '`'. "
                "For parts of a whole use a struct."
            )


def _declared(data: Any, schema: Any) -> Sequence[EmbeddingFunctionConfig]:
    if is_model_class(schema):
        model = schema
    elif schema is None and isinstance(data, list | tuple) and data:
        model = type(data[0])
    else:
        return ()
    functions: Any = getattr(model, "parse_embedding_functions", None)
    return functions() if functions is not None else ()


def _arrow_schema(schema: Any) -> pa.Schema | None:
    if schema is None or isinstance(schema, pa.Schema):
        return schema
    if is_model_class(schema):
        return schema.to_arrow_schema()
    raise UnsupportedDataError(
        f"schema must be a LanceModel class or a pyarrow.Schema, got a {type(schema).__name__}."
    )


def _with_vector_columns(
    schema: pa.Schema, configs: Mapping[str, EmbeddingFunctionConfig]
) -> pa.Schema:
    """The schema with a column for each function's vectors."""
    for config in configs.values():
        if config.template is not None:
            check_template(parse(config.template), schema, config.vector_column)
        if config.source_column not in schema.names:
            raise SchemaError(
                f"The embedding function of column {config.vector_column!r} reads column "
                f"{config.source_column!r}, which is not there; the columns are "
                f"{', '.join(schema.names)}."
            )
        if config.source_column == config.vector_column:
            raise SchemaError(
                f"Column {config.vector_column!r} cannot be made from itself; the source and the "
                "vectors of an embedding function are two columns."
            )
        index = schema.get_field_index(config.vector_column)
        if index < 0:
            schema = schema.append(pa.field(config.vector_column, _kind(config)))
        elif vector_length(schema.field(index).type) is None:
            schema = _fixed(schema, index, config)
        else:
            _check_length(schema.field(index), config)
    return schema


def _check_length(field: pa.Field, config: EmbeddingFunctionConfig) -> None:
    try:
        ndims = vector_length(field.type)
        assert ndims is not None
        suited = calls.suited(config.function, ndims, is_multivector_type(field.type))
        given = ndims_of(suited)
    except SchemaError:
        raise
    except (GpuLanceError, OSError):
        return  # a function that cannot be asked here says so when it is used
    if given != ndims:
        raise SchemaError(
            f"Column {field.name!r} has {ndims} dimensions, and the vectors of its embedding "
            f"function {type(config.function).__name__} have {given}."
        )


def _kind(config: EmbeddingFunctionConfig) -> pa.DataType:
    """The type of a new column for a function's vectors."""
    kind = pa.list_(pa.float32(), ndims_of(config.function))
    return pa.list_(kind) if getattr(config.function, "multivector", False) else kind


def _fixed(schema: pa.Schema, index: int, config: EmbeddingFunctionConfig) -> pa.Schema:
    """Give a column of nulls, or of lists of floats, the length of the function's vectors."""
    field = schema.field(index)
    values, depth = field.type, 0
    while pa.types.is_list(values) and depth < 2:
        values, depth = values.value_type, depth + 1
    if pa.types.is_null(field.type):
        kind = _kind(config)
    elif depth and pa.types.is_floating(values):
        kind = pa.list_(values, ndims_of(config.function))
        calls.suited(config.function, kind.list_size, multi=depth == 2)
        kind = pa.list_(kind) if depth == 2 else kind
    else:
        return schema  # vector_columns() says what is wrong with it
    return schema.set(index, pa.field(field.name, kind, field.nullable, field.metadata))


def _fingerprints(configs: Mapping[str, EmbeddingFunctionConfig]) -> dict[str, dict[str, str]]:
    found = {}
    for column, config in configs.items():
        try:
            made = fingerprint.of(config.function)
        except (GpuLanceError, OSError) as error:
            logger.warning("The model of column %r has no fingerprint yet: %s", column, error)
            continue
        if made is not None:
            found[column] = dict(made)
    return found
