"""Embed items with any function: a CPU part that may run ahead, and a device part.

A function that derives from StagedFunction gives tensors; for a user's class, which returns lists,
what it returns is checked and put into one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_lance.device import as_tensor
from gpu_lance.embeddings.base import EmbeddingFunction, TextEmbeddingFunction
from gpu_lance.embeddings.inputs import text_fault, usable
from gpu_lance.embeddings.returned import as_parts, as_rows, listed
from gpu_lance.embeddings.staged import StagedFunction, is_derived
from gpu_lance.errors import EmbeddingError, SchemaError
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


def suited(function: EmbeddingFunction, ndims: int, multi: bool) -> EmbeddingFunction:
    """The function in the form that fills a column of that shape.

    Parameters
    ----------
    function : EmbeddingFunction
        The column's.
    ndims : int
        The length of a vector in the column.
    multi : bool
        Whether a row may have any number of vectors.

    Raises
    ------
    SchemaError
        If it makes several vectors an item and the column takes one, and there is no form of it
        that makes one of that length.
    """
    if multi or not isinstance(function, StagedFunction) or not function.multivector:
        return function
    single = function.single(ndims)
    if single is None:
        raise SchemaError(
            f"{type(function).__name__} makes several vectors of each item, and the column takes "
            f"one of {ndims} numbers; declare it as MultiVector({function.ndims()})."
        )
    return single


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
    if is_staged(function, side):
        assert isinstance(function, StagedFunction)
        return function.prepare(items, side)
    text = isinstance(function, TextEmbeddingFunction)
    good, positions, errors = usable(items, text_fault if text else lambda item: None)
    return ListItems(good, positions.tolist(), len(items), side, errors)


def finish(
    function: EmbeddingFunction,
    prepared: Any,
    *,
    ndims: int,
    device: torch.device,
    multi: bool = False,
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
    multi : bool
        Whether an item may have any number of vectors, as in a ``MultiVector`` column; one of a
        function that gives one.

    Returns
    -------
    Embeddings
        Vectors (n, ndims), float32, in the order of the items; with `multi` (t, ndims) and
        offsets.

    Raises
    ------
    EmbeddingError
        If the function gives another number of vectors, a vector of another length, or something
        other than numbers; the message names the item.
    """
    if not isinstance(prepared, ListItems):
        assert isinstance(function, StagedFunction)
        if function.multivector and not multi:
            raise EmbeddingError(
                f"{type(function).__name__} makes several vectors of each item; they go into a "
                f"column of MultiVector({ndims})."
            )
        made = function.finish(prepared, ndims=ndims, device=device)
        return _one_each(made) if multi and made.offsets is None else made
    torch = require("torch", extra="cpu|cuda13|cuda12")
    name, count = type(function).__name__, prepared.count
    rows, missing = as_tensor(np.empty((0, ndims), np.float32)), set[int]()
    lengths = np.zeros(count, np.int64)
    if prepared.items:
        returned = _call(function, prepared)
        if multi:
            rows, here, missing = as_parts(returned, prepared.positions, ndims, name)
            lengths[prepared.positions] = here
        else:
            rows, missing = as_rows(returned, prepared.positions, ndims, name)
    kept = [where for i, where in enumerate(prepared.positions) if i not in missing]
    valid = np.zeros(count, dtype=bool)
    valid[kept] = True
    errors = dict(prepared.errors)
    errors.update(
        (prepared.positions[i], f"{name} returned no vector for it") for i in sorted(missing)
    )
    errors = dict(sorted(errors.items()))
    rows = rows.to(device=device, dtype=torch.float32)
    if multi:
        return Embeddings(rows, valid, errors, np.concatenate(([0], np.cumsum(lengths))))
    vectors = torch.zeros((count, ndims), dtype=torch.float32, device=device)
    vectors.index_copy_(0, torch.as_tensor(kept, dtype=torch.int64, device=device), rows)
    return Embeddings(vectors, valid, errors)


def embed(
    function: EmbeddingFunction,
    items: Sequence[Any],
    side: Side | str,
    *,
    ndims: int,
    device: torch.device,
    multi: bool = False,
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
    prepared = prepare(function, items, side)
    return finish(function, prepared, ndims=ndims, device=device, multi=multi)


def is_staged(function: EmbeddingFunction, side: Side) -> bool:
    """Whether `function` gives tensors for that side.

    A subclass of a staged function that overrides one of LanceDB's list methods is asked through
    that method, or its override would be ignored.
    """
    if not isinstance(function, StagedFunction):
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
    name = f"{name}.compute_query_embeddings"
    returned = listed(returned, name)
    if len(returned) == 1:
        return returned[0]
    raise EmbeddingError(
        f"{name} must return a list with one vector for one query, got {len(returned)} vectors."
    )


def _one_each(made: Embeddings) -> Embeddings:
    """One vector an item, as lists of one."""
    torch = require("torch", extra="cpu|cuda13|cuda12")
    vectors = made.vectors
    if not made.valid.all():
        vectors = vectors[torch.from_numpy(made.valid).to(vectors.device)]
    offsets = np.concatenate(([0], np.cumsum(made.valid, dtype=np.int64)))
    return Embeddings(vectors, made.valid, made.errors, offsets)
