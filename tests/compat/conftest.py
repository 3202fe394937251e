"""What the comparisons with LanceDB share."""

from __future__ import annotations

from collections.abc import Iterator

import lancedb.embeddings
import pytest


@pytest.fixture(autouse=True)
def _same_lancedb_registry_afterwards() -> Iterator[None]:
    """What a test registers in LanceDB's registry is gone after it; ours is restored for all."""
    registry = lancedb.embeddings.get_registry()
    kept = dict(registry._functions)
    yield
    registry._functions.clear()
    registry._functions.update(kept)
