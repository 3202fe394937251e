"""A key goes to the server and nowhere else: searched for wherever it could show."""

from __future__ import annotations

import _thread
import logging
import pickle
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from api_server import KEY, Answer, refusal

import gpu_lance
from gpu_lance.embeddings import calls, get_registry
from gpu_lance.embeddings.api_connection import CONNECTIONS, _named
from gpu_lance.errors import (
    ApiAccessError,
    ApiError,
    BadInputError,
    HardcodedSecretError,
    MissingKeyError,
    RefusedURLError,
    UnknownVariableError,
)
from gpu_lance.pydantic import LanceModel, Vector

PROVIDERS = pytest.mark.parametrize("provider", ["openai", "cohere"])
HEADER = "header-secret-9876543210"


def make(provider: str, url: str, key: str, **arguments: Any) -> Any:
    """A function whose key, and for openai a header, come from variables."""
    registry = get_registry()
    registry.set_var("key", key)
    registry.set_var("header", HEADER)
    if provider == "openai":
        url += "/v1"
        arguments["default_headers"] = {"X-Token": "$var:header"}
    cls = registry.get(provider)
    return cls.create(name="tiny", dim=8, base_url=url, api_key="$var:key", **arguments)


def schema_of(function: Any) -> Any:
    class Doc(LanceModel):
        text: str = function.SourceField()
        vector: Vector(function.ndims()) = function.VectorField()

    return Doc


def everything(error: BaseException) -> str:
    """All that a log would print of an exception, its chain, what they hold, and our frames."""
    parts = traceback.format_exception(error)
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if "/gpu_lance/" in frame.f_code.co_filename:
            parts += [repr(value) for value in frame.f_locals.values()]
    seen: set[int] = set()
    waiting: list[Any] = [error]
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        parts += [str(part), repr(part)]
        if isinstance(part, BaseException):
            waiting += [part.__cause__, part.__context__, *part.args, *vars(part).values()]
            waiting += getattr(part, "__notes__", [])
        elif isinstance(part, dict):
            waiting += [*part, *part.values()]
        elif isinstance(part, list | tuple):
            waiting += part
        elif hasattr(part, "headers"):
            waiting.append(dict(part.headers))
    return "\n".join(parts)


def clean(text: str, *secrets: str) -> None:
    for secret in secrets:
        for form in (secret, secret[4:], secret.upper(), secret.encode().hex()):
            assert form not in text, text[max(0, text.find(form) - 200) :][:400]


@PROVIDERS
def test_the_key_arrives_and_shows_nowhere(provider, server, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    key = "var-key-abcdef-1234567890"
    function = make(provider, server.url, key)
    db = gpu_lance.connect(tmp_path, device="cpu")
    table = db.create_table("docs", schema=schema_of(function))
    table.add([{"text": "one"}, {"text": "two"}])
    assert table.search("one").limit(1).to_list()
    sent = {name.lower(): value for name, value in server.asked[-1].headers.items()}
    assert sent["authorization"] == f"Bearer {key}"
    if provider == "openai":
        assert sent["x-token"] == HEADER
    stored = b"".join(p.read_bytes() for p in Path(tmp_path).rglob("*") if p.is_file())
    shown = [repr(function), str(function), stored.decode("latin-1"), str(table.schema.metadata)]
    shown += [
        str(function.safe_model_dump()),
        function.model_dump_json(),
        str(function.fingerprint()),
    ]
    shown += [str(function.model_dump()), repr(table.embedding_functions), repr(table), caplog.text]
    shown += [str(schema_of(function).model_json_schema()), str(vars(function.model_copy()).keys())]
    shown += [pickle.dumps(function).decode("latin-1")]
    for text in shown:
        clean(text, key, HEADER)
    assert len(caplog.records) > 5  # the clients' own are among them
    assert any(record.name.startswith("http") for record in caplog.records)
    assert "$var:key" in stored.decode("latin-1")
    if provider == "openai":
        assert "$var:header" in stored.decode("latin-1")


@PROVIDERS
@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 429, 500])
def test_a_server_that_repeats_the_key(provider, status, server, caplog, pauses):
    """In the message, in a header and in the reason of a bad row."""
    caplog.set_level(logging.DEBUG)
    key = "var-key-abcdef-1234567890"
    secrets = [key, HEADER] if provider == "openai" else [key]
    function = make(provider, server.url, key, max_retries=1)

    def misbehave(asked, number):
        if status in (400, 422) and "bad" not in asked.texts:
            return None
        said = f"the key {key} and {secrets[-1]} for {asked.headers}" + " and so on" * 100
        answer = refusal(status, said)
        answer.headers["X-Echo"] = "yes"
        return answer

    server.misbehave = misbehave
    if status in (400, 422):
        made = calls.embed(function, ["good", "bad"], "source", ndims=8, device=torch.device("cpu"))
        assert made.errors[1].startswith(f"the server refused it (HTTP {status}): the key *** and")
        assert len(made.errors[1]) < 400
        clean(str(made.errors), *secrets)
    else:
        with pytest.raises(ApiError, match=f"HTTP {status}.: the key ") as caught:
            function.compute_source_embeddings(["bad"])
        clean(everything(caught.value), *secrets)
        clean(pickle.dumps(caught.value).decode("latin-1"), *secrets)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
        assert len(str(caught.value)) < 700
    clean(caplog.text, *secrets)


@PROVIDERS
def test_a_key_of_the_environment_shows_nowhere(provider, server, caplog, tmp_path):
    caplog.set_level(logging.DEBUG)
    url = server.url + ("/v1" if provider == "openai" else "")
    function = get_registry().get(provider).create(name="tiny", dim=8, base_url=url)
    server.misbehave = lambda asked, number: refusal(401, f"Incorrect key {KEY}")
    table = gpu_lance.connect(tmp_path, device="cpu").create_table("d", schema=schema_of(function))
    with pytest.raises(ApiAccessError, match="Incorrect key \\*\\*\\*") as caught:
        table.add([{"text": "one"}])
    assert (
        server.asked[-1].headers.get("Authorization", server.asked[-1].headers.get("authorization"))
        == f"Bearer {KEY}"
    )
    clean(everything(caught.value) + caplog.text + repr(function), KEY)
    clean(pickle.dumps(function).decode("latin-1"), KEY)


@PROVIDERS
def test_half_an_answer_with_the_key_in_it(provider, server, caplog, pauses):
    key = "var-key-abcdef-1234567890"
    function = make(provider, server.url, key, max_retries=0)
    server.misbehave = lambda asked, number: Answer(body=f"<{key}>".encode())
    with pytest.raises(ApiError, match="of no use") as caught:
        function.compute_source_embeddings(["a"])
    clean(everything(caught.value) + caplog.text, key)


@PROVIDERS
def test_a_secret_in_clear_is_refused(provider, server):
    create = get_registry().get(provider).create
    with pytest.raises(
        HardcodedSecretError, match="'api_key' cannot be set to a hardcoded"
    ) as told:
        create(api_key="sk-in-clear-123456")
    clean(f"{told.value!r} {told.value} {told.value.__notes__}", "sk-in-clear-123456")
    with pytest.raises(HardcodedSecretError):
        create(api_key="$var:key:sk-in-clear-123456")
    with pytest.raises(UnknownVariableError):
        create(api_key="$var:nobody-set-it")
    if provider == "openai":
        with pytest.raises(HardcodedSecretError, match="'default_headers'"):
            create(default_headers={"Authorization": "Bearer sk-in-clear-123456"})


def test_all_headers_in_one_variable(server):
    """The form that LanceDB resolves too."""
    registry = get_registry()
    registry.set_var("headers", {"X-Token": HEADER})
    function = registry.get("openai").create(
        name="tiny", dim=8, base_url=f"{server.url}/v1", default_headers="$var:headers"
    )
    function.compute_query_embeddings("a")
    sent = {name.lower(): value for name, value in server.asked[-1].headers.items()}
    assert sent["x-token"] == HEADER
    assert function.safe_model_dump()["default_headers"] == "$var:headers"
    clean(repr(function) + pickle.dumps(function).decode("latin-1"), HEADER)


@PROVIDERS
def test_the_plain_constructor_hides_the_key_too(provider, server):
    cls, key = get_registry().get(provider), "plain-key-abcdef-123456"
    url = server.url + ("/v1" if provider == "openai" else "")
    function = cls(name="tiny", dim=8, base_url=url, api_key=key)
    assert function.compute_query_embeddings("a")[0].shape == (8,)
    clean(f"{function!r} {function} {function.safe_model_dump()} {function.model_dump()}", key)
    assert pickle.loads(pickle.dumps(function)).api_key is None


@PROVIDERS
def test_a_pickle_brings_references_that_are_looked_up_there(provider, server):
    key = "var-key-abcdef-1234567890"
    function = make(provider, server.url, key)
    data = pickle.dumps(function)
    again = pickle.loads(data)
    assert again.compute_query_embeddings("a")[0].shape == (8,)
    sent = {name.lower(): value for name, value in server.asked[-1].headers.items()}
    assert sent["authorization"] == f"Bearer {key}"
    assert again.safe_model_dump() == function.safe_model_dump()
    get_registry().reset()
    CONNECTIONS.clear()
    with pytest.raises(UnknownVariableError, match="'key' was not found"):
        pickle.loads(data).compute_query_embeddings("a")


def test_a_server_that_only_a_table_names_gets_nothing(tmp_path, monkeypatch):
    """A stranger's table must not make a program send its key and its texts to the stranger."""
    url = "http://stranger.invalid/v1"
    function = get_registry().get("openai").create(name="tiny", dim=8, base_url=url)
    db = gpu_lance.connect(tmp_path, device="cpu")
    db.create_table("d", schema=schema_of(function))
    named = set(_named)
    _named.clear()  # as in another process
    table = gpu_lance.connect(tmp_path, device="cpu").open_table("d")
    with pytest.raises(RefusedURLError, match="http://stranger.invalid makes its vectors"):
        table.search("a").limit(1).to_list()
    with pytest.raises(RefusedURLError, match="OPENAI_BASE_URL"):
        table.add([{"text": "a"}])
    # named by the program, it may be asked: nobody is there
    revived = table.embedding_functions["vector"].function
    revived.max_retries = 0
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    with pytest.raises(ApiError, match="no connection"):
        revived.compute_query_embeddings("a")
    monkeypatch.delenv("OPENAI_BASE_URL")
    with pytest.raises(RefusedURLError):
        revived.compute_query_embeddings("a")
    _named.update(named)
    with pytest.raises(ApiError, match="no connection"):
        revived.compute_query_embeddings("a")


def test_nothing_in_the_output_of_a_program_that_fails(server):
    """Also not in what Python prints of an error that nobody catches."""
    server.misbehave = lambda asked, number: refusal(401, f"bad key {KEY}")
    code = (
        "import logging, sys\n"
        "logging.basicConfig(level=logging.DEBUG)\n"
        "from gpu_lance.embeddings import get_registry\n"
        f"url = '{server.url}/v1'\n"
        "f = get_registry().get('openai').create(name='m', dim=8, base_url=url)\n"
        "f.compute_source_embeddings(['a'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "ApiAccessError" in done.stderr and "bad key ***" in done.stderr
    assert "The above exception" not in done.stderr and "During handling" not in done.stderr
    clean(done.stdout + done.stderr, KEY)


@pytest.mark.parametrize("way", ["azure", "address", "line break", "interrupt"])
def test_no_variable_of_a_traceback_holds_the_key(way, server, monkeypatch):
    """As tracebacks with variables show them, those of the client's own frames too."""
    key = "var-key-abcdef-1234567890"
    get_registry().set_var("key", key)
    header = "header-abcdef-1234567890"
    get_registry().set_var("header", header)
    more: dict[str, Any] = {"base_url": f"{server.url}/v1"}
    raised: type[BaseException] = BadInputError
    if way == "azure":
        more = {"use_azure": True}  # without a version
    elif way == "address":
        more = {}
        monkeypatch.setenv("OPENAI_BASE_URL", "no address")
    elif way == "line break":
        get_registry().set_var("key", f"{key}\nHost: evil")
        raised = MissingKeyError
    else:
        raised = KeyboardInterrupt

        def misbehave(asked, number):
            _thread.interrupt_main()
            server.released.wait(2)

        server.misbehave = misbehave
    names = ["openai", "cohere"] if way in ("interrupt", "line break") else ["openai"]
    for name in names:
        make = get_registry().get(name).create
        headers = {"default_headers": {"X-Token": "$var:header"}} if name == "openai" else {}
        function = make(name="tiny", dim=8, api_key="$var:key", **more, **headers)
        with pytest.raises(raised) as caught:
            function.compute_query_embeddings("a")
        text = everything(caught.value)
        for frame, _ in traceback.walk_tb(caught.value.__traceback__):
            if frame.f_code.co_filename != __file__:
                text += "".join(map(repr, frame.f_locals.values()))
        clean(text, key)
        clean(text, header)


def test_a_missing_key_is_said_without_asking(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(MissingKeyError):
        get_registry().get("openai").create().compute_query_embeddings("a")
    assert server.asked == []


def test_the_search_would_find_a_key():
    with pytest.raises(AssertionError):
        clean("the key is abcd-secret-1", "abcd-secret-1")
    error = ValueError("outer")
    error.__context__ = KeyError("abcd-secret-1")
    with pytest.raises(AssertionError):
        clean(everything(error), "abcd-secret-1")
