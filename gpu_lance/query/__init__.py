"""Searching a table: builders, how a search runs, and what it returns.

Every name is imported on first use, so that importing this package loads neither torch nor FAISS.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
