"""Late interaction in tables: stored, searched by its score, and both ways with LanceDB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import colbert_checkpoints as made
import lancedb
import lancedb.embeddings
import lancedb.pydantic
import numpy as np
import pytest
from colbert_checkpoints import TEXTS, Formula, cosines, maxsim

import gpu_lance
from gpu_lance.embeddings import get_registry
from gpu_lance.errors import FingerprintError, SchemaError
from gpu_lance.pydantic import LanceModel, MultiVector, Vector


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.stanford(tmp_path_factory.mktemp("colbert") / "stanford")


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "db")


def create(folder: Path, **options: Any) -> Any:
    return get_registry().get("colbert").create(name=str(folder), device="cpu", **options)


def make(uri: str, function: Any, name: str = "t") -> Any:
    class Doc(LanceModel):
        text: str | None = function.SourceField()
        vectors: MultiVector(function.ndims()) | None = function.VectorField()

    return gpu_lance.connect(uri).create_table(name, schema=Doc)


def rows(texts: list[str | None]) -> list[dict[str, Any]]:
    return [{"text": text} for text in texts]


@pytest.mark.parametrize(("metric", "factor"), [("cosine", 1), ("l2", 2)])
def test_a_text_is_found_by_the_formulas_score(uri, folder, metric, factor):
    table, oracle = make(uri, create(folder)), Formula(folder)
    table.add(rows([*TEXTS[:4], None]))
    table.add(rows(TEXTS[4:]))
    documents = {text: oracle.document(text) for text in TEXTS}
    for text in ("quick fox", "near!", ""):
        query = oracle.query(text)
        scores = {other: maxsim(query, vectors) for other, vectors in documents.items()}
        found = table.search(text).distance_type(metric).limit(20).to_list()
        assert [row["text"] for row in found] == sorted(scores, key=lambda t: -scores[t])
        for row in found:
            # of unit vectors: cosine's distance is 1 - q.x, and l2's, squared, twice that
            wanted = factor * (len(query) - scores[row["text"]])
            assert row["_distance"] == pytest.approx(wanted, abs=1e-3)


def test_queries_in_a_batch_are_those_by_themselves(uri, folder):
    table = make(uri, create(folder))
    table.add(rows(TEXTS))
    texts = ["quick fox", "row", "a vector near"]
    batch = table.search(texts).distance_type("cosine").limit(3).to_list()
    for index, text in enumerate(texts):
        alone = table.search(text).distance_type("cosine").limit(3).to_list()
        mine = [row for row in batch if row["query_index"] == index]
        assert [row["text"] for row in mine] == [row["text"] for row in alone]
        one, other = ([row["_distance"] for row in found] for found in (mine, alone))
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_what_is_stored_is_what_the_formula_gives(uri, folder):
    table, oracle = make(uri, create(folder)), Formula(folder)
    table.add(rows([*TEXTS, None]))
    stored = table.to_arrow().column("vectors").to_pylist()
    assert stored[-1] is None
    assert cosines(stored[:-1], [oracle.document(text) for text in TEXTS]) >= 0.99999


def test_a_table_opens_with_its_function_and_refuses_another(uri, folder, tmp_path):
    make(uri, create(folder, query_length=8)).add(rows(TEXTS))
    again = gpu_lance.connect(uri).open_table("t")
    function = again.embedding_functions["vectors"].function
    assert type(function).__name__ == "ColbertEmbeddings" and function.query_length == 8
    again.add(rows(["one more row"]))
    assert (
        again.search("one more row").distance_type("cosine").limit(1).to_list()[0]["text"]
        == "one more row"
    )
    # the files of the model change under the table
    changed = made.stanford(tmp_path / "other")
    make(uri, create(changed), "u").add(rows(["row"]))
    told = (
        (changed / "artifact.metadata").read_text().replace('"doc_maxlen": 20', '"doc_maxlen": 9')
    )
    (changed / "artifact.metadata").write_text(told)
    with pytest.raises(FingerprintError, match="document_length: '20' and '9'"):
        gpu_lance.connect(uri).open_table("u").add(rows(["row"]))


def test_lancedb_reads_and_searches_the_table(uri, folder):
    function = create(folder)
    table = make(uri, function)
    table.add(rows(TEXTS))
    (query,) = function.compute_query_embeddings(["quick fox"])
    theirs = lancedb.connect(uri).open_table("t")
    found = theirs.search(query).distance_type("cosine").limit(4).to_list()
    ours = table.search("quick fox").distance_type("cosine").limit(4).to_list()
    assert [row["text"] for row in found] == [row["text"] for row in ours]
    one, other = ([row["_distance"] for row in each] for each in (found, ours))
    np.testing.assert_allclose(one, other, atol=1e-3)


def test_a_column_as_wide_as_the_transformer_is_lancedbs(uri, folder):
    """LanceDB's provider of this name makes one vector a text, the mean of its tokens' states."""
    theirs = lancedb.embeddings.get_registry().get("colbert").create(name=str(folder))

    class Doc(lancedb.pydantic.LanceModel):
        text: str = theirs.SourceField()
        vector: lancedb.pydantic.Vector(theirs.ndims()) = theirs.VectorField()

    table = lancedb.connect(uri).create_table("t", schema=Doc)
    texts = [text for text in TEXTS if len(text) < 60]
    table.add(rows(texts))
    ours = gpu_lance.connect(uri).open_table("t")
    for text in ("quick fox", "near rows"):
        found = [each.search(text).limit(5).to_list() for each in (ours, table)]
        assert [row["text"] for row in found[0]] == [row["text"] for row in found[1]]
        one, other = ([row["_distance"] for row in each] for each in found)
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    ours.add(rows(texts))
    stored = np.array(ours.to_arrow().column("vector").to_pylist())
    np.testing.assert_allclose(stored[len(texts) :], stored[: len(texts)], rtol=1e-4, atol=1e-5)


def test_one_vector_of_the_projections_length_is_refused(uri, folder):
    function = create(folder)

    class Doc(LanceModel):
        text: str = function.SourceField()
        vector: Vector(function.ndims()) = function.VectorField()

    with pytest.raises(SchemaError, match=r"declare it as MultiVector\(16\)"):
        gpu_lance.connect(uri).create_table("t", schema=Doc)
