"""Late interaction against its formula, and against the library, on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import colbert_checkpoints as made
import numpy as np
import pytest
import torch
from colbert_checkpoints import ID, TEXTS, Formula, cosines, maxsim

from gpu_lance.embeddings import get_registry
from gpu_lance.embeddings.colbert import ColbertEmbeddings
from gpu_lance.embeddings.late_interaction import OwnLateInteraction, PackedLateInteraction
from gpu_lance.embeddings.loading import MODELS
from gpu_lance.errors import BadInputError, EmbeddingError
from gpu_lance.types import Side


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, checkpoints: Any) -> dict[str, Path]:
    """One model in every format, and others over other transformers."""
    root = tmp_path_factory.mktemp("colbert")
    stanford = made.stanford(root / "stanford")
    saved = made.saved_by_library(root / "saved", stanford)
    expansion = {"strategy": "min", "attend": False, "length": 9}
    return {
        "stanford": stanford,
        "bin": made.stanford(root / "bin", weights="bin"),
        "attend": made.stanford(root / "attend", attend_to_mask_tokens=True),
        "unmasked": made.stanford(root / "unmasked", mask_punctuation=False),
        "saved": saved,
        **{
            kind: made.of_transformer(
                root / kind, checkpoints.transformer(kind), query_expansion=expansion
            )
            for kind in ("roberta", "electra", "modernbert", "distilbert")
        },
        "short": made.of_transformer(
            root / "short", checkpoints.transformer("bert"), query_length=6, document_length=9
        ),
    }


def create(folder: Path, **options: Any) -> ColbertEmbeddings:
    return ColbertEmbeddings.create(name=str(folder), **{"device": "cpu", **options})


@pytest.fixture(scope="module")
def formula(folders) -> Formula:
    return Formula(folders["stanford"])


# -- parity


@pytest.mark.parametrize("name", ["stanford", "attend", "unmasked"])
def test_scores_equal_the_formula(folders, name):
    oracle, function = Formula(folders[name]), create(folders[name])
    documents = function.compute_source_embeddings(TEXTS)
    queries = function.compute_query_embeddings(TEXTS)
    wanted = [oracle.document(text) for text in TEXTS]
    assert cosines(documents, wanted) >= 0.99999
    for text, query in zip(TEXTS, queries, strict=True):
        assert query.shape == (made.QUERY_LENGTH, made.WIDTH)
        by_formula = oracle.query(text)
        for document, other in zip(documents, wanted, strict=True):
            score = maxsim(by_formula, other)
            assert maxsim(query, document) == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize(
    "name",
    ["stanford", "bin", "attend", "unmasked", "saved", "roberta", "electra", "modernbert",
     "distilbert", "short"],
)  # fmt: skip
def test_vectors_equal_the_librarys(folders, name):
    function, library = create(folders[name]), made.library_of(folders[name])
    # foreign letters, another special token, and a length that no text before had
    texts = [*TEXTS, "Zürich naïve 你好", "near [MASK] row", "x" * 30]
    assert cosines(function.compute_query_embeddings(texts), library.encode_query(texts)) >= 0.9999
    documents = function.compute_source_embeddings(texts)
    assert cosines(documents, library.encode_document(texts)) >= 0.9999


@pytest.mark.parametrize(
    ("name", "kind"),
    [("saved", PackedLateInteraction), ("roberta", PackedLateInteraction),
     ("distilbert", PackedLateInteraction), ("electra", OwnLateInteraction)],
)  # fmt: skip
def test_bert_and_its_kin_run_packed(folders, name, kind):
    assert type(create(folders[name])._model(torch.device("cpu"))) is kind


def test_formats_of_one_model_give_the_same_vectors(folders):
    wanted = create(folders["stanford"])
    for name in ("bin", "saved"):
        function = create(folders[name])
        assert function.ndims() == made.WIDTH
        for method in ("compute_source_embeddings", "compute_query_embeddings"):
            ours, theirs = getattr(function, method)(TEXTS), getattr(wanted, method)(TEXTS)
            for one, other in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close(folders, formula, dtype):
    function = create(folders["stanford"], dtype=dtype)
    made_ = function.compute_source_embeddings(TEXTS)
    assert cosines(made_, [formula.document(text) for text in TEXTS]) >= 0.999
    made_ = function.compute_query_embeddings(TEXTS)
    assert cosines(made_, [formula.query(text) for text in TEXTS]) >= 0.999
    assert made_[0].dtype == np.float32


# -- batches


@pytest.mark.parametrize("side", ["source", "query"])
@pytest.mark.parametrize("name", ["stanford", "electra"])
def test_batch_size_and_order_do_not_matter(folders, name, side):
    texts = [text + " row" * (index % 5) for index, text in enumerate(TEXTS * 4)]
    shuffled = np.random.default_rng(0).permutation(len(texts))

    def embed(texts: list[str], **options: Any) -> list[np.ndarray]:
        function = create(folders[name], **options)
        return getattr(function, f"compute_{side}_embeddings")(texts)

    wanted = embed(texts)
    for batch_size in (1, 3, None):
        again = embed([texts[index] for index in shuffled], batch_size=batch_size)
        for index, vectors in zip(shuffled, again, strict=True):
            np.testing.assert_allclose(vectors, wanted[index], atol=2e-6)
    for one, other in zip(embed(texts), wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def test_null_and_bad_items_have_no_vectors(folders):
    function = create(folders["stanford"])
    items = [None, "row", 3, "a" + chr(0xD800), "row"]
    prepared = function.prepare(items, Side.SOURCE)
    out = function.finish(prepared, ndims=made.WIDTH, device=torch.device("cpu"))
    assert out.valid.tolist() == [False, True, False, False, True]
    assert sorted(out.errors) == [2, 3]
    assert out.offsets.tolist() == [0, 0, 4, 4, 4, 8]
    torch.testing.assert_close(out.vectors[:4], out.vectors[4:])
    torch.testing.assert_close(out.vectors.norm(dim=1), torch.ones(8))
    with pytest.raises(BadInputError, match="Query 1 cannot be embedded"):
        function.compute_query_embeddings(["row", 3])


def test_no_items_and_only_null_items(folders):
    function = create(folders["stanford"])
    assert function.compute_source_embeddings([]) == []
    assert function.compute_source_embeddings([None, None]) == [None, None]


def test_both_sides_share_one_load(folders):
    MODELS.clear()
    before = len(MODELS.loads)
    function = create(folders["stanford"])
    function.compute_source_embeddings(["row"])
    function.compute_query_embeddings(["row"])
    other = create(folders["stanford"], query_length=8, document_length=9, batch_size=2)
    other.compute_query_embeddings(["row"])
    assert [load.device for load in MODELS.loads[before:]] == ["host", "cpu"]


# -- attention on a GPU


def plain_varlen(query, key, value, query_edges, key_edges, longest_query, longest_key):
    """What torch's attention over packed sequences computes, one sequence at a time."""
    parts = []
    for index in range(len(query_edges) - 1):
        asked = query[query_edges[index] : query_edges[index + 1]]
        seen = slice(key_edges[index], key_edges[index + 1])
        assert len(asked) <= longest_query and len(key[seen]) <= longest_key
        scores = torch.einsum("qhd,khd->hqk", asked, key[seen]) / asked.shape[-1] ** 0.5
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), value[seen]))
    return torch.cat(parts)


@pytest.mark.parametrize("side", ["query", "source"])
def test_attention_over_packed_sequences_sees_the_same_tokens(folders, monkeypatch, side):
    function = create(folders["stanford"])
    wanted = getattr(function, f"compute_{side}_embeddings")(TEXTS)
    encoder = function._model(torch.device("cpu"))._encoder
    monkeypatch.setattr(encoder, "_varlen", plain_varlen)
    ours = getattr(function, f"compute_{side}_embeddings")(TEXTS)
    for one, other in zip(ours, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "lowest"), [("float32", 0.9999), (None, 0.999)])
def test_a_gpu_gives_the_same_vectors(folders, formula, dtype, lowest):
    function = create(folders["stanford"], device="cuda", dtype=dtype)
    documents = function.compute_source_embeddings(TEXTS)
    assert cosines(documents, [formula.document(text) for text in TEXTS]) >= lowest
    queries = function.compute_query_embeddings(TEXTS)
    assert cosines(queries, [formula.query(text) for text in TEXTS]) >= lowest


# -- texts at the edge


def tokens(folder: Path, text: str, side: Side, **options: Any) -> tuple[list[int], list[bool]]:
    data = create(folder, **options).prepare([text], side).payload
    return data.tokens.ids.tolist(), data.scored.tolist()


def test_a_word_that_looks_like_a_marker_is_no_marker(folders):
    ids, scored = tokens(folders["stanford"], "[unused0]", Side.SOURCE)
    spelled = [ID[token] for token in ("[", "unused", "##0", "]")]
    assert ids == [ID["[CLS]"], ID["[unused1]"], *spelled, ID["[SEP]"]]
    assert scored == [True, True, False, True, True, False, True]


def test_a_mask_that_a_query_spells_out_is_attended_to(folders):
    function = create(folders["stanford"])
    data = function.prepare(["row [MASK]", "row"], Side.QUERY).payload
    assert data.tokens.lengths.tolist() == [12, 12]
    frame = [ID["[CLS]"], ID["[unused0]"], ID["row"]]
    assert data.tokens.ids[:5].tolist() == [*frame, ID["[MASK]"], ID["[SEP]"]]
    assert data.tokens.ids[12:16].tolist() == [*frame, ID["[SEP]"]]
    assert set(data.tokens.ids[16:].tolist()) == {ID["[MASK]"]}
    assert data.attended.tolist() == [5, 4]


@pytest.mark.parametrize(("text", "count"), [("", 3), ("   ", 3), ("?!.,;:", 3), (" - ", 3)])
def test_a_text_without_words_keeps_its_frame(folders, formula, text, count):
    function = create(folders["stanford"])
    (document,) = function.compute_source_embeddings([text])
    (query,) = function.compute_query_embeddings([text])
    assert document.shape == (count, made.WIDTH)
    assert cosines([document, query], [formula.document(text), formula.query(text)]) >= 0.99999


def test_a_text_none_of_whose_tokens_counts_is_a_bad_item(tmp_path, folders):
    def skip_all(library: Any) -> None:
        mask = next(module for module in library if hasattr(module, "skiplist_words"))
        mask.skiplist_words = ["[CLS]", "[unused1]", "[SEP]", "!"]

    function = create(made.saved_by_library(tmp_path / "m", folders["stanford"], skip_all))
    out = function.finish(
        function.prepare(["!!", "row"], Side.SOURCE), ndims=16, device=torch.device("cpu")
    )
    assert out.errors == {0: "none of its tokens has a vector"}
    assert out.offsets.tolist() == [0, 0, 1]


def test_a_hundred_thousand_characters_are_cut(folders, formula):
    text = "quick fox, " * 10_000
    function = create(folders["stanford"])
    (document,) = function.compute_source_embeddings([text])
    (query,) = function.compute_query_embeddings([text])
    assert cosines([document, query], [formula.document(text), formula.query(text)]) >= 0.99999
    ids, _ = tokens(folders["stanford"], "a" * 100_000, Side.SOURCE)
    assert len(ids) <= made.DOCUMENT_LENGTH


# -- lengths


def test_lengths_of_the_caller_go_first(folders, formula):
    function = create(folders["stanford"], query_length=7, document_length=10)
    formula_ = Formula(folders["stanford"])
    formula_.told = {**formula.told, "query_maxlen": 7, "doc_maxlen": 10}
    documents = function.compute_source_embeddings(TEXTS)
    assert cosines(documents, [formula_.document(text) for text in TEXTS]) >= 0.99999
    queries = function.compute_query_embeddings(TEXTS)
    assert cosines(queries, [formula_.query(text) for text in TEXTS]) >= 0.99999


@pytest.mark.parametrize("which", ["query_length", "document_length"])
def test_more_tokens_than_positions_is_an_error(folders, which):
    function = create(folders["stanford"], **{which: made.POSITIONS + 1})
    side = "query" if which == "query_length" else "source"
    with pytest.raises(EmbeddingError, match=f"has 66 positions.*smaller {which}"):
        getattr(function, f"compute_{side}_embeddings")(["row"])


@pytest.mark.parametrize("value", [0, 3, -1, "many"])
def test_impossible_lengths_are_refused(folders, value):
    with pytest.raises(ValueError, match="query_length"):
        create(folders["stanford"], query_length=value)


# -- what a table keeps


def test_the_fingerprint_says_what_decides_the_vectors(folders):
    first = create(folders["stanford"]).fingerprint()
    assert first["provider"] == "colbert" and first["dims"] == "16"
    assert "[unused0]" in first["markers"] and first["expansion"] == "12 fixed"
    assert first["weights"].startswith("sha256:")
    changes = {
        "attend": ("expansion",),
        "unmasked": ("skiplist",),
    }
    for name, keys in changes.items():
        other = create(folders[name]).fingerprint()
        assert tuple(key for key in first if first[key] != other[key]) == ("model", *keys)
    modules = create(folders["saved"]).fingerprint()["modules"]
    assert modules == "Dense[Identity] Normalize"
    other = create(folders["stanford"], document_length=10).fingerprint()
    assert [key for key in first if first[key] != other[key]] == ["document_length"]


def test_it_is_found_by_name_and_keeps_the_arguments(folders):
    cls = get_registry().get("colbert")
    assert cls is ColbertEmbeddings
    assert cls.model_fields["name"].default == "colbert-ir/colbertv2.0"
    function = cls.create(name=str(folders["stanford"]), query_length=8, device="cpu")
    assert function.safe_model_dump() == {"name": str(folders["stanford"]), "query_length": 8}
