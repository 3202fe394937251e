"""The contract of an embedding function: items in, one vector each out, rebuilt from its arguments.

A user's class derives from :class:`TextEmbeddingFunction` or :class:`EmbeddingFunction`, adds
pydantic fields for its arguments, and needs nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from typing import Any, ClassVar

from pydantic import BaseModel, Field, PrivateAttr

from gpu_lance.embeddings.configured import Configured
from gpu_lance.embeddings.inputs import as_list
from gpu_lance.embeddings.retries import TIME_BUDGET, retry_with_exponential_backoff
from gpu_lance.embeddings.template import parse as parse_template
from gpu_lance.embeddings.vector_field import FilledLater
from gpu_lance.errors import SchemaError, SchemaTypeError


class EmbeddingFunction(Configured, ABC):
    """Base of every embedding function; its pydantic fields are its arguments.

    Make one with :meth:`create`, which resolves ``$var:`` references and remembers the arguments
    as they were written, since those are what a table stores.

    Parameters
    ----------
    max_retries : int
        How often a transient error of an API is retried; 0 disables retries.

    Notes
    -----
    Besides `session_arguments` and `unsafe_arguments` (see :class:`Configured`) a subclass may
    override the class attributes `retry_budget`: the most seconds that one call and its retries
    may take; and `cache_queries`: whether vectors of the last text queries are remembered, which
    counts for the class that sets it and not for its subclasses.

    Examples
    --------
    >>> class Length(EmbeddingFunction):
    ...     def ndims(self):
    ...         return 1
    ...     def compute_source_embeddings(self, items, *args, **kwargs):
    ...         return [[float(len(item))] for item in self.sanitize_input(items)]
    ...     def compute_query_embeddings(self, query, *args, **kwargs):
    ...         return self.compute_source_embeddings(query)
    >>> Length.create().compute_query_embeddings("four")
    [[4.0]]
    """

    retry_budget: ClassVar[float] = TIME_BUDGET
    cache_queries: ClassVar[bool] = False

    max_retries: int = 7

    _ndims: Any = PrivateAttr()

    @abstractmethod
    def compute_query_embeddings(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Return one vector for each query; None where an item has none."""

    @abstractmethod
    def compute_source_embeddings(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Return one vector for each item of the source column; None where an item has none."""

    @abstractmethod
    def ndims(self) -> int:
        """Return the number of dimensions of a vector."""

    def compute_query_embeddings_with_retry(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Call :meth:`compute_query_embeddings`; retry transient errors, raise others at once."""
        return self._with_retries(self.compute_query_embeddings)(*args, **kwargs)

    def compute_source_embeddings_with_retry(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Call :meth:`compute_source_embeddings`; retry transient errors, raise others at once."""
        return self._with_retries(self.compute_source_embeddings)(*args, **kwargs)

    def sanitize_input(self, texts: Any) -> list[Any]:
        """Return one item or any column of items as a list."""
        return as_list(texts)

    def query_state(self) -> Hashable:
        """Return what decides the vector of a query besides the arguments, such as a file's time.

        With `cache_queries` a remembered vector counts only while this stays equal.
        """
        return None

    def SourceField(self, **kwargs: Any) -> Any:
        """Return a pydantic field that marks the column this function embeds."""
        return self._marked_field("source_column_for", kwargs)

    def VectorField(
        self, *, source: str | None = None, template: str | None = None, **kwargs: Any
    ) -> Any:
        """Return a pydantic field that marks the column this function's vectors go to.

        Its default is None, since the vector is made when the row is added.

        Parameters
        ----------
        source : str, optional
            The column that is embedded; needed only where the SourceField() of the function does
            not tell it.
        template : str, optional
            Several columns in one text, such as ``"{title}\\n{body}"``; they need no
            SourceField(). ``{{`` and ``}}`` are braces.
        **kwargs
            Of ``pydantic.Field``.

        Raises
        ------
        SchemaError
            For a template that cannot be read, and for both.

        Examples
        --------
        >>> from gpu_lance.pydantic import LanceModel
        >>> class Length(TextEmbeddingFunction):
        ...     def generate_embeddings(self, texts):
        ...         return [[float(len(text))] for text in texts]
        ...     def ndims(self):
        ...         return 1
        >>> f = Length.create()
        >>> class Doc(LanceModel):
        ...     title: str
        ...     body: str
        ...     vector: list[float] = f.VectorField(template="{title} {body}")
        >>> Doc.parse_embedding_functions()[0].template
        '{title} {body}'
        """
        if source is not None and template is not None:
            raise SchemaError(
                f"A VectorField has a source ({source!r}) or a template ({template!r}), not both; "
                "name the column in the template too."
            )
        if source is not None and not isinstance(source, str):
            raise SchemaError(
                f"source is the name of a column, got a {type(source).__name__}; for several "
                "columns use template='{title} {body}'."
            )
        if template is not None:
            parse_template(template)
        if "default_factory" not in kwargs:
            kwargs.setdefault("default", None)
        made_from = {"vector_source": source, "vector_template": template}
        more = {key: text for key, text in made_from.items() if text is not None}
        field = self._marked_field("vector_column_for", kwargs, more)
        field.metadata.append(FilledLater())
        return field

    def _with_retries(self, call: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        return retry_with_exponential_backoff(
            call, max_retries=self.max_retries, time_budget=self.retry_budget
        )

    def _marked_field(
        self, mark: str, kwargs: dict[str, Any], more: dict[str, str] | None = None
    ) -> Any:
        extra = kwargs.pop("json_schema_extra", None) or {}
        if not isinstance(extra, dict):
            raise SchemaTypeError(
                f"json_schema_extra must be a dict beside an embedding function, got a "
                f"{type(extra).__name__}."
            )
        marked: Any = {**extra, mark: self, **(more or {})}
        return Field(json_schema_extra=marked, **kwargs)


class TextEmbeddingFunction(EmbeddingFunction):
    """Base of functions over text: implement :meth:`generate_embeddings` and :meth:`ndims`.

    Examples
    --------
    >>> class Length(TextEmbeddingFunction):
    ...     def generate_embeddings(self, texts):
    ...         return [[float(len(text))] for text in texts]
    ...     def ndims(self):
    ...         return 1
    >>> Length.create().compute_source_embeddings(["a", "bb"])
    [[1.0], [2.0]]
    """

    def compute_query_embeddings(self, query: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """Embed queries as sources are."""
        return self.compute_source_embeddings(query, *args, **kwargs)

    def compute_source_embeddings(self, texts: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """Embed one text or a column of texts."""
        return self.generate_embeddings(self.sanitize_input(texts))

    @abstractmethod
    def generate_embeddings(self, texts: list[str], *args: Any, **kwargs: Any) -> list[Any]:
        """Return one vector for each text."""


class EmbeddingFunctionConfig(BaseModel):
    """Which function embeds which column of a table, or several columns as one text.

    Parameters
    ----------
    vector_column : str
        Where the vectors go.
    source_column : str
        What they are made from. With a template its first column, which may be left out.
    function : EmbeddingFunction
        What makes them.
    template : str, optional
        The text to embed, with columns in braces; see :meth:`EmbeddingFunction.VectorField`.

    Raises
    ------
    SchemaError
        For a template that cannot be read, that names the vector column, or whose first column is
        not `source_column`.

    Examples
    --------
    >>> class Length(TextEmbeddingFunction):
    ...     def generate_embeddings(self, texts):
    ...         return [[float(len(text))] for text in texts]
    ...     def ndims(self):
    ...         return 1
    >>> config = EmbeddingFunctionConfig(
    ...     vector_column="vector", function=Length(), template="{title}: {body}"
    ... )
    >>> config.source_column, config.columns
    ('title', ('title', 'body'))
    """

    vector_column: str
    source_column: str
    function: EmbeddingFunction
    template: str | None = None

    def __init__(self, **values: Any) -> None:
        # not a validator, whose SchemaError pydantic would hide in a ValidationError
        if values.get("template") is not None:
            first = _first_column(values["template"], values.get("vector_column"))
            if values.setdefault("source_column", first) != first:
                raise SchemaError(
                    f"source_column is {values['source_column']!r}, and the first column of the "
                    f"template {values['template']!r} is {first!r}; leave source_column out."
                )
        super().__init__(**values)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the vectors are made from."""
        if self.template is None:
            return (self.source_column,)
        return parse_template(self.template).columns


def _first_column(template: Any, vector_column: Any) -> str:
    columns = parse_template(template).columns
    if vector_column in columns:
        raise SchemaError(
            f"The template {template!r} of column {vector_column!r} names that column itself; a "
            "vector is made from others."
        )
    return columns[0]
