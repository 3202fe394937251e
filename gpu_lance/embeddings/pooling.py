"""One vector from the states of a text's tokens, packed or padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_lance.embeddings.encoder import Run
from gpu_lance.optional import require

if TYPE_CHECKING:
    import torch


def pool(states: torch.Tensor, runs: Sequence[Run], modes: Sequence[str]) -> torch.Tensor:
    """Pool the token states of packed texts, as the Pooling module of sentence-transformers does.

    Parameters
    ----------
    states : torch.Tensor
        (t, h), tokens end to end.
    runs : sequence of Run
        How they fall into texts, each with at least one token.
    modes : sequence of str
        ``"mean"``, ``"cls"``, ``"max"``, ``"lasttoken"``, ``"mean_sqrt_len_tokens"``,
        ``"weightedmean"``; several are put side by side.

    Returns
    -------
    torch.Tensor
        (n, len(modes) * h), float32.

    Examples
    --------
    >>> import torch
    >>> pool(torch.tensor([[1.0], [3.0]]), [Run(0, 2, 1, 2)], ["mean", "max"])
    tensor([[2., 3.]])
    """
    torch = require("torch", extra="cpu|cuda13|cuda12")
    rows = []
    for run in runs:
        part = states[run.start : run.stop].view(run.count, run.length, -1)
        rows.append(torch.cat([_one(torch, part, mode).float() for mode in modes], dim=1))
    return torch.cat(rows)


def pool_padded(states: torch.Tensor, lengths: np.ndarray | None, mode: str) -> torch.Tensor:
    """Pool the token states of texts that are padded on the right.

    Parameters
    ----------
    states : torch.Tensor
        (n, l, h).
    lengths : numpy.ndarray or None
        (n,), tokens of each text, at least one; None if no text is padded.
    mode : str
        ``"mean"``, ``"cls"`` or ``"lasttoken"``.

    Returns
    -------
    torch.Tensor
        (n, h), float32.

    Examples
    --------
    >>> import torch
    >>> states = torch.tensor([[[1.0], [3.0]], [[4.0], [9.0]]])
    >>> pool_padded(states, np.array([2, 1]), "mean")
    tensor([[2.],
            [4.]])
    """
    torch = require("torch", extra="cpu|cuda13|cuda12")
    if lengths is None or mode == "cls":
        return _one(torch, states, mode).float()
    counts = torch.from_numpy(lengths).to(states.device)
    if mode == "lasttoken":
        return states[torch.arange(len(states), device=states.device), counts - 1].float()
    if mode != "mean":
        raise ValueError(f"Unknown pooling mode {mode!r}.")
    padding = torch.arange(states.shape[1], device=states.device) >= counts[:, None]
    # not by a product, since what stands in the padding may be infinite
    total = states.float().masked_fill(padding[:, :, None], 0).sum(dim=1)
    return total / counts[:, None]


def _one(torch: Any, part: torch.Tensor, mode: str) -> torch.Tensor:
    length = part.shape[1]
    match mode:
        case "mean":
            return part.mean(dim=1, dtype=torch.float32)
        case "cls":
            return part[:, 0]
        case "max":
            return part.amax(dim=1)
        case "lasttoken":
            return part[:, -1]
        case "mean_sqrt_len_tokens":
            return part.sum(dim=1, dtype=torch.float32) / float(length) ** 0.5
        case "weightedmean":
            weights = torch.arange(1, length + 1, device=part.device, dtype=torch.float32)
            total = torch.einsum("nlh,l->nh", part.float(), weights)
            return total / (length * (length + 1) / 2)
    raise ValueError(f"Unknown pooling mode {mode!r}.")
