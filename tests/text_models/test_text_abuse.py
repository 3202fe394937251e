"""Checkpoints that make no sense, by every provider of text that runs here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import colbert_checkpoints as late
import numpy as np
import pytest

from gpu_lance.embeddings.colbert import ColbertEmbeddings
from gpu_lance.embeddings.huggingface import TransformersEmbeddingFunction
from gpu_lance.embeddings.model_folder import safetensors_header
from gpu_lance.embeddings.plain_models import OwnForward
from gpu_lance.embeddings.sentence_transformers import SentenceTransformerEmbeddings
from gpu_lance.embeddings.tokens import Tokens
from gpu_lance.errors import EmbeddingError, ModelNotFoundError

torch = pytest.importorskip("torch")

CPU = torch.device("cpu")
HUGGINGFACE, SENTENCES = TransformersEmbeddingFunction, SentenceTransformerEmbeddings
POOLING, DENSE = "1_Pooling/config.json", "2_Dense/config.json"
LIBRARY, FIRST = "config_sentence_transformers.json", "sentence_bert_config.json"


def changed(source: Path, target: Path, file: str, **changes: Any) -> Path:
    """A copy of a model's folder with other values in one of its JSON files."""
    shutil.copytree(source, target)
    content = json.loads((target / file).read_text())
    (target / file).write_text(json.dumps({**content, **changes}))
    return target


@pytest.mark.parametrize(
    ("provider", "file", "key", "value"),
    [
        (HUGGINGFACE, "config.json", "hidden_size", -1),
        (HUGGINGFACE, "config.json", "hidden_size", 0),
        (HUGGINGFACE, "config.json", "hidden_size", 10**12),
        (HUGGINGFACE, "config.json", "model_type", ["bert"]),
        (HUGGINGFACE, "tokenizer_config.json", "model_max_length", 0),
        (SENTENCES, POOLING, "pooling_mode", 1.5),
        (SENTENCES, DENSE, "out_features", None),
        (SENTENCES, DENSE, "out_features", -1),
        (SENTENCES, DENSE, "out_features", "x"),
        (SENTENCES, DENSE, "module_input_name", "x"),
        (SENTENCES, DENSE, "module_input_name", [1]),
        (SENTENCES, LIBRARY, "prompts", ["query: "]),
        (SENTENCES, FIRST, "max_seq_length", 1),
        (SENTENCES, FIRST, "max_seq_length", "x"),
        (SENTENCES, FIRST, "module_output_name", "x"),
        (SENTENCES, "tokenizer_config.json", "model_max_length", 1),
    ],
)  # fmt: skip
def test_a_value_that_makes_no_sense_is_an_error_of_ours(
    checkpoints, tmp_path, provider, file, key, value
):
    source = checkpoints.transformer("bert")
    if provider is SENTENCES:
        source = checkpoints.sentence("bert", dense=16)
    folder = changed(source, tmp_path / "model", file, **{key: value})
    if key == "model_max_length" and provider is SENTENCES:
        (folder / FIRST).write_text("{}")
    with pytest.raises((EmbeddingError, ValueError), match=r"model|max_length") as caught:
        provider.create(name=str(folder), device="cpu").compute_source_embeddings(["fox " * 99])
    assert type(caught.value).__module__ == "gpu_lance.errors"


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_a_tokenizer_of_more_tokens_than_the_model_knows(checkpoints, tmp_path, kind):
    from safetensors.torch import load_file, save_file

    for provider, source in (
        (HUGGINGFACE, checkpoints.transformer(kind)),
        (SENTENCES, checkpoints.sentence(kind)),
        (ColbertEmbeddings, late.of_transformer(tmp_path / "late", checkpoints.transformer(kind))),
    ):
        folder = changed(source, tmp_path / provider.__name__, "config.json", vocab_size=20)
        weights = load_file(folder / "model.safetensors")
        weights = {
            name: weight[:20].contiguous() if "word" in name or "tok_emb" in name else weight
            for name, weight in weights.items()
        }
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        function = provider.create(name=str(folder), device="cpu")
        with pytest.raises(EmbeddingError, match=r"knows only 20; the files of two models"):
            function.compute_source_embeddings(["the quick fox jumps"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight_map": {"a": 5}}, "has no file '5', a part of the weights"),
        ({"weight_map": ["a"]}, "lists no weights"),
    ],
)
def test_a_list_of_weights_that_makes_no_sense(checkpoints, tmp_path, content, message):
    folder = tmp_path / "model"
    shutil.copytree(checkpoints.transformer("bert"), folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(ModelNotFoundError, match=message):
        HUGGINGFACE.create(name=str(folder), device="cpu").ndims()


def test_a_header_of_weights_that_is_nested_too_deep_holds_nothing(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((200_000).to_bytes(8, "little") + b"[" * 200_000)
    assert safetensors_header(path) == {}


def test_queries_are_not_filled_up_without_end(checkpoints, tmp_path):
    # its positions are rotary, so they limit nothing
    source = late.of_transformer(tmp_path / "late", checkpoints.transformer("modernbert"))
    expansion = {"strategy": "fixed", "length": 10**9, "attend": True}
    folder = changed(source, tmp_path / "model", FIRST, query_expansion=expansion)
    with pytest.raises(EmbeddingError, match=r"query_expansion.*up to 65,536"):
        ColbertEmbeddings.create(name=str(folder), device="cpu").compute_query_embeddings("fox")


@pytest.mark.parametrize("kind", ["modernbert", "electra"])
def test_padding_changes_no_token_and_hides_what_is_not_attended(checkpoints, kind):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(str(checkpoints.transformer(kind))).eval()
    lengths, attended = np.array([9, 9, 4, 4, 1]), np.array([9, 5, 4, 2, 1])
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    ids = np.random.default_rng(0).integers(5, 60, lengths.sum()).astype(np.int32)
    tokens = Tokens(ids, offsets)
    for seen in (None, attended):
        with torch.inference_mode():
            padded = OwnForward(model, CPU, "m", pads=True).states(tokens, seen)
            grouped = OwnForward(model, CPU, "m", pads=False).states(tokens, seen)
            alone = []
            for i, part in enumerate(np.split(ids.astype(np.int64), offsets[1:-1])):
                mask = np.arange(len(part)) < (lengths if seen is None else seen)[i]
                inputs = {"input_ids": part, "attention_mask": mask.astype(np.int64)}
                given = {name: torch.from_numpy(values)[None] for name, values in inputs.items()}
                alone.append(model(**given).last_hidden_state[0])
        wanted = torch.cat(alone)
        torch.testing.assert_close(grouped, wanted, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(padded, wanted, atol=2e-5, rtol=1e-4)
