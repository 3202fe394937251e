"""Put the vectors of batches, which come sorted by cost, back into the order of the items."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_lance.optional import require
from gpu_lance.types import Embeddings

if TYPE_CHECKING:
    import torch

EXTRAS = "cpu|cuda13|cuda12"


class OneEach:
    """Gathers one vector an item.

    Made, and asked for its result, outside ``inference_mode``, so that the caller gets an ordinary
    tensor.

    Parameters
    ----------
    positions : numpy.ndarray
        (m,), int64: where the item stood whose vector comes at each place.
    count : int
        Items in all.
    ndims : int
        Length of a vector.
    device : torch.device
        Of the vectors.

    Examples
    --------
    >>> import torch
    >>> gathered = OneEach(np.array([2, 0]), 3, 1, torch.device("cpu"))
    >>> gathered.add(0, 2, torch.tensor([[7.0], [5.0]]))
    >>> gathered.result({}).vectors.tolist()
    [[5.0], [0.0], [7.0]]
    """

    def __init__(self, positions: np.ndarray, count: int, ndims: int, device: torch.device) -> None:
        torch = require("torch", extra=EXTRAS)
        self._positions = positions
        self._made = torch.empty((len(positions), ndims), dtype=torch.float32, device=device)
        self._out = torch.zeros((count, ndims), dtype=torch.float32, device=device)

    def add(self, start: int, end: int, made: Any) -> None:
        """Take the vectors (end - start, d) of the places from `start` to `end`."""
        self._made[start:end] = made

    def result(self, errors: dict[int, str]) -> Embeddings:
        """All vectors, by item."""
        with require("torch", extra=EXTRAS).no_grad():
            self._out.index_copy_(0, _index(self._positions, self._out.device), self._made)
        valid = np.zeros(len(self._out), dtype=bool)
        valid[self._positions] = True
        return Embeddings(self._out, valid, dict(sorted(errors.items())))


class Several:
    """Gathers any number of vectors an item; an item without any is not valid.

    Parameters as of :class:`OneEach`.

    Examples
    --------
    >>> import torch
    >>> gathered = Several(np.array([2, 0]), 3, 1, torch.device("cpu"))
    >>> gathered.add(0, 2, (torch.tensor([[7.0], [8.0], [5.0]]), np.array([2, 1])))
    >>> made = gathered.result({})
    >>> made.vectors.tolist(), made.offsets.tolist()
    ([[5.0], [7.0], [8.0]], [0, 1, 1, 3])
    """

    def __init__(self, positions: np.ndarray, count: int, ndims: int, device: torch.device) -> None:
        torch = require("torch", extra=EXTRAS)
        self._positions, self._count = positions, count
        self._parts = [torch.empty((0, ndims), dtype=torch.float32, device=device)]
        self._lengths = np.zeros(len(positions), np.int64)

    def add(self, start: int, end: int, made: Any) -> None:
        """Take the vectors (t, d) of the places from `start` to `end`, and each one's number."""
        vectors, self._lengths[start:end] = made
        self._parts.append(vectors)

    def result(self, errors: dict[int, str]) -> Embeddings:
        """All vectors, by item."""
        torch = require("torch", extra=EXTRAS)
        lengths = np.zeros(self._count, np.int64)
        lengths[self._positions] = self._lengths
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        before = np.cumsum(self._lengths) - self._lengths
        # where each vector goes: the place of its item, and its own place within
        target = np.repeat(offsets[self._positions] - before, self._lengths)
        target += np.arange(len(target))
        with torch.no_grad():
            parts = torch.cat(self._parts)
            self._parts = []
            out = torch.empty_like(parts)
            out.index_copy_(0, _index(target, out.device), parts)
        empty = self._positions[self._lengths == 0].tolist()
        errors = {**dict.fromkeys(empty, "the model has no vector for it"), **errors}
        return Embeddings(out, lengths > 0, dict(sorted(errors.items())), offsets)


def _index(places: np.ndarray, device: torch.device) -> torch.Tensor:
    """The places on the device, by a copy that nothing waits for."""
    index = require("torch", extra=EXTRAS).from_numpy(places)
    if device.type == "cuda":
        index = index.pin_memory()
    return index.to(device, non_blocking=device.type == "cuda")
