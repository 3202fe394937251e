"""Each row of the tables in docs/compatibility.md, tried on both packages."""

from __future__ import annotations

import builtins
import contextlib
import importlib
import inspect
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import lancedb
import lancedb.embeddings
import lancedb.index
import lancedb.pydantic
import lancedb.rerankers
import pyarrow as pa
import pytest
import torch

import gpu_lance
from gpu_lance import errors
from gpu_lance.device import resolve_device
from gpu_lance.embeddings import fingerprint, get_registry

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its own head."""
    text = PAGE.read_text(encoding="utf-8")
    part = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def names(heading: str) -> dict[str, list[str]]:
    return {where.strip("| "): re.findall(r"`(\w+)`", cell) for where, cell in rows(heading)}


def public(package: ModuleType) -> dict[str, Any]:
    """What holds the names of each part of the API."""
    base = package.__name__

    def module(name: str) -> ModuleType:
        return importlib.import_module(f"{base}.{name}")

    table = module("table").LanceTable
    return {
        "package": package,
        "connection": module("db").LanceDBConnection,
        "table": table,
        "search": module("query").LanceVectorQueryBuilder,
        "embeddings": module("embeddings"),
        "pydantic": module("pydantic"),
    }


def test_the_names_that_both_have() -> None:
    ours, theirs = public(gpu_lance), public(lancedb)
    listed = names("The same")
    assert listed.keys() == {"connection", "table", "search", "embeddings", "pydantic"}
    for where, them in listed.items():
        assert them
        for name in them:
            assert hasattr(ours[where], name), (where, name)
            assert hasattr(theirs[where], name), (where, name)


def test_the_names_that_are_not_here() -> None:
    ours, theirs = public(gpu_lance), public(lancedb)
    for where, them in names("Not here").items():
        for name in them:
            assert hasattr(theirs[where], name), (where, name)
            assert not hasattr(ours[where], name), f"{where}.{name} is here by now"


@pytest.mark.parametrize("row", rows("Refused"), ids=lambda row: row[0].strip("`"))
def test_what_is_refused(row: list[str], tmp_path: Path) -> None:
    table, _ = make(gpu_lance, tmp_path)
    db = gpu_lance.connect(tmp_path / "more", device="cpu")
    bits = pa.FixedSizeListArray.from_arrays(pa.array([1, 2, 3, 4], pa.uint8()), 2)
    space = {"db": db, "table": table, "get_registry": get_registry}
    space["bits"] = db.create_table("bits", pa.table({"vector": bits}))
    space.update(gpu_lance=gpu_lance, lancedb=lancedb)
    error = getattr(errors, row[1], None) or getattr(builtins, row[1])
    with pytest.raises(error) as caught:
        eval(row[0].strip("`"), space)
    assert type(caught.value) is error
    assert str(caught.value)


class Recorded:
    """What a function of either package was asked, and how often one was made."""

    def __init__(self) -> None:
        self.made = 0
        self.calls: list[int] = []


LOG = Recorded()
DATA = [{"id": 1, "text": "aab"}, {"id": 2, "text": "ccc"}, {"id": 3, "text": "b"}]


def make(package: ModuleType, folder: Path) -> tuple[Any, Any]:
    """A table of three rows in either package, and the function that embeds it."""

    class Letters(package.embeddings.TextEmbeddingFunction):
        key: str = ""

        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            LOG.made += 1

        @staticmethod
        def sensitive_keys() -> list[str]:
            return ["key"]

        def ndims(self) -> int:
            return 3

        def generate_embeddings(self, texts: list[Any]) -> list[list[float]]:
            LOG.calls.append(len(texts))
            if "boom" in texts:
                raise ValueError("boom")
            return [[float(text.count(letter)) for letter in "abc"] for text in texts]

    registry = package.embeddings.get_registry()
    registry._functions.pop("docs-letters", None)
    package.embeddings.register("docs-letters")(Letters)
    function = Letters.create(max_retries=1)

    class Schema(package.pydantic.LanceModel):
        id: int
        text: str | None = function.SourceField()
        vector: package.pydantic.Vector(3) = function.VectorField()

    table = package.connect(folder / package.__name__).create_table("t", schema=Schema)
    table.add(DATA)
    LOG.made, LOG.calls = 0, []
    return table, function


def found(table: Any, row: int) -> dict[str, Any]:
    return table.search().where(f"id = {row}").to_list()[0]


class Sides:
    """The same table in both packages, with what each check needs of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ours, self.our_function = make(gpu_lance, folder)
        self.theirs, self.their_function = make(lancedb, folder)

    def counted(self, work: Any) -> tuple[Recorded, Recorded]:
        """What the functions of ours and of theirs were asked while `work` ran."""
        seen = []
        for table in (self.ours, self.theirs):
            LOG.made, LOG.calls = 0, []
            work(table)
            one = Recorded()
            one.made, one.calls = LOG.made, LOG.calls
            seen.append(one)
        return seen[0], seen[1]


def device(sides: Sides) -> None:
    fields = [
        package.embeddings.get_registry().get("sentence-transformers").model_fields["device"]
        for package in (gpu_lance, lancedb)
    ]
    assert [field.default for field in fields] == ["auto", "cpu"]
    with contextlib.suppress(errors.DeviceError):  # the error is of CUDA, not of the name
        assert resolve_device("gpu") == resolve_device("cuda")


def remote_code(sides: Sides) -> None:
    fields = [
        package.embeddings.get_registry().get("sentence-transformers").model_fields
        for package in (gpu_lance, lancedb)
    ]
    assert [f["trust_remote_code"].default for f in fields] == [False, True]
    stored = [
        {
            "name": "sentence-transformers", "model": {"trust_remote_code": True},
            "source_column": "text", "vector_column": "vector",
        }
    ]  # fmt: skip
    metadata = {"embedding_functions": json.dumps(stored)}
    read = get_registry().parse_functions(metadata)["vector"].function
    assert read.trust_remote_code is False


def list_of_texts(sides: Sides) -> None:
    with pytest.raises(ValueError, match="vector column"):
        sides.theirs.search(["ab", "cc"])
    result = sides.ours.search(["b", "cc"]).limit(1).to_list()
    assert [(row["query_index"], row["id"]) for row in result] == [(0, 3), (1, 2)]


def tensors(sides: Sides) -> None:
    tensor = torch.tensor([0.0, 0.0, 3.0])
    with pytest.raises(Exception, match="retries"):
        sides.theirs.search(tensor)
    assert sides.ours.search(tensor).limit(1).to_list()[0]["id"] == 2
    sides.ours.add({"id": torch.tensor([8]), "text": ["x"], "vector": torch.ones(1, 3)})
    assert found(sides.ours, 8)["vector"] == [1.0, 1.0, 1.0]


def parameters(sides: Sides) -> None:
    assert sides.ours.search("a").where("id = ?", [3]).to_list()[0]["id"] == 3
    # the second argument is `prefilter` there
    assert "parameters" not in inspect.signature(sides.theirs.search("a").where).parameters


def parentheses(sides: Sides) -> None:
    text = "id = 1) OR (id = 2"
    assert [row["id"] for row in sides.theirs.search().where(text).to_list()] == [1]
    with pytest.raises(errors.QueryError):
        sides.ours.search().where(text)


def update(sides: Sides) -> None:
    for table in (sides.ours, sides.theirs):
        table.update(where="id = 1", values={"text": "cc"})
    assert found(sides.ours, 1)["vector"] == [0.0, 0.0, 2.0]
    assert found(sides.theirs, 1)["vector"] == [2.0, 1.0, 0.0]


def overwrite(sides: Sides) -> None:
    for table in (sides.ours, sides.theirs):
        table.add([{"id": 9, "text": "abc"}], mode="overwrite")
    assert sides.theirs.to_arrow().to_pylist() == [{"id": 9, "text": "abc"}]
    assert sides.theirs.embedding_functions == {}
    assert found(sides.ours, 9)["vector"] == [1.0, 1.0, 1.0]
    assert list(sides.ours.embedding_functions) == ["vector"]


def partly_given(sides: Sides) -> None:
    data = [{"id": 8, "text": "abc", "vector": None}, {"id": 9, "text": "a", "vector": [9.0] * 3}]
    with pytest.raises(RuntimeError):
        sides.theirs.add(data)
    sides.ours.add(data)
    assert [found(sides.ours, i)["vector"] for i in (8, 9)] == [[1.0] * 3, [9.0] * 3]


def null_source(sides: Sides) -> None:
    data = [{"id": 8, "text": None}, {"id": 9, "text": "a"}]
    with pytest.raises(RuntimeError, match="NoneType"):
        sides.theirs.add(data)
    sides.ours.add(data)
    assert [found(sides.ours, i)["vector"] for i in (8, 9)] == [None, [1.0, 0.0, 0.0]]


def infinite(sides: Sides) -> None:
    data = [{"id": 9, "text": "", "vector": [float("inf"), 0.0, 0.0]}]
    sides.theirs.add(data)
    with pytest.raises(errors.BadVectorError):
        sides.ours.add(data)
    sides.ours.add(data, on_bad_vectors="null")
    assert found(sides.ours, 9)["vector"] is None


def two_sources(sides: Sides) -> None:
    stored = []
    for package, function in ((gpu_lance, sides.our_function), (lancedb, sides.their_function)):

        class Two(package.pydantic.LanceModel):
            a: str = function.SourceField()
            b: str = function.SourceField()
            of_a: package.pydantic.Vector(3) = function.VectorField()
            of_b: package.pydantic.Vector(3) = function.VectorField()

        table = package.connect(sides.folder / "two").create_table(package.__name__, schema=Two)
        table.add([{"a": "a", "b": "bb"}])
        (row,) = table.to_arrow().to_pylist()
        stored.append((row["of_a"], row["of_b"]))
    assert stored == [([1.0, 0.0, 0.0], [0.0, 2.0, 0.0]), ([0.0, 2.0, 0.0], [0.0, 2.0, 0.0])]

    class Named(gpu_lance.pydantic.LanceModel):
        a: str = sides.our_function.SourceField()
        b: str = sides.our_function.SourceField()
        vector: gpu_lance.pydantic.Vector(3) = sides.our_function.VectorField(source="b")

    table = gpu_lance.connect(sides.folder / "named").create_table("t", schema=Named)
    table.add([{"a": "a", "b": "bb"}])
    assert table.to_arrow()["vector"].to_pylist() == [[0.0, 2.0, 0.0]]


def template(sides: Sides) -> None:
    # LanceDB takes the argument for one of pydantic's own, and does nothing with it
    ours = inspect.signature(gpu_lance.embeddings.EmbeddingFunction.VectorField)
    theirs = inspect.signature(lancedb.embeddings.EmbeddingFunction.VectorField)
    assert "template" in ours.parameters
    assert "template" not in theirs.parameters

    class Doc(gpu_lance.pydantic.LanceModel):
        title: str
        body: str
        vector: gpu_lance.pydantic.Vector(3) = sides.our_function.VectorField(
            template="{title}\n{body}"
        )

    table = gpu_lance.connect(sides.folder / "template").create_table("t", schema=Doc)
    table.add([{"title": "a", "body": "bb"}])
    assert table.to_arrow()["vector"].to_pylist() == [[1.0, 2.0, 0.0]]
    # the first column alone, as the page says of LanceDB's own adds
    theirs_table = lancedb.connect(sides.folder / "template").open_table("t")
    theirs_table.add([{"title": "c", "body": "bb"}])
    assert theirs_table.to_arrow()["vector"].to_pylist()[1] == [0.0, 0.0, 1.0]


def same_query(sides: Sides) -> None:
    type(sides.our_function).cache_queries = True

    def search(table: Any) -> None:
        for _ in range(3):
            assert table.search("cc").limit(1).to_list()[0]["id"] == 2

    ours, theirs = sides.counted(search)
    assert (len(ours.calls), len(theirs.calls)) == (1, 3)


def class_as_data(sides: Sides) -> None:
    class Plain(lancedb.pydantic.LanceModel):
        n: int

    class Here(gpu_lance.pydantic.LanceModel):
        n: int

    with pytest.raises(TypeError):
        lancedb.connect(sides.folder / "a").create_table("t", Plain)
    assert gpu_lance.connect(sides.folder / "b").create_table("t", Here).schema.names == ["n"]


def failing(sides: Sides) -> None:
    def add(table: Any) -> None:
        with pytest.raises((ValueError, RuntimeError), match="boom"):
            table.add([{"id": 9, "text": "boom"}])

    ours, theirs = sides.counted(add)
    assert (len(ours.calls), len(theirs.calls)) == (1, 2)  # with max_retries=1
    assert sides.ours.count_rows() == 3


def three_adds(sides: Sides) -> None:
    def add(table: Any) -> None:
        for i in range(3):
            table.add([{"id": i, "text": "a"}])

    ours, theirs = sides.counted(add)
    assert (ours.made, theirs.made) == (0, 6)


def many_rows(sides: Sides) -> None:
    version = sides.ours.version
    data = [{"id": i, "text": "ab"} for i in range(20_000)]
    ours, theirs = sides.counted(lambda table: table.add(data))
    assert theirs.calls == [20_000]
    assert sum(ours.calls) == 20_000
    assert max(ours.calls) <= 8_192
    assert sides.ours.version == version + 1


def unknown(sides: Sides) -> None:
    with pytest.raises(KeyError) as caught:
        lancedb.embeddings.get_registry().get("docs-leters")
    assert str(caught.value) == "'docs-leters'"
    with pytest.raises(errors.UnknownProviderError, match="Did you mean 'docs-letters'.*Known: "):
        get_registry().get("docs-leters")


def taken(sides: Sides) -> None:
    class Other(gpu_lance.embeddings.TextEmbeddingFunction):
        pass

    class Theirs(lancedb.embeddings.TextEmbeddingFunction):
        pass

    lancedb.embeddings.register("docs-letters")(Theirs)  # without a word
    with pytest.raises(errors.ProviderTakenError):
        gpu_lance.embeddings.register("sentence-transformers")(Other)
    with pytest.warns(UserWarning, match="docs-letters"):
        gpu_lance.embeddings.register("docs-letters")(Other)


def secret(sides: Sides) -> None:
    shown = []
    for package, function in ((gpu_lance, sides.our_function), (lancedb, sides.their_function)):
        package.embeddings.get_registry().set_var("docs_key", "sk-1")
        shown.append(repr(type(function).create(key="$var:docs_key")))
    assert "sk-1" not in shown[0]
    assert "$var:docs_key" in shown[0]
    assert "sk-1" in shown[1]


def other_model(sides: Sides) -> None:
    class Other(type(sides.their_function)):
        def generate_embeddings(self, texts: list[Any]) -> list[list[float]]:
            return [[-1.0] * 3 for _ in texts]

    lancedb.embeddings.register("docs-letters")(Other)
    sides.theirs.add([{"id": 9, "text": "b"}])
    assert [found(sides.theirs, i)["vector"] for i in (3, 9)] == [[0.0, 1.0, 0.0], [-1.0] * 3]

    model = get_registry().get("sentence-transformers").create(device="cpu")

    class Schema(gpu_lance.pydantic.LanceModel):
        text: str = model.SourceField()
        vector: gpu_lance.pydantic.Vector(384) = model.VectorField()

    db = gpu_lance.connect(sides.folder / "fingerprint", device="cpu")
    dataset = db.create_table("t", schema=Schema).to_lance()
    stored = fingerprint.read(dataset.schema.metadata)
    stored["vector"].update(model="another", weights="sha256:0")
    key, value = next(iter(fingerprint.to_metadata(stored).items()))
    dataset.update_schema_metadata({key.decode(): value.decode()})
    for use in (lambda t: t.add([{"text": "b"}]), lambda t: t.search("b").to_list()):
        with pytest.raises(errors.FingerprintError, match="'another'.*all-MiniLM-L6-v2"):
            use(db.open_table("t"))


BETTER = {
    "where a model runs": device,
    "code that a model brings": remote_code,
    "a search for a list of texts": list_of_texts,
    "a search for a torch tensor": tensors,
    "values in conditions": parameters,
    '`where("id = 1) OR (id = 2")`': parentheses,
    "`update` of a source column": update,
    '`add(mode="overwrite")`': overwrite,
    "some vectors given, some not": partly_given,
    "a null source": null_source,
    "an infinite element": infinite,
    "one function with two sources and two vectors": two_sources,
    "one vector of several columns": template,
    "the same text searched again": same_query,
    '`create_table("t", MySchema)`': class_as_data,
    "the function's error": failing,
    "three adds": three_adds,
    "an add of 20,000 rows": many_rows,
    "an unknown provider": unknown,
    "a provider's name taken by another class": taken,
    "`repr` of a function with a secret": secret,
    "another `sentence-transformers` model than the column's": other_model,
}


def test_each_row_has_its_check() -> None:
    assert [row[0] for row in rows("Better")] == list(BETTER)


@pytest.mark.parametrize("what", BETTER)
def test_what_is_better(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # lancedb pauses for seconds between two tries
    monkeypatch.setattr("lancedb.embeddings.utils.time.sleep", lambda _: None)
    BETTER[what](Sides(tmp_path))
