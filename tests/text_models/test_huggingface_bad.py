"""Strangers' folders for huggingface: no code runs, nothing is made up, errors are clear."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gpu_lance.embeddings import get_registry
from gpu_lance.embeddings.huggingface import TransformersEmbeddingFunction
from gpu_lance.embeddings.locate import locate
from gpu_lance.embeddings.sentence_transformers import SentenceTransformerEmbeddings
from gpu_lance.errors import BadInputError, EmbeddingError, ModelNotFoundError, UntrustedModelError

SOURCE = """
from pathlib import Path
Path({sentinel!r}).write_text("ran")
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
class Config(BertConfig):
    model_type = "mine"
class Model(BertModel):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


class Bomb:
    """What a pickle can do: write a file when it is read."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return (Path.touch, (self.sentinel,))


@pytest.fixture
def sentinel(tmp_path: Path) -> Path:
    return tmp_path / "ran"


@pytest.fixture
def folder(tmp_path: Path, checkpoints: Any, sentinel: Path) -> Path:
    """A good model beside code that is not asked for."""
    copy = tmp_path / "model"
    shutil.copytree(checkpoints.transformer("bert"), copy)
    (copy / "mine.py").write_text(SOURCE.format(sentinel=str(sentinel)))
    return copy


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


def embed(folder: Path, **options: Any) -> np.ndarray:
    function = TransformersEmbeddingFunction.create(name=str(folder), device="cpu", **options)
    return np.stack(function.compute_source_embeddings(["the quick fox", "rows"]))


# -- code


def test_a_model_with_its_own_code_is_refused_and_the_code_does_not_run(
    folder, sentinel, checkpoints
):
    auto = {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}
    edit(folder / "config.json", auto_map=auto, model_type="mine")
    with pytest.raises(UntrustedModelError, match=r"(?s)model.*Read that code.*trust_remote_code"):
        embed(folder)
    assert not sentinel.exists()
    # the sentinel can be written: the code runs for whoever allows it
    made = embed(folder, trust_remote_code=True)
    assert sentinel.exists()
    np.testing.assert_allclose(made, embed(checkpoints.transformer("bert")), atol=1e-5)


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_code_that_is_not_needed_does_not_run(folder, sentinel, checkpoints, part):
    if part == "model":
        edit(folder / "config.json", auto_map={"AutoModel": "mine.Model"})
    else:
        auto = {"AutoTokenizer": [None, "mine.Tokenizer"]}
        edit(folder / "tokenizer_config.json", auto_map=auto, tokenizer_class="Tokenizer")
    try:
        made = embed(folder)
    except UntrustedModelError:
        pass
    else:
        np.testing.assert_allclose(made, embed(checkpoints.transformer("bert")), atol=1e-5)
    assert not sentinel.exists()


def test_a_table_cannot_switch_on_a_models_code(folder):
    function = TransformersEmbeddingFunction.create(name=str(folder), trust_remote_code=True)
    assert function.safe_model_dump() == {"name": str(folder)}


def test_weights_in_a_pickle_are_read_without_running_it(folder, checkpoints):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    np.testing.assert_allclose(embed(folder), embed(checkpoints.transformer("bert")), atol=1e-6)


@pytest.mark.parametrize("wrapped", [True, False], ids=["torch", "bare"])
def test_code_in_a_pickle_does_not_run(folder, sentinel, wrapped):
    bomb = {"embeddings.word_embeddings.weight": Bomb(sentinel)}
    (folder / "model.safetensors").unlink()
    if wrapped:
        torch.save(bomb, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(bomb, protocol=2))
    with pytest.raises(UntrustedModelError, match="a pickle that holds more than tensors"):
        embed(folder)
    assert not sentinel.exists()
    pickle.loads(pickle.dumps(bomb))
    assert sentinel.exists()


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


# -- broken folders


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ['{"half', '"a string"', "\xff\xfe"], ids=["half", "str", "b"])
def test_a_broken_configuration_is_named(folder, name, content):
    (folder / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(EmbeddingError, match=name):
        embed(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_broken_file_is_an_error_that_names_the_model(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:300])
    with pytest.raises(EmbeddingError, match=r"(?s)model .*cannot be loaded"):
        embed(folder)


def test_weights_of_another_shape_are_an_error_that_names_the_model(folder):
    edit(folder / "config.json", hidden_size=64)
    with pytest.raises(EmbeddingError, match=r"(?s)model .*cannot be loaded"):
        embed(folder)


def test_half_a_download_is_not_a_model(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="has no weights"):
        embed(folder)


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
