"""Vector indexes that live on the device: what they are, and how they follow a table.

Every name is imported on first use, so that importing this package loads neither torch nor FAISS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpu_lance.optional import lazy

if TYPE_CHECKING:
    from gpu_lance.index.base import SearchResult, VectorIndex
    from gpu_lance.index.column import ColumnIndex
    from gpu_lance.index.config import Bitmap, BTree, Flat, LabelList
    from gpu_lance.index.flat import FlatIndex
    from gpu_lance.index.multi_column import MultiColumnIndex

_EXPORTS = {
    "BTree": "config",
    "Bitmap": "config",
    "ColumnIndex": "column",
    "Flat": "config",
    "FlatIndex": "flat",
    "LabelList": "config",
    "MultiColumnIndex": "multi_column",
    "SearchResult": "base",
    "VectorIndex": "base",
}

__all__ = [
    "BTree",
    "Bitmap",
    "ColumnIndex",
    "Flat",
    "FlatIndex",
    "LabelList",
    "MultiColumnIndex",
    "SearchResult",
    "VectorIndex",
]

__getattr__, __dir__ = lazy(__name__, _EXPORTS)
