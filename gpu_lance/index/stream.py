"""Exact search of a column that is not held: its rows are read from Lance for each search."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from gpu_lance.index.base import SearchResult, check_room
from gpu_lance.index.chunks import ChunkStore
from gpu_lance.index.exact import ExactSearch, checked
from gpu_lance.index.read import Block, read_blocks
from gpu_lance.index.rescore import NO_ROW, rank
from gpu_lance.index.snapshot import Snapshot
from gpu_lance.index.store import ResidentStore
from gpu_lance.optional import require

if TYPE_CHECKING:
    import lance
    import torch

    from gpu_lance.index.planner import Planner
    from gpu_lance.types import Metric

Bl = TypeVar("Bl", bound=Block)
Sn = TypeVar("Sn", bound=Snapshot)
Stored = Callable[["torch.Tensor"], "torch.Tensor"]  # the stored vectors (n, d) of slots (n,)

EXTRAS = "cpu|cuda13|cuda12"
PIECE_BYTES = 32 << 20  # few enough to be in memory for a while, enough to be worth a search


def lookup(dataset: lance.LanceDataset, column: str, snapshot: Snapshot) -> Stored:
    """Gives the stored vectors of slots, read from Lance: for rows that are held narrower.

    Parameters
    ----------
    dataset : lance.LanceDataset
        At the version of the snapshot.
    column : str
    snapshot : Snapshot
    """

    def stored(slots: torch.Tensor) -> torch.Tensor:
        wanted = snapshot.row_ids[slots.cpu().numpy()]
        blocks = read_blocks(dataset, column, snapshot.ndims, row_ids=wanted)
        return _picked([replace(b, vectors=b.vectors.copy()) for b in blocks], wanted)

    return stored


def _picked(blocks: list[Block], wanted: np.ndarray) -> torch.Tensor:
    """The vectors, on the host, of those row ids."""
    torch = require("torch", extra=EXTRAS)
    vectors = np.concatenate([block.vectors for block in blocks])
    return torch.from_numpy(vectors[places(blocks, wanted)])


def places(blocks: Sequence[Block], wanted: np.ndarray) -> np.ndarray:
    """Which rows of the blocks, one after the other, have those row ids."""
    row_ids = np.concatenate([block.row_ids for block in blocks])
    order = np.argsort(row_ids)
    return order[np.searchsorted(row_ids, wanted, sorter=order)]


def stream(
    blocks: Iterable[Block],
    ndims: int,
    metric: Metric,
    planner: Planner,
    device: torch.device,
    queries: torch.Tensor,
    k: int,
    lower: float | None,
    upper: float | None,
    run: Callable[[Callable[[torch.Tensor, int], SearchResult], torch.Tensor, int], SearchResult],
) -> tuple[SearchResult, int]:
    """The k nearest rows of each query among rows that go by once.

    The nearest of all are the nearest of each piece, merged; every piece is searched exactly.

    Parameters
    ----------
    blocks : iterable of Block
        The rows that qualify.
    queries : torch.Tensor
        (m, d), finite.
    run : callable
        Runs one search of a piece: it is given the search, the queries and k.

    Returns
    -------
    SearchResult
    int
        How many rows went by.
    """
    queries = checked(queries, k, ndims, device)

    def found() -> Iterator[tuple[int, SearchResult]]:
        for snapshot, wide in pieces(blocks, lambda dtype: ResidentStore(ndims, dtype, device)):
            exact = ExactSearch(snapshot, metric, planner, _stored(snapshot, wide))

            def one(some: torch.Tensor, k: int, exact: ExactSearch = exact) -> SearchResult:
                return exact.search(some, k, lower=lower, upper=upper)

            rows = snapshot.num_live
            yield rows, run(one, queries, min(k, max(1, rows)))

    return merged(found(), len(queries), k)


def _stored(snapshot: Snapshot, wide: list[Block]) -> Stored | None:
    if not wide:
        return None
    return lambda slots: _picked(wide, snapshot.row_ids[slots.cpu().numpy()])


def merged(parts: Iterable[tuple[int, SearchResult]], m: int, k: int) -> tuple[SearchResult, int]:
    """The k nearest of m queries over all parts, and how many rows those had.

    Parameters
    ----------
    parts : iterable
        How many rows a part has, and its nearest ones.
    """
    ids = np.full((m, 0), NO_ROW, np.int64)
    distances = np.full((m, 0), np.inf, np.float32)
    rows = 0
    for count, part in parts:
        rows += count
        names = np.where(part.row_ids < 0, NO_ROW, part.row_ids)
        width = min(k, ids.shape[1] + names.shape[1])
        check_room(m, width)
        ids, distances = rank(
            np.concatenate([ids, names], axis=1),
            np.concatenate([distances, part.distances], axis=1),
            width,
        )
    if ids.shape[1] == 0:
        return SearchResult.empty(m, 1), rows
    return SearchResult(np.where(ids == NO_ROW, -1, ids), distances), rows


def pieces(
    blocks: Iterable[Bl], make: Callable[[torch.dtype], ChunkStore[Sn]]
) -> Iterator[tuple[Sn, list[Bl]]]:
    """The rows in pieces of bounded size, and their blocks if those hold wider values.

    A piece is there until the next one is asked for, which takes its place.

    Parameters
    ----------
    blocks : iterable of Block
    make : callable
        Makes an empty store for vectors of a type.
    """
    torch = require("torch", extra=EXTRAS)
    store: ChunkStore[Sn] | None = None
    wide: list[Bl] = []
    seen = 0
    for block in blocks:
        (n, ndims), size = block.vectors.shape, block.vectors.dtype.itemsize
        if store is not None and (seen + n) * ndims * size > PIECE_BYTES:
            yield store.publish(), wide
            store.reset()
            seen, wide = 0, []
        if store is None:
            store = make(torch.float16 if size == 2 else torch.float32)
            store.expect(max(n, PIECE_BYTES // (ndims * size)))
        store.add_block(block)
        seen += n
        if size == 8:
            wide.append(replace(block, vectors=block.vectors.copy()))
    if store is not None:
        yield store.publish(), wide
