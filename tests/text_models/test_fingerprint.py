"""What made a column's vectors: the same everywhere for the same model, and different otherwise."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from safetensors.torch import load_file, save_file

import gpu_lance
from gpu_lance.embeddings import EmbeddingFunctionConfig, TextEmbeddingFunction, get_registry
from gpu_lance.embeddings import fingerprint as fingerprints
from gpu_lance.embeddings.sentence_transformers import SentenceTransformerEmbeddings
from gpu_lance.errors import FingerprintError

create = SentenceTransformerEmbeddings.create
PROMPTS = {"query": "query: ", "document": "passage: "}


def fingerprint(name: Path | str, **options: Any) -> dict[str, str]:
    made = fingerprints.of(create(name=str(name), **options))
    assert made is not None
    return made


@pytest.fixture
def folder(tmp_path: Path, checkpoints: Any) -> Path:
    """A model's folder that a test may change."""
    copy = tmp_path / "model"
    shutil.copytree(checkpoints.sentence(dense=16), copy)
    return copy


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


# -- what it is made of


def test_it_says_what_decides_a_vector():
    made = fingerprint("all-MiniLM-L6-v2")
    assert made["provider"] == "sentence-transformers"
    assert made["model"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert (made["dims"], made["pooling"], made["normalize"]) == ("384", "mean", "true")
    assert made["weights"].startswith("sha256:")
    assert all(isinstance(value, str) for value in made.values())


def test_it_is_the_same_in_another_process(checkpoints):
    name = str(checkpoints.sentence(prompts=PROMPTS))
    code = (
        "import json, sys\n"
        "from gpu_lance.embeddings.sentence_transformers import SentenceTransformerEmbeddings\n"
        "made = SentenceTransformerEmbeddings.create(name=sys.argv[1]).fingerprint()\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "print(json.dumps(made))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, name], capture_output=True, text=True, check=True
    )
    assert json.loads(ran.stdout) == fingerprint(name)


@pytest.mark.parametrize(
    "session",
    [
        {"batch_size": 3},
        {"device": "cpu"},
        {"device": "cuda"},
        {"dtype": "bf16"},
        {"max_retries": 0},
    ],
    ids=str,
)
def test_the_session_is_no_part_of_it(folder, session):
    assert fingerprint(folder, **session) == fingerprint(folder)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"truncate_dim": 8}, "dims"),
        ({"normalize": False}, "normalize"),
        ({"prompts": {"query": "find: "}}, "prompts"),
        ({"prompts": {"document": "text: "}}, "prompts"),
    ],
    ids=str,
)
def test_arguments_that_change_vectors_change_it(folder, options, key):
    first, other = fingerprint(folder), fingerprint(folder, **options)
    assert {name for name in first if first[name] != other[name]} == {key}
    with pytest.raises(FingerprintError, match=f"they differ in {key}: "):
        fingerprints.check("vector", first, other)


def change_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][3, 3] += 0.5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def change_dense(folder: Path) -> None:
    weights = load_file(folder / "2_Dense" / "model.safetensors")
    save_file({name: w * 2 for name, w in weights.items()}, folder / "2_Dense/model.safetensors")


def change_tokenizer(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"]["lowercase"] = False
    (folder / "tokenizer.json").write_text(json.dumps(content))


CHANGES: dict[str, tuple[Any, str]] = {
    "weights": (change_weights, "weights"),
    "dense weights": (change_dense, "weights"),
    "tokenizer": (change_tokenizer, "tokenizer"),
    "pooling": (lambda f: edit(f / "1_Pooling/config.json", pooling_mode="cls"), "pooling"),
    "length": (
        lambda f: edit(f / "sentence_bert_config.json", max_seq_length=20),
        "max_seq_length",
    ),
    "case": (lambda f: edit(f / "sentence_bert_config.json", do_lower_case=True), "modules"),
    "activation": (
        lambda f: edit(
            f / "2_Dense/config.json", activation_function="torch.nn.modules.linear.Identity"
        ),
        "modules",
    ),
    "prompts": (
        lambda f: edit(f / "config_sentence_transformers.json", prompts=PROMPTS),
        "prompts",
    ),
}


@pytest.mark.parametrize(("change", "key"), CHANGES.values(), ids=CHANGES.keys())
def test_a_change_of_the_model_changes_it(folder, change, key):
    first = fingerprint(folder)
    change(folder)
    other = fingerprint(folder)
    assert {name for name in first if first[name] != other[name]} == {key}


@pytest.mark.parametrize(
    "change",
    [
        lambda f: (f / "README.md").write_text("new words"),
        lambda f: (f / "model.safetensors").touch(),
        lambda f: edit(f / "tokenizer.json", padding={"strategy": "BatchLongest"}),
        lambda f: (f / "onnx").mkdir() or (f / "onnx" / "model.bin").write_text("copy"),
    ],
    ids=["readme", "time", "padding", "onnx"],
)
def test_a_change_that_no_vector_shows_leaves_it(folder, change):
    first = fingerprint(folder)
    change(folder)
    assert fingerprint(folder) == first


def test_a_moved_folder_is_the_same_model(folder):
    first = fingerprint(folder)
    moved = folder.rename(folder.parent / "elsewhere")
    other = fingerprint(moved)
    assert (first["model"], other["model"]) == ("model", "elsewhere")
    fingerprints.check("vector", first, other)


def test_without_weights_the_names_count():
    one = {"model": "a", "weights": "", "revision": "1"}
    with pytest.raises(FingerprintError, match="they differ in model: 'a' and 'b', revision"):
        fingerprints.check("vector", one, {"model": "b", "weights": "", "revision": "2"})


@pytest.mark.parametrize("side", [None, {}, {"other": "part"}], ids=str)
def test_what_only_one_side_knows_is_not_compared(side):
    known = {"model": "a", "dims": "3"}
    fingerprints.check("vector", known, side)
    fingerprints.check("vector", side, known)


def test_a_users_class_has_none():
    class Mine(TextEmbeddingFunction):
        def ndims(self) -> int:
            return 1

        def generate_embeddings(self, texts: list[str], *args: Any, **kwargs: Any) -> list[Any]:
            return [[1.0] for _ in texts]

    assert fingerprints.of(Mine()) is None


# -- secrets


def test_what_a_variable_holds_is_not_in_it(folder):
    secret = "sk-planted-0123456789"
    hidden = folder.rename(folder.parent / "sk-planted-folder")
    registry = get_registry()
    registry.set_var("prompt", secret)
    registry.set_var("folder", str(hidden))
    made = fingerprint("$var:folder", prompts={"query": "$var:prompt"})
    assert "sk-planted" not in json.dumps(made)
    assert made["model"] == "$var:folder"
    # written out, it is still the same
    fingerprints.check("vector", made, fingerprint(hidden, prompts={"query": secret}))
    with pytest.raises(FingerprintError, match="they differ in prompts") as caught:
        fingerprints.check("vector", made, fingerprint(hidden, prompts={"query": "other"}))
    assert secret not in str(caught.value)


# -- in metadata


def test_metadata_holds_it_under_its_own_key():
    parts = {"vector": {"model": "ü", "dims": "3"}, "image": {"model": "b"}}
    metadata = fingerprints.to_metadata(parts)
    assert list(metadata) == [b"gpu_lance.fingerprints"]
    assert fingerprints.read(metadata) == parts
    assert (
        fingerprints.read({"gpu_lance.fingerprints": metadata[b"gpu_lance.fingerprints"]}) == parts
    )
    assert fingerprints.to_metadata({}) == {}
    assert fingerprints.read(None) == {}


@pytest.mark.parametrize("stored", [b"", b"{", b"[1]", b'{"v": 3}', b"\xff", b"[" * 100_000])
def test_metadata_of_another_form_is_ignored_with_a_warning(stored, caplog):
    assert fingerprints.read({b"gpu_lance.fingerprints": stored}) == {}
    assert "is not readable and ignored" in caplog.text


def make_table(folder: Path, where: Path) -> Any:
    function = create(name=str(folder), device="cpu")
    config = EmbeddingFunctionConfig(
        source_column="text", vector_column="vector", function=function
    )
    table = gpu_lance.connect(where).create_table(
        "t", [{"text": "the fox"}, {"text": "rows"}], embedding_functions=[config]
    )
    return table, function


def test_a_table_stores_it_beside_the_functions(folder, tmp_path):
    table, function = make_table(folder, tmp_path)
    metadata = table.schema.metadata
    assert json.loads(metadata[b"embedding_functions"])[0]["model"] == {"name": str(folder)}
    assert fingerprints.read(metadata) == {"vector": function.fingerprint()}


def test_another_model_in_the_same_place_is_refused_on_add_and_on_search(
    folder, tmp_path, checkpoints
):
    make_table(folder, tmp_path)
    shutil.rmtree(folder)
    shutil.copytree(checkpoints.sentence(dense=16, seed=1, normalize=True), folder)
    table = gpu_lance.connect(tmp_path).open_table("t")
    words = r"(?s)Column 'vector' holds vectors of 'model', .* is 'model'; .* modules: .*weights: "
    with pytest.raises(FingerprintError, match=words):
        table.add([{"text": "dog"}])
    with pytest.raises(FingerprintError, match=words):
        table.search("dog").to_list()
    with pytest.raises(FingerprintError, match=words):
        table.search(["dog", "fox"]).to_list()
    # nothing was written; what needs no model goes on
    assert table.count_rows() == 2
    assert len(table.search(np.ones(16, np.float32)).to_list()) == 2
    table.add([{"text": "by hand", "vector": [0.5] * 16}])
    assert table.count_rows() == 3


def test_a_model_saved_anew_is_refused_by_a_table_that_is_open(folder, tmp_path):
    make_table(folder, tmp_path)
    table = gpu_lance.connect(tmp_path).open_table("t")
    assert len(table.search("dog").to_list()) == 2
    table.add([{"text": "fox"}])
    change_weights(folder)
    with pytest.raises(FingerprintError, match="they differ in weights"):
        table.search("dog").to_list()
    with pytest.raises(FingerprintError, match="they differ in weights"):
        table.add([{"text": "owl"}])
    assert table.count_rows() == 3


def test_a_batch_size_of_another_session_is_accepted(folder, tmp_path):
    make_table(folder, tmp_path)
    table = gpu_lance.connect(tmp_path).open_table("t")
    table.add([{"text": "dog"}])
    assert table.search("dog").limit(1).to_list()[0]["text"] == "dog"


def test_an_empty_table_knows_its_model_before_the_first_row(folder, tmp_path):
    config = EmbeddingFunctionConfig(
        source_column="text", vector_column="vector", function=create(name=str(folder))
    )
    table = gpu_lance.connect(tmp_path).create_table(
        "e", schema=pa.schema({"text": pa.utf8()}), embedding_functions=[config]
    )
    assert fingerprints.read(table.schema.metadata)["vector"]["dims"] == "16"
    change_weights(folder)
    with pytest.raises(FingerprintError, match="they differ in weights"):
        gpu_lance.connect(tmp_path).open_table("e").add([{"text": "fox"}])
