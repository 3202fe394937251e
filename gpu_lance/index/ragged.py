"""Neighbours of different lengths, one after the other in an array, by where each begins."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def bounds_of(lengths: np.ndarray) -> np.ndarray:
    """Where each of n neighbours of those lengths begins, and where the last one ends.

    Parameters
    ----------
    lengths : numpy.ndarray
        (n,) integers or bool.

    Returns
    -------
    numpy.ndarray
        (n + 1,) int64, from 0.

    Examples
    --------
    >>> bounds_of(np.array([2, 0, 3])).tolist()
    [0, 2, 2, 5]
    """
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def rows_of(begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The numbers from each of `begins` to its end, one range after the other, int64.

    Examples
    --------
    >>> rows_of(np.array([5, 0]), np.array([7, 1])).tolist()
    [5, 6, 0]
    """
    lengths = ends - begins
    before = np.cumsum(lengths) - lengths
    return np.repeat(begins - before, lengths) + np.arange(int(lengths.sum()))


def groups(bounds: np.ndarray, first: int, last: int, most: int) -> Iterator[tuple[int, int]]:
    """Neighbours from `first` to `last` in runs of at most `most` rows; a longer one by itself.

    Examples
    --------
    >>> list(groups(np.array([0, 2, 3, 9, 10]), 0, 4, 3))
    [(0, 2), (2, 3), (3, 4)]
    """
    while first < last:
        stop = int(np.searchsorted(bounds, bounds[first] + most, side="right")) - 1
        stop = min(max(stop, first + 1), last)
        yield first, stop
        first = stop
