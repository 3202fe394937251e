"""Stand-in for a stored embedding function that cannot be made here."""

from __future__ import annotations

import copy
from typing import Any

from pydantic import PrivateAttr

from gpu_lance.embeddings.base import EmbeddingFunction


class UnavailableFunction(EmbeddingFunction):
    """Raises, when used, what stopped the real function from being made.

    A table with such a column still opens, and searches by vector work.

    Examples
    --------
    >>> function = UnavailableFunction.from_entry({"name": "gone"}, KeyError("gone"))
    >>> function.ndims()
    Traceback (most recent call last):
    KeyError: 'gone'
    """

    _entry: dict[str, Any] = PrivateAttr(default_factory=dict)
    _error: Exception = PrivateAttr()

    @classmethod
    def from_entry(cls, entry: dict[str, Any], error: Exception) -> UnavailableFunction:
        """Keep the entry of the table's metadata, and the error to raise."""
        function = cls()
        function._entry = copy.deepcopy(entry)
        function._error = error.with_traceback(None)
        return function

    @property
    def entry(self) -> dict[str, Any]:
        """The entry of the table's metadata, as it was read."""
        return copy.deepcopy(self._entry)

    @property
    def error(self) -> Exception:
        """What every use raises."""
        return self._error

    def compute_query_embeddings(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Raise."""
        raise self._error.with_traceback(None)

    def compute_source_embeddings(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Raise."""
        raise self._error.with_traceback(None)

    def ndims(self) -> int:
        """Raise."""
        raise self._error.with_traceback(None)

    def safe_model_dump(self) -> dict[str, Any]:
        """Return the stored arguments unchanged."""
        return dict(self.entry.get("model") or {})

    def _comparison_key(self) -> Any:
        from gpu_lance.embeddings.identity import freeze

        return freeze(self._entry)
