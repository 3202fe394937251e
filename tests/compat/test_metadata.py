"""Embedding metadata of a table, read by LanceDB and read from LanceDB."""

from __future__ import annotations

import json

import pytest

import gpu_lance.embeddings as ours
from gpu_lance.embeddings.unavailable import UnavailableFunction
from gpu_lance.errors import UnknownProviderError

theirs = pytest.importorskip("lancedb.embeddings")

NAME = "gpu-lance-compat"


def functions_of(package):
    """The same two functions, written against one package or the other."""

    class Compat(package.TextEmbeddingFunction):
        name: str = "default"
        url: str = ""
        size: int = 2
        api_key: str = ""
        options: dict = {}  # noqa: RUF012
        device: str = "cpu"

        @staticmethod
        def sensitive_keys():
            return ["api_key"]

        def generate_embeddings(self, texts):
            return [[float(len(text))] * self.size for text in texts]

        def ndims(self):
            return self.size

    class CompatByName(Compat):
        pass

    package.register(NAME)(Compat)
    package.get_registry().register()(CompatByName)
    return Compat, CompatByName


@pytest.fixture(params=["ours to theirs", "theirs to ours"])
def sides(request):
    """(writer's package, reader's package, writer's classes); both know the same names."""
    registries = ours.get_registry(), theirs.get_registry()
    kept = [dict(registry._functions) for registry in registries]
    classes = {ours: functions_of(ours), theirs: functions_of(theirs)}
    for registry in registries:
        registry.set_var("compat_key", "sk-compat")
    writer, reader = (ours, theirs) if request.param == "ours to theirs" else (theirs, ours)
    yield writer, reader, classes[writer]
    for registry, functions in zip(registries, kept, strict=True):
        registry._functions.clear()
        registry._functions.update(functions)
        registry._variables.clear() if registry is registries[1] else registry.reset()


ARGUMENTS = {
    "name": "ünïcode",
    "url": "$var:compat_url:http://host:80",
    "size": 3,
    "api_key": "$var:compat_key",
    "options": {"deep": [1, None, 0.5]},
    "max_retries": 1,
}


def metadata_of(package, *functions):
    registry = package.get_registry()
    return registry.get_table_metadata(
        [
            package.EmbeddingFunctionConfig(
                vector_column=f"vector{number}", source_column="text", function=function
            )
            for number, function in enumerate(functions)
        ]
    )


def test_metadata_is_read_on_the_other_side(sides):
    writer, reader, (compat, _) = sides
    metadata = metadata_of(writer, compat.create(**ARGUMENTS), compat.create())
    parsed = reader.get_registry().parse_functions(
        {key.encode(): value for key, value in metadata.items()}
    )
    assert list(parsed) == ["vector0", "vector1"]
    first = parsed["vector0"]
    assert isinstance(first.function, reader.TextEmbeddingFunction)
    assert (first.source_column, first.vector_column) == ("text", "vector0")
    assert first.function.url == "http://host:80"
    assert first.function.api_key == "sk-compat"
    assert first.function.options == {"deep": [1, None, 0.5]}
    assert first.function.max_retries == 1
    assert first.function.compute_query_embeddings("four") == [[4.0, 4.0, 4.0]]
    assert parsed["vector1"].function.name == "default"
    assert parsed["vector1"].function.ndims() == 2
    assert b"sk-compat" not in metadata["embedding_functions"]


def test_both_write_the_same_bytes(sides):
    writer, reader, (compat, _) = sides
    metadata = metadata_of(writer, compat.create(**ARGUMENTS))
    parsed = reader.get_registry().parse_functions(
        {b"embedding_functions": metadata["embedding_functions"]}
    )
    again = metadata_of(reader, parsed["vector0"].function)
    assert again == metadata
    assert json.loads(again["embedding_functions"])[0] == {
        "name": NAME,
        "model": ARGUMENTS,
        "source_column": "text",
        "vector_column": "vector0",
    }


def test_the_device_stays_with_the_session(sides):
    writer, reader, (compat, _) = sides
    metadata = metadata_of(writer, compat.create(device="cuda"))
    parsed = reader.get_registry().parse_functions(
        {b"embedding_functions": metadata["embedding_functions"]}
    )
    assert parsed["vector0"].function.device == "cpu"
    if writer is ours:
        assert b"cuda" not in metadata["embedding_functions"]


def test_a_function_without_an_alias(sides):
    writer, reader, (_, by_name) = sides
    metadata = metadata_of(writer, by_name.create())
    stored = {b"embedding_functions": metadata["embedding_functions"]}
    if writer is ours:  # LanceDB looks the class name up, so we must write it
        assert reader.get_registry().parse_functions(stored)["vector0"].function.ndims() == 2
        return
    # LanceDB stores null, which nobody can look up; the table must open all the same
    assert json.loads(metadata["embedding_functions"])[0]["name"] is None
    function = reader.get_registry().parse_functions(stored)["vector0"].function
    assert isinstance(function, UnavailableFunction)
    with pytest.raises(UnknownProviderError):
        function.ndims()


def test_public_names_of_lancedb_are_here():
    wanted = {
        "EmbeddingFunction",
        "EmbeddingFunctionConfig",
        "EmbeddingFunctionRegistry",
        "TextEmbeddingFunction",
        "get_registry",
        "register",
    }
    assert wanted <= set(ours.__all__)
    members = {
        "EmbeddingFunction": theirs.EmbeddingFunction,
        "TextEmbeddingFunction": theirs.TextEmbeddingFunction,
        "EmbeddingFunctionRegistry": theirs.EmbeddingFunctionRegistry,
    }
    for name, cls in members.items():
        public = {member for member in vars(cls) if not member.startswith(("_", "model_"))}
        assert {member for member in public if not hasattr(getattr(ours, name), member)} == set()


def test_helpers_take_the_arguments_of_lancedb():
    import inspect

    import lancedb.embeddings.utils as their_utils

    import gpu_lance.embeddings.utils as our_utils

    def positional(func):
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        found = inspect.signature(func).parameters.values()
        return [(p.name, p.default) for p in found if p.kind in kinds]

    names = ["retry", "retry_with_exponential_backoff", "url_retrieve", "weak_lru"]
    names += ["api_key_not_found_help", "RateLimiter", "FunctionWrapper"]
    for name in names:
        assert positional(getattr(our_utils, name)) == positional(getattr(their_utils, name)), name
    for method in ("rate_limit", "retry", "batch_size", "show_progress", "to_batches"):
        mine = positional(getattr(our_utils.FunctionWrapper, method))
        assert mine == positional(getattr(their_utils.FunctionWrapper, method)), method
