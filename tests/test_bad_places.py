"""Places, names and stored tables that are bad, and packages that are missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import gpu_lance
from gpu_lance.errors import (
    BadInputError,
    DeviceError,
    SchemaError,
    StorageError,
    TableNotFoundError,
    UnknownProviderError,
)

ROWS = [{"id": 1, "text": "a", "vector": [1.0, 2.0]}, {"id": 2, "text": "b", "vector": [3.0, 4.0]}]
SCHEMA = {"id": pa.int64(), "text": pa.utf8(), "vector": pa.list_(pa.float32(), 2)}


def opened(folder: Path) -> Any:
    return gpu_lance.connect(folder, device="cpu")


# ------------------------------------------------------------------- places


@pytest.mark.parametrize(
    ("uri", "error", "message"),
    [
        ("", ValueError, "empty path"),
        (5, TypeError, "str or a Path, got an int"),
        (b"here", TypeError, "got a bytes"),
        ("a\0b", ValueError, "NUL"),
        ("a\ud800b", ValueError, "no path"),
    ],
)
def test_uris_that_are_no_place(uri: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(BadInputError, match=message) as caught:
        gpu_lance.connect(uri)
    assert isinstance(caught.value, error)


def test_arguments_of_connect() -> None:
    with pytest.raises(TypeError, match=r"datetime\.timedelta or None, got a int"):
        gpu_lance.connect("memory://", read_consistency_interval=5)  # type: ignore[arg-type]
    with pytest.raises(StorageError, match="cannot be listed"):
        gpu_lance.connect("nowhere://bucket/db").table_names()


@pytest.mark.parametrize("below", ["", "db", "db/deeper"])
def test_a_file_holds_no_tables(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInputError, match=r"file' is a file; a database is a folder"):
        gpu_lance.connect(tmp_path / "file" / below)


NAMES = ["", ".", "..", "../x", "a/b", "/etc/x", "a\\b", "a b", "a\0", "a\n", "ü", "x" * 241, None]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_no_table(tmp_path: Path, name: Any) -> None:
    db = opened(tmp_path / "db")
    calls: list[Callable[[], Any]] = [
        lambda: db.create_table(name, ROWS),
        lambda: db.open_table(name),
        lambda: db.drop_table(name, ignore_missing=True),
    ]
    for call in calls:
        with pytest.raises(BadInputError, match="name for a table"):
            call()
    assert name not in db
    assert list(tmp_path.iterdir()) == []


def test_the_longest_name(tmp_path: Path) -> None:
    db = opened(tmp_path)
    db.create_table("x" * 240, ROWS)
    assert db["x" * 240].search([1.0, 2.0]).limit(1).to_list()[0]["id"] == 1


@pytest.mark.parametrize("name", ["_rowid", "_rowaddr", "_distance", "", "a.b", "a`b"])
def test_names_of_no_column(tmp_path: Path, name: str) -> None:
    db = opened(tmp_path)
    with pytest.raises(SchemaError, match="name of a column|name for a column"):
        db.create_table("t", [{name: 1, "vector": [1.0, 2.0]}])
    with pytest.raises(SchemaError, match="name of a column|name for a column"):
        db.create_table("t", schema=pa.schema({name: pa.int64()}))
    assert db.table_names() == []


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    db = opened(tmp_path)
    twice = pa.schema([("a", pa.int64()), ("a", pa.utf8())])
    with pytest.raises(SchemaError, match="more than one column 'a'"):
        db.create_table("t", schema=twice)
    data = pa.Table.from_arrays([pa.array([1]), pa.array(["x"])], schema=twice)
    with pytest.raises(SchemaError, match="more than one column 'a'"):
        db.create_table("t", data)
    assert db.table_names() == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_only_be_read(tmp_path: Path) -> None:
    opened(tmp_path).create_table("t", ROWS)
    everything = [tmp_path, *tmp_path.rglob("*")]
    for path in everything:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        db = opened(tmp_path)
        assert db["t"].search([1.0, 2.0]).limit(1).to_list()[0]["id"] == 1
        calls: list[Callable[[], Any]] = [
            lambda: db.create_table("u", ROWS),
            lambda: db.create_table("t", ROWS, mode="overwrite"),
            lambda: db["t"].add(ROWS),
            lambda: db["t"].delete("id = 1"),
            lambda: db["t"].update(values={"id": 5}),
            lambda: db.drop_table("t"),
        ]
        for call in calls:
            with pytest.raises(StorageError, match="(?i)permission denied"):
                call()
        assert len(db["t"]) == 2
    finally:
        for path in everything:
            path.chmod(0o755)


# ------------------------------------------------------------- stored tables


@pytest.mark.parametrize("damage", ["empty", "garbage", "cut"])
def test_a_damaged_manifest(tmp_path: Path, damage: str) -> None:
    opened(tmp_path).create_table("t", ROWS)
    for manifest in (tmp_path / "t.lance" / "_versions").iterdir():
        whole = manifest.read_bytes()
        manifest.write_bytes({"empty": b"", "garbage": b"x" * 500, "cut": whole[:-20]}[damage])
    db = opened(tmp_path)
    with pytest.raises(StorageError, match="Table 't' cannot be opened: .*damaged"):
        db["t"]
    assert db.table_names() == ["t"]
    db.drop_table("t")
    assert len(db.create_table("t", ROWS)) == 2


def test_a_folder_that_a_killed_writer_left(tmp_path: Path) -> None:
    opened(tmp_path).create_table("t", ROWS)
    shutil.rmtree(tmp_path / "t.lance" / "_versions")
    db = opened(tmp_path)
    assert "t" not in db
    with pytest.raises(TableNotFoundError, match="Table 't' was not found"):
        db["t"]
    assert len(db.create_table("t", ROWS[:1])) == 1


def test_a_file_in_the_place_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "t.lance").write_text("x")
    db = opened(tmp_path)
    assert db.table_names() == []
    with pytest.raises(StorageError, match="cannot be opened"):
        db["t"]
    with pytest.raises(StorageError, match="cannot be written"):
        db.create_table("t", ROWS)
    assert (tmp_path / "t.lance").read_text() == "x"


def with_metadata(folder: Path, value: str) -> Any:
    """A table that another program wrote, with that value for its embedding functions."""
    schema = pa.schema(SCHEMA, metadata={"embedding_functions": value})
    lance.write_dataset(pa.Table.from_pylist(ROWS, schema=schema), str(folder / "t.lance"))
    return opened(folder)["t"]


@pytest.mark.parametrize(
    "value", ["{not json", "", "5", "[5]", '[{"name": "x"}]', '{"name": "x"}', "null"]
)
def test_metadata_that_cannot_be_understood(tmp_path: Path, value: str) -> None:
    table = with_metadata(tmp_path, value)
    assert len(table) == 2 and table.search().limit(1).to_list()[0]["id"] == 1
    for call in (
        lambda: table.add([{"id": 3, "text": "c"}]),
        lambda: table.search("a").to_list(),
        lambda: table.embedding_functions,
    ):
        with pytest.raises(SchemaError, match=r"metadata 'embedding_functions' (is not|must be)"):
            call()
    assert table.version == 1


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ({"model": {}}, UnknownProviderError, "'nobody-has-this'"),
        ({}, SchemaError, "without its 'model'"),
    ],
)
def test_a_function_that_is_not_here(
    tmp_path: Path, model: dict[str, Any], error: type[Exception], message: str
) -> None:
    entry = {"name": "nobody-has-this", "source_column": "text", "vector_column": "vector", **model}
    table = with_metadata(tmp_path, json.dumps([entry]))
    found = table.search([3.0, 4.0]).limit(1).to_list()
    assert (found[0]["id"], found[0]["_distance"]) == (2, 0.0)
    with pytest.raises(error, match=message):
        table.search("a").to_list()
    with pytest.raises(error, match=message):
        table.add([{"id": 3, "text": "c"}])
    assert (table.version, len(table)) == (1, 2)
    table.add([{"id": 3, "text": "c", "vector": [5.0, 6.0]}])
    assert table.search([5.0, 6.0]).limit(1).to_list()[0]["id"] == 3


def test_a_source_column_that_is_gone(tmp_path: Path) -> None:
    entry = {"name": "sentence-transformers", "model": {}, "source_column": "gone"}
    table = with_metadata(tmp_path, json.dumps([{**entry, "vector_column": "vector"}]))
    assert table.search([3.0, 4.0]).limit(1).to_list()[0]["id"] == 2
    with pytest.raises(SchemaError, match="column 'gone', which the table does not have"):
        table.add(ROWS)
    assert len(table) == 2


# ------------------------------------------------------------------ devices


def test_devices_that_are_not_there(tmp_path: Path) -> None:
    from gpu_lance.device import resolve_device

    for name in ("tpu", "cuda:-1", 5):
        with pytest.raises(DeviceError, match="cuda:<number>"):
            gpu_lance.connect(tmp_path, device=name)
    for name in ("cuda:99",):
        table = gpu_lance.connect(tmp_path, device=name).create_table("t", ROWS, mode="overwrite")
        with pytest.raises(DeviceError, match="was asked for"):
            table.search([1.0, 2.0]).to_list()
    try:
        resolve_device("cuda")
    except DeviceError:
        table = gpu_lance.connect(tmp_path, device="cuda")["t"]
        with pytest.raises(DeviceError, match="pass device='auto' or device='cpu'"):
            table.search([1.0, 2.0]).to_list()
    assert len(opened(tmp_path)["t"].search([1.0, 2.0]).to_list()) == 2


# ----------------------------------------------------------- missing packages

MISSING = """
import sys, tempfile, warnings
warnings.simplefilter("error")
missing = sys.argv[1].split(",")

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Finder())
import pyarrow as pa
import gpu_lance
from gpu_lance.embeddings import EmbeddingFunctionConfig, get_registry

def said(call):
    try:
        return call()
    except ImportError as error:
        return f"{type(error).__name__}: {error}"

db = gpu_lance.connect(tempfile.mkdtemp())
table = db.create_table("t", [{"id": 1, "vector": [1.0, 2.0]}])
table.add([{"id": 2, "vector": [3.0, 4.0]}])
print(said(lambda: [row["id"] for row in table.search([3.0, 4.0]).to_list()]))
print(len(table), [row["id"] for row in table.search().where("id > 1").to_list()])
function = get_registry().get("sentence-transformers").create(name="all-MiniLM-L6-v2")
wiring = EmbeddingFunctionConfig(vector_column="vector", source_column="text", function=function)
def texts():
    schema = pa.schema({"text": pa.utf8(), "vector": pa.list_(pa.float32(), 384)})
    return db.create_table("texts", [{"text": "a"}], schema, embedding_functions=[wiring])
if "faiss" not in missing:
    print(said(texts), "texts" in db)
"""


def run_without(*modules: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", MISSING, ",".join(modules)],
        capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_without_torch_tables_are_kept_and_searching_names_the_extra() -> None:
    search, rows, texts = run_without("torch")
    for line in (search, texts):
        assert line.startswith("MissingExtraError: torch is not installed")
        assert "pip install 'gpu-lance[cpu]'" in line
    assert rows == "2 [2]"
    assert texts.endswith("False")


def test_without_faiss_torch_searches() -> None:
    assert run_without("faiss") == ["[2, 1]", "2 [2]"]


def test_without_model_libraries_vectors_are_searched_and_texts_name_the_extra() -> None:
    search, rows, texts = run_without("transformers", "sentence_transformers")
    assert (search, rows) == ("[2, 1]", "2 [2]")
    assert texts.startswith("MissingExtraError: ")
    assert "pip install 'gpu-lance[cpu]'" in texts
    assert texts.endswith("False")


def test_nan_and_infinity_in_stored_vectors_are_never_near(tmp_path: Path) -> None:
    """Rows that another program stored: the search must not return them as the nearest."""
    matrix = np.array([[np.nan, 0], [np.inf, 0], [1, 2], [3, 4]], np.float32)
    vectors = pa.FixedSizeListArray.from_arrays(matrix.reshape(-1), 2)
    data = pa.table({"id": [0, 1, 2, 3], "vector": vectors})
    lance.write_dataset(data, str(tmp_path / "t.lance"))
    found = opened(tmp_path)["t"].search([1.0, 2.0]).limit(2).to_list()
    assert [(row["id"], row["_distance"]) for row in found] == [(2, 0.0), (3, 8.0)]
