"""The documents of a column that are read from Lance: for each search, or as far as it measures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from gpu_lance.index.multi_read import Documents, read_documents
from gpu_lance.index.multi_store import MultiSnapshot, MultiStore
from gpu_lance.index.ragged import rows_of
from gpu_lance.index.stream import PIECE_BYTES
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

    def stored(slots: np.ndarray) -> torch.Tensor:
        wanted = snapshot.row_ids[slots]
        blocks = read_documents(dataset, column, snapshot.ndims, row_ids=wanted)
        return _pick([(b.row_ids, b.offsets, b.vectors.copy()) for b in blocks], wanted)

    return stored


def _pick(
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]], wanted: np.ndarray
) -> torch.Tensor:
    """The vectors, on the host, of the documents with those row ids, in their order."""
    torch = require("torch", extra=EXTRAS)
    row_ids = np.concatenate([part[0] for part in parts])
    vectors = np.concatenate([part[2] for part in parts])
    lengths = np.concatenate([np.diff(part[1]) for part in parts])
    ends = np.cumsum(lengths)
    order = np.argsort(row_ids)
    places = order[np.searchsorted(row_ids, wanted, sorter=order)]
    rows = rows_of((ends - lengths)[places], ends[places])
    return torch.from_numpy(vectors[rows])


def pieces(
    blocks: Iterable[Documents], ndims: int, device: torch.device
) -> Iterator[tuple[MultiSnapshot, Values | None]]:
    """The documents in pieces of bounded size, and their stored values if those are wider.

    A piece is there until the next one is asked for, which takes its place.
    """
    torch = require("torch", extra=EXTRAS)
    store: MultiStore | None = None
    wide: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    seen = 0

    def piece() -> tuple[MultiSnapshot, Values | None]:
        assert store is not None
        snapshot, parts = store.publish(), list(wide)
        if not parts:
            return snapshot, None
        return snapshot, lambda slots: _pick(parts, snapshot.row_ids[slots])

    for block in blocks:
        n, size = len(block.vectors), block.vectors.dtype.itemsize
        if store is not None and (seen + n) * ndims * size > PIECE_BYTES:
            yield piece()
            store.reset()
            seen, wide = 0, []
        if store is None:
            store = MultiStore(ndims, torch.float16 if size == 2 else torch.float32, device)
            store.expect(max(n, PIECE_BYTES // (ndims * size)))
        store.add(block.vectors, block.offsets, block.row_ids, block.updated, block.valid)
        seen += n
        if size == 8:
            wide.append((block.row_ids, block.offsets, block.vectors.copy()))
    if store is not None:
        yield piece()
