"""A server that means harm, or is broken in ways that no client expects."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
from api_server import Answer, body_of, make, openai_body, refusal, vector_of

from gpu_lance.embeddings import api_http, get_registry
from gpu_lance.errors import ApiConnectionError, ApiError

PROVIDERS = pytest.mark.parametrize("provider", ["openai", "cohere"])
TEXTS = [f"text {i}" for i in range(40)]


@PROVIDERS
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(provider, status, server, pauses):
    """The other server would get the texts, and headers with secrets."""
    get_registry().set_var("header", "header-secret-9876543210")
    more = {"default_headers": {"X-Token": "$var:header"}} if provider == "openai" else {}
    elsewhere = server.url.replace("127.0.0.1", "localhost") + "/elsewhere"
    server.misbehave = lambda asked, number: Answer(status, {}, headers={"Location": elsewhere})
    with pytest.raises(ApiError, match=f"redirects to {elsewhere}.*base_url .HTTP {status}"):
        make(provider, server.url, **more).compute_source_embeddings(TEXTS)
    assert [asked.path for asked in server.asked if "elsewhere" in asked.path] == []
    assert len(server.asked) == 1 and pauses == []


@PROVIDERS
def test_an_answer_in_drops_is_bounded_in_all(provider, server, pauses, monkeypatch):
    """Each byte comes in time, and yet the whole never does."""
    server.misbehave = lambda asked, number: Answer(body=b"[" * 10_000, drip=0.02)
    function = make(provider, server.url, timeout=5)
    monkeypatch.setattr(type(function), "retry_budget", 0.5)
    started = time.monotonic()
    with pytest.raises(ApiConnectionError, match="did not answer in time"):
        function.compute_query_embeddings(["a"])
    assert 0.4 < time.monotonic() - started < 5
    assert len(server.asked) == 1


@PROVIDERS
def test_an_answer_without_end_is_bounded_in_size(provider, server, pauses, monkeypatch):
    monkeypatch.setattr(api_http, "MOST_BYTES", 100_000)
    server.misbehave = lambda asked, number: Answer(body=b"[" * 10_000_000)
    with pytest.raises(ApiError, match="AnswerTooLarge: more than 100,000 bytes"):
        make(provider, server.url).compute_query_embeddings(["a"])
    assert len(server.asked) == 1 and pauses == []


@PROVIDERS
@pytest.mark.parametrize("value", ["1.5", "1_0", True, [1.0], {"a": 1}])
def test_what_is_no_number_is_never_read_as_one(provider, value, server, pauses):
    server.misbehave = lambda asked, number: Answer(
        body=body_of(provider, [[value] * 8 for _ in asked.texts])
    )
    with pytest.raises(ApiError, match="something other than numbers"):
        make(provider, server.url, max_retries=0).compute_source_embeddings(["a", "b"])


def test_a_null_among_numbers_is_not_a_number(server):
    """JSON has no NaN."""

    def misbehave(asked, number):
        rows = [vector_of(text, 8).tolist() for text in asked.texts]
        for text, row in zip(asked.texts, rows, strict=True):
            row[3] = None if text == "b" else row[3]
        return Answer(body=openai_body(rows))

    server.misbehave = misbehave
    made = make("openai", server.url).compute_source_embeddings(["a", "b"])
    np.testing.assert_array_equal(made[0], vector_of("a", 8))
    assert made[1] is None


def test_base64_in_other_letters_is_half_an_answer(server, pauses):
    server.misbehave = lambda asked, number: Answer(body=openai_body(["é漢" for _ in asked.texts]))
    with pytest.raises(ApiError, match="no base64") as caught:
        make("openai", server.url, max_retries=1).compute_source_embeddings(["a"])
    assert caught.value.__context__ is None


@PROVIDERS
def test_a_refusal_without_bottom_is_a_refusal(provider, server):
    nested: Any = "too deep"
    for _ in range(400):
        nested = [nested]
    for body in (nested, {"error": {"message": nested}}, json.dumps(nested).encode()):
        server.misbehave = lambda asked, number, body=body: (
            Answer(400, body) if "bad" in asked.texts else None
        )
        made = make(provider, server.url).compute_source_embeddings(["good", "bad"])
        assert made[0] is not None and made[1] is None


@PROVIDERS
def test_a_broken_compression_is_tried_again(provider, server, pauses):
    server.misbehave = lambda asked, number: (
        Answer(body=b"garbage", headers={"Content-Encoding": "gzip"}) if number == 1 else None
    )
    assert make(provider, server.url).compute_query_embeddings(["a"])[0].shape == (8,)
    assert len(server.asked) == 2 and len(pauses) == 1


def test_a_header_that_cannot_be_sent_is_not_tried_again(server, pauses):
    get_registry().set_var("header", "header-secret\nHost: evil")
    function = make("openai", server.url, default_headers={"X-Token": "$var:header"})
    with pytest.raises(ApiError, match="the request failed") as caught:
        function.compute_query_embeddings(["a"])
    assert "evil" not in str(caught.value)
    assert pauses == [] and server.asked == []


@PROVIDERS
@pytest.mark.parametrize("count", [1, 2, 40])
def test_a_server_that_has_begun_to_refuse_every_text(provider, count, server):
    """Its refusals are not the fault of the texts, however few they are."""
    function = make(provider, server.url)
    function.compute_source_embeddings(["a"])
    server.misbehave = lambda asked, number: refusal(400, "maintenance")
    with pytest.raises(ApiError, match="refuses every text, also 'A short sentence.'.*maintenance"):
        function.compute_source_embeddings(TEXTS[:count])
    server.misbehave = lambda asked, number: (
        refusal(400, "no") if "A short sentence." not in asked.texts else None
    )
    assert function.compute_source_embeddings(TEXTS[:count]) == [None] * count


@PROVIDERS
def test_a_text_may_name_the_model_in_its_refusal(provider, server):
    """A model that gave vectors is not unknown."""
    function = make(provider, server.url)
    function.compute_source_embeddings(["good"])
    server.misbehave = lambda asked, number: (
        refusal(400, "this language is not supported by tiny") if "bad" in asked.texts else None
    )
    made = function.compute_source_embeddings(["good", "bad"])
    assert made[0] is not None and made[1] is None


def test_an_error_does_not_wait_for_requests_that_hang(server):
    server.misbehave = lambda asked, number: (
        refusal(401, "no") if "text 3" in asked.texts else server.released.wait(60) and None
    )
    function = make("openai", server.url, batch_size=1, timeout=50)
    started = time.monotonic()
    with pytest.raises(ApiError, match="refused the key"):
        function.compute_source_embeddings(TEXTS)
    assert time.monotonic() - started < 20
    server.released.set()
    for thread in threading.enumerate():
        if "gpu-lance-api" in thread.name:
            thread.join(20)
            assert not thread.is_alive()


@pytest.mark.skipif(sys.platform == "win32", reason="there a process cannot be sent Ctrl-C")
@pytest.mark.parametrize("way", ["hangs", "is busy"])
def test_ctrl_c_ends_the_process(way, server):
    """While many requests are under way, or all wait for the next try."""
    busy = Answer(429, {"message": "slow down"}, {"retry-after": "50"})
    server.misbehave = lambda asked, number: (
        busy if way == "is busy" else server.released.wait(60) and None
    )
    code = (
        "from gpu_lance.embeddings import get_registry\n"
        f"url = '{server.url}/v1'\n"
        "make = get_registry().get('openai').create\n"
        "f = make(name='m', dim=8, base_url=url, timeout=50, batch_size=1)\n"
        "f.compute_source_embeddings(['a'] * 40)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as child:
        wanted = 1 if way == "is busy" else 8
        while len(server.asked) < wanted and child.poll() is None:
            server.released.wait(0.02)
        child.send_signal(signal.SIGINT)
        started = time.monotonic()
        said = child.communicate(timeout=100)[1]
    assert "KeyboardInterrupt" in said
    assert time.monotonic() - started < 25
