"""Base of functions that work in two stages: a CPU part that may run ahead, and the vectors."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from gpu_lance.device import resolve_device, to_host
from gpu_lance.embeddings.base import EmbeddingFunction
from gpu_lance.errors import BadInputError
from gpu_lance.types import Embeddings, Side

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=Callable[..., Any])


def derived(method: M) -> M:
    """Mark a list method that only wraps the two stages; an override lacks the mark."""
    method.__derived_from_stages__ = True  # type: ignore[attr-defined]
    return method


def is_derived(method: Any) -> bool:
    """Whether :func:`derived` marked it."""
    return bool(getattr(method, "__derived_from_stages__", False))


class StagedFunction(EmbeddingFunction):
    """Base of our providers: implement :meth:`prepare`, :meth:`finish` and ``ndims``.

    LanceDB's list methods are derived from them.

    Notes
    -----
    The class attribute `multivector` says that an item gives any number of vectors, which go into
    a ``MultiVector`` column.

    Examples
    --------
    >>> import numpy as np, torch
    >>> class Lengths(StagedFunction):
    ...     def ndims(self):
    ...         return 1
    ...     def prepare(self, items, side):
    ...         return [0 if item is None else len(item) for item in items]
    ...     def finish(self, prepared, *, ndims, device):
    ...         vectors = torch.tensor(prepared, device=device).float().reshape(-1, ndims)
    ...         return Embeddings(vectors, np.array(prepared) > 0)
    >>> Lengths().compute_source_embeddings(["four", None])
    [array([4.], dtype=float32), None]
    """

    multivector: ClassVar[bool] = False

    @abstractmethod
    def prepare(self, items: Sequence[Any], side: Side) -> Any:
        """Do the CPU part of embedding `items`, of which some may be None."""

    @abstractmethod
    def finish(self, prepared: Any, *, ndims: int, device: torch.device) -> Embeddings:
        """Make the vectors of what :meth:`prepare` gave, of length `ndims`, on `device`."""

    def single(self, ndims: int) -> EmbeddingFunction | None:
        """Of a multivector class: what makes one vector of `ndims` numbers an item; else None."""
        return None

    def fingerprint(self) -> dict[str, str] | None:
        """Return what decides the values of the vectors; None if it is not known."""
        return None

    @derived
    def compute_source_embeddings(self, items: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """Embed one item or a column: float32 arrays; None where an item is null or bad.

        An array is (d,), or (t, d) where an item gives several vectors.
        """
        made = self._embed(self.sanitize_input(items), Side.SOURCE)
        if made.errors:
            first, reason = next(iter(made.errors.items()))
            logger.warning(
                "%s: %d items have no vector; the first is item %d: %s.",
                type(self).__name__,
                len(made.errors),
                first,
                reason,
            )
        return _as_arrays(made)

    @derived
    def compute_query_embeddings(self, query: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """Embed one query or a list of them: float32 arrays; a bad query is a BadInputError."""
        made = self._embed(self.sanitize_input(query), Side.QUERY)
        for position, reason in made.errors.items():
            raise BadInputError(f"Query {position} cannot be embedded: {reason}.")
        return _as_arrays(made)

    def _embed(self, items: list[Any], side: Side) -> Embeddings:
        device = resolve_device(self._wanted_device())
        return self.finish(self.prepare(items, side), ndims=self.ndims(), device=device)

    def _wanted_device(self) -> str:
        """Where the list methods make the vectors."""
        return "cpu"


def _as_arrays(made: Embeddings) -> list[Any]:
    host = to_host(made.vectors)
    if made.offsets is None:
        return [row if valid else None for row, valid in zip(host, made.valid, strict=True)]
    starts, ends = made.offsets[:-1].tolist(), made.offsets[1:].tolist()
    return [
        host[start:end] if valid else None
        for start, end, valid in zip(starts, ends, made.valid, strict=True)
    ]
