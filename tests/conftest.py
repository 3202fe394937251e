"""Which tests run, and how hypothesis picks its examples."""

from __future__ import annotations

import re

import pytest
from hypothesis import settings

# The same examples in every run: a failure is repeated by running the test again, and a slow
# machine fails nothing.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


# last, so that torch is loaded only if a test that wants a GPU was selected
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip `soak` tests unless -m names them, and `gpu` tests where no CUDA device computes."""
    asked = re.search(r"\bsoak\b", config.getoption("markexpr")) is not None
    long = pytest.mark.skip(reason="a long test; run it with: make soak")
    for item in items:
        if not asked and item.get_closest_marker("soak"):
            item.add_marker(long)
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if wanting and (reason := why_no_cuda()) is not None:
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason=reason))


def why_no_cuda() -> str | None:
    """The reason why no CUDA device can be used; None if one computes."""
    from gpu_lance.device import resolve_device
    from gpu_lance.errors import DeviceError, MissingExtraError

    try:
        resolve_device("cuda")
    except (DeviceError, MissingExtraError) as error:
        return str(error)
    return None
