"""Every notebook runs from top to bottom in an empty folder, and is stored without its outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def read(path: Path) -> Any:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path: Path) -> None:
    notebook = read(path)
    assert code_cells(notebook)
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            assert cell.outputs == [], f"cell {number} has outputs; clear them"
            assert cell.execution_count is None, f"cell {number} has an execution count"
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = read(path)
    # the kernel's, not this process's: where it runs, and that it asks no hub
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    # tqdm's, where ipywidgets is not installed
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")
    work = tmp_path / "work"
    work.mkdir()
    NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(work)}}
    ).execute()
    shown = [output_of(cell) for cell in code_cells(notebook)]
    assert [cell.execution_count for cell in code_cells(notebook)] == [
        number + 1 for number in range(len(shown))
    ]
    for part, wanted in SHOWN.get(path.stem, {}).items():
        (number,) = (i for i, cell in enumerate(code_cells(notebook)) if part in cell.source)
        assert wanted in shown[number], f"code cell {number} shows {shown[number]!r}"


def output_of(cell: Any) -> str:
    """What a cell shows as text; nothing may have gone to stderr."""
    parts = []
    for output in cell.outputs:
        assert output.get("name") != "stderr", output.text
        parts.append(output.get("text") or output.get("data", {}).get("text/plain", ""))
    return "".join(parts)


# What the output of a cell must hold, by a part of its source.
SHOWN = {
    "01_quickstart": {
        "func.name, func.ndims()": "('all-MiniLM-L6-v2', 384)",
        "table.add(rows)": ", 2)",
        ").limit(3).select(": "try",
        'where("topic = ?"': "with",
        "search(questions)": "truth",
        "query_vector =": "slic",
        "explain_plan": "faiss knn",
        "bananas.": "'text': 'My notes about bananas.'",
        "restore": "(0, 4)",
        '@register("letters")': "banana",
        "lychee": "'cherry'",
        "drop_table": "['passages']",
    }
}
