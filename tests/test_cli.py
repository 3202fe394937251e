"""The command line: what it prints where, and its exit codes."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import gpu_lance
from gpu_lance import cli, demo
from gpu_lance.embeddings import EmbeddingFunctionConfig, TextEmbeddingFunction, register

TEXTS = ("a", "bb", "cccc", "dddddddd")


@register("length-of-cli")
class Length(TextEmbeddingFunction):
    """The length of a text."""

    def ndims(self) -> int:
        return 1

    def generate_embeddings(self, texts: Any, *args: Any, **kwargs: Any) -> list[Any]:
        return [[float(len(text))] for text in texts]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two small tables: one that embeds texts by their length, one with vectors and odd types."""
    folder = tmp_path_factory.mktemp("cli") / "db"
    db = gpu_lance.connect(folder, device="cpu")
    function = EmbeddingFunctionConfig(
        vector_column="vector", source_column="text", function=Length.create()
    )
    texts = [{"text": text, "n": n} for n, text in enumerate(TEXTS)]
    db.create_table("texts", texts, embedding_functions=[function])
    odd = {
        "day": datetime.date(2024, 2, 29),
        "raw": b"\x00\xff",
        "ratio": float("nan"),
        "name": "\x1b[31mred\tone\nline",
        "tags": ["x", "é"],
        "left_vector": [0.0, 1.0],
        "right_vector": [1.0, 0.0, 2.0],
    }
    db.create_table("odd", [odd, {**odd, "name": None, "left_vector": [5.0, 5.0]}])
    return str(folder)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def document(*arguments: str) -> Any:
    """What a successful call with --json writes."""
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def failure(result: Result, code: int = 1) -> str:
    """The one line on stderr of a call that failed."""
    assert result.exit_code == code, (result.stdout, result.stderr)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    if code == 1:
        assert result.stderr.startswith("gpu-lance: error: ")
        assert result.stderr.count("\n") == 1
    return result.stderr


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gpu_lance.cli", *arguments],
        cwd=cwd,
        capture_output=True,
        encoding="utf-8",
        timeout=240,
        check=False,
    )


# ------------------------------------------------------------------ help and usage


@pytest.mark.parametrize("command", ["demo", "info", "search"])
def test_every_command_has_help(command: str) -> None:
    assert command in call("--help").stdout
    result = call(command, "--help")
    assert result.exit_code == 0
    options = [line for line in result.stdout.splitlines() if line.startswith("  -")]
    assert any("--json" in line for line in options)
    assert any("--device" in line for line in options)


def test_version() -> None:
    result = call("--version")
    assert (result.exit_code, result.stdout) == (0, f"gpu-lance {gpu_lance.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "Usage"),
        (["nonsense"], "nonsense"),
        (["search"], "db"),
        (["search", "a", "b"], "query"),
        (["search", "a", "b", "c", "--limit", "0"], "--limit"),
        (["search", "a", "b", "c", "--limit", "many"], "--limit"),
        (["search", "a", "b", "c", "--distance-type", "manhattan"], "--distance-type"),
        (["search", "a", "b", ""], "question is empty"),
        (["search", "a", "b", " \t"], "question is empty"),
        (["search", "a", "b", "\udcff"], "lone surrogate"),
        (["search", "a", "b", "[1, 2", "--vector"], "--vector"),
        (["search", "a", "b", "3", "--vector"], "--vector"),
        (["search", "a", "b", '["x"]', "--vector"], "--vector"),
        (["search", "a", "b", '{"1": 2}', "--vector"], "--vector"),
        (["search", "a", "b", '"12"', "--vector"], "--vector"),
        (["demo", ""], "question is empty"),
        (["demo", "fine", "a\ud800"], "lone surrogate"),
        (["demo", "--rows", "0"], "--rows"),
        (["demo", "--limit", "-1"], "--limit"),
        (["info", "--wrong"], "--wrong"),
        (["info", "a", "b", "c"], "c"),
    ],
)
def test_wrong_usage_is_exit_code_2(
    arguments: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result.exit_code == 2
    assert named in result.output
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ info


def test_info_without_a_database() -> None:
    found = document("info")
    assert found["gpu_lance"] == gpu_lance.__version__
    assert found["device"]["name"]
    assert found["device"]["reason"]
    assert found["device"]["free_bytes"] > 0
    assert {"numpy", "pylance", "torch"} <= found["libraries"].keys()
    assert "tables" not in found
    plain = call("info").stdout
    assert f"torch {found['libraries']['torch']}" in plain
    assert f"device    {found['device']['name']} (" in plain


def test_info_of_a_database(database: str) -> None:
    found = document("info", database, "--device", "cpu")
    assert found["device"]["name"] == "cpu"
    odd, texts = found["tables"]
    assert (odd["name"], odd["rows"], odd["version"]) == ("odd", 2, 1)
    assert (texts["name"], texts["rows"]) == ("texts", 4)
    assert odd["embedding_functions"] == []
    assert texts["embedding_functions"] == [
        {"name": "length-of-cli", "model": {}, "source_column": "text", "vector_column": "vector"}
    ]
    vectors = {c["name"]: (c["dims"], c["metric"]) for c in odd["columns"] if "dims" in c}
    assert vectors == {"left_vector": (2, "l2"), "right_vector": (3, "l2")}
    assert {c["name"]: c["type"] for c in texts["columns"]}["n"] == "int64"

    lines = call("info", database).stdout.splitlines()
    assert "texts: 4 rows, version 1, " + texts["path"] in lines
    assert "vector\tfixed_size_list<item: float>[1]\tl2\ttext\tlength-of-cli()" in lines


def test_info_of_one_table(database: str) -> None:
    assert [table["name"] for table in document("info", database, "odd")["tables"]] == ["odd"]


def test_info_of_an_empty_folder(tmp_path: Path) -> None:
    assert document("info", str(tmp_path))["tables"] == []
    assert "0 tables" in call("info", str(tmp_path)).stdout


def test_a_damaged_table_does_not_hide_the_others(database: str, tmp_path: Path) -> None:
    copy = tmp_path / "db"
    shutil.copytree(database, copy)
    for manifest in (copy / "odd.lance" / "_versions").iterdir():
        manifest.write_bytes(b"nonsense")
    result = call("info", str(copy), "--json")
    assert result.exit_code == 1
    odd, texts = json.loads(result.stdout)["tables"]
    assert odd.keys() == {"name", "error"}
    assert texts["rows"] == 4
    assert result.stderr.startswith("gpu-lance: error: table 'odd' cannot be read: ")
    assert result.stderr.count("\n") == 1
    failure(call("info", str(copy), "odd"))


def test_a_table_whose_function_is_unknown_is_shown(tmp_path: Path) -> None:
    db = gpu_lance.connect(tmp_path, device="cpu")
    table = db.create_table("t", [{"text": "a", "vector": [1.0]}])
    stored = [{"name": "gone", "model": {}, "source_column": "text", "vector_column": "vector"}]
    table.to_lance().update_schema_metadata({"embedding_functions": json.dumps(stored)})
    (function,) = document("info", str(tmp_path))["tables"][0]["embedding_functions"]
    assert function["name"] == "gone"
    assert "No embedding function is registered as 'gone'" in function["error"]
    assert "registered as 'gone'" in failure(call("search", str(tmp_path), "t", "a"))
    assert document("search", str(tmp_path), "t", "[3]", "--vector")["hits"][0]["_distance"] == 4


# ------------------------------------------------------------------ search


def test_search_by_text(database: str) -> None:
    found = document("search", database, "texts", "xxx", "-n", "3", "--device", "cpu")
    assert [(hit["text"], hit["_distance"]) for hit in found["hits"]] == [
        ("bb", 1.0),
        ("cccc", 1.0),
        ("a", 4.0),
    ]
    assert found["hits"][0].keys() == {"text", "n", "_distance"}
    assert (found["rows"], found["version"], found["device"]) == (4, 1, "cpu")
    assert found["took_ms"] > 0


def test_search_by_vector_with_every_option(database: str) -> None:
    found = document(
        *(
            "search",
            database,
            "odd",
            "[0, 1]",
            "--vector",
            "--column",
            "left_vector",
            "--limit",
            "5",
        ),
        *("--where", "name IS NULL", "--select", "name", "--distance-type", "dot"),
    )
    assert found["hits"] == [{"name": None, "_distance": -4.0}]


def test_json_takes_every_type(database: str) -> None:
    hit = document("search", database, "odd", "[0, 1]", "--vector", "-c", "left_vector")["hits"][0]
    assert hit == {
        "day": "2024-02-29",
        "raw": "AP8=",
        "ratio": None,
        "name": "\x1b[31mred\tone\nline",
        "tags": ["x", "é"],
        "_distance": 0.0,
    }
    chosen = ("--select", "left_vector", "--select", "_distance")
    hits = document("search", database, "odd", "[0, 1]", "--vector", "-c", "left_vector", *chosen)[
        "hits"
    ]
    assert hits[0] == {"left_vector": [0.0, 1.0], "_distance": 0.0}


def test_plain_output_has_a_line_a_row_and_no_control_characters(database: str) -> None:
    result = call("search", database, "odd", "[0, 1]", "--vector", "-c", "left_vector")
    assert result.exit_code == 0
    names, first, second = result.stdout.splitlines()
    assert names.split("\t") == ["_distance", "day", "raw", "ratio", "name", "tags"]
    assert first.split("\t")[:5] == ["0", "2024-02-29", "2 bytes", "nan", "\ufffd[31mred one line"]
    assert second.split("\t")[4] == ""
    assert result.stderr.startswith("2 rows of 2 in ")


def test_a_search_that_finds_nothing(database: str) -> None:
    assert document("search", database, "texts", "x", "-w", "n > 99")["hits"] == []
    result = call("search", database, "texts", "x", "-w", "n > 99")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "0 rows of 4" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["{db}", "nope", "x"], "'nope' was not found in '{db}', which has odd, texts"),
        (["{db}", "../odd", "x"], "no name for a table"),
        (["{db}/nowhere", "texts", "x"], "There is no folder"),
        (["{db}/texts.lance", "texts", "x"], "is a table; give the folder"),
        ([__file__, "texts", "x"], "is a file"),
        (["{db}", "texts", "x", "--column", "nope"], "nope"),
        (["{db}", "texts", "x", "--where", "nope >"], "filter"),
        (["{db}", "texts", "x", "--where", "\udcff"], ""),
        (["{db}", "texts", "x", "--select", "nope"], "nope"),
        (["{db}", "odd", "x"], "left_vector"),
        (["{db}", "odd", "x", "-c", "left_vector"], "No embedding function"),
        (["{db}", "texts", "[1, 2]", "--vector"], "2 dimensions and column 'vector' has 1"),
        (["{db}", "texts", "[NaN]", "--vector"], "nan"),
        (["{db}", "texts", "[]", "--vector"], "empty"),
        (["{db}", "texts", "x", "--device", "banana"], "Unknown device 'banana'"),
    ],
)
def test_a_search_that_cannot_be_run_is_exit_code_1(
    database: str, arguments: list[str], named: str
) -> None:
    result = call("search", *(argument.format(db=database) for argument in arguments))
    assert named.format(db=database) in failure(result)


@pytest.mark.parametrize("command", [["info"], ["demo"], ["search", "{db}", "texts", "x"]])
def test_a_device_that_is_not_there(
    database: str, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    device = f"cuda:{torch.cuda.device_count()}" if torch.cuda.is_available() else "cuda"
    monkeypatch.chdir(tmp_path)
    result = call(*(part.format(db=database) for part in command), "--device", device)
    message = failure(result)
    assert f"device='{device}' was asked for, but" in message
    if device == "cuda":
        assert "pip install 'gpu-lance[cuda13]'" in message
    assert list(tmp_path.iterdir()) == []


def test_info_of_what_is_not_there(database: str, tmp_path: Path) -> None:
    assert "There is no folder" in failure(call("info", str(tmp_path / "nope")))
    assert "'nope' was not found" in failure(call("info", database, "nope"))
    assert "is a file" in failure(call("info", __file__, "--json"))


def test_a_foreign_table_stops_the_demo(tmp_path: Path) -> None:
    db = gpu_lance.connect(tmp_path, device="cpu")
    db.create_table(demo.TABLE, [{"mine": 1, "vector": [0.0, 1.0]}])
    assert "left alone" in failure(call("demo", "--db", str(tmp_path)))


# ------------------------------------------------------------------ as a process


def test_help_is_quick_and_loads_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys, gpu_lance.cli\n"
        "heavy = {'torch', 'transformers', 'faiss', 'lance', 'pyarrow', 'pandas'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert (result.returncode, result.stdout) == (0, "[]\n"), result.stderr


def test_the_demo_with_the_real_model(tmp_path: Path) -> None:
    result = run("demo", "What does assert do?", "--rows", "24", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["rows"], report["dims"], report["reused"]) == (24, 384, False)
    assert report["rows_per_s"] > 0
    assert report["search_ms"] > 0
    assert report["answers"][-1]["question"] == "What does assert do?"
    assert report["answers"][-1]["hits"][0]["topic"] == "assert"
    assert Path(report["path"]) == (tmp_path / "demo_db" / "python_topics.lance").resolve()
    assert "24/24" in result.stderr  # the bar

    again = call("demo", "--rows", "24", "--db", str(tmp_path / "demo_db"), "-n", "1")
    assert again.exit_code == 0, again.stderr
    assert "there already" in again.stdout
    assert report["path"] in again.stdout
    assert all(question in again.stdout for question in demo.QUESTIONS)

    database, table = str(tmp_path / "demo_db"), report["table"]
    found = document("search", database, table, "What does assert do?", "-n", "3")
    expected = report["answers"][-1]["hits"]
    assert [hit["text"] for hit in found["hits"]] == [hit["text"] for hit in expected]
    assert [hit["_distance"] for hit in found["hits"]] == pytest.approx(
        [hit["_distance"] for hit in expected], abs=1e-5
    )
    assert document("info", database)["tables"][0]["rows"] == 24


def test_a_missing_table_as_a_process(tmp_path: Path) -> None:
    result = run("search", ".", "nope", "x", "--json", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        "gpu-lance: error: Table 'nope' was not found in '.', which has no tables.\n"
    )


@pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals are POSIX's")
def test_a_table_on_a_terminal_is_drawn_and_cannot_steer_it(database: str) -> None:
    import pty

    ours, theirs = pty.openpty()
    arguments = ["search", database, "odd", "[0, 1]", "--vector", "-c", "left_vector"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gpu_lance.cli", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "160"},
    )
    os.close(theirs)
    out = b""
    with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
        while part := os.read(ours, 4096):
            out += part
    os.close(ours)
    assert process.wait(timeout=60) == 0
    text = out.decode()
    assert "\t" not in text
    assert "\x1b[31m" not in text
    assert "\ufffd[31mred one line" in text
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["0", "41"]


def test_a_reader_that_goes_away_is_no_traceback(database: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "gpu_lance.cli", "info", database, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    error = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(timeout=60) == 1
    assert "Traceback" not in error


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_a_full_disk_is_one_line(database: str, as_json: list[str]) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "gpu_lance.cli", "info", database, *as_json],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert result.returncode == 1
    assert "No space left" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
def test_ctrl_c_is_exit_code_130_without_a_traceback(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "gpu_lance.cli", "demo"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    seen = b""
    while b"loading" not in seen and (part := os.read(process.stderr.fileno(), 4096)):
        seen += part
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=120)
    text = (seen + error).decode()
    assert process.returncode == 130, text
    assert out == b""
    assert "gpu-lance: interrupted" in text
    assert "Traceback" not in text
