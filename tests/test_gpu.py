"""What only a GPU shows, from text to answer: precision, streams, memory and the right device.

Where a test makes sense without one it runs on the CPU too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

from gpu_lance.device import free_memory, resolve_device
from gpu_lance.embeddings import EmbeddingFunctionConfig
from gpu_lance.embeddings.sentence_transformers import SentenceTransformerEmbeddings
from gpu_lance.errors import IndexBackendError
from gpu_lance.index import ColumnIndex, FlatIndex
from gpu_lance.index.store import ResidentStore
from gpu_lance.query.inputs import parse_queries
from gpu_lance.types import Metric, Side

torch = pytest.importorskip("torch")
CPU = torch.device("cpu")
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
# of 1 to about 250 tokens, in no order, with a run of equal ones
TEXTS = [("near rows of a table " * (i * 7 % 50 + 1)).strip() for i in range(60)] + ["", "?"] * 5


@pytest.fixture
def cuda() -> Any:
    return resolve_device("cuda")


@pytest.fixture
def last() -> Any:
    """The last of several GPUs, which is not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    torch.cuda.set_device(0)
    return torch.device("cuda", torch.cuda.device_count() - 1)


def vectors_of(texts: list[str], **options: Any) -> np.ndarray:
    function = SentenceTransformerEmbeddings.create(**options)
    return np.stack(function.compute_source_embeddings(texts))


def cosines(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
    return np.asarray((one * two).sum(1) / lengths)


# ------------------------------------------------------------------ embedding


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "least"), [("float32", 0.999999), ("bfloat16", 0.999), ("float16", 0.9999)]
)
@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1], ["the same length"] * 9], ids=len)
def test_vectors_are_those_of_the_cpu(dtype: str, least: float, texts: list[str]) -> None:
    wanted = vectors_of(texts, device="cpu")
    made = vectors_of(texts, device="cuda", dtype=dtype)
    assert made.dtype == np.float32
    assert cosines(made, wanted).min() > least
    np.testing.assert_allclose(np.linalg.norm(made, axis=1), 1, atol=1e-6)


@pytest.mark.gpu
def test_results_do_not_depend_on_the_batch_beyond_bfloat16() -> None:
    whole = vectors_of(TEXTS, device="cuda")
    parts = vectors_of(TEXTS, device="cuda", batch_size=3)
    assert cosines(whole, parts).min() > 0.999


@pytest.mark.gpu
def test_texts_of_which_none_can_be_embedded(cuda: Any) -> None:
    function = SentenceTransformerEmbeddings.create(device="cuda")
    ready = function.prepare([None, None], Side.SOURCE)
    made = function.finish(ready, ndims=384, device=cuda)
    assert made.vectors.shape == (2, 384)
    assert not made.valid.any()


@pytest.mark.gpu
def test_on_a_gpu_that_is_not_the_current_one(last: Any) -> None:
    made = vectors_of(TEXTS[:20], device=str(last))
    assert cosines(made, vectors_of(TEXTS[:20], device="cpu")).min() > 0.999
    before = torch.cuda.memory_allocated(0)
    rows = torch.randn(5000, 64, generator=torch.Generator().manual_seed(0))
    with FlatIndex(64, Metric.L2, last) as index:
        index.add(rows.to(last), np.arange(5000))
        found = index.search(rows[:50].to(last), 3, allowed=index.mask(np.arange(0, 5000, 2)))
        assert found.row_ids[::2, 0].tolist() == list(range(0, 50, 2))
        index.remove(np.arange(2000))
        assert index.search(rows[2000:2050].to(last), 1).row_ids[:, 0].tolist() == list(
            range(2000, 2050)
        )
    assert torch.cuda.memory_allocated(0) == before


# ----------------------------------------------------------------- the border


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_query_vectors_on_a_device_reach_an_index_on_the_host(device: str) -> None:
    product = torch.ones(1024, 1024, device=device)
    for _ in range(20):  # still at work when the copy starts
        product = product @ torch.full_like(product, 1 / 1024)
    arrived = parse_queries(product).tensor(CPU)
    assert arrived.device == CPU
    assert bool((arrived == 1).all())


@pytest.mark.gpu
def test_an_index_filled_on_one_stream_is_searched_on_another(cuda: Any) -> None:
    side = torch.cuda.Stream(cuda)
    with FlatIndex(64, Metric.COSINE, torch.device("cuda")) as index, torch.cuda.stream(side):
        rows = torch.randn(20_000, 64, device=cuda)
        index.add(rows, np.arange(20_000))
        queries = rows[:100].clone()
        torch.cuda.current_stream(cuda).synchronize()
        with torch.cuda.stream(torch.cuda.default_stream(cuda)):
            assert index.search(queries, 1).row_ids[:, 0].tolist() == list(range(100))


# --------------------------------------------------------------------- memory


@pytest.mark.gpu
def test_an_index_gets_the_memory_that_torch_holds_unused(cuda: Any) -> None:
    if not hasattr(pytest.importorskip("faiss"), "GpuIndexFlat"):
        pytest.skip("this FAISS is built for the CPU only")
    torch.cuda.empty_cache()
    rows = torch.randn(1 << 19, 256, device=cuda)  # 512 MiB
    held = torch.empty(free_memory(cuda) - (1 << 30), dtype=torch.uint8, device=cuda)
    del held  # into torch's cache, where FAISS cannot have it
    with FlatIndex(256, Metric.L2, cuda) as index:
        for start in range(4):
            index.add(rows, np.arange(len(rows)) + start * len(rows))
        assert len(index) == 4 * len(rows)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_delta_that_does_not_fit_says_so(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def table(start: int, stop: int) -> pa.Table:
        flat = pa.array(np.arange(start * 4, stop * 4), pa.float32())
        return pa.table({"vector": pa.FixedSizeListArray.from_arrays(flat, 4)})

    def full(*arguments: Any) -> None:
        raise RuntimeError("StandardGpuResources: alloc fail (cudaMalloc error out of memory [2])")

    path = str(tmp_path / "t.lance")
    dataset = lance.write_dataset(table(0, 20), path, enable_stable_row_ids=True)
    query = torch.zeros(1, 4)
    with ColumnIndex("vector", 4, torch.device(device)) as index:
        index.search(dataset, query, 1, Metric.L2)
        dataset = lance.write_dataset(table(20, 30), path, mode="append")
        with monkeypatch.context() as patch:
            patch.setattr(ResidentStore, "add", full)
            with pytest.raises(IndexBackendError, match="does not fit .* Free memory there"):
                index.search(dataset, query, 1, Metric.L2)
        assert index.info()["rows"] == 0  # half a change is never searched
        assert index.search(dataset, query, 30, Metric.L2).counts.tolist() == [30]


# ---------------------------------------------------------------- end to end


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("value_type", [pa.float16(), pa.float32(), pa.float64()], ids=str)
def test_rows_are_found_by_their_own_text(device: str, value_type: Any, tmp_path: Path) -> None:
    import gpu_lance

    texts = [f"row {i}: {text}" for i, text in enumerate(TEXTS[:12])]
    function = SentenceTransformerEmbeddings.create(device=device)
    config = EmbeddingFunctionConfig(
        vector_column="vector", source_column="text", function=function
    )
    schema = pa.schema({"text": pa.utf8(), "vector": pa.list_(value_type, 384)})
    with gpu_lance.connect(str(tmp_path), device=device) as db:
        table = db.create_table("t", schema=schema, embedding_functions=[config])
        table.add([{"text": text} for text in texts])
        for text in texts[:4]:
            (row,) = table.search(text).limit(1).to_list()
            assert row["text"] == text
            assert row["_distance"] < 1e-2
            stored = np.asarray(row["vector"], np.float32)
            (direct,) = function.compute_source_embeddings([text])
            assert cosines(stored[None], direct[None])[0] > 0.999
