"""Vector indexes that live on the device: what they are, and how they follow a table.

Every name is imported on first use, so that importing this package loads neither torch nor FAISS.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu_lance.index.base import SearchResult, VectorIndex
    from gpu_lance.index.column import ColumnIndex
    from gpu_lance.index.config import Flat
    from gpu_lance.index.flat import FlatIndex

_EXPORTS = {
    "ColumnIndex": "column",
    "Flat": "config",
    "FlatIndex": "flat",
    "SearchResult": "base",
    "VectorIndex": "base",
}

__all__ = ["ColumnIndex", "Flat", "FlatIndex", "SearchResult", "VectorIndex"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
