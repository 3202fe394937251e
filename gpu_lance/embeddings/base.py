"""The contract of an embedding function: items in, one vector each out, rebuilt from its arguments.

A user's class derives from :class:`TextEmbeddingFunction` or :class:`EmbeddingFunction`, adds
pydantic fields for its arguments, and needs nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from pydantic import BaseModel, Field, PrivateAttr

from gpu_lance.embeddings.configured import Configured
from gpu_lance.embeddings.inputs import as_list
from gpu_lance.embeddings.retries import TIME_BUDGET, retry_with_exponential_backoff
from gpu_lance.embeddings.vector_field import FilledLater
from gpu_lance.errors import SchemaTypeError


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
    override the class attribute `retry_budget`: the most seconds that one call and its retries
    may take.

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

    def SourceField(self, **kwargs: Any) -> Any:
        """Return a pydantic field that marks the column this function embeds."""
        return self._marked_field("source_column_for", kwargs)

    def VectorField(self, **kwargs: Any) -> Any:
        """Return a pydantic field that marks the column this function's vectors go to.

        Its default is None, since the vector is made when the row is added.
        """
        if "default_factory" not in kwargs:
            kwargs.setdefault("default", None)
        field = self._marked_field("vector_column_for", kwargs)
        field.metadata.append(FilledLater())
        return field

    def _with_retries(self, call: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        return retry_with_exponential_backoff(
            call, max_retries=self.max_retries, time_budget=self.retry_budget
        )

    def _marked_field(self, mark: str, kwargs: dict[str, Any]) -> Any:
        extra = kwargs.pop("json_schema_extra", None) or {}
        if not isinstance(extra, dict):
            raise SchemaTypeError(
                f"json_schema_extra must be a dict beside an embedding function, got a "
                f"{type(extra).__name__}."
            )
        marked: Any = {**extra, mark: self}
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
    """Which function embeds which column of a table.

    Parameters
    ----------
    vector_column, source_column : str
        Where the vectors go, and what they are made from.
    function : EmbeddingFunction
        What makes them.
    """

    vector_column: str
    source_column: str
    function: EmbeddingFunction
