"""Where an index keeps its float32 matrix: the interface, and the one that needs only torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from gpu_lance.optional import require

if TYPE_CHECKING:
    import torch

TILE_BYTES = 64 << 20  # of vectors or scores in flight; several buffers of it stay below 256 MiB


def tile_rows(ndims: int) -> int:
    """How many float32 vectors make one tile."""
    return max(1, TILE_BYTES // (4 * ndims))


class Store(Protocol):
    """A growing (n, d) float32 matrix in dense slots on one device, which may search itself."""

    name: str
    max_candidates: int

    def __len__(self) -> int: ...

    def reserve(self, rows: int) -> None:
        """Make room for that many rows in all, where the engine can."""

    def add(self, vectors: torch.Tensor) -> None:
        """Append (n, d) contiguous float32 vectors on the store's device."""

    def tiles(self, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        """First slot and vectors (t <= rows, d); valid until the next tile or change."""

    def gather(self, slots: torch.Tensor) -> torch.Tensor:
        """A copy of the vectors in `slots`, (n,) int64 on the device."""

    def candidates(self, queries: torch.Tensor, c: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (m, c) float32, the nearest first, and slots (m, c) int64, -1 for none.

        Scores are distances in float32 and `c` is at most ``max_candidates``, which is 0 for a
        store that cannot search.
        """

    def keep(self, slots: torch.Tensor) -> None:
        """Shrink to those slots, in their order."""

    def close(self) -> None:
        """Free the memory."""


def _float32() -> torch.dtype:
    kind: torch.dtype = require("torch", extra="cpu|cuda13|cuda12").float32
    return kind


class TorchStore:
    """Chunks of torch tensors, searched by a torch product.

    Parameters
    ----------
    ndims : int
        Length of a vector.
    device : torch.device
        Where the chunks are.

    Examples
    --------
    >>> import torch
    >>> store = TorchStore(2, torch.device("cpu"))
    >>> store.add(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> store.gather(torch.tensor([1])).tolist()
    [[3.0, 4.0]]
    """

    name = "torch"
    max_candidates = 0

    def __init__(self, ndims: int, device: torch.device) -> None:
        self.ndims = ndims
        self.device = device
        self._chunks: list[torch.Tensor] = []
        self._used: list[int] = []
        self._wanted = 0

    def __len__(self) -> int:
        return sum(self._used)

    def reserve(self, rows: int) -> None:
        self._wanted = rows

    def add(self, vectors: torch.Tensor) -> None:
        """Fill up the last chunk, then open one as large as what is announced or held."""
        torch = require("torch", extra="cpu|cuda13|cuda12")
        while len(vectors):
            if not self._chunks or self._used[-1] == len(self._chunks[-1]):
                size = len(self)
                grow = max(1, min(size, 4 * tile_rows(self.ndims)))
                room = max(len(vectors), self._wanted - size, grow)
                self._chunks.append(torch.empty((room, self.ndims), device=self.device))
                self._used.append(0)
            start = self._used[-1]
            fits = min(len(vectors), len(self._chunks[-1]) - start)
            self._chunks[-1][start : start + fits] = vectors[:fits]
            self._used[-1] += fits
            vectors = vectors[fits:]

    def tiles(self, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        first = 0
        for chunk, used in zip(self._chunks, self._used, strict=True):
            for start in range(0, used, rows):
                yield first + start, chunk[start : min(start + rows, used)]
            first += used

    def gather(self, slots: torch.Tensor) -> torch.Tensor:
        if len(self._chunks) == 1:
            return self._chunks[0].index_select(0, slots)
        out = slots.new_empty((len(slots), self.ndims), dtype=_float32())
        first = 0
        for chunk, used in zip(self._chunks, self._used, strict=True):
            here = ((slots >= first) & (slots < first + used)).nonzero()[:, 0]
            out[here] = chunk.index_select(0, slots[here] - first)
            first += used
        return out

    def candidates(self, queries: torch.Tensor, c: int) -> tuple[torch.Tensor, torch.Tensor]:
        raise RuntimeError("TorchStore is searched by its owner's scan.")

    def keep(self, slots: torch.Tensor) -> None:
        kept = TorchStore(self.ndims, self.device)
        kept.reserve(len(slots))
        step = tile_rows(self.ndims)
        for start in range(0, len(slots), step):
            kept.add(self.gather(slots[start : start + step]))
        self._chunks, self._used, self._wanted = kept._chunks, kept._used, 0

    def close(self) -> None:
        self._chunks, self._used = [], []
