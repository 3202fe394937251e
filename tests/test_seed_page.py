"""LanceDB's introduction to embeddings, sample by sample, with nothing changed but the imports.

Each sample runs in an empty folder of its own, and once more with lancedb itself; both must find
the same rows in the same order at the same distances.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import lancedb.embeddings
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import gpu_lance.embeddings
from gpu_lance.embeddings.locate import locate

MODEL = "all-MiniLM-L6-v2"
TEXTS = ["This is a test.", "Another example."]
QUERY = "test example"

TABLE = """
from lancedb.embeddings import get_registry
from lancedb.pydantic import LanceModel, Vector

# Get a sentence-transformer function
func = get_registry().get("sentence-transformers").create()

class MySchema(LanceModel):
    # Embed the 'text' field automatically
    text: str = func.SourceField()
    # Store the embeddings in the 'vector' field
    vector: Vector(func.ndims()) = func.VectorField()

# Create a LanceDB table with the schema
import lancedb
db = lancedb.connect("./mydb")
table = db.create_table("mytable", MySchema)
# Insert data - embeddings are generated automatically
table.add([
    {"text": "This is a test."},
    {"text": "Another example."}
])

# Query the table - embeddings are generated for the query
results = table.search("test example").limit(5).to_pandas()
print(results)
"""

CLOUD = """
import lancedb
from lancedb.embeddings import get_registry
from lancedb.pydantic import LanceModel, Vector

db = lancedb.connect(...)
func = get_registry().get("sentence-transformers").create()

class MySchema(LanceModel):
    text: str = func.SourceField()
    vector: Vector(func.ndims()) = func.VectorField()

table = db.create_table("mytable", MySchema)
table.add([
    {"text": "This is a test."},
    {"text": "Another example."}
])

# Manually generate embeddings for the query
query_vector = func.generate_embeddings(["test example"])[0]
results = table.search(query_vector).limit(5).to_pandas()
"""

CUSTOM = """
from lancedb.embeddings import register, TextEmbeddingFunction
from functools import cached_property

@register("my-embedder")
class MyTextEmbedder(TextEmbeddingFunction):
    model_name: str = "my-model"

    def generate_embeddings(self, texts: list[str]) -> list[list[float]]:
        # Your embedding logic here
        return self._model.encode(texts).tolist()

    def ndims(self) -> int:
        # Return the dimensionality of the embeddings
        return len(self.generate_embeddings(["test"])[0])

    @cached_property
    def _model(self):
        # Initialize your model once
        return MyEmbeddingModel(self.model_name)
"""

Run = Callable[..., dict[str, Any]]


class MyEmbeddingModel:
    """How often each letter stands in a text; remembers every model that was made."""

    made: list[str] = []  # noqa: RUF012

    def __init__(self, name: str) -> None:
        self.made.append(name)

    def encode(self, texts: list[str]) -> np.ndarray:
        letters = "abcdefghijklmnopqrstuvwxyz"
        return np.array([[t.lower().count(x) for x in letters] for t in texts], np.float32)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs a sample in an empty folder, as lancedb's or as ours, and gives what it defined."""
    registries = [package.embeddings.get_registry() for package in (gpu_lance, lancedb)]
    kept = [dict(registry._functions) for registry in registries]

    def go(sample: str, package: ModuleType, **names: Any) -> dict[str, Any]:
        folder = tmp_path / package.__name__
        folder.mkdir()
        monkeypatch.chdir(folder)
        if package is lancedb:  # it would look on the model hub otherwise
            (folder / MODEL).symlink_to(model_folder(), target_is_directory=True)
            # lancedb takes a model class for the schema only by name, whatever its page says
            sample = sample.replace(", MySchema)", ", schema=MySchema)")
        else:
            sample = re.sub(r"^from lancedb\b", "from gpu_lance", sample, flags=re.M)
            sample = re.sub(r"^import lancedb$", "import gpu_lance as lancedb", sample, flags=re.M)
        sample = sample.replace("connect(...)", 'connect("./local")')
        space = {"__name__": f"sample_of_{package.__name__}", **names}
        exec(compile(sample, "sample.py", "exec", dont_inherit=True), space)
        return space

    yield go
    for registry, functions in zip(registries, kept, strict=True):
        registry._functions.clear()
        registry._functions.update(functions)


def model_folder() -> Path:
    return locate(MODEL, None, "sentence-transformers").folder


def library_distances() -> dict[str, float]:
    """Squared distances from the query, by the model's own library."""
    library = importlib.import_module("sentence_transformers")
    model = library.SentenceTransformer(str(model_folder()), device="cpu")
    query, *vectors = model.encode([QUERY, *TEXTS], normalize_embeddings=True)
    return {t: float(((query - v) ** 2).sum()) for t, v in zip(TEXTS, vectors, strict=True)}


def check_result(results: pd.DataFrame, ndims: int = 384) -> None:
    assert results.columns.tolist() == ["text", "vector", "_distance"]
    assert results["_distance"].dtype == np.float32
    assert results["_distance"].is_monotonic_increasing
    assert all(isinstance(text, str) for text in results["text"])
    assert all(v.dtype == np.float32 and v.shape == (ndims,) for v in results["vector"])


def check_same(ours: pd.DataFrame, theirs: pd.DataFrame) -> None:
    assert ours.dtypes.to_dict() == theirs.dtypes.to_dict()
    assert ours.index.tolist() == theirs.index.tolist()
    assert ours["text"].tolist() == theirs["text"].tolist()
    np.testing.assert_allclose(np.stack(ours["vector"]), np.stack(theirs["vector"]), atol=1e-5)
    np.testing.assert_allclose(ours["_distance"], theirs["_distance"], rtol=1e-5)


def test_a_table_that_embeds(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    ours = run(TABLE, gpu_lance)
    assert "_distance" in capsys.readouterr().out
    check_result(ours["results"])
    # "Another example." is the nearer one: so says the model's library, and so finds lancedb
    wanted = library_distances()
    assert ours["results"]["text"].tolist() == sorted(TEXTS, key=wanted.__getitem__)
    for text, distance in zip(ours["results"]["text"], ours["results"]["_distance"], strict=True):
        assert distance == pytest.approx(wanted[text], rel=1e-5)
    for text in TEXTS:
        found = ours["table"].search(text).limit(1).to_list()[0]
        assert found["text"] == text
        assert found["_distance"] == pytest.approx(0, abs=1e-6)
    near = ours["table"].search("Is this an exam, or just a test?").to_pandas()
    assert near["text"].tolist() == TEXTS
    assert Path("mydb/mytable.lance").is_dir()
    assert ours["table"].schema.field("vector").type == pa.list_(pa.float32(), 384)
    check_same(ours["results"], run(TABLE, lancedb)["results"])


def test_a_query_vector_made_by_hand(run: Run) -> None:
    ours = run(CLOUD, gpu_lance)
    check_result(ours["results"])
    assert ours["query_vector"].shape == (384,)
    check_same(ours["results"], ours["table"].search(QUERY).limit(5).to_pandas())
    check_same(ours["results"], run(CLOUD, lancedb)["results"])


@pytest.mark.filterwarnings(
    # pydantic's, about the field of that name in lancedb's class
    r'ignore:Field "model_name" in MyTextEmbedder has conflict:UserWarning'
)
def test_a_custom_function(run: Run) -> None:
    def used(package: ModuleType) -> pd.DataFrame:
        space = run(CUSTOM, package, MyEmbeddingModel=MyEmbeddingModel)
        function = package.embeddings.get_registry().get("my-embedder").create()
        assert type(function) is space["MyTextEmbedder"]
        base = importlib.import_module(f"{package.__name__}.pydantic")

        class Schema(base.LanceModel):
            text: str = function.SourceField()
            vector: base.Vector(function.ndims()) = function.VectorField()

        table = package.connect("./mydb").create_table("mytable", schema=Schema)
        table.add([{"text": text} for text in TEXTS])
        table.add([{"text": "zzz"}])
        again = package.connect("./mydb").open_table("mytable")
        assert again.search("zz").limit(1).to_list()[0]["text"] == "zzz"
        return table.search("this is a text").limit(5).to_pandas()

    MyEmbeddingModel.made.clear()
    ours = used(gpu_lance)
    # one model for the table that was made, and one for the table that was opened
    assert MyEmbeddingModel.made == ["my-model"] * 2
    check_result(ours, ndims=26)
    assert ours["text"].tolist() == ["This is a test.", "Another example.", "zzz"]
    query, *vectors = MyEmbeddingModel("by hand").encode(["this is a text", *ours["text"]])
    assert ours["_distance"].tolist() == [float(((query - v) ** 2).sum()) for v in vectors]
    check_same(ours, used(lancedb))


def test_arguments_of_create() -> None:
    provider = gpu_lance.embeddings.get_registry().get("sentence-transformers")
    function = provider.create()
    assert (function.name, function.max_retries) == (MODEL, 7)
    given = provider.create(name=MODEL, max_retries=3, batch_size=1, device="cpu")
    assert (given.max_retries, given.batch_size, given.device) == (3, 1, "cpu")
    np.testing.assert_allclose(
        given.generate_embeddings(TEXTS), function.generate_embeddings(TEXTS), atol=1e-6
    )
