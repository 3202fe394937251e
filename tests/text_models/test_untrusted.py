"""Model folders by strangers: their code does not run, and broken ones say what is broken."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from strangers import SOURCE, Bomb, edit, plant

from gpu_lance.embeddings import get_registry
from gpu_lance.embeddings.huggingface import TransformersEmbeddingFunction
from gpu_lance.embeddings.sentence_transformers import SentenceTransformerEmbeddings
from gpu_lance.errors import EmbeddingError, ModelNotFoundError, UntrustedModelError

PROVIDERS = {
    "huggingface": TransformersEmbeddingFunction,
    "sentence-transformers": SentenceTransformerEmbeddings,
}
BOTH = pytest.mark.parametrize("provider", list(PROVIDERS))


@pytest.fixture
def provider() -> str:
    """Of a test that is about one of them."""
    return "sentence-transformers"


@pytest.fixture
def sentinel(tmp_path: Path) -> Path:
    return tmp_path / "ran"


@pytest.fixture
def good(provider: str, checkpoints: Any) -> Path:
    """A model of that provider."""
    if provider == "huggingface":
        return checkpoints.transformer("bert")
    return checkpoints.sentence(dense=16)


@pytest.fixture
def folder(tmp_path: Path, good: Path, sentinel: Path) -> Path:
    """A copy of it beside code that is not asked for."""
    copy = tmp_path / "model"
    shutil.copytree(good, copy)
    (copy / "mine.py").write_text(SOURCE.format(sentinel=str(sentinel)))
    return copy


@pytest.fixture
def embed(provider: str) -> Any:
    def embed(folder: Path, **options: Any) -> np.ndarray:
        function = PROVIDERS[provider].create(name=str(folder), device="cpu", **options)
        return np.stack(function.compute_source_embeddings(["the quick fox", "rows"]))

    return embed


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


def cases(both: list[Any], sentences: list[Any]) -> Any:
    """Cases of both providers, and those that only a folder of modules has."""
    found = [(provider, case) for case in both for provider in PROVIDERS]
    return [*found, *(("sentence-transformers", case) for case in sentences)]


@pytest.mark.parametrize(("provider", "change"), cases([custom_model], [custom_module]))
def test_a_model_with_its_own_code_is_refused_and_the_code_does_not_run(
    embed, folder, good, sentinel, change
):
    change(folder)
    with pytest.raises(UntrustedModelError, match=r"(?s)model.*Read that code.*trust_remote_code"):
        embed(folder)
    assert not sentinel.exists()
    # the sentinel can be written: the code runs for whoever allows it
    made = embed(folder, trust_remote_code=True)
    assert sentinel.exists()
    np.testing.assert_allclose(made, embed(good), atol=1e-5)


@BOTH
@pytest.mark.parametrize("change", [custom_model_of_a_known_type, custom_tokenizer])
def test_code_that_is_not_needed_does_not_run(embed, folder, good, sentinel, change):
    change(folder)
    try:
        made = embed(folder)
    except UntrustedModelError:
        pass
    else:
        np.testing.assert_allclose(made, embed(good), atol=1e-5)
    assert not sentinel.exists()


def test_code_in_an_activation_function_does_not_run(embed, folder, sentinel):
    edit(folder / "2_Dense" / "config.json", activation_function="mine.Model")
    with pytest.raises(UntrustedModelError, match="activation function 'mine.Model'"):
        embed(folder)
    edit(folder / "2_Dense" / "config.json", activation_function="torch.hub.load")
    with pytest.raises(UntrustedModelError, match="activation function 'torch.hub.load'"):
        embed(folder)
    assert not sentinel.exists()


@BOTH
def test_a_table_cannot_switch_on_a_models_code(folder, provider):
    function = PROVIDERS[provider].create(name=str(folder), trust_remote_code=True)
    assert function.safe_model_dump() == {"name": str(folder)}


# -- pickles


@BOTH
def test_weights_in_a_pickle_are_read_without_running_it(embed, folder, good):
    from safetensors.torch import load_file

    plant(folder, load_file(folder / "model.safetensors"))
    np.testing.assert_allclose(embed(folder), embed(good), atol=1e-6)


@pytest.mark.parametrize("wrapped", [True, False], ids=["torch", "bare"])
@pytest.mark.parametrize(("provider", "place"), cases(["."], ["2_Dense"]))
def test_code_in_a_pickle_does_not_run(embed, folder, sentinel, place, wrapped):
    bomb = {"weight": Bomb(sentinel)}
    plant(folder / place, bomb, wrapped)
    with pytest.raises(UntrustedModelError, match="a pickle that holds more than tensors"):
        embed(folder)
    assert not sentinel.exists()
    pickle.loads(pickle.dumps(bomb))
    assert sentinel.exists()


# -- broken folders


@pytest.mark.parametrize(
    ("provider", "name"),
    [
        *cases(["config.json"], ["modules.json", "sentence_bert_config.json"]),
        ("sentence-transformers", "1_Pooling/config.json"),
        ("huggingface", "tokenizer_config.json"),
    ],
)
@pytest.mark.parametrize("content", ['{"half', '"a string"', "\xff\xfe"], ids=["half", "str", "b"])
def test_a_broken_configuration_is_named(embed, folder, name, content):
    (folder / name).write_bytes(content.encode("latin-1"))
    with pytest.raises((EmbeddingError, ModelNotFoundError), match=name.rpartition("/")[2]):
        embed(folder)


@BOTH
def test_half_a_download_is_not_a_model(embed, folder):
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(ModelNotFoundError, match="has no weights"):
        embed(folder)


@BOTH
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_broken_file_is_an_error_that_names_the_model(embed, folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:300])
    with pytest.raises(EmbeddingError, match=r"(?s)model .*cannot be loaded"):
        embed(folder)


@BOTH
def test_weights_of_another_shape_are_an_error_that_names_the_model(embed, folder):
    edit(folder / "config.json", hidden_size=64)
    with pytest.raises(EmbeddingError, match=r"(?s)model .*cannot be loaded"):
        embed(folder)


def test_a_tokenizer_of_another_model_is_an_error(embed, folder):
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
