"""What was being embedded, said by the error that stopped it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from gpu_lance.embeddings.base import EmbeddingFunction
from gpu_lance.embeddings.unavailable import UnavailableFunction


@contextlib.contextmanager
def noted(what: str, column: str, function: EmbeddingFunction) -> Iterator[None]:
    """Add a note to an error of `function`, whose type and message stay.

    Parameters
    ----------
    what : str
        What is embedded, in words.
    column : str
        The vector column that it is for.
    function : EmbeddingFunction

    Examples
    --------
    >>> from gpu_lance.embeddings import TextEmbeddingFunction
    >>> class Broken(TextEmbeddingFunction):
    ...     def generate_embeddings(self, texts):
    ...         raise RuntimeError("no tokens left")
    ...     def ndims(self):
    ...         return 1
    >>> try:
    ...     with noted("column 'text'", "vector", Broken()):
    ...         Broken().generate_embeddings(["a"])
    ... except RuntimeError as error:
    ...     print(error, error.__notes__)
    no tokens left ["While embedding column 'text' for 'vector' with Broken."]
    """
    try:
        yield
    except Exception as error:
        name = type(function).__name__
        if isinstance(function, UnavailableFunction):
            name = str(function.entry.get("name"))
        note = f"While embedding {what} for {column!r} with {name}."
        # an error that is kept and raised again has it already
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
        raise
