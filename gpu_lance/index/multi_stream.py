"""The documents of a column that are read from Lance: for each search, or as far as it measures."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from gpu_lance.index.multi_read import Documents, read_documents
from gpu_lance.index.multi_store import MultiSnapshot
from gpu_lance.index.ragged import bounds_of, rows_of
from gpu_lance.index.stream import places
from gpu_lance.optional import require

if TYPE_CHECKING:
    import lance
    import torch

    from gpu_lance.index.multi_rescore import Values

EXTRAS = "cpu|cuda13|cuda12"


def lookup(dataset: lance.LanceDataset, column: str, snapshot: MultiSnapshot) -> Values:
    """Gives the stored vectors of documents, read from Lance: for those held narrower.

    Parameters
    ----------
    dataset : lance.LanceDataset
        At the version of the snapshot.
    column : str
    snapshot : MultiSnapshot
    """

    def values(slots: np.ndarray) -> torch.Tensor:
        wanted = snapshot.row_ids[slots]
        blocks = read_documents(dataset, column, snapshot.ndims, row_ids=wanted)
        return _picked([replace(b, vectors=b.vectors.copy()) for b in blocks], wanted)

    return values


def _picked(blocks: list[Documents], wanted: np.ndarray) -> torch.Tensor:
    """The vectors, on the host, of the documents with those row ids, in their order."""
    torch = require("torch", extra=EXTRAS)
    vectors = np.concatenate([block.vectors for block in blocks])
    bounds = bounds_of(np.concatenate([np.diff(block.offsets) for block in blocks]))
    at = places(blocks, wanted)
    return torch.from_numpy(vectors[rows_of(bounds[at], bounds[at + 1])])


def stored(snapshot: MultiSnapshot, wide: list[Documents]) -> Values | None:
    """Gives the vectors of documents from blocks that hold wider values, if there are any."""
    if not wide:
        return None
    return lambda slots: _picked(wide, snapshot.row_ids[slots])
