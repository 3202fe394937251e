"""A server that refuses, storms, hangs or answers nonsense: a clear error, never a wrong row."""

from __future__ import annotations

import base64
import json
import threading
import time
from typing import Any

import numpy as np
import pytest
from api_server import Answer, body_of, cohere_body, make, openai_body, refusal, vector_of

from gpu_lance.embeddings import get_registry
from gpu_lance.embeddings.api_function import ApiEmbeddingFunction
from gpu_lance.errors import (
    ApiAccessError,
    ApiConnectionError,
    ApiError,
    BadInputError,
    EmbeddingError,
    MissingKeyError,
)

PROVIDERS = pytest.mark.parametrize("provider", ["openai", "cohere"])
TEXTS = [f"text {i}" for i in range(40)]


@PROVIDERS
@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_key_is_an_error_at_once_and_stops_the_others(provider, status, server, pauses):
    server.misbehave = lambda asked, number: refusal(status, "Incorrect API key")
    function = make(provider, server.url, batch_size=1, max_concurrent_requests=4)
    with pytest.raises(ApiAccessError) as caught:
        function.compute_source_embeddings(TEXTS)
    assert isinstance(caught.value, PermissionError | RuntimeError)
    assert caught.value.status_code == status
    assert f"refused the key (HTTP {status}): Incorrect API key" in str(caught.value)
    assert "API_KEY" in str(caught.value)
    assert len(server.asked) <= 8  # of 40
    assert pauses == []
    assert not [t for t in threading.enumerate() if "gpu-lance-api" in t.name]


@PROVIDERS
def test_a_storm_of_429s_ends(provider, server, pauses):
    server.misbehave = lambda asked, number: refusal(429, "slow down")
    with pytest.raises(ApiError, match="too many requests .HTTP 429.: slow down. Gave up after 3"):
        make(provider, server.url, max_retries=3).compute_source_embeddings(["a"])
    assert len(server.asked) == 4
    assert len(pauses) == 3
    server.asked.clear()
    function = make(provider, server.url, max_retries=3, batch_size=1)
    with pytest.raises(ApiError, match="HTTP 429"):
        function.compute_source_embeddings(TEXTS)
    assert len(server.asked) <= 4 * 8 + 8
    assert not [t for t in threading.enumerate() if "gpu-lance-api" in t.name]


@PROVIDERS
def test_the_time_budget_ends_retries(provider, server, monkeypatch):
    server.misbehave = lambda asked, number: Answer(
        503, {"message": "busy"}, {"retry-after": "0.2"}
    )
    function = make(provider, server.url, max_retries=100)
    assert function.retry_budget == 600
    monkeypatch.setattr(type(function), "retry_budget", 0.5)
    with pytest.raises(ApiError, match="the server failed .HTTP 503.: busy. Gave up after [012]"):
        function.compute_source_embeddings(["a"])
    assert len(server.asked) <= 3


@PROVIDERS
def test_a_wait_beyond_the_budget_is_not_begun(provider, server, pauses):
    server.misbehave = lambda asked, number: Answer(
        429, {"message": "come back tomorrow"}, {"retry-after": "86400"}
    )
    with pytest.raises(ApiError, match="come back tomorrow. Gave up after 0 retries"):
        make(provider, server.url).compute_source_embeddings(["a"])
    assert pauses == [] and len(server.asked) == 1


def test_an_account_without_money_is_no_storm(server, pauses):
    server.misbehave = lambda asked, number: refusal(
        429, "You exceeded your current quota", code="insufficient_quota"
    )
    with pytest.raises(ApiError, match="nothing left to spend.*exceeded your current quota"):
        make("openai", server.url).compute_source_embeddings(["a"])
    assert len(server.asked) == 1


@PROVIDERS
def test_a_failure_makes_all_requests_wait(provider, server, pauses):
    """After a 429 the others wait as well, so few are refused."""
    function = make(provider, server.url, batch_size=1)
    server.misbehave = lambda asked, number: (
        Answer(429, {"message": "slow down"}, {"retry-after": "30"}) if number == 1 else None
    )
    assert all(vector is not None for vector in function.compute_source_embeddings(TEXTS))
    # no time passes here, so all that begin within the 30 s ask for a wait
    assert len(pauses) > 10
    assert all(0 < wait <= 30 for wait in pauses)


@PROVIDERS
def test_a_server_that_hangs(provider, server, pauses):
    server.misbehave = lambda asked, number: server.released.wait(20) and None
    function = make(provider, server.url, timeout=0.2, max_retries=2)
    started = time.monotonic()
    with pytest.raises(ApiConnectionError, match="did not answer in time. Gave up after 2") as told:
        function.compute_source_embeddings(["a"])
    assert isinstance(told.value, ConnectionError)
    assert time.monotonic() - started < 10
    assert len(server.asked) == 3


@PROVIDERS
def test_a_server_that_hangs_once(provider, server, pauses):
    server.misbehave = lambda asked, number: (
        server.released.wait(20) and None if number == 1 else None
    )
    assert make(provider, server.url, timeout=0.3).compute_source_embeddings(["a"])[0].shape == (8,)
    assert len(server.asked) == 2


@PROVIDERS
def test_no_server(provider, pauses):
    with pytest.raises(ApiConnectionError, match="no connection to the server"):
        make(provider, "http://127.0.0.1:9", max_retries=1).compute_source_embeddings(["a"])
    assert len(pauses) == 1


def halves(provider: str) -> dict[str, Any]:
    """Answers to two texts that cannot be used as they are."""
    good = [vector_of(text, 8).tolist() for text in ("a", "b")]
    if provider == "cohere":
        bodies = {
            "fewer": cohere_body(good[:1]),
            "more": cohere_body([*good, good[0]]),
            "other": {"embeddings": {"int8": [[1] * 8] * 2}},
            "nothing": {},
            "texts": cohere_body([["x"] * 8, good[1]]),
            "nested": cohere_body([[good[0]] * 8, good[1]]),
            "lengths": cohere_body([good[0], good[1][:5]]),
        }
    else:
        whole = openai_body(good)
        twice = json.loads(json.dumps(whole))
        twice["data"][1]["index"] = 0
        beyond = json.loads(json.dumps(whole))
        beyond["data"][1]["index"] = 7
        partly = json.loads(json.dumps(whole))
        del partly["data"][1]["index"]
        bodies = {
            "fewer": openai_body(good[:1]),
            "more": openai_body([*good, good[0]]),
            "twice": twice,
            "beyond": beyond,
            "partly": partly,
            "nothing": {},
            "error": {"error": {"message": "overloaded"}},
            "no list": {"data": 3},
            "texts": openai_body([["x"] * 8, good[1]]),
            "numbers": openai_body([1.0, 2.0]),
            "no base64": openai_body(["***", "***"]),
            "odd bytes": openai_body([base64.b64encode(b"12345").decode()] * 2),
            "lengths": openai_body([good[0], good[1][:5]]),
        }
    answers = {name: Answer(body=body) for name, body in bodies.items()}
    for name, body in (("null", b"null"), ("html", b"<html>hello</html>"), ("empty", b"")):
        answers[name] = Answer(body=body)
    whole = json.dumps(openai_body(good)).encode()
    answers["cut off"] = Answer(body=whole[:50])
    answers["cut connection"] = Answer(body=whole[:50], announce=len(whole))
    return answers


@PROVIDERS
def test_half_an_answer_is_asked_for_again_and_never_a_row(provider, server, pauses):
    for name, answer in halves(provider).items():
        server.asked.clear()
        server.misbehave = lambda asked, number, answer=answer: answer if number == 1 else None
        made = make(provider, server.url).compute_query_embeddings(["a", "b"])
        start = "" if provider == "openai" else "search_query:"
        np.testing.assert_array_equal(made[0], vector_of(f"{start}a", 8), name)
        np.testing.assert_array_equal(made[1], vector_of(f"{start}b", 8), name)
        assert len(server.asked) == 2, name
        server.misbehave = lambda asked, number, answer=answer: answer
        with pytest.raises(ApiError) as caught:
            make(provider, server.url, max_retries=1).compute_source_embeddings(["a", "b"])
        assert "Gave up after 1" in str(caught.value), name


def test_vectors_in_another_order_are_put_into_theirs(server):
    def misbehave(asked, number):
        body = openai_body([vector_of(t, 8).tolist() for t in asked.texts])
        body["data"].reverse()
        return Answer(body=body)

    server.misbehave = misbehave
    made = make("openai", server.url).compute_source_embeddings(TEXTS)
    np.testing.assert_array_equal(np.stack(made), [vector_of(t, 8) for t in TEXTS])


@PROVIDERS
@pytest.mark.parametrize("fault", [None, [float("nan")] * 8, [1e300] * 8, []])
def test_one_vector_that_cannot_be_used_is_one_row(provider, fault, server):
    """It is asked for once more by itself; the others are kept."""

    def misbehave(asked, number):
        rows = [fault if t == "b" else vector_of(t, 8).tolist() for t in asked.texts]
        body = body_of(provider, rows)
        return Answer(body=body)

    server.misbehave = misbehave
    made = make(provider, server.url).compute_source_embeddings(["a", "b", "c"])
    assert made[1] is None
    np.testing.assert_array_equal(made[0], vector_of("a", 8))
    np.testing.assert_array_equal(made[2], vector_of("c", 8))
    assert [asked.texts for asked in server.asked] == [["a", "b", "c"], ["b"]]


@PROVIDERS
def test_a_wrong_dimension_names_both(provider, server, pauses):
    server.misbehave = lambda asked, number: (
        asked.body.pop("dimensions", 0) and None,
        asked.body.pop("output_dimension", 0) and None,
    )[0]
    server.dims = 11
    with pytest.raises(EmbeddingError, match="vectors of 11 numbers .*'tiny'.* column wants 8"):
        make(provider, server.url).compute_source_embeddings(TEXTS)
    assert len(server.asked) == 2 and pauses == []  # the second asks for 8


def test_a_wrong_dimension_from_a_server_that_refuses_to_change_it(server):
    server.dims = 11
    server.misbehave = lambda asked, number: (
        refusal(400, "no matryoshka") if "dimensions" in asked.body else None
    )
    with pytest.raises(EmbeddingError, match="vectors of 11 numbers .*column wants 8"):
        make("openai", server.url).compute_source_embeddings(TEXTS)


@PROVIDERS
@pytest.mark.parametrize(
    ("status", "message", "more", "most"),
    [
        (404, "model 'tiny' not found", {}, 1),
        (400, "The model `tiny` does not exist", {"code": "model_not_found"}, 1),
        (400, "model tiny is not supported by this server", {}, 1),
        (400, "dimensions must be at least 64", {"param": "dimensions"}, 1),
        (402, "payment required", {}, 1),
        (422, "extra fields are not permitted", {}, 12),
        (400, "something is wrong with every request", {}, 12),
    ],
)
def test_what_would_be_said_of_every_text_is_an_error_at_once(
    provider, status, message, more, most, server, pauses
):
    server.misbehave = lambda asked, number: refusal(status, message, **more)
    with pytest.raises(ApiError) as caught:
        make(provider, server.url).compute_source_embeddings(TEXTS)
    assert message in str(caught.value) and str(status) in str(caught.value)
    if provider == "openai" or "param" not in more:  # Cohere names no parameter
        assert len(server.asked) <= most
    assert pauses == []


def test_refusals_of_everything_after_a_good_start(server):
    """The server is asked now and then whether it still takes any text at all."""
    function = make("openai", server.url)
    function.compute_source_embeddings(["a"])
    server.misbehave = lambda asked, number: refusal(400, "maintenance")
    server.asked.clear()
    with pytest.raises(ApiError, match="refuses every text, also 'A short sentence.'.*maintenance"):
        function.compute_source_embeddings([f"text {i}" for i in range(2000)])
    assert len(server.asked) < 200


def test_most_texts_may_be_bad(server):
    server.misbehave = lambda asked, number: (
        refusal(400, "too short") if any(len(t) < 8 for t in asked.texts) else None
    )
    texts = [f"t {i}" for i in range(300)] + ["long enough"]
    made = make("openai", server.url).compute_source_embeddings(texts)
    assert [i for i, vector in enumerate(made) if vector is not None] == [300]


@PROVIDERS
def test_a_missing_key(provider, monkeypatch):
    for name in ("OPENAI_API_KEY", "COHERE_API_KEY"):
        monkeypatch.delenv(name)
    function = get_registry().get(provider).create()
    assert function.ndims() > 0
    with pytest.raises(MissingKeyError, match=f"{provider}: set the .*{provider.upper()}_API_KEY"):
        function.compute_source_embeddings(["a"])
    assert issubclass(MissingKeyError, ValueError)
    monkeypatch.setenv(f"{provider.upper()}_API_KEY", "sk-1\nHost: evil")
    with pytest.raises(MissingKeyError, match="line break") as caught:
        function.compute_source_embeddings(["a"])
    assert "evil" not in str(caught.value)


@PROVIDERS
def test_a_server_of_ones_own_may_want_no_key(provider, server, monkeypatch):
    for name in ("OPENAI_API_KEY", "COHERE_API_KEY"):
        monkeypatch.delenv(name)
    assert make(provider, server.url).compute_query_embeddings("a")[0].shape == (8,)


def test_addresses_that_are_none():
    get = get_registry().get
    for url in (
        "localhost:80",
        "ftp://host/v1",
        "https://",
        "http://host:99999",
        "",
        "https://h?a=1",
    ):
        with pytest.raises(ValueError, match="base_url"):
            get("openai").create(base_url=url)
    with pytest.raises(ValueError, match="user or a password") as caught:
        get("cohere").create(base_url="https://me:hunter22@host/v1")
    assert "hunter22" not in str(caught.value)


def test_azure(server, monkeypatch):
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", "azure-key-123")
    monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", server.url)
    create = get_registry().get("openai").create
    function = create(name="deployed", dim=8, use_azure=True)
    with pytest.raises(BadInputError, match="cannot be set up: .*OPENAI_API_VERSION"):
        function.compute_query_embeddings("a")
    monkeypatch.setenv("OPENAI_API_VERSION", "2024-06-01")
    assert function.compute_query_embeddings("a")[0].shape == (8,)
    assert "/openai/deployments/deployed/embeddings?api-version=2024-06-01" in server.asked[-1].path
    headers = {name.lower(): value for name, value in server.asked[-1].headers.items()}
    assert headers["api-key"] == "azure-key-123"
    monkeypatch.delenv("AZURE_OPENAI_API_KEY")
    for token in ("first", "second"):  # they last an hour
        monkeypatch.setenv("AZURE_OPENAI_AD_TOKEN", token)
        function.compute_query_embeddings(["text"])
        headers = {name.lower(): value for name, value in server.asked[-1].headers.items()}
        assert headers["authorization"] == f"Bearer {token}"


def test_the_base_says_what_a_provider_lacks():
    with pytest.raises(TypeError, match="abstract"):
        ApiEmbeddingFunction(name="m")
