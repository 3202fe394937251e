"""Embedding functions: the registry, the base classes, and one module a provider.

Every name is imported on first use, so that importing this package loads no model library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu_lance.embeddings.base import (
        EmbeddingFunction,
        EmbeddingFunctionConfig,
        TextEmbeddingFunction,
    )
    from gpu_lance.embeddings.device_base import DeviceEmbeddingFunction
    from gpu_lance.embeddings.registry import EmbeddingFunctionRegistry, get_registry, register
    from gpu_lance.embeddings.sentence_transformers import SentenceTransformerEmbeddings

_EXPORTS = {
    "DeviceEmbeddingFunction": "device_base",
    "EmbeddingFunction": "base",
    "EmbeddingFunctionConfig": "base",
    "EmbeddingFunctionRegistry": "registry",
    "SentenceTransformerEmbeddings": "sentence_transformers",
    "TextEmbeddingFunction": "base",
    "get_registry": "registry",
    "register": "registry",
}

__all__ = [
    "DeviceEmbeddingFunction",
    "EmbeddingFunction",
    "EmbeddingFunctionConfig",
    "EmbeddingFunctionRegistry",
    "SentenceTransformerEmbeddings",
    "TextEmbeddingFunction",
    "get_registry",
    "register",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
