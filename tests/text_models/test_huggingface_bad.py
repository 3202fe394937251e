"""Folders that huggingface cannot use: nothing is made up, and errors are clear."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from strangers import edit

from gpu_lance.embeddings import get_registry
from gpu_lance.embeddings.huggingface import TransformersEmbeddingFunction
from gpu_lance.embeddings.locate import locate
from gpu_lance.embeddings.sentence_transformers import SentenceTransformerEmbeddings
from gpu_lance.errors import BadInputError, EmbeddingError


@pytest.fixture
def folder(tmp_path: Path, checkpoints: Any) -> Path:
    """A copy of a good model."""
    return shutil.copytree(checkpoints.transformer("bert"), tmp_path / "model")


def embed(folder: Path, **options: Any) -> np.ndarray:
    function = TransformersEmbeddingFunction.create(name=str(folder), device="cpu", **options)
    return np.stack(function.compute_source_embeddings(["the quick fox", "rows"]))


# -- weights that are not there


def without(folder: Path, *parts: str) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {name: w for name, w in weights.items() if not any(part in name for part in parts)}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("kind", ["bert", "mpnet"])
def test_missing_weights_are_an_error_and_not_made_up(checkpoints, tmp_path, kind):
    folder = tmp_path / "half"
    shutil.copytree(checkpoints.transformer(kind), folder)
    without(folder, "layer.1.")
    message = r"(?s)its files lack \d+ weights of a \w+Model, such as 'encoder.layer.1"
    with pytest.raises(EmbeddingError, match=message):
        embed(folder)


def test_weights_of_another_architecture_are_an_error(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({f"mine.{name}": w for name, w in weights.items()}, folder / "model.safetensors")
    with pytest.raises(EmbeddingError, match="its files lack"):
        embed(folder)


def test_a_pooler_is_not_needed(folder, checkpoints):
    without(folder, "pooler")
    np.testing.assert_allclose(embed(folder), embed(checkpoints.transformer("bert")), atol=1e-6)


def test_missing_weights_are_an_error_for_sentence_transformers_too(checkpoints, tmp_path):
    folder = tmp_path / "half"
    shutil.copytree(checkpoints.sentence("bert"), folder)
    without(folder, "layer.1.")
    function = SentenceTransformerEmbeddings.create(name=str(folder), device="cpu")
    with pytest.raises(EmbeddingError, match="its files lack"):
        function.compute_source_embeddings(["fox"])


# -- models of another kind


def test_a_folder_of_modules_without_a_transformer_says_what_to_use(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules
    from tokenizers import Tokenizer, models

    static = modules.StaticEmbedding(Tokenizer(models.WordLevel({"a": 0}, "a")), embedding_dim=4)
    library = SentenceTransformer(modules=[static], device="cpu")
    library.save(str(tmp_path / "static"), create_model_card=False)
    with pytest.raises(EmbeddingError, match="use the provider 'sentence-transformers'"):
        embed(tmp_path / "static")


def test_a_model_of_images_is_an_error(tmp_path, checkpoints):
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    small |= {"intermediate_size": 64, "projection_dim": 16}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 200, "max_position_embeddings": 66},
        vision_config={**small, "image_size": 8, "patch_size": 4},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    AutoTokenizer.from_pretrained(checkpoints.transformer("bert")).save_pretrained(
        tmp_path / "clip"
    )
    with pytest.raises(EmbeddingError, match="cannot embed a text by itself"):
        embed(tmp_path / "clip")


# -- names


def test_a_name_without_an_owner_means_the_plain_name_first(tmp_path, monkeypatch, checkpoints):
    import huggingface_hub.constants as hub

    plain = checkpoints.transformer("bert")
    for repo in ("models--twice", "models--sentence-transformers--twice"):
        snapshot = tmp_path / repo / "snapshots" / ("0" * 40)
        snapshot.parent.mkdir(parents=True)
        shutil.copytree(plain, snapshot)
        (tmp_path / repo / "refs").mkdir()
        (tmp_path / repo / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    options = {"organization": "sentence-transformers"}
    assert locate("twice", **options).model == "sentence-transformers/twice"
    assert locate("twice", **options, organization_first=False).model == "twice"
    assert TransformersEmbeddingFunction(name="twice")._locate().model == "twice"
    found = TransformersEmbeddingFunction(name="all-MiniLM-L6-v2")._locate()
    assert found.model == "sentence-transformers/all-MiniLM-L6-v2"


def test_a_variable_named_by_a_table_is_not_told(checkpoints, tmp_path) -> None:
    registry = get_registry()
    secret = tmp_path / "very-secret-value"
    shutil.copytree(checkpoints.transformer("bert"), secret)
    registry.set_var("hidden", str(secret))
    function = TransformersEmbeddingFunction.create(name="$var:hidden", max_length=2, device="cpu")
    assert "secret" not in json.dumps(function.fingerprint())
    with pytest.raises(BadInputError, match="max_length") as info:
        function.compute_source_embeddings(["fox"])
    edit(secret / "config.json", hidden_size=64)
    broken = TransformersEmbeddingFunction.create(name="$var:hidden", device="cpu")
    with pytest.raises(EmbeddingError, match=r"\$var:hidden") as other:
        broken.compute_source_embeddings(["fox"])
    for error in (info.value, other.value):
        assert "secret" not in str(error)
