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

from typing import TYPE_CHECKING

from gpu_lance.optional import lazy

if TYPE_CHECKING:
    from gpu_lance.db import DBConnection, LanceDBConnection, connect
    from gpu_lance.table import Table

__version__ = "0.1.0"

_EXPORTS = {
    "DBConnection": "db",
    "LanceDBConnection": "db",
    "Table": "table",
    "connect": "db",
}
# `gpu_lance.embeddings` works without an import of its own, as `lancedb.embeddings` does.
_MODULES = ("db", "embeddings", "errors", "index", "pydantic", "query", "table")

__all__ = ["DBConnection", "LanceDBConnection", "Table", "__version__", "connect"]

__getattr__, __dir__ = lazy(__name__, _EXPORTS, _MODULES)
