"""Embedding functions as objects: a user's classes, secrets, equality, copies, retries."""

from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys
import threading
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError, computed_field

from gpu_lance.embeddings import (
    EmbeddingFunction,
    EmbeddingFunctionConfig,
    TextEmbeddingFunction,
    get_registry,
)
from gpu_lance.embeddings import retries as retries_module
from gpu_lance.embeddings.unavailable import UnavailableFunction
from gpu_lance.errors import BadInputError, EmbeddingError, SchemaTypeError, UnknownProviderError

ROOT = Path(__file__).parents[1]
SECRET = "sk-planted-0123456789"


class Model:
    """Stands for something large: counts how often it is made, and refuses to be copied."""

    made = 0

    def __init__(self, name: str) -> None:
        type(self).made += 1
        self.name = name
        self.lock = threading.Lock()  # neither pickle nor deepcopy takes a lock

    def encode(self, texts: list[str]) -> np.ndarray:
        return np.array([[len(text), text.count("a")] for text in texts], dtype=np.float32)


class Seed(TextEmbeddingFunction):
    """The class of LanceDB's documentation."""

    model_name: str = "my-model"

    def generate_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._model.encode(texts).tolist()

    def ndims(self) -> int:
        return len(self.generate_embeddings(["test"])[0])

    @cached_property
    def _model(self) -> Model:
        return Model(self.model_name)


class OwnInit(EmbeddingFunction):
    """A class with a constructor of its own and an undeclared attribute."""

    name: str = "own"
    _declared: Any = PrivateAttr(default=None)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._ndims = 3
        self._client = Model(self.name)
        self._declared = self._client.lock

    def ndims(self) -> int:
        return self._ndims

    def compute_source_embeddings(self, items: Any, *args: Any, **kwargs: Any) -> list[Any]:
        return [np.full(3, len(item)) for item in self.sanitize_input(items)]

    def compute_query_embeddings(self, query: Any, *args: Any, **kwargs: Any) -> list[Any]:
        return self.compute_source_embeddings(query)


class Keyed(TextEmbeddingFunction):
    """A class with secrets."""

    api_key: str | None = None
    url: str = "http://host"
    headers: dict[str, str] = {}  # noqa: RUF012  (pydantic copies it)
    size: int = 2

    @staticmethod
    def sensitive_keys() -> list[str]:
        return ["api_key"]

    @computed_field
    @property
    def authorization(self) -> str:
        return f"Bearer {self.api_key}"

    def generate_embeddings(self, texts: list[str], *args: Any, **kwargs: Any) -> list[Any]:
        return [[0.0] * self.size for _ in texts]

    def ndims(self) -> int:
        return self.size


@pytest.fixture(autouse=True)
def variables():
    registry = get_registry()
    kept = dict(registry._functions)
    registry.set_var("key", SECRET)
    yield
    registry.reset()
    registry._functions.update(kept)


# -- a user's class


def test_the_class_of_the_seed_page():
    Model.made = 0
    function = Seed.create()
    assert function.model_name == "my-model"
    assert Model.made == 0
    assert function.ndims() == 2
    assert function.compute_source_embeddings(["banana", "x"]) == [[6.0, 3.0], [1.0, 0.0]]
    assert function.compute_query_embeddings("aa") == [[2.0, 2.0]]
    assert function.generate_embeddings(["test example"])[0] == [12.0, 1.0]
    assert Model.made == 1


def test_no_warning_for_any_field_name_of_the_api():
    code = (
        "import warnings; warnings.simplefilter('error')\n"
        "from functools import cached_property\n"
        "from gpu_lance.embeddings import register, TextEmbeddingFunction\n"
        "@register('mine')\n"
        "class Mine(TextEmbeddingFunction):\n"
        "    model_name: str = 'a'\n"
        "    model_path: str = 'b'\n"
        "    def generate_embeddings(self, texts): return [self._model] * len(texts)\n"
        "    def ndims(self): return 1\n"
        "    @cached_property\n"
        "    def _model(self): return [1.0]\n"
        "assert Mine.create(model_name='c').compute_query_embeddings('x') == [[1.0]]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_constructor_of_ones_own():
    function = OwnInit.create(name="x", max_retries=0)
    assert function.ndims() == 3
    assert function._client.name == "x"
    assert function.safe_model_dump() == {"name": "x", "max_retries": 0}
    vectors = function.compute_query_embeddings("four")
    assert [vector.tolist() for vector in vectors] == [[4, 4, 4]]


def test_abstract_methods_are_required():
    class Half(TextEmbeddingFunction):
        def ndims(self) -> int:
            return 1

    with pytest.raises(TypeError, match="generate_embeddings"):
        Half.create()


def test_defaults():
    assert Seed.create().max_retries == 7
    assert Seed.sensitive_keys() == []
    assert Seed.session_arguments == {"device", "batch_size", "dtype"}
    assert Seed.unsafe_arguments == {"trust_remote_code"}


def test_an_argument_that_is_ignored_is_told_once(caplog):
    for _ in range(2):
        function = Seed.create(model_nam="x")
    assert caplog.text.count("did you mean 'model_name'") == 1
    assert function.safe_model_dump() == {"model_nam": "x"}  # as LanceDB keeps it


def test_the_plain_constructor_dumps_what_was_set():
    assert Seed().safe_model_dump() == {}
    assert Seed(model_name="x").safe_model_dump() == {"model_name": "x"}
    assert Keyed(api_key=SECRET, size=4).safe_model_dump() == {"size": 4}


def test_the_plain_constructor_with_an_argument_without_json_form():
    class Odd(Seed):
        model_config = ConfigDict(arbitrary_types_allowed=True)
        thing: Model

    with pytest.raises(BadInputError, match="Odd"):
        Odd(thing=Model("x")).safe_model_dump()


def test_config_takes_only_functions():
    conf = EmbeddingFunctionConfig(vector_column="v", source_column="s", function=Seed.create())
    assert (conf.vector_column, conf.source_column) == ("v", "s")
    assert isinstance(conf.function, Seed)
    with pytest.raises(ValidationError):
        EmbeddingFunctionConfig(vector_column="v", source_column="s", function="Seed")


# -- fields


def test_fields_carry_the_function():
    function = Seed.create()

    class Schema(BaseModel):
        text: str = function.SourceField(description="words")
        vector: list[float] = function.VectorField(default=None, json_schema_extra={"unit": "one"})

    text, vector = Schema.model_fields["text"], Schema.model_fields["vector"]
    assert text.json_schema_extra["source_column_for"] is function
    assert text.description == "words"
    assert text.is_required()
    assert vector.json_schema_extra["vector_column_for"] is function
    assert vector.json_schema_extra["unit"] == "one"
    assert vector.default is None
    with pytest.raises(SchemaTypeError, match="dict"):
        function.SourceField(json_schema_extra=lambda schema: None)


# -- secrets


def shown(function: EmbeddingFunction) -> str:
    class Schema(BaseModel):
        text: str = function.SourceField()

    conf = EmbeddingFunctionConfig(vector_column="v", source_column="s", function=function)
    return " ".join(
        [
            repr(function),
            str(function),
            repr(conf),
            repr(Schema.model_fields["text"]),
            str(Schema.model_json_schema()),
            str(function.model_dump()),
            function.model_dump_json(),
            str(function.safe_model_dump()),
        ]
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: Keyed.create(api_key="$var:key"),
        lambda: Keyed.create(api_key="$var:key", headers={"api_key": "$var:key", "n": "1"}),
        lambda: Keyed(api_key=SECRET),
        lambda: Keyed(api_key=SECRET, headers={"api_key": SECRET}),
        lambda: copy.deepcopy(Keyed.create(api_key="$var:key")),
        lambda: pickle.loads(pickle.dumps(Keyed.create(api_key="$var:key"))),
        lambda: Keyed.create(api_key="$var:key").model_copy(),
    ],
)
def test_a_secret_is_used_but_never_shown(make):
    function = make()
    assert function.api_key == SECRET
    assert function.authorization == f"Bearer {SECRET}"
    text = shown(function)
    assert "api_key" in text
    assert SECRET not in text


def test_what_is_shown_instead():
    text = repr(Keyed.create(api_key="$var:key", url="$var:url:http://a"))
    assert "api_key='$var:key'" in text
    assert "url='$var:url:http://a'" in text
    assert "authorization='Bearer ***'" in text
    assert "api_key='***'" in repr(Keyed(api_key=SECRET))
    assert "api_key=None" in repr(Keyed())


def test_a_validation_error_does_not_quote_variables():
    with pytest.raises(ValidationError) as caught:
        Keyed.create(api_key="$var:key", size="$var:key")
    error = caught.value
    seen = f"{error} {error!r} {error.errors()} {error.json()} {error.__context__!r}"
    assert "size" in seen
    assert "valid integer" in seen
    assert SECRET not in seen
    with pytest.raises(ValidationError) as caught:
        Keyed(size=SECRET)
    assert SECRET not in str(caught.value)


def test_errors_of_a_validator_or_constructor_do_not_quote_variables():
    class Strict(Keyed):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            raise RuntimeError(f"bad key {self.api_key}", 3)

    with pytest.raises(RuntimeError) as caught:
        Strict.create(api_key="$var:key")
    assert caught.value.args == ("bad key $var:key", 3)


# -- equality, copies, pickles


class Shaped(Seed):
    """A class with arguments that cannot be hashed."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    layers: list[int] = []  # noqa: RUF012
    options: dict[str, Any] = {}  # noqa: RUF012
    means: Any = None


def test_equality_is_of_class_and_arguments():
    def make(**changes):
        given = {"layers": [1, 2], "options": {"a": {"b": [1]}}, "means": np.array([1.0, 2.0])}
        return Shaped.create(**(given | changes))

    assert make() == make()
    assert hash(make()) == hash(make())
    assert len({make(), make(), make(layers=[1])}) == 2
    assert make() != make(options={"a": {"b": [2]}})
    assert make() != make(means=np.array([1.0, 3.0]))
    assert make(options={"a": (1,)}) == make(options={"a": [1]})  # JSON has no tuples
    assert Seed.create() != Shaped.create()
    assert Seed.create() != "Seed"
    assert Seed.create(model_name="my-model") == Seed()


def test_equality_and_hash_ignore_caches():
    used, fresh = Seed.create(), Seed.create()
    before = hash(used)
    table = {used: "found"}
    used.ndims()
    assert "_model" in vars(used)
    assert hash(used) == before
    assert table[used] == "found"
    assert used == fresh
    assert fresh == used
    assert used.safe_model_dump() == {}


def test_deepcopy_shares_the_model_and_copies_the_arguments():
    function = Shaped.create(layers=[1], options={"a": [1]})
    function.ndims()
    twin = copy.deepcopy(function)
    assert twin == function
    assert twin._model is function._model
    twin.layers.append(2)
    twin.options["a"].append(2)
    assert function.layers == [1]
    assert function.options == {"a": [1]}
    assert twin.safe_model_dump() == {"layers": [1], "options": {"a": [1]}}
    own = OwnInit.create()
    assert copy.deepcopy(own)._client is own._client
    assert copy.deepcopy([own, own])[0].ndims() == 3


def test_pickle_leaves_the_loaded_model_behind():
    function = Shaped.create(model_name="x", layers=[1])
    function.ndims()
    Model.made = 0
    revived = pickle.loads(pickle.dumps(function))
    assert revived == function
    assert revived.safe_model_dump() == {"model_name": "x", "layers": [1]}
    assert Model.made == 0
    assert revived.compute_query_embeddings("aa") == [[2.0, 2.0]]
    assert Model.made == 1


def test_a_function_that_is_not_available_is_an_ordinary_object():
    entry = {"name": "gone", "model": {"a": 1}, "source_column": "s", "vector_column": "v"}
    function = UnavailableFunction.from_entry(entry, UnknownProviderError("gone"))
    same = UnavailableFunction.from_entry(entry, UnknownProviderError("gone"))
    other = UnavailableFunction.from_entry(entry | {"name": "b"}, UnknownProviderError("b"))
    assert function == same
    assert hash(function) == hash(same)
    assert function != other
    for twin in (copy.deepcopy(function), pickle.loads(pickle.dumps(function))):
        assert twin == function
        assert twin.safe_model_dump() == {"a": 1}
        with pytest.raises(UnknownProviderError, match="gone"):
            twin.ndims()


# -- inputs


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("one", ["one"]),
        (b"one", [b"one"]),
        (None, [None]),
        ([], []),
        (["a", None], ["a", None]),
        (("a", "b"), ["a", "b"]),
        (pa.array(["a", None]), ["a", None]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.chunked_array([["a"], ["b"]]), ["a", "b"]),
        (pa.scalar("a"), ["a"]),
        (np.array(["a", "b"]), ["a", "b"]),
        (np.array(["a", None], dtype=object), ["a", None]),
        (np.array("a"), ["a"]),
        (pd.Series(["a", None, "b"]), ["a", None, "b"]),
        (pd.Series(["a", np.nan], dtype=object), ["a", None]),
        ((text for text in "ab"), ["a", "b"]),
        ({"a": 1}, [{"a": 1}]),
    ],
)
def test_sanitize_input(given, wanted):
    found = Seed().sanitize_input(given)
    assert found == wanted
    assert type(found) is list
    assert all(type(item) in (str, bytes, dict, type(None)) for item in found)


def test_sanitize_input_of_polars_and_matrices():
    polars = pytest.importorskip("polars")
    assert Seed().sanitize_input(polars.Series(["a", None])) == ["a", None]
    rows = Seed().sanitize_input(np.arange(6).reshape(3, 2))
    assert [row.tolist() for row in rows] == [[0, 1], [2, 3], [4, 5]]


# -- retries


class Flaky(TextEmbeddingFunction):
    """Raises what it is told to, in turn, then answers."""

    _errors: list[Exception] = PrivateAttr(default_factory=list)
    _calls: int = PrivateAttr(default=0)

    def generate_embeddings(self, texts: list[str], *args: Any, **kwargs: Any) -> list[Any]:
        self._calls += 1
        if self._errors:
            raise self._errors.pop(0)
        return [[float(len(text))] for text in texts]

    def ndims(self) -> int:
        return 1


@pytest.fixture
def pauses(monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(retries_module, "pause", waits.append)
    return waits


@pytest.mark.parametrize("side", ["query", "source"])
def test_transient_errors_are_retried(pauses, side, caplog):
    function = Flaky.create()
    function._errors = [ConnectionResetError(SECRET), TimeoutError(SECRET)]
    call = getattr(function, f"compute_{side}_embeddings_with_retry")
    assert call(["four"]) == [[4.0]]
    assert len(pauses) == 2
    assert "ConnectionResetError" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize("error", [ValueError("bad"), MemoryError(), EmbeddingError("local")])
def test_local_errors_are_raised_at_once(pauses, error):
    function = Flaky.create()
    function._errors = [error]
    with pytest.raises(type(error)) as caught:
        function.compute_source_embeddings_with_retry(["a"])
    assert caught.value is error
    assert not hasattr(error, "__notes__")
    assert function._calls == 1
    assert pauses == []


@pytest.mark.parametrize(("max_retries", "calls"), [(0, 1), (1, 2), (7, 8)])
def test_max_retries(pauses, max_retries, calls):
    function = Flaky.create(max_retries=max_retries)
    errors = [ConnectionError(number) for number in range(20)]
    function._errors = list(errors)
    with pytest.raises(ConnectionError) as caught:
        function.compute_query_embeddings_with_retry("a")
    assert caught.value is errors[calls - 1]
    assert function._calls == calls
    assert len(pauses) == max_retries


def test_the_budget_of_a_class_ends_retries(pauses):
    class Hasty(Flaky):
        retry_budget = 0.0

    function = Hasty.create()
    function._errors = [ConnectionError()]
    with pytest.raises(ConnectionError) as caught:
        function.compute_query_embeddings_with_retry("a")
    assert caught.value.__notes__ == ["Gave up after 0 retries in 0.0 s."]
    assert pauses == []


def test_the_log_names_the_module(pauses, caplog):
    caplog.set_level(logging.WARNING)
    function = Flaky.create()
    function._errors = [ConnectionError()]
    function.compute_query_embeddings_with_retry("a")
    assert {record.name for record in caplog.records} == {"gpu_lance.embeddings.retries"}
