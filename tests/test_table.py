"""Tables: what is stored, embedded, versioned and indexed, on disk and in memory."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import lance
import numpy as np
import pyarrow as pa
import pytest
import torch

from gpu_lance.db import LanceDBConnection, connect
from gpu_lance.embeddings import (
    EmbeddingFunctionConfig,
    TextEmbeddingFunction,
    fingerprint,
    get_registry,
)
from gpu_lance.errors import (
    BadInputError,
    BadVectorError,
    CommitConflictError,
    FingerprintError,
    QueryError,
    SchemaError,
    UnknownProviderError,
    UnsupportedDataError,
)
from gpu_lance.index import Flat
from gpu_lance.table import Table
from gpu_lance.types import Metric

VECTOR = pa.list_(pa.float32(), 3)
SCHEMA = pa.schema({"id": pa.int64(), "text": pa.utf8(), "vector": VECTOR})


class Letters(TextEmbeddingFunction):
    """How often a, b and c stand in a text; counts its calls."""

    calls: ClassVar[list[int]] = []

    def ndims(self) -> int:
        return 3

    def generate_embeddings(self, texts: list[str], *args: Any, **kwargs: Any) -> list[Any]:
        self.calls.append(len(texts))
        return [[float(t.count(letter)) for letter in "abc"] for t in texts]


@pytest.fixture(autouse=True)
def registered() -> None:
    get_registry().register("letters")(Letters)


@pytest.fixture(params=["folder", "memory"])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> LanceDBConnection:
    uri = "memory://" if request.param == "memory" else tmp_path / "db"
    return connect(uri, device="cpu")


def config(function: TextEmbeddingFunction | None = None) -> EmbeddingFunctionConfig:
    return EmbeddingFunctionConfig(
        vector_column="vector", source_column="text", function=function or Letters.create()
    )


@pytest.fixture
def table(db: LanceDBConnection) -> Table:
    return db.create_table("t", schema=SCHEMA, embedding_functions=[config()])


def rows(table: Table) -> dict[int, Any]:
    found = table.to_arrow().to_pylist()
    return {row["id"]: (row["text"], row["vector"]) for row in found}


def nearest(table: Table, vector: list[float], k: int = 3, where: str | None = None) -> list[int]:
    """Ids by the column's index, which has to follow the table for that."""
    index = table.column_index("vector")
    dataset = table.dataset()
    result = index.search(dataset, torch.tensor([vector]), k, Metric.L2, where=where)
    row_ids = result.row_ids[0][: result.counts[0]].tolist()
    by_id = dataset.to_table(columns=["id"], with_row_id=True).to_pydict()
    return [dict(zip(by_id["_rowid"], by_id["id"], strict=True))[i] for i in row_ids]


# ------------------------------------------------------------------- adding


def test_rows_are_embedded_and_found(table: Table) -> None:
    assert table.add([{"id": 1, "text": "aab"}, {"id": 2, "text": "ccc"}]).version == 2
    assert rows(table) == {1: ("aab", [2.0, 1.0, 0.0]), 2: ("ccc", [0.0, 0.0, 3.0])}
    assert nearest(table, [0.0, 0.0, 2.9]) == [2, 1]


def test_one_add_of_many_batches_is_one_version(table: Table) -> None:
    n = 20_000
    data = {"id": np.arange(n), "text": [f"{'a' * (i % 5)}{'b' * (i % 3)}" for i in range(n)]}
    assert table.add(data).version == 2
    stored = table.to_arrow()
    vectors = np.stack(stored["vector"].to_numpy())
    assert vectors[:, 0].tolist() == [i % 5 for i in range(n)]
    assert vectors[:, 1].tolist() == [i % 3 for i in range(n)]
    assert table.last_report is not None
    assert table.last_report.embedded == n


def test_an_error_leaves_the_table_as_it_was(table: Table) -> None:
    table.add([{"id": 1, "text": "a"}])
    before = table.to_arrow()

    def data() -> Any:
        for i in range(30_000):
            yield {"id": i, "text": "x", "vector": [1.0, 2.0] if i == 25_000 else None}

    with pytest.raises(BadVectorError, match="row 25000 has 2 dimensions instead of 3"):
        table.add(data())
    assert table.version == 2
    assert table.to_arrow() == before
    assert nearest(table, [1.0, 0.0, 0.0]) == [1]


@pytest.mark.parametrize("container", ["numpy", "torch", "list", "dlpack"])
def test_vectors_of_the_user_are_kept_whatever_holds_them(table: Table, container: str) -> None:
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)

    class Foreign:  # an array of another library, as cupy's are
        def __init__(self, tensor: torch.Tensor) -> None:
            self._tensor = tensor
            self.ndim, self.shape, self.dtype = tensor.ndim, tuple(tensor.shape), tensor.dtype

        def __len__(self) -> int:
            return len(self._tensor)

        def __dlpack__(self, **kwargs: Any) -> Any:
            return self._tensor.__dlpack__(**kwargs)

        def __dlpack_device__(self) -> Any:
            return self._tensor.__dlpack_device__()

    made: Any = {
        "numpy": lambda: matrix,
        "torch": lambda: torch.from_numpy(matrix),
        "list": lambda: matrix.tolist(),
        "dlpack": lambda: Foreign(torch.from_numpy(matrix)),
    }[container]()
    table.add({"id": [1, 2], "text": ["a", "b"], "vector": made})
    assert [vector for _, vector in rows(table).values()] == matrix.tolist()


def test_partly_null_vectors_are_completed_and_null_sources_give_null(table: Table) -> None:
    table.add(
        [
            {"id": 1, "text": "a", "vector": [9.0, 9.0, 9.0]},
            {"id": 2, "text": "abc"},
            {"id": 3, "text": None},
            {"id": 4, "text": ""},
        ]
    )
    assert [vector for _, vector in rows(table).values()] == [
        [9.0, 9.0, 9.0],
        [1.0, 1.0, 1.0],
        None,
        [0.0, 0.0, 0.0],
    ]
    assert nearest(table, [9.0, 9.0, 9.0], k=10) == [1, 2, 4]


@pytest.mark.parametrize(
    ("policy", "ids"), [("drop", [1]), ("fill", [1, 2, 3, 4]), ("null", [1, 2, 3, 4])]
)
def test_bad_vectors(table: Table, policy: str, ids: list[int]) -> None:
    bad = [
        {"id": 1, "text": "a", "vector": [1.0, 2.0, 3.0]},
        {"id": 2, "text": "a", "vector": [1.0]},
        {"id": 3, "text": "a", "vector": [float("inf"), 0.0, 0.0]},
        {"id": 4, "text": "a", "vector": [0.0, float("nan"), 0.0]},
    ]
    with pytest.raises(BadVectorError, match="row 1 has 1 dimensions"):
        table.add(bad)
    assert table.version == 1
    table.add(bad, on_bad_vectors=policy, fill_value=0.5)
    found = rows(table)
    assert sorted(found) == ids
    if policy != "drop":
        expected = [0.5] * 3 if policy == "fill" else None
        assert [found[i][1] for i in (2, 3, 4)] == [expected] * 3
    with pytest.raises(ValueError, match="on_bad_vectors"):
        table.add(bad, on_bad_vectors="ignore")


def test_zero_vectors_are_bad_for_a_column_searched_by_cosine(table: Table) -> None:
    table.create_index("vector", config=Flat(distance_type="cosine"))
    assert table.default_metric("vector") is Metric.COSINE
    with pytest.raises(BadVectorError, match="zeros"):
        table.add([{"id": 1, "text": "xyz"}])  # no letter of a, b, c
    table.add([{"id": 1, "text": "xyz"}], on_bad_vectors="null")
    assert rows(table)[1] == ("xyz", None)


def test_a_search_measures_as_the_index_of_the_column(tmp_path: Path) -> None:
    db = connect(tmp_path, device="cpu")
    data = [{"id": i, "vector": [float(i), 1.0]} for i in range(300)]
    table = db.create_table("t", data)
    query = [0.0, 7.0]

    def nearest(distance_type: str | None = None) -> list[tuple[int, float]]:
        builder = table.search(query).limit(3)
        if distance_type:
            builder = builder.distance_type(distance_type)
        return [(row["id"], row["_distance"]) for row in builder.to_list()]

    assert nearest() == nearest("l2")
    # an index that another program made, as LanceDB's create_index does
    table.to_lance().create_index("vector", "IVF_FLAT", metric="cosine", num_partitions=1)
    assert nearest() == nearest("cosine") != nearest("l2")
    table.create_index("vector", config=Flat(distance_type="dot"))
    assert nearest() == nearest("dot") != nearest("cosine")
    assert "metric=dot" in table.search(query).explain_plan()


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([{"id": 1, "nope": 2}], SchemaError, "nope"),
        ([{"id": "one", "text": "a"}], BadInputError, "id"),
        ([{"id": 1, "text": "lone \ud800"}], BadInputError, "text"),
        ([{"id": 1}], SchemaError, "'vector' is embedded from 'text'"),
        (5, UnsupportedDataError, "int"),
        ("text", UnsupportedDataError, "str"),
    ],
)
def test_data_that_does_not_fit(
    table: Table, data: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        table.add(data)
    assert table.version == 1
    assert len(table) == 0


def test_adding_nothing_makes_no_version(table: Table) -> None:
    assert table.add([]).version == 1
    assert table.version == 1


def test_overwriting_keeps_the_functions(table: Table) -> None:
    table.add([{"id": 1, "text": "a"}])
    table.add([{"id": 2, "text": "bb"}], mode="overwrite")
    assert rows(table) == {2: ("bb", [0.0, 2.0, 0.0])}
    assert list(table.embedding_functions) == ["vector"]
    assert nearest(table, [0.0, 2.0, 0.0]) == [2]
    table.add([{"text": "c", "more": True}], mode="overwrite")
    assert table.schema.names == ["text", "more", "vector"]
    assert table.to_arrow().to_pylist() == [{"text": "c", "more": True, "vector": [0.0, 0.0, 1.0]}]
    with pytest.raises(SchemaError, match="reads column 'text'"):
        table.add([{"other": 1}], mode="overwrite")
    with pytest.raises(ValueError, match="mode"):
        table.add([{"id": 1}], mode="replace")


def test_a_table_of_another_handle_knows_the_function(db: LanceDBConnection, table: Table) -> None:
    other = db.open_table("t")
    other.add([{"id": 1, "text": "ab"}])
    assert rows(table) == {1: ("ab", [1.0, 1.0, 0.0])}
    assert other.embedding_functions["vector"].function == Letters.create()


def test_a_function_that_is_not_registered_lets_the_table_open(
    db: LanceDBConnection, table: Table
) -> None:
    table.add([{"id": 1, "text": "ab"}])
    get_registry().reset()
    other = db.open_table("t")
    assert len(other) == 1
    assert nearest(other, [1.0, 1.0, 0.0]) == [1]
    other.add([{"id": 2, "text": "b", "vector": [0.0, 1.0, 0.0]}])
    with pytest.raises(UnknownProviderError, match="letters"):
        other.add([{"id": 3, "text": "c"}])
    with pytest.raises(UnknownProviderError, match="letters"):
        other.embed_query("vector", ["a"])
    assert sorted(rows(other)) == [1, 2]


def test_a_query_is_embedded_on_the_tables_device(table: Table) -> None:
    vectors = table.embed_query("vector", ["aab", ""]).vectors
    assert vectors.device == table.device
    assert vectors.tolist() == [[2, 1, 0], [0, 0, 0]]
    with pytest.raises(BadInputError, match="Query 1"):
        table.embed_query("vector", ["a", None])


def test_a_column_without_a_function_needs_a_vector(db: LanceDBConnection) -> None:
    plain = db.create_table("plain", [{"id": 1, "text": "a", "vector": [1.0, 2.0, 3.0]}])
    assert plain.embedding_functions == {}
    with pytest.raises(QueryError, match="no embedding function"):
        plain.embed_query("vector", ["a"])


class Fingerprinted(Letters):
    marker: str = "one"


def test_vectors_of_another_model_are_refused(
    db: LanceDBConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    get_registry().register("fingerprinted")(Fingerprinted)
    marks = {"weights": "aaaa"}
    monkeypatch.setattr(fingerprint, "of", lambda function: dict(marks))
    table = db.create_table(
        "f", schema=SCHEMA, embedding_functions=[config(Fingerprinted.create())]
    )
    table.add([{"id": 1, "text": "a"}])
    stored = fingerprint.read(table.schema.metadata)
    assert stored == {"vector": {"weights": "aaaa"}}
    marks["weights"] = "bbbb"
    other = db.open_table("f")
    with pytest.raises(FingerprintError, match=r"(?s)aaaa.*bbbb"):
        other.add([{"id": 2, "text": "b"}])
    with pytest.raises(FingerprintError, match=r"(?s)aaaa.*bbbb"):
        other.embed_query("vector", ["b"])
    other.add([{"id": 3, "text": "c", "vector": [0.0, 0.0, 1.0]}])  # nothing is embedded
    assert sorted(rows(other)) == [1, 3]


# --------------------------------------------------- the index gets the tensors


def test_the_index_takes_new_rows_from_the_device_without_reading_them_back(table: Table) -> None:
    table.add([{"id": 1, "text": "a"}, {"id": 2, "text": "b"}])
    index = table.column_index("vector")
    assert index.info()["refresh"]["kind"] == "append"
    table.add([{"id": 3, "text": "c"}])
    info = index.info()
    assert info["refresh"]["kind"] == "append"
    assert info["rows"] == 3
    assert info["version"] == table.version
    assert nearest(table, [0.0, 0.0, 1.0], 1) == [3]
    assert index.info()["refresh"]["kind"] == "append"  # the search had nothing to do


def test_row_ids_belong_to_their_vectors_when_writers_are_many(table: Table) -> None:
    def work(first: int) -> None:
        for i in range(first, first + 40, 4):
            table.add([{"id": j, "text": "a" * j} for j in range(i, i + 4)])

    threads = [threading.Thread(target=work, args=(t * 100 + 1,)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(table) == 160
    for i in (1, 40, 101, 340):
        assert nearest(table, [float(i), 0.0, 0.0], 1) == [i]


# ---------------------------------------------------------- changing and reading


def test_a_changed_source_is_embedded_again(table: Table) -> None:
    table.add([{"id": i, "text": "a" * i} for i in range(1, 5)])
    function = table.embedding_functions["vector"].function
    function.calls.clear()
    result = table.update(where="id in (1, 3)", values={"text": "cc"})
    assert (result.rows_updated, result.version) == (2, table.version)
    assert function.calls == [2]
    assert rows(table)[1] == rows(table)[3] == ("cc", [0.0, 0.0, 2.0])
    assert rows(table)[4] == ("aaaa", [4.0, 0.0, 0.0])
    assert nearest(table, [0.0, 0.0, 2.0], 2) == [1, 3]
    table.update(where="id = 2", values_sql={"text": "concat(text, 'b')"})
    assert rows(table)[2] == ("aab", [2.0, 1.0, 0.0])
    table.update(where="id = 2", values={"text": None})
    assert rows(table)[2] == (None, None)


def test_an_unchanged_source_keeps_its_vector(table: Table) -> None:
    table.add([{"id": 1, "text": "a", "vector": [5.0, 5.0, 5.0]}])
    table.update(values={"text": "a"})
    table.update(values={"id": 7})
    assert rows(table) == {7: ("a", [5.0, 5.0, 5.0])}
    table.update(values={"text": "b", "vector": [1.0, 2.0, 3.0]})
    assert rows(table) == {7: ("b", [1.0, 2.0, 3.0])}


def test_an_update_that_cannot_be_done_changes_nothing(table: Table) -> None:
    table.add([{"id": 1, "text": "a"}])
    for kwargs, error in [
        ({"values": {"nope": 1}}, SchemaError),
        ({"values": {"id": "x"}}, BadInputError),
        ({"values": {"vector": [1.0]}}, BadVectorError),
        ({"values_sql": {"id": "nope + 1"}}, QueryError),
        ({"where": "nope = 1", "values": {"id": 1}}, QueryError),
        ({"where": "id = 1 or", "values": {"id": 1}}, QueryError),
        ({}, ValueError),
        ({"values": {}}, ValueError),
        ({"values": {"id": 1}, "values_sql": {"id": "1"}}, ValueError),
    ]:
        with pytest.raises(error):
            table.update(**kwargs)
    assert table.version == 2
    assert rows(table) == {1: ("a", [1.0, 0.0, 0.0])}


def test_an_update_that_a_delete_overtakes_is_a_conflict(
    db: LanceDBConnection, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    table.add([{"id": 1, "text": "a"}, {"id": 2, "text": "b"}])
    other = db.open_table("t")
    ours = type(table._storage).replace_rows

    def late(storage: Any, *args: Any) -> Any:
        other.delete("id = 1")
        return ours(storage, *args)

    monkeypatch.setattr(type(table._storage), "replace_rows", late)
    with pytest.raises(CommitConflictError):
        table.update(where="id = 1", values={"text": "c"})
    assert rows(table) == {2: ("b", [0.0, 1.0, 0.0])}


def test_update_of_a_large_table_in_batches(table: Table) -> None:
    n = 20_000
    table.add({"id": np.arange(n), "text": ["a"] * n})
    assert table.update(where="id >= 100", values={"text": "b"}).rows_updated == n - 100
    vectors = {tuple(vector) for _, vector in rows(table).values()}
    assert vectors == {(1.0, 0.0, 0.0), (0.0, 1.0, 0.0)}
    assert table.count_rows("text = 'b'") == n - 100
    assert len(table) == n


def test_an_update_of_other_columns_judges_no_vector(tmp_path: Path) -> None:
    table = connect(tmp_path).create_table("t", schema=SCHEMA)
    bad = pa.table([[1], ["a"], pa.array([[np.nan, np.inf, 0.0]], VECTOR)], schema=SCHEMA)
    lance.write_dataset(bad, table.to_lance().uri, mode="append")  # what `add` refuses
    assert table.update(values={"text": "b"}).rows_updated == 1
    assert table.count_rows("text = 'b'") == 1
    with pytest.raises(BadVectorError):
        table.update(values={"vector": [np.nan, 0.0, 0.0]})


def test_an_update_evaluates_its_condition_once(table: Table) -> None:
    n = 500
    table.add({"id": np.arange(n), "text": ["a"] * n})
    updated = table.update(where="random() < 0.5", values={"text": "b"}).rows_updated
    assert 0 < updated < n
    assert table.count_rows("text = 'b'") == updated
    assert sorted(rows(table)) == list(range(n)) and len(table) == n


def test_a_filter_that_changes_with_time_is_evaluated_each_time(db: LanceDBConnection) -> None:
    now = datetime.now(UTC)
    at = [now + timedelta(milliseconds=10 * i) for i in range(100)]
    table = db.create_table("times", {"at": pa.array(at), "vector": np.zeros((100, 2), np.float32)})

    def past() -> int:
        return len(table.search([0.0, 0.0]).where("at <= NOW()").limit(100).to_list())

    first = past()
    while datetime.now(UTC) < at[-1]:
        pass
    assert first < past() == 100


def test_rows_are_deleted_and_counted(table: Table) -> None:
    table.add([{"id": i, "text": "a" * i} for i in range(10)])
    assert table.delete("id >= 8").version == 3
    assert table.count_rows() == len(table) == 8
    assert table.count_rows("id < 3") == 3
    assert nearest(table, [9.0, 0.0, 0.0], 1) == [7]
    for call in (table.delete, table.count_rows):
        with pytest.raises(QueryError):
            call("nope = 1")
        with pytest.raises(QueryError):
            call("id = 1) or (true")
    assert len(table) == 8


def test_outputs(table: Table) -> None:
    table.add([{"id": i, "text": "a"} for i in range(6)])
    assert table.head(2)["id"].to_pylist() == [0, 1]
    assert table.head().num_rows == 5
    assert table.to_pandas()["id"].tolist() == list(range(6))
    assert table.to_polars().collect()["id"].to_list() == list(range(6))
    assert table.to_lance().count_rows() == 6
    assert table.schema.field("vector").type == VECTOR
    assert (table.name, len(table)) == ("t", 6)
    assert "'t'" in repr(table)


def test_versions(table: Table) -> None:
    table.add([{"id": 1, "text": "a"}])
    table.add([{"id": 2, "text": "b"}])
    assert [v["version"] for v in table.list_versions()] == [1, 2, 3]
    table.checkout(2)
    assert table.version == 2
    assert list(rows(table)) == [1]
    assert nearest(table, [0.0, 1.0, 0.0]) == [1]
    with pytest.raises(ValueError, match="cannot be modified"):
        table.add([{"id": 3, "text": "c"}])
    table.checkout_latest()
    assert nearest(table, [0.0, 1.0, 0.0], 1) == [2]
    table.restore(2)
    assert (table.version, list(rows(table))) == (4, [1])
    assert nearest(table, [0.0, 1.0, 0.0]) == [1]
    table.tags.create("first", 1)
    table.checkout("first")
    assert len(table) == 0
    with pytest.raises(ValueError, match="no version"):
        table.checkout(99)


def test_columns_without_an_index(table: Table) -> None:
    with pytest.raises(QueryError, match="'nope'"):
        table.create_index("nope", config=Flat())
    with pytest.raises(QueryError, match="'text'"):
        table.column_index("text")


def test_a_table_frees_its_device_memory_and_loads_again(table: Table) -> None:
    table.add([{"id": 1, "text": "a"}])
    assert table.column_index("vector").info()["rows"] == 1
    table.close()
    assert table.column_index("vector").info()["rows"] == 0
    assert nearest(table, [1.0, 0.0, 0.0]) == [1]


def test_progress(table: Table) -> None:
    seen: list[tuple[int, int | None, bool]] = []

    def note(p: dict[str, Any]) -> None:
        seen.append((p["output_rows"], p["total_rows"], p["done"]))

    table.add({"id": np.arange(20_000), "text": ["a"] * 20_000}, progress=note)
    assert seen[0] == (8192, 20_000, False)
    assert seen[-1] == (20_000, 20_000, True)

    class Bar:
        n = 0
        total: int | None = None

        def update(self, k: int) -> None:
            self.n += k

    bar = Bar()
    table.add([{"id": 1, "text": "a"}, {"id": 2, "text": "a"}], progress=bar)
    assert (bar.n, bar.total) == (2, 2)
    with pytest.raises(TypeError, match="progress"):
        table.add([{"id": 1, "text": "a"}], progress=3)
