"""Columns with any number of vectors a row: long documents, odd queries, other people's tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import gpu_lance
from gpu_lance.embeddings import DeviceEmbeddingFunction, register
from gpu_lance.embeddings.device_base import Payload
from gpu_lance.ingest import pipeline
from gpu_lance.ingest.pipeline import Pipeline
from gpu_lance.pydantic import LanceModel, MultiVector

torch = pytest.importorskip("torch")


@register("ones-of-words")
class Ones(DeviceEmbeddingFunction):
    """A vector a word, of ones."""

    multivector = True

    def ndims(self) -> int:
        return 2

    def prepare_items(self, items: list[Any], side: Any) -> Payload:
        counts = np.array([len(item.split()) for item in items])
        return Payload(counts, counts)

    def forward(self, data: Any, rows: np.ndarray, side: Any, device: Any) -> Any:
        return torch.ones(int(data[rows].sum()), 2, device=device), data[rows]


@pytest.fixture
def db(tmp_path: Any) -> Any:
    return gpu_lance.connect(str(tmp_path / "db"), device="cpu")


def made_by_words(db: Any) -> Any:
    function = Ones.create(device="cpu")

    class Doc(LanceModel):
        id: int
        text: str = function.SourceField()
        v: MultiVector(2) = function.VectorField()

    return db.create_table("words", schema=Doc)


# -- memory


@pytest.mark.parametrize("known", [True, False], ids=["table", "stream"])
def test_long_texts_go_in_small_batches(db: Any, monkeypatch: Any, known: bool) -> None:
    monkeypatch.setattr(pipeline, "MULTIVECTOR_TEXT", 1000)
    sizes: list[int] = []
    kept = Pipeline._stored

    def stored(self: Any, embedded: Any) -> pa.RecordBatch:
        sizes.append(sum(len(made.vectors) for _, _, made, _ in embedded.parts))
        return kept(self, embedded)

    monkeypatch.setattr(Pipeline, "_stored", stored)
    counts = [1, 2, 600, 100, 100, 300, 300, *[1] * 300]
    rows = pa.table({"id": range(len(counts)), "text": ["w " * count for count in counts]})
    table = made_by_words(db)
    table.add(rows if known else (part for part in rows.to_batches()))
    assert max(sizes) == 600 and len(sizes) < 10  # two bytes a word; a long text is by itself
    found = table.to_arrow().sort_by("id")["v"].to_pylist()
    assert [len(vectors) for vectors in found] == counts


# -- queries


def given(db: Any, documents: list[Any]) -> Any:
    class Doc(LanceModel):
        id: int
        v: MultiVector(2)

    table = db.create_table("given", schema=Doc)
    table.add([{"id": i, "v": vectors} for i, vectors in enumerate(documents)])
    return table


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        ([[0.0, 0.0]], []),
        ([[0.0, 0.0], [0.0, 1.0]], [1, 0]),
        ([[[0.0, 0.0]], [[0.0, 0.0]]], []),
    ],
)  # fmt: skip
def test_a_query_of_zeros_is_near_to_nothing_under_cosine(db: Any, query: Any, ids: Any) -> None:
    table = given(db, [[[1.0, 0.0]], [[0.0, 1.0]]])
    found = table.search(query).distance_type("cosine").to_arrow()
    assert found["id"].to_pylist() == ids
