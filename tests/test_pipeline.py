"""The ingest pipeline: what is stored, how it ends, and what it keeps on the device."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
import torch

from gpu_lance.embeddings import EmbeddingFunctionConfig, TextEmbeddingFunction
from gpu_lance.errors import BadInputError, BadVectorError, EmbeddingError, SchemaError
from gpu_lance.ingest.pipeline import Kept, Pipeline
from gpu_lance.ingest.read import read
from gpu_lance.ingest.vector_column import Policy, vector_columns
from gpu_lance.types import Embeddings, OnBadVectors

SCHEMA = pa.schema({"id": pa.int64(), "text": pa.utf8(), "vector": pa.list_(pa.float32(), 3)})


class Place:
    device = torch.device("cpu")

    def room(self) -> int:
        return 1 << 30


class Lengths(TextEmbeddingFunction):
    """(length, first letter, 1) of a text, and a record of who asked for what."""

    threads: ClassVar[list[str]] = []
    sizes: ClassVar[list[int]] = []

    def ndims(self) -> int:
        return 3

    def generate_embeddings(self, texts: list[str], *args: Any, **kwargs: Any) -> list[Any]:
        self.threads.append(threading.current_thread().name)
        self.sizes.append(len(texts))
        return [[len(t), ord(t[0]) if t else 0, 1] for t in texts]


@pytest.fixture(autouse=True)
def forget_calls() -> None:
    Lengths.threads.clear()
    Lengths.sizes.clear()


class Nan(Lengths):
    def generate_embeddings(self, texts: list[str], *args: Any, **kwargs: Any) -> list[Any]:
        return [[float("nan") if t == "bad" else 1.0, 0.0, 0.0] for t in texts]


def pipeline(
    function: TextEmbeddingFunction | None = None,
    schema: pa.Schema = SCHEMA,
    on_bad: str = "error",
    fill: float = 0.0,
    cosine: frozenset[str] = frozenset(),
    progress: Any = None,
) -> Pipeline:
    functions = {}
    if function is not None:
        functions["vector"] = EmbeddingFunctionConfig(
            vector_column="vector", source_column="text", function=function
        )
    columns = vector_columns(schema, functions, cosine)
    return Pipeline(schema, columns, Policy(OnBadVectors(on_bad), fill), Place(), progress)


def table_of(batches: Iterator[pa.RecordBatch]) -> pa.Table:
    return pa.Table.from_batches(batches, SCHEMA)


def rows(n: int) -> dict[str, Any]:
    return {"id": list(range(n)), "text": [f"{'x' * (i % 7)}y" for i in range(n)]}


@pytest.mark.parametrize("n", [1, 63, 8192, 8193, 30_000])
def test_every_row_gets_its_own_vector_with_and_without_threads(n: int) -> None:
    run = pipeline(Lengths.create())
    stored = run.write(read(rows(n), SCHEMA), table_of)
    assert stored["id"].to_pylist() == list(range(n))
    vectors = np.stack(stored["vector"].to_numpy())
    assert vectors[:, 0].tolist() == [i % 7 + 1 for i in range(n)]
    assert run.report.rows == run.report.embedded == n
    assert all(seconds >= 0 for seconds in run.report.seconds.values())


def test_the_callers_function_runs_in_the_callers_thread_and_in_bounded_batches() -> None:
    function = Lengths.create()
    pipeline(function).write(read(rows(20_000), SCHEMA), table_of)
    assert set(function.threads) == {threading.current_thread().name}
    assert max(function.sizes) <= 8192 and sum(function.sizes) == 20_000


def test_given_vectors_stay_missing_ones_are_made_and_null_sources_stay_null() -> None:
    function = Lengths.create()
    data = [
        {"id": 1, "text": "abc", "vector": [7.0, 7.0, 7.0]},
        {"id": 2, "text": "ab", "vector": None},
        {"id": 3, "text": None, "vector": None},
    ]
    stored = pipeline(function).write(read(data, SCHEMA), table_of)
    assert stored["vector"].to_pylist() == [[7.0, 7.0, 7.0], [2.0, 97.0, 1.0], None]
    assert function.sizes == [1]


def test_a_source_that_is_missing_is_named() -> None:
    with pytest.raises(SchemaError, match="'vector' is embedded from 'text'"):
        pipeline(Lengths.create()).write(read([{"id": 1}], SCHEMA), table_of)


def test_vectors_alone_need_no_source() -> None:
    stored = pipeline(Lengths.create()).write(
        read([{"id": 1, "vector": [1.0, 2.0, 3.0]}], SCHEMA), table_of
    )
    assert stored.to_pylist() == [{"id": 1, "text": None, "vector": [1.0, 2.0, 3.0]}]


def test_a_vector_that_takes_no_null_needs_a_source() -> None:
    schema = SCHEMA.set(2, pa.field("vector", pa.list_(pa.float32(), 3), nullable=False))
    run = pipeline(Lengths.create(), schema)
    with pytest.raises(BadInputError, match="Row 1 .*'vector'"):
        run.write(read([{"id": 1, "text": "a"}, {"id": 2, "text": None}], schema), list)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("drop", [[1.0, 0.0, 0.0]]),
        ("fill", [[1.0, 0.0, 0.0], [0.5, 0.5, 0.5]]),
        ("null", [[1.0, 0.0, 0.0], None]),
    ],
)
def test_a_model_that_returns_nan_is_handled_as_the_caller_chose(
    policy: str, expected: list[Any]
) -> None:
    run = pipeline(Nan.create(), on_bad=policy, fill=0.5)
    data = [{"id": 1, "text": "ok"}, {"id": 2, "text": "bad"}]
    assert run.write(read(data, SCHEMA), table_of)["vector"].to_pylist() == expected


def test_a_model_that_returns_nan_is_an_error_by_default() -> None:
    with pytest.raises(BadVectorError, match="row 1 has a NaN"):
        pipeline(Nan.create()).write(
            read([{"id": 1, "text": "ok"}, {"id": 2, "text": "bad"}], SCHEMA), table_of
        )


def test_a_zero_vector_is_bad_only_where_the_column_is_searched_by_cosine() -> None:
    data = [{"id": 1, "vector": [0.0, 0.0, 0.0]}]
    assert pipeline().write(read(data, SCHEMA), table_of).num_rows == 1
    with pytest.raises(BadVectorError, match="zeros"):
        pipeline(cosine=frozenset({"vector"})).write(read(data, SCHEMA), table_of)


def test_dropping_keeps_missing_vectors_with_their_rows() -> None:
    data = [
        {"id": 1, "text": "a", "vector": [float("nan"), 0.0, 0.0]},
        {"id": 2, "text": "bb", "vector": None},
        {"id": 3, "text": "c", "vector": [1.0, 1.0, 1.0]},
        {"id": 4, "text": "dddd", "vector": None},
    ]
    stored = pipeline(Lengths.create(), on_bad="drop").write(read(data, SCHEMA), table_of)
    assert stored["id"].to_pylist() == [2, 3, 4]
    assert [v[0] for v in stored["vector"].to_pylist()] == [2.0, 1.0, 4.0]


class Broken(Lengths):
    def generate_embeddings(self, texts: list[str], *args: Any, **kwargs: Any) -> list[Any]:
        if "x" * 6 + "y" in texts and len(self.sizes) >= 1:
            raise RuntimeError("the model broke")
        return super().generate_embeddings(texts)


def no_thread_is_left() -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if not any(t.name.startswith("gpu_lance-") for t in threading.enumerate()):
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("where", ["source", "function", "writer"])
def test_an_error_in_any_stage_reaches_the_caller_and_ends_the_threads(where: str) -> None:
    def data() -> Iterator[dict[str, Any]]:
        for i in range(60_000):
            if where == "source" and i == 40_000:
                raise OSError("the source broke")
            yield {"id": i, "text": f"{'x' * (i % 7)}y"}

    def writer(batches: Iterator[pa.RecordBatch]) -> int:
        for done, _ in enumerate(batches):
            if where == "writer" and done == 1:
                raise OSError("the writer broke")
        return done

    function = Broken.create() if where == "function" else Lengths.create()
    with pytest.raises((OSError, RuntimeError), match=f"the {where.replace('function', 'model')}"):
        pipeline(function).write(read(data(), SCHEMA), writer)
    assert no_thread_is_left()


def test_a_writer_sees_the_error_so_that_it_commits_nothing() -> None:
    seen: list[BaseException] = []

    def writer(batches: Iterator[pa.RecordBatch]) -> None:
        try:
            for _ in batches:
                pass
        except BaseException as error:
            seen.append(error)
            raise

    with pytest.raises(RuntimeError, match="the model broke"):
        pipeline(Broken.create()).write(read(rows(60_000), SCHEMA), writer)
    assert len(seen) == 1 and str(seen[0]) == "the model broke"


def test_progress_counts_every_row_once() -> None:
    seen: list[int] = []
    pipeline(Lengths.create(), progress=seen.append).write(read(rows(20_000), SCHEMA), table_of)
    assert seen == sorted(seen) and seen[-1] == 20_000


def test_a_function_that_returns_too_few_vectors_is_named() -> None:
    class Short(Lengths):
        def generate_embeddings(self, texts: list[str], *args: Any, **kwargs: Any) -> list[Any]:
            return [[1.0, 2.0, 3.0]]

    with pytest.raises(EmbeddingError, match="Short"):
        pipeline(Short.create()).write(read(rows(3), SCHEMA), table_of)


def test_columns_of_functions_are_checked() -> None:
    config = EmbeddingFunctionConfig(
        vector_column="text", source_column="text", function=Lengths.create()
    )
    with pytest.raises(SchemaError, match="'text' has type string"):
        vector_columns(SCHEMA, {"text": config})
    with pytest.raises(SchemaError, match="'nope'"):
        vector_columns(SCHEMA, {"nope": config})


def test_vectors_stay_on_the_device_for_the_index_as_they_are_stored() -> None:
    half = SCHEMA.set(2, pa.field("vector", pa.list_(pa.float16(), 3)))
    run = pipeline(Lengths.create(), half)
    stored = run.write(read(rows(20_000), half), lambda b: pa.Table.from_batches(b, half))
    kept = run.kept.take("vector", 20_000)
    assert kept is not None
    vectors, valid = kept.vectors, kept.valid
    assert vectors.dtype == torch.float16 and valid.all()
    assert np.array_equal(vectors.numpy(), np.stack(stored["vector"].to_numpy()))


def test_nothing_is_kept_when_a_row_is_not_on_the_device_or_memory_is_short() -> None:
    run = pipeline(Lengths.create())
    run.write(
        read([{"id": 1, "text": "a", "vector": [1, 2, 3]}, {"id": 2, "text": "b"}], SCHEMA), list
    )
    assert run.kept.take("vector", 2) is None
    kept = Kept(budget=100)
    kept.add("v", Embeddings(torch.zeros(2, 4), np.ones(2, bool)), 2)
    assert kept.take("v", 3) is None
    kept = Kept(budget=100)
    kept.add("v", Embeddings(torch.zeros(20, 4), np.ones(20, bool)), 20)
    assert kept.take("v", 20) is None
