"""Finding FAISS, its resources on a GPU, and its one setting on the CPU.

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

if TYPE_CHECKING:
    import torch

EXTRAS = "cpu|cuda13|cuda12"
WHEELS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs", "faiss-gpu-cu12", "faiss-gpu-cu11")
MAX_K = 2048  # of FAISS's GPU indexes; a larger k is somebody else's work on every device
TEMPORARY_BYTES = 512 << 20  # per GPU; FAISS itself would take 1.5 GiB and pin 256 MiB
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


blas_threshold = _BlasThreshold()


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
