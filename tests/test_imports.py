"""`import gpu_lance` is quick and loads nothing heavy; every public name is there."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = (
    *("torch", "transformers", "sentence_transformers", "faiss", "cupy", "triton", "ray"),
    *("pandas", "polars", "lance", "lancedb", "pyarrow", "pydantic", "numpy", "tqdm", "rich"),
)
SECONDS = 0.5
# the modules that a user imports by name
PUBLIC = ("db", "embeddings", "errors", "index", "pydantic", "query", "table")

PROBE = """
import json, sys, time
{first}
start = time.perf_counter()
{statement}
seconds = time.perf_counter() - start
print(json.dumps([seconds, sorted({{name.partition(".")[0] for name in sys.modules}})]))
"""


def run(statement: str, first: str = "", folder: Path = ROOT) -> tuple[float, set[str]]:
    """Seconds that `statement` took in a new interpreter, and the heavy modules it then holds."""
    code = PROBE.format(statement=statement, first=first)
    path = os.pathsep.join([str(folder), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=120,
    )
    seconds, loaded = json.loads(done.stdout)
    return seconds, set(loaded) & set(HEAVY)


def test_the_package_loads_nothing_heavy():
    seconds, loaded = zip(*(run("import gpu_lance") for _ in range(3)), strict=True)
    assert loaded == (set(), set(), set())
    assert min(seconds) < SECONDS


def test_tables_and_the_registry_load_no_model_library():
    models = {"torch", "transformers", "sentence_transformers", "faiss", "cupy", "triton", "ray"}
    _, loaded = run(
        "import gpu_lance; registry = gpu_lance.embeddings.get_registry(); registry.names(); "
        "import gpu_lance.db, gpu_lance.table, gpu_lance.query, gpu_lance.pydantic"
    )
    assert not loaded & models


@pytest.mark.parametrize(
    ("first", "statement"),
    [
        ("import torch", "import gpu_lance"),
        ("", "import gpu_lance.device; gpu_lance.device.resolve_device('cpu')"),
    ],
    ids=["loaded before", "loaded by a module of ours"],
)
def test_the_check_sees_torch(first: str, statement: str):
    pytest.importorskip("torch")
    _, loaded = run(statement, first)
    assert "torch" in loaded


def test_the_check_sees_a_module_that_imports_and_dawdles(tmp_path: Path):
    (tmp_path / "slow.py").write_text(
        "import time\nimport tqdm\nend = time.perf_counter() + 0.6\n"
        "while time.perf_counter() < end: pass\n"
    )
    seconds, loaded = run("import slow", folder=tmp_path)
    assert loaded == {"tqdm"}
    assert seconds > SECONDS


@pytest.mark.parametrize("name", ["", *PUBLIC])
def test_every_public_name_is_there(name: str):
    module = importlib.import_module("gpu_lance" + (f".{name}" if name else ""))
    listed = dir(module)
    for public in getattr(module, "__all__", []):
        assert getattr(module, public) is not None
        assert public in listed


def test_the_modules_of_the_package_are_attributes_of_it():
    run("import gpu_lance; " + "; ".join(f"gpu_lance.{name}" for name in PUBLIC))


@pytest.mark.parametrize("name", ["gpu_lance", "gpu_lance.embeddings", "gpu_lance.index"])
def test_an_unknown_name_is_an_attribute_error(name: str):
    module = importlib.import_module(name)
    with pytest.raises(AttributeError, match=f"'{name}' has no attribute 'nothing'"):
        _ = module.nothing


def test_one_name_is_one_object():
    import gpu_lance
    from gpu_lance.db import connect

    assert gpu_lance.connect is connect
    assert "connect" in vars(gpu_lance)
