"""Embed items with any function: a CPU part that may run ahead, and a device part.

A function that derives from DeviceEmbeddingFunction gives tensors; for a user's class, which
returns lists, what it returns is checked and put into one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_lance.device import as_tensor
from gpu_lance.embeddings.base import EmbeddingFunction, TextEmbeddingFunction
from gpu_lance.embeddings.device_base import DeviceEmbeddingFunction, is_derived
from gpu_lance.embeddings.inputs import text_fault
from gpu_lance.errors import EmbeddingError
from gpu_lance.optional import require
from gpu_lance.types import Embeddings, Side

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ListItems:
    """Items for a function that returns lists, sorted into good, null and bad ones.

    Parameters
    ----------
    items : list
        The good items.
    positions : list of int
        Where each good item stood.
    count : int
        Items in all.
    side : Side
        Which side they are embedded for.
    errors : dict of int to str
        The reason for each bad item, by its position.
    """

    items: list[Any]
    positions: list[int]
    count: int
    side: Side
    errors: dict[int, str] = field(default_factory=dict)


def prepare(function: EmbeddingFunction, items: Sequence[Any], side: Side | str) -> Any:
    """Do the CPU part (tokenise, decode) of embedding `items`.

    It may run in another thread, ahead of the device. Nothing is loaded onto a device.

    Parameters
    ----------
    function : EmbeddingFunction
        Any kind.
    items : sequence
        Null items are None; they are never given to a model.
    side : Side
        Whether the items are sources or queries.

    Returns
    -------
    object
        What :func:`finish` takes.
    """
    side = Side(side)
    if runs_on_device(function, side):
        assert isinstance(function, DeviceEmbeddingFunction)
        return function.prepare(items, side)
    text = isinstance(function, TextEmbeddingFunction)
    good: list[Any] = []
    positions: list[int] = []
    errors: dict[int, str] = {}
    for position, item in enumerate(items):
        if item is None:
            continue
        if text and (reason := text_fault(item)):
            errors[position] = reason
            continue
        good.append(item)
        positions.append(position)
    return ListItems(good, positions, len(items), side, errors)


def finish(
    function: EmbeddingFunction, prepared: Any, *, ndims: int, device: torch.device
) -> Embeddings:
    """Do the device part of embedding what :func:`prepare` gave.

    Parameters
    ----------
    function : EmbeddingFunction
        The same as in :func:`prepare`.
    prepared : object
        What it returned.
    ndims : int
        The length that a vector must have.
    device : torch.device
        Where the vectors shall be.

    Returns
    -------
    Embeddings
        Vectors (n, ndims), float32, in the order of the items.

    Raises
    ------
    EmbeddingError
        If the function gives another number of vectors, a vector of another length, or something
        other than numbers; the message names the item.
    """
    if not isinstance(prepared, ListItems):
        assert isinstance(function, DeviceEmbeddingFunction)
        return function.finish(prepared, ndims=ndims, device=device)
    torch = require("torch", extra="cpu|cuda13|cuda12")
    vectors = torch.zeros((prepared.count, ndims), dtype=torch.float32, device=device)
    valid = np.zeros(prepared.count, dtype=bool)
    errors = dict(prepared.errors)
    if prepared.items:
        returned = _call(function, prepared)
        name = type(function).__name__
        rows, missing = _as_rows(returned, prepared.positions, ndims, name)
        kept = [where for i, where in enumerate(prepared.positions) if i not in missing]
        errors.update(
            (prepared.positions[i], f"{name} returned no vector for it") for i in sorted(missing)
        )
        if kept:
            valid[kept] = True
            target = torch.as_tensor(kept, device=device)
            vectors.index_copy_(0, target, rows.to(device=device, dtype=torch.float32))
    return Embeddings(vectors, valid, dict(sorted(errors.items())))


def embed(
    function: EmbeddingFunction,
    items: Sequence[Any],
    side: Side | str,
    *,
    ndims: int,
    device: torch.device,
) -> Embeddings:
    """Embed `items`: :func:`prepare`, then :func:`finish`.

    Examples
    --------
    >>> import torch
    >>> from gpu_lance.embeddings import TextEmbeddingFunction
    >>> class Length(TextEmbeddingFunction):
    ...     def generate_embeddings(self, texts):
    ...         return [[float(len(text))] for text in texts]
    ...     def ndims(self):
    ...         return 1
    >>> made = embed(Length(), ["a", None, "ccc"], "source", ndims=1, device=torch.device("cpu"))
    >>> made.vectors.tolist(), made.valid.tolist()
    ([[1.0], [0.0], [3.0]], [True, False, True])
    """
    return finish(function, prepare(function, items, side), ndims=ndims, device=device)


def runs_on_device(function: EmbeddingFunction, side: Side) -> bool:
    """Whether `function` gives tensors for that side.

    A subclass of a device function that overrides one of LanceDB's list methods is asked through
    that method, or its override would be ignored.
    """
    if not isinstance(function, DeviceEmbeddingFunction):
        return False
    names = ["generate_embeddings", "compute_source_embeddings"]
    if side is Side.QUERY:
        names.append("compute_query_embeddings")
    methods = [getattr(type(function), name, None) for name in names]
    return all(is_derived(method) for method in methods if method is not None)


def _call(function: EmbeddingFunction, prepared: ListItems) -> Any:
    if prepared.side is Side.SOURCE:
        return function.compute_source_embeddings_with_retry(prepared.items)
    query = function.compute_query_embeddings_with_retry
    if type(function).compute_query_embeddings is TextEmbeddingFunction.compute_query_embeddings:
        return query(prepared.items)
    # LanceDB passes one query at a time, so a user's method may not take a list
    return [_only(query(item), type(function).__name__) for item in prepared.items]


def _only(returned: Any, name: str) -> Any:
    if hasattr(returned, "__len__") and len(returned) == 1:
        return returned[0]
    got = f"{len(returned)} vectors" if hasattr(returned, "__len__") else repr(returned)
    raise EmbeddingError(
        f"{name}.compute_query_embeddings must return a list with one vector for one query, "
        f"got {got}."
    )


def _as_rows(
    returned: Any, positions: list[int], ndims: int, name: str
) -> tuple[torch.Tensor, set[int]]:
    """Turn what a function returned into (m, ndims), and say which items got no vector."""
    if hasattr(returned, "to_pylist"):  # Arrow
        returned = returned.to_pylist()
    elif hasattr(returned, "to_numpy"):  # a data frame, or a column of vectors
        returned = returned.to_numpy()
    if not hasattr(returned, "__len__") or isinstance(returned, set | frozenset):  # no order
        raise EmbeddingError(
            f"{name} must return a list of vectors, got a {type(returned).__name__}."
        )
    if len(returned) != len(positions):
        raise EmbeddingError(
            f"{name} returned {len(returned)} vectors for {len(positions)} items; it must return "
            "one for each."
        )
    if getattr(returned, "ndim", None) == 2 and _is_numeric(returned):
        if returned.shape[1] != ndims:
            raise _wrong_length(name, positions[0], returned.shape[1], ndims)
        return as_tensor(returned), set()
    missing = {i for i, vector in enumerate(returned) if vector is None}
    present = [vector for vector in returned if vector is not None]
    if not present:
        return as_tensor(np.empty((0, ndims), np.float32)), missing
    try:
        rows = _stack(present)
    except (ValueError, TypeError, OverflowError):
        rows = None
    if rows is None or tuple(rows.shape[1:]) != (ndims,):
        raise _first_fault(returned, positions, ndims, name)
    return rows, missing


def _stack(vectors: list[Any]) -> torch.Tensor | None:
    torch = require("torch", extra="cpu|cuda13|cuda12")
    if any(isinstance(vector, torch.Tensor) for vector in vectors):
        tensors = [as_tensor(vector) for vector in vectors]
        if len({tuple(tensor.shape) for tensor in tensors}) > 1 or tensors[0].is_complex():
            return None
        return torch.stack([tensor.to(tensors[0].device) for tensor in tensors])
    array = np.asarray(vectors)
    if not _is_numeric(array):
        return None
    with np.errstate(over="ignore"):  # what overflows becomes infinite, and so a bad vector
        return as_tensor(array.astype(np.float32, copy=False))


def _is_numeric(values: Any) -> bool:
    dtype = values.dtype
    # numpy would parse numbers out of strings and drop the imaginary part of complex ones
    kind = getattr(dtype, "kind", None)
    return kind in "fiub" if kind is not None else not dtype.is_complex


def _length(vector: Any) -> int | None:
    """How many numbers a vector has; None for what has no length, such as a number."""
    try:
        return None if isinstance(vector, str | bytes) else len(vector)
    except TypeError:
        return None


def _is_number(value: Any) -> bool:
    if isinstance(value, str | bytes) or np.ndim(value) or np.iscomplexobj(value):
        return False
    try:
        float(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def _first_fault(returned: Any, positions: list[int], ndims: int, name: str) -> EmbeddingError:
    for where, vector in zip(positions, returned, strict=True):
        if vector is None:
            continue
        length = _length(vector)
        if length is None:
            return EmbeddingError(
                f"{name} returned {_shown(vector)} for item {where}; a vector is a list of "
                f"{ndims} numbers."
            )
        if length != ndims:
            return _wrong_length(name, where, length, ndims)
        for number in vector:
            if not _is_number(number):
                return EmbeddingError(
                    f"{name} returned a vector for item {where} that holds {_shown(number)}; a "
                    f"vector is a list of {ndims} numbers."
                )
    return EmbeddingError(f"{name} must return one list of {ndims} numbers for each item.")


def _wrong_length(name: str, where: int, got: int, ndims: int) -> EmbeddingError:
    return EmbeddingError(
        f"{name} returned a vector of {got} numbers for item {where}; the column wants {ndims}. "
        "Make ndims() return what the model gives, or use the function that made the column."
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"a {type(value).__name__}"
