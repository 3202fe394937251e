"""The exact distances that decide the order, and how far an engine's scores may be from them.

Engines compute in float32 and in any order of summation, so their scores only choose candidates.
The distance of a candidate is computed in float64 from the values that are stored, summed in one
fixed order of elementary operations, so that every device gives the same bits. It is then rounded
to float32, and rows are ordered by (distance, row id).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gpu_lance.index.snapshot import TILE_BYTES, Snapshot
from gpu_lance.optional import require
from gpu_lance.types import Metric

if TYPE_CHECKING:
    import torch

OVERFLOW = 1e38  # a sum of squared norms below this cannot overflow a float32 score
NO_ROW = np.iinfo(np.int64).max


def tree_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over the last axis by halving, in place: the same additions on every device.

    Parameters
    ----------
    values : torch.Tensor
        (..., d), float64. Overwritten.

    Returns
    -------
    torch.Tensor
        (...)

    Examples
    --------
    >>> import torch
    >>> tree_sum(torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)).tolist()
    [6.0]
    """
    width = values.shape[-1]
    while width > 1:
        half = (width + 1) // 2
        values[..., : width - half] += values[..., half:width]
        width = half
    return values[..., 0]


def wide(vectors: torch.Tensor) -> torch.Tensor:
    """The vectors in float64, on the vectors' device if it has float64, else on the CPU."""
    return (vectors.cpu() if vectors.device.type == "mps" else vectors).double()


def root(values: torch.Tensor) -> torch.Tensor:
    """Square roots in float64, correctly rounded: on the CPU torch's may be off by the last bit.

    Examples
    --------
    >>> import torch
    >>> root(torch.tensor([4.0], dtype=torch.float64)).tolist()
    [2.0]
    """
    torch = require("torch", extra="cpu|cuda13|cuda12")
    if values.device.type != "cpu":
        return values.sqrt()
    return torch.from_numpy(np.sqrt(values.numpy()))


def norms(vectors: torch.Tensor) -> torch.Tensor:
    """Euclidean norms of (n, d) vectors, float64 (n,), as :func:`wide` places them."""
    values = wide(vectors)
    return root(tree_sum(values * values))


def normalised(vectors: torch.Tensor) -> torch.Tensor:
    """Unit vectors in float32 on the vectors' device, rounded from float64.

    A zero vector stays zero.
    """
    out = vectors.clone()
    # pieces that a CPU's cache holds; a GPU would rather have few launches
    piece = TILE_BYTES if vectors.device.type == "cuda" else 1 << 20
    step = max(1, piece // (8 * vectors.shape[1]))
    for start in range(0, len(vectors), step):
        values = wide(vectors[start : start + step])
        length = root(tree_sum(values * values)).clamp_(min=1e-300)
        out[start : start + step] = values.div_(length[:, None])
    return out


def exact_distances(
    metric: Metric,
    queries: torch.Tensor,
    values: Callable[[torch.Tensor], torch.Tensor],
    query_index: torch.Tensor,
    slots: torch.Tensor,
) -> np.ndarray:
    """The distance of each pair (query, slot), float64 rounded to float32, on the host.

    Parameters
    ----------
    metric : Metric
    queries : torch.Tensor
        (m, d), as the user gave them.
    values : callable
        Gives the stored vectors (n, d) of slots (n,).
    query_index, slots : torch.Tensor
        (p,), int64, on the device.

    Returns
    -------
    numpy.ndarray
        (p,), float32. Under cosine none is below 0, and a vector of zeros has none: it gives NaN.
    """
    exact = wide(queries)
    lengths = norms(queries) if metric is Metric.COSINE else None
    step = max(1, TILE_BYTES // (16 * queries.shape[1]))
    out = np.empty(len(slots), np.float32)
    for start in range(0, len(slots), step):
        some, of = slots[start : start + step], query_index[start : start + step].to(exact.device)
        x = wide(values(some)).to(exact.device)
        found = pair_distances(metric, x, exact[of], None if lengths is None else lengths[of])
        out[start : start + step] = found.float().cpu().numpy()
    return out


def pair_distances(
    metric: Metric, x: torch.Tensor, queries: torch.Tensor, lengths: torch.Tensor | None
) -> torch.Tensor:
    """The distance of each pair, (p,) float64, of (p, d) float64; `x` is overwritten.

    `lengths`, (p,), are the norms of `queries`, for cosine only.
    """
    if metric is Metric.L2:
        x.sub_(queries)
        return tree_sum(x.mul_(x))
    if lengths is None:
        return 1 - tree_sum(x.mul_(queries))
    squares = tree_sum(x * x)
    found = 1 - tree_sum(x.mul_(queries)) / (lengths * root(squares))
    return found.clamp_(min=0)  # a vector's distance to itself, which rounding may put below


def rank(row_ids: np.ndarray, distances: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The first k of each line by (distance, row id), padded with (NO_ROW, +inf).

    Parameters
    ----------
    row_ids, distances : numpy.ndarray
        (m, c) int64 and float32. ``NO_ROW`` marks a place without a row.

    Examples
    --------
    >>> ids, d = rank(np.array([[5, 2, 9]]), np.array([[1.0, 1.0, 0.5]], np.float32), 2)
    >>> ids.tolist(), d.tolist()
    ([[9, 2]], [[0.5, 1.0]])
    """
    order = np.lexsort((row_ids, distances, row_ids == NO_ROW), axis=-1)[:, :k]
    ids = np.take_along_axis(row_ids, order, axis=1)
    nearest = np.take_along_axis(distances, order, axis=1)
    missing = k - ids.shape[1]
    if missing > 0:
        ids = np.pad(ids, ((0, 0), (0, missing)), constant_values=NO_ROW)
        nearest = np.pad(nearest, ((0, 0), (0, missing)), constant_values=np.float32(np.inf))
    return ids, nearest


def unit_roundoff(device: torch.device, *, faiss: bool) -> float:
    """The relative error of one product in an engine, the whole dot product aside.

    It is float32's, unless the process allows matrix products in lower precision.
    """
    torch = require("torch", extra="cpu|cuda13|cuda12")
    if device.type == "cuda" and os.environ.get("NVIDIA_TF32_OVERRIDE") == "1":
        return 2.0**-10
    if not faiss:
        try:
            exact = torch.get_float32_matmul_precision() == "highest"
        except RuntimeError:  # both of torch's interfaces to it were used
            exact = False
        if not exact or device.type == "mps":
            return 2.0**-7  # bfloat16 products
    return 2.0**-24


@dataclass(frozen=True)
class Rounding:
    """How far what an engine computes with is from what is stored.

    Parameters
    ----------
    unit : float
        The relative error of one product; see :func:`unit_roundoff`.
    narrow : float
        The relative error of a held value, 0 if rows are held as they are stored.
    tiny : float
        The absolute error of a held vector on top, from values below the normal range.
    deviation : float
        Under cosine, how far norms are from 1 if the engine does not divide by them.
    """

    unit: float
    narrow: float = 0.0
    tiny: float = 0.0
    deviation: float = 0.0


NARROWED = {2: (2.0**-11, 2.0**-25), 4: (2.0**-24, 2.0**-150)}  # by bytes of what is held


def rounding_of(
    snapshot: Snapshot, unit: float, *, narrowed: bool, divides: bool = True
) -> Rounding:
    """The rounding of products over what a snapshot holds.

    Parameters
    ----------
    unit : float
        See :func:`unit_roundoff`.
    narrowed : bool
        Whether rows are held narrower than they are stored.
    divides : bool
        False under cosine where scores are not divided by the rows' norms, as if those were 1.
    """
    narrow, tiny = NARROWED[snapshot.dtype.itemsize] if narrowed else (0.0, 0.0)
    deviation = 0.0
    if not divides:  # the norms themselves are off by the rounding of a sum of squares
        deviation = snapshot.lengths.deviation + (snapshot.ndims + 8) * 2.0**-24
    return Rounding(unit, narrow, tiny * math.sqrt(snapshot.ndims), deviation)


def error_bound(
    metric: Metric,
    ndims: int,
    rounding: Rounding,
    query_norms: torch.Tensor | np.ndarray,
    row_norms: torch.Tensor | np.ndarray | float,
) -> torch.Tensor | np.ndarray:
    """How far an engine's score can be from the exact distance, for these norms.

    A dot product of d terms in any order of summation errs by at most d·u·|q||x| (Higham,
    Accuracy and Stability of Numerical Algorithms, 3.5). l2 is |q|² + |x|² - 2 q·x, each part
    with that bound, and 2|q||x| <= |q|² + |x|². Cosine adds the error of the row's norm, which is
    that of a sum of d squares. The 8 covers the few operations around it, the factor 1.02 the
    terms of second order, and the last term numbers below float32's normal range.

    Where rows are held narrower than they are stored, a vector is off by at most
    r = narrow·|x| + tiny: its dot product by |q|·r, its l2 by r·(2|q| + 2|x| + r), and its angle
    by 2r/|x|, as soon as r is below |x|/2.

    Parameters
    ----------
    query_norms, row_norms
        Of what the engine computes with; under cosine `row_norms` are the smallest that count.

    Examples
    --------
    >>> round(float(error_bound(Metric.DOT, 384, Rounding(2.0**-24), np.float64(1), 1.0)), 6)
    2.4e-05
    """
    unit = rounding.unit
    if metric is Metric.L2:
        scale = 2 * (ndims + 8) * (query_norms * query_norms + row_norms * row_norms)
    elif metric is Metric.DOT:
        scale = (ndims + 8) * query_norms * row_norms + 8
    else:  # unit vectors
        scale = 2 * (ndims + 12) + 0 * query_norms
    bound = 1.02 * unit * scale + ndims * 2.4e-38
    if rounding.deviation:
        bound = bound + rounding.deviation * (1 + 1e-6)
    if rounding.narrow:
        r = 1.01 * (rounding.narrow * row_norms + 2 * rounding.tiny)
        if metric is Metric.L2:
            bound = bound + r * (2 * query_norms + 2 * row_norms + r)
        elif metric is Metric.DOT:
            bound = bound + query_norms * r
        else:
            bound = bound + 2 * rounding.narrow * 1.01 + 4.1 * rounding.tiny / row_norms
    return bound
