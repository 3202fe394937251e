"""The exact distances: the same bits everywhere."""

from __future__ import annotations

import numpy as np
import torch

from gpu_lance.index.rescore import exact_distances, root
from gpu_lance.types import Metric


def test_square_roots_are_correctly_rounded() -> None:
    """torch's own on the CPU were off by a bit in one of a hundred."""
    values = np.random.default_rng(0).random(100_000) * 7
    got = root(torch.from_numpy(values))
    np.testing.assert_array_equal(got.numpy(), np.sqrt(values))


def test_near_rows_under_cosine() -> None:
    """Beside a distance of 0 the last bit of a norm shows."""
    rows = (1 + 1e-4 * np.random.default_rng(0).standard_normal((3000, 8))).astype(np.float32)
    pairs = torch.zeros(3000, dtype=torch.int64), torch.arange(3000)
    vectors = torch.from_numpy(rows)
    got = exact_distances(Metric.COSINE, vectors[:1], lambda slots: vectors[slots], *pairs)

    def halved(terms: np.ndarray) -> np.ndarray:
        while terms.shape[1] > 1:
            terms = terms[:, : terms.shape[1] // 2] + terms[:, terms.shape[1] // 2 :]
        return terms[:, 0]

    wide = rows.astype(np.float64)
    lengths = np.sqrt(halved(wide * wide))
    want = 1 - halved(wide * wide[:1]) / (lengths[:1] * lengths)
    np.testing.assert_array_equal(got, want.astype(np.float32))
