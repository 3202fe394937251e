"""Tables that go to lancedb and come back: either reads, searches and adds to the other's.

Most tests run in both directions: made by gpu_lance and opened by lancedb, and the reverse.
"""

from __future__ import annotations

import json
import logging
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import lancedb
import lancedb.embeddings
import lancedb.pydantic
import numpy as np
import pyarrow as pa
import pytest

import gpu_lance
import gpu_lance.embeddings
import gpu_lance.pydantic
from gpu_lance.embeddings import fingerprint
from gpu_lance.embeddings.locate import locate
from gpu_lance.errors import FingerprintError, QueryError

LETTERS = "compat-letters"
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
TEXTS = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "A man is riding a horse.",
    "A woman is playing violin.",
    "A monkey is playing drums.",
    "A cheetah is running behind its prey.",
]
QUERIES = ["bread", "An animal makes music.", "Someone rides"]


def letters_of(package: ModuleType) -> Any:
    """The same function for either package: how often each letter stands in a text."""

    class Letters(package.embeddings.TextEmbeddingFunction):
        embedded: ClassVar[list[str]] = []

        def ndims(self) -> int:
            return len(ALPHABET)

        def generate_embeddings(self, texts: list[str]) -> list[list[float]]:
            self.embedded.extend(texts)
            return counts(texts).tolist()

    return Letters


def counts(texts: list[str]) -> np.ndarray:
    """(n, 26) float32."""
    return np.array([[t.lower().count(x) for x in ALPHABET] for t in texts], np.float32)


@pytest.fixture(autouse=True)
def registered() -> None:
    for package in (gpu_lance, lancedb):
        package.embeddings.get_registry()._functions.pop(LETTERS, None)
        package.embeddings.register(LETTERS)(letters_of(package))


def connect(package: ModuleType, folder: Path) -> Any:
    """A connection whose tables always read the latest version."""
    if package is gpu_lance:
        return gpu_lance.connect(folder, device="cpu")
    return lancedb.connect(folder, read_consistency_interval=timedelta(0))


def make(package: ModuleType, folder: Path, provider: str = LETTERS, **arguments: Any) -> Any:
    """An empty table `t` that embeds its text."""
    function = package.embeddings.get_registry().get(provider).create(**arguments)

    class Schema(package.pydantic.LanceModel):
        id: int
        text: str = function.SourceField()
        vector: package.pydantic.Vector(function.ndims()) = function.VectorField()

    return connect(package, folder).create_table("t", schema=Schema)


def texts(first: int = 0) -> list[dict[str, Any]]:
    return [{"id": first + i, "text": text} for i, text in enumerate(TEXTS)]


@pytest.fixture(params=["ours to theirs", "theirs to ours"])
def sides(request: pytest.FixtureRequest) -> tuple[ModuleType, ModuleType]:
    """The package that makes the table, and the one that opens it."""
    pair = (gpu_lance, lancedb)
    return pair if request.param == "ours to theirs" else (lancedb, gpu_lance)


def hits(table: Any, query: Any, k: int = 20, **options: Any) -> list[tuple[int, float]]:
    builder = table.search(query).limit(k)
    for name, value in options.items():
        builder = getattr(builder, name)(value)
    found = builder.select(["id", "_distance"]).to_arrow()
    return list(zip(found["id"].to_pylist(), found["_distance"].to_pylist(), strict=True))


def check_agree(ours: Any, theirs: Any, queries: list[Any], **options: Any) -> None:
    """Both libraries find the same rows, at the same distances; rows that tie may change places."""
    for query in queries:
        mine, other = hits(ours, query, **options), hits(theirs, query, **options)
        np.testing.assert_allclose(
            [distance for _, distance in mine], [distance for _, distance in other],
            rtol=2e-5, atol=2e-6,
        )  # fmt: skip

        def key(hit: tuple[int, float]) -> tuple[float, int]:
            return round(hit[1], 3), hit[0]

        assert [i for i, _ in sorted(mine, key=key)] == [i for i, _ in sorted(other, key=key)]


def by_package(folder: Path) -> tuple[Any, Any]:
    return tuple(connect(package, folder).open_table("t") for package in (gpu_lance, lancedb))  # type: ignore[return-value]


# ------------------------------------------------------------ there and back


def test_a_model_embeds_on_both_sides(sides: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    maker, opener = sides
    # by its folder, so that lancedb finds it without the hub
    folder = locate("all-MiniLM-L6-v2", None, "sentence-transformers").folder
    made = make(maker, tmp_path, "sentence-transformers", name=str(folder))
    made.add(texts())
    opened = connect(opener, tmp_path).open_table("t")
    assert [hits(opened, query, 1)[0][0] for query in QUERIES] == [1, 5, 3]
    opened.add([{"id": 100, "text": "A loaf of bread."}])
    again = connect(maker, tmp_path).open_table("t")
    assert [i for i, _ in hits(again, QUERIES[0], 2)] == [100, 1]
    again.add([{"id": 101, "text": "Loaves of bread."}])
    assert again.count_rows() == opened.count_rows() == len(TEXTS) + 2
    check_agree(*by_package(tmp_path), QUERIES)
    # the vectors that one side made are those that the other would have made
    stored = np.stack(connect(gpu_lance, tmp_path).open_table("t").to_arrow()["vector"].to_numpy())
    for package in (gpu_lance, lancedb):
        create = package.embeddings.get_registry().get("sentence-transformers").create
        wanted = create(name=str(folder)).generate_embeddings(
            [*TEXTS, "A loaf of bread.", "Loaves of bread."]
        )
        np.testing.assert_allclose(stored, np.stack([np.asarray(v) for v in wanted]), atol=1e-5)


def test_a_function_of_the_user_embeds_on_both_sides(
    sides: tuple[ModuleType, ModuleType], tmp_path: Path
) -> None:
    maker, opener = sides
    made = make(maker, tmp_path)
    made.add(texts())
    opened = connect(opener, tmp_path).open_table("t")
    for row in texts():
        assert hits(opened, row["text"], 1) == [(row["id"], 0.0)]
    opened.add([{"id": 100, "text": "zzz"}])
    assert hits(made, "zzzz", 1) == [(100, 1.0)]  # the open table follows
    made.add([{"id": 101, "text": "qqq"}])
    assert hits(opened, "qqqq", 1) == [(101, 1.0)]
    check_agree(*by_package(tmp_path), [*QUERIES, *TEXTS])
    config = opened.embedding_functions["vector"]
    assert (config.source_column, config.vector_column) == ("text", "vector")
    assert type(config.function) is opener.embeddings.get_registry().get(LETTERS)


@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_searches_agree_on_many_rows(
    sides: tuple[ModuleType, ModuleType], tmp_path: Path, metric: str
) -> None:
    random = np.random.default_rng(3)
    words = ["".join(random.choice(list(ALPHABET), 12)) for _ in range(500)]
    made = make(sides[0], tmp_path)
    made.add([{"id": i, "text": word} for i, word in enumerate(words[:300])])
    connect(sides[1], tmp_path).open_table("t").add(
        [{"id": 300 + i, "text": word} for i, word in enumerate(words[300:])]
    )
    queries: list[Any] = ["quick", "brown fox", *counts(["over", "lazy dog"])]
    tables = by_package(tmp_path)
    # all rows, so that ties at the last place need no decision
    check_agree(*tables, queries, k=500, distance_type=metric)
    check_agree(*tables, queries, k=500, distance_type=metric, where="id % 3 = 1 AND text > 'h'")


# --------------------------------------------- changes on one side, seen on the other


def test_changes_are_seen(sides: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    maker, opener = sides
    made = make(maker, tmp_path)
    made.add(texts())
    opened = connect(opener, tmp_path).open_table("t")
    for table in (made, opened):  # both hold the vectors before anything changes
        assert len(hits(table, "bread")) == len(TEXTS)

    opened.delete("id = 1")
    assert sorted(i for i, _ in hits(made, "bread")) == [0, 2, 3, 4, 5, 6]

    opened.update(where="id = 2", values={"text": "xxxxx", "vector": counts(["xxxxx"])[0].tolist()})
    assert hits(made, "xxxxx", 1) == [(2, 0.0)]

    merge = opened.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
    merge.execute([{"id": 3, "text": "jjjjj"}, {"id": 50, "text": "kkkkk"}])
    assert [hits(made, text, 1) for text in ("jjjjj", "kkkkk")] == [[(3, 0.0)], [(50, 0.0)]]
    assert "A man is riding a horse." not in made.to_arrow()["text"].to_pylist()

    for i in range(60, 64):
        opened.add([{"id": i, "text": ALPHABET[:4] * (i - 58)}])
    opened.optimize()
    assert len(made.to_lance().get_fragments()) == 1
    assert hits(made, ALPHABET[:4] * 5, 1) == [(63, 0.0)]
    check_agree(*by_package(tmp_path), [*QUERIES, "abcd"])

    opened.delete("true")
    assert hits(made, "bread") == []


def test_update_of_a_source_embeds_here_only(tmp_path: Path) -> None:
    """A difference on purpose: lancedb leaves the old vector."""
    ours = make(gpu_lance, tmp_path)
    ours.add(texts())
    theirs = connect(lancedb, tmp_path).open_table("t")
    ours.update(where="id = 1", values={"text": "zzz"})
    assert hits(theirs, "zzz", 1) == [(1, 0.0)]
    theirs.update(where="id = 2", values={"text": "qqq"})
    assert hits(ours, texts()[2]["text"], 1) == hits(theirs, texts()[2]["text"], 1) == [(2, 0.0)]
    assert hits(ours, "qqq", 1)[0][0] != 2


def test_nulls_pass_both_ways(sides: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    maker, opener = sides
    function = maker.embeddings.get_registry().get(LETTERS).create()
    schema = pa.schema(
        {"id": pa.int64(), "text": pa.utf8(), "vector": pa.list_(pa.float32(), len(ALPHABET))}
    )
    config = maker.embeddings.EmbeddingFunctionConfig(
        vector_column="vector", source_column="text", function=function
    )
    made = connect(maker, tmp_path).create_table("t", schema=schema, embedding_functions=[config])
    made.add([{"id": 1, "text": "abc"}])
    # lancedb embeds a whole column or nothing, and takes a null for a bad vector
    rows = [{"id": 2, "text": None, "vector": None}, {"id": 3, "text": "x", "vector": [1.0] * 26}]
    for table in (made, connect(opener, tmp_path).open_table("t")):
        table.add(pa.Table.from_pylist(rows, schema), on_bad_vectors="null")
    for table in by_package(tmp_path):
        assert table.count_rows("vector IS NULL") == 2
        assert [i for i, _ in hits(table, "abc")] == [1, 3, 3]
    check_agree(*by_package(tmp_path), ["abc", "x"])


# ------------------------------------------------------- without stable row ids


def test_a_table_of_lancedb_has_no_stable_row_ids(tmp_path: Path) -> None:
    theirs = make(lancedb, tmp_path)
    theirs.add(texts())
    theirs.add(texts(first=100))
    ours = connect(gpu_lance, tmp_path).open_table("t")
    assert not ours.to_lance().has_stable_row_ids
    assert ids_of(hits(ours, TEXTS[3], 2)) == {3, 103}
    # compaction moves every row to another row id
    before = row_ids(ours)
    theirs.delete("id < 3")
    theirs.optimize()
    assert row_ids(ours) != before
    assert ids_of(hits(ours, TEXTS[3], 2)) == {3, 103}
    assert ids_of(hits(ours, TEXTS[1], 1)) == {101}
    check_agree(ours, theirs, [*QUERIES, *TEXTS])

    ours.add([{"id": 200, "text": "zzz"}])
    ours.update(where="id = 100", values={"text": "qqq"})
    merge = ours.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
    merge.execute([{"id": 101, "text": "xxx"}, {"id": 201, "text": "jjj"}])
    ours.delete("id = 103")
    ours.optimize()
    for table in (ours, theirs):
        found = [hits(table, text, 1) for text in ("zzz", "qqq", "xxx", "jjj")]
        assert found == [[(200, 0.0)], [(100, 0.0)], [(101, 0.0)], [(201, 0.0)]]
        assert table.count_rows() == 12
    check_agree(ours, theirs, [*QUERIES, *TEXTS])


def ids_of(found: list[tuple[int, float]]) -> set[int]:
    return {i for i, _ in found}


def row_ids(table: Any) -> list[int]:
    found = table.search().select(["id"]).with_row_id(True).to_arrow().sort_by("id")
    return found["_rowid"].to_pylist()


def test_our_tables_keep_their_row_ids_in_the_hands_of_lancedb(tmp_path: Path) -> None:
    ours = make(gpu_lance, tmp_path)
    for first in (0, 100):
        ours.add(texts(first))
    before = dict(zip([*range(7), *range(100, 107)], row_ids(ours), strict=True))
    theirs = connect(lancedb, tmp_path).open_table("t")
    theirs.update(where="id = 5", values={"text": "zzz"})
    theirs.delete("id = 6")
    theirs.add(texts(first=200))
    theirs.optimize()
    assert ours.to_lance().has_stable_row_ids
    after = dict(zip(sorted(ours.to_arrow()["id"].to_pylist()), row_ids(ours), strict=True))
    assert {i: after[i] for i in before if i != 6} == {i: before[i] for i in before if i != 6}
    check_agree(ours, theirs, [*QUERIES, *TEXTS])


# ------------------------------------------------------------ metadata, indexes


def everything(table: Any, first: int) -> None:
    """Each kind of change once."""
    table.add([{"id": first, "text": "abc"}, {"id": first + 1, "text": "def"}])
    table.update(where=f"id = {first}", values={"text": "abd"})
    table.delete(f"id = {first + 1}")
    merge = table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
    merge.execute([{"id": first, "text": "abe"}])
    table.optimize()


def test_metadata_survives_both(sides: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    made = make(sides[0], tmp_path)
    made.add(texts())
    dataset = connect(gpu_lance, tmp_path).open_table("t").to_lance()
    entry = json.loads(dataset.schema.metadata[b"embedding_functions"])[0]
    assert entry == {
        "name": LETTERS, "model": {}, "source_column": "text", "vector_column": "vector",
    }  # fmt: skip
    extra = {"embedding_functions": json.dumps([{**entry, "more": [1]}]), "owner": "me"}
    dataset.update_schema_metadata(extra)
    connect(gpu_lance, tmp_path).open_table("t").create_index(
        "vector", config=gpu_lance.index.Flat(distance_type="cosine")
    )
    before = made.schema.metadata
    assert {b"owner", b"embedding_functions", b"gpu_lance.indexes"} <= before.keys()
    for first, package in ((100, sides[0]), (200, sides[1])):
        everything(connect(package, tmp_path).open_table("t"), first)
        for table in by_package(tmp_path):
            assert table.schema.metadata == before
    assert made.count_rows() == len(TEXTS) + 2
    assert connect(gpu_lance, tmp_path).open_table("t").default_metric("vector") == "cosine"


def test_the_fingerprint_survives_lancedb(tmp_path: Path) -> None:
    folder = locate("all-MiniLM-L6-v2", None, "sentence-transformers").folder
    ours = make(gpu_lance, tmp_path, "sentence-transformers", name=str(folder))
    ours.add(texts())
    stored = fingerprint.read(ours.schema.metadata)
    assert stored["vector"]["dims"] == "384"
    everything(connect(lancedb, tmp_path).open_table("t"), 100)
    again = connect(gpu_lance, tmp_path).open_table("t")
    assert fingerprint.read(again.schema.metadata) == stored
    # and still guards: another model's vectors are told apart
    metadata = again.schema.metadata[fingerprint.METADATA_KEY].decode()
    wrong = metadata.replace(stored["vector"]["weights"], "sha256:0")
    again.to_lance().update_schema_metadata({fingerprint.METADATA_KEY.decode(): wrong})
    with pytest.raises(FingerprintError, match="weights"):
        again.search("bread").to_list()


def test_device_and_batch_size_stay_here(tmp_path: Path) -> None:
    folder = locate("all-MiniLM-L6-v2", None, "sentence-transformers").folder
    make(
        gpu_lance, tmp_path, "sentence-transformers",
        name=str(folder), device="cpu", batch_size=2, dtype="float32", max_retries=1,
    ).add(texts())  # fmt: skip
    theirs = connect(lancedb, tmp_path).open_table("t")
    stored = json.loads(theirs.schema.metadata[b"embedding_functions"])[0]["model"]
    assert stored == {"name": str(folder), "max_retries": 1}
    assert hits(theirs, "bread", 1)[0][0] == 1


def test_indexes_of_lancedb_change_no_answer(tmp_path: Path) -> None:
    ours = make(gpu_lance, tmp_path)
    random = np.random.default_rng(4)
    words = ["".join(random.choice(list(ALPHABET), 12)) for _ in range(600)]
    ours.add([{"id": i, "text": word} for i, word in enumerate(words)])
    exact = [hits(ours, word) for word in words[:5]]
    filtered = hits(ours, "abc", where="id >= 500")
    theirs = connect(lancedb, tmp_path).open_table("t")
    theirs.create_index("vector", config=lancedb.index.IvfPq(num_partitions=8, num_sub_vectors=2))
    theirs.create_index("id", config=lancedb.index.BTree())
    assert len(theirs.list_indices()) == 2
    assert [hits(ours, word) for word in words[:5]] == exact
    assert hits(ours, "abc", where="id >= 500") == filtered
    ours.add([{"id": 600, "text": "zzz"}])
    assert hits(ours, "zzz", 1) == hits(theirs, "zzz", 1, nprobes=8) == [(600, 0.0)]
    assert len(theirs.list_indices()) == 2


# ------------------------------------------------------------- what the other lacks


def test_an_overwrite_by_lancedb_takes_the_function_away(tmp_path: Path) -> None:
    ours = make(gpu_lance, tmp_path)
    ours.add(texts())
    assert len(hits(ours, "bread")) == len(TEXTS)
    theirs = connect(lancedb, tmp_path).open_table("t")
    theirs.add(pa.table({"id": [1], "text": ["a"]}), mode="overwrite")
    with pytest.raises(QueryError):
        ours.search("bread")
    assert ours.to_arrow().column_names == theirs.to_arrow().column_names
    ours.restore(2)
    assert len(hits(ours, "bread")) == len(hits(theirs, "bread")) == len(TEXTS)


def test_a_function_that_only_the_writer_knows(
    sides: tuple[ModuleType, ModuleType], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = make(sides[0], tmp_path)
    made.add(texts())
    gpu_lance.embeddings.get_registry()._functions.pop(LETTERS)
    ours = connect(gpu_lance, tmp_path).open_table("t")
    vector = counts([TEXTS[2]])[0]
    with caplog.at_level(logging.WARNING):
        assert hits(ours, vector, 1) == [(2, 0.0)]
        with pytest.raises(KeyError, match=f"No embedding function is registered as '{LETTERS}'"):
            ours.search("bread").to_list()
    # rows with vectors of their own can still be added, and the entry stays as it was
    ours.add([{"id": 100, "text": "zzz", "vector": counts(["zzz"])[0]}])
    theirs = connect(lancedb, tmp_path).open_table("t")
    assert hits(theirs, "zzz", 1) == [(100, 0.0)]
