"""Late-interaction checkpoints that are broken, hostile, of another kind, or of older libraries."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import colbert_checkpoints as made
import pytest
import torch
from colbert_checkpoints import ID, TEXTS, cosines
from safetensors.torch import load_file, save_file
from strangers import Bomb, edit, plant

from gpu_lance.embeddings.colbert import ColbertEmbeddings
from gpu_lance.errors import EmbeddingError, UntrustedModelError
from gpu_lance.types import Side


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("colbert")
    stanford = made.stanford(root / "stanford")
    return {"stanford": stanford, "saved": made.saved_by_library(root / "saved", stanford)}


@pytest.fixture
def folder(tmp_path: Path, originals: dict[str, Path]) -> Path:
    """A copy of Stanford's format, to break."""
    return Path(shutil.copytree(originals["stanford"], tmp_path / "model"))


@pytest.fixture
def saved(tmp_path: Path, originals: dict[str, Path]) -> Path:
    """A copy of the library's format, to break."""
    return Path(shutil.copytree(originals["saved"], tmp_path / "saved"))


def edit_weights(folder: Path, drop: str) -> None:
    path = folder / "model.safetensors"
    state = {key: value for key, value in load_file(path).items() if not key.startswith(drop)}
    save_file(state, path, metadata={"format": "pt"})


def create(folder: Path, **options: Any) -> ColbertEmbeddings:
    return ColbertEmbeddings.create(name=str(folder), **{"device": "cpu", **options})


def embed(folder: Path, **options: Any) -> list[Any]:
    function = create(folder, **options)
    function.compute_query_embeddings(["row"])
    return function.compute_source_embeddings(["row", "the quick fox"])


# -- no trained projection


def test_a_projection_that_nothing_announces_is_told(folder):
    edit(folder / "config.json", architectures=["BertModel"])
    (folder / "artifact.metadata").unlink()
    with pytest.raises(EmbeddingError, match=r"'linear.weight'.*must name .*'HF_ColBERT'"):
        ColbertEmbeddings.create(name=str(folder)).ndims()


def refused(folder: Path) -> None:
    for ask in (lambda: create(folder).ndims(), lambda: embed(folder)):
        with pytest.raises(EmbeddingError, match=r"no trained projection.*'huggingface'"):
            ask()


def test_a_plain_transformer_is_refused(checkpoints):
    refused(checkpoints.transformer("bert"))


@pytest.mark.parametrize("dense", [None, 16])
def test_a_model_of_one_vector_is_refused(checkpoints, dense):
    refused(checkpoints.sentence("bert", dense=dense))


def test_a_checkpoint_without_its_projection_is_refused(folder):
    edit_weights(folder, "linear.weight")
    refused(folder)


def test_a_pickled_checkpoint_without_its_projection_is_refused(folder):
    state = load_file(folder / "model.safetensors")
    del state["linear.weight"]
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(folder)


def test_a_projection_of_another_transformer_is_refused(folder):
    state = load_file(folder / "model.safetensors")
    state["linear.weight"] = torch.zeros(made.WIDTH, 48)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EmbeddingError, match=r"shape \[16, 48\].*gives 32 numbers"):
        create(folder).ndims()


# -- weights that are missing are never made up


@pytest.mark.parametrize("part", ["bert.encoder.layer.1.output", "bert.embeddings.word"])
def test_a_missing_weight_is_an_error(folder, part):
    edit_weights(folder, part)
    with pytest.raises(EmbeddingError, match=part.removeprefix("bert.")):
        embed(folder)


def test_a_missing_weight_of_a_saved_model_is_an_error(saved):
    edit_weights(saved, "encoder.layer.0.attention")
    with pytest.raises(EmbeddingError, match=r"encoder\.layer\.0\.attention"):
        embed(saved)


def test_a_missing_weight_of_a_dense_layer_is_an_error(saved):
    save_file({"linear.bias": torch.zeros(16)}, saved / "1_Dense" / "model.safetensors")
    with pytest.raises(EmbeddingError, match="state_dict for Dense"):
        embed(saved)


def test_the_pooling_layer_may_be_missing(folder, originals):
    edit_weights(folder, "bert.pooler")
    assert cosines(embed(folder), embed(originals["stanford"])) >= 0.999999


# -- code of strangers


@pytest.mark.parametrize("wrapped", [True, False], ids=["torch", "bare"])
@pytest.mark.parametrize("ask", ["ndims", "embed"])
def test_code_in_a_pickle_does_not_run(folder, tmp_path, wrapped, ask):
    sentinel = tmp_path / "ran"
    plant(folder, {"linear.weight": torch.zeros(16, 32), "bert.x": Bomb(sentinel)}, wrapped)
    with pytest.raises(UntrustedModelError, match="a pickle that holds more than tensors"):
        create(folder).ndims() if ask == "ndims" else embed(folder)
    assert not sentinel.exists()


@pytest.mark.parametrize("kind", ["folder", "saved"])
def test_a_model_with_its_own_code_is_refused(request, tmp_path, kind):
    path, sentinel = request.getfixturevalue(kind), tmp_path / "ran"
    (path / "mine.py").write_text(f"open({str(sentinel)!r}, 'w')\n")
    edit(path / "config.json", auto_map={"AutoModel": "mine.Model", "AutoConfig": "mine.C"})
    with pytest.raises(UntrustedModelError, match="Read that code first"):
        embed(path)
    assert not sentinel.exists()


def test_code_in_an_activation_function_does_not_run(saved):
    edit(saved / "1_Dense" / "config.json", activation_function="mine.Model")
    with pytest.raises(UntrustedModelError, match=r"activation function 'mine\.Model'"):
        embed(saved)


def test_a_module_of_a_stranger_is_refused(saved):
    modules = json.loads((saved / "modules.json").read_text())
    modules[3]["type"] = "mine.Mine"
    (saved / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(EmbeddingError, match=r"cannot run \(Mine\)"):
        embed(saved)


# -- what the files say


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_maxlen": "32"}, r"'query_maxlen' = '32'; it must be a positive whole number"),
        ({"doc_maxlen": 0}, r"'doc_maxlen' = 0; it must be a positive whole number"),
        ({"query_maxlen": True}, r"'query_maxlen' = True"),
        ({"dim": 128}, r"vectors have 128 numbers, but its weights make 16"),
        ({"query_token_id": 1}, r"'query_token_id' = 1; it must be a token"),
        ({"doc_token_id": " "}, r"'doc_token_id' = ' '; it must be a token"),
        ({"doc_token_id": "[unused7]"}, r"'\[unused7\]', which its tokenizer does not have"),
        ({"mask_punctuation": "no"}, r"'mask_punctuation' = 'no'; it must be true or false"),
        ({"attend_to_mask_tokens": 1}, r"'attend_to_mask_tokens' = 1; it must be true or false"),
        ({"query_maxlen": 67}, r"has 66 positions, but queries are to have 67 tokens"),
    ],
)
def test_a_wrong_artifact_metadata_is_named(folder, change, message):
    edit(folder / "artifact.metadata", **change)
    with pytest.raises(EmbeddingError, match=message):
        embed(folder)


@pytest.mark.parametrize("content", ['{"half', '"a string"', "[1]", "\xff\xfe"])
def test_an_unreadable_artifact_metadata_is_named(folder, content):
    (folder / "artifact.metadata").write_bytes(content.encode("latin-1"))
    with pytest.raises(EmbeddingError, match=r"artifact\.metadata"):
        create(folder).ndims()


def test_without_artifact_metadata_stanfords_defaults_hold(folder):
    (folder / "artifact.metadata").unlink()
    data = create(folder).prepare(["row", "row " * 300], Side.QUERY).payload
    assert data.tokens.lengths.tolist() == [32, 32]
    assert data.attended.tolist() == [4, 32]
    # its 220 tokens of a document, or as many as there are positions
    data = create(folder).prepare(["row !", "row " * 300], Side.SOURCE).payload
    assert data.tokens.lengths.tolist() == [5, made.POSITIONS]
    assert data.counts.tolist() == [4, made.POSITIONS]


@pytest.mark.parametrize("value", [{"strategy": "some"}, {"strategy": "fixed"}, 3])
def test_a_wrong_query_expansion_is_named(saved, value):
    edit(saved / "sentence_bert_config.json", query_expansion=value)
    with pytest.raises(EmbeddingError, match="query_expansion"):
        embed(saved)


def test_a_damaged_file_of_weights_is_an_error(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(EmbeddingError, match="damaged"):
        embed(folder)


# -- other layouts


def test_weights_in_several_files(folder, originals):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts: dict[str, str] = {}
    for name, here in (("model-1.safetensors", True), ("model-2.safetensors", False)):
        part = {key: value for key, value in state.items() if (key < "bert.f") is here}
        save_file(part, folder / name, metadata={"format": "pt"})
        parts.update(dict.fromkeys(part, name))
    index = {"metadata": {}, "weight_map": parts}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert create(folder).ndims() == made.WIDTH
    assert cosines(embed(folder), embed(originals["stanford"])) >= 0.999999


def test_a_folder_of_pylate(saved, tmp_path):
    """PyLate wrote two modules, and the rest at the top of a configuration file."""
    modules = json.loads((saved / "modules.json").read_text())[:2]
    modules[1]["type"] = "pylate.models.Dense.Dense"
    (saved / "modules.json").write_text(json.dumps(modules))
    (saved / "sentence_bert_config.json").write_text('{"max_seq_length": 60}')
    edit(
        saved / "config_sentence_transformers.json",
        model_type="ColBERT",
        prompts={},
        query_prefix="[unused0] ",
        document_prefix="[unused1] ",
        query_length=10,
        document_length=15,
        attend_to_expansion_tokens=True,
    )
    function, library = create(saved), made.library_of(saved)
    assert cosines(function.compute_query_embeddings(TEXTS), library.encode_query(TEXTS)) >= 0.9999
    documents = function.compute_source_embeddings(TEXTS)
    assert cosines(documents, library.encode_document(TEXTS)) >= 0.9999
    data = function.prepare(["row"], Side.QUERY).payload
    wanted = ["[CLS]", "[unused0]", "row", "[SEP]", *["[MASK]"] * 6]
    assert data.tokens.ids.tolist() == [ID[token] for token in wanted]


def test_queries_that_are_not_filled_up(saved):
    edit(saved / "sentence_bert_config.json", query_expansion=..., query_length=6)
    function, library = create(saved), made.library_of(saved)
    queries = function.compute_query_embeddings(TEXTS)
    assert cosines(queries, library.encode_query(TEXTS)) >= 0.9999
    assert [len(query) for query in queries[:3]] == [6, 3, 6]
