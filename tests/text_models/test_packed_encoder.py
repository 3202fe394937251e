"""Our inference over packed tokens against the library's own, on tiny models of every kind."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch

from gpu_lance.embeddings.encoder import PackedEncoder, _varlen, runs_of
from gpu_lance.embeddings.model_folder import POOLING_MODES
from gpu_lance.embeddings.pooling import pool
from gpu_lance.embeddings.sentence_transformers import SentenceTransformerEmbeddings
from gpu_lance.embeddings.text_models import LibraryModel, PackedModel, PaddedModel

CPU = torch.device("cpu")
TOLERANCE = 1e-5
TEXTS = [
    "the quick brown fox",
    "",
    "a",
    "vectors near their rows " * 20,  # cut off
    "Zürich naïve café 你好",
    "fox the quick brown",
    "[PAD] <pad> in [MASK] the <mask> middle [SEP] </s>",
    "words",
    "tokens make words; words make sentences " * 2,
]


def made(folder: Any, texts: list[str] = TEXTS, side: str = "source", **options: Any) -> Any:
    """Our vectors, and which way they were made."""
    options = {"device": "cpu", "normalize": False, **options}
    function = SentenceTransformerEmbeddings.create(name=str(folder), **options)
    embed = getattr(function, f"compute_{side}_embeddings")
    vectors = np.stack(embed(list(texts)))
    assert vectors.shape == (len(texts), function.ndims())
    return vectors, type(function._model(CPU))


def upstream(folder: Any, texts: list[str] = TEXTS, side: str = "source", **options: Any) -> Any:
    """The library's vectors."""
    from sentence_transformers import SentenceTransformer

    library = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    encode = library.encode_query if side == "query" else library.encode_document
    return encode(list(texts), batch_size=4, show_progress_bar=False, **options)


# -- each kind of model


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta", "camembert", "distilbert"])
def test_packed_models_equal_the_library(checkpoints, kind):
    folder = checkpoints.sentence(kind)
    vectors, way = made(folder)
    assert way is PackedModel
    wanted = upstream(folder)
    np.testing.assert_allclose(vectors, wanted, atol=TOLERANCE)
    assert len(np.unique(vectors.round(4), axis=0)) == len(TEXTS)
    # a batch in which no text spells out the padding token counts its positions otherwise
    plain = [row for row, text in enumerate(TEXTS) if "<pad>" not in text]
    vectors, _ = made(folder, [TEXTS[row] for row in plain])
    np.testing.assert_allclose(vectors, wanted[plain], atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["mpnet", "electra", "modernbert"])
def test_padded_models_equal_the_library(checkpoints, kind):
    folder = checkpoints.sentence(kind)
    vectors, way = made(folder)
    assert way is PaddedModel
    np.testing.assert_allclose(vectors, upstream(folder), atol=TOLERANCE)


def test_a_chain_that_only_the_library_knows_equals_it(checkpoints):
    folder = checkpoints.sentence(extra=("LayerNorm",))
    vectors, way = made(folder)
    assert way is LibraryModel
    np.testing.assert_allclose(vectors, upstream(folder), atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["bert", "roberta", "mpnet"])
def test_a_plain_transformers_folder_equals_the_library(checkpoints, kind):
    folder = checkpoints.transformer(kind)
    vectors, _ = made(folder, TEXTS)
    texts = TEXTS
    if kind != "bert":
        # the library lets a text of positions - 2 tokens and more fail; ours cuts it off
        texts = [text for text in TEXTS if len(text) < 200]
    kept = [TEXTS.index(text) for text in texts]
    np.testing.assert_allclose(vectors[kept], upstream(folder, texts), atol=TOLERANCE)
    assert np.isfinite(vectors).all()


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_act": "relu"},
        {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5},
        {"num_attention_heads": 2, "num_hidden_layers": 3},
        {"type_vocab_size": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_the_configuration_says_counts(checkpoints, options):
    kind = "roberta" if "type_vocab_size" in options else "bert"
    folder = checkpoints.sentence(kind, **options)
    vectors, way = made(folder)
    assert way is PackedModel
    np.testing.assert_allclose(vectors, upstream(folder), atol=TOLERANCE)


def test_a_decoder_is_not_packed(checkpoints):
    folder = checkpoints.sentence("bert", is_decoder=True)
    vectors, way = made(folder)
    assert way is not PackedModel
    np.testing.assert_allclose(vectors, upstream(folder), atol=TOLERANCE)


# -- what follows the encoder

COMBINED = [("cls", "mean"), ("lasttoken", "max", "weightedmean"), ("mean", "mean_sqrt_len_tokens")]


@pytest.mark.parametrize("pooling", [*sorted(POOLING_MODES), *COMBINED], ids=str)
def test_pooling_equals_the_library(checkpoints, pooling):
    folder = checkpoints.sentence(pooling=pooling)
    vectors, way = made(folder)
    assert way is PackedModel
    np.testing.assert_allclose(vectors, upstream(folder), atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["bert", "mpnet"])
@pytest.mark.parametrize(
    "after",
    [{"dense": 16}, {"normalize": True}, {"dense": 48, "normalize": True, "pooling": "cls"}],
    ids=str,
)
def test_dense_and_normalize_equal_the_library(checkpoints, kind, after):
    folder = checkpoints.sentence(kind, **after)
    vectors, _ = made(folder)
    np.testing.assert_allclose(vectors, upstream(folder), atol=TOLERANCE)
    if "normalize" in after:
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "mpnet"])
@pytest.mark.parametrize("normalize", [True, False])
def test_truncated_vectors_equal_the_library(checkpoints, kind, normalize):
    folder = checkpoints.sentence(kind, pooling=("cls", "mean"))
    vectors, _ = made(folder, truncate_dim=40, normalize=normalize)
    wanted = upstream(folder, truncate_dim=40, normalize_embeddings=normalize)
    np.testing.assert_allclose(vectors, wanted, atol=TOLERANCE)


@pytest.mark.parametrize("extra", [(), ("LayerNorm",)], ids=["packed", "library"])
@pytest.mark.parametrize("side", ["query", "source"])
@pytest.mark.parametrize(
    "prompts",
    [
        {"query": "query: ", "document": "passage: "},
        {"query": "find the ", "passage": "not used by the library either"},
    ],
    ids=["both", "query"],
)
def test_the_prompts_of_a_model_equal_the_library(checkpoints, prompts, side, extra):
    folder = checkpoints.sentence(prompts=prompts, extra=extra)
    vectors, _ = made(folder, side=side)
    np.testing.assert_allclose(vectors, upstream(folder, side=side), atol=TOLERANCE)


# -- the pieces by themselves


def test_runs_cover_every_token_once():
    lengths = np.array([7, 7, 7, 4, 4, 1, 1, 1, 1])
    runs = runs_of(lengths)
    assert [(run.count, run.length) for run in runs] == [(3, 7), (2, 4), (4, 1)]
    assert [run.start for run in runs] == [0, 21, 29]
    assert runs[-1].stop == lengths.sum()


def test_an_unknown_pooling_mode_is_an_error():
    with pytest.raises(ValueError, match="'median'"):
        pool(torch.ones(2, 3), runs_of(np.array([2])), ["median"])


def test_the_fused_weights_are_not_held_twice(checkpoints):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(checkpoints.transformer("bert")).eval()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    encoder = PackedEncoder(model)
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, new)
    own = model.encoder.layer[0].attention.self
    fused = encoder.layers[0].qkv.weight
    assert own.query.weight.data_ptr() == fused.data_ptr()
    assert own.value.weight.data_ptr() == fused[64:].data_ptr()


# -- attention on a GPU


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU as far as `_varlen` looks at one."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    return torch.device("cuda", 0)


def test_flash_attention_is_asked_for_only_what_it_takes(ampere: torch.device):
    assert _varlen(ampere, torch.bfloat16, 32) is not None
    assert _varlen(ampere, torch.float16, 256) is not None
    assert _varlen(ampere, torch.float32, 32) is None
    assert _varlen(ampere, torch.bfloat16, 26) is None  # TinyBERT: 312 in 12 heads
    assert _varlen(ampere, torch.bfloat16, 264) is None
    assert _varlen(CPU, torch.bfloat16, 32) is None


def test_attention_never_takes_a_backend_that_compiles_for_every_shape(ampere: torch.device):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    attend: Any = _varlen(ampere, torch.bfloat16, 32)
    if not hasattr(varlen, "_can_use_cudnn"):
        assert attend is varlen.varlen_attn
        return
    parameters = inspect.signature(varlen._can_use_cudnn).parameters
    assert "num_splits" in parameters
    assert attend.keywords == {"num_splits": 1}
