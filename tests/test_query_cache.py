"""Queries that are asked again are not embedded again, and never answered with a stale vector."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import gpu_lance
from gpu_lance.embeddings import EmbeddingFunctionConfig, TextEmbeddingFunction, get_registry
from gpu_lance.embeddings import query_cache as module
from gpu_lance.embeddings.query_cache import QUERIES, QueryCache
from gpu_lance.embeddings.staged import StagedFunction
from gpu_lance.errors import BadInputError
from gpu_lance.types import Embeddings, Side

CPU = torch.device("cpu")


class Letters(TextEmbeddingFunction):
    """How often each of `letters` stands in a text; keeps what it was asked."""

    cache_queries: ClassVar[bool] = True
    asked: ClassVar[list[list[str]]] = []

    letters: str = "abc"
    device: str = "cpu"

    def ndims(self) -> int:
        return len(self.letters)

    def generate_embeddings(self, texts: list[str], *args: Any, **kwargs: Any) -> list[Any]:
        self.asked.append(list(texts))
        return [[float(text.count(letter)) for letter in self.letters] for text in texts]


class Plain(Letters):
    """The same, without a word about its queries."""


class Words(StagedFunction):
    """One vector for each word: its length, and its first letter."""

    cache_queries: ClassVar[bool] = True
    multivector: ClassVar[bool] = True
    asked: ClassVar[list[Any]] = []

    def ndims(self) -> int:
        return 2

    def prepare(self, items: Any, side: Side) -> Any:
        self.asked.append(list(items))
        return [str(item).split() for item in items]

    def finish(self, prepared: Any, *, ndims: int, device: torch.device) -> Embeddings:
        lengths = [len(words) for words in prepared]
        rows = [[float(len(w)), float(ord(w[0]))] for words in prepared for w in words]
        vectors = torch.tensor(rows, device=device).reshape(-1, ndims)
        valid = np.array(lengths) > 0
        errors = {i: "it has no word" for i, length in enumerate(lengths) if not length}
        return Embeddings(vectors, valid, errors, np.concatenate(([0], np.cumsum(lengths))))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    QUERIES.clear()
    Letters.asked.clear()
    Words.asked.clear()
    yield
    QUERIES.clear()


def embed(function: Any, *items: Any, ndims: int = 3, multi: bool = False) -> Embeddings:
    return module.embed(function, items, ndims=ndims, device=CPU, multi=multi)


def rows(made: Embeddings) -> list[list[list[float]]]:
    """The vectors of each item."""
    values = made.vectors.tolist()
    if made.offsets is None:
        return [[value] for value in values]
    return [values[s:e] for s, e in zip(made.offsets[:-1], made.offsets[1:], strict=True)]


def test_a_text_is_embedded_once() -> None:
    f = Letters.create()
    first = embed(f, "a", "bb", "a", "ccc", "bb")
    assert Letters.asked == [["a", "bb", "ccc"]]
    a, b, c = [1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 3.0]
    assert first.vectors.tolist() == [a, b, a, c, b]
    again = embed(f, "ccc", "a")
    assert again.vectors.tolist() == [c, a]
    mixed = embed(Letters.create(), "b", "bb", "ab", "b", "a")
    assert mixed.vectors.tolist() == [[0.0, 1.0, 0.0], b, [1.0, 1.0, 0.0], [0.0, 1.0, 0.0], a]
    assert Letters.asked == [["a", "bb", "ccc"], ["b", "ab"]]
    for made in (first, again, mixed):
        assert made.valid.all()
        assert made.offsets is None
        assert made.errors == {}
        assert (made.vectors.dtype, made.vectors.device) == (torch.float32, CPU)


def test_only_a_class_that_says_so_itself() -> None:
    plain = Plain.create()
    for _ in range(2):
        assert embed(plain, "a", "a").vectors.tolist() == [[1.0, 0.0, 0.0]] * 2
    assert Letters.asked == [["a", "a"], ["a", "a"]]
    assert len(QUERIES) == 0


def test_arguments_and_shapes_are_told_apart() -> None:
    embed(Letters.create(), "a")
    embed(Letters.create(letters="xya"), "a")
    embed(Letters.create(device="cpu:0"), "a")
    embed(Letters.create(max_retries=7), "a")  # what it is by default
    embed(Letters.create(), "a", multi=True)
    assert len(Letters.asked) == 4
    with pytest.raises(gpu_lance.errors.EmbeddingError, match="wants 4"):
        embed(Letters.create(), "a", ndims=4)

    class Other(Letters):
        cache_queries: ClassVar[bool] = True

    embed(Other.create(), "a")
    assert len(Letters.asked) == 6


def test_other_items_than_texts_are_embedded_each_time() -> None:
    class Numbers(gpu_lance.embeddings.EmbeddingFunction):
        cache_queries: ClassVar[bool] = True
        asked: ClassVar[list[Any]] = []

        def ndims(self) -> int:
            return 1

        def compute_source_embeddings(self, items: Any, *args: Any, **kwargs: Any) -> list[Any]:
            return [[float(item)] for item in items]

        def compute_query_embeddings(self, query: Any, *args: Any, **kwargs: Any) -> list[Any]:
            self.asked.append(query)
            return [[float(query)]]

    class Text(str):
        """Whatever it may do beside being a text."""

        __slots__ = ()

    made = embed(Numbers.create(), 1, "1", Text("1"), None, 1, "1", ndims=1)
    assert made.vectors.tolist() == [[1.0], [1.0], [1.0], [0.0], [1.0], [1.0]]
    assert made.valid.tolist() == [True, True, True, False, True, True]
    assert Numbers.asked == [1, "1", "1", 1]
    embed(Numbers.create(), 1, "1", ndims=1)
    assert Numbers.asked == [1, "1", "1", 1, 1]
    assert len(embed(Numbers.create(), ndims=1)) == 0


def test_several_vectors_an_item() -> None:
    f = Words.create()
    embed(f, "one two", "a", ndims=2, multi=True)
    made = embed(f, "a", "", "three", "one two", "three", "", ndims=2, multi=True)
    assert Words.asked == [["one two", "a"], ["", "three"]]
    one_two, a, three = [[3.0, 111.0], [3.0, 116.0]], [[1.0, 97.0]], [[5.0, 116.0]]
    assert rows(made) == [a, [], three, one_two, three, []]
    assert made.valid.tolist() == [True, False, True, True, True, False]
    assert made.errors == {1: "it has no word", 5: "it has no word"}
    assert rows(embed(f, "one two", ndims=2, multi=True)) == [one_two]
    assert len(Words.asked) == 2


def test_what_a_caller_does_to_its_vectors_stays_its_own() -> None:
    f = Letters.create()
    for texts in (["a"], ["a"], ["a", "b"], ["a", "b"]):
        made = embed(f, *texts)
        assert made.vectors[0].tolist() == [1.0, 0.0, 0.0]
        made.vectors.fill_(9.0)
    assert len(Letters.asked) == 2


def test_errors_are_not_remembered() -> None:
    class Flaky(Letters):
        cache_queries: ClassVar[bool] = True
        fails: ClassVar[bool] = True

        def generate_embeddings(self, texts: list[str], *args: Any, **kwargs: Any) -> list[Any]:
            if self.fails:
                raise RuntimeError("the server is down")
            return super().generate_embeddings(texts)

    f = Flaky.create()
    with pytest.raises(RuntimeError, match="the server is down"):
        embed(f, "a")
    Flaky.fails = False
    assert embed(f, "a").vectors.tolist() == [[1.0, 0.0, 0.0]]
    bad = "a" + chr(0xD800)
    made = embed(f, "a", bad, "b", bad)
    assert made.valid.tolist() == [True, False, True, False]
    assert sorted(made.errors) == [1, 3]
    assert len(QUERIES) == 2
    Flaky.fails = True
    assert embed(f, "b", "a").vectors.tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]


def test_it_is_bounded_by_items_and_bytes() -> None:
    cache = QueryCache(max_items=3, max_bytes=10_000)
    for i in range(5):
        cache.put(i, torch.zeros(1, 4), "x")
        cache.get(2)
    assert [cache.get(i) is not None for i in range(5)] == [False, False, True, True, True]
    cache.put("large", torch.zeros(10_000), "x")
    assert cache.get("large") is None
    assert len(cache) == 3
    for i in range(5, 8):
        cache.put(i, torch.zeros(1, 1_000), "x")
    assert [cache.get(i) is not None for i in range(5, 8)] == [False, True, True]
    cache.put("text", torch.zeros(1, 4), "x" * 9_500)
    assert cache.get(7) is None
    assert cache.nbytes <= 10_000
    for _ in range(3):  # the same key again is no second entry
        cache.put("text", torch.zeros(1, 4), "x" * 9_500)
    assert len(cache) == 1
    cache.clear()
    assert (len(cache), cache.nbytes) == (0, 0)
    texts = [f"{'a' * (i % 7)}{i}" for i in range(3_000)]
    embed(Letters.create(), *texts)
    assert len(QUERIES) == module.MAX_ITEMS
    assert QUERIES.nbytes < module.MAX_BYTES


def test_threads_get_their_own_vectors() -> None:
    f, start = Letters.create(), threading.Barrier(6)
    failures: list[Any] = []

    def ask(seed: int) -> None:
        rng = np.random.default_rng(seed)
        start.wait()
        for _ in range(200):
            counts = rng.integers(0, 6, (4, 3))
            texts = ["a" * a + "b" * b + "c" * c for a, b, c in counts.tolist()]
            made = embed(f, *texts)
            if made.vectors.tolist() != counts.astype(float).tolist():
                failures.append((texts, made.vectors.tolist()))
            made.vectors.zero_()

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_search_embeds_a_text_once_and_forgets_with_the_registry() -> None:
    registry = get_registry()
    kept = dict(registry._functions)
    try:
        registry.register("letters-once")(Letters)
        f = Letters.create()
        config = EmbeddingFunctionConfig(vector_column="vector", source_column="t", function=f)
        db = gpu_lance.connect("memory://", device="cpu")
        table = db.create_table("t", [{"t": "aa"}, {"t": "b"}], embedding_functions=[config])
        Letters.asked.clear()
        for _ in range(3):
            assert table.search("b").limit(1).to_list()[0]["t"] == "b"
            assert table.search("aa").limit(1).to_list()[0]["_distance"] == 0.0
        found = table.search(["b", "aa", "b"]).limit(1).to_list()
        assert [row["t"] for row in found] == ["b", "aa", "b"]
        assert Letters.asked == [["b"], ["aa"]]
        with pytest.raises(BadInputError, match="Query 1 has a lone surrogate"):
            table.search(["b", "b" + chr(0xD800)]).to_list()
        registry.reset()
        assert len(QUERIES) == 0
    finally:
        registry._functions.update(kept)


def test_a_class_that_is_written_anew_is_asked_anew() -> None:
    def written(factor: float) -> Any:
        class Scaled(Letters):
            cache_queries: ClassVar[bool] = True

            def generate_embeddings(self, texts: list[str], *args: Any, **kwargs: Any) -> list[Any]:
                return [[factor, factor, factor] for _ in texts]

        return Scaled.create()

    assert embed(written(1.0), "a").vectors.tolist() == [[1.0, 1.0, 1.0]]
    assert embed(written(2.0), "a").vectors.tolist() == [[2.0, 2.0, 2.0]]


def test_a_state_of_its_own() -> None:
    class Versioned(Letters):
        cache_queries: ClassVar[bool] = True
        version: ClassVar[int] = 1

        def query_state(self) -> int:
            return self.version

    f = Versioned.create()
    embed(f, "a")
    embed(f, "a")
    Versioned.version = 2
    embed(f, "a")
    assert len(Letters.asked) == 2


def test_every_provider_that_comes_along_remembers() -> None:
    from gpu_lance.embeddings.registry import BUILT_IN

    for name in BUILT_IN:
        assert vars(get_registry().get(name)).get("cache_queries") is True, name


def test_another_server_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    f = get_registry().get("openai").create()
    before = f.query_state()
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    assert f.query_state() != before
