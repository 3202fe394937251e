"""Model folders by strangers: their code does not run, and broken ones say what is broken."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpu_lance.embeddings import get_registry
from gpu_lance.embeddings.sentence_transformers import SentenceTransformerEmbeddings
from gpu_lance.errors import EmbeddingError, ModelNotFoundError, UntrustedModelError

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
from sentence_transformers.sentence_transformer.modules import Pooling
class Mine(Pooling):
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
    shutil.copytree(checkpoints.sentence(dense=16), copy)
    (copy / "mine.py").write_text(SOURCE.format(sentinel=str(sentinel)))
    return copy


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


def embed(folder: Path, **options: Any) -> np.ndarray:
    function = SentenceTransformerEmbeddings.create(name=str(folder), device="cpu", **options)
    return np.stack(function.compute_source_embeddings(["the quick fox", "rows"]))


def custom_model(folder: Path) -> None:
    auto = {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}
    edit(folder / "config.json", auto_map=auto, model_type="mine")


def custom_model_of_a_known_type(folder: Path) -> None:
    edit(folder / "config.json", auto_map={"AutoModel": "mine.Model"})


def custom_module(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "mine.Mine"
    (folder / "modules.json").write_text(json.dumps(modules))


def custom_tokenizer(folder: Path) -> None:
    edit(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "mine.Tokenizer"]},
        tokenizer_class="Tokenizer",
    )


@pytest.mark.parametrize("change", [custom_model, custom_module], ids=lambda f: f.__name__)
def test_a_model_with_its_own_code_is_refused_and_the_code_does_not_run(folder, sentinel, change):
    change(folder)
    with pytest.raises(UntrustedModelError, match=r"(?s)model.*Read that code.*trust_remote_code"):
        embed(folder)
    assert not sentinel.exists()
    # the sentinel can be written: the code runs for whoever allows it
    assert embed(folder, trust_remote_code=True).shape == (2, 16)
    assert sentinel.exists()


@pytest.mark.parametrize(
    "change", [custom_model_of_a_known_type, custom_tokenizer], ids=lambda f: f.__name__
)
def test_code_that_is_not_needed_does_not_run(folder, sentinel, change, checkpoints):
    change(folder)
    try:
        made = embed(folder)
    except UntrustedModelError:
        pass
    else:
        np.testing.assert_allclose(made, embed(checkpoints.sentence(dense=16)), atol=1e-5)
    assert not sentinel.exists()


def test_code_in_an_activation_function_does_not_run(folder, sentinel):
    edit(folder / "2_Dense" / "config.json", activation_function="mine.Model")
    with pytest.raises(UntrustedModelError, match="activation function 'mine.Model'"):
        embed(folder)
    edit(folder / "2_Dense" / "config.json", activation_function="torch.hub.load")
    with pytest.raises(UntrustedModelError, match="activation function 'torch.hub.load'"):
        embed(folder)
    assert not sentinel.exists()


def test_a_table_cannot_switch_on_a_models_code(folder, sentinel):
    custom_module(folder)
    function = SentenceTransformerEmbeddings.create(name=str(folder), trust_remote_code=True)
    assert "trust_remote_code" not in function.safe_model_dump()


# -- pickles


def as_pickle(folder: Path, content: Any) -> None:
    """Replace the transformer's weights by a pickle."""
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")


def test_weights_in_a_pickle_are_read_without_running_it(folder, checkpoints):
    from safetensors.torch import load_file

    as_pickle(folder, load_file(folder / "model.safetensors"))
    wanted = embed(checkpoints.sentence(dense=16))
    np.testing.assert_allclose(embed(folder), wanted, atol=1e-6)


@pytest.mark.parametrize("wrapped", [True, False], ids=["torch", "bare"])
@pytest.mark.parametrize("where", ["transformer", "dense"])
def test_code_in_a_pickle_does_not_run(folder, sentinel, where, wrapped):
    bomb = {"weight": Bomb(sentinel)}
    place = folder if where == "transformer" else folder / "2_Dense"
    (place / "model.safetensors").unlink()
    if wrapped:
        torch.save(bomb, place / "pytorch_model.bin")
    else:
        (place / "pytorch_model.bin").write_bytes(pickle.dumps(bomb, protocol=2))
    with pytest.raises(UntrustedModelError, match="a pickle that holds more than tensors"):
        embed(folder)
    assert not sentinel.exists()
    pickle.loads(pickle.dumps(bomb))
    assert sentinel.exists()


# -- broken folders


@pytest.mark.parametrize(
    "name", ["modules.json", "config.json", "sentence_bert_config.json", "1_Pooling/config.json"]
)
@pytest.mark.parametrize("content", ['{"half', '"a string"', "\xff\xfe"], ids=["half", "str", "b"])
def test_a_broken_configuration_is_named(folder, name, content):
    (folder / name).write_bytes(content.encode("latin-1"))
    with pytest.raises((EmbeddingError, ModelNotFoundError), match=name.rpartition("/")[2]):
        embed(folder)


def test_half_a_download_is_not_a_model(folder):
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(ModelNotFoundError, match="has no weights"):
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


def test_a_tokenizer_of_another_model_is_an_error(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["zebra"] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert embed(folder).shape == (2, 16)
    function = SentenceTransformerEmbeddings.create(name=str(folder), device="cpu")
    with pytest.raises(EmbeddingError, match="token 5000, but the model knows only"):
        function.compute_source_embeddings(["a zebra"])


def test_more_tokens_than_positions_are_cut_off(folder):
    edit(folder / "sentence_bert_config.json", max_seq_length=500)
    function = SentenceTransformerEmbeddings.create(name=str(folder), device="cpu")
    long, cut = function.compute_source_embeddings(["fox " * 300, "fox " * 64])
    np.testing.assert_allclose(long, cut, atol=1e-6)


def test_a_variable_named_by_a_table_is_not_told() -> None:
    registry = get_registry()
    registry.set_var("hidden", "sk-very-secret-value")
    function = SentenceTransformerEmbeddings.create(name="$var:hidden", revision="$var:hidden")
    with pytest.raises(ModelNotFoundError, match=r"\$var:hidden") as info:
        function.ndims()
    error: BaseException | None = info.value
    while error is not None:
        assert "sk-very-secret-value" not in str(error)
        error = error.__cause__ or error.__context__
