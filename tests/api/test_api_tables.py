"""Tables whose vectors a server makes: complete, in order, and one bad text is one bad row."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from api_server import Answer, make, refusal, vector_of

import gpu_lance
from gpu_lance.embeddings import get_registry
from gpu_lance.errors import BadInputError
from gpu_lance.pydantic import LanceModel, Vector


def table_of(function: Any, folder: Path) -> Any:
    class Doc(LanceModel):
        id: int
        text: str | None = function.SourceField()
        vector: Vector(function.ndims()) = function.VectorField()

    return gpu_lance.connect(folder, device="cpu").create_table("docs", schema=Doc)


def wanted(provider: str, texts: list[str], side: str = "document") -> np.ndarray:
    start = "" if provider == "openai" else f"search_{side}:"
    return np.stack([vector_of(start + text, 8) for text in texts])


@pytest.mark.parametrize("provider", ["openai", "cohere"])
def test_thousands_of_texts_from_a_server_that_fails_now_and_then(
    provider, server, pauses, tmp_path
):
    """10 % of the requests are too many and 1 % fail: every text arrives once, in its place."""
    random_ = random.Random(1)
    told: list[int] = []

    def misbehave(asked, number):
        chance = random_.random()
        if chance < 0.10:
            told.append(429)
            return (
                refusal(429, "slow down")
                if number % 2
                else Answer(429, {"message": "slow down"}, {"Retry-After": "2"})
            )
        if chance < 0.11 or number == 5:
            told.append(500)
            return Answer(500, b"<html>oops</html>")
        return None

    server.misbehave = misbehave
    # small requests, so that many of them fail
    table = table_of(make(provider, server.url, batch_size=20), tmp_path)
    texts = [f"text number {i}" + " word" * (i % 7) for i in range(5000)]
    table.add([{"id": i, "text": text} for i, text in enumerate(texts)])
    rows = table.to_arrow().sort_by("id")
    assert rows["id"].to_pylist() == list(range(5000))
    vectors = np.stack(rows["vector"].combine_chunks().to_numpy(zero_copy_only=False))
    np.testing.assert_array_equal(vectors, wanted(provider, texts))
    assert told.count(429) > 15
    assert 500 in told
    assert len(pauses) >= 5
    assert any(1.5 < wait <= 2 for wait in pauses)  # what Retry-After asked for
    assert len(server.asked) == 250 + len(told)
    found = table.search(texts[17]).limit(1).to_list()
    assert len(found) == 1
    if provider == "openai":
        assert found[0]["id"] == 17 and found[0]["_distance"] == 0
    else:
        assert server.asked[-1].body["input_type"] == "search_query"


@pytest.mark.parametrize("provider", ["openai", "cohere"])
@pytest.mark.parametrize("status", [400, 413, 422])
def test_one_poisonous_text_is_one_row(provider, status, server, tmp_path):
    def misbehave(asked, number):
        if any("poison" in text for text in asked.texts):
            return refusal(status, "this text holds something forbidden")
        return None

    server.misbehave = misbehave
    texts = [f"text {i}" for i in range(200)]
    texts[137] = "poison"
    rows = [{"id": i, "text": text} for i, text in enumerate(texts)]
    table = table_of(make(provider, server.url), tmp_path)

    with pytest.raises(BadInputError) as caught:
        table.add(rows)
    said = f"Row 137, column 'text' cannot be embedded: the server refused it (HTTP {status}): "
    assert str(caught.value).startswith(said + "this text holds something forbidden")
    assert table.count_rows() == 0

    before = len(server.asked)
    table.add(rows, on_bad_vectors="null")
    assert len(server.asked) - before < 2 + 2 * 8 + 2
    stored = table.to_arrow().sort_by("id")
    assert [i for i, vector in enumerate(stored["vector"].to_pylist()) if vector is None] == [137]
    good = [text for text in texts if text != "poison"]
    vectors = [vector for vector in stored["vector"].to_pylist() if vector is not None]
    np.testing.assert_array_equal(np.float32(vectors), wanted(provider, good))

    table.add(rows, on_bad_vectors="drop")
    assert table.count_rows() == 200 + 199
    assert table.count_rows("text = 'poison'") == 1


def test_several_poisonous_texts_in_several_requests(server):
    server.misbehave = lambda asked, number: (
        refusal(400, f"no {asked.texts[0]}")
        if any(text.startswith("bad") for text in asked.texts)
        else None
    )
    bad = {0, 1, 2, 50, 98, 99}
    texts = [f"bad {i}" if i in bad else f"good {i}" for i in range(100)]
    made = make("openai", server.url, batch_size=10).compute_source_embeddings(texts)
    assert {i for i, vector in enumerate(made) if vector is None} == bad
    for i in set(range(100)) - bad:
        np.testing.assert_array_equal(made[i], vector_of(texts[i], 8))


@pytest.mark.parametrize("provider", ["openai", "cohere"])
def test_null_and_empty_texts_have_no_vector(provider, server, tmp_path):
    table = table_of(make(provider, server.url), tmp_path)
    texts = ["one", None, "", "two"]
    table.add([{"id": i, "text": text} for i, text in enumerate(texts)])
    vectors = table.to_arrow().sort_by("id")["vector"].to_pylist()
    assert [vector is None for vector in vectors] == [False, True, True, False]
    np.testing.assert_array_equal(
        np.float32([vectors[0], vectors[3]]), wanted(provider, ["one", "two"])
    )
    assert server.texts == ["one", "two"]
    assert make(provider, server.url).compute_source_embeddings([None, ""]) == [None, None]
    assert len(server.asked) == 1


def test_texts_that_are_none_are_bad_rows(server):
    function = make("openai", server.url)
    made = function.compute_source_embeddings(["fine", 3, "\ud800"])
    assert [vector is None for vector in made] == [False, True, True]
    assert server.texts == ["fine"]


def test_a_text_of_100_000_letters_goes_alone(server):
    """Whatever the server says of it: here that it is too long."""
    long = "word " * 20_000
    server.misbehave = lambda asked, number: (
        refusal(400, "maximum context length is 8192 tokens", param="input")
        if long in asked.texts
        else None
    )
    made = make("openai", server.url).compute_source_embeddings(["a", long, "b"])
    assert [vector is None for vector in made] == [False, True, False]
    assert sorted(map(tuple, (asked.texts for asked in server.asked))) == sorted(
        [("a",), (long,), ("b",)]
    )


def test_a_server_that_takes_fewer_texts_is_learned_once(server):
    server.misbehave = lambda asked, number: (
        refusal(413, "batch size is at most 32") if len(asked.texts) > 32 else None
    )
    function = make("openai", server.url, max_concurrent_requests=1)
    texts = [f"text {i}" for i in range(300)]
    made = function.compute_source_embeddings(texts)
    np.testing.assert_array_equal(np.stack(made), wanted("openai", texts))
    refused = sum(len(asked.texts) > 32 for asked in server.asked)
    function.compute_source_embeddings(texts)
    assert sum(len(asked.texts) > 32 for asked in server.asked) == refused
    assert 0 < refused < 20


def test_limits_of_a_request(server):
    function = make("cohere", server.url)
    texts = [f"text {i}" for i in range(500)]
    function.compute_source_embeddings(texts)
    assert sorted(len(asked.texts) for asked in server.asked) == [20, 96, 96, 96, 96, 96]
    server.asked.clear()
    function = make("openai", server.url)
    function.compute_source_embeddings([f"{i} " + "long " * 1000 for i in range(300)])
    assert len(server.asked) >= 2
    # about 1,000 tokens each, and 300,000 are allowed
    assert max(len(asked.texts) for asked in server.asked) < 300
    server.asked.clear()
    function = make("openai", server.url, max_concurrent_requests=1)
    function.compute_source_embeddings([str(i) for i in range(5000)])
    assert [len(asked.texts) for asked in server.asked] == [2048, 2048, 904]


def test_a_query_is_one_request_in_this_thread(server, tmp_path):
    table = table_of(make("openai", server.url), tmp_path)
    table.add([{"id": 1, "text": "one"}])
    server.asked.clear()
    before = threading.active_count()
    seen: list[int] = []
    server.misbehave = lambda asked, number: seen.append(
        sum("gpu-lance-api" in thread.name for thread in threading.enumerate())
    )
    assert table.search("one").limit(1).to_list()[0]["_distance"] == 0
    assert len(server.asked) == 1 and seen == [0]
    assert threading.active_count() <= before + 1


def test_a_query_that_the_server_refuses(server):
    server.misbehave = lambda asked, number: (
        refusal(400, "too long") if "bad" in asked.texts else None
    )
    with pytest.raises(BadInputError, match=r"Query 0 cannot be .*HTTP 400.: too long"):
        make("openai", server.url).compute_query_embeddings("bad")


def test_cohere_is_told_the_side(server):
    function = make("cohere", server.url, source_input_type="clustering")
    function.compute_source_embeddings(["a"])
    function.compute_query_embeddings("a")
    function.generate_embeddings(["a"], input_type="classification")
    kinds = [asked.body["input_type"] for asked in server.asked]
    assert kinds == ["clustering", "search_query", "classification"]
    assert {asked.body["model"] for asked in server.asked} == {"tiny"}
    assert all(asked.body["embedding_types"] == ["float"] for asked in server.asked)


def test_the_length_of_vectors(server):
    get = get_registry().get
    openai, cohere = get("openai"), get("cohere")
    assert [openai.create(name=name).ndims() for name in openai.model_names()] == [1536, 1536, 3072]
    assert cohere.create().ndims() == 1024
    assert cohere.create(name="embed-v4.0", dim=256).ndims() == 256
    assert cohere.create(name="embed-multilingual-v2.0").ndims() == 768
    with pytest.raises(BadInputError, match=r"'my-model' is not known here: pass it"):
        openai.create(name="my-model").ndims()
    with pytest.raises(BadInputError, match=r"1536 numbers, and dim is 100.*-3-small"):
        openai.create(dim=100).ndims()
    for name, dim, sent in [
        ("text-embedding-3-small", 100, 100),
        ("text-embedding-3-small", None, None),
        ("mine", 8, None),
    ]:
        server.dims = dim or 1536
        function = openai.create(name=name, dim=dim, base_url=f"{server.url}/v1")
        assert function.compute_query_embeddings("a")[0].shape == (function.ndims(),)
        assert server.asked[-1].body.get("dimensions") == sent


def test_a_model_of_ones_own_is_asked_for_the_length_if_its_own_differs(server):
    function = get_registry().get("openai").create(name="mine", dim=5, base_url=f"{server.url}/v1")
    assert function.compute_query_embeddings("a")[0].shape == (5,)
    function.compute_query_embeddings("b")
    assert [asked.body.get("dimensions") for asked in server.asked] == [None, 5, 5]


def test_a_server_without_base64(server):
    server.lists = True  # ignores the wish
    made = make("openai", server.url).compute_source_embeddings(["a"])
    np.testing.assert_array_equal(made[0], vector_of("a", 8))
    server.misbehave = lambda asked, number: (
        refusal(400, "unknown encoding_format") if "base64" in str(asked.body) else None
    )
    function = make("openai", server.url)
    for text in ("b", "c"):
        made = function.compute_source_embeddings([text])
        np.testing.assert_array_equal(made[0], vector_of(text, 8))
    formats = [asked.body["encoding_format"] for asked in server.asked]
    assert formats == ["base64", "base64", "float", "float"]
