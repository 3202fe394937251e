"""What readers of a resident column see: chunks on a device, and which of their rows there are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from gpu_lance.device import as_tensor
from gpu_lance.errors import QueryError
from gpu_lance.index.engines import Block
from gpu_lance.index.slots import find
from gpu_lance.optional import require
from gpu_lance.types import Metric

if TYPE_CHECKING:
    import torch

EXTRAS = "cpu|cuda13|cuda12"
TILE_BYTES = 64 << 20  # of vectors or scores in flight; several buffers of it stay below 256 MiB


def tile_rows(ndims: int, itemsize: int = 4) -> int:
    """How many vectors make one tile."""
    return max(1, TILE_BYTES // (itemsize * ndims))


@dataclass(frozen=True, eq=False)
class Chunk:
    """A part of the matrix, never moved once it is made.

    Parameters
    ----------
    vectors : torch.Tensor
        (room, d) float32 or float16.
    norms : torch.Tensor
        (room,) float32, their Euclidean norms, on the device that searches.
    """

    vectors: torch.Tensor
    norms: torch.Tensor

    @property
    def room(self) -> int:
        return len(self.vectors)

    @property
    def nbytes(self) -> int:
        return self.vectors.element_size() * self.vectors.numel() + 4 * self.room


@dataclass(frozen=True)
class Lengths:
    """What is known of the norms of all rows of a store, dead ones included.

    Parameters
    ----------
    largest, smallest : float
        Of the norms that are not 0; 0.0 and infinity if there are none.
    zeros : bool
        Whether a vector of zeros is among them.
    """

    largest: float = 0.0
    smallest: float = float("inf")
    zeros: bool = False

    @property
    def deviation(self) -> float:
        """How far the norms are from 1 at most."""
        if self.largest == 0.0:
            return 0.0
        return max(abs(self.largest - 1.0), abs(1.0 - self.smallest))

    def joined(self, norms: torch.Tensor) -> Lengths:
        """With more norms, (n,) float32."""
        if len(norms) == 0:
            return self
        low, high = (float(value) for value in norms.aminmax())
        if low > 0:
            return Lengths(max(self.largest, high), min(self.smallest, low), self.zeros)
        rest = norms[norms > 0]
        if len(rest) == 0:
            return Lengths(self.largest, self.smallest, True)
        return Lengths(max(self.largest, high), min(self.smallest, float(rest.min())), True)


@dataclass(frozen=True, eq=False)
class Mask:
    """Which slots count.

    Parameters
    ----------
    bits : torch.Tensor
        (n,) bool on the device.
    count : int
        How many of them are set.
    """

    bits: torch.Tensor
    count: int

    def __and__(self, other: Mask) -> Mask:
        bits = self.bits & other.bits
        return Mask(bits, int(bits.sum()))


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The rows of one version, which nothing changes any more.

    A slot is a row's place in the matrix, counted over all chunks.

    Parameters
    ----------
    chunks : tuple of Chunk
    used : tuple of int
        Rows in each chunk.
    row_ids : numpy.ndarray
        (n,) int64, by slot.
    live : numpy.ndarray or None
        (n,) bool, by slot: which rows there are; None for all.
    num_live : int
    lengths : Lengths
    ndims : int
    dtype : torch.dtype
    device : torch.device
        Where it is searched.
    ready : torch.cuda.Event, optional
        On CUDA, after which the rows are there.
    """

    chunks: tuple[Chunk, ...]
    used: tuple[int, ...]
    row_ids: np.ndarray
    live: np.ndarray | None
    num_live: int
    lengths: Lengths
    ndims: int
    dtype: torch.dtype
    device: torch.device
    ready: torch.cuda.Event | None = None
    _order: list[np.ndarray] = field(default_factory=list)
    _blocks: list[tuple[int, Block]] = field(default_factory=list)

    def __len__(self) -> int:
        """How many slots there are, dead ones included."""
        return len(self.row_ids)

    @functools.cached_property
    def live_mask(self) -> Mask | None:
        """The rows that there are; None for every slot."""
        return None if self.live is None else Mask(settled(self.live, self.device), self.num_live)

    @functools.cached_property
    def directed_mask(self) -> Mask | None:
        """The rows with a direction, those not of zeros; None for every slot."""
        if not self.lengths.zeros or not self.chunks:  # rows that are gone count in `lengths` too
            return self.live_mask
        torch = require("torch", extra=EXTRAS)
        parts = [c.norms[:used] > 0 for c, used in zip(self.chunks, self.used, strict=True)]
        bits = torch.cat(parts)
        mask = Mask(bits, int(bits.sum()))
        return mask if self.live_mask is None else mask & self.live_mask

    @functools.cached_property
    def offsets(self) -> tuple[int, ...]:
        """The first slot of each chunk, and the number of slots."""
        return (0, *(int(end) for end in np.cumsum(self.used)))

    def selection(self, metric: Metric, allowed: Mask | None) -> Mask | None:
        """The slots that a search finds, of those in `allowed`; None for every slot."""
        size = len(self)
        if allowed is not None and allowed.bits.shape != (size,):
            raise QueryError(f"The mask has shape {tuple(allowed.bits.shape)}, wanted ({size},).")
        if metric is Metric.COSINE and self.lengths.zeros:
            mask = self.directed_mask
            mask = allowed if mask is None else mask if allowed is None else mask & allowed
        else:  # what is allowed is live
            mask = self.live_mask if allowed is None else allowed
        return None if mask is None or mask.count == size else mask

    def mask(self, row_ids: np.ndarray) -> Mask:
        """The slots of those row ids, as far as they are here."""
        slots = find(self.row_ids, self.live, row_ids, self._order)
        bits = np.zeros(len(self), bool)
        bits[slots[slots >= 0]] = True
        return Mask(settled(bits, self.device), int(np.count_nonzero(bits)))

    def pieces(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """First slot, vectors (t, d) and norms (t,) on the device, in large pieces.

        They are views of the chunks, or copies of bounded size of chunks that are elsewhere.
        """
        step = 4 * tile_rows(self.ndims, self.dtype.itemsize)
        for first, chunk, used in zip(self.offsets[:-1], self.chunks, self.used, strict=True):
            if chunk.vectors.device == self.device:
                if used:
                    yield first, chunk.vectors[:used], chunk.norms[:used]
                continue
            for start in range(0, used, step):
                stop = min(start + step, used)
                vectors = chunk.vectors[start:stop].to(self.device, non_blocking=True)
                yield first + start, vectors, chunk.norms[start:stop]

    def blocks(self) -> Iterator[tuple[int, Block]]:
        """First slot and block of each of :meth:`pieces`; blocks of views are made once."""
        if self._blocks:
            yield from self._blocks
            return
        made = []
        for first, vectors, norms in self.pieces():
            made.append((first, Block(vectors, norms)))
            yield made[-1]
            if not self._is_here:
                made.clear()
        self._blocks[:] = made

    @property
    def _is_here(self) -> bool:
        return all(chunk.vectors.device == self.device for chunk in self.chunks)

    def gather(self, slots: torch.Tensor) -> torch.Tensor:
        """A copy of the vectors in `slots`, (n,) int64 on the device."""
        return self._collect(slots, lambda chunk: chunk.vectors, (self.ndims,), self.dtype)

    def norms_of(self, slots: torch.Tensor) -> torch.Tensor:
        """The norms, float32, of `slots`, (n,) int64 on the device."""
        torch = require("torch", extra=EXTRAS)
        return self._collect(slots, lambda chunk: chunk.norms, (), torch.float32)

    def _collect(
        self,
        slots: torch.Tensor,
        of: Callable[[Chunk], torch.Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        if len(self.chunks) == 1:
            source = of(self.chunks[0])
            return source.index_select(0, slots.to(source.device)).to(self.device)
        out = slots.new_empty((len(slots), *shape), dtype=dtype)
        for first, chunk, used in zip(self.offsets[:-1], self.chunks, self.used, strict=True):
            here = ((slots >= first) & (slots < first + used)).nonzero()[:, 0]
            source = of(chunk)
            found = source.index_select(0, (slots[here] - first).to(source.device))
            out[here] = found.to(self.device)
        return out

    @property
    def own_nbytes(self) -> int:
        """Bytes that it shares with no other version: live bits, and the order of the row ids."""
        bits = 0 if self.live is None else 2 * len(self)
        return bits + sum(order.nbytes for order in self._order)


def settled(bits: np.ndarray, device: torch.device) -> torch.Tensor:
    """The bits on the device, there for every stream."""
    tensor = as_tensor(bits, device)
    if device.type == "cuda":
        require("torch", extra=EXTRAS).cuda.current_stream(device).synchronize()
    return tensor
