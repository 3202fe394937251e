"""Functions of the user's own, end to end: found, asked in bounded batches, held to their word."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from pydantic import create_model

import gpu_lance
from gpu_lance.embeddings import (
    DeviceEmbeddingFunction,
    EmbeddingFunction,
    EmbeddingFunctionConfig,
    TextEmbeddingFunction,
    calls,
    get_registry,
)
from gpu_lance.embeddings.device_base import Payload
from gpu_lance.errors import BadInputError, BadVectorError, EmbeddingError
from gpu_lance.ingest.read import MAX_ROWS
from gpu_lance.pydantic import LanceModel, MultiVector, Vector

CPU = torch.device("cpu")

# ------------------------------------------------------- the ways to write one


class OverText(TextEmbeddingFunction):
    asked: ClassVar[list[int]] = []

    def ndims(self) -> int:
        return 3

    def generate_embeddings(self, texts: list[str], *args: Any, **kwargs: Any) -> Any:
        self.asked.append(len(texts))
        assert all(type(text) is str for text in texts)
        return [[float(text.count(letter)) for letter in "abc"] for text in texts]


class OverAnything(EmbeddingFunction):
    asked: ClassVar[list[int]] = []

    def ndims(self) -> int:
        return 3

    def compute_source_embeddings(self, items: Any, *args: Any, **kwargs: Any) -> Any:
        self.asked.append(len(items))
        return np.array([[text.count(letter) for letter in "abc"] for text in items])

    def compute_query_embeddings(self, query: Any, *args: Any, **kwargs: Any) -> Any:
        return [[float(query.count(letter)) for letter in "abc"]]


class OnDevice(DeviceEmbeddingFunction):
    asked: ClassVar[list[int]] = []
    cpu_budget: ClassVar[int | None] = 1_000

    normalize: bool = False

    def ndims(self) -> int:
        return 3

    def prepare_items(self, items: list[Any], side: Any) -> Payload:
        self.asked.append(len(items))
        return Payload(np.array([[t.count(letter) for letter in "abc"] for t in items]))

    def forward(self, data: Any, rows: np.ndarray, side: Any, device: torch.device) -> torch.Tensor:
        assert len(rows) <= 1_000
        return torch.from_numpy(data[rows]).to(device, torch.float32)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    registry = get_registry()
    kept = dict(registry._functions)
    for cls in (OverText, OverAnything, OnDevice):
        cls.asked.clear()
        registry.register(f"own-{cls.__name__}")(cls)
    yield
    registry._functions.clear()
    registry._functions.update(kept)


def make(path: Path, cls: type[EmbeddingFunction], kind: Any = None) -> Any:
    f = cls.create()
    text, vector = (str | None, f.SourceField(default=None)), (kind or Vector(3), f.VectorField())
    model = create_model("Doc", __base__=LanceModel, id=(int, ...), text=text, vector=vector)
    return gpu_lance.connect(path, device="cpu").create_table("t", schema=model)


def text_of(i: int) -> str:
    return "a" * (i % 5) + "b" * (i % 3) + "c" * (i % 2)


def check(table: Any, n: int, shift: int = 0) -> None:
    stored = table.to_arrow().sort_by("id")
    assert stored["id"].to_pylist() == list(range(n))
    found = np.stack(stored["vector"].to_numpy())
    places = np.arange(n)[:, None] + shift
    assert np.array_equal(found, places % np.array([5, 3, 2]))


@pytest.mark.parametrize("cls", [OverText, OverAnything, OnDevice])
def test_each_way_is_asked_in_bounded_batches_and_reopens(cls: Any, tmp_path: Path) -> None:
    n = 2 * MAX_ROWS + 300
    data = pa.table({"id": range(n), "text": [text_of(i) for i in range(n)]})

    def asked_once_each() -> None:
        assert sum(cls.asked) == n
        assert max(cls.asked) <= MAX_ROWS
        cls.asked.clear()

    table = make(tmp_path, cls)
    table.add(data)
    asked_once_each()
    check(table, n)
    again = gpu_lance.connect(tmp_path, device="cpu").open_table("t")
    assert type(again.embedding_functions["vector"].function) is cls
    again.add(data.to_batches()[0], mode="overwrite")  # one batch of all rows
    asked_once_each()
    shifted = data.set_column(1, "text", pa.array([text_of(i + 1) for i in range(n)]))
    again.merge_insert("id").when_matched_update_all().execute(shifted)
    asked_once_each()
    check(again, n, shift=1)
    again.update(values_sql={"text": "concat(text, 'aaaaa')"})
    asked_once_each()
    assert again.search("aaaaabc").limit(1).to_list()[0]["_distance"] == 0.0


# -------------------------------------------------------------- found by name

PACKAGE = """
import os
from gpu_lance.embeddings import TextEmbeddingFunction

class Vowels(TextEmbeddingFunction):
    scale: float = 1.0

    def ndims(self):
        return 5

    def generate_embeddings(self, texts):
        return [[self.scale * text.count(vowel) for vowel in "aeiou"] for text in texts]
"""

MAKE = """
import sys
import gpu_lance
from gpu_lance.embeddings import get_registry
from gpu_lance.pydantic import LanceModel, Vector

assert "own-vowels" in get_registry().names()
assert "own_vowels" not in sys.modules
f = get_registry().get("own-vowels").create(scale=2.0)

class Doc(LanceModel):
    text: str = f.SourceField()
    vector: Vector(5) = f.VectorField()

gpu_lance.connect("db", device="cpu").create_table("t", [Doc(text="banana"), Doc(text="kiwi")])
"""

REOPEN = """
import json, sys
import gpu_lance

table = gpu_lance.connect("db", device="cpu").open_table("t")
table.add([{"text": "goo"}])
rows = {row["text"]: row["vector"] for row in table.to_arrow().to_pylist()}
found = [table.search(query).limit(1).to_list()[0]["text"] for query in ("papaya", "ii", "oo")]
print(json.dumps([rows, found, repr(table.embedding_functions["vector"].function)]))
"""


def test_an_installed_package_is_found_by_name_in_every_process(tmp_path: Path) -> None:
    site, work = tmp_path / "site", tmp_path / "work"
    metadata = site / "own_vowels-1.0.dist-info"
    metadata.mkdir(parents=True)
    work.mkdir()
    (site / "own_vowels.py").write_text(PACKAGE)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: own-vowels\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[gpu_lance.embeddings]\nown-vowels = own_vowels:Vowels\n"
    )

    def run(code: str) -> str:
        start = f"import sys; sys.path.insert(0, {str(site)!r})\n"
        done = subprocess.run(
            [sys.executable, "-c", start + code], cwd=work, capture_output=True, text=True,
            check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(MAKE)
    rows, found, shown = json.loads(run(REOPEN).splitlines()[-1])
    assert rows == {
        "banana": [6.0, 0.0, 0.0, 0.0, 0.0],
        "kiwi": [0.0, 0.0, 4.0, 0.0, 0.0],
        "goo": [0.0, 0.0, 0.0, 4.0, 0.0],
    }
    assert found == ["banana", "kiwi", "goo"]
    assert shown == "Vowels(max_retries=7, scale=2.0)"
    # where the package is not installed the table opens, and says what is missing
    table = gpu_lance.connect(work / "db", device="cpu").open_table("t")
    assert table.search([0.0, 0.0, 0.0, 4.0, 0.0]).limit(1).to_list()[0]["text"] == "goo"
    with pytest.raises(gpu_lance.errors.UnknownProviderError, match="own-vowels"):
        table.search("oo").to_list()


# ------------------------------------------------------------- held to its word

BAD_AT = MAX_ROWS + 7  # in the second batch


def behaving(answer: Callable[[list[str], list[Any]], Any]) -> type[EmbeddingFunction]:
    """A class that spoils what it would have returned for a batch with the text "bad" in it."""

    class Spoilt(OverText):
        def generate_embeddings(self, texts: list[str], *args: Any, **kwargs: Any) -> Any:
            made = super().generate_embeddings(texts)
            return answer(texts, made) if "bad" in texts else made

    get_registry().register("own-spoilt")(Spoilt)
    return Spoilt


def put(texts: list[str], made: list[Any], value: Any) -> list[Any]:
    made[texts.index("bad")] = value
    return made


def raised(texts: list[str], made: list[Any]) -> Any:
    raise LookupError("no such word")


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda t, m: m[:-1], EmbeddingError, f"returned {MAX_ROWS - 1} vectors for {MAX_ROWS}"),
        (lambda t, m: [*m, m[0]], EmbeddingError, f"returned {MAX_ROWS + 1} vectors for"),
        (lambda t, m: [], EmbeddingError, "returned 0 vectors"),
        (lambda t, m: None, EmbeddingError, "must return a list of vectors, got a NoneType"),
        (lambda t, m: put(t, m, [1.0]), EmbeddingError, "a vector of 1 numbers for item 7"),
        (lambda t, m: np.ones((len(t), 4)), EmbeddingError, "a vector of 4 numbers for item 0"),
        (lambda t, m: put(t, m, "abc"), EmbeddingError, "returned 'abc' for item 7"),
        (lambda t, m: put(t, m, ["a"] * 3), EmbeddingError, "item 7 that holds 'a'"),
        (lambda t, m: put(t, m, None), BadInputError, f"Row {BAD_AT}, column 'text' cannot be"),
        (lambda t, m: put(t, m, [np.nan] * 3), BadVectorError, f"row {BAD_AT}"),
        (lambda t, m: put(t, m, [np.inf, 0, 0]), BadVectorError, f"row {BAD_AT}"),
        (raised, LookupError, "no such word"),
    ],
)
def test_what_it_does_wrong_is_said_and_nothing_is_written(
    answer: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    table = make(tmp_path, behaving(answer))
    table.add([{"id": -1, "text": "a"}])
    n = 2 * MAX_ROWS + 5
    texts = ["bad" if i == BAD_AT else "ab" for i in range(n)]
    with pytest.raises(error, match=message):
        table.add({"id": range(n), "text": texts})
    assert (table.version, table.count_rows()) == (2, 1)
    assert table.search("a").limit(5).to_list()[0]["id"] == -1


class Refuses(TextEmbeddingFunction):
    def ndims(self) -> int:
        return 3

    def generate_embeddings(self, texts: list[str], *args: Any, **kwargs: Any) -> Any:
        raise LookupError("no such word")


class PreparesNothing(OnDevice):
    def prepare_items(self, items: list[Any], side: Any) -> Payload:
        raise LookupError("no such word")


class ForwardsNothing(OnDevice):
    def forward(self, *args: Any) -> torch.Tensor:
        raise LookupError("no such word")


def notes(call: Callable[..., Any], *args: Any) -> list[str]:
    with pytest.raises(LookupError) as caught:
        call(*args)
    assert caught.value.args == ("no such word",)
    return caught.value.__notes__


@pytest.mark.parametrize("cls", [Refuses, PreparesNothing, ForwardsNothing])
def test_its_error_says_what_was_embedded(cls: Any, tmp_path: Path) -> None:
    get_registry().register("own-refuses")(cls)
    table = make(tmp_path, cls)
    table.add([{"id": 1, "text": "a", "vector": [1.0, 0.0, 0.0]}])
    wanted = [f"While embedding column 'text' for 'vector' with {cls.__name__}."]
    assert notes(table.add, [{"id": 2, "text": "a"}]) == wanted
    n = 2 * MAX_ROWS  # in a thread
    assert notes(table.add, {"id": range(n), "text": ["a"] * n}) == wanted
    assert notes(lambda: table.update(values={"text": "b"})) == wanted
    merge = table.merge_insert("id").when_not_matched_insert_all()
    assert notes(merge.execute, [{"id": 3, "text": "a"}]) == wanted
    wanted = [f"While embedding a query for 'vector' with {cls.__name__}."]
    assert notes(table.search("a").to_list) == wanted


def test_the_note_names_a_template_and_a_function_that_is_not_here(tmp_path: Path) -> None:
    get_registry().register("own-refuses")(Refuses)
    config = EmbeddingFunctionConfig(
        vector_column="vector", function=Refuses.create(), template="{a} {b}"
    )
    schema = pa.schema({"a": pa.string(), "b": pa.string()})
    db = gpu_lance.connect(tmp_path, device="cpu")
    table = db.create_table("t", schema=schema, embedding_functions=[config])
    wanted = ["While embedding the template '{a} {b}' for 'vector' with Refuses."]
    assert notes(table.add, [{"a": "x", "b": "y"}]) == wanted
    get_registry()._functions.pop("own-refuses")
    table = db.open_table("t")
    for _ in range(2):  # the same error each time
        with pytest.raises(gpu_lance.errors.UnknownProviderError) as caught:
            table.search("a").to_list()
        wanted = ["While embedding a query for 'vector' with own-refuses."]
        assert caught.value.__notes__ == wanted


@pytest.mark.parametrize("spoilt", [None, [float("nan")] * 3], ids=["None", "NaN"])
@pytest.mark.parametrize(
    ("policy", "wanted"), [("null", None), ("drop", "gone"), ("fill", [0.5] * 3)]
)
def test_bad_vectors_go_where_the_caller_says(
    spoilt: Any, policy: str, wanted: Any, tmp_path: Path
) -> None:
    table = make(tmp_path, behaving(lambda t, m: put(t, m, spoilt)))
    n = 2 * MAX_ROWS + 5
    texts = ["bad" if i == BAD_AT else "ab" for i in range(n)]
    table.add({"id": range(n), "text": texts}, on_bad_vectors=policy, fill_value=0.5)
    found = {row["id"]: row["vector"] for row in table.to_arrow().to_pylist()}
    assert found.pop(BAD_AT, "gone") == wanted
    assert len(found) == n - 1
    assert all(vector == [1.0, 1.0, 0.0] for vector in found.values())


BUFFER = np.zeros((MAX_ROWS, 3), np.float32)


def reused(rows: np.ndarray) -> np.ndarray:
    """The same memory each time, as a function that saves allocations would return it."""
    BUFFER[: len(rows)] = rows
    return BUFFER[: len(rows)]


FORMS: dict[str, Callable[[np.ndarray], Any]] = {
    "lists": lambda rows: rows.tolist(),
    "float64": lambda rows: rows.astype(np.float64),
    "list of float16": lambda rows: list(rows.astype(np.float16)),
    "tensor with a gradient": lambda rows: torch.tensor(rows, requires_grad=True),
    "bfloat16": lambda rows: torch.tensor(rows).to(torch.bfloat16),
    "list of tensors": lambda rows: [torch.tensor(row) for row in rows],
    "inference tensor": lambda rows: torch.inference_mode()(torch.tensor)(rows),
    "one buffer": reused,
    "one tensor": lambda rows: torch.from_numpy(reused(rows)),
    "arrow": lambda rows: pa.array(rows.tolist()),
    "read only": lambda rows: np.broadcast_to(rows, rows.shape),
    "data frame": lambda rows: pd.DataFrame(rows),
    "long double": lambda rows: rows.astype(np.longdouble),
    "decimals": lambda rows: [[Decimal(float(x)) for x in row] for row in rows],
    "masked array": lambda rows: np.ma.masked_array(rows, mask=False),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_it_returns_may_be_its_own(form: str, tmp_path: Path) -> None:
    class Formed(OverText):
        def generate_embeddings(self, texts: list[str], *args: Any, **kwargs: Any) -> Any:
            rows = np.array(super().generate_embeddings(texts), np.float32).reshape(-1, 3)
            texts.clear()  # it is given a list of its own
            return FORMS[form](rows)

    get_registry().register("own-formed")(Formed)
    n = MAX_ROWS + 100
    table = make(tmp_path, Formed)
    table.add({"id": range(n), "text": [text_of(i) for i in range(n)]})
    check(table, n)
    BUFFER.fill(7.0)
    assert table.search(["ab", "aaaab"]).limit(1).to_list()[1]["_distance"] == 0.0
    check(table, n)


@pytest.mark.parametrize("form", FORMS)
def test_a_query_may_be_its_own_too(form: str, tmp_path: Path) -> None:
    class Asked(OverAnything):
        def compute_query_embeddings(self, query: Any, *args: Any, **kwargs: Any) -> Any:
            return FORMS[form](np.array([[1.0, 2.0, 3.0]], np.float32))

    get_registry().register("own-asked")(Asked)
    made = calls.embed(Asked.create(), ["a", None, "b"], "query", ndims=3, device=CPU)
    assert made.vectors.tolist() == [[1.0, 2.0, 3.0], [0.0] * 3, [1.0, 2.0, 3.0]]


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (np.array(1.0), "a ndarray"),
        ({"embedding": [[1.0, 2.0, 3.0]]}, "a dict"),
        ({(1.0, 2.0, 3.0)}, "a set"),
        (iter([[1.0, 2.0, 3.0]]), "a list_iterator"),
        (torch.ones(1, 3).to_sparse(), "not dense"),
        (torch.ones(1, 3, device="meta"), "not dense"),
        ("abc", "a str"),
    ],
)
@pytest.mark.parametrize("side", ["source", "query"])
@pytest.mark.parametrize("multi", [False, True])
def test_what_is_no_list_of_vectors(returned: Any, got: str, side: str, multi: bool) -> None:
    class Wayward(OverAnything):
        def compute_source_embeddings(self, items: Any, *args: Any, **kwargs: Any) -> Any:
            return returned

        compute_query_embeddings = compute_source_embeddings

    with pytest.raises(EmbeddingError, match=f"Wayward.*{got}"):
        calls.embed(Wayward(), ["a"], side, ndims=3, device=CPU, multi=multi)


def test_a_masked_number_is_none() -> None:
    class Masked(OverAnything):
        def compute_source_embeddings(self, items: Any, *args: Any, **kwargs: Any) -> Any:
            return np.ma.masked_array(np.ones((1, 3)), mask=[[False, True, False]])

    made = calls.embed(Masked(), ["a"], "source", ndims=3, device=CPU)
    assert np.isnan(made.vectors.numpy()).tolist() == [[False, True, False]]


def test_a_buffer_that_is_filled_again_for_many_vectors(tmp_path: Path) -> None:
    class Buffered(OverText):
        def generate_embeddings(self, texts: list[str], *args: Any, **kwargs: Any) -> Any:
            return reused(np.array(super().generate_embeddings(texts), np.float32))

    get_registry().register("own-buffered")(Buffered)
    first, second = (
        calls.embed(Buffered.create(), [text], "source", ndims=3, device=CPU, multi=True)
        for text in ("a", "aab")
    )
    assert first.vectors.tolist() != second.vectors.tolist()


def test_items_are_what_the_column_holds(tmp_path: Path) -> None:
    class Sees(OverAnything):
        seen: ClassVar[list[Any]] = []

        def compute_source_embeddings(self, items: Any, *args: Any, **kwargs: Any) -> Any:
            self.seen.extend(items)
            return [[1.0, 2.0, 3.0]] * len(items)

        def compute_query_embeddings(self, query: Any, *args: Any, **kwargs: Any) -> Any:
            self.seen.append(query)
            return [[1.0, 2.0, 3.0]]

    get_registry().register("own-sees")(Sees)
    db = gpu_lance.connect(tmp_path, device="cpu")
    columns = {
        "number": [1, None, 3],
        "bytes": [b"\x00\xff", b"", None],
        "list": [["a"], [], None],
        "struct": [{"a": 1}, None, {"a": None}],
        "flag": [True, False, None],
    }
    for name, values in columns.items():
        Sees.seen.clear()
        config = EmbeddingFunctionConfig(
            vector_column="vector", source_column=name, function=Sees.create()
        )
        table = db.create_table(name, pa.table({name: values}), embedding_functions=[config])
        assert Sees.seen == [value for value in values if value is not None]
        given = [vector is not None for vector in table.to_arrow()["vector"].to_pylist()]
        assert given == [value is not None for value in values]
    Sees.seen.clear()
    assert len(db.open_table("bytes").search(b"\x01").to_list()) == 2
    assert Sees.seen == [b"\x01"]


def test_a_text_function_refuses_what_is_no_text(tmp_path: Path) -> None:
    config = EmbeddingFunctionConfig(
        vector_column="vector", source_column="n", function=OverText.create()
    )
    db = gpu_lance.connect(tmp_path, device="cpu")
    data = pa.table({"n": [1, 2]})
    with pytest.raises(BadInputError, match="Row 0, column 'n' cannot be embedded: it is a int"):
        db.create_table("t", data, embedding_functions=[config])
    assert OverText.asked == []


def test_2d_arrays_go_into_a_column_of_many_vectors(tmp_path: Path) -> None:
    class Each(TextEmbeddingFunction):
        """One vector for each letter of a text."""

        def ndims(self) -> int:
            return 3

        def generate_embeddings(self, texts: list[str], *args: Any, **kwargs: Any) -> Any:
            eye = np.eye(3, dtype=np.float32)
            return [eye[["abc".index(letter) for letter in text]] for text in texts]

    get_registry().register("own-each")(Each)
    table = make(tmp_path, Each, MultiVector(3))
    table.add([{"id": 1, "text": "ab"}, {"id": 2, "text": "c"}, {"id": 3, "text": None}])
    n = MAX_ROWS + 100
    table.add({"id": range(4, 4 + n), "text": ["bca"[: 1 + i % 3] for i in range(n)]})
    stored = {row["id"]: row["vector"] for row in table.to_arrow().to_pylist()}
    a, b, c = np.eye(3).tolist()
    assert stored[1] == [a, b]
    assert stored[2] == [c]
    assert stored[3] is None
    assert all(stored[4 + i] == [b, c, a][: 1 + i % 3] for i in range(n))
    again = gpu_lance.connect(tmp_path, device="cpu").open_table("t")
    again.update(where="id = 2", values={"text": "aa"})
    assert again.search().where("id = 2").to_list()[0]["vector"] == [a, a]
