"""Tables of openai and cohere go to LanceDB and back, and its classes ask the same server."""

from __future__ import annotations

import json
from typing import Any

import cohere
import lancedb
import lancedb.embeddings
import lancedb.pydantic
import numpy as np
import pyarrow as pa
import pytest
from api_server import Answer, vector_of

import gpu_lance
import gpu_lance.pydantic
from gpu_lance.embeddings import get_registry
from gpu_lance.embeddings.api_connection import _named
from gpu_lance.errors import BadInputError, FingerprintError

THEIRS = lancedb.embeddings.get_registry()
SESSION: dict[str, Any] = {
    "timeout": 9.0,
    "max_concurrent_requests": 3,
    "requests_per_minute": 60_000,
    "tokens_per_minute": 10**9,
    "batch_size": 7,
}


def openai_of(package: Any, server: Any, **arguments: Any) -> Any:
    registry = package.embeddings.get_registry()
    registry.set_var("key", "sk-of-a-variable")
    return registry.get("openai").create(
        name="text-embedding-3-small",
        dim=8,
        base_url=f"{server.url}/v1",
        api_key="$var:key",
        **arguments,
    )


def table_of(package: Any, function: Any, folder: Any) -> Any:
    class Doc(package.pydantic.LanceModel):
        text: str = function.SourceField()
        vector: package.pydantic.Vector(function.ndims()) = function.VectorField()

    return package.connect(folder).create_table("docs", schema=Doc)


def model_of(table: Any) -> dict[str, Any]:
    (entry,) = json.loads(table.schema.metadata[b"embedding_functions"])
    return entry["model"]


def test_lancedb_searches_and_adds_to_our_openai_table(server, tmp_path):
    function = openai_of(gpu_lance, server, **SESSION)
    table = table_of(gpu_lance, function, tmp_path)
    table.add([{"text": f"text {i}"} for i in range(20)])
    assert model_of(table) == {
        "name": "text-embedding-3-small",
        "dim": 8,
        "base_url": f"{server.url}/v1",
        "api_key": "$var:key",
    }
    lancedb.embeddings.get_registry().set_var("key", "sk-of-a-variable")
    theirs = lancedb.connect(tmp_path).open_table("docs")
    assert theirs.schema.field("vector").type == pa.list_(pa.float32(), 8)
    (found,) = theirs.search(vector_of("text 3", 8)).limit(1).to_list()
    assert found["text"] == "text 3"
    server.asked.clear()
    (found,) = theirs.search("text 4").limit(1).to_list()
    assert found["text"] == "text 4" and found["_distance"] == pytest.approx(0, abs=1e-6)
    theirs.add([{"text": "from there"}])
    assert {name.lower(): v for name, v in server.asked[-1].headers.items()}[
        "authorization"
    ] == "Bearer sk-of-a-variable"
    (found,) = table.search("from there").limit(1).to_list()
    assert found["text"] == "from there" and found["_distance"] < 1e-6
    assert len(table) == 21


def test_we_search_and_add_to_their_openai_table(server, tmp_path):
    table = table_of(lancedb, openai_of(lancedb, server), tmp_path)
    table.add([{"text": "one"}, {"text": "two"}])
    get_registry().set_var("key", "sk-of-a-variable")
    ours = gpu_lance.connect(tmp_path, device="cpu").open_table("docs")
    assert ours.search("two").limit(1).to_list()[0]["text"] == "two"
    ours.add([{"text": "three"}])
    table.checkout_latest()
    assert table.search("three").limit(1).to_list()[0]["text"] == "three"


def test_arguments_that_we_added_do_no_harm_there(server):
    """LanceDB ignores what it does not know, also in `model`."""
    function = THEIRS.get("openai").create(name="text-embedding-3-large", **SESSION, base_url="x")
    assert function.ndims() == 3072
    function = THEIRS.get("cohere").create(name="embed-english-v3.0", dim=9, base_url="x")
    assert function.ndims() == 1024


@pytest.mark.parametrize(
    ("provider", "name", "most"),
    [
        ("openai", "text-embedding-3-small", 1536),
        ("openai", "text-embedding-3-large", 3072),
        ("cohere", "embed-v4.0", 1536),
    ],
)
def test_no_model_gives_longer_vectors_than_its_own(provider, name, most):
    create = get_registry().get(provider).create
    assert create(name=name, dim=most).ndims() == most
    with pytest.raises(BadInputError, match=f"{name} gives .* at most {most} .* dim is 9999"):
        create(name=name, dim=9999).ndims()


def test_both_know_the_same_lengths():
    for provider in ("openai", "cohere"):
        ours, theirs = get_registry().get(provider), THEIRS.get(provider)
        for name, ndims in ours.models.items():
            if name != "embed-v4.0":  # which LanceDB does not know
                assert theirs.create(name=name).ndims() == ndims
        assert set(theirs.model_fields) - {"client"} <= set(ours.model_fields)


def test_lancedb_searches_and_adds_to_our_cohere_table(server, tmp_path, monkeypatch):
    """The model is always named in it, since the defaults differ."""

    def misbehave(asked, number):
        if not asked.path.endswith("/v1/embed"):  # LanceDB's form
            return None
        kind = asked.body["input_type"]
        rows = [vector_of(f"{kind}:{text}", 1024).tolist() for text in asked.texts]
        body = {"id": "1", "texts": asked.texts, "response_type": "embeddings_floats"}
        return Answer(body={**body, "embeddings": rows})

    server.dims, server.misbehave = 1024, misbehave
    function = get_registry().get("cohere").create(base_url=server.url)
    table = table_of(gpu_lance, function, tmp_path)
    table.add([{"text": "one"}, {"text": "two"}])
    assert model_of(table) == {"name": "embed-english-v3.0", "base_url": server.url}
    with cohere.Client(api_key="x", base_url=server.url) as client:
        monkeypatch.setattr(lancedb.embeddings.CohereEmbeddingFunction, "client", client)
        theirs = lancedb.connect(tmp_path).open_table("docs")
        assert theirs.schema.field("vector").type == pa.list_(pa.float32(), 1024)
        stored = vector_of("search_document:two", 1024)
        (found,) = theirs.search(stored).limit(1).to_list()
        assert found["text"] == "two"
        theirs.add([{"text": "three"}])
        assert server.asked[-1].body["input_type"] == "search_document"
        assert len(theirs.search("three").limit(3).to_list()) == 3
        assert server.asked[-1].body["input_type"] == "search_query"
        assert server.asked[-1].body["model"] == "embed-english-v3.0"
    vectors = {row["text"]: row["vector"] for row in table.to_arrow().to_pylist()}
    for text in ("one", "two", "three"):
        wanted = vector_of(f"search_document:{text}", 1024)
        np.testing.assert_array_equal(np.float32(vectors[text]), wanted)


def test_their_cohere_default_stays_theirs(tmp_path):
    """A table that names no model was made by LanceDB, whose default is another."""
    function = THEIRS.get("cohere").create()
    table_of(lancedb, function, tmp_path)
    ours = gpu_lance.connect(tmp_path, device="cpu").open_table("docs")
    revived = ours.embedding_functions["vector"].function
    assert revived.name == "embed-multilingual-v2.0"
    assert revived.ndims() == 768 == function.ndims()
    assert get_registry().get("cohere").create().name == "embed-english-v3.0"


def test_vectors_of_two_models_never_mix(server, tmp_path):
    create = get_registry().get("cohere").create
    first = create(name="one", dim=8, base_url=server.url)
    table_of(gpu_lance, first, tmp_path).add([{"text": "a"}])
    assert first.fingerprint() == {
        "provider": "cohere", "model": "one", "dims": "8", "input_type": "search_document",
    }  # fmt: skip
    table = gpu_lance.connect(tmp_path, device="cpu").open_table("docs")
    stored = table.to_lance()
    metadata = json.loads(stored.schema.metadata[b"embedding_functions"])
    metadata[0]["model"]["name"] = "two"
    stored.update_schema_metadata({"embedding_functions": json.dumps(metadata)})
    with pytest.raises(FingerprintError, match="'one'.*'two'"):
        gpu_lance.connect(tmp_path, device="cpu").open_table("docs").search("a").to_list()


def test_a_new_process_opens_the_table(server, tmp_path):
    """As a program does on another day: no function is made by hand."""
    function = get_registry().get("openai").create(name="m", dim=8, base_url=f"{server.url}/v1")
    table_of(gpu_lance, function, tmp_path).add([{"text": "a"}, {"text": "b"}])
    _named.clear()
    table = gpu_lance.connect(tmp_path, device="cpu").open_table("docs")
    assert table.search("b").limit(1).to_list()[0]["text"] == "b"
    vectors = np.float32(table.to_arrow()["vector"].to_pylist())
    np.testing.assert_array_equal(vectors, [vector_of(t, 8) for t in "ab"])


def test_a_model_from_a_variable_is_stored_as_one(server, tmp_path):
    get_registry().set_var("model", "secret-project-model")
    function = get_registry().get("cohere").create(name="$var:model", dim=8, base_url=server.url)
    table = table_of(gpu_lance, function, tmp_path)
    table.add([{"text": "a"}])
    assert model_of(table)["name"] == "$var:model"
    assert b"secret-project" not in str(table.schema.metadata).encode()
