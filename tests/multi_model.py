"""MaxSim in numpy: float64, summed by halving, so that distances are equal to the last bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from search_model import tree_sum

METRICS = ("l2", "cosine", "dot")


def distance(metric: str, query: np.ndarray, document: np.ndarray | None) -> np.float32:
    """Of a query (c, d) and a document (t, d) as stored; NaN if it is never found."""
    nothing = np.float32(np.nan)
    if document is None or len(document) == 0:
        return nothing
    with np.errstate(over="ignore"):
        narrow = document.astype(np.float32)
    if not np.isfinite(narrow).all():
        return nothing
    q, x = query.astype(np.float32).astype(np.float64), document.astype(np.float64)
    if metric == "cosine":
        q, x = q[(q != 0).any(axis=1)], x[(narrow != 0).any(axis=1)]
        if len(q) == 0 or len(x) == 0:
            return nothing
    each = q[:, None, :]
    if metric == "l2":
        every = tree_sum((x - each) ** 2)
    elif metric == "dot":
        every = 1 - tree_sum(x * each)
    else:
        norms = np.sqrt(tree_sum(q * q))[:, None] * np.sqrt(tree_sum(x * x))
        every = np.maximum(1 - tree_sum(x * each) / norms, 0)
    least = every.min(axis=1)
    with np.errstate(over="ignore"):
        return tree_sum(least).astype(np.float32)


def nearest(
    metric: str,
    query: np.ndarray,
    documents: Sequence[np.ndarray | None],
    row_ids: Sequence[int],
    k: int,
    lower: float | None = None,
    upper: float | None = None,
) -> tuple[list[int], list[np.float32]]:
    """Row ids and distances of the k nearest, in the order of (distance, row id)."""
    found = []
    for row_id, document in zip(row_ids, documents, strict=True):
        d = distance(metric, query, document)
        low = lower is None or d >= np.float32(lower)
        high = upper is None or d < np.float32(upper)
        if not np.isnan(d) and low and high:
            found.append((d, row_id))
    found.sort()
    return [row_id for _, row_id in found[:k]], [d for d, _ in found[:k]]


def ragged(
    documents: Sequence[np.ndarray], ndims: int, dtype: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (t, d) and offsets (n + 1,) of documents."""
    lengths = [len(document) for document in documents]
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    empty = np.zeros((0, ndims), dtype)
    return np.concatenate([empty, *documents]).astype(dtype), offsets


def some_documents(
    rng: np.random.Generator, n: int, ndims: int, dtype: Any = np.float32, longest: int = 12
) -> list[np.ndarray | None]:
    """Documents of which some are null, empty, equal, of whole numbers, or hold zeros or NaN."""
    made: list[np.ndarray | None] = []
    for kind in rng.choice(9, size=n, p=[0.4, 0.25, 0.1, 0.05, 0.05, 0.05, 0.04, 0.03, 0.03]):
        length = int(rng.integers(1, longest + 1))
        normal = rng.standard_normal((length, ndims))
        document = (normal if kind != 1 else rng.integers(-2, 3, (length, ndims))).astype(dtype)
        if kind == 2 and made:
            document = made[int(rng.integers(len(made)))]  # type: ignore[assignment]
        elif kind == 3:
            made.append(None)
            continue
        elif kind == 4:
            document = document[:0]
        elif kind == 5:
            document[rng.integers(length)] = 0
        elif kind == 6:
            document[:] = 0
        elif kind == 7:
            document[rng.integers(length), rng.integers(ndims)] = rng.choice([np.nan, np.inf])
        elif kind == 8:
            document = (document * 100).astype(dtype)
        made.append(document)
    return made
