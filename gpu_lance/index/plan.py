"""In what form a column is held: the first step of a ladder for which there is memory."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from gpu_lance.errors import BadInputError
from gpu_lance.index.budget import Budget, Owner
from gpu_lance.index.sizes import show_bytes

if TYPE_CHECKING:
    import torch

NORM_BYTES = 4  # a row's, beside its vector
HOST_BYTES = 8 + 8 + 2  # a row's: row id, version of its last update, live bits


class Step(StrEnum):
    """How a column is held, the fastest first."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    HOST = "host"
    LANCE = "lance"


class Home(StrEnum):
    """Where the vectors of a column are between searches."""

    DEVICE = "device"
    HOST = "host"
    LANCE = "lance"


@dataclass(frozen=True)
class Plan:
    """How a column is held, and why.

    Parameters
    ----------
    step : Step
    dtype : numpy.dtype
        Of the values that are searched; where it is narrower than the stored one, candidates are
        measured again from the values in Lance.
    home : Home
    nbytes : int
        Reserved at `home`: of the device's memory, or of the host's.
    reason : str
        A sentence without its full stop, for people.
    """

    step: Step
    dtype: np.dtype
    home: Home
    nbytes: int
    reason: str

    def place(self, budget: Budget) -> Budget:
        """Where `nbytes` are reserved, and room for more rows is to be: `budget`, or its host's."""
        return (self.home is Home.HOST and budget.host) or budget


def column_bytes(rows: int, ndims: int, dtype: np.dtype, device: torch.device) -> int:
    """Bytes that so many rows take on `device`: vectors and norms; on the CPU also row ids.

    Parameters
    ----------
    rows, ndims : int
    dtype : numpy.dtype
        As held.
    device : torch.device

    Returns
    -------
    int

    Examples
    --------
    >>> import torch
    >>> column_bytes(1000, 384, np.dtype("float32"), torch.device("cpu"))
    1558000
    """
    beside = NORM_BYTES + (0 if device.type == "cuda" else HOST_BYTES)
    return rows * (ndims * np.dtype(dtype).itemsize + beside)


def plan(
    rows: int,
    ndims: int,
    stored_dtype: np.dtype,
    device: torch.device,
    budget: Budget,
    owner: Owner,
    *,
    narrow: bool = True,
) -> Plan:
    """Choose how to hold a column, and reserve what that takes.

    The ladder: float32, or float16 where that is stored; float32 and float64 narrowed to float16;
    on CUDA pinned memory of the host, from which each search streams the vectors; nothing, so that
    each search reads them from Lance. Columns that were used less recently are evicted before a
    step is left.

    Parameters
    ----------
    rows : int
        That there are now. Room for more is reserved in :meth:`Plan.place` as they come.
    ndims : int
        Length of a vector.
    stored_dtype : numpy.dtype
        Of the column in Lance: float16, float32 or float64.
    device : torch.device
        That of the budget.
    budget : Budget
    owner : object with ``evict()``
        What it holds so far is given up: it must free that before it takes what is planned.
    narrow : bool
        False where float16 was tried and cannot hold the values.

    Returns
    -------
    Plan
        Its ``nbytes`` are reserved for the owner, and nothing else is.

    Raises
    ------
    BadInputError
        For another dtype, or fewer than no rows.

    Examples
    --------
    >>> import torch
    >>> class Column:
    ...     def evict(self):
    ...         return False
    >>> cpu, column = torch.device("cpu"), Column()
    >>> chosen = plan(1000, 384, np.dtype("float32"), cpu, Budget(cpu, "1 MB"), column)
    >>> chosen.step.value, chosen.nbytes
    ('float16', 790000)
    >>> chosen.reason
    'float32 needs 1.49 MiB, the memory budget is 0.95 MiB; float16 is held instead, ...'
    """
    stored = np.dtype(stored_dtype)
    if stored.name not in ("float16", "float32", "float64") or rows < 0 or ndims < 1:
        raise BadInputError(
            "A column has 0 or more vectors of float16, float32 or float64, got "
            f"{rows} of {ndims} values of {stored}."
        )
    half, single = np.dtype(np.float16), np.dtype(np.float32)
    widest = half if stored == half else single
    refused: list[str] = []
    for step, dtype in ((Step(widest.name), widest), (Step.FLOAT16, half)):
        if refused and dtype == widest:
            break  # it is float16 already
        if refused and not narrow:
            refused.append("float16 cannot hold its values")
            break
        nbytes = column_bytes(rows, ndims, dtype, device)
        why_not = budget.refusal(owner, nbytes, instead=True)
        if why_not is None:
            if budget.host is not None:
                budget.host.release(owner)
            return Plan(step, dtype, Home.DEVICE, nbytes, _reason(step, stored, refused))
        refused.append(f"{step} needs {show_bytes(nbytes)}, {why_not}")
    host = budget.host
    if host is not None:
        nbytes = column_bytes(rows, ndims, widest, host.device)
        why_not = host.refusal(owner, nbytes, instead=True)
        if why_not is None:
            budget.refusal(owner, 0, instead=True)
            return Plan(Step.HOST, widest, Home.HOST, nbytes, _reason(Step.HOST, stored, refused))
        refused.append(f"on the host it needs {show_bytes(nbytes)}, {why_not}")
    budget.release(owner)
    return Plan(Step.LANCE, widest, Home.LANCE, 0, _reason(Step.LANCE, stored, refused))


def _reason(step: Step, stored: np.dtype, refused: list[str]) -> str:
    if step == stored.name:
        return "as stored"
    then = {
        Step.FLOAT32: f"{stored} is searched as float32",
        Step.FLOAT16: "float16 is held instead",
        Step.HOST: "the host holds it, and each search streams it to the device",
        Step.LANCE: "each search reads it from Lance",
    }[step]
    if step in (Step.FLOAT32, Step.FLOAT16):
        then += ", and candidates are measured again from the stored values"
    return "; ".join([*refused, then])
