"""Columns with any number of vectors a row: what is given, what is made, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import gpu_lance
from gpu_lance.embeddings import (
    DeviceEmbeddingFunction,
    EmbeddingFunction,
    TextEmbeddingFunction,
    get_registry,
    register,
)
from gpu_lance.embeddings.device_base import Payload
from gpu_lance.errors import BadInputError, BadVectorError, EmbeddingError, QueryError, SchemaError
from gpu_lance.ingest.multivectors import assembled, bad_multivectors
from gpu_lance.pydantic import LanceModel, MultiVector, Vector

torch = pytest.importorskip("torch")

KIND = pa.list_(pa.list_(pa.float32(), 2))


def of(word: str) -> list[float]:
    """A unit vector for a word, by its letters."""
    angle = sum(word.encode()) % 360 * np.pi / 180
    return [float(np.cos(angle)), float(np.sin(angle))]


@register("words-on-device")
class Words(DeviceEmbeddingFunction):
    """One vector a word, as a tensor; a text without words has none."""

    multivector = True

    def ndims(self) -> int:
        return 2

    def prepare_items(self, items: list[Any], side: Any) -> Payload:
        words = [item.split() for item in items]
        return Payload(words, costs=np.array([len(some) for some in words]))

    def forward(self, data: Any, rows: np.ndarray, side: Any, device: Any) -> Any:
        words = [word for row in rows for word in data[row]]
        vectors = torch.tensor([of(word) for word in words], device=device).reshape(-1, 2)
        return vectors, np.array([len(data[row]) for row in rows])


@register("words-in-lists")
class ListedWords(TextEmbeddingFunction):
    """The same, in lists."""

    def ndims(self) -> int:
        return 2

    def generate_embeddings(self, texts: Any, *args: Any, **kwargs: Any) -> list[Any]:
        return [[of(word) for word in text.split()] for text in texts]


@register("words-in-arrays")
class ArrayWords(ListedWords):
    """The same, in arrays."""

    def generate_embeddings(self, texts: Any, *args: Any, **kwargs: Any) -> list[Any]:
        return [np.array([of(w) for w in text.split()]).reshape(-1, 2) for text in texts]


@register("one-of-a-text")
class OneOfAText(TextEmbeddingFunction):
    """One vector a text."""

    def ndims(self) -> int:
        return 2

    def generate_embeddings(self, texts: Any, *args: Any, **kwargs: Any) -> list[Any]:
        return [of(text) for text in texts]


@pytest.fixture(params=["memory", "folder"])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    uri = "memory://" if request.param == "memory" else tmp_path / "db"
    return gpu_lance.connect(uri, device="cpu")


def schema_of(function: EmbeddingFunction) -> type[LanceModel]:
    class Doc(LanceModel):
        id: int
        text: str | None = function.SourceField()
        vectors: MultiVector(2) = function.VectorField()  # type: ignore[valid-type]

    return Doc


ROWS = [{"id": i, "text": t} for i, t in enumerate(["a", None, "bb c ddd", "e f", "gg"])]


def wanted(text: str | None, one: bool) -> Any:
    if text is None:
        return None
    vectors = [of(text)] if one else [of(word) for word in text.split()]
    return np.array(vectors, np.float32).tolist()


@pytest.mark.parametrize(
    "name", ["words-on-device", "words-in-lists", "words-in-arrays", "one-of-a-text"]
)
def test_any_function_fills_a_multivector_column(db: Any, name: str) -> None:
    function = get_registry().get(name).create()
    table = db.create_table("t", schema=schema_of(function))
    table.add(ROWS)
    assert table.schema.field("vectors").type == KIND
    stored = table.to_arrow().to_pydict()
    for text, vectors in zip(stored["text"], stored["vectors"], strict=True):
        assert (vectors is None) == (text is None)
        if text is not None:
            np.testing.assert_allclose(vectors, wanted(text, name == "one-of-a-text"), atol=1e-6)
    hits = table.search("bb c ddd").limit(2).to_list()
    assert hits[0]["id"] == 2
    assert hits[0]["_distance"] == pytest.approx(0, abs=1e-5)
    both = table.search(["gg", "e f"]).limit(1).to_list()
    assert [(hit["query_index"], hit["id"]) for hit in both] == [(0, 4), (1, 3)]


def test_a_multivector_function_makes_its_column_by_itself(db: Any) -> None:
    function = get_registry().get("words-on-device").create()
    from gpu_lance.embeddings import EmbeddingFunctionConfig

    config = EmbeddingFunctionConfig(
        vector_column="vectors", source_column="text", function=function
    )
    table = db.create_table("t", ROWS, embedding_functions=[config])
    assert table.schema.field("vectors").type == KIND
    assert len(table.to_arrow()["vectors"][2]) == 3


def test_a_column_of_one_vector_a_row_is_refused(db: Any) -> None:
    function = get_registry().get("words-on-device").create()

    class Doc(LanceModel):
        text: str = function.SourceField()
        vector: Vector(2) = function.VectorField()  # type: ignore[valid-type]

    with pytest.raises(SchemaError, match=r"declare it as MultiVector\(2\)"):
        db.create_table("t", schema=Doc)


def test_several_vectors_for_a_column_of_one_are_told(db: Any) -> None:
    function = get_registry().get("words-in-lists").create()

    class Doc(LanceModel):
        text: str = function.SourceField()
        vector: Vector(2) = function.VectorField()  # type: ignore[valid-type]

    table = db.create_table("t", schema=Doc)
    with pytest.raises(EmbeddingError, match=r"several vectors go into .* MultiVector\(2\)"):
        table.add([{"text": "a b c"}])


def test_the_distance_is_the_sum_of_the_least(db: Any) -> None:
    function = get_registry().get("words-on-device").create()
    table = db.create_table("t", schema=schema_of(function))
    table.add(ROWS)
    query = np.array([of("x"), of("yy"), of("z")], np.float32)
    for metric in ("l2", "cosine", "dot"):
        hits = table.search(query).distance_type(metric).to_list()
        assert sorted(hit["id"] for hit in hits) == [0, 2, 3, 4]
        assert [hit["_distance"] for hit in hits] == sorted(hit["_distance"] for hit in hits)
        for hit in hits:
            vectors = np.array(hit["vectors"])
            if metric == "l2":
                each = ((query[:, None] - vectors[None]) ** 2).sum(-1)
            else:
                each = 1 - query @ vectors.T
            assert hit["_distance"] == pytest.approx(each.min(1).sum(), abs=1e-5)


def test_queries_of_several_vectors_and_batches_of_them(db: Any) -> None:
    table = db.create_table("t", schema=schema_of(get_registry().get("words-on-device").create()))
    table.add(ROWS)
    one = [of("bb"), of("c"), of("ddd")]
    for query in (one, np.array(one), torch.tensor(one), pa.array(one)):
        assert table.search(query).limit(1).to_list()[0]["id"] == 2
    for batch in ([one, [of("gg")]], [np.array(one), np.array([of("gg")])]):
        hits = table.search(batch).limit(1).to_list()
        assert [(hit["query_index"], hit["id"]) for hit in hits] == [(0, 2), (1, 4)]
    stack = np.array([one, one])
    assert [hit["id"] for hit in table.search(stack).limit(1).to_list()] == [2, 2]
    assert table.search(of("gg")).limit(1).to_list()[0]["id"] == 4
    with pytest.raises(QueryError, match="3 dimensions.*has 2"):
        table.search([[1.0, 2.0, 3.0]])
    with pytest.raises(QueryError, match="one length"):
        table.search([one, [[1.0]]])
    with pytest.raises(QueryError):
        table.search([one, []])
    with pytest.raises(QueryError, match="nan"):
        table.search([[float("nan"), 0.0]]).to_list()


def test_a_query_without_a_word_is_bad(db: Any) -> None:
    table = db.create_table("t", schema=schema_of(get_registry().get("words-on-device").create()))
    table.add(ROWS)
    with pytest.raises(BadInputError, match="Query 0 cannot be embedded"):
        table.search("").to_list()


@pytest.mark.parametrize("name", ["words-on-device", "words-in-lists"])
def test_a_text_without_a_vector_costs_one_row(db: Any, name: str) -> None:
    rows = [{"id": 0, "text": "a b"}, {"id": 1, "text": " "}, {"id": 2, "text": "c"}]
    table = db.create_table("t", schema=schema_of(get_registry().get(name).create()))
    with pytest.raises(BadInputError, match=r"Row 1, column 'text'.*no vector"):
        table.add(rows)
    assert len(table) == 0
    table.add(rows, on_bad_vectors="null")
    assert [vectors is None for vectors in table.to_arrow()["vectors"].to_pylist()] == [0, 1, 0]
    table.add(rows, on_bad_vectors="drop", mode="overwrite")
    assert table.to_arrow()["id"].to_pylist() == [0, 2]
    table.add(rows, on_bad_vectors="fill", fill_value=0.5, mode="overwrite")
    assert table.to_arrow()["vectors"].to_pylist()[1] == [[0.5, 0.5]]


def test_given_vectors_stay_and_missing_ones_are_made(db: Any) -> None:
    table = db.create_table("t", schema=schema_of(get_registry().get("words-on-device").create()))
    table.add(
        [
            {"id": 0, "text": "a b", "vectors": [[1.0, 0.0]]},
            {"id": 1, "text": "c d", "vectors": None},
            {"id": 2, "text": None, "vectors": None},
            {"id": 3, "text": "e", "vectors": []},
            {"id": 4, "text": "f", "vectors": np.ones((3, 2))},
        ]
    )
    stored = table.to_arrow()["vectors"].to_pylist()
    assert stored[0] == [[1.0, 0.0]]
    np.testing.assert_allclose(stored[1], wanted("c d", False), atol=1e-6)
    assert stored[2] is None
    assert stored[3] == []
    assert stored[4] == [[1.0, 1.0]] * 3
    assert {hit["id"] for hit in table.search([1.0, 0.0]).to_list()} == {0, 1, 4}


BAD = [
    [[1.0, float("nan")]],
    [[1.0, 2.0], [float("inf"), 0.0]],
    [[1.0, 2.0], [1.0]],
    [[1.0, 2.0, 3.0]],
    [[1.0, None]],
    [[1.0, 2.0], None],
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_vectors_are_treated_as_the_caller_says(db: Any, bad: Any) -> None:
    table = db.create_table("t", schema=pa.schema({"id": pa.int64(), "vectors": KIND}))
    rows = [{"id": 0, "vectors": [[1.0, 0.0]]}, {"id": 1, "vectors": bad}, {"id": 2, "vectors": []}]
    with pytest.raises(BadVectorError, match="row 1, of which vector"):
        table.add(rows)
    table.add(rows, on_bad_vectors="drop")
    assert table.to_arrow().to_pydict() == {"id": [0, 2], "vectors": [[[1.0, 0.0]], []]}
    table.add(rows, on_bad_vectors="null", mode="overwrite")
    assert table.to_arrow()["vectors"].to_pylist() == [[[1.0, 0.0]], None, []]
    table.add(rows, on_bad_vectors="fill", fill_value=2.0, mode="overwrite")
    assert table.to_arrow()["vectors"].to_pylist() == [[[1.0, 0.0]], [[2.0, 2.0]], []]


def test_float16_and_float64_columns_are_filled(db: Any) -> None:
    function = get_registry().get("words-on-device").create()
    for kind in (pa.float16(), pa.float64()):

        class Doc(LanceModel):
            text: str = function.SourceField()
            vectors: MultiVector(2, kind) = function.VectorField()  # type: ignore[valid-type]

        table = db.create_table(str(kind), schema=Doc)
        table.add([{"text": "one two"}])
        stored = np.array(table.to_arrow()["vectors"].to_pylist()[0], float)
        np.testing.assert_allclose(stored, wanted("one two", False), atol=1e-3)
        assert table.search("two").limit(1).to_list()[0]["_distance"] == pytest.approx(0, abs=1e-4)


def test_a_changed_source_makes_new_vectors(db: Any) -> None:
    table = db.create_table("t", schema=schema_of(get_registry().get("words-on-device").create()))
    table.add(ROWS)
    assert table.search("bb c ddd").limit(1).to_list()[0]["id"] == 2
    table.update(where="id = 4", values={"text": "x y z"})
    hit = table.search("x y z").limit(1).to_list()[0]
    assert hit["id"] == 4
    np.testing.assert_allclose(hit["vectors"], wanted("x y z", False), atol=1e-6)
    table.update(where="id = 0", values={"id": 10})
    assert table.search("a").limit(1).to_list()[0]["id"] == 10
    new = [{"id": 3, "text": "h"}, {"id": 7, "text": "i j"}]
    table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(new)
    assert len(table) == 6
    hit = table.search("i j").limit(1).to_list()[0]
    assert (hit["id"], len(hit["vectors"])) == (7, 2)
    assert table.search("h").limit(1).to_list()[0]["id"] == 3
    table.delete("id = 7")
    assert 7 not in {hit["id"] for hit in table.search("i j").to_list()}


def test_an_add_is_searched_without_reading_it_back(db: Any) -> None:
    table = db.create_table("t", schema=schema_of(get_registry().get("words-on-device").create()))
    table.add(ROWS)
    assert table.search("gg").limit(1).to_list()[0]["id"] == 4
    before = table.resident_columns()["vectors"]["version"]
    table.add([{"id": 9, "text": "q r"}])
    held = table.resident_columns()["vectors"]
    assert held["version"] == before + 1
    assert held["refresh"]["kind"] == "append"
    assert table.search("q r").limit(1).to_list()[0]["id"] == 9


def test_filters_and_ranges(db: Any) -> None:
    table = db.create_table("t", schema=schema_of(get_registry().get("words-on-device").create()))
    table.add(ROWS)
    hits = table.search("bb c ddd").where("id <> 2").to_list()
    assert {hit["id"] for hit in hits} == {0, 3, 4}
    worst = hits[-1]["_distance"]
    some = table.search("bb c ddd").distance_range(hits[0]["_distance"], worst).to_list()
    assert worst not in [hit["_distance"] for hit in some]
    assert hits[0]["_distance"] in [hit["_distance"] for hit in some]


def test_many_rows_go_through_the_threaded_pipeline(db: Any) -> None:
    table = db.create_table("t", schema=schema_of(get_registry().get("words-on-device").create()))
    texts = [" ".join(["w" * (i % 7 + 1)] * (i % 5 + 1)) for i in range(20_000)]
    table.add({"id": np.arange(20_000), "text": texts})
    stored = table.to_arrow()["vectors"].combine_chunks()
    counts = stored.value_lengths().to_numpy()
    assert counts.tolist() == [i % 5 + 1 for i in range(20_000)]
    np.testing.assert_allclose(stored[19_999].as_py(), wanted(texts[-1], False), atol=1e-6)


class Wrong(ListedWords):
    answer: Any = None

    def generate_embeddings(self, texts: Any, *args: Any, **kwargs: Any) -> list[Any]:
        return [self.answer for _ in texts]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([[1.0, 2.0], [1.0]], "1 numbers for item 0"),
        ([[1.0, 2.0], None], "None among the vectors of item 0"),
        ([[1.0, "x"]], "holds 'x'"),
        ([[[1.0, 2.0]]], "item 0"),
        ("ab", "item 0"),
        (3.0, "item 0"),
    ],
)
def test_what_a_function_returns_is_checked(db: Any, answer: Any, message: str) -> None:
    register("wrong-words")(Wrong)
    table = db.create_table("t", schema=schema_of(Wrong(answer=answer)))
    with pytest.raises(EmbeddingError, match=message):
        table.add(ROWS)


def test_a_device_function_that_gives_no_lengths_is_told(db: Any) -> None:
    @register("no-lengths")
    class NoLengths(Words):
        def forward(self, data: Any, rows: np.ndarray, side: Any, device: Any) -> Any:
            return super().forward(data, rows, side, device)[0]

    table = db.create_table("t", schema=schema_of(NoLengths.create()))
    with pytest.raises(EmbeddingError, match="number of vectors of each"):
        table.add(ROWS)


def test_bad_rows_of_a_slice() -> None:
    array = pa.array([[[9.0]], [[1.0, 2.0], [3.0, 4.0]], None, [[0.0, 0.0]], [[1.0]]])
    assert bad_multivectors(array[1:], 2).tolist() == [False, False, False, True]
    assert bad_multivectors(array[1:4], 2, zero_is_bad=True).tolist() == [False, False, True]


def test_parts_are_put_in_order() -> None:
    one = (np.array([0, 3]), np.arange(6, dtype=np.float32).reshape(3, 2), np.array([1, 2]))
    two = (np.array([1]), np.full((2, 2), 9, np.float32), np.array([2]))
    assert assembled(5, [one, two], KIND).to_pylist() == [
        [[0.0, 1.0]], [[9.0, 9.0], [9.0, 9.0]], None, [[2.0, 3.0], [4.0, 5.0]], None,
    ]  # fmt: skip
