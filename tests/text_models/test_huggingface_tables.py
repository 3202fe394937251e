"""Tables of huggingface: shared with LanceDB, and never of two models at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pytest
from lancedb.embeddings import get_registry as their_registry
from lancedb.pydantic import LanceModel as TheirModel
from lancedb.pydantic import Vector as TheirVector
from safetensors.torch import load_file, save_file

import gpu_lance
from gpu_lance.embeddings import fingerprint as fingerprints
from gpu_lance.embeddings import get_registry
from gpu_lance.embeddings.loading import MODELS
from gpu_lance.errors import FingerprintError
from gpu_lance.pydantic import LanceModel, Vector

TEXTS = ["the quick brown fox", "rows of a table", "models read tokens", "the lazy dog"]


def create(folder: Path | str, **options: Any) -> Any:
    return get_registry().get("huggingface").create(name=str(folder), device="cpu", **options)


def schema_of(function: Any) -> type[LanceModel]:
    class Schema(LanceModel):
        text: str | None = function.SourceField()
        vector: Vector(function.ndims()) = function.VectorField()  # type: ignore[valid-type]

    return Schema


def their_schema(function: Any) -> type[TheirModel]:
    class Schema(TheirModel):
        text: str = function.SourceField()
        vector: TheirVector(function.ndims()) = function.VectorField()  # type: ignore[valid-type]

    return Schema


def vectors(table: Any) -> np.ndarray:
    return np.array(table.to_arrow().column("vector").to_pylist(), dtype=np.float32)


@pytest.mark.parametrize("kind", ["bert", "mpnet"])
def test_lancedb_opens_our_table_searches_it_and_adds_to_it(checkpoints, tmp_path, kind):
    folder = checkpoints.transformer(kind)
    db = gpu_lance.connect(tmp_path)
    ours = db.create_table("t", schema=schema_of(create(folder, show_progress_bar=False)))
    ours.add([{"text": text} for text in TEXTS[:2]])
    stored = json.loads(ours.schema.metadata[b"embedding_functions"])
    assert (stored[0]["name"], stored[0]["model"]) == ("huggingface", {"name": str(folder)})

    theirs = lancedb.connect(tmp_path).open_table("t")
    theirs.add([{"text": text} for text in TEXTS[2:]])
    for text in TEXTS:
        (found,) = theirs.search(text).limit(1).to_list()
        assert found["text"] == text and found["_distance"] < 1e-6
        (found,) = ours.search(text).limit(1).to_list()
        assert found["text"] == text and found["_distance"] < 1e-6


@pytest.mark.parametrize("kind", ["bert", "mpnet"])
def test_we_open_lancedbs_table_search_it_and_add_to_it(checkpoints, tmp_path, kind):
    function = their_registry().get("huggingface").create(name=str(checkpoints.transformer(kind)))
    theirs = lancedb.connect(tmp_path).create_table("t", schema=their_schema(function))
    theirs.add([{"text": text} for text in TEXTS])
    ours = gpu_lance.connect(tmp_path, device="cpu").open_table("t")
    ours.add([{"text": text} for text in TEXTS])
    made = vectors(ours)
    np.testing.assert_allclose(made[4:], made[:4], atol=1e-5)
    for text in TEXTS:
        found = ours.search(text).limit(2).to_list()
        assert [row["text"] for row in found] == [text, text]
    theirs.checkout_latest()
    assert theirs.search(TEXTS[0]).limit(1).to_list()[0]["text"] == TEXTS[0]


def test_adds_and_searches_load_the_model_once(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(MODELS, "_models", {})
    monkeypatch.setattr(MODELS, "loads", [])
    db = gpu_lance.connect(tmp_path)
    table = db.create_table("t", schema=schema_of(create(checkpoints.transformer("bert"))))
    assert MODELS.loads == []
    for text in TEXTS:
        table.add([{"text": text}, {"text": None}])
    assert table.search(TEXTS[0]).limit(1).to_list()[0]["text"] == TEXTS[0]
    assert gpu_lance.connect(tmp_path).open_table("t").count_rows() == 8
    assert [load.device for load in MODELS.loads] == ["host", "cpu"]
    assert vectors(table.search().where("text is not null")).shape == (4, 32)


# -- what made the vectors


def test_a_fingerprint_says_what_decides_a_vector():
    made = create("all-MiniLM-L6-v2").fingerprint()
    assert made["provider"] == "huggingface"
    assert made["model"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert (made["dims"], made["pooling"], made["normalize"]) == ("384", "mean", "false")
    assert made["max_length"] == "512"
    assert made["weights"].startswith("sha256:") and made["tokenizer"].startswith("sha256:")


def change_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][3, 3] += 0.5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def change_tokenizer(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"]["lowercase"] = False
    (folder / "tokenizer.json").write_text(json.dumps(content))


def change_limit(folder: Path) -> None:
    content = json.loads((folder / "tokenizer_config.json").read_text())
    content["model_max_length"] = 20
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (change_weights, "weights"),
        (change_tokenizer, "tokenizer"),
        (change_limit, "max_length"),
        ({"pooling": "cls"}, "pooling"),
        ({"normalize": True}, "normalize"),
        ({"max_length": 20}, "max_length"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_changes_vectors_changes_it(checkpoints, tmp_path, change, key):
    folder = tmp_path / "model"
    shutil.copytree(checkpoints.transformer("bert"), folder)
    first = create(folder).fingerprint()
    options = change if isinstance(change, dict) else {}
    if not isinstance(change, dict):
        change(folder)
    other = create(folder, **options).fingerprint()
    assert {name for name in first if first[name] != other[name]} == {key}


def test_a_moved_folder_and_modules_beside_the_model_change_nothing(checkpoints, tmp_path):
    plain = checkpoints.transformer("bert")
    shutil.copytree(plain, tmp_path / "moved")
    dense = tmp_path / "moved" / "2_Dense"
    dense.mkdir()
    save_file(load_file(plain / "model.safetensors"), dense / "model.safetensors")
    first, other = create(plain).fingerprint(), create(tmp_path / "moved").fingerprint()
    assert first["weights"] == other["weights"]
    fingerprints.check("vector", first, other)


def test_vectors_of_two_models_do_not_mix(checkpoints, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoints.transformer("bert"), folder)
    table = gpu_lance.connect(tmp_path).create_table("t", schema=schema_of(create(folder)))
    table.add([{"text": TEXTS[0]}])
    shutil.rmtree(folder)
    shutil.copytree(checkpoints.transformer("bert", seed=1), folder)
    opened = gpu_lance.connect(tmp_path).open_table("t")
    for use in (lambda: opened.add([{"text": "x"}]), lambda: opened.search("x").to_list()):
        with pytest.raises(FingerprintError, match="they differ in .*weights"):
            use()


def test_the_provider_counts_too(checkpoints):
    name = str(checkpoints.sentence("bert"))
    sentence = get_registry().get("sentence-transformers").create(name=name).fingerprint()
    with pytest.raises(FingerprintError, match="provider"):
        fingerprints.check("vector", sentence, create(name).fingerprint())
