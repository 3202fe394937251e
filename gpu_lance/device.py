"""Where tensors live: resolving a device, and the only ways across its border."""

from __future__ import annotations

import functools
import logging
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_lance import host_memory
from gpu_lance.errors import BadInputError, DeviceError
from gpu_lance.forks import ForkGuard
from gpu_lance.optional import require

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# torch and CUDA, the driver's name for it, the CPU allocator, cuBLAS's workspace, C++ below FAISS
_MEMORY_WORDS = (
    "out of memory",
    "out_of_memory",
    "can't allocate memory",
    "status_alloc_failed",
    "bad_alloc",
)
_NAME = re.compile(r"(cpu|cuda|gpu|mps)(?::([0-9]+))?")
CUDA_REMEDY = (
    "Install a GPU build (pip install 'gpu-lance[cuda13]' for drivers from 580 on, "
    "'gpu-lance[cuda12]' for older ones), or pass device='auto' or device='cpu'."
)


_threads = ForkGuard()


def check_threads() -> None:
    """Refuse to compute in a process that was forked from one that had computed.

    The threads of torch and FAISS do not come along, and the child would wait for them for ever.

    Raises
    ------
    DeviceError
    """
    if _threads.lost:
        raise DeviceError(
            "This process was forked from one that had embedded or searched already, and the "
            "threads of torch and FAISS do not survive that. Start processes by 'spawn' "
            "(multiprocessing.get_context('spawn')), or fork before the first search."
        )
    _threads.use()


def resolve_device(device: str | torch.device | None = "auto") -> torch.device:
    """Turn the name of a device into a device that works.

    Parameters
    ----------
    device : str or torch.device, optional
        ``"auto"`` or None: the value of the environment variable ``GPU_LANCE_DEVICE`` if it is
        set, else CUDA if a device answers, else MPS, else the CPU; which one and why is logged
        once. ``"gpu"`` is an alias of ``"cuda"``. Any other name must exist: it never falls back.

    Returns
    -------
    torch.device
        With its index, for CUDA.

    Raises
    ------
    DeviceError
        If the named device is not there, with the reason and the remedy.

    Examples
    --------
    >>> resolve_device("cpu")
    device(type='cpu')
    """
    torch = require("torch", extra="cpu|cuda13|cuda12")
    name = _plain(device)
    asked, origin = f"device={device!r} was asked for", ""
    if name == "auto" and (variable := os.environ.get("GPU_LANCE_DEVICE", "").strip()):
        name, origin = variable.lower(), " in GPU_LANCE_DEVICE"
        asked = f"GPU_LANCE_DEVICE={variable!r} was asked for"
    if name == "auto":
        return _automatic_device()
    kind, number = _parts(name, origin)
    if kind == "cpu":
        return torch.device("cpu")
    if kind == "mps":
        if not torch.backends.mps.is_available():
            raise DeviceError(
                f"{asked}, but torch sees no MPS device. Pass device='auto' or device='cpu'."
            )
        return torch.device("mps")
    if reason := why_no_cuda():
        raise DeviceError(f"{asked}, but {reason}. {CUDA_REMEDY}")
    index = torch.cuda.current_device() if number is None else int(number)
    count = torch.cuda.device_count()
    if index >= count:
        last = "it is 'cuda:0'" if count == 1 else f"the last is 'cuda:{count - 1}'"
        raise DeviceError(f"{asked}, but the number of GPUs is {count}; {last}.")
    return torch.device("cuda", index)


def check_device_name(device: str | torch.device | None) -> None:
    """Refuse a name that no device has, without asking whether the device is there.

    Raises
    ------
    DeviceError

    Examples
    --------
    >>> check_device_name("cuda:1")
    >>> check_device_name("tpu")
    Traceback (most recent call last):
    gpu_lance.errors.DeviceError: Unknown device 'tpu'; use 'auto', 'cpu', 'cuda', ...
    """
    name = _plain(device)
    if name != "auto":
        _parts(name, "")


def _plain(device: str | torch.device | None) -> str:
    return "auto" if device is None else str(device).strip().lower()


def _parts(name: str, origin: str) -> tuple[str, str | None]:
    """The kind and number of a device, in lower case."""
    # not torch's own parser, for which cuda:999 is a negative number
    match = _NAME.fullmatch(name)
    if match is None:
        raise DeviceError(
            f"Unknown device {name!r}{origin}; use 'auto', 'cpu', 'cuda', 'cuda:<number>' or 'mps'."
        )
    kind, number = match.groups()
    return kind, number


@functools.cache
def _automatic_device() -> torch.device:
    torch = require("torch", extra="cpu|cuda13|cuda12")
    reason = why_no_cuda()
    if reason is None:
        chosen = torch.device("cuda", torch.cuda.current_device())
        logger.info("device: %s (%s)", chosen, torch.cuda.get_device_name(chosen))
    elif torch.backends.mps.is_available():
        chosen = torch.device("mps")
        logger.info("device: mps, since %s", reason)
    else:
        chosen = torch.device("cpu")
        logger.info("device: cpu, since %s", reason)
    return chosen


@functools.cache
def why_no_cuda() -> str | None:
    """None if a CUDA device computes; else the reason, as half a sentence."""
    torch = require("torch", extra="cpu|cuda13|cuda12")
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device or no working driver"
    try:
        torch.ones(2, device="cuda").sum().item()
    except Exception as error:  # torch's own kinds too, such as a deferred call that failed
        first = (str(error) or type(error).__name__).splitlines()[0]
        return f"the CUDA device does not compute ({first})"
    return None


def default_dtype(device: torch.device) -> torch.dtype:
    """The precision in which models run unless the caller names one: bf16 on CUDA, else float32.

    Examples
    --------
    >>> import torch
    >>> default_dtype(torch.device("cpu"))
    torch.float32
    """
    torch = require("torch", extra="cpu|cuda13|cuda12")
    if device.type == "cuda":
        with torch.cuda.device(device):  # it looks at the current one
            if torch.cuda.is_bf16_supported(including_emulation=False):
                return torch.bfloat16
    return torch.float32


def parse_dtype(name: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The torch dtype of that name; None or ``"auto"`` gives :func:`default_dtype`.

    Raises
    ------
    BadInputError
        Unless the name is one of float32, float16, bfloat16 (or fp32, fp16, bf16).

    Examples
    --------
    >>> import torch
    >>> parse_dtype("bf16", torch.device("cpu"))
    torch.bfloat16
    """
    torch = require("torch", extra="cpu|cuda13|cuda12")
    if name is None or name == "auto":
        return default_dtype(device)
    known = {
        "float32": torch.float32,
        "fp32": torch.float32,
        "float16": torch.float16,
        "fp16": torch.float16,
        "bfloat16": torch.bfloat16,
        "bf16": torch.bfloat16,
    }
    key = str(name).removeprefix("torch.")
    if key not in known:
        raise BadInputError(f"dtype is {name!r}; it must be one of {', '.join(known)} or 'auto'.")
    return known[key]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device, or the host under torch, ran out of memory.

    Examples
    --------
    >>> is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    True
    >>> is_out_of_memory(ValueError("no"))
    False
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _MEMORY_WORDS)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on `device`: free memory plus torch's unused cache.

    On the CPU it is what the system calls available, and no more than the limits of a container
    or of the process leave (:func:`gpu_lance.host_memory.available`).

    Examples
    --------
    >>> import torch
    >>> free_memory(torch.device("cpu")) > 0
    True
    """
    torch = require("torch", extra="cpu|cuda13|cuda12")
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return host_memory.available()


def total_memory(device: torch.device) -> int:
    """Bytes of memory of `device`, free or not; on the CPU the machine's, or the process's limit.

    Examples
    --------
    >>> import torch
    >>> total_memory(torch.device("cpu")) >= free_memory(torch.device("cpu"))
    True
    """
    torch = require("torch", extra="cpu|cuda13|cuda12")
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    return host_memory.total()


def release_cache(device: torch.device) -> None:
    """Give the memory that torch holds unused on `device` back to the driver."""
    torch = require("torch", extra="cpu|cuda13|cuda12")
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def make_room(device: torch.device, size: int) -> None:
    """Let another library than torch take `size` bytes on a GPU.

    :func:`free_memory` counts torch's unused cache, which only torch can use.
    """
    torch = require("torch", extra="cpu|cuda13|cuda12")
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < size:
        release_cache(device)


def as_tensor(values: Any, device: torch.device | None = None) -> torch.Tensor:
    """A tensor over `values`, without a copy where the memory allows it.

    Parameters
    ----------
    values : torch.Tensor, cupy.ndarray, numpy.ndarray, any DLPack array, or nested lists
        Device arrays come in by DLPack and stay where they are.
    device : torch.device, optional
        Where the tensor should be; None leaves it where `values` are.

    Returns
    -------
    torch.Tensor
        Of the dtype of `values`; numbers in lists become float32.

    Examples
    --------
    >>> as_tensor([[1, 2], [3, 4]]).dtype
    torch.float32
    """
    torch = require("torch", extra="cpu|cuda13|cuda12")
    if isinstance(values, torch.Tensor):
        tensor = values.detach()
    elif isinstance(values, np.ndarray):
        array = values if values.dtype != object else np.asarray(values.tolist(), np.float32)
        if not array.flags.writeable or not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))  # torch wants both
        tensor = torch.from_numpy(np.ascontiguousarray(array))
    elif hasattr(values, "__dlpack__"):
        tensor = torch.from_dlpack(values)
    else:
        tensor = torch.from_numpy(np.asarray(values, dtype=np.float32))
    if device is None:
        return tensor
    # a copy to the host that does not wait could be read before it has arrived
    return tensor.to(device, non_blocking=device.type == "cuda")


@dataclass(frozen=True)
class HostCopy:
    """A copy to the host that may still be under way.

    Examples
    --------
    >>> import torch
    >>> start_host_copy(torch.ones(2)).wait()
    array([1., 1.], dtype=float32)
    """

    host: torch.Tensor
    done: Any = None

    def wait(self) -> np.ndarray:
        """Block until the copy has arrived; the array shares the tensor's memory on the CPU."""
        if self.done is not None:
            self.done.synchronize()
        return self.host.numpy()


def start_host_copy(tensor: torch.Tensor) -> HostCopy:
    """Start the one copy that takes a tensor to the host: pinned and asynchronous on CUDA.

    Parameters
    ----------
    tensor : torch.Tensor
        Of any shape and device. It must not be written to before ``wait()`` returns.

    Returns
    -------
    HostCopy
        Its ``wait()`` gives a numpy array of the same shape; bfloat16 arrives as float32.
    """
    torch = require("torch", extra="cpu|cuda13|cuda12")
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    if tensor.device.type != "cuda":
        return HostCopy(tensor.cpu().contiguous())
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    with torch.cuda.device(tensor.device):
        host.copy_(tensor, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
    return HostCopy(host, done)


def to_host(tensor: torch.Tensor) -> np.ndarray:
    """The values of a tensor as a numpy array on the host; waits for them.

    Examples
    --------
    >>> import torch
    >>> to_host(torch.zeros(2, 1)).shape
    (2, 1)
    """
    return start_host_copy(tensor).wait()
