"""The texts that a template makes of the columns of a batch, by Arrow, on whole columns."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from gpu_lance.embeddings.template import Template
from gpu_lance.errors import BadInputError, SchemaError

TEXT = pa.large_utf8()  # whose offsets do not overflow when texts are joined


def check(template: Template, schema: pa.Schema, vector: str) -> None:
    """Refuse a template that cannot be rendered from the columns of `schema`.

    Parameters
    ----------
    template : Template
    schema : pyarrow.Schema
        The table's.
    vector : str
        The column that the vectors go to.

    Raises
    ------
    SchemaError
        For a column that is not there, the column `vector` itself, and one of lists, bytes,
        structs or anything else that is no text and has no plain form as one.

    Examples
    --------
    >>> from gpu_lance.embeddings.template import parse
    >>> check(parse("{a} {b}"), pa.schema({"a": pa.utf8(), "b": pa.binary()}), "vector")
    Traceback (most recent call last):
    gpu_lance.errors.SchemaError: The template '{a} {b}' of column 'vector' reads column 'b' of \
type binary; it takes columns of text, numbers, booleans, dates and times.
    """
    what = f"The template {template.text!r} of column {vector!r}"
    for name in template.columns:
        if name == vector:
            raise SchemaError(f"{what} names that column itself; a vector is made from others.")
        if name not in schema.names:
            raise SchemaError(
                f"{what} names {name!r}, which is not there; the columns are "
                f"{', '.join(schema.names)}."
            )
        kind = schema.field(name).type
        if not has_text(kind):
            raise SchemaError(
                f"{what} reads column {name!r} of type {kind}; it takes columns of text, numbers, "
                "booleans, dates and times."
            )


def has_text(kind: pa.DataType) -> bool:
    """Whether values of an Arrow type are text, or Arrow writes them as one.

    Examples
    --------
    >>> has_text(pa.date32()), has_text(pa.list_(pa.utf8()))
    (True, False)
    """
    if pa.types.is_dictionary(kind):
        return has_text(kind.value_type)
    tests = (
        pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view,
        pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean,
        pa.types.is_date, pa.types.is_time, pa.types.is_timestamp, pa.types.is_null,
    )  # fmt: skip
    return any(test(kind) for test in tests)


def render(template: Template, batch: pa.RecordBatch) -> pa.Array:
    """The text of each row.

    Parameters
    ----------
    template : Template
    batch : pyarrow.RecordBatch
        With the template's columns.

    Returns
    -------
    pyarrow.LargeStringArray
        (n,). A null counts as an empty text; a row in which all columns are null is null.

    Raises
    ------
    BadInputError
        If Arrow cannot write a column's values as text.

    Examples
    --------
    >>> from gpu_lance.embeddings.template import parse
    >>> batch = pa.record_batch({"title": ["One", None, None], "stars": [5, 4, None]})
    >>> render(parse("{title}: {stars}"), batch).to_pylist()
    ['One: 5', ': 4', None]
    """
    columns = {name: _text(batch, name, template) for name in template.columns}
    pieces: list[pa.Array | pa.Scalar] = []
    for literal, name in template.parts:
        if literal:
            pieces.append(pa.scalar(literal, TEXT))
        if name is not None:
            pieces.append(columns[name])
    empty = pa.scalar("", TEXT)
    joined = pc.binary_join_element_wise(
        *pieces, empty, null_handling="replace", null_replacement=""
    )
    nothing = None
    for column in columns.values():
        null = pc.is_null(column)
        nothing = null if nothing is None else pc.and_(nothing, null)
    return pc.if_else(nothing, pa.scalar(None, TEXT), joined)


def _text(batch: pa.RecordBatch, name: str, template: Template) -> pa.Array:
    column = batch.column(batch.schema.get_field_index(name))
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        return column.cast(TEXT)
    except pa.ArrowException as error:  # a time zone that is not known here, for one
        raise BadInputError(
            f"The template {template.text!r} cannot write column {name!r} of type {column.type} "
            f"as text: {str(error).splitlines()[0]}"
        ) from error
