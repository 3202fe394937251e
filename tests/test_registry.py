"""Names, table metadata and variables of embedding functions."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import subprocess
import sys
import threading
import tomllib
import types
import warnings
from pathlib import Path

import pytest

from gpu_lance.embeddings import (
    EmbeddingFunction,
    EmbeddingFunctionConfig,
    EmbeddingFunctionRegistry,
    TextEmbeddingFunction,
    get_registry,
    register,
)
from gpu_lance.embeddings import registry as registry_module
from gpu_lance.errors import (
    BadInputError,
    BrokenProviderError,
    HardcodedSecretError,
    ProviderTakenError,
    SchemaError,
    UnknownProviderError,
    UnknownVariableError,
)

ROOT = Path(__file__).parents[1]
SECRET = "sk-planted-0123456789"


@pytest.fixture
def registry():
    found = get_registry()
    kept = dict(found._functions)
    found.reset()
    yield found
    found.reset()
    found._functions.update(kept)


def make(name="Length", module=__name__, /, **namespace):
    """A working function class, as if `module` had defined it."""

    def generate_embeddings(self, texts):
        return [[float(len(text)), 1.0] for text in texts]

    body = {
        "__module__": module,
        "__qualname__": name,
        "generate_embeddings": generate_embeddings,
        "ndims": lambda self: 2,
        **namespace,
    }
    return type(TextEmbeddingFunction)(name, (TextEmbeddingFunction,), body)


def config(function, vector="vector", source="text"):
    return EmbeddingFunctionConfig(vector_column=vector, source_column=source, function=function)


def stored(*entries):
    return {b"embedding_functions": json.dumps(list(entries)).encode()}


def entry(name, vector="vector", **extra):
    return {"name": name, "model": {}, "source_column": "text", "vector_column": vector, **extra}


# -- names


def test_alias_and_class_name(registry):
    first, second, third = make("First"), make("Second"), make("Third")
    assert register("one")(first) is first
    assert register()(second) is second
    assert register(third) is third  # @register without parentheses
    assert registry.get("one") is first
    assert registry.get("Second") is second
    assert registry.get("Third") is third
    for cls, name in [(first, "one"), (second, "Second"), (third, "Third")]:
        assert registry.function_to_metadata(config(cls.create()))["name"] == name


def test_the_process_has_one_registry(registry):
    assert EmbeddingFunctionRegistry.get_instance() is get_registry() is registry


@pytest.mark.parametrize("thing", [int, object(), lambda: None, "name"])
def test_only_embedding_functions_are_registered(registry, thing):
    with pytest.raises(TypeError, match="EmbeddingFunction"):
        registry.register("bad")(thing)
    with pytest.raises(UnknownProviderError):
        registry.get("bad")


def test_an_alias_is_a_string(registry):
    with pytest.raises(TypeError, match="string"):
        registry.register(3)


def test_a_class_of_lancedb_is_refused_with_the_reason(registry):
    theirs = type("Base", (), {"__module__": "lancedb.embeddings.base"})
    with pytest.raises(TypeError, match=r"gpu_lance\.embeddings"):
        registry.register("bad")(type("Sub", (theirs,), {}))


def test_built_in_alias_cannot_be_taken(registry):
    with pytest.raises(ProviderTakenError, match="sentence-transformers") as caught:
        registry.register("sentence-transformers")(make())
    assert isinstance(caught.value, KeyError)
    assert "sentence-transformers" not in registry._functions


def test_the_same_class_again_is_replaced_in_silence(registry):
    registry.register("mine")(make())
    again = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry.register("mine")(again)
    assert registry.get("mine") is again


def test_another_class_replaces_with_a_warning(registry, caplog):
    registry.register("mine")(make("Old"))
    new = make("New")
    with pytest.warns(UserWarning, match="Old.*New") as caught:
        registry.register("mine")(new)
    assert caught[0].filename == __file__
    assert "Old" in caplog.text
    assert registry.get("mine") is new


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("sentence-transformer", "sentence-transformers"),
        ("Sentence_Transformers", "sentence-transformers"),
        ("my-embeder", "my-embedder"),
    ],
)
def test_an_unknown_name_lists_near_and_known_names(registry, name, near):
    registry.register("my-embedder")(make())
    with pytest.raises(UnknownProviderError, match=f"Did you mean {near!r}") as caught:
        registry.get(name)
    assert isinstance(caught.value, KeyError)
    assert f"Known: {', '.join(registry.names())};" in str(caught.value)


@pytest.mark.parametrize("name", [None, 3, ["a"], ""])
def test_a_name_that_is_none(registry, name):
    with pytest.raises(UnknownProviderError):
        registry.get(name)


def test_reset_returns_to_the_built_in_providers(registry):
    before = registry.names()
    registry.register("mine")(make())
    registry.set_var("x", "1")
    assert registry.names() == sorted([*before, "mine"])
    registry.reset()
    assert registry.names() == before
    assert "sentence-transformers" in before
    with pytest.raises(KeyError):
        registry.get("mine")
    with pytest.raises(KeyError):
        registry.get_var("x")


# -- built-in providers and entry points


def test_built_in_names_are_the_entry_points_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][registry_module.ENTRY_POINT_GROUP] == registry_module.BUILT_IN


def test_sentence_transformers_is_found(registry):
    from gpu_lance.embeddings import SentenceTransformerEmbeddings

    cls = registry.get("sentence-transformers")
    assert cls is SentenceTransformerEmbeddings
    assert registry.function_to_metadata(config(cls.create()))["name"] == "sentence-transformers"


def test_a_lookup_loads_nothing_else():
    code = (
        "import sys\n"
        "from gpu_lance.embeddings import get_registry, register, TextEmbeddingFunction\n"
        "registry = get_registry(); registry.names()\n"
        "heavy = {'torch', 'transformers', 'faiss', 'sentence_transformers'} & set(sys.modules)\n"
        "ours = 'gpu_lance.embeddings.sentence_transformers' in sys.modules\n"
        "sys.exit(f'{heavy} {ours}' if heavy or ours else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def plugins(registry, monkeypatch):
    """Two installed third-party providers, and one that would take a built-in name."""
    good, other, thief = (types.ModuleType(f"plugin_{n}") for n in ("good", "other", "thief"))
    good.Good = make("Good", "plugin_good")
    thief.Thief = make("Thief", "plugin_thief")
    other.Wrong = int
    for module in (good, other, thief):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    points = [
        importlib.metadata.EntryPoint(name, value, registry_module.ENTRY_POINT_GROUP)
        for name, value in [
            ("good", "plugin_good:Good"),
            ("wrong", "plugin_other:Wrong"),
            ("absent", "plugin_absent:Absent"),
            ("sentence-transformers", "plugin_thief:Thief"),
        ]
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    return types.SimpleNamespace(good=good.Good, thief=thief.Thief)


def test_third_parties_register_by_entry_point(registry, plugins):
    assert {"good", "wrong", "absent"} < set(registry.names())
    cls = registry.get("good")
    assert cls is plugins.good
    assert registry.function_to_metadata(config(cls.create()))["name"] == "good"


def test_a_function_of_an_entry_point_is_named_before_it_is_looked_up(registry, plugins):
    assert registry.function_to_metadata(config(plugins.good.create()))["name"] == "good"


def test_an_entry_point_that_is_no_function(registry, plugins):
    with pytest.raises(TypeError, match="'wrong'"):
        registry.get("wrong")


def install(folder, package, **points):
    """An installed package that announces these functions."""
    metadata = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {target}\n" for name, target in points.items()]
    text = f"[{registry_module.ENTRY_POINT_GROUP}]\n{''.join(lines)}"
    (metadata / "entry_points.txt").write_text(text)


def test_a_broken_package_is_named(registry, tmp_path, monkeypatch):
    points = {"absent": "plugin_gone:Absent", "half": "plugin_half:Absent", "bad": "plugin_bad:Bad"}
    install(tmp_path, "some-plugins", **points)
    (tmp_path / "plugin_half.py").write_text("")
    (tmp_path / "plugin_bad.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    causes = [ModuleNotFoundError, AttributeError, ZeroDivisionError]
    try:
        for (name, target), cause in zip(points.items(), causes, strict=True):
            wanted = (
                f"'{name}', which is {target} of the package some-plugins, .* {cause.__name__}: "
            )
            with pytest.raises(BrokenProviderError, match=wanted) as caught:
                registry.get(name)
            assert isinstance(caught.value, ImportError)
            assert type(caught.value.__cause__) is cause
            broken = registry.parse_functions(stored(entry(name)))["vector"].function
            with pytest.raises(BrokenProviderError, match="some-plugins"):
                broken.ndims()
    finally:
        sys.modules.pop("plugin_half", None)


def test_a_broken_entry_point_of_an_unknown_package(registry, plugins):
    with pytest.raises(BrokenProviderError, match="plugin_absent:Absent of an unknown package"):
        registry.get("absent")


def test_of_two_packages_with_one_name_the_first_on_the_path_counts(
    registry, tmp_path, monkeypatch, caplog
):
    for package, module in [("second-package", "two"), ("first-package", "one")]:
        install(tmp_path / package, package, shared=f"plugin_{module}:F", same="plugin_s:F")
        monkeypatch.syspath_prepend(tmp_path / package)
        monkeypatch.setitem(sys.modules, f"plugin_{module}", types.ModuleType(module))
        sys.modules[f"plugin_{module}"].F = make("F", f"plugin_{module}")
    assert registry.get("shared") is sys.modules["plugin_one"].F
    registry.names()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "'shared': plugin_one:F of the package first-package counts" in record.message
    assert "plugin_two:F of the package second-package is ignored" in record.message


def test_an_entry_point_cannot_take_a_built_in_name(registry, plugins, caplog):
    assert "sentence-transformers" in registry.names()
    assert "plugin_thief" in caplog.text
    with pytest.raises(UnknownProviderError):
        registry.function_to_metadata(config(plugins.thief.create()))


def test_a_class_of_ones_own_goes_before_an_entry_point_with_a_warning(registry, plugins):
    mine = make("Mine")
    with pytest.warns(UserWarning, match="plugin_good:Good"):
        registry.register("good")(mine)
    assert registry.get("good") is mine


def test_threads_may_register_and_look_up(registry):
    failures = []

    def work(number):
        try:
            for step in range(50):
                name = f"t{number}-{step}"
                cls = registry.register(name)(make(f"T{number}x{step}"))
                registry.set_var(name, name)
                assert registry.get(name) is cls
                assert registry.get_var(name) == name
                registry.names()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(registry._functions) == 200


# -- variables


def test_variables(registry):
    registry.set_var("name", "value")
    assert registry.get_var("name") == "value"
    with pytest.raises(ValueError, match="colon"):
        registry.set_var("a:b", "value")
    with pytest.raises(KeyError):
        registry.get_var("other")


def test_references_are_resolved_and_stored_unresolved(registry):
    cls = registry.register("v")(
        make(
            "V",
            __annotations__={"name": "str", "url": "str", "options": "dict", "stops": "list"},
            name="x",
            url="",
            options={},
            stops=[],
        )
    )
    registry.set_var("model", "big")
    arguments = {
        "name": "$var:model",
        "url": "$var:base:http://host:80/v1",
        "options": {"deep": ["$var:model", {"deeper": "$var:none:fallback"}], "n": 3},
        "stops": ["$var:model", "end"],
    }
    function = cls.create(**arguments)
    assert function.name == "big"
    assert function.url == "http://host:80/v1"
    assert function.options == {"deep": ["big", {"deeper": "fallback"}], "n": 3}
    assert function.stops == ["big", "end"]
    assert function.safe_model_dump() == arguments
    registry.set_var("model", "small")
    revived = registry.parse_functions(registry.get_table_metadata([config(function)]))["vector"]
    assert revived.function.name == "small"


def test_arguments_changed_afterwards_do_not_change_the_function(registry):
    cls = make("V", __annotations__={"options": "dict"}, options={})
    options = {"a": [1]}
    function = cls.create(options=options)
    options["a"].append(2)
    function.safe_model_dump()["options"]["a"].append(3)
    assert function.safe_model_dump() == {"options": {"a": [1]}}


def test_an_unknown_variable_is_named(registry):
    cls = make("V", __annotations__={"name": "str"}, name="x")
    with pytest.raises(ValueError, match=r"'missing'.*registry\.set_var") as caught:
        cls.create(name="$var:missing")
    assert isinstance(caught.value, UnknownVariableError)


def keyed():
    """A class with a sensitive argument."""
    return make(
        "Keyed",
        __annotations__={"api_key": "str | None", "headers": "dict"},
        api_key=None,
        headers={},
        sensitive_keys=staticmethod(lambda: ["api_key"]),
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {"api_key": SECRET},
        {"api_key": f"$var:key:{SECRET}"},
        {"headers": {"api_key": SECRET}},
        {"api_key": SECRET.encode()},
    ],
)
def test_a_secret_in_clear_is_refused(registry, arguments):
    with pytest.raises(
        ValueError, match="Sensitive key 'api_key' cannot be set to a hardcoded value"
    ) as caught:
        keyed().create(**arguments)
    assert isinstance(caught.value, HardcodedSecretError)
    assert SECRET not in str(caught.value) + "".join(caught.value.__notes__)


def test_a_secret_is_in_no_metadata(registry):
    cls = registry.register("keyed")(keyed())
    registry.set_var("key", SECRET)
    made = cls.create(api_key="$var:key", headers={"api_key": "$var:key"})
    plain = cls(api_key=SECRET, headers={"api_key": SECRET})
    half = cls(api_key=f"$var:key:{SECRET}")
    assert made.api_key == made.headers["api_key"] == SECRET
    for function in (made, plain, half):
        metadata = registry.get_table_metadata([config(function)])
        assert SECRET.encode() not in metadata["embedding_functions"]
    assert plain.safe_model_dump() == half.safe_model_dump() == {}
    assert cls(api_key="$var:key").safe_model_dump() == {"api_key": "$var:key"}


# -- metadata


def test_metadata_round_trip(registry):
    cls = registry.register("v")(make("V", __annotations__={"name": "str"}, name="x"))
    function = cls.create(name="ünïcode", max_retries=2)
    metadata = registry.get_table_metadata([config(function, "v1"), config(cls.create(), "v2")])
    assert metadata == {
        "embedding_functions": json.dumps(
            [
                {
                    "name": "v",
                    "model": {"name": "ünïcode", "max_retries": 2},
                    "source_column": "text",
                    "vector_column": "v1",
                },
                {"name": "v", "model": {}, "source_column": "text", "vector_column": "v2"},
            ],
            indent=2,
        ).encode()
    }
    parsed = registry.parse_functions(metadata)
    assert list(parsed) == ["v1", "v2"]
    assert parsed["v1"].source_column == "text"
    assert parsed["v1"].function == function
    assert parsed["v1"].function.max_retries == 2


@pytest.mark.parametrize("metadata", [None, {}, {b"other": b"1"}])
def test_no_functions(registry, metadata):
    assert registry.parse_functions(metadata) == {}


@pytest.mark.parametrize("functions", [None, []])
def test_no_metadata(registry, functions):
    assert registry.get_table_metadata(functions) is None


def test_keys_and_values_may_be_bytes_or_text(registry):
    registry.register("v")(make("V"))
    text = json.dumps([entry("v")])
    for key in ("embedding_functions", b"embedding_functions"):
        for value in (text, text.encode()):
            assert list(registry.parse_functions({key: value})) == ["vector"]


def test_session_and_unsafe_arguments_are_neither_written_nor_read(registry):
    fields = {"device": "cpu", "batch_size": 1, "dtype": "a", "trust_remote_code": False, "n": 0}
    cls = registry.register("v")(
        make("V", __annotations__={name: type(v) for name, v in fields.items()}, **fields)
    )
    given = {"device": "cuda", "batch_size": 9, "dtype": "b", "trust_remote_code": True, "n": 5}
    assert cls.create(**given).safe_model_dump() == {"n": 5}
    assert cls(**given).safe_model_dump() == {"n": 5}
    read = registry.parse_functions(stored(entry("v", model=given)))["vector"].function
    assert (read.device, read.batch_size, read.dtype) == ("cpu", 1, "a")
    assert read.trust_remote_code is False
    assert read.n == 5


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        (entry("gone"), UnknownProviderError, "'gone'"),
        (entry(None), UnknownProviderError, "None"),
        ({k: v for k, v in entry("v").items() if k != "model"}, SchemaError, "'model'"),
        (entry("v", model={"max_retries": "$var:unset"}), ValueError, "'unset'"),
        (entry("v", model={"max_retries": "many"}), ValueError, "max_retries"),
        (entry("sentence-transformers", model=[1]), SchemaError, "'model'"),
    ],
)
def test_a_function_that_cannot_be_made_spoils_no_other(registry, bad, error, match):
    registry.register("v")(make("V"))
    bad = {**bad, "vector_column": "bad", "kept": 1}
    parsed = registry.parse_functions(stored(entry("v", "good"), bad, entry("v", "last")))
    assert list(parsed) == ["good", "bad", "last"]
    assert parsed["good"].function.ndims() == parsed["last"].function.ndims() == 2
    assert parsed["good"].function.compute_query_embeddings("abc") == [[3.0, 1.0]]
    function = parsed["bad"].function
    assert isinstance(function, EmbeddingFunction)
    for _ in range(2):
        for use in (
            function.ndims,
            lambda: function.compute_query_embeddings("a"),
            lambda: function.compute_source_embeddings(["a"]),
            lambda: function.compute_query_embeddings_with_retry("a"),
            lambda: function.compute_source_embeddings_with_retry(["a"]),
        ):
            with pytest.raises(error, match=match):
                use()
    assert registry.function_to_metadata(parsed["bad"]) == bad  # a rewrite loses nothing


@pytest.mark.parametrize(
    "value",
    [b"{", b"\xff\xfe", b"3", b"{}", b"[1]", b'[{"name": "v", "model": {}}]', 7],
)
def test_malformed_metadata_names_its_key(registry, value):
    with pytest.raises(SchemaError, match="'embedding_functions'"):
        registry.parse_functions({b"embedding_functions": value})


def test_of_two_entries_for_a_column_the_last_counts(registry, caplog):
    registry.register("v")(make("V"))
    model = {"max_retries": 1}
    parsed = registry.parse_functions(stored(entry("v"), entry("v", model=model)))
    assert parsed["vector"].function.max_retries == 1
    assert "'vector'" in caplog.text


def test_only_registered_classes_are_written(registry):
    parent = registry.register("parent")(make("Parent"))
    child = type(parent)("Child", (parent,), {"__module__": __name__, "__qualname__": "Child"})
    with pytest.raises(UnknownProviderError, match="Child"):
        registry.function_to_metadata(config(child.create()))
    registry.register("child")(child)
    assert registry.function_to_metadata(config(child.create()))["name"] == "child"
    assert registry.function_to_metadata(config(parent.create()))["name"] == "parent"


@pytest.mark.parametrize("value", [object(), {1, 2}, float("nan"), b"bytes", [Path("x")]])
def test_an_argument_without_json_form_is_named(registry, value):
    cls = registry.register("v")(make("V", __annotations__={"thing": "object"}, thing=None))
    with pytest.raises(BadInputError, match="'thing'"):
        registry.get_table_metadata([config(cls.create(thing=value))])


def test_no_secret_in_logs_of_parsing(registry, caplog):
    caplog.set_level(logging.DEBUG)
    registry.register("keyed")(keyed())
    registry.set_var("key", SECRET)
    bad = {"api_key": "$var:key", "headers": "$var:key"}
    parsed = registry.parse_functions(stored(entry("keyed", model=bad)))
    with pytest.raises(ValueError) as caught:
        parsed["vector"].function.ndims()
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(parsed)
    assert "keyed" in caplog.text
    assert SECRET not in caplog.text
