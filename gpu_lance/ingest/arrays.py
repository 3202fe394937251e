"""Numeric arrays of any library, on any device, as Arrow columns without Python floats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from gpu_lance.device import as_tensor, to_host
from gpu_lance.ingest.lists import make_list
from gpu_lance.ingest.vectors import vectors_to_arrow

NUMBERS = "fiub"  # numpy kinds: floats, signed, unsigned, booleans


def is_array(value: Any) -> bool:
    """Whether `value` is an array of numpy, torch, cupy or another library with DLPack.

    Told by its attributes, so that no library is imported for it. Numpy's scalars are no arrays.

    Examples
    --------
    >>> is_array(np.zeros(2)), is_array(np.float32(1)), is_array([1.0])
    (True, False, False)
    """
    if isinstance(value, np.ndarray):
        return True
    return hasattr(value, "__dlpack__") and hasattr(value, "shape") and not is_scalar(value)


def is_scalar(value: Any) -> bool:
    """Whether `value` is one of numpy's scalars."""
    return isinstance(value, np.generic)


def host_array(value: Any) -> np.ndarray:
    """The array in host memory: the same memory if it is there already.

    Parameters
    ----------
    value : numpy.ndarray, torch.Tensor, cupy.ndarray or any DLPack array
        bfloat16 becomes float32, and foreign byte orders the machine's own.

    Examples
    --------
    >>> host_array(np.arange(2.0))
    array([0., 1.])
    """
    if not isinstance(value, np.ndarray):
        return to_host(as_tensor(value))
    if value.dtype.kind == "V" and value.dtype.name == "bfloat16":
        return value.astype(np.float32)
    if not value.dtype.isnative:
        return value.astype(value.dtype.newbyteorder("="))
    return value


def array_to_arrow(value: Any) -> pa.Array | None:
    """A whole column out of one array: its first axis is the rows.

    Parameters
    ----------
    value : array of (n,), (n, d) or (n, t, d)
        On any device.

    Returns
    -------
    pyarrow.Array or None
        Numbers, fixed-size lists of d numbers, or lists of t such vectors, over the memory of a
        contiguous host array. None if it holds something else than numbers, or has other axes.

    Examples
    --------
    >>> array_to_arrow(np.zeros((2, 3), np.float16)).type
    FixedSizeListType(fixed_size_list<item: halffloat>[3])
    """
    matrix = host_array(value)
    if matrix.dtype.kind not in NUMBERS or not 1 <= matrix.ndim <= 3:
        return None
    if matrix.ndim == 1:
        return pa.array(np.ascontiguousarray(matrix))
    value_type = pa.from_numpy_dtype(matrix.dtype)
    if matrix.dtype.kind == "b":  # Arrow packs booleans into bits
        matrix, value_type = matrix.astype(np.uint8), pa.uint8()
    vectors = vectors_to_arrow(
        matrix.reshape(-1, matrix.shape[-1]), None, pa.list_(value_type, matrix.shape[-1])
    )
    if matrix.ndim == 2:
        return vectors
    rows, each, _ = matrix.shape
    field = pa.field("item", vectors.type)
    return make_list(vectors, np.full(rows, each), np.ones(rows, dtype=bool), field)


def stack_arrays(values: Sequence[Any]) -> pa.Array | None:
    """One list a row out of one array a row.

    Parameters
    ----------
    values : sequence of array or None
        Each array (d,), or each (t, d) with one d; lengths d, or t, may differ. Tensors of one
        device are joined there and come to the host in one copy. None becomes null.

    Returns
    -------
    pyarrow.ListArray or None
        Lists of numbers, or lists of fixed-size lists. None if `values` are anything else.

    Examples
    --------
    >>> stack_arrays([np.array([1.0, 2.0]), None]).to_pylist()
    [[1.0, 2.0], None]
    """
    present = [value for value in values if value is not None]
    if not present or not is_array(present[0]):
        return None
    kind, ndim = type(present[0]), present[0].ndim
    # thousands of rows are looked at, and nearly always of the first one's type
    if any(type(value) is not kind and not is_array(value) for value in present):
        return None
    tails = {tuple(value.shape[1:]) for value in present}
    if ndim not in (1, 2) or any(value.ndim != ndim for value in present) or len(tails) > 1:
        return None
    joined = array_to_arrow(_join(present))
    if joined is None:
        return None
    lengths = np.zeros(len(values), dtype=np.int64)
    valid = np.array([value is not None for value in values], dtype=bool)
    lengths[valid] = [value.shape[0] for value in present]
    return make_list(joined, lengths, valid, pa.field("item", joined.type))


def _join(arrays: list[Any]) -> Any:
    """The arrays one after the other along the first axis, on their device if they share one."""
    if all(isinstance(array, np.ndarray) for array in arrays):
        return np.concatenate(arrays)
    tensors = [as_tensor(array) for array in arrays]
    first = tensors[0]
    if all(tensor.device == first.device and tensor.dtype == first.dtype for tensor in tensors):
        import torch  # as_tensor has imported it already

        return torch.cat(tensors)
    return np.concatenate([to_host(tensor) for tensor in tensors])
