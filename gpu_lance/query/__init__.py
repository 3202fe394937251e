"""Searching a table: builders, how a search runs, and what it returns.

Every name is imported on first use, so that importing this package loads neither torch nor FAISS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpu_lance.optional import lazy

if TYPE_CHECKING:
    from gpu_lance.query.base import LanceQueryBuilder
    from gpu_lance.query.builder import (
        LanceEmptyQueryBuilder,
        LanceVectorQueryBuilder,
        search,
    )
    from gpu_lance.query.source import SearchTarget
    from gpu_lance.query.spec import ColumnOrdering

_EXPORTS = {
    "ColumnOrdering": "spec",
    "LanceEmptyQueryBuilder": "builder",
    "LanceQueryBuilder": "base",
    "LanceVectorQueryBuilder": "builder",
    "SearchTarget": "source",
    "search": "builder",
}

__all__ = [
    "ColumnOrdering",
    "LanceEmptyQueryBuilder",
    "LanceQueryBuilder",
    "LanceVectorQueryBuilder",
    "SearchTarget",
    "search",
]

__getattr__, __dir__ = lazy(__name__, _EXPORTS)
