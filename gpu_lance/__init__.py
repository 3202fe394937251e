"""GPU embedding and vector search over Lance tables, with LanceDB's API.

Importing this package loads no model, tensor or table library; each public name loads what it
needs on first use.

Examples
--------
>>> import gpu_lance
>>> db = gpu_lance.connect("memory://", device="cpu")
>>> db.create_table("points", [{"vector": [0.0, 1.0], "name": "up"}]).count_rows()
1
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu_lance.db import connect

__version__ = "0.1.0"

_EXPORTS = {"connect": "db"}
# `gpu_lance.embeddings` works without an import of its own, as `lancedb.embeddings` does.
_MODULES = ("db", "embeddings", "errors", "index", "pydantic", "query", "table")

__all__ = ["__version__", "connect"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS, *_MODULES})
