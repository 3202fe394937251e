"""The resident store of a multivector column: chunks of vectors, and which document has which."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_lance.errors import BadVectorError
from gpu_lance.index.chunks import MAX_DEAD, ChunkStore, picked
from gpu_lance.index.ragged import bounds_of
from gpu_lance.index.snapshot import Mask, Snapshot, settled
from gpu_lance.optional import require

if TYPE_CHECKING:
    import torch

    from gpu_lance.index.multi_read import Documents

EXTRAS = "cpu|cuda13|cuda12"


@dataclass(frozen=True, eq=False)
class MultiSnapshot(Snapshot):
    """The documents of one version, which nothing changes any more.

    A slot is a document. Its vectors are rows of the matrix that follow each other in one chunk;
    the rows are counted over all chunks, in the order of the slots. A document has at least one.

    Parameters
    ----------
    bounds : numpy.ndarray
        (n + 1,) int64: document i has the matrix rows bounds[i] to bounds[i + 1].
    longest, shortest : numpy.ndarray
        (n,) float32, by slot: the largest norm of its vectors, and the smallest of those that are
        not 0; infinity if all are.
    """

    bounds: np.ndarray = field(kw_only=True)
    longest: np.ndarray = field(kw_only=True)
    shortest: np.ndarray = field(kw_only=True)

    @functools.cached_property
    def num_vectors(self) -> int:
        """How many vectors the live documents have."""
        if self.live is None:
            return int(self.bounds[-1])
        return int(np.diff(self.bounds)[self.live].sum())

    @functools.cached_property
    def directed_mask(self) -> Mask | None:
        """The documents with a vector that is not of zeros; None for every slot."""
        if not self.lengths.zeros:
            return self.live_mask
        bits = self.longest > 0
        mask = Mask(settled(bits, self.device), int(np.count_nonzero(bits)))
        return mask if self.live_mask is None else mask & self.live_mask


class MultiStore(ChunkStore[MultiSnapshot]):
    """A growing set of documents with row ids: its writer's side, for one thread at a time.

    See :class:`~gpu_lance.index.chunks.ChunkStore` for the parameters.

    Examples
    --------
    >>> import torch
    >>> store = MultiStore(2, torch.float32, torch.device("cpu"))
    >>> vectors = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    >>> store.add(vectors, np.array([0, 2, 3]), np.array([7, 9]))
    >>> store.publish().bounds.tolist()
    [0, 2, 3]
    """

    def __init__(self, *args: object, **more: object) -> None:
        super().__init__(*args, **more)  # type: ignore[arg-type]
        self._forget_all()

    def _forget_all(self) -> None:
        self._bounds = np.zeros(1, np.int64)
        self._longest = np.empty(0, np.float32)
        self._shortest = np.empty(0, np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of the chunks and of what is known of the slots."""
        known = (self._bounds, self._longest, self._shortest)
        return super().nbytes + sum(array.nbytes for array in known)

    def add(
        self,
        vectors: torch.Tensor | np.ndarray,
        offsets: np.ndarray,
        row_ids: np.ndarray,
        updated: np.ndarray | int = 0,
        valid: np.ndarray | None = None,
    ) -> None:
        """Add documents under row ids that are not live here.

        Null documents, those without vectors, and those with NaN or infinity in any vector are
        left out.

        Parameters
        ----------
        vectors : torch.Tensor or numpy.ndarray
            (t, d), of any float type, preferably a tensor on the device, or an array that was
            read. Not kept, not changed.
        offsets : numpy.ndarray
            (n + 1,) integers from 0 to t: document i has the vectors offsets[i] to offsets[i + 1].
        row_ids : numpy.ndarray
            (n,) integers.
        updated : numpy.ndarray or int
            (n,) int64, the version of each row's last change.
        valid : numpy.ndarray, optional
            (n,) bool, False for null documents.

        Raises
        ------
        BadVectorError
            If the shapes do not fit.
        NoRoomError
            If the memory plan has no room; some of the documents may be in.
        DoesNotNarrowError
            If a value is beyond what the rows are held in, or a vector would become zero.
        """
        n = len(row_ids)
        bounds = np.asarray(offsets, np.int64)
        check_offsets(bounds, n, vectors, self.ndims, valid)
        torch = require("torch", extra=EXTRAS)
        ids = np.asarray(row_ids, np.int64)
        when = np.broadcast_to(np.asarray(updated, np.int64), (n,))
        lengths = np.diff(bounds)
        there = lengths > 0 if valid is None else (lengths > 0) & np.asarray(valid, bool)
        if not there.all():
            if lengths[~there].any():
                vectors = picked(vectors, np.repeat(there, lengths))
            ids, when, lengths = ids[there], when[there], lengths[there]
            bounds = bounds_of(lengths)
        first = 0
        with torch.inference_mode():
            while first < len(ids):
                at = self._current(bounds, first)
                room = self._chunks[at].room - self._used[at]
                stop = int(np.searchsorted(bounds, bounds[first] + room, side="right")) - 1
                part = slice(first, stop)
                self._documents(
                    at, vectors[bounds[first] : bounds[stop]], lengths[part], ids[part], when[part]
                )
                first = stop
        self._published = None

    def add_block(self, block: Documents) -> None:
        """See :meth:`ChunkStore.add_block`."""
        self.add(block.vectors, block.offsets, block.row_ids, block.updated, block.valid)

    def _current(self, bounds: np.ndarray, first: int) -> int:
        """The chunk that takes the document `first`; those before the last one used are closed."""
        length = int(bounds[first + 1] - bounds[first])
        used = [at for at, rows in enumerate(self._used) if rows]
        for at in range(used[-1] if used else 0, len(self._chunks)):
            if self._chunks[at].room - self._used[at] >= length:
                return at
        return self._grow(max(length, min(int(bounds[-1] - bounds[first]), self._most)))

    def _documents(
        self,
        at: int,
        vectors: torch.Tensor | np.ndarray,
        lengths: np.ndarray,
        ids: np.ndarray,
        when: np.ndarray,
    ) -> None:
        """Write documents, for which there is room, into a chunk."""
        start = self._used[at]
        begins = np.cumsum(lengths) - lengths

        def whole(finite: np.ndarray) -> np.ndarray:  # a document is in with all its vectors
            return np.repeat(np.logical_and.reduceat(finite, begins), lengths)

        kept = self._fill(at, vectors, whole)
        if kept is not None:
            there = kept[begins]
            lengths, ids, when = lengths[there], ids[there], when[there]
        if not len(ids):
            return
        norms = self._chunks[at].norms[start : self._used[at]].cpu().numpy()
        begins = np.cumsum(lengths) - lengths
        n = len(self._slots)
        self._bounds = _appended(self._bounds, n + 1, self._bounds[n] + begins + lengths)
        self._longest = _appended(self._longest, n, np.maximum.reduceat(norms, begins))
        above = np.where(norms > 0, norms, np.float32(np.inf))
        self._shortest = _appended(self._shortest, n, np.minimum.reduceat(above, begins))
        self._slots.add(ids, when)

    def reset(self) -> None:
        """See :meth:`ChunkStore.reset`."""
        super().reset()
        self._forget_all()

    # --------------------------------------------------------------- publishing

    def _snapshot(self, *common: Any) -> MultiSnapshot:
        n = len(self._slots)
        return MultiSnapshot(
            *common,
            bounds=self._bounds[: n + 1],
            longest=self._longest[:n],
            shortest=self._shortest[:n],
        )

    @property
    def wants_sweep(self) -> bool:
        """Whether so many vectors are of dead documents that they should be swept out."""
        rows = sum(self._used)
        return rows - self.publish().num_vectors > MAX_DEAD * rows

    def _slots_of(self, at: int) -> int:
        first = sum(self._used[:at])
        bounds = self._bounds[: len(self._slots) + 1]
        start, stop = np.searchsorted(bounds, [first, first + self._used[at]])
        return int(stop - start)

    def _kept(self, first: int, stop: int) -> np.ndarray:
        return np.repeat(self._slots.live[first:stop], np.diff(self._bounds[first : stop + 1]))

    def _forget(self, first: int, stop: int) -> None:
        n = len(self._slots)
        kept = np.ones(n, bool)
        kept[first:stop] = self._slots.live[first:stop]
        self._bounds = bounds_of(np.diff(self._bounds[: n + 1])[kept])
        self._longest, self._shortest = self._longest[:n][kept], self._shortest[:n][kept]
        super()._forget(first, stop)


def check_offsets(
    offsets: np.ndarray,
    n: int,
    vectors: torch.Tensor | np.ndarray,
    ndims: int,
    valid: np.ndarray | None = None,
) -> None:
    """Raise BadVectorError unless (t, d) vectors, (n + 1,) offsets and `valid` (n,) fit."""
    fits = (
        vectors.ndim == 2
        and vectors.shape[1] == ndims
        and offsets.shape == (n + 1,)
        and offsets[0] == 0
        and offsets[-1] == len(vectors)
        and bool((np.diff(offsets) >= 0).all())
        and (valid is None or len(valid) == n)
    )
    if not fits:
        raise BadVectorError(
            f"{n} documents of vectors of {ndims} values want vectors (t, {ndims}) and {n + 1} "
            f"ascending offsets from 0 to t, got vectors of shape {tuple(vectors.shape)} and "
            f"offsets of shape {offsets.shape}"
            + (f" from {offsets[0]} to {offsets[-1]}." if offsets.size else ".")
        )


def _appended(array: np.ndarray, size: int, more: np.ndarray) -> np.ndarray:
    """The first `size` values and more, in the same memory where that has room behind them."""
    needed = size + len(more)
    if needed > len(array):
        bigger = np.empty(max(needed, size + size // 2), array.dtype)
        bigger[:size] = array[:size]
        array = bigger
    array[size:needed] = more
    return array
