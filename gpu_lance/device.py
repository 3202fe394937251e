"""Where tensors live: resolving a device, and the only ways across its border."""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_lance.errors import DeviceError
from gpu_lance.optional import require

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

CUDA_REMEDY = (
    "Install a GPU build (pip install 'gpu-lance[cuda13]' for drivers from 580 on, "
    "'gpu-lance[cuda12]' for older ones), or pass device='auto' or device='cpu'."
)


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
    name = str(device or "auto").strip().lower()
    if name == "auto":
        name = os.environ.get("GPU_LANCE_DEVICE", "auto").strip().lower() or "auto"
    if name == "auto":
        return _automatic_device()
    if name == "gpu" or name.startswith("gpu:"):
        name = "cuda" + name[3:]
    try:
        wanted = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(
            f"Unknown device {device!r}; use 'auto', 'cpu', 'cuda', 'cuda:<number>' or 'mps'."
        ) from error
    if wanted.type == "cuda":
        if reason := _why_no_cuda():
            raise DeviceError(f"device={device!r} was asked for, but {reason}. {CUDA_REMEDY}")
        count = torch.cuda.device_count()
        index = torch.cuda.current_device() if wanted.index is None else wanted.index
        if index >= count:
            raise DeviceError(f"device={device!r} was asked for, but there are {count} GPUs.")
        return torch.device("cuda", index)
    if wanted.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError(f"device={device!r} was asked for, but torch sees no MPS device.")
    if wanted.type not in ("cpu", "mps"):
        raise DeviceError(f"device={device!r} is not supported; use 'auto', 'cpu' or 'cuda'.")
    return wanted


@functools.cache
def _automatic_device() -> torch.device:
    torch = require("torch", extra="cpu|cuda13|cuda12")
    reason = _why_no_cuda()
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
def _why_no_cuda() -> str | None:
    """None if a CUDA device computes; else the reason, as half a sentence."""
    torch = require("torch", extra="cpu|cuda13|cuda12")
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device or no working driver"
    try:
        torch.ones(2, device="cuda").sum().item()
    except RuntimeError as error:
        return f"the CUDA device does not compute ({str(error).splitlines()[0]})"
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
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def parse_dtype(name: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The torch dtype of that name; None or ``"auto"`` gives :func:`default_dtype`.

    Raises
    ------
    ValueError
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
        raise ValueError(f"dtype is {name!r}; it must be one of {', '.join(known)} or 'auto'.")
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
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text
    )


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on `device`: free memory plus torch's unused cache.

    On the CPU it is what the system calls available.

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
    return _host_memory()


def _host_memory() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 4 << 30  # neither Linux nor POSIX: a modest guess


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
    return tensor if device is None else tensor.to(device, non_blocking=True)


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
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
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
