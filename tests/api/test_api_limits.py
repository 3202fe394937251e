"""How many requests at once and how fast, counted where they arrive; and one client for all."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from api_server import make

from gpu_lance.embeddings import get_registry, retries
from gpu_lance.embeddings.api_answers import BadAnswer, WrongLength, in_order, to_matrix
from gpu_lance.embeddings.api_calls import count_tokens, divide
from gpu_lance.embeddings.api_connection import CONNECTIONS, KEPT
from gpu_lance.embeddings.throttle import Stopped, Throttle

TEXTS = [f"text {i}" for i in range(40)]


@pytest.mark.parametrize("provider", ["openai", "cohere"])
@pytest.mark.parametrize("most", [1, 3])
def test_no_more_requests_at_once_than_allowed(provider, most, server):
    """Also when several threads and several functions of the same arguments ask."""
    gate = threading.Barrier(most)

    # so many are under way at once, or this fails
    server.misbehave = lambda asked, number: gate.wait(10) and None
    functions = [
        make(provider, server.url, batch_size=1, max_concurrent_requests=most) for _ in range(2)
    ]
    made: list[Any] = []
    threads = [
        threading.Thread(target=lambda f=f: made.extend(f.compute_source_embeddings(TEXTS[:15])))
        for f in functions
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(made) == 30 and all(vector is not None for vector in made)
    assert server.most_under_way == most


def test_the_rate_holds_at_the_server(server):
    function = make("openai", server.url, batch_size=1, requests_per_minute=1200)
    function.compute_source_embeddings(TEXTS[:21])
    times = sorted(asked.at for asked in server.asked)
    assert times[-1] - times[0] >= 20 * 0.05 - 0.04
    # no moment holds more than its share
    for first, last in zip(times, times[10:], strict=False):
        assert last - first >= 10 * 0.05 - 0.1


def test_tokens_have_a_rate_too(server):
    texts = ["word " * 60] * 8
    tokens = count_tokens(texts[0])
    function = make("cohere", server.url, batch_size=2, tokens_per_minute=tokens * 60 * 10)
    function.compute_source_embeddings(texts)
    times = sorted(asked.at for asked in server.asked)
    assert len(times) == 4
    assert times[-1] - times[0] >= 3 * 0.2 - 0.05


class Clock:
    """Time that passes only in pauses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.paused: list[float] = []
        monkeypatch.setattr(retries, "pause", self.pause)

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.paused.append(seconds)
        self.now += seconds


def test_requests_are_spaced(monkeypatch):
    clock = Clock(monkeypatch)
    throttle = Throttle(4, requests_per_minute=60, tokens_per_minute=600, clock=clock)
    stop = threading.Event()
    begun = []
    for tokens in (1, 1, 50, 1, 1):
        with throttle.turn(tokens, stop):
            begun.append(clock.now - 100)
    assert begun == [0, 1, 2, 7, 8]
    clock.now += 1000  # what was not used is not saved up
    for _ in range(2):
        with throttle.turn(1, stop):
            begun.append(clock.now - 1100)
    assert begun[-1] - begun[-2] == 1


def test_a_hold_is_for_all_and_halves_what_is_under_way(monkeypatch):
    clock = Clock(monkeypatch)
    throttle = Throttle(8, clock=clock)
    stop = threading.Event()
    throttle.hold(30)
    throttle.hold(20)  # the same refusal, seen by another
    with throttle.turn(1, stop):
        assert clock.now == 130
    assert throttle._allowed == 4
    for _ in range(30):
        throttle.succeeded()
    assert throttle._allowed == pytest.approx(8, abs=0.5)
    throttle.hold(30)
    stop.set()
    with pytest.raises(Stopped), throttle.turn(1, stop):
        pass
    assert throttle.under_way == 0


def test_one_client_for_equal_arguments(server):
    first = make("openai", server.url)
    first.compute_query_embeddings("a")
    (connection,) = CONNECTIONS._kept.values()
    for other in (first.model_copy(), make("openai", server.url, timeout=5.0, max_retries=1)):
        other.compute_query_embeddings("b")
    assert list(CONNECTIONS._kept.values()) == [connection]
    make("openai", server.url, max_concurrent_requests=2).compute_query_embeddings("a")
    get_registry().set_var("other", "another-key")
    make("openai", server.url, api_key="$var:other").compute_query_embeddings("a")
    assert len(CONNECTIONS) == 3
    client = connection.client
    CONNECTIONS.clear()
    assert client.is_closed()


def test_many_keys_do_not_pile_up(server):
    for number in range(KEPT + 5):
        get_registry().set_var("k", f"key-{number:05}")
        make("cohere", server.url, api_key="$var:k").compute_query_embeddings("a")
    assert len(CONNECTIONS) == KEPT


FORKS = """
import os, sys
from gpu_lance.embeddings import get_registry
from gpu_lance.embeddings.api_connection import CONNECTIONS
f = get_registry().get("cohere").create(name="tiny", dim=8, base_url=sys.argv[1])
f.compute_query_embeddings("before")
child = os.fork()
if child == 0:
    there = len(CONNECTIONS)
    os._exit(0 if len(f.compute_query_embeddings("in the child")[0]) == 8 and not there else 1)
assert os.waitpid(child, 0)[1] == 0
assert len(f.compute_query_embeddings("after")[0]) == 8 and len(CONNECTIONS) == 1
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_makes_its_own_client(server):
    done = subprocess.run(
        [sys.executable, "-c", FORKS, server.url], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert server.texts == ["before", "in the child", "after"]


def test_estimates_of_tokens_are_rather_high():
    # counted with cl100k_base
    counted = {
        "The quick brown fox jumps over the lazy dog.": 10,
        "Der Übersetzungsdienst prüft Größenangaben.": 14,
        "Съешь ещё этих мягких французских булок": 20,
        "我能吞下玻璃而不伤身体。": 16,
        "😀😀😀": 6,
    }
    for text, tokens in counted.items():
        assert tokens <= count_tokens(text) <= 4 * tokens, text


@pytest.mark.parametrize(
    ("costs", "limits", "parts"),
    [
        ([], {}, []),
        ([1], {}, [(0, 1)]),
        ([1] * 5, {"most": 2}, [(0, 2), (2, 4), (4, 5)]),
        ([4, 4, 4], {"tokens": 8}, [(0, 2), (2, 3)]),
        ([9, 9], {"tokens": 8}, [(0, 1), (1, 2)]),
        ([9, 1, 9], {"item_tokens": 8}, [(0, 1), (1, 2), (2, 3)]),
        ([1] * 1000, {"at_once": 4}, [(0, 256), (256, 512), (512, 768), (768, 1000)]),
        ([1] * 1000, {"at_once": 2}, [(0, 500), (500, 1000)]),
    ],
)
def test_divide(costs, limits, parts):
    limits = {"most": 2048, "tokens": 10**6, "item_tokens": None, "at_once": 8, **limits}
    assert divide(costs, **limits) == parts


def test_the_same_numbers_from_lists_and_base64():
    matrix = np.random.default_rng(0).standard_normal((5, 7)).astype("<f4")
    rows: list[Callable[[np.ndarray], Any]] = [
        lambda row: row.tolist(),
        lambda row: base64.b64encode(row.tobytes()).decode(),
    ]
    for form in rows:
        made, bad = to_matrix([form(row) for row in matrix], 5, 7)
        np.testing.assert_array_equal(made, matrix)
        assert made.dtype == np.float32 and bad == {}


def test_answers_that_are_refused():
    with pytest.raises(WrongLength) as caught:
        to_matrix([[1.0, 2.0], [3.0, 4.0]], 2, 3)
    assert caught.value.got == 2
    for rows in (
        [[1.0]] * 3,
        "abc",
        [[1.0], [1.0, 2.0]],
        [["x"], ["y"]],
        [[[1.0]], [1.0]],
        [{}, {}],
    ):
        with pytest.raises(BadAnswer):
            to_matrix(rows, 2, 1)
    for found in (
        None,
        [1, 2],
        [{"index": 0}],
        [{"index": True}, {"index": 0}],
        [{"index": 1}] * 2,
    ):
        with pytest.raises(BadAnswer):
            in_order(found, 2)
    made, bad = to_matrix([[1.0], [None], [float("inf")], []], 4, 1)
    assert sorted(bad) == [1, 2, 3] and made[0] == 1


def test_a_wait_ends_when_the_work_is_given_up():
    stop = threading.Event()
    threading.Timer(0.1, stop.set).start()
    started = time.monotonic()
    with retries.interruptible(stop):
        retries.pause(30)
    assert time.monotonic() - started < 10
