"""A server for each test of the providers over HTTP, and nothing of the machine that runs it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from api_server import KEY, ApiServer

from gpu_lance.embeddings import retries
from gpu_lance.embeddings.api_connection import CONNECTIONS, _named


@pytest.fixture
def server() -> Iterator[ApiServer]:
    running = ApiServer()
    yield running
    CONNECTIONS.clear()
    running.close()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits that were asked for; none takes any time."""
    asked: list[float] = []
    monkeypatch.setattr(retries, "pause", asked.append)
    return asked


@pytest.fixture(autouse=True)
def _only_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The key of each test, no proxy, and no setting of the machine that runs it."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "OPENAI_BASE_URL", "CO_API_URL"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "CO_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("COHERE_API_KEY", KEY)
    before = set(_named)
    yield
    _named.clear()
    _named.update(before)
    CONNECTIONS.clear()
