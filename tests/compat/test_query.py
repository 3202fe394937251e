"""Our searches and lancedb's, over the very same table folder: columns, types, values, errors."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import lance
import lancedb
import numpy as np
import pyarrow as pa
import pytest
import torch
from lancedb.expr import col, lit
from lancedb.query import ColumnOrdering

from gpu_lance.errors import GpuLanceError, QueryError
from gpu_lance.index import ColumnIndex
from gpu_lance.query import search
from gpu_lance.types import Metric

N, D = 60, 8
VECTORS = np.random.default_rng(5).standard_normal((N, D)).astype(np.float32)
Q = VECTORS[7] + np.float32(0.01)
BATCH = VECTORS[[3, 11, 40]] + np.float32(0.02)


class Target:
    """A table as a search sees it, with an embedder that hashes its texts."""

    embedding_functions: ClassVar[dict[str, Any]] = {}
    device = torch.device("cpu")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.stem
        self.indexes: dict[str, ColumnIndex] = {}

    @property
    def schema(self) -> pa.Schema:
        return self.dataset().schema

    def dataset(self) -> lance.LanceDataset:
        return lance.dataset(str(self.path))

    def column_index(self, column: str, dataset: Any = None) -> ColumnIndex:
        if column not in self.indexes:
            ndims = self.schema.field(column).type.list_size
            self.indexes[column] = ColumnIndex(column, ndims, self.device)
        return self.indexes[column]

    def default_metric(self, column: str, dataset: Any = None) -> Metric:
        return Metric.L2

    def embed_query(self, column: str, items: list[Any]) -> torch.Tensor:
        raise AssertionError("no text is searched for here")

    def search(self, *args: Any, **kwargs: Any) -> Any:
        return search(self, *args, **kwargs)


def vectors(array: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(array.ravel()), array.shape[1])


def rows(n: int = N) -> pa.Table:
    moment = datetime.datetime(2026, 1, 1)
    table = pa.table(
        {
            "id": pa.array(range(n), pa.int64()),
            "word": pa.array([None if i % 13 == 0 else f"w{i % 4}" for i in range(n)]),
            "pair": pa.array(
                [{"a": i, "b": {"c": float(i)}} for i in range(n)],
                pa.struct([("a", pa.int32()), ("b", pa.struct([("c", pa.float64())]))]),
            ),
            "kind": pa.array([f"k{i % 3}" for i in range(n)]).dictionary_encode(),
            "my col": pa.array(range(n), pa.int32()),
            "Upper": pa.array([i / 2 for i in range(n)], pa.float32()),
            "tags": pa.array([[f"t{i}"] * (i % 3) for i in range(n)], pa.list_(pa.string())),
            "at": pa.array(
                [moment + datetime.timedelta(hours=i) for i in range(n)], pa.timestamp("us")
            ),
            "raw": pa.array([bytes([i]) for i in range(n)], pa.binary()),
            "vector": vectors(VECTORS[:n]),
        }
    )
    fields = [field.with_nullable(False) if field.name == "id" else field for field in table.schema]
    return table.cast(pa.schema(fields, metadata={b"made": b"here"}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("db")
    table = rows()
    blob = pa.schema(
        [
            pa.field("blob", pa.large_binary(), metadata={b"lance-encoding:blob": b"true"}),
            pa.field("vector", pa.list_(pa.float32(), D)),
        ]
    )
    blobs = pa.table({"blob": [bytes(i) for i in range(5)], "vector": vectors(VECTORS[:5])})
    nulls = table.to_pydict()
    nulls["vector"] = [None if i % 4 == 0 else VECTORS[i].tolist() for i in range(N)]
    made = {
        "plain": table,
        "empty": table.slice(0, 0),
        "nulls": pa.Table.from_pydict(nulls, table.schema),
        "none": table.drop_columns(["vector"]),
        "two": table.append_column("other", vectors(VECTORS[::-1])),
        "two_lengths": table.append_column("short", vectors(np.ascontiguousarray(VECTORS[:, :3]))),
        "doubles": pa.table({"vector": vectors(VECTORS.astype(np.float64))}),
        "halves": pa.table({"vector": vectors(VECTORS.astype(np.float16))}),
        "blobs": blobs.cast(blob),
    }
    for name, data in made.items():
        version = "2.1" if name == "blobs" else None
        lance.write_dataset(
            data, str(path / f"{name}.lance"), enable_stable_row_ids=True,
            data_storage_version=version,
        )  # fmt: skip
    lance.write_dataset(table, str(path / "unstable.lance"), max_rows_per_file=17)
    lance.dataset(str(path / "unstable.lance")).delete("id % 5 = 0")
    churned = lance.write_dataset(
        table.take(list(range(30))), str(path / "churned.lance"), enable_stable_row_ids=True
    )
    churned.update({"word": "'updated'"}, where="id < 6")
    churned.delete("id % 7 = 3")
    churned.insert(table.take(list(range(30, N))))
    churned.optimize.compact_files()
    return path


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[Callable[[str], tuple[Target, Any]]]:
    database = lancedb.connect(str(folder))
    opened: dict[str, tuple[Target, Any]] = {}

    def get(name: str) -> tuple[Target, Any]:
        if name not in opened:
            opened[name] = (Target(folder / f"{name}.lance"), database.open_table(name))
        return opened[name]

    yield get
    for ours, _ in opened.values():
        for index in ours.indexes.values():
            index.close()


def check_same(ours: pa.Table, theirs: pa.Table) -> None:
    assert ours.column_names == theirs.column_names
    assert ours.schema.equals(theirs.schema, check_metadata=True), (ours.schema, theirs.schema)
    assert ours.num_rows == theirs.num_rows
    if "query_index" in theirs.column_names:  # lancedb does not always keep the queries' order
        theirs = theirs.sort_by("query_index")
    for name in ours.column_names:
        mine, other = ours[name].combine_chunks(), theirs[name].combine_chunks()
        if pa.types.is_float32(mine.type) and name.startswith("_d"):
            np.testing.assert_allclose(mine.to_numpy(), other.to_numpy(), rtol=2e-5, atol=2e-6)
        else:
            assert mine.to_pylist() == other.to_pylist(), name


def desc(name: str) -> list[ColumnOrdering]:
    return [ColumnOrdering(column_name=name, ascending=False)]


Build = Callable[[Any], Any]
Pair = Callable[[str], tuple[Target, Any]]
SAME: dict[str, Build] = {
    "plain": lambda t: t.search(Q),
    "list": lambda t: t.search(Q.tolist()),
    "named": lambda t: t.search(Q, vector_column_name="vector", query_type="vector"),
    "select": lambda t: t.search(Q).select(["word", "id"]),
    "select none": lambda t: t.search(Q).select([]),
    "select no dict": lambda t: t.search(Q).select({}),
    "select distance": lambda t: t.search(Q).select(["_distance", "id"]),
    "select row id": lambda t: t.search(Q).select(["_rowid", "id"]),
    "select row id twice": lambda t: t.search(Q).select(["_rowid", "id"]).with_row_id(True),
    "select again": lambda t: t.search(Q).select({"x": "id"}).select(["id"]),
    "select nested": lambda t: t.search(Q).select(["pair.a", "pair.b.c", "id"]),
    "select odd names": lambda t: t.search(Q).select(["my col", "Upper"]),
    "select all kinds": lambda t: t.search(Q).select(["kind", "pair", "tags", "at", "raw"]),
    "sql": lambda t: t.search(Q).select({"x": "id + 1", "y": "upper(word)", "k": "kind"}),
    "sql constant": lambda t: t.search(Q).select({"x": "1", "y": "'a'"}),
    "sql nested": lambda t: t.search(Q).select({"x": "pair.b.c * 2", "`y": "`my col`"}),
    "sql distance": lambda t: t.search(Q).select({"_d": "_distance * 2", "id": "id"}),
    "sql distance by name": lambda t: t.search(Q).select({"id": "id", "_distance": "_distance"}),
    "sql distance taken": lambda t: t.search(Q).select({"_distance": "id"}),
    "sql row id": lambda t: t.search(Q).select({"r": "_rowid", "_d": "_distance + id"}),
    "sql row id taken": lambda t: t.search(Q).select({"_rowid": "id"}),
    "sql row id both": lambda t: (
        t.search(Q).select({"_rowid": "_rowid", "id": "id"}).with_row_id(True)
    ),
    "sql over a column": lambda t: t.search(Q).select({"vector": "id"}),
    "row id": lambda t: t.search(Q).with_row_id(True),
    "row id sql": lambda t: t.search(Q).select({"x": "id"}).with_row_id(True),
    "no row id": lambda t: t.search(Q).with_row_id(True).with_row_id(False),
    "limit": lambda t: t.search(Q).limit(3),
    "limit numpy": lambda t: t.search(Q).limit(np.int64(3)),
    "limit whole float": lambda t: t.search(Q).limit(3.0),
    "limit all": lambda t: t.search(Q).limit(1_000_000),
    "offset": lambda t: t.search(Q).limit(4).offset(3),
    "offset no limit": lambda t: t.search(Q).offset(3),
    "offset past the end": lambda t: t.search(Q).offset(1000),
    "offset negative": lambda t: t.search(Q).offset(-2),
    "offset none": lambda t: t.search(Q).offset(None),
    "where": lambda t: t.search(Q).where("id < 25"),
    "where false": lambda t: t.search(Q).where("id < 25", False).limit(7),
    "where false by name": lambda t: t.search(Q).where("id < 25", prefilter=False).limit(7),
    "where false offset": lambda t: t.search(Q).where("id < 40", False).limit(5).offset(2),
    "where then false": lambda t: t.search(Q).where("id < 40", prefilter=False).where("id > 3"),
    "where twice": lambda t: t.search(Q).where("id < 40").where("word = 'w1' OR word = 'w2'"),
    "where null": lambda t: t.search(Q).where("word IS NULL"),
    "where nothing": lambda t: t.search(Q).where("id > 1000"),
    "where None": lambda t: t.search(Q).where(None),
    "where row id": lambda t: t.search(Q).where("_rowid < 8"),
    "where row id after": lambda t: t.search(Q).where("_rowid < 30", False),
    "where distance after": lambda t: t.search(Q).where("_distance < 12.5 AND id > 2", False),
    "where nested after": lambda t: t.search(Q).where("pair.b.c < 30.0 OR `my col` > 50", False),
    "cosine": lambda t: t.search(Q).distance_type("cosine"),
    "cosine upper": lambda t: t.search(Q).metric("COSINE"),
    "dot": lambda t: t.search(Q).distance_type("dot").limit(20),
    "range": lambda t: t.search(Q).distance_range(8.0, 14.0).limit(50),
    "range lower": lambda t: t.search(Q).distance_range(lower_bound=10.0),
    "range upper": lambda t: t.search(Q).distance_range(upper_bound=9.5).limit(50),
    "range upside down": lambda t: t.search(Q).distance_range(9.0, 3.0),
    "range none": lambda t: t.search(Q).distance_range(),
    "settings": lambda t: t.search(Q).nprobes(5).refine_factor(2).ef(50).bypass_vector_index(),
    "settings of zero": lambda t: t.search(Q).nprobes(0).refine_factor(0).ef(0),
    "nprobes": lambda t: t.search(Q).minimum_nprobes(2).maximum_nprobes(0),
    "order": lambda t: t.search(Q).order_by(desc("id")).limit(6),
    "order offset": lambda t: t.search(Q).order_by(desc("id")).limit(6).offset(2),
    "order not selected": lambda t: t.search(Q).order_by(desc("id")).select(["word"]),
    "order two": lambda t: (
        t.search(Q)
        .order_by([ColumnOrdering(column_name="word", nulls_first=True), *desc("id")])
        .limit(30)
    ),
    "order and filter": lambda t: t.search(Q).order_by(desc("id")).where("id < 30", False),
    "order none": lambda t: t.search(Q).order_by(None),
    "batch": lambda t: t.search(BATCH).limit(4),
    "batch lists": lambda t: t.search(BATCH.tolist()).limit(4).select(["id"]),
    "batch of arrays": lambda t: t.search(list(BATCH)).limit(4).select(["id"]),
    "batch of one": lambda t: t.search(BATCH[:1]).limit(4),
    "batch row id": lambda t: t.search(BATCH).limit(4).select(["id"]).with_row_id(True),
    "batch query": lambda t: t.search(BATCH).limit(4).select(["id", "query_index"]),
    "batch sql": lambda t: t.search(BATCH).limit(4).select({"x": "id * 2"}),
    "batch filter": lambda t: t.search(BATCH).limit(4).where("id > 20"),
    "batch filter after": lambda t: t.search(BATCH).limit(9).where("id > 20", prefilter=False),
    "batch range": lambda t: t.search(BATCH).limit(40).distance_range(5.0, 9.0),
    "batch offset": lambda t: t.search(BATCH).limit(4).offset(3).select(["id"]),
    "batch filter after offset": lambda t: (
        t.search(BATCH).limit(9).where("id > 20", prefilter=False).offset(2)
    ),
    "batch order offset": lambda t: t.search(BATCH).limit(6).offset(2).order_by(desc("id")),
    "batch order": lambda t: t.search(BATCH).limit(6).order_by(desc("id")),
    "batch sql query": lambda t: t.search(BATCH).limit(4).select({"x": "query_index", "id": "id"}),
    "batch all": lambda t: t.search(BATCH).limit(500).select(["id"]),
    "no query": lambda t: t.search(),
    "no query limit": lambda t: t.search().limit(7),
    "no query limit 0": lambda t: t.search().limit(0),
    "no query limit -1": lambda t: t.search().limit(-1),
    "no query offset": lambda t: t.search().offset(12).limit(5),
    "no query where": lambda t: t.search().where("id < 25").where("id > 3"),
    "no query where after": lambda t: t.search().where("id > 5", prefilter=False).limit(3),
    "no query row id": lambda t: t.search().with_row_id(True),
    "no query select": lambda t: t.search().select(["word", "_rowid", "pair.a"]),
    "no query select row id": lambda t: t.search().select(["word"]).with_row_id(True),
    "no query select none": lambda t: t.search().select([]).with_row_id(True),
    "no query sql": lambda t: t.search().select({"x": "id + 1"}).with_row_id(True),
    "no query order": lambda t: t.search().order_by(desc("id")).limit(9).offset(2),
    "no query order two": lambda t: t.search().order_by(
        [ColumnOrdering(column_name="word", nulls_first=True), *desc("id")]
    ),
    "no query order none": lambda t: t.search().order_by([]).limit(3),
    "no query fts": lambda t: t.search(None, query_type="fts"),
}


@pytest.mark.parametrize("table", ["plain", "empty", "churned", "unstable"])
@pytest.mark.parametrize("case", SAME)
def test_same_result(pair: Pair, table: str, case: str) -> None:
    ours, theirs = pair(table)
    check_same(SAME[case](ours).to_arrow(), SAME[case](theirs).to_arrow())


# on tables that are special in one way
ONLY: dict[str, tuple[str, Build]] = {
    "null vectors": ("nulls", lambda t: t.search(Q).limit(100)),
    "null vectors cosine": ("nulls", lambda t: t.search(Q).limit(100).distance_type("cosine")),
    "null vectors after": ("nulls", lambda t: t.search(Q).where("vector IS NULL", False)),
    "two columns": ("two", lambda t: t.search(Q, vector_column_name="other").limit(5)),
    "two lengths": ("two_lengths", lambda t: t.search(Q[:3]).limit(5)),
    "two lengths, longer": ("two_lengths", lambda t: t.search(Q).limit(5)),
    "float64": ("doubles", lambda t: t.search(Q).limit(5)),
    "blobs": ("blobs", lambda t: t.search(Q).limit(5)),
    "blobs selected": ("blobs", lambda t: t.search(Q).limit(5).select(["blob"])),
    "blobs scanned": ("blobs", lambda t: t.search().select(["blob"]).with_row_id(True)),
    "no vectors": ("none", lambda t: t.search().where("id < 5").select(["word"])),
    "expression": ("plain", lambda t: t.search(Q).where(col("id") < lit(30))),
    "expressions": (
        "plain",
        lambda t: t.search(Q).where(col("id") < lit(30)).where("id > 4").where(col("my col") > 9),
    ),
    "expression selected": ("plain", lambda t: t.search(Q).select({"x": col("id") * lit(2)})),
}


@pytest.mark.parametrize("case", ONLY)
def test_same_on(pair: Pair, case: str) -> None:
    table, build = ONLY[case]
    ours, theirs = pair(table)
    check_same(build(ours).to_arrow(), build(theirs).to_arrow())


@pytest.mark.parametrize("case", SAME)
def test_output_schema(pair: Pair, case: str) -> None:
    builder = SAME[case](pair("plain")[0])
    assert builder.output_schema().equals(builder.to_arrow().schema, check_metadata=True)


def test_output_schema_as_theirs(pair: Pair) -> None:
    ours, theirs = pair("plain")
    for case in ("plain", "select", "row id sql", "batch", "no query sql"):
        assert SAME[case](ours).output_schema() == SAME[case](theirs).output_schema()


RAISES: dict[str, tuple[type[Exception], str, Build]] = {
    "limit 0": (ValueError, "plain", lambda t: t.search(Q).limit(0)),
    "limit -1": (ValueError, "plain", lambda t: t.search(Q).limit(-1)),
    "limit None": (ValueError, "plain", lambda t: t.search(Q).limit(None)),
    "limit 2.5": (ValueError, "plain", lambda t: t.search(Q).limit(2.5)),
    "limit text": (TypeError, "plain", lambda t: t.search(Q).limit("a")),
    "offset 1.5": (ValueError, "plain", lambda t: t.search(Q).offset(1.5)),
    "select unknown": (ValueError, "plain", lambda t: t.search(Q).select(["nope"])),
    "select twice": (ValueError, "plain", lambda t: t.search(Q).select(["id", "id"])),
    "select text": (ValueError, "plain", lambda t: t.search(Q).select("id")),
    "select tuple": (ValueError, "plain", lambda t: t.search(Q).select(("id",))),
    "select None": (ValueError, "plain", lambda t: t.search(Q).select(None)),
    "select sql in a list": (ValueError, "plain", lambda t: t.search(Q).select(["id + 1"])),
    "select wrong case": (ValueError, "plain", lambda t: t.search(Q).select(["upper"])),
    "select unknown sql": (ValueError, "plain", lambda t: t.search(Q).select({"x": "nope + 1"})),
    "select no sql": (ValueError, "plain", lambda t: t.search(Q).select({"x": "id +"})),
    "select unknown nested": (ValueError, "plain", lambda t: t.search(Q).select(["pair.z"])),
    "scan unknown": (ValueError, "plain", lambda t: t.search().select(["nope"])),
    "scan unknown sql": (ValueError, "plain", lambda t: t.search().select({"x": "nope"})),
    "scan where unknown": (ValueError, "plain", lambda t: t.search().where("nope = 1")),
    "scan order unknown": (ValueError, "plain", lambda t: t.search().order_by(desc("nope"))),
    "where unknown": (ValueError, "plain", lambda t: t.search(Q).where("nope = 1")),
    "where unknown after": (ValueError, "plain", lambda t: t.search(Q).where("nope = 1", False)),
    "where unknown empty": (ValueError, "empty", lambda t: t.search(Q).where("nope = 1")),
    "where no sql": (ValueError, "plain", lambda t: t.search(Q).where("id ===== 1 or")),
    "where empty": (ValueError, "plain", lambda t: t.search(Q).where("")),
    "where number": (ValueError, "plain", lambda t: t.search(Q).where("id + 1")),
    "where a number": (ValueError, "plain", lambda t: t.search(Q).where(5)),
    "where distance before": (ValueError, "plain", lambda t: t.search(Q).where("_distance < 3")),
    "metric": (ValueError, "plain", lambda t: t.search(Q).distance_type("nope")),
    "metric hamming": (ValueError, "plain", lambda t: t.search(Q).distance_type("hamming")),
    "range text": (ValueError, "plain", lambda t: t.search(Q).distance_range("a", 2)),
    "nprobes text": (ValueError, "plain", lambda t: t.search(Q).nprobes("a")),
    "minimum_nprobes": (ValueError, "plain", lambda t: t.search(Q).minimum_nprobes(0)),
    "nprobes order": (
        ValueError,
        "plain",
        lambda t: t.search(Q).minimum_nprobes(9).maximum_nprobes(3),
    ),
    "order unknown": (ValueError, "plain", lambda t: t.search(Q).order_by(desc("nope"))),
    "dimensions": (ValueError, "plain", lambda t: t.search([1.0, 2.0])),
    "dimensions named": (
        ValueError,
        "plain",
        lambda t: t.search([1.0, 2.0], vector_column_name="vector"),
    ),
    "dimensions of two": (ValueError, "two_lengths", lambda t: t.search([1.0, 2.0])),
    "a null in a batch": (ValueError, "plain", lambda t: t.search([Q.tolist(), None])),
    "no dimensions": (ValueError, "plain", lambda t: t.search([[]])),
    "ragged": (ValueError, "plain", lambda t: t.search([[1.0, 2.0], [1.0]])),
    "text": (ValueError, "plain", lambda t: t.search("hello")),
    "text as vector": (ValueError, "plain", lambda t: t.search("hello", query_type="vector")),
    "hybrid": (ValueError, "plain", lambda t: t.search("hello", query_type="hybrid")),
    "fts": (ValueError, "plain", lambda t: t.search("hello", query_type="fts")),
    "fts of a vector": (TypeError, "plain", lambda t: t.search(Q, query_type="fts")),
    "query_type": (ValueError, "plain", lambda t: t.search(Q, query_type="nope")),
    "a number": (TypeError, "plain", lambda t: t.search(5)),
    "a dict": (TypeError, "plain", lambda t: t.search({"a": 1})),
    "unknown column": (RuntimeError, "plain", lambda t: t.search(Q, vector_column_name="nope")),
    "no vector": (ValueError, "plain", lambda t: t.search(Q, vector_column_name="id")),
    "two columns": (ValueError, "two", lambda t: t.search(Q)),
    "no vectors": (ValueError, "none", lambda t: t.search(Q)),
    "reranking": (ValueError, "plain", lambda t: t.search(Q).rerank(None)),
}


@pytest.mark.parametrize("case", RAISES)
def test_same_kind_of_error(pair: Pair, case: str) -> None:
    kind, table, build = RAISES[case]
    ours, theirs = pair(table)
    with pytest.raises(kind):
        build(theirs).to_arrow()
    with pytest.raises(GpuLanceError) as caught:
        build(ours).to_arrow()
    assert isinstance(caught.value, kind)


def test_same_error_of_outputs(pair: Pair) -> None:
    for table in pair("plain"):
        with pytest.raises(ValueError):
            list(table.search(Q).to_batches(0))
        with pytest.raises(ValueError):
            table.search(Q).to_pandas(flatten=0)
        with pytest.raises(ValueError):
            table.search(Q).to_pandas(blob_mode="nope")
        with pytest.raises(TypeError):
            table.search(Q).to_arrow(timeout=5)
        with pytest.raises(RuntimeError):
            table.search(Q).to_arrow(timeout=datetime.timedelta(microseconds=1))


def test_same_forms(pair: Pair) -> None:
    ours, theirs = (t.search(Q).limit(7).select(["id", "pair", "vector"]) for t in pair("plain"))
    for flatten in (None, False, True, 1, 2):
        mine, other = (b.to_pandas(flatten=flatten) for b in (ours, theirs))
        assert mine.columns.tolist() == other.columns.tolist()
        assert mine.dtypes.tolist() == other.dtypes.tolist()
        assert mine["id"].tolist() == other["id"].tolist()
        assert type(mine["vector"][0]) is type(other["vector"][0])
    assert [b.num_rows for b in ours.to_batches(3)] == [b.num_rows for b in theirs.to_batches(3)]
    assert ours.to_polars().drop("_distance").equals(theirs.to_polars().drop("_distance"))
    for mine, other in zip(ours.to_list(), theirs.to_list(), strict=True):
        assert mine.pop("_distance") == pytest.approx(other.pop("_distance"), rel=1e-5)
        assert mine == other


def test_same_blobs_of_a_scan(pair: Pair) -> None:
    ours, theirs = (t.search().to_pandas(blob_mode="bytes") for t in pair("blobs"))
    assert ours["blob"].tolist() == theirs["blob"].tolist() == [bytes(i) for i in range(5)]
    lazy = pair("blobs")[0].search().to_pandas()
    assert [file.readall() for file in lazy["blob"]] == ours["blob"].tolist()


def test_where_lancedb_gives_less(pair: Pair) -> None:
    """Differences on purpose; each is told in docs/compatibility.md."""
    ours, theirs = pair("plain")
    assert theirs.search(Q).fast_search().to_arrow().num_rows == 0
    assert ours.search(Q).fast_search().to_arrow().num_rows == 10
    nan = [float("nan"), *Q[1:].tolist()]
    assert theirs.search(nan).to_arrow().num_rows == 0
    with pytest.raises(QueryError, match="nan at position 0"):
        ours.search(nan).to_arrow()
    with pytest.raises(ValueError):
        theirs.search().order_by(desc("id")).select(["word"]).to_arrow()
    assert ours.search().order_by(desc("id")).select(["word"]).to_arrow().column_names == ["word"]
    with pytest.raises(TypeError):
        theirs.search(tuple(Q.tolist()))
    assert ours.search(tuple(Q.tolist())).limit(1).to_list()[0]["id"] == 7
    with pytest.raises(ValueError):
        theirs.search(Q).order_by(desc("_distance")).to_arrow()
    farthest = ours.search(Q).order_by(desc("_distance")).to_arrow()["_distance"].to_pylist()
    assert farthest == sorted(farthest, reverse=True)
    # lancedb rounds the query to the column's float16, we measure with the query as it is
    halves = [t.search(Q).limit(5).to_arrow() for t in pair("halves")]
    exact = np.sort(((VECTORS.astype(np.float16).astype(np.float64) - Q) ** 2).sum(axis=1))[:5]
    np.testing.assert_allclose(halves[0]["_distance"].to_numpy(), exact, rtol=1e-6)
    assert np.abs(halves[1]["_distance"].to_numpy() / exact - 1).max() > 1e-4
    assert halves[0]["vector"].equals(halves[1]["vector"])
    half = theirs.search().where("id = 1) OR (id = 2").to_arrow()
    assert half["id"].to_pylist() == [1]
    with pytest.raises(QueryError, match="closes a parenthesis"):
        ours.search().where("id = 1) OR (id = 2")
