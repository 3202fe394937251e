"""What the tests in tests/ and the examples in gpu_lance/ and docs/ share.

It stands at the top since the examples in docstrings need it too; tests/conftest.py has the rest.
"""

from __future__ import annotations

import os
import random
import sys

# Read when huggingface_hub is imported, so it is set before anything can import it. Whoever wants
# to test against the hub sets it to 0.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest

SEED = 20_261


@pytest.fixture(autouse=True)
def _fixed_seeds():
    """Every test starts from the same random state, whichever ran before it."""
    random.seed(SEED)
    np.random.seed(SEED)
    # not imported for this: most tests need no torch
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def _same_registry_afterwards():
    """What a test registers or sets in the registry of the process is gone after it."""
    name = "gpu_lance.embeddings.registry"
    before = sys.modules.get(name)
    functions = dict(before.get_registry()._functions) if before else {}
    values = dict(before.VARIABLES._values) if before else {}
    yield
    if (after := sys.modules.get(name)) is not None:
        registry = after.get_registry()
        with registry._lock:
            registry._functions = functions
        with after.VARIABLES._lock:
            after.VARIABLES._values = values
