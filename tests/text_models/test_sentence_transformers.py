"""The provider sentence-transformers: real weights against the library, and bad models."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from gpu_lance.device import resolve_device
from gpu_lance.embeddings import get_registry
from gpu_lance.embeddings.calls import embed
from gpu_lance.embeddings.sentence_transformers import SentenceTransformerEmbeddings
from gpu_lance.embeddings.text_models import PackedModel
from gpu_lance.errors import BadInputError, DeviceError
from gpu_lance.types import Side

CPU = torch.device("cpu")
NDIMS = 384
WORDS = (
    "a search engine for pictures keeps their vectors near the rows of a table and answers a "
    "question by the nearest of them while other writers go on adding what they have found"
).split()


def varied_texts(count: int, longest: int) -> list[str]:
    """Texts of 1 to `longest` words in no order, with some odd ones among them."""
    random = np.random.default_rng(7)
    texts = [
        "",
        " ",
        "a",
        "?",
        "naïve café, Straße, piñata",
        "你好，世界。機械学習は楽しい",
        "🦙👩‍👩‍👧‍👦 e\u0301 \u200b \ufeff",
        "\x00\x07 control\ttabs\nand\r\nlines",
        "مرحبا بالعالم",
        "[CLS] spelled out [SEP] [PAD] [MASK]",
        "antidisestablishmentarianism" * 5,
        "word " * longest,
    ]
    while len(texts) < count:
        length = int(np.exp(random.uniform(0, np.log(longest))))
        texts.append(" ".join(random.choice(WORDS, length)))
    return [texts[i] for i in random.permutation(count)]


@pytest.fixture(scope="module")
def function() -> SentenceTransformerEmbeddings:
    return SentenceTransformerEmbeddings.create(device="cpu")


@pytest.fixture(scope="module")
def library(function: SentenceTransformerEmbeddings) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(function._locate().folder), device="cpu", local_files_only=True)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


# -- the same vectors as the library


def test_real_weights_give_the_vectors_of_the_library(function, library):
    texts = varied_texts(30, 280)
    ours = np.stack(function.compute_source_embeddings(texts))
    wanted = library.encode_document(texts, batch_size=8, show_progress_bar=False)
    assert ours.dtype == np.float32
    assert cosines(ours, wanted).min() >= 0.99999
    np.testing.assert_allclose(ours, wanted, atol=5e-6)
    assert type(function._model(CPU)) is PackedModel


def test_a_query_has_the_vector_of_the_library(function, library):
    for text in ("what is a vector?", ""):
        (ours,) = function.compute_query_embeddings(text)
        np.testing.assert_allclose(ours, library.encode_query(text), atol=5e-6)


def test_a_text_of_a_megabyte_is_cut_off_like_the_library_does(function, library):
    text = "neighbour vectors in a table " * 36_000
    assert len(text) > 1_000_000
    first, second = function.compute_source_embeddings([text, "short"])
    # 256 tokens are less than 3,000 letters of it
    np.testing.assert_allclose(first, library.encode(text[:3000]), atol=5e-6)
    np.testing.assert_allclose(second, library.encode("short"), atol=5e-6)


def test_near_texts_are_near(function):
    made = np.stack(
        function.compute_source_embeddings(
            ["A man is eating food.", "Someone eats a meal.", "The stock market fell sharply."]
        )
    )
    scores = made @ made.T
    assert scores[0, 1] > 0.6 > 0.2 > scores[0, 2]


def test_the_library_itself_is_at_hand(function):
    model = function.get_embedding_model()
    assert type(model).__name__ == "SentenceTransformer"
    assert function.embedding_model is model
    assert not model.training


# -- neither batches nor neighbours nor order change a vector


def test_vectors_do_not_depend_on_the_batch_size(function):
    texts = varied_texts(18, 40)
    wanted = np.stack(function.compute_source_embeddings(texts))
    for batch_size in (1, 5):
        other = SentenceTransformerEmbeddings.create(device="cpu", batch_size=batch_size)
        made = np.stack(other.compute_source_embeddings(texts))
        np.testing.assert_allclose(made, wanted, atol=2e-6)


def test_vectors_do_not_depend_on_the_neighbours_or_the_order(function):
    texts = varied_texts(18, 40)
    wanted = np.stack(function.compute_source_embeddings(texts))
    order = np.random.default_rng(1).permutation(18)
    shuffled = np.stack(function.compute_source_embeddings([texts[i] for i in order]))
    np.testing.assert_allclose(shuffled, wanted[order], atol=2e-6)
    for row in (0, 7, 17):
        (alone,) = function.compute_source_embeddings(texts[row])
        np.testing.assert_allclose(alone, wanted[row], atol=2e-6)


@pytest.mark.parametrize(
    "column",
    [
        ["b", "a", None, "c"],
        ("b", "a", None, "c"),
        pa.array(["b", "a", None, "c"]),
        pa.chunked_array([["b"], ["a", None, "c"]]),
        pa.array(["b", "a", None, "c"]).dictionary_encode(),
    ],
    ids=["list", "tuple", "arrow", "chunks", "dictionary"],
)
def test_any_column_of_texts_will_do(function, column):
    made = function.compute_source_embeddings(column)
    wanted = function.compute_source_embeddings(["c", "b", "a"])
    assert made[2] is None
    for row, same in ((0, 1), (1, 2), (3, 0)):
        np.testing.assert_allclose(made[row], wanted[same], atol=1e-6)


def test_no_items_give_no_vectors(function):
    assert function.compute_source_embeddings([]) == []
    assert function.compute_source_embeddings([None]) == [None]
    assert function.compute_query_embeddings([]) == []


# -- bad items


def test_bad_items_are_recorded_with_their_reasons(function, caplog):
    items = ["good", chr(0xD800) + "x", None, 7, b"bytes", "good"]
    with caplog.at_level(logging.WARNING, logger="gpu_lance"):
        made = function.compute_source_embeddings(items)
    assert [vector is not None for vector in made] == [True, False, False, False, False, True]
    np.testing.assert_allclose(made[0], made[5], atol=1e-6)
    assert "3 items have no vector; the first is item 1: it holds a lone surrogate" in caplog.text
    result = embed(function, items, "source", ndims=NDIMS, device=CPU)
    assert sorted(result.errors) == [1, 3, 4]
    assert result.errors[3] == "it is a int, not text"
    assert result.vectors[1:5].abs().sum() == 0


@pytest.mark.parametrize("query", [chr(0xDFFF), 3, b"bytes"], ids=["surrogate", "int", "bytes"])
def test_a_bad_query_is_an_error(function, query):
    with pytest.raises(BadInputError, match="Query 0 cannot be embedded: it"):
        function.compute_query_embeddings(query)


def test_an_error_of_ours_is_not_retried(function):
    eager = SentenceTransformerEmbeddings.create(device="cpu", max_retries=7)
    with pytest.raises(BadInputError):
        eager.compute_query_embeddings_with_retry([chr(0xD800)])
    (vector,) = eager.compute_query_embeddings_with_retry("fine")
    np.testing.assert_allclose(vector, function.compute_query_embeddings("fine")[0], atol=1e-6)


def test_a_text_without_any_token_is_recorded(checkpoints):
    folder = checkpoints.sentence("bert", frame=False)
    function = SentenceTransformerEmbeddings.create(name=str(folder), device="cpu")
    result = embed(function, ["fox", "", "dog"], "source", ndims=32, device=CPU)
    assert result.valid.tolist() == [True, False, True]
    assert result.errors == {1: "it has no token, so this model has no vector for it"}


# -- arguments


def test_prompts_come_before_the_texts(function):
    prompted = SentenceTransformerEmbeddings.create(
        device="cpu", prompts={"query": "query: ", "document": "passage: "}
    )
    (query,) = prompted.compute_query_embeddings("fox")
    (source,) = prompted.compute_source_embeddings("fox")
    for made, text in ((query, "query: fox"), (source, "passage: fox")):
        (wanted,) = function.compute_source_embeddings(text)
        np.testing.assert_allclose(made, wanted, atol=1e-6)


def test_a_prompt_may_name_one_of_the_models_own(checkpoints):
    stored = {"query": "find: ", "document": "text: ", "math": "solve: "}
    name = str(checkpoints.sentence(prompts=stored))
    create = SentenceTransformerEmbeddings.create
    function = create(name=name, device="cpu", prompts={"query": "math"})
    assert function.prompt_of(Side.QUERY) == "solve: "
    assert function.prompt_of(Side.SOURCE) == "text: "
    bare = create(name=name, device="cpu", prompts={"query": "", "document": ""})
    assert (bare.prompt_of(Side.QUERY), bare.prompt_of(Side.SOURCE)) == ("", "")


def test_truncated_vectors_are_the_leading_numbers_scaled_anew(function):
    short = SentenceTransformerEmbeddings.create(device="cpu", truncate_dim=100)
    assert short.ndims() == 100
    (full,) = function.compute_source_embeddings("fox")
    (made,) = short.compute_source_embeddings("fox")
    wanted = full[:100] / np.linalg.norm(full[:100])
    np.testing.assert_allclose(made, wanted, atol=1e-6)
    raw = SentenceTransformerEmbeddings.create(device="cpu", truncate_dim=100, normalize=False)
    np.testing.assert_allclose(raw.compute_source_embeddings("fox")[0], full[:100], atol=1e-6)
    wide = SentenceTransformerEmbeddings.create(device="cpu", truncate_dim=10_000)
    assert wide.ndims() == NDIMS


def test_normalize_scales_to_length_one(checkpoints):
    name = str(checkpoints.sentence())
    create = SentenceTransformerEmbeddings.create
    (raw,) = create(name=name, device="cpu", normalize=False).compute_source_embeddings("fox")
    (scaled,) = create(name=name, device="cpu").compute_source_embeddings("fox")
    assert abs(np.linalg.norm(raw) - 1) > 0.1
    np.testing.assert_allclose(scaled, raw / np.linalg.norm(raw), atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "fp16"])
@pytest.mark.parametrize("kind", ["bert", "mpnet"])
def test_a_narrower_dtype_gives_near_vectors_of_float32(checkpoints, dtype, kind):
    name = str(checkpoints.sentence(kind, dense=16, normalize=True))
    create = SentenceTransformerEmbeddings.create
    texts = ["the quick fox", "", "rows of a table " * 5]
    wanted = np.stack(create(name=name, device="cpu").compute_source_embeddings(texts))
    narrow = create(name=name, device="cpu", dtype=dtype)
    made = np.stack(narrow.compute_source_embeddings(texts))
    assert made.dtype == np.float32
    assert 1e-6 < np.abs(made - wanted).max() < 0.1
    assert cosines(made, wanted).min() > 0.99


def test_normalising_keeps_the_float32_that_pooling_gave(checkpoints):
    name = str(checkpoints.sentence(normalize=True))
    create = SentenceTransformerEmbeddings.create
    function = create(name=name, device="cpu", dtype="bfloat16", normalize=False)
    made = np.stack(function.compute_source_embeddings(["the quick fox", "rows of a table " * 5]))
    # bfloat16 steps are 2**-8 wide
    np.testing.assert_allclose(np.linalg.norm(made, axis=1), 1, atol=1e-6)
    plain = create(
        name=str(checkpoints.sentence()), device="cpu", dtype="bfloat16", normalize=False
    )
    pooled = np.stack(plain.compute_source_embeddings(["the quick fox", "rows of a table " * 5]))
    np.testing.assert_allclose(
        made, pooled / np.linalg.norm(pooled, axis=1, keepdims=True), atol=1e-6
    )


def test_an_unknown_dtype_is_an_error():
    function = SentenceTransformerEmbeddings.create(device="cpu", dtype="int8")
    with pytest.raises(ValueError, match="dtype is 'int8'; it must be one of float32"):
        function.compute_source_embeddings("fox")


def test_cuda_is_never_replaced_by_the_cpu():
    try:
        resolve_device("cuda")
    except DeviceError:
        pass
    else:
        pytest.skip("there is a CUDA device")
    for name in ("cuda", "gpu", "cuda:3"):
        function = SentenceTransformerEmbeddings.create(device=name)
        assert function.ndims() == NDIMS
        with pytest.raises(DeviceError, match=rf"device='{name}' was asked for, but .* Install"):
            function.compute_query_embeddings("fox")
    with pytest.raises(DeviceError, match="Unknown device 'tpu9'"):
        SentenceTransformerEmbeddings.create(device="tpu9").compute_query_embeddings("fox")


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"truncate_dim": 0}], ids=str)
def test_wrong_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        SentenceTransformerEmbeddings.create(**wrong)


def test_the_registry_gives_it_and_a_table_stores_its_arguments_only():
    cls = get_registry().get("sentence-transformers")
    assert cls is SentenceTransformerEmbeddings
    function = cls.create(
        name="all-MiniLM-L6-v2", device="cpu", batch_size=3, dtype="fp32", trust_remote_code=True
    )
    assert function.safe_model_dump() == {"name": "all-MiniLM-L6-v2"}
    assert cls.create().trust_remote_code is False


def test_dimensions_come_from_the_configuration(checkpoints):
    plain = checkpoints.transformer("distilbert")
    assert SentenceTransformerEmbeddings.create(name=str(plain)).ndims() == 32
    for options, width in (
        ({"pooling": ("cls", "mean", "max")}, 96),
        ({"pooling": ("cls", "mean"), "dense": 16}, 16),
    ):
        folder = Path(checkpoints.sentence(**options))
        assert SentenceTransformerEmbeddings.create(name=str(folder)).ndims() == width
