"""The provider huggingface: the vectors of transformers and of LanceDB, whatever the model."""

from __future__ import annotations

import inspect
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpu_lance.embeddings import get_registry
from gpu_lance.embeddings.backbone import load_backbone
from gpu_lance.embeddings.calls import embed, prepare
from gpu_lance.embeddings.encoder import PackedEncoder
from gpu_lance.embeddings.huggingface import TransformersEmbeddingFunction
from gpu_lance.embeddings.plain_models import OwnForward, PackedTransformer
from gpu_lance.embeddings.tokens import LibraryTokenizer, TextTokenizer, load_plain_tokenizer
from gpu_lance.errors import BadInputError

CPU = torch.device("cpu")
create = TransformersEmbeddingFunction.create

PACKED = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert")
OTHERS = ("albert", "deberta-v2", "electra", "mpnet", "modernbert", "fnet", "t5", "bart", "gpt2")
TEXTS = [
    "the quick brown fox",
    "",
    "rows of a table",
    "Zürich naïve café, piñata! 3.14159",
    "a vector database keeps vectors near their rows and finds the nearest ones",
    "fox " * 30,
    "models read tokens; tokens make words",
    "the quick brown dog",
]


def alone(
    folder: Path, texts: list[str], pooling: str = "mean", dtype: torch.dtype = torch.float32
) -> np.ndarray:
    """What transformers gives, a text at a time and nothing padded."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=dtype).eval()
    if model.config.model_type == "t5":
        model = model.get_encoder()
    takes = inspect.signature(model.forward).parameters
    rows = []
    for text in texts:
        encoding = tokenizer(text, return_tensors="pt", truncation=True, max_length=64)
        inputs = {name: value for name, value in encoding.items() if name in takes}
        with torch.inference_mode():
            states = model(**inputs).last_hidden_state[0].float()
        rows.append({"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling])
    return torch.stack(rows).numpy()


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def sources(folder: Path, texts: list[str], **options: Any) -> np.ndarray:
    function = create(**{"name": str(folder), "device": "cpu", **options})
    return np.stack(function.compute_source_embeddings(texts))


# -- the same vectors as transformers and LanceDB


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("kind", [*PACKED, *OTHERS])
def test_it_gives_the_vectors_of_transformers(checkpoints, kind, pooling):
    folder = checkpoints.transformer(kind)
    wanted = alone(folder, TEXTS, pooling)
    function = create(name=str(folder), device="cpu", pooling=pooling)
    made = np.stack(function.compute_source_embeddings(TEXTS))
    assert made.dtype == np.float32
    assert cosines(made, wanted).min() >= 0.9999
    np.testing.assert_allclose(made, wanted, atol=2e-5)
    assert type(function._model(CPU)) is (PackedTransformer if kind in PACKED else OwnForward)
    (query,) = function.compute_query_embeddings(TEXTS[3])
    np.testing.assert_allclose(query, made[3], atol=2e-5)
    assert function.ndims() == made.shape[1] == 32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "mpnet", "t5", "gpt2"])
def test_half_precision_gives_the_vectors_of_transformers(checkpoints, kind, dtype):
    folder = checkpoints.transformer(kind)
    wanted = alone(folder, TEXTS, dtype=getattr(torch, dtype))
    assert cosines(sources(folder, TEXTS, dtype=dtype), wanted).min() >= 0.999


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "albert", "mpnet", "bart"])
def test_it_gives_the_vectors_of_lancedb(checkpoints, kind):
    from lancedb.embeddings.transformers import TransformersEmbeddingFunction as Theirs

    folder = checkpoints.transformer(kind)
    theirs = Theirs.create(name=str(folder))
    wanted = np.array(theirs.compute_source_embeddings(TEXTS), dtype=np.float32)
    np.testing.assert_allclose(sources(folder, TEXTS), wanted, atol=1e-5)
    assert create(name=str(folder)).ndims() == theirs.ndims()


def test_real_weights_give_the_vectors_of_lancedb():
    from lancedb.embeddings.transformers import TransformersEmbeddingFunction as Theirs

    function = create(name="all-MiniLM-L6-v2", device="cpu")  # the name of a package's model
    texts = [*TEXTS, "a question about vectors? " * 200]  # cut off at 512 tokens
    wanted = Theirs.create(name=str(function._locate().folder)).compute_source_embeddings(texts)
    made = np.stack(function.compute_source_embeddings(texts))
    np.testing.assert_allclose(made, np.array(wanted), atol=1e-5)
    assert np.abs(np.linalg.norm(made, axis=1) - 1).min() > 0.01


def test_the_tokenizers_limit_counts_as_in_lancedb(checkpoints, tmp_path):
    from lancedb.embeddings.transformers import TransformersEmbeddingFunction as Theirs

    folder = tmp_path / "model"
    shutil.copytree(checkpoints.transformer("bert"), folder)
    edit(folder / "tokenizer_config.json", model_max_length=12)
    wanted = Theirs.create(name=str(folder)).compute_source_embeddings(["fox " * 40, "fox " * 10])
    np.testing.assert_allclose(wanted[0], wanted[1], atol=1e-6)
    made = sources(folder, ["fox " * 40, "fox " * 10])
    np.testing.assert_allclose(made, np.array(wanted), atol=1e-5)


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


# -- other kinds of models


def test_last_takes_the_last_real_token_of_a_model_that_only_decodes(checkpoints):
    options = {"num_key_value_heads": 2}
    folder = checkpoints.transformer("llama", frame=False, **options)
    texts = [text for text in TEXTS if text]
    wanted = alone(folder, texts, "last")
    np.testing.assert_allclose(sources(folder, texts, pooling="last"), wanted, atol=2e-5)
    model = load_backbone(str(folder), torch.float32, name="m")
    tokens = load_plain_tokenizer(folder, None, 64, False)(texts)
    order = np.argsort(-tokens.lengths, kind="stable")
    padded = OwnForward(model, CPU, "m", pads=True)(tokens.take(order), "lasttoken")
    np.testing.assert_allclose(padded.numpy(), wanted[order], atol=2e-5)


def test_a_checkpoint_of_an_encoder_alone_will_do(checkpoints, tmp_path):
    from transformers import T5EncoderModel

    whole = checkpoints.transformer("t5")
    folder = tmp_path / "encoder"
    shutil.copytree(whole, folder)
    T5EncoderModel.from_pretrained(whole).save_pretrained(folder)
    np.testing.assert_allclose(sources(folder, TEXTS), sources(whole, TEXTS), atol=1e-6)


def test_colberts_checkpoint_is_its_backbone(checkpoints, tmp_path):
    from lancedb.embeddings.transformers import TransformersEmbeddingFunction as Theirs
    from safetensors.torch import load_file, save_file

    plain = checkpoints.transformer("bert")
    folder = tmp_path / "colbert"
    shutil.copytree(plain, folder)
    weights = load_file(plain / "model.safetensors")
    weights = {f"bert.{name}": weight for name, weight in weights.items() if "pooler" not in name}
    weights["linear.weight"] = torch.randn(8, 32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    edit(folder / "config.json", architectures=["HF_ColBERT"])
    made = sources(folder, TEXTS)
    np.testing.assert_allclose(made, sources(plain, TEXTS), atol=1e-6)
    wanted = Theirs.create(name=str(folder)).compute_source_embeddings(TEXTS)
    np.testing.assert_allclose(made, np.array(wanted), atol=1e-5)


def test_a_model_that_projects_its_last_state_says_so(checkpoints):
    folder = checkpoints.transformer("opt", ffn_dim=64, word_embed_proj_dim=16)
    made = sources(folder, TEXTS)
    assert create(name=str(folder)).ndims() == made.shape[1] == 16
    np.testing.assert_allclose(made, alone(folder, TEXTS), atol=2e-5)


def test_a_folder_of_sentence_transformers_is_the_model_in_it(checkpoints):
    folder = checkpoints.sentence("bert", pooling="cls", dense=16, normalize=True)
    made = sources(folder, TEXTS)
    assert made.shape == (len(TEXTS), 32)
    np.testing.assert_allclose(made, alone(folder, TEXTS), atol=2e-5)


def test_token_types_of_the_models_own_reach_it(checkpoints, tmp_path):
    folder = tmp_path / "xlnet"
    shutil.copytree(checkpoints.transformer("xlnet"), folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"]["single"] = [
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "</s>", "type_id": 0}},
        {"SpecialToken": {"id": "<s>", "type_id": 2}},
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    names = ["input_ids", "token_type_ids", "attention_mask"]
    edit(folder / "tokenizer_config.json", model_input_names=names, padding_side="left")
    function = create(name=str(folder), device="cpu")
    made = np.stack(function.compute_source_embeddings(TEXTS))
    np.testing.assert_allclose(made, alone(folder, TEXTS), atol=2e-5)
    tokenizer = function._tokenizer()
    assert type(tokenizer) is LibraryTokenizer
    assert set(tokenizer(TEXTS).more) == {"token_type_ids"}


def test_a_slow_tokenizer_will_do(checkpoints, tmp_path):
    from transformers import ByT5Tokenizer

    folder = tmp_path / "byt5"
    shutil.copytree(checkpoints.transformer("t5", vocab_size=400), folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    ByT5Tokenizer(model_max_length=50).save_pretrained(folder)
    function = create(name=str(folder), device="cpu")
    texts = [*TEXTS, "naïve " * 40]
    made = np.stack(function.compute_source_embeddings(texts))
    wanted = alone(folder, texts)
    np.testing.assert_allclose(made[:4], wanted[:4], atol=2e-5)
    assert type(function._tokenizer()) is LibraryTokenizer
    assert prepare(function, texts, "source").costs.max() == 50


# -- neither batches nor neighbours nor order change a vector


@pytest.mark.parametrize("kind", ["bert", "mpnet", "gpt2"])
def test_vectors_do_not_depend_on_batches_neighbours_or_order(checkpoints, kind):
    folder = checkpoints.transformer(kind)
    wanted = sources(folder, TEXTS)
    for batch_size in (1, 3):
        made = sources(folder, TEXTS, batch_size=batch_size)
        np.testing.assert_allclose(made, wanted, atol=5e-6)
    order = np.random.default_rng(1).permutation(len(TEXTS))
    shuffled = sources(folder, [TEXTS[i] for i in order])
    np.testing.assert_allclose(shuffled, wanted[order], atol=5e-6)
    np.testing.assert_array_equal(sources(folder, TEXTS), wanted)


def test_a_batch_that_does_not_fit_is_halved(checkpoints, monkeypatch):
    folder = checkpoints.transformer("bert")
    wanted = sources(folder, TEXTS)
    forward, sizes = PackedEncoder.__call__, []

    def tight(self: Any, tokens: Any, *args: Any) -> Any:
        sizes.append(len(tokens.lengths))
        if len(tokens.lengths) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, tokens, *args)

    monkeypatch.setattr(PackedEncoder, "__call__", tight)
    np.testing.assert_allclose(sources(folder, TEXTS), wanted, atol=5e-6)
    assert sizes[0] == len(TEXTS) and max(sizes[-3:]) <= 2


# -- items


@pytest.mark.parametrize("kind", ["bert", "t5", "gpt2"])
def test_a_text_of_100_000_characters_is_cut_off(checkpoints, kind):
    folder = checkpoints.transformer(kind)
    function = create(name=str(folder), device="cpu")
    text = "the quick brown fox jumps over the lazy dog " * 2300
    assert len(text) > 100_000
    limit = 4096 if kind == "t5" else 66
    assert prepare(function, [text, "fox"], "source").costs.tolist()[0] == limit
    started = time.process_time()
    long, short = function.compute_source_embeddings([text, "fox"])
    assert time.process_time() - started < 20
    assert np.isfinite(long).all()
    np.testing.assert_allclose(short, sources(folder, ["fox"])[0], atol=5e-6)
    if kind == "bert":
        np.testing.assert_allclose(long, sources(folder, [text[:2000]])[0], atol=5e-6)


def test_null_and_bad_items_have_no_vector(checkpoints):
    folder = checkpoints.transformer("bert")
    function = create(name=str(folder), device="cpu")
    made = function.compute_source_embeddings(["fox", None, chr(0xD800), 7, "", "fox"])
    assert [vector is not None for vector in made] == [True, False, False, False, True, True]
    np.testing.assert_allclose(made[0], made[5], atol=1e-6)
    np.testing.assert_allclose(made[4], alone(folder, [""])[0], atol=2e-5)
    with pytest.raises(BadInputError, match="Query 0 cannot be embedded: it holds a lone"):
        function.compute_query_embeddings(chr(0xD800))


def test_a_text_without_a_token_is_recorded(checkpoints):
    function = create(name=str(checkpoints.transformer("gpt2", frame=False)), device="cpu")
    result = embed(function, ["fox", "", "dog"], "source", ndims=32, device=CPU)
    assert result.valid.tolist() == [True, False, True]
    assert result.errors == {1: "it has no token, so this model has no vector for it"}


# -- arguments


def test_the_registry_gives_it_with_lancedbs_defaults():
    from lancedb.embeddings.transformers import TransformersEmbeddingFunction as Theirs

    cls = get_registry().get("huggingface")
    assert cls is TransformersEmbeddingFunction
    fields = Theirs.model_fields
    assert cls.model_fields["name"].default == fields["name"].default == "colbert-ir/colbertv2.0"
    assert cls.create().trust_remote_code is fields["trust_remote_code"].default is False
    given = {"pooling": "cls", "max_length": 9, "normalize": True}
    function = cls.create(name="m", device="cpu", show_progress_bar=False, dtype="fp32", **given)
    assert function.safe_model_dump() == {"name": "m", **given}


def test_normalize_scales_to_length_one(checkpoints):
    folder = checkpoints.transformer("bert")
    raw, scaled = sources(folder, TEXTS), sources(folder, TEXTS, normalize=True)
    np.testing.assert_allclose(scaled, raw / np.linalg.norm(raw, axis=1)[:, None], atol=1e-6)


def test_max_length_cuts_texts_off(checkpoints):
    folder = checkpoints.transformer("bert")
    made = sources(folder, ["fox " * 40, "fox " * 6], max_length=8)
    np.testing.assert_allclose(made[0], made[1], atol=1e-6)
    assert np.abs(made[0] - sources(folder, ["fox " * 40])[0]).max() > 0.01
    # one model for both
    full, short = (create(name=str(folder), device="cpu", max_length=n) for n in (None, 8))
    assert full._model(CPU) is short._model(CPU)
    assert isinstance(full._tokenizer(), TextTokenizer)
    assert full._tokenizer() is not short._tokenizer()


@pytest.mark.parametrize("wrong", [0, -1])
def test_max_length_is_at_least_one(wrong):
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        create(max_length=wrong)


@pytest.mark.parametrize(
    ("kind", "length", "message"),
    [
        ("bert", 67, "max_length is 67, but the model .* has positions for 66 tokens only"),
        ("roberta", 65, "max_length is 65, but the model .* has positions for 64 tokens only"),
        ("gpt2", 67, "max_length is 67, but the model .* has positions for 66 tokens only"),
        ("bert", 2, "max_length is 2, but the model puts 2 special tokens .* at least 3"),
    ],
)
def test_a_max_length_that_the_model_cannot_take_is_an_error(checkpoints, kind, length, message):
    with pytest.raises(BadInputError, match=message):
        sources(checkpoints.transformer(kind), ["fox"], max_length=length)


def test_an_unknown_pooling_is_an_error_that_names_the_choices():
    with pytest.raises(ValueError, match="'mean', 'cls' or 'last'"):
        create(pooling="max")
