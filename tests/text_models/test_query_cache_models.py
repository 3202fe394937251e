"""Remembered queries of models that change on disk, and of equal models under other arguments."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_lance.embeddings import calls, get_registry, query_cache
from gpu_lance.embeddings.query_cache import QUERIES
from gpu_lance.types import Side

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    QUERIES.clear()
    yield
    QUERIES.clear()


def ask(function: Any, *texts: str) -> torch.Tensor:
    ndims = function.ndims()
    made = query_cache.embed(function, texts, ndims=ndims, device=CPU)
    plain = calls.embed(function, texts, Side.QUERY, ndims=ndims, device=CPU)
    torch.testing.assert_close(made.vectors, plain.vectors, atol=1e-5, rtol=0)
    return made.vectors


def test_a_model_that_is_saved_anew(checkpoints: Any, tmp_path: Path) -> None:
    create = get_registry().get("sentence-transformers").create
    folder = tmp_path / "model"
    shutil.copytree(checkpoints.sentence(), folder)
    function = create(name=str(folder), device="cpu")
    before = ask(function, "fox", "dog")
    assert len(QUERIES) == 2
    assert torch.equal(ask(function, "fox", "dog"), before)
    assert len(QUERIES) == 2
    shutil.rmtree(folder)
    shutil.copytree(checkpoints.sentence(seed=1), folder)
    after = ask(function, "fox", "dog")
    assert (before - after).abs().max() > 0.01
    assert torch.equal(ask(create(name=str(folder), device="cpu"), "fox", "dog"), after)


def test_what_decides_a_vector_is_told_apart(checkpoints: Any) -> None:
    create = get_registry().get("sentence-transformers").create
    name = str(checkpoints.sentence())
    ask(create(name=name, device="cpu"), "fox")
    assert len(QUERIES) == 1
    for arguments in (
        {"normalize": False},
        {"truncate_dim": 8},
        {"prompts": {"query": "find: "}},
        {"dtype": "bfloat16"},
    ):
        before = len(QUERIES)
        ask(create(name=name, device="cpu", **arguments), "fox")
        assert len(QUERIES) == before + 1, arguments
