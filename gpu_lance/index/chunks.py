"""The writer's side of a matrix in chunks: what the stores of vector columns have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from gpu_lance.device import as_tensor, is_out_of_memory
from gpu_lance.index.slots import SlotMap
from gpu_lance.index.snapshot import Chunk, Lengths, Snapshot, tile_rows
from gpu_lance.optional import require

if TYPE_CHECKING:
    import torch

Sn = TypeVar("Sn", bound=Snapshot, covariant=True)

EXTRAS = "cpu|cuda13|cuda12"
CHUNK_BYTES = 1 << 30  # the largest chunk
FIRST_BYTES = 1 << 20  # the smallest chunk that an append opens
TINIEST = 2.0**-126  # stands for the norm of a vector whose squares are too small to add up
SLOT_BYTES = 18  # a row id, the version of its last change, and live bits, on the host
MAX_DEAD = 0.2  # a larger share of dead slots is swept out


class NoRoomError(Exception):
    """The memory plan has no room for more rows."""


class DoesNotNarrowError(Exception):
    """A value does not fit the narrower type that the rows are held in."""


class ChunkStore(ABC, Generic[Sn]):
    """A growing matrix with row ids: its writer's side, for one thread at a time.

    Matrix rows go to the end of the last chunk, or to a new one of a quarter of what is held, up
    to 1 GiB; chunks are never moved. What was published before stays as it was. A slot is one row
    of the table: one row of the matrix, or several that follow each other in one chunk.

    Parameters
    ----------
    ndims : int
        Length of a vector.
    dtype : torch.dtype
        float32 or float16: how vectors are held.
    device : torch.device
        Where they are searched.
    home : torch.device, optional
        Where they are held, if elsewhere: pinned host memory beside a GPU.
    reserve : callable, optional
        Asked for the bytes of each new chunk, and whether they are needed, not only handy; False
        refuses them.
    release : callable, optional
        Told the bytes of each chunk that is let go.
    chunk_bytes : int
        The largest chunk.
    """

    _staging: torch.Tensor | None

    def __init__(
        self,
        ndims: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        home: torch.device | None = None,
        reserve: Callable[[int, bool], bool] = lambda size, needed: True,
        release: Callable[[int], None] = lambda size: None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        torch = require("torch", extra=EXTRAS)
        self.ndims = int(ndims)
        self.dtype = dtype
        # with its index: torch.device("cuda") is the current GPU, and equals no tensor's device
        self.device = torch.empty(0, device=device).device
        self._home = self.device if home is None else home
        self._reserve, self._release = reserve, release
        self._most = max(1, chunk_bytes // self._cost(1))
        self._least = min(self._most, max(1, FIRST_BYTES // self._cost(1)))
        self._chunks: list[Chunk] = []
        self._used: list[int] = []
        self._slots = SlotMap()
        self._lengths = Lengths()
        self._published: Sn | None = None
        self._staging = None

    def __len__(self) -> int:
        """How many rows are live."""
        return self._slots.num_live

    @property
    def nbytes(self) -> int:
        """Bytes of the chunks and of what is known of the slots."""
        return sum(chunk.nbytes for chunk in self._chunks) + self._slots.nbytes

    @property
    def slots(self) -> SlotMap:
        """The row ids by slot."""
        return self._slots

    # ------------------------------------------------------------------ filling

    def expect(self, rows: int) -> None:
        """Announce that `rows` rows are coming, so that chunks are sized to them."""
        while rows > 0:
            take = min(rows, self._most)
            self._open(take)
            rows -= take

    def _open(self, rows: int, needed: bool = True) -> None:
        torch = require("torch", extra=EXTRAS)
        size = self._cost(rows)
        if not self._reserve(size, needed):
            raise NoRoomError(f"There is no room for {rows} more rows.")
        try:
            vectors = self._matrix(rows)
            norms = torch.empty(rows, dtype=torch.float32, device=self.device)
        except BaseException:
            self._release(size)
            raise
        self._chunks.append(Chunk(vectors, norms))
        self._used.append(0)

    def _matrix(self, rows: int) -> torch.Tensor:
        torch = require("torch", extra=EXTRAS)
        if self._home == self.device and self.device.type == "cpu":
            # numpy asks Linux for huge pages: filled four times and scanned a quarter faster
            kind = np.float16 if self.dtype == torch.float16 else np.float32
            return torch.from_numpy(np.empty((rows, self.ndims), kind))
        return torch.empty(
            (rows, self.ndims), dtype=self.dtype, device=self._home,
            pin_memory=self._home != self.device,
        )  # fmt: skip

    def _cost(self, rows: int) -> int:
        beside = 0 if self._home.type == "cuda" else SLOT_BYTES
        return rows * (self.dtype.itemsize * self.ndims + 4 + beside)

    def _grow(self, needed: int) -> int:
        """Open a chunk of at least `needed` rows; returns its place."""
        roomy = min(max(needed, self._least, sum(self._used) // 4), max(self._most, needed))
        while roomy > needed:  # many small chunks would be slow
            try:
                self._open(roomy, needed=False)
                return len(self._chunks) - 1
            except NoRoomError:
                roomy = max(needed, roomy // 2)
        self._open(needed)
        return len(self._chunks) - 1

    @abstractmethod
    def add_block(self, block: Any) -> None:
        """Add the rows of a block that was read from Lance."""

    def _fill(
        self,
        at: int,
        vectors: torch.Tensor | np.ndarray,
        keep: Callable[[np.ndarray], np.ndarray] = lambda finite: finite,
    ) -> np.ndarray | None:
        """Write into a chunk; returns which rows it kept (n,), None if all.

        `keep` is given which rows are finite (n,), and says which of them to keep (n,).
        """
        torch = require("torch", extra=EXTRAS)
        chunk, start = self._chunks[at], self._used[at]
        place = chunk.vectors[start : start + len(vectors)]
        self._put(place, vectors)
        given = str(vectors.dtype).removeprefix("torch.")
        narrows = self.dtype == torch.float16 and given != "float16"
        here = place.to(self.device)
        norms = _norms(here)
        kept: np.ndarray | None = None
        if not bool(torch.isfinite(norms).all()):  # the norm of finite values may overflow
            finite = torch.isfinite(here).all(dim=1)
            if narrows:
                lost = torch.isfinite(as_tensor(vectors, self.device)).all(dim=1) & ~finite
                self._refuse(lost, vectors)
            if not bool(finite.all()):
                kept = keep(finite.cpu().numpy())
                which = torch.from_numpy(np.flatnonzero(kept)).to(here.device)
                here, norms = here[which], norms[which]
                place[: len(here)] = here.to(place.device)
        if bool((norms == 0).any()):
            if narrows:
                finite_ones = vectors if kept is None else picked(vectors, kept)
                lost = (norms == 0) & (as_tensor(finite_ones, self.device) != 0).any(dim=1)
                self._refuse(lost, vectors)
            norms = torch.where((here != 0).any(dim=1), norms.clamp(min=TINIEST), norms)
        chunk.norms[start : start + len(norms)] = norms
        self._lengths = self._lengths.joined(norms)
        self._used[at] += len(norms)
        return kept

    def _put(self, place: torch.Tensor, vectors: torch.Tensor | np.ndarray) -> None:
        torch = require("torch", extra=EXTRAS)
        if not isinstance(vectors, np.ndarray):
            place.copy_(vectors)
            return
        staged = place
        if place.device.type != "cpu":  # through pinned memory, which the next piece reuses
            if self._staging is None or len(self._staging) < len(vectors):
                self._staging = torch.empty(
                    vectors.shape, dtype=self.dtype, device="cpu",
                    pin_memory=place.device.type == "cuda",
                )  # fmt: skip
            staged = self._staging[: len(vectors)]
        with np.errstate(over="ignore"):  # what is beyond the type becomes infinite
            np.copyto(staged.numpy(), vectors, casting="same_kind")
        if staged is not place:
            place.copy_(staged)  # it waits, so that the pinned memory is free again

    def _refuse(self, lost: torch.Tensor, vectors: torch.Tensor | np.ndarray) -> None:
        if bool(lost.any()):
            raise DoesNotNarrowError(
                f"{int(lost.sum())} vectors of {vectors.dtype} cannot be held as {self.dtype}."
            )

    def remove(self, row_ids: np.ndarray, before: int | None = None) -> int:
        """Remove those rows; ids that are not here are ignored. Returns how many were.

        `before` leaves slots from that one on alone: they are the rows' newer vectors.
        """
        removed = self._slots.remove(row_ids, before)
        if removed:
            self._published = None
        return removed

    def reset(self) -> None:
        """Forget all rows and write over them: no snapshot may be in use any more."""
        self._used = [0] * len(self._chunks)
        self._slots, self._lengths = SlotMap(), Lengths()
        self._published = None

    # --------------------------------------------------------------- publishing

    def publish(self) -> Sn:
        """The rows as they are now."""
        if self._published is None:
            slots = self._slots
            full = slots.num_live == len(slots)
            ready = None
            if self.device.type == "cuda":
                torch = require("torch", extra=EXTRAS)
                ready = torch.cuda.current_stream(self.device).record_event()
            self._published = self._snapshot(
                tuple(self._chunks), tuple(self._used), slots.row_ids,
                None if full else slots.live.copy(), slots.num_live, self._lengths,
                self.ndims, self.dtype, self.device, ready,
            )  # fmt: skip
        return self._published

    @abstractmethod
    def _snapshot(self, *common: Any) -> Sn:
        """A snapshot, given what every :class:`Snapshot` is made of."""

    @abstractmethod
    def _slots_of(self, at: int) -> int:
        """How many slots the chunk at that place has."""

    @abstractmethod
    def _kept(self, first: int, stop: int) -> np.ndarray:
        """(r,) bool: which matrix rows of the slots from `first` to `stop` are live."""

    def _forget(self, first: int, stop: int) -> None:
        """Forget the dead slots from `first` to `stop`, whose rows are gone."""
        self._slots.compact(first, stop)

    @property
    def wants_sweep(self) -> bool:
        """Whether so many slots are dead that they should be swept out."""
        return len(self._slots) - len(self) > MAX_DEAD * len(self._slots)

    def sweep(self) -> Iterator[Sn]:
        """Move the live rows together, chunk by chunk, and let the old chunks go.

        Each step needs room for one chunk and is published, so that readers let go of the old
        one. Small neighbours are joined. It stops where there is no room.
        """
        at = 0
        while at < len(self._chunks):
            first = sum(self._slots_of(before) for before in range(at))
            stop, rows, slots, held = at, 0, 0, 0
            while stop < len(self._chunks):
                count = self._slots_of(stop)
                live = int(self._kept(first + slots, first + slots + count).sum())
                if stop > at and rows + live > self._most:
                    break
                stop, rows = stop + 1, rows + live
                slots, held = slots + count, held + self._used[stop - 1]
            if rows == held and stop == at + 1:  # nothing to gain here
                at += 1
                continue
            old, kept = self._chunks[at:stop], self._kept(first, first + slots)
            try:
                new = [self._joined(old, self._used[at:stop], kept, rows)] if rows else []
            except (NoRoomError, RuntimeError, MemoryError) as error:
                if not isinstance(error, NoRoomError) and not is_out_of_memory(error):
                    raise
                return
            self._forget(first, first + slots)
            self._chunks[at:stop] = new
            self._used[at:stop] = [rows] if rows else []
            self._lengths = Lengths()  # without those of the dead
            for chunk, size in zip(self._chunks, self._used, strict=True):
                self._lengths = self._lengths.joined(chunk.norms[:size])
            self._release(sum(self._cost(chunk.room) for chunk in old))
            del old
            self._published = None
            at += bool(rows)
            yield self.publish()

    def _joined(self, old: list[Chunk], used: list[int], kept: np.ndarray, rows: int) -> Chunk:
        """A new chunk with the `rows` rows that are kept of some chunks."""
        torch = require("torch", extra=EXTRAS)
        self._open(rows, needed=False)
        new, _ = self._chunks.pop(), self._used.pop()
        to = start = 0
        step = tile_rows(self.ndims, self.dtype.itemsize)
        try:
            with torch.inference_mode():
                for chunk, size in zip(old, used, strict=True):
                    live = torch.from_numpy(np.flatnonzero(kept[start : start + size]))
                    for some in live.split(step):
                        here = some.to(chunk.vectors.device)
                        new.vectors[to : to + len(some)] = chunk.vectors.index_select(0, here)
                        new.norms[to : to + len(some)] = chunk.norms[some.to(chunk.norms.device)]
                        to += len(some)
                    start += size
        except BaseException:
            self._release(self._cost(rows))
            raise
        return new


def _norms(vectors: torch.Tensor) -> torch.Tensor:
    """(n,) float32; finite vectors too long for float32's squares give infinity."""
    torch = require("torch", extra=EXTRAS)
    if vectors.device.type != "cpu":
        return torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float32)
    # torch's threads wait for each other at the end of each small piece, which a busy machine
    # makes long; a row is short
    rows = vectors.numpy().astype(np.float32, copy=False)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        return torch.from_numpy(np.sqrt(np.vecdot(rows, rows)))


def picked(vectors: torch.Tensor | np.ndarray, kept: np.ndarray) -> torch.Tensor | np.ndarray:
    """Those of (n, d) vectors that are True in `kept`, (n,) bool."""
    if isinstance(vectors, np.ndarray):
        return vectors[kept]
    torch = require("torch", extra=EXTRAS)
    return vectors[torch.from_numpy(kept).to(vectors.device)]
