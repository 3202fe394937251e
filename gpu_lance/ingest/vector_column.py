"""The vector columns of a table, and what makes their vectors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from gpu_lance.embeddings import EmbeddingFunction, EmbeddingFunctionConfig, calls
from gpu_lance.embeddings.template import Template, parse
from gpu_lance.errors import SchemaError
from gpu_lance.ingest.lists import is_multivector_type, vector_length
from gpu_lance.ingest.multivectors import bad_multivectors, handle_bad_multivectors
from gpu_lance.ingest.template import check as check_template
from gpu_lance.ingest.template import render
from gpu_lance.ingest.vectors import bad_vectors, handle_bad_vectors
from gpu_lance.types import OnBadVectors


@dataclass(frozen=True)
class Policy:
    """What becomes of vectors that cannot be used.

    Parameters
    ----------
    on_bad : OnBadVectors
    fill_value : float
    """

    on_bad: OnBadVectors = OnBadVectors.ERROR
    fill_value: float = 0.0


@dataclass(frozen=True)
class VectorColumn:
    """A vector column of a table, and what makes its vectors.

    Parameters
    ----------
    name : str
    type : pyarrow.DataType
        A fixed-size list of float16, float32 or float64, or a list of such lists.
    function : EmbeddingFunction or None
        None if the caller gives the vectors.
    source : str or None
        The column that the function embeds; the first one of a template.
    template : Template or None
        The text that it embeds, if that is made of several columns.
    zero_is_bad : bool
        Whether a vector of zeros is bad: the column is searched by cosine.
    check : callable, optional
        Called before the function is used; it raises if its vectors would not fit the column's.
    """

    name: str
    type: pa.DataType
    function: EmbeddingFunction | None = None
    source: str | None = None
    zero_is_bad: bool = False
    check: Callable[[], object] | None = None
    template: Template | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """The columns that its vectors are made from."""
        if self.template is not None:
            return self.template.columns
        return () if self.source is None else (self.source,)

    @property
    def made_from(self) -> str:
        """What its vectors are made from, in words."""
        if self.template is not None:
            return f"the template {self.template.text!r}"
        return repr(self.source)

    def items(self, batch: pa.RecordBatch) -> pa.Array:
        """What the function embeds of each row (n,): the source column, or the rendered texts."""
        if self.template is not None:
            return render(self.template, batch)
        return batch.column(batch.schema.get_field_index(str(self.source)))

    @property
    def ndims(self) -> int:
        """Length of its vectors."""
        return int(self.vector_type.list_size)

    @property
    def multi(self) -> bool:
        """Whether a row has any number of vectors."""
        return is_multivector_type(self.type)

    @property
    def vector_type(self) -> pa.FixedSizeListType:
        """The type of one vector."""
        return self.type.value_type if self.multi else self.type

    @functools.cached_property
    def maker(self) -> EmbeddingFunction:
        """The function in the form that fills a column of this type."""
        assert self.function is not None
        return calls.suited(self.function, self.ndims, self.multi)

    def bad(self, array: pa.Array) -> np.ndarray:
        """(n,) bool: which rows of the column hold what cannot be stored as it is."""
        judge = bad_multivectors if self.multi else bad_vectors
        return judge(array, self.ndims, zero_is_bad=self.zero_is_bad)

    def handled(self, batch: pa.RecordBatch, policy: Policy, first_row: int) -> pa.RecordBatch:
        """The batch with `policy` applied to this column's vectors."""
        if self.multi:
            return handle_bad_multivectors(
                batch, self.name, self.type, policy.on_bad, policy.fill_value,
                self.zero_is_bad, first_row,
            )  # fmt: skip
        return handle_bad_vectors(
            batch, self.name, self.ndims, policy.on_bad, policy.fill_value,
            self.zero_is_bad, first_row,
        )  # fmt: skip


def vector_columns(
    schema: pa.Schema,
    functions: Mapping[str, EmbeddingFunctionConfig],
    cosine: frozenset[str] = frozenset(),
    check: Callable[[str, EmbeddingFunctionConfig], object] | None = None,
) -> list[VectorColumn]:
    """The vector columns of a schema, with the function and source column of each.

    Parameters
    ----------
    schema : pyarrow.Schema
    functions : mapping of str to EmbeddingFunctionConfig
        By vector column.
    cosine : frozenset of str
        Columns in which a vector of zeros is bad.
    check : callable, optional
        Called with a column and its function before that is used.

    Raises
    ------
    SchemaError
        If a function's column is missing or holds no vectors of floats.
    """
    templates = {
        name: parse(config.template)
        for name, config in functions.items()
        if config.template is not None
    }
    for name, config in functions.items():
        if name in templates:
            check_template(templates[name], schema, name)
        for column in (name, *config.columns):
            if column not in schema.names:
                raise SchemaError(
                    f"An embedding function is set for column {column!r}, which the table does "
                    f"not have; it has {', '.join(schema.names)}."
                )
        if vector_length(schema.field(name).type) is None:
            raise SchemaError(
                f"Column {name!r} has type {schema.field(name).type}; an embedding function fills "
                "a fixed-size list of floats, or a list of such lists."
            )
    found = []
    for field_ in schema:
        if vector_length(field_.type) is None:
            continue
        name, zero_is_bad = field_.name, field_.name in cosine
        own = functions.get(name)
        if own is None:
            found.append(VectorColumn(name, field_.type, zero_is_bad=zero_is_bad))
            continue
        checked = None if check is None else functools.partial(check, name, own)
        found.append(
            VectorColumn(
                name,
                field_.type,
                function=own.function,
                source=own.source_column,
                zero_is_bad=zero_is_bad,
                check=checked,
                template=templates.get(name),
            )
        )
    return found
