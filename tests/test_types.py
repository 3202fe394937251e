"""The small types that the layers share: names are parsed, shapes are checked."""

from __future__ import annotations

import dataclasses
import inspect

import numpy as np
import pytest

from gpu_lance import errors
from gpu_lance.errors import BadInputError, GpuLanceError, QueryError
from gpu_lance.types import AddResult, Embeddings, Metric, Modality, OnBadVectors, Side

torch = pytest.importorskip("torch")


@pytest.mark.parametrize(
    ("given", "metric"),
    [
        ("l2", Metric.L2),
        ("L2", Metric.L2),
        ("euclidean", Metric.L2),
        ("Cosine", Metric.COSINE),
        (Metric.COSINE, Metric.COSINE),
        ("dot", Metric.DOT),
        ("ip", Metric.DOT),
        ("inner_product", Metric.DOT),
    ],
)
def test_a_metric_by_name(given: str, metric: Metric):
    assert Metric.parse(given) is metric


@pytest.mark.parametrize("given", ["hamming", "", "l 2", None, 3])
def test_another_metric_is_an_error_that_lists_them(given: object):
    with pytest.raises(QueryError) as caught:
        Metric.parse(given)
    assert str(caught.value) == (
        f"Unknown distance type {given!r}; it is one of 'l2', 'cosine', 'dot'."
    )
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name", ["error", "drop", "fill", "null"])
def test_on_bad_vectors_by_name(name: str):
    member = OnBadVectors.parse(name)
    assert member == name
    assert OnBadVectors.parse(member) is member


@pytest.mark.parametrize("given", ["ignore", "Drop", "", None])
def test_another_one_is_an_error_that_lists_them(given: object):
    wanted = f"on_bad_vectors is {given!r}; it must be one of 'error', 'drop', 'fill', 'null'."
    with pytest.raises(BadInputError) as caught:
        OnBadVectors.parse(given)
    assert str(caught.value) == wanted


def test_members_are_their_names():
    assert [str(one) for one in Modality] == ["text", "image", "audio", "video"]
    assert [str(one) for one in Side] == ["source", "query"]


@pytest.mark.parametrize("n", [0, 1, 63])
def test_embeddings_have_one_validity_a_row(n: int):
    found = Embeddings(torch.zeros(n, 4), np.ones(n, bool))
    assert len(found) == n
    assert found.errors == {}


@pytest.mark.parametrize(
    ("vectors", "valid", "got"),
    [
        ((3, 4), (2,), r"got \(3, 4\) and \(2,\)"),
        ((3,), (3,), r"got \(3,\) and \(3,\)"),
        ((3, 4, 5), (3,), r"got \(3, 4, 5\) and \(3,\)"),
        ((3, 4), (3, 1), r"got \(3, 4\) and \(3, 1\)"),
    ],
)
def test_other_shapes_are_refused(vectors: tuple[int, ...], valid: tuple[int, ...], got: str):
    with pytest.raises(ValueError, match=got):
        Embeddings(torch.zeros(vectors), np.ones(valid, bool))


def test_results_are_values():
    assert AddResult(3) == AddResult(version=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        AddResult(3).version = 4


ERRORS = [
    one
    for _, one in inspect.getmembers(errors, inspect.isclass)
    if one.__module__ == errors.__name__ and one is not GpuLanceError
]


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_is_ours_and_a_built_in_one(error: type[Exception]):
    assert issubclass(error, GpuLanceError)
    built_in = [one for one in error.__mro__ if one.__module__ == "builtins"]
    assert set(built_in) > {BaseException, Exception, object}
    assert str(error("said 'so'")) == "said 'so'"  # no repr, which KeyError would print
    assert error.__doc__
