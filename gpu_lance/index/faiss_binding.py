"""All contact with FAISS: finding it, its GPU resources, and its flat index over raw pointers.

FAISS's own torch support patches its classes for the whole process, so it is not used here. A
tensor's pointer is handed over instead, on torch's current stream; torch's allocator reuses memory
in the order of that stream, so a tensor may be dropped as soon as the call has returned.

FAISS chooses between two CPU kernels by a process-wide threshold. Around a search of ours it is
what makes that search several times faster, and it has its old value again afterwards.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from importlib import metadata
from typing import TYPE_CHECKING, Any, ClassVar

from gpu_lance.device import make_room
from gpu_lance.errors import IndexBackendError, MissingExtraError
from gpu_lance.optional import require
from gpu_lance.types import Metric

if TYPE_CHECKING:
    import torch

EXTRAS = "cpu|cuda13|cuda12"
WHEELS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs", "faiss-gpu-cu12", "faiss-gpu-cu11")
MAX_K = 2048  # of FAISS's GPU indexes; a larger k is somebody else's work on every device
TEMPORARY_BYTES = 512 << 20  # per GPU; FAISS itself would take 1.5 GiB and pin 256 MiB
GPU_ADD_BYTES = 512 << 20  # a GPU index reallocates at every add, so few and large ones
HANDLE_BYTES = 256 << 20  # cuBLAS and CUDA's own; without them FAISS aborts the process


def load_faiss(device: torch.device) -> tuple[Any, str]:
    """The FAISS module if it can serve `device`, else None; and the reason, as a sentence.

    Returns
    -------
    module or None, str

    Raises
    ------
    IndexBackendError
        If several FAISS packages are installed over each other, or what is left of one.
    ImportError
        FAISS's own, if it is installed and broken.

    Examples
    --------
    >>> import torch
    >>> load_faiss(torch.device("cpu"))[0].__name__
    'faiss'
    """
    if device.type not in ("cpu", "cuda"):
        return None, f"FAISS does not run on {device.type}."
    try:
        faiss = require("faiss", extra=EXTRAS)
    except MissingExtraError as error:
        return None, str(error)
    if not hasattr(faiss, "IndexFlat") or len(wheels := _installed_wheels()) > 1:
        found = "remains of one" if not hasattr(faiss, "IndexFlat") else " and ".join(wheels)
        raise IndexBackendError(
            f"FAISS packages overwrite each other, and there are {found}. Uninstall all of them "
            f"(pip uninstall {' '.join(WHEELS[:3])}), then install one extra of gpu-lance."
        )
    if device.type == "cpu":
        return faiss, f"faiss {faiss.__version__}"
    if not hasattr(faiss, "GpuIndexFlat"):
        return None, f"The FAISS that is installed ({faiss.__version__}) is built for the CPU only."
    if faiss.get_num_gpus() <= (device.index or 0):  # its GPU calls would abort the process
        return None, f"FAISS sees {faiss.get_num_gpus()} GPUs, which does not include {device}."
    return faiss, f"faiss {faiss.__version__}"


def _installed_wheels() -> list[str]:
    found = []
    for name in WHEELS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            metadata.distribution(name)
            found.append(name)
    return found


class _BlasThreshold:
    """Sets FAISS's BLAS threshold while at least one of our searches runs, in any thread.

    Of two searches at once that want different values the second has its way, and the first is
    perhaps slower.
    """

    PRODUCT = 1  # always a matrix product
    LOOP = 2**31 - 1  # never one

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before = 0

    @contextlib.contextmanager
    def at(self, faiss: Any, value: int) -> Iterator[None]:
        with self._lock:
            if self._users == 0:
                self._before = faiss.cvar.distance_compute_blas_threshold
            faiss.cvar.distance_compute_blas_threshold = value
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    faiss.cvar.distance_compute_blas_threshold = self._before

    def lowered(self, faiss: Any) -> contextlib.AbstractContextManager[None]:
        return self.at(faiss, self.PRODUCT)


blas_threshold = _BlasThreshold()
_blas_threshold = blas_threshold


class GpuResources:
    """FAISS's resources on one GPU, shared by all our indexes there.

    Its temporary memory is a stack and concurrent use aborts the process, so :meth:`session`
    admits one thread at a time.
    """

    _by_device: ClassVar[dict[int, GpuResources]] = {}
    _by_device_lock = threading.Lock()

    def __init__(self, faiss: Any, device: int) -> None:
        self._faiss = faiss
        self._device = device
        self._lock = threading.RLock()
        self.handle = faiss.StandardGpuResources()
        self.handle.setTempMemory(TEMPORARY_BYTES)
        self.handle.setPinnedMemory(0)  # nothing of ours comes from the host
        torch = require("torch", extra=EXTRAS)
        make_room(torch.device("cuda", device), TEMPORARY_BYTES + HANDLE_BYTES)
        # takes the memory now: resources that could not take theirs must not be used again
        self.handle.getDefaultStream(device)

    @classmethod
    def of(cls, faiss: Any, device: int) -> GpuResources:
        with cls._by_device_lock:
            if device not in cls._by_device:
                cls._by_device[device] = cls(faiss, device)
            return cls._by_device[device]

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Hold the GPU, with FAISS's work queued on torch's current stream of that GPU."""
        torch = require("torch", extra=EXTRAS)
        with self._lock, torch.cuda.device(self._device):
            stream = torch.cuda.current_stream(self._device).cuda_stream
            cast = self._faiss.cast_integer_to_cudastream_t(stream)
            self.handle.setDefaultStream(self._device, cast)
            yield


class FaissStore:
    """A FAISS flat index: ``GpuIndexFlat`` on CUDA, ``IndexFlat`` on the CPU.

    Parameters
    ----------
    faiss : module
        From :func:`load_faiss`, for this device.
    ndims : int
        Length of a vector.
    device : torch.device
        CPU or CUDA; every tensor that is passed in or comes out is there.
    metric : Metric
        Cosine expects unit vectors.

    Examples
    --------
    >>> import torch
    >>> device = torch.device("cpu")
    >>> store = FaissStore(load_faiss(device)[0], 2, device, Metric.L2)
    >>> store.add(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    >>> store.candidates(torch.tensor([[3.0, 3.0]]), 2)[1].tolist()
    [[1, 0]]
    """

    max_candidates = MAX_K

    def __init__(self, faiss: Any, ndims: int, device: torch.device, metric: Metric) -> None:
        self.ndims = ndims
        self.device = device
        self._faiss = faiss
        self._l2 = metric is Metric.L2
        gpu = device.type == "cuda"
        self._resources = GpuResources.of(faiss, device.index or 0) if gpu else None
        self.name = "faiss GpuIndexFlat" if gpu else "faiss IndexFlat"
        self._index = self._new()

    def _new(self) -> Any:
        metric = self._faiss.METRIC_L2 if self._l2 else self._faiss.METRIC_INNER_PRODUCT
        if self._resources is None:
            return self._faiss.IndexFlat(self.ndims, metric)
        config = self._faiss.GpuIndexFlatConfig()
        config.device = self.device.index or 0
        config.use_cuvs = False
        with self._resources.session():
            return self._faiss.GpuIndexFlat(self._resources.handle, self.ndims, metric, config)

    def _session(self) -> contextlib.AbstractContextManager[None]:
        if self._resources is None:
            return _blas_threshold.lowered(self._faiss)
        return self._resources.session()

    def _floats(self, tensor: torch.Tensor) -> Any:
        """The pointer to a float32 tensor; whoever calls keeps the tensor alive."""
        torch = require("torch", extra=EXTRAS)
        if (
            tensor.dtype != torch.float32
            or not tensor.is_contiguous()
            or tensor.device != self.device
        ):
            raise IndexBackendError(
                f"FAISS wants a contiguous float32 tensor on {self.device}, got "
                f"{tensor.dtype} on {tensor.device}, contiguous: {tensor.is_contiguous()}."
            )
        return self._faiss.cast_integer_to_float_ptr(tensor.data_ptr())

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def reserve(self, rows: int) -> None:
        """Room for `rows` rows on the CPU; FAISS's GPU index has no way to ask for it."""
        if self._resources is None and rows > len(self):
            codes, used = self._index.codes, self._index.codes.size()
            codes.resize(rows * self._index.code_size)
            codes.resize(used)  # the capacity stays

    def add(self, vectors: torch.Tensor) -> None:
        if len(vectors):
            self._add_to(self._index, vectors)

    def _add_to(self, index: Any, vectors: torch.Tensor) -> None:
        # on a GPU all vectors move into a new block, and their norms are made anew
        make_room(self.device, (index.ntotal + len(vectors)) * 4 * (self.ndims + 1) + HANDLE_BYTES)
        with self._session():
            index.add_c(len(vectors), self._floats(vectors))

    def tiles(self, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Views of the index's memory on the CPU; on CUDA one buffer, overwritten by the next."""
        torch = require("torch", extra=EXTRAS)
        size = len(self)
        if self._resources is None:
            if size:
                flat = self._faiss.rev_swig_ptr(self._index.get_xb(), size * self.ndims)
                matrix = torch.from_numpy(flat).view(size, self.ndims)
                for start in range(0, size, rows):
                    yield start, matrix[start : start + rows]
            return
        buffer = torch.empty((min(rows, size), self.ndims), device=self.device)
        for start in range(0, size, rows):
            tile = buffer[: min(rows, size - start)]
            with self._session():
                self._index.reconstruct_n_c(start, len(tile), self._floats(tile))
            yield start, tile

    def gather(self, slots: torch.Tensor) -> torch.Tensor:
        if self._resources is None:
            for _, matrix in self.tiles(max(1, len(self))):
                return matrix.index_select(0, slots)
        slots = slots.contiguous()
        torch = require("torch", extra=EXTRAS)
        out = slots.new_empty((len(slots), self.ndims), dtype=torch.float32)
        if len(slots):
            keys = self._faiss.cast_integer_to_idx_t_ptr(slots.data_ptr())
            with self._session():
                self._index.reconstruct_batch_c(len(slots), keys, self._floats(out))
        return out

    def candidates(self, queries: torch.Tensor, c: int) -> tuple[torch.Tensor, torch.Tensor]:
        """No selector is ever passed: the GPU ignores it, and on the CPU it turns BLAS off."""
        torch = require("torch", extra=EXTRAS)
        if c > MAX_K:
            raise IndexBackendError(f"FAISS gives at most {MAX_K} candidates, not {c}.")
        m = len(queries)
        scores = torch.empty((m, c), device=self.device)
        slots = torch.empty((m, c), dtype=torch.int64, device=self.device)
        with self._session():
            self._index.search_c(
                m,
                self._floats(queries),
                c,
                self._floats(scores),
                self._faiss.cast_integer_to_idx_t_ptr(slots.data_ptr()),
            )
        return (scores if self._l2 else 1 - scores), slots

    def keep(self, slots: torch.Tensor) -> None:
        torch = require("torch", extra=EXTRAS)
        if self._resources is None:
            dropped = torch.ones(len(self), dtype=torch.bool, device="cpu")
            dropped[slots] = False
            self._index.remove_ids(dropped.nonzero()[:, 0].numpy())  # in place, order kept
            return
        old, fresh = self._index, self._new()
        step = max(1, GPU_ADD_BYTES // (4 * self.ndims))
        for start in range(0, len(slots), step):
            self._add_to(fresh, self.gather(slots[start : start + step]))
        self._index = fresh
        with self._session():
            old.reset()

    def close(self) -> None:
        with self._session():
            self._index.reset()
        if self._resources is None:
            self._index = self._new()  # a reset CPU index keeps its memory
