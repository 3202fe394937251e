"""Embedding functions: the registry, the base classes, and one module a provider.

Every name is imported on first use, so that importing this package loads no model library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpu_lance.optional import lazy

if TYPE_CHECKING:
    from gpu_lance.embeddings.base import (
        EmbeddingFunction,
        EmbeddingFunctionConfig,
        TextEmbeddingFunction,
    )
    from gpu_lance.embeddings.cohere import CohereEmbeddingFunction
    from gpu_lance.embeddings.colbert import ColbertEmbeddings
    from gpu_lance.embeddings.device_base import DeviceEmbeddingFunction
    from gpu_lance.embeddings.huggingface import TransformersEmbeddingFunction
    from gpu_lance.embeddings.openai import OpenAIEmbeddings
    from gpu_lance.embeddings.registry import EmbeddingFunctionRegistry, get_registry, register
    from gpu_lance.embeddings.sentence_transformers import SentenceTransformerEmbeddings

_EXPORTS = {
    "CohereEmbeddingFunction": "cohere",
    "ColbertEmbeddings": "colbert",
    "DeviceEmbeddingFunction": "device_base",
    "EmbeddingFunction": "base",
    "EmbeddingFunctionConfig": "base",
    "EmbeddingFunctionRegistry": "registry",
    "OpenAIEmbeddings": "openai",
    "SentenceTransformerEmbeddings": "sentence_transformers",
    "TextEmbeddingFunction": "base",
    "TransformersEmbeddingFunction": "huggingface",
    "get_registry": "registry",
    "register": "registry",
}

__all__ = [
    "CohereEmbeddingFunction",
    "ColbertEmbeddings",
    "DeviceEmbeddingFunction",
    "EmbeddingFunction",
    "EmbeddingFunctionConfig",
    "EmbeddingFunctionRegistry",
    "OpenAIEmbeddings",
    "SentenceTransformerEmbeddings",
    "TextEmbeddingFunction",
    "TransformersEmbeddingFunction",
    "get_registry",
    "register",
]

__getattr__, __dir__ = lazy(__name__, _EXPORTS, ["utils"])
