"""Providers of text, and tables of many vectors a row, on a GPU: the same as on the CPU."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import colbert_checkpoints
import numpy as np
import pyarrow as pa
import pytest

import gpu_lance
from gpu_lance.device import resolve_device
from gpu_lance.embeddings import get_registry
from gpu_lance.embeddings.huggingface import TransformersEmbeddingFunction
from gpu_lance.embeddings.loading import MODELS
from gpu_lance.pydantic import LanceModel, MultiVector, Vector
from gpu_lance.types import Side

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu
DEVICE = "cuda"
MINILM = "all-MiniLM-L6-v2"
# of 4 to about 250 tokens, in no order, all different
TEXTS = [f"{i} " + ("near rows of a table " * (i * 7 % 50 + 1)).strip() for i in range(60)]


def vectors_of(texts: list[str], **options: Any) -> np.ndarray:
    function = TransformersEmbeddingFunction.create(**{"name": MINILM, **options})
    return np.stack(function.compute_source_embeddings(texts))


def cosines(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
    return np.asarray((one * two).sum(1) / lengths)


# ---------------------------------------------------------------- huggingface


@pytest.fixture(scope="module")
def wanted() -> np.ndarray:
    return vectors_of(TEXTS, device="cpu")


@pytest.mark.parametrize(
    ("dtype", "least"),
    [("float32", 0.999999), (None, 0.999), ("bfloat16", 0.999), ("float16", 0.9999)],
)
@pytest.mark.parametrize("batch_size", [None, 7])
def test_vectors_are_those_of_the_cpu(
    wanted: np.ndarray, dtype: str | None, least: float, batch_size: int | None
) -> None:
    made = vectors_of(TEXTS, device=DEVICE, dtype=dtype, batch_size=batch_size)
    assert made.dtype == np.float32
    assert cosines(made, wanted).min() > least
    lengths = np.linalg.norm(made, axis=1) / np.linalg.norm(wanted, axis=1)
    np.testing.assert_allclose(lengths, 1, atol=2e-2)  # it does not normalise


@pytest.mark.parametrize("batch_size", [None, 1, 7])
def test_every_vector_is_that_of_its_own_text(wanted: np.ndarray, batch_size: int | None) -> None:
    texts: list[Any] = [None, *TEXTS, ""]
    function = TransformersEmbeddingFunction.create(
        name=MINILM, device=DEVICE, batch_size=batch_size
    )
    where = resolve_device(DEVICE)
    made = function.finish(function.prepare(texts, Side.SOURCE), ndims=384, device=where)
    assert made.vectors.device.type == DEVICE
    assert made.valid.tolist() == [False, *[True] * len(TEXTS), True]
    vectors = made.vectors[1:-1].cpu().numpy()
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    near = units @ (wanted / np.linalg.norm(wanted, axis=1, keepdims=True)).T
    assert near.argmax(axis=1).tolist() == list(range(len(TEXTS)))


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra", "modernbert", "gpt2"])
def test_families_of_models(checkpoints: Any, kind: str, pooling: str) -> None:
    options = {"name": str(checkpoints.transformer(kind)), "pooling": pooling}
    texts = ["the quick brown fox", "rows of a table", "fox " * 30, "near rows", "a"]
    on_cpu = vectors_of(texts, device="cpu", **options)
    exact = vectors_of(texts, device=DEVICE, dtype="float32", **options)
    np.testing.assert_allclose(exact, on_cpu, atol=2e-4)
    assert cosines(vectors_of(texts, device=DEVICE, **options), on_cpu).min() > 0.99


def test_memory_that_runs_out_halves_the_batch(caplog: pytest.LogCaptureFixture) -> None:
    texts = [f"{i} {TEXTS[i % 10]}" for i in range(600)]
    function = TransformersEmbeddingFunction.create(name=MINILM, device=DEVICE, dtype="float32")
    whole = np.stack(function.compute_source_embeddings(texts))
    small = TransformersEmbeddingFunction.create(name=MINILM, device=DEVICE, dtype="float32")
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + (100 << 20)
    total = torch.cuda.get_device_properties(0).total_memory
    loads = len(MODELS.loads)
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        with caplog.at_level(logging.WARNING, logger="gpu_lance"):
            made = np.stack(small.compute_source_embeddings(texts))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert [record for record in caplog.records if "ran out of memory" in record.message]
    assert cosines(made, whole).min() > 0.99999
    assert len(MODELS.loads) == loads  # both functions use one copy of the weights


def test_a_table_finds_a_row_by_its_own_text(tmp_path: Path) -> None:
    function = get_registry().get("huggingface").create(name=MINILM, device=DEVICE)

    class Row(LanceModel):
        text: str = function.SourceField()
        vector: Vector(384) = function.VectorField()  # type: ignore[valid-type]

    with gpu_lance.connect(str(tmp_path), device=DEVICE) as db:
        table = db.create_table("t", schema=Row)
        table.add([{"text": text} for text in TEXTS[:20]])
        for text in TEXTS[:3]:
            (hit,) = table.search(text).limit(1).to_list()
            assert hit["text"] == text


# ------------------------------------------------------- several vectors a row

D = 24
KIND = pa.list_(pa.list_(pa.float32(), D))


@pytest.fixture
def documents(tmp_path: Path) -> tuple[str, list[Any]]:
    """A table of 0 to 20 vectors a row, some rows null; and queries of 1 to 9 vectors."""
    random = np.random.default_rng(5)
    rows: list[Any] = [
        None if i % 50 == 0 else random.standard_normal((i * 7 % 21, D)).astype(np.float32)
        for i in range(700)
    ]
    rows[300:340] = [rows[299]] * 40  # equal documents
    uri = str(tmp_path)
    schema = pa.schema({"id": pa.int64(), "vectors": KIND})
    lists = [None if row is None else row.tolist() for row in rows]
    with gpu_lance.connect(uri, device="cpu") as db:
        table = db.create_table("t", schema=schema)
        table.add(pa.table({"id": range(len(rows)), "vectors": pa.array(lists, KIND)}, schema))
    queries = [random.standard_normal((count, D)).astype(np.float32) for count in (1, 4, 9)]
    return uri, [*queries, rows[299]]


def found(uri: str, device: str, queries: Any, metric: str, where: str | None) -> dict[str, Any]:
    with gpu_lance.connect(uri, device=device) as db:
        search = db.open_table("t").search(queries).distance_type(metric).limit(60)
        search = search if where is None else search.where(where)
        return dict(search.select(["id", "_distance"]).to_arrow().to_pydict())


@pytest.mark.parametrize("where", [None, "id % 7 = 3"])
@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_rows_and_distances_are_those_of_the_cpu(
    documents: tuple[str, list[Any]], metric: str, where: str | None
) -> None:
    uri, queries = documents
    for query in (queries, *queries):  # all at once, then one by one
        there = found(uri, DEVICE, query, metric, where)
        here = found(uri, "cpu", query, metric, where)
        assert here["id"]
        assert there == here  # to the last bit


def test_colbert_ranks_as_on_the_cpu(tmp_path: Path) -> None:
    folder = colbert_checkpoints.stanford(tmp_path / "stanford")
    texts = [text for text in colbert_checkpoints.TEXTS if text]

    def function_on(where: str) -> Any:
        return get_registry().get("colbert").create(name=str(folder), device=where, dtype="float32")

    function = function_on(DEVICE)

    class Row(LanceModel):
        text: str = function.SourceField()
        vectors: MultiVector(function.ndims()) = function.VectorField()  # type: ignore[valid-type]

    with gpu_lance.connect(str(tmp_path / "db"), device=DEVICE) as db:
        table = db.create_table("t", schema=Row)
        table.add([{"text": text} for text in texts])
        stored = table.to_arrow()["vectors"].to_pylist()
    on_cpu = function_on("cpu")
    for one, other in zip(stored, on_cpu.compute_source_embeddings(texts), strict=True):
        np.testing.assert_allclose(np.array(one), other, atol=1e-4)
    (query,) = function.compute_query_embeddings("quick fox")
    hits = {}
    for where in (DEVICE, "cpu"):
        with gpu_lance.connect(str(tmp_path / "db"), device=where) as db:
            table = db.open_table("t")
            given = table.search(query).limit(20).to_list()
            own = table.search("quick fox").limit(20).to_list()
        hits[where] = [(hit["text"], hit["_distance"]) for hit in given]
        assert [hit["text"] for hit in own] == [text for text, _ in hits[where]]
    assert hits[DEVICE] == hits["cpu"]
