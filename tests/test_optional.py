"""require: an optional package, or an error that says how to get it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_lance.errors import GpuLanceError, MissingExtraError
from gpu_lance.optional import require


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to import from."""
    monkeypatch.syspath_prepend(tmp_path)
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        del sys.modules[name]


def test_an_installed_module_is_returned():
    assert require("json", extra="cpu") is json
    assert require("json.decoder", extra="cpu") is json.decoder


@pytest.mark.parametrize("name", ["no_such_package", "no_such_package.inner.module"])
def test_a_missing_one_names_itself_and_the_install_line(name: str):
    with pytest.raises(MissingExtraError) as caught:
        require(name, extra="cpu")
    assert str(caught.value) == f"{name} is not installed. To get it: pip install 'gpu-lance[cpu]'"


def test_several_extras_are_alternatives():
    with pytest.raises(MissingExtraError, match=r"'gpu-lance\[cpu\]' or pip install 'gpu-lance\["):
        require("no_such_package", extra="cpu|cuda13")


def test_the_error_is_an_import_error_with_its_cause():
    with pytest.raises(ImportError) as caught:
        require("no_such_package", extra="cpu")
    assert isinstance(caught.value, GpuLanceError)
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_a_missing_module_of_an_installed_package_is_missing(modules: Path):
    (modules / "here").mkdir()
    (modules / "here" / "__init__.py").write_text("")
    with pytest.raises(MissingExtraError, match=r"here\.inner is not installed"):
        require("here.inner", extra="cpu")


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("import no_such_dependency", ModuleNotFoundError, "no_such_dependency"),
        ("from json import no_such_name", ImportError, "no_such_name"),
        ("raise ImportError('libcudart.so.13: cannot open')", ImportError, "libcudart"),
        ("1 / 0", ZeroDivisionError, "division"),
    ],
)
def test_a_broken_install_shows_its_own_error(
    modules: Path, text: str, error: type[Exception], words: str
):
    (modules / "broken_package.py").write_text(text)
    with pytest.raises(error, match=words) as caught:
        require("broken_package", extra="cpu")
    assert not isinstance(caught.value, MissingExtraError)


def test_a_missing_dependency_with_a_name_that_starts_alike_is_its_own_error(modules: Path):
    (modules / "broken_two.py").write_text("import broken")
    with pytest.raises(ModuleNotFoundError) as caught:
        require("broken_two", extra="cpu")
    assert not isinstance(caught.value, MissingExtraError)
