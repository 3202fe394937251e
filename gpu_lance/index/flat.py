"""The exact index: FAISS where it can serve the device and the search, torch everywhere else."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_lance.device import as_tensor, free_memory, is_out_of_memory, release_cache
from gpu_lance.errors import BadVectorError, OutOfDeviceMemoryError, QueryError
from gpu_lance.index.base import SearchResult, VectorIndex
from gpu_lance.index.faiss_binding import GPU_ADD_BYTES, TEMPORARY_BYTES, FaissStore, load_faiss
from gpu_lance.index.rescore import (
    NO_ROW,
    OVERFLOW,
    error_bound,
    exact_distances,
    normalised,
    norms,
    rank,
    unit_roundoff,
)
from gpu_lance.index.scan import Scan
from gpu_lance.index.slots import SlotMap
from gpu_lance.index.store import Store, TorchStore, tile_rows
from gpu_lance.optional import require
from gpu_lance.types import Metric

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

EXTRA_CANDIDATES = 16
MAX_QUERIES = 256  # FAISS's temporary memory on a GPU is made for about that many
MAX_PAIRS = 4 << 20  # candidates in flight
MAX_HIDDEN = 256  # that many rows that do not qualify are simply asked for on top
MAX_DEAD = 0.2  # a larger share of dead slots is swept out


def block_bytes(device: torch.device) -> int:
    """Bytes of vectors to add at a time; a GPU index reallocates with each add."""
    return GPU_ADD_BYTES if device.type == "cuda" else 64 << 20


class FlatIndex(VectorIndex):
    """Every row compared with every query, on the device that holds the vectors.

    The vectors are float32 in a real ``faiss.GpuIndexFlat`` on CUDA and ``faiss.IndexFlat`` on
    the CPU, added by pointer from tensors on that device. Where FAISS is missing or was built
    without that device, torch holds and searches them; :meth:`info` says why.

    Results do not depend on the engine: an engine only proposes candidates, whose distances are
    computed in float64 and rounded to float32, and the rows come in the order of (distance, row
    id). If rows that were not proposed could belong to the answer, within the engine's rounding,
    they are looked at too; so of equal distances the smallest row ids come back.

    A vector with NaN or infinity is left out, under every metric. Under cosine a zero vector has
    no distance, as in LanceDB: it is never found, and a zero query finds nothing. Cosine holds
    unit vectors rounded to float32, which moves a distance by less than 1e-7.

    Parameters
    ----------
    ndims : int
        Length of a vector.
    metric : Metric or str
        ``l2`` (squared), ``cosine`` or ``dot``.
    device : torch.device
        Where the vectors live.
    use_faiss : bool, default True
        False takes torch even where FAISS is there.

    Raises
    ------
    IndexBackendError
        If the installed FAISS packages have overwritten each other.

    Examples
    --------
    >>> import numpy as np, torch
    >>> with FlatIndex(2, "l2", torch.device("cpu")) as index:
    ...     index.add(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), np.array([10, 20]))
    ...     index.search(torch.tensor([[3.0, 3.0]]), k=2).row_ids.tolist()
    [[20, 10]]
    """

    _live: torch.Tensor | None

    def __init__(
        self,
        ndims: int,
        metric: Metric | str,
        device: torch.device,
        *,
        use_faiss: bool = True,
    ) -> None:
        torch = require("torch", extra="cpu|cuda13|cuda12")
        self.ndims = int(ndims)
        self.metric = Metric.parse(metric)
        # with its index: torch.device("cuda") is the current GPU, and equals no tensor's device
        self._norms = torch.empty(0, device=device)  # (n,) of the held vectors, by slot
        self.device = device = self._norms.device
        faiss, self.reason = load_faiss(device) if use_faiss else (None, "FAISS was not wanted.")
        self._store: Store = (
            TorchStore(self.ndims, device)
            if faiss is None
            else FaissStore(faiss, self.ndims, device, self.metric)
        )
        self._slots = SlotMap()
        self._max_norm = 0.0
        self._live = None  # the live bits on the device, made when needed

    @staticmethod
    def bytes_needed(rows: int, ndims: int, device: torch.device) -> int:
        """Bytes of memory on `device` that an index of that size takes while it is filled.

        A GPU index of FAISS moves to a larger block when it grows, so both count.
        """
        vectors = rows * ndims * 4
        blocks = 3 * min(vectors, block_bytes(device))
        if device.type == "cuda":
            return 2 * vectors + 8 * rows + blocks + TEMPORARY_BYTES
        return vectors + 26 * rows + blocks

    def __len__(self) -> int:
        return self._slots.num_live

    @property
    def num_slots(self) -> int:
        """How many slots there are, dead ones included."""
        return len(self._slots)

    # ------------------------------------------------------------------ filling

    def reserve(self, rows: int) -> None:
        """Announce that `rows` rows are coming, so that the memory is taken once."""
        self._store.reserve(rows)

    def add(
        self, vectors: torch.Tensor, row_ids: np.ndarray, valid: np.ndarray | None = None
    ) -> None:
        """Add vectors under row ids that are not in the index.

        Parameters
        ----------
        vectors : torch.Tensor
            (n, d), of any float dtype, preferably on the index's device. Not kept, not changed.
        row_ids : numpy.ndarray
            (n,) integers.
        valid : numpy.ndarray, optional
            (n,) bool, False for null vectors, which are left out.

        Raises
        ------
        BadVectorError
            If the shapes do not fit.
        """
        torch = require("torch", extra="cpu|cuda13|cuda12")
        n = len(row_ids)
        if vectors.shape != (n, self.ndims) or (valid is not None and len(valid) != n):
            raise BadVectorError(
                f"The index holds vectors of {self.ndims} values and got {n} row ids with vectors "
                f"of shape {tuple(vectors.shape)}; both must fit."
            )
        if n == 0:
            return
        with torch.inference_mode():
            x = vectors.detach().to(self.device, torch.float32).contiguous()
            lengths = torch.linalg.vector_norm(x, dim=1)
            keep = torch.isfinite(lengths)
            if not bool(keep.all()):  # infinite norms of finite vectors are an overflow
                keep = torch.isfinite(x).all(dim=1)
            if valid is not None:
                keep &= torch.from_numpy(np.ascontiguousarray(valid, bool)).to(self.device)
            if self.metric is Metric.COSINE:
                keep &= (x != 0).any(dim=1)
            ids = np.asarray(row_ids, np.int64)
            if not bool(keep.all()):
                x, lengths, ids = x[keep], lengths[keep], ids[keep.cpu().numpy()]
            if self.metric is Metric.COSINE:
                x = normalised(x)
                lengths = torch.ones_like(lengths)
            self._store.add(x)
            self._norms = torch.cat([self._norms, lengths])
            if len(lengths):
                self._max_norm = max(self._max_norm, float(lengths.max()))
        self._slots.add(ids)
        self._live = None

    def remove(self, row_ids: np.ndarray) -> int:
        """Remove rows; see :meth:`VectorIndex.remove`. Many dead slots are swept out."""
        removed = self._slots.remove(row_ids)
        if removed:
            self._live = None
            dead = len(self._slots) - self._slots.num_live
            if dead > MAX_DEAD * len(self._slots):
                self._sweep()
        return removed

    def _sweep(self) -> None:
        torch = require("torch", extra="cpu|cuda13|cuda12")
        copies = 4 * self.ndims * len(self) if self.device.type != "cpu" else 0
        if self._store.max_candidates:  # FAISS's GPU index takes as much again when it grows
            copies *= 2
        if copies * 1.1 > free_memory(self.device):
            logger.warning(
                "index: %d dead slots of %d stay, since moving the others takes %d bytes",
                len(self._slots) - len(self), len(self._slots), copies,
            )  # fmt: skip
            return
        kept = torch.from_numpy(self._slots.compact()).to(self.device)
        with torch.inference_mode():
            self._store.keep(kept)
            self._norms = self._norms[kept]
        self._max_norm = float(self._norms.max()) if len(kept) else 0.0

    # ---------------------------------------------------------------- searching

    def mask(self, row_ids: np.ndarray) -> torch.Tensor:
        """(num_slots,) bool on the device: the slots of those row ids, for `allowed`."""
        slots = self._slots.find(row_ids)
        bits = np.zeros(len(self._slots), bool)
        bits[slots[slots >= 0]] = True
        return as_tensor(bits, self.device)

    def _selection(self, allowed: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
        """Which slots qualify and how many; None for every slot."""
        torch = require("torch", extra="cpu|cuda13|cuda12")
        size = len(self._slots)
        if allowed is not None and allowed.shape != (size,):
            raise QueryError(f"The mask has shape {tuple(allowed.shape)}, wanted ({size},).")
        if len(self) < size:
            if self._live is None:
                self._live = torch.from_numpy(self._slots.live.copy()).to(self.device)
            allowed = self._live if allowed is None else allowed & self._live
        if allowed is None:
            return None, size
        count = int(allowed.sum())
        return (None, size) if count == size else (allowed, count)

    def search(
        self,
        queries: torch.Tensor,
        k: int,
        *,
        allowed: torch.Tensor | None = None,
        lower: float | None = None,
        upper: float | None = None,
    ) -> SearchResult:
        """The k nearest rows of each query; see the class for their order.

        Parameters
        ----------
        queries : torch.Tensor
            (m, d), finite.
        k : int
            At least 1; of any size.
        allowed : torch.Tensor, optional
            (num_slots,) bool on the device, from :meth:`mask`: other rows are not found.
        lower, upper : float, optional
            Only rows with lower <= distance < upper count, compared in float32.

        Returns
        -------
        SearchResult
            On the host.

        Raises
        ------
        QueryError
            If k is below 1 or the queries have another length.
        BadVectorError
            If a query holds NaN or infinity.
        """
        torch = require("torch", extra="cpu|cuda13|cuda12")
        raw = self._checked(queries, k)
        mask, count = self._selection(allowed)
        result = SearchResult.empty(len(raw), k)
        if count == 0 or len(raw) == 0:
            return result
        scan = Scan(
            self._store, self.metric, self._norms, mask, count,
            -math.inf if lower is None else float(np.float32(lower)),
            math.inf if upper is None else float(np.float32(upper)),
        )  # fmt: skip
        block = max(1, min(MAX_QUERIES, MAX_PAIRS // min(count, k + EXTRA_CANDIDATES)))
        start = 0
        with torch.inference_mode():
            while start < len(raw):
                stop = min(start + block, len(raw))
                try:
                    ids, distances = self._block(raw[start:stop], k, scan)
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    if block == 1:
                        raise OutOfDeviceMemoryError(
                            f"One query does not fit on {self.device}: {error}"
                        ) from error
                    block //= 2
                    logger.warning("index: out of memory, going on with %d queries a time", block)
                    release_cache(self.device)  # FAISS cannot use what torch holds unused
                    continue
                result.row_ids[start:stop] = np.where(ids == NO_ROW, -1, ids)
                result.distances[start:stop] = distances
                start = stop
        return result

    def _checked(self, queries: torch.Tensor, k: int) -> torch.Tensor:
        torch = require("torch", extra="cpu|cuda13|cuda12")
        if k < 1:
            raise QueryError(f"The number of rows wanted is {k}; it must be at least 1.")
        raw = as_tensor(as_tensor(queries).to(torch.float32), self.device).contiguous()
        if raw.ndim != 2 or raw.shape[1] != self.ndims:
            raise QueryError(
                f"The queries have shape {tuple(raw.shape)}, but the column holds vectors of "
                f"{self.ndims} values."
            )
        finite = torch.isfinite(raw).all(dim=1)
        if not bool(finite.all()):
            bad = int((~finite).nonzero()[0, 0])
            raise BadVectorError(f"Query {bad} holds NaN or infinity; no row is near it.")
        return raw

    def _block(self, raw: torch.Tensor, k: int, scan: Scan) -> tuple[np.ndarray, np.ndarray]:
        """The answer for one block of queries: propose, rescore, prove."""
        torch = require("torch", extra="cpu|cuda13|cuda12")
        exact_norms = norms(raw)
        if self.metric is Metric.COSINE:
            queries, query_norms = normalised(raw), torch.ones(len(raw), device=self.device)
        else:
            queries, query_norms = raw, exact_norms.float().to(self.device)
        slots, edge, unit = self._propose(queries, query_norms, k, scan)
        c = slots.shape[1]
        of = torch.arange(len(raw), device=self.device).repeat_interleave(c)
        distances = exact_distances(self.metric, raw, self._store, of, slots.reshape(-1))
        distances = distances.reshape(-1, c)
        at = slots.cpu().numpy()
        row_ids = self._slots.row_ids[np.maximum(at, 0)]
        outside = (at < 0) | ~scan.inside(distances)
        row_ids[outside] = NO_ROW
        distances[outside] = np.inf
        row_ids, distances = rank(row_ids, distances, k)
        open_ = np.flatnonzero(~self._proven(row_ids, distances, exact_norms, edge, unit, scan))
        if len(open_):
            which = torch.from_numpy(open_).to(self.device)
            limits = np.where(row_ids[:, -1] == NO_ROW, np.inf, distances[:, -1])
            row_ids[open_], distances[open_] = scan.prove(
                raw[which], queries[which], query_norms[which], self._slots.row_ids, k,
                limits[open_].astype(np.float32),
            )  # fmt: skip
        return row_ids, distances

    def _propose(
        self, queries: torch.Tensor, query_norms: torch.Tensor, k: int, scan: Scan
    ) -> tuple[torch.Tensor, np.ndarray, float]:
        """Candidates (m, c), the score beyond which all others lie (m,), the unit roundoff."""
        torch = require("torch", extra="cpu|cuda13|cuda12")
        size = len(self._slots)
        c = min(k + EXTRA_CANDIDATES, scan.count)
        hidden = size - scan.count
        everything = np.full(len(queries), np.inf)
        fits = c + hidden <= self._store.max_candidates
        if fits and hidden <= MAX_HIDDEN and scan.lower == -math.inf:
            scores, slots = self._store.candidates(queries, c + hidden)
            short = bool((slots < 0).any())  # an overflow; then nothing is certain
            edge = torch.where(torch.isfinite(scores[:, -1]), scores[:, -1], -math.inf)
            if scan.mask is not None:
                slots = torch.where(scan.mask[slots.clamp(min=0)], slots, -1)
            complete = c + hidden == size and not short
            unit = unit_roundoff(self.device, faiss=True)
            return slots, everything if complete else edge.double().cpu().numpy(), unit
        if c == scan.count and scan.lower == -math.inf:  # all that qualify
            return scan.slots()[None, :].expand(len(queries), -1), everything, 0.0
        scores, slots = scan.nearest(queries, query_norms, c)
        last = scores[:, -1].cpu().double().numpy()  # in this order: MPS has no float64
        # +inf: fewer than c rows were within the bounds, so all of them are candidates
        return slots, last, unit_roundoff(self.device, faiss=False)

    def _proven(
        self,
        row_ids: np.ndarray,
        distances: np.ndarray,
        query_norms: torch.Tensor,
        edge: np.ndarray,
        unit: float,
        scan: Scan,
    ) -> np.ndarray:
        """(m,) bool: no row that was not a candidate can be among the k nearest."""
        lengths = query_norms.cpu().numpy()
        complete = edge == np.inf
        if self.metric is Metric.COSINE:
            complete |= lengths == 0  # such a query has no distance to anything
        kth = np.where(row_ids[:, -1] == NO_ROW, np.inf, distances[:, -1].astype(np.float64))
        largest: Any = self._max_norm
        if self.metric is Metric.L2:  # a vector much longer than the query is far from it
            near = lengths * (1 + 1e-5) + np.sqrt(kth) * (1 + 1e-5) + 1e-19
            largest = np.minimum(largest, near)
        with np.errstate(over="ignore", invalid="ignore"):
            bound = error_bound(self.metric, self.ndims, unit, lengths, largest)
            nearest_other = (edge - np.asarray(bound)).astype(np.float32)
            certain = (nearest_other > kth) | (nearest_other >= scan.upper)
            if self.metric is not Metric.COSINE:
                certain &= lengths * lengths + self._max_norm * self._max_norm < OVERFLOW
                complete &= (lengths * lengths + self._max_norm * self._max_norm < OVERFLOW) | (
                    unit == 0
                )
        proven: np.ndarray = complete | certain
        return proven

    # -------------------------------------------------------------- the contents

    def tiles(self) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Live rows in bounded pieces: row ids (t,), vectors (t, d), valid until the next piece.

        Under cosine the vectors are unit vectors.
        """
        torch = require("torch", extra="cpu|cuda13|cuda12")
        for start, vectors in self._store.tiles(tile_rows(self.ndims)):
            stop = start + len(vectors)
            live = self._slots.live[start:stop]
            ids = self._slots.row_ids[start:stop]
            if not live.all():
                vectors = vectors[torch.from_numpy(live.copy()).to(vectors.device)]
                ids = ids[live]
            yield ids, vectors

    @property
    def nbytes(self) -> int:
        """Bytes of the vectors, norms, row ids and live bits."""
        return len(self._slots) * (4 * self.ndims + 4) + self._slots.nbytes

    def info(self) -> dict[str, Any]:
        """Device, engine and why, metric, rows, bytes."""
        return {
            "device": str(self.device),
            "engine": self._store.name,
            "reason": self.reason,
            "metric": str(self.metric),
            "rows": len(self),
            "bytes": self.nbytes,
        }

    def close(self) -> None:
        """Free the memory; the index is empty afterwards."""
        self._store.close()
        self._slots = SlotMap()
        self._norms = self._norms[:0].clone()
        self._max_norm = 0.0
        self._live = None
