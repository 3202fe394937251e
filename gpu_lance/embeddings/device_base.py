"""Base of functions whose vectors are made, and stay, on a device."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field, PrivateAttr

from gpu_lance.device import as_tensor, check_threads, resolve_device
from gpu_lance.embeddings.batching import Budget, run_batches
from gpu_lance.embeddings.gathering import OneEach, Several
from gpu_lance.embeddings.inputs import text_fault, usable
from gpu_lance.embeddings.staged import StagedFunction
from gpu_lance.errors import EmbeddingError
from gpu_lance.optional import require
from gpu_lance.types import Embeddings, Modality, Side

if TYPE_CHECKING:
    import torch


@dataclass
class Payload:
    """What a provider makes of good items, before the device sees them.

    Parameters
    ----------
    data : object
        Whatever its forward takes rows of.
    costs : numpy.ndarray, optional
        (n,), what each item costs a forward, such as its tokens; None counts each as one.
    bad : dict of int to str
        Items that turned out to be unusable, by index, with the reason. Their rows are never
        asked for.
    """

    data: Any
    costs: np.ndarray | None = None
    bad: dict[int, str] = field(default_factory=dict)


@dataclass
class Prepared:
    """Items that are ready for the device.

    Parameters
    ----------
    payload : object
        The provider's data.
    rows : numpy.ndarray
        (m,), rows of the payload to embed, the costliest first.
    positions : numpy.ndarray
        (m,), where the item of each of those rows stood.
    costs : numpy.ndarray
        (m,), descending.
    count : int
        Items in all, null and bad ones too.
    side : Side
        What they are embedded for.
    errors : dict of int to str
        The reason for each bad item, by its position.
    """

    payload: Any
    rows: np.ndarray
    positions: np.ndarray
    costs: np.ndarray
    count: int
    side: Side
    errors: dict[int, str]


class DeviceEmbeddingFunction(StagedFunction):
    """Base of providers whose model runs here: a CPU part and a device part; the rest is derived.

    A provider implements :meth:`prepare_items`, :meth:`forward` and ``ndims``. This class owns the
    batches and their order, halving when memory runs out, null and bad items, normalisation, and
    LanceDB's list methods.

    Parameters
    ----------
    device : str
        Where the model runs: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...; ``"auto"`` in a table is
        where its vectors are held. Belongs to the session: a table never stores it.
    batch_size : int, optional
        The most items in one forward; None leaves it to the budget of the device.
    dtype : str, optional
        Precision of the model; None is bfloat16 on CUDA and float32 elsewhere.
    normalize : bool
        Whether vectors are scaled to length 1.

    Notes
    -----
    Class attributes: `inputs` are the kinds of items it takes; `cpu_budget` and `device_budget`
    limit a forward to so many (items x the largest cost among them), None for no limit.

    Examples
    --------
    >>> import torch
    >>> class Counts(DeviceEmbeddingFunction):
    ...     def ndims(self):
    ...         return 2
    ...     def prepare_items(self, items, side):
    ...         return Payload(torch.tensor([[len(t), t.count("a")] for t in items]).float())
    ...     def forward(self, data, rows, side, device):
    ...         return data[torch.from_numpy(rows)].to(device)
    >>> Counts(device="cpu", normalize=False).compute_source_embeddings(["banana", None])
    [array([6., 3.], dtype=float32), None]
    """

    inputs: ClassVar[frozenset[Modality]] = frozenset({Modality.TEXT})
    cpu_budget: ClassVar[int | None] = None
    device_budget: ClassVar[int | None] = None

    device: str = "auto"
    batch_size: int | None = Field(default=None, ge=1)
    dtype: str | None = None
    normalize: bool = True

    _budgets: dict[str, Budget] = PrivateAttr(default_factory=dict)

    # -- what a provider implements

    @abstractmethod
    def prepare_items(self, items: list[Any], side: Side) -> Payload:
        """Do the CPU part for good items: tokenise, decode. Must not touch the device."""

    @abstractmethod
    def forward(self, data: Any, rows: np.ndarray, side: Side, device: torch.device) -> Any:
        """Embed one batch, under ``inference_mode``.

        Parameters
        ----------
        data : object
            Of the payload.
        rows : numpy.ndarray
            (b,), int64, the rows of `data` to embed.
        side : Side
            What for.
        device : torch.device
            Where to.

        Returns
        -------
        torch.Tensor, or (torch.Tensor, numpy.ndarray)
            (b, d), of a floating dtype, on `device`, not yet normalised. Of a class with
            `multivector` the vectors of all items end to end (t, d), and how many each has (b,).
        """

    def item_fault(self, item: Any) -> str | None:
        """Return why an item cannot be embedded, or None; override it for other kinds than text."""
        return text_fault(item) if self.inputs == {Modality.TEXT} else None

    # -- the device methods

    def prepare(self, items: Sequence[Any], side: Side) -> Prepared:
        """Do the CPU part of embedding `items`; None items are left out."""
        good, positions, errors = usable(items, self.item_fault)
        payload = self.prepare_items(good, side) if good else Payload(None)
        errors.update((int(positions[row]), reason) for row, reason in payload.bad.items())
        rows = np.arange(len(good), dtype=np.int64)
        if payload.bad:
            rows = np.delete(rows, list(payload.bad))
        costs = np.ones(len(good), np.int64) if payload.costs is None else payload.costs
        if costs.shape != (len(good),):
            raise EmbeddingError(
                f"{type(self).__name__} gave costs of shape {costs.shape} for {len(good)} items; "
                "it must be one for each."
            )
        order = rows[np.argsort(-costs[rows].astype(np.int64), kind="stable")]
        return Prepared(
            payload.data, order, positions[order], costs[order], len(items), side, errors
        )

    def finish(self, prepared: Prepared, *, ndims: int, device: torch.device) -> Embeddings:
        """Run the model over prepared items; see :func:`gpu_lance.embeddings.calls.finish`."""
        torch = require("torch", extra="cpu|cuda13|cuda12")
        check_threads()
        wanted = device
        if self.device.strip().lower() != "auto":
            device = resolve_device(self.device)  # the model's, wherever the vectors shall be
        where = prepared.positions, prepared.count, ndims, device
        gathered = Several(*where) if self.multivector else OneEach(*where)

        def batch(start: int, end: int) -> Any:
            return self._batch(prepared, start, end, ndims, device)

        budget, name = self._budget(device), type(self).__name__
        with torch.inference_mode():
            for start, end, made in run_batches(prepared.costs, budget, batch, device, name):
                gathered.add(start, end, made)
        out = gathered.result(prepared.errors)
        return replace(out, vectors=as_tensor(out.vectors, wanted))

    def _batch(
        self, prepared: Prepared, start: int, end: int, ndims: int, device: torch.device
    ) -> Any:
        """Run one batch: float32 vectors, normalised if they shall be; see :meth:`forward`."""
        torch = require("torch", extra="cpu|cuda13|cuda12")
        made = self.forward(prepared.payload, prepared.rows[start:end], prepared.side, device)
        vectors, lengths = made, None
        if self.multivector:
            vectors, lengths = self._parts(made, end - start)
        self._check(vectors, end - start if lengths is None else int(lengths.sum()), ndims)
        vectors = vectors.float()
        if self.normalize:
            vectors = torch.nn.functional.normalize(vectors, dim=1)
        return vectors if lengths is None else (vectors, lengths)

    def _parts(self, made: Any, items: int) -> tuple[Any, np.ndarray]:
        """What a multivector forward gave: vectors, and how many each item has."""
        if isinstance(made, tuple) and len(made) == 2:
            lengths = np.asarray(made[1])
            if lengths.shape == (items,) and lengths.dtype.kind in "iu" and (lengths >= 0).all():
                return made[0], lengths
        raise EmbeddingError(
            f"{type(self).__name__} must give the vectors of all items end to end, and an array "
            f"with the number of vectors of each of the {items} items."
        )

    def _check(self, vectors: Any, rows: int, ndims: int) -> None:
        name = type(self).__name__
        torch = require("torch", extra="cpu|cuda13|cuda12")
        if not isinstance(vectors, torch.Tensor):
            raise EmbeddingError(
                f"{name} gave a {type(vectors).__name__}; it must be a torch tensor, one row an "
                "item."
            )
        if vectors.is_complex():
            raise EmbeddingError(f"{name} gave numbers of {vectors.dtype}; they must be real.")
        if vectors.ndim != 2 or vectors.shape[0] != rows:
            what = "vectors" if self.multivector else "items"
            raise EmbeddingError(
                f"{name} gave a tensor {tuple(vectors.shape)} for {rows} {what}; it must be "
                f"one row {'each' if self.multivector else 'an item'}."
            )
        if vectors.shape[1] != ndims:
            raise EmbeddingError(
                f"{name} gave vectors of {vectors.shape[1]} numbers, but the column wants "
                f"{ndims}; use the model that made the column."
            )

    def _wanted_device(self) -> str:
        return self.device

    def _budget(self, device: torch.device) -> Budget:
        cost = self.cpu_budget if device.type == "cpu" else self.device_budget
        fresh = Budget(cost, self.batch_size)
        # kept, since a batch that did not fit once will not fit the next time
        return self._budgets.setdefault(f"{device}/{self.batch_size}", fresh)
