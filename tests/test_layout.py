"""The layout of the project: which module may import which, and what may stand where.

Every rule is a function from a folder to complaints. It runs over this checkout, which has none,
and over small wrong trees, which show that it can find one.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "gpu_lance"

# A module imports the levels above its own in this list and its siblings. Siblings are the modules
# of one folder, or files of one level that stand in gpu_lance/ itself: embeddings and index, two
# folders of one level, never know each other.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("errors", "optional", "types", "forks"),
    ("device", "host_memory", "lance_errors", "storage", "catalog"),
    ("kernels",),
    ("media",),
    ("embeddings", "index"),
    ("pydantic", "schema_types", "ingest", "rerankers", "display"),
    ("query",),
    ("table", "table_reader", "handover", "maintenance", "merge"),
    ("db",),
    ("demo", "topics", "overview", "jobs"),
    ("distributed",),
    ("cli",),
)
LEVEL_OF = {unit: level for level, units in enumerate(LEVELS) for unit in units}

LINES = 500
TEST_LINES = 650  # a long list of cases is still one idea
LONG: set[str] = set()  # files that may be longer

MAY_PRINT = {"cli", "display", "demo"}

# A script's folder comes first in sys.path, so that a file of one of these names beside it would
# be imported instead.
TAKEN = sys.stdlib_module_names | {
    *("PIL", "av", "cohere", "cupy", "datasets", "duckdb", "faiss", "hypothesis", "kernels"),
    *("huggingface_hub", "lance", "lancedb", "numpy", "open_clip", "openai", "pandas", "polars"),
    *("pyarrow", "pydantic", "pytest", "ray", "rich", "scipy", "sentence_transformers"),
    *("sklearn", "soundfile", "tokenizers", "torch", "torchvision", "tqdm", "transformers"),
    *("triton", "typer"),
}
SCRIPT_FOLDERS = (".", "benchmarks", "docs", "kernels", "notebooks", "tests")


def modules(root: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Each file of the package and its dotted name in parts; device code counts as kernels."""
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        yield path, parts[:-1] if parts[-1] == "__init__" else parts
    for path in sorted((root / "kernels").glob("*.py")):
        yield path, (PACKAGE, "kernels", path.stem)


def imports(path: Path, name: tuple[str, ...]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """The line and the target of each import, wherever in the file it stands."""
    package = name if path.name == "__init__.py" else name[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            if len(base) == 1:  # from gpu_lance import table
                yield from ((node.lineno, (*base, alias.name)) for alias in node.names)
            else:
                yield node.lineno, base


def import_order(root: Path) -> Iterator[str]:
    """Imports go to lower levels and to siblings."""
    for path, name in modules(root):
        where = path.relative_to(root).as_posix()
        if name == (PACKAGE,):  # the root only points at the others, on first use
            continue
        if name[1] not in LEVEL_OF:
            yield f"{where}: {name[1]} has no level"
            continue
        level = LEVEL_OF[name[1]]
        for line, target in imports(path, name):
            if target[0] == "kernels":
                yield f"{where}:{line}: kernels is Hugging Face's; ours is {PACKAGE}.kernels"
            if target[0] != PACKAGE or target == (PACKAGE, "__version__"):
                continue
            unit = target[1] if len(target) > 1 else "(the root)"
            if unit not in LEVEL_OF:
                yield f"{where}:{line}: {unit} has no level; import from the module that defines it"
            elif unit != name[1] and LEVEL_OF[unit] >= level:
                files = all((root / PACKAGE / f"{one}.py").is_file() for one in (unit, name[1]))
                if LEVEL_OF[unit] > level or not files:
                    yield f"{where}:{line}: {name[1]} (L{level}) imports {unit} (L{LEVEL_OF[unit]})"


def python_files(root: Path) -> Iterator[Path]:
    yield from root.glob("*.py")
    for folder in (PACKAGE, "kernels", "tests", "benchmarks"):
        yield from sorted((root / folder).rglob("*.py"))


def length(root: Path, long: Collection[str] = LONG) -> Iterator[str]:
    """A file is one idea; the exceptions are named, and named only while they are too long."""
    for path in python_files(root):
        where = path.relative_to(root).as_posix()
        lines = len(path.read_text("utf-8").splitlines())
        most = TEST_LINES if where.startswith("tests/") else LINES
        if lines > most and where not in long:
            yield f"{where}: {lines} lines, at most {most}"
        if lines <= most and where in long:
            yield f"{where}: {lines} lines, so it needs no exception"


def no_print(root: Path) -> Iterator[str]:
    """Only the surface prints; everything else logs."""
    for path, name in modules(root):
        if len(name) > 1 and name[1] in MAY_PRINT:
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Name) and node.id == "print":
                yield f"{path.relative_to(root).as_posix()}:{node.lineno}: print"


def no_packages(root: Path) -> Iterator[str]:
    """With an __init__.py kernels/ hides Hugging Face's package, and so does one under tests/."""
    for folder in ("kernels", "tests"):
        for path in (root / folder).rglob("__init__.py"):
            yield f"{path.relative_to(root).as_posix()}: no package may be here"


def names(root: Path) -> Iterator[str]:
    """No script finds a file of ours where it wants another package."""
    for folder in SCRIPT_FOLDERS:
        for path in sorted((root / folder).glob("*.py")):
            if path.stem in TAKEN:
                yield f"{path.relative_to(root).as_posix()}: {path.stem} is another package"
    for path, _ in modules(root):  # has a pydantic.py and a types.py, so nothing in it is a script
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            guard = isinstance(node, ast.Compare) and ast.unparse(node.left) == "__name__"
            if guard and path.name not in ("__main__.py", "cli.py"):  # which -m runs
                yield f"{path.relative_to(root).as_posix()}:{node.lineno}: may not be a script"


def kernel_places(root: Path) -> Iterator[str]:
    """A kernel has its wrapper, parity test, benchmark and row; the two folders share no name."""
    readme = root / "kernels" / "README.md"
    rows = readme.read_text("utf-8") if readme.is_file() else ""
    for path in sorted((root / "kernels").rglob("*")):
        where = path.relative_to(root).as_posix()
        if path.is_dir() or path.name in ("README.md", "__init__.py") or path.suffix == ".pyc":
            continue
        if path.parent != root / "kernels":
            yield f"{where}: kernels/ has no folders"
        elif path.suffix == ".cu" or path.name.endswith("_triton.py"):
            kernel = path.stem.removesuffix("_triton")
            for place in (
                f"{PACKAGE}/kernels/{kernel}.py",
                f"tests/parity/test_{kernel}.py",
                f"benchmarks/bench_{kernel}.py",
            ):
                if not (root / place).is_file():
                    yield f"{where}: {place} is missing"
            if f"| {kernel} |" not in rows.replace("`", ""):
                yield f"{where}: kernels/README.md has no row for it"
        elif path.suffix != ".cuh":
            yield f"{where}: kernels/ holds device code only"
        if path.suffix == ".py" and (root / PACKAGE / "kernels" / path.name).exists():
            yield f"{where}: {PACKAGE}/kernels/ has a file of that name"


RULES = [import_order, length, no_print, no_packages, names, kernel_places]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_this_checkout(rule: Callable[[Path], Iterator[str]]):
    found = list(rule(ROOT))
    assert not found, "\n".join(found)


def test_the_rules_see_the_package():
    seen = {name[1] for _, name in modules(ROOT) if len(name) > 1}
    assert {"errors", "device", "embeddings", "index", "ingest", "query", "table", "db"} <= seen
    edges = {
        (name[1], target[1])
        for path, name in modules(ROOT)
        for _, target in imports(path, name)
        if target[0] == PACKAGE and len(target) > 1 and len(name) > 1
    }
    assert {("db", "table"), ("ingest", "embeddings"), ("query", "index")} <= edges


def test_the_documentation_draws_the_same_levels():
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rows = re.findall(r"^L(\d+) +(.+)$", text, re.MULTILINE)
    assert [int(level) for level, _ in rows] == list(range(len(LEVELS)))
    assert [row.replace("*", "").split() for _, row in rows] == [list(units) for units in LEVELS]
    planned = {unit.rstrip("*") for _, row in rows for unit in row.split() if unit.endswith("*")}
    there = {name[1] for _, name in modules(ROOT) if len(name) > 1}
    assert planned == LEVEL_OF.keys() - there


WRONG = [
    # the last column is what the complaint has to say; None is for trees that are right
    (import_order, {"gpu_lance/device.py": "import gpu_lance.table"}, "device (L1) imports table"),
    (import_order, {"gpu_lance/index/flat.py": "from gpu_lance.embeddings import base"}, "index"),
    (import_order, {"gpu_lance/embeddings/a.py": "from gpu_lance.index import Flat"}, "embeddings"),
    (import_order, {"gpu_lance/index/flat.py": "from ..query import sql"}, "imports query (L6)"),
    (import_order, {"gpu_lance/index/flat.py": "from .. import table"}, "imports table (L7)"),
    (import_order, {"gpu_lance/query/__init__.py": "from ..table import Table"}, "imports table"),
    (import_order, {"gpu_lance/db.py": "def f():\n    from gpu_lance import cli"}, "db.py:2: db"),
    (
        import_order,
        {"gpu_lance/types.py": "if TYPE_CHECKING:\n    from gpu_lance.device import as_tensor"},
        "types (L0) imports device (L1)",
    ),
    (import_order, {"gpu_lance/db.py": "from gpu_lance import connect"}, "module that defines it"),
    (import_order, {"gpu_lance/db.py": "import gpu_lance"}, "(the root) has no level"),
    (import_order, {"gpu_lance/surprise.py": ""}, "surprise has no level"),
    (import_order, {"gpu_lance/index/flat.py": "import kernels"}, "Hugging Face's"),
    (import_order, {"kernels/a_triton.py": "from gpu_lance.index import flat"}, "imports index"),
    (
        import_order,
        {
            "gpu_lance/pydantic.py": "from gpu_lance.ingest import rows",
            "gpu_lance/ingest/rows.py": "",
        },
        "pydantic (L5) imports ingest (L5)",
    ),
    (
        import_order,
        {
            "gpu_lance/__init__.py": "from gpu_lance.db import connect",
            "gpu_lance/table.py": "from gpu_lance.merge import Merge\nimport numpy",
            "gpu_lance/merge.py": "from gpu_lance.table import Table",
            "gpu_lance/cli.py": "from gpu_lance import __version__, db",
            "gpu_lance/index/flat.py": "from .store import Store\nfrom gpu_lance import errors",
            "gpu_lance/index/store.py": "from ..types import Metric",
        },
        None,
    ),
    (length, {"gpu_lance/index/flat.py": "x = 1\n" * 501}, "501 lines"),
    (length, {"gpu_lance/index/flat.py": "x = 1\n" * 500}, None),
    (length, {"tests/test_a.py": "x = 1\n" * 651}, "651 lines"),
    (length, {"tests/test_a.py": "x = 1\n" * 650}, None),
    (partial(length, long={"gpu_lance/a.py"}), {"gpu_lance/a.py": "x = 1\n" * 501}, None),
    (partial(length, long={"gpu_lance/a.py"}), {"gpu_lance/a.py": ""}, "needs no exception"),
    (no_print, {"gpu_lance/index/flat.py": "def f():\n    print(1)"}, "flat.py:2: print"),
    (no_print, {"gpu_lance/index/flat.py": "f = print"}, "flat.py:1: print"),
    (no_print, {"gpu_lance/cli.py": "print(1)", "gpu_lance/db.py": '"""print(1)"""'}, None),
    (no_packages, {"kernels/__init__.py": ""}, "kernels/__init__.py"),
    (no_packages, {"tests/parity/__init__.py": ""}, "tests/parity/__init__.py"),
    (names, {"benchmarks/faiss.py": ""}, "faiss is another package"),
    (names, {"tests/types.py": ""}, "types is another package"),
    (names, {"gpu_lance/db.py": "if __name__ == '__main__':\n    pass"}, "may not be a script"),
    (names, {"gpu_lance/pydantic.py": "", "gpu_lance/__main__.py": "__name__ == 'a'"}, None),
    (kernel_places, {"kernels/maxsim.cu": ""}, "tests/parity/test_maxsim.py is missing"),
    (kernel_places, {"kernels/maxsim.cu": ""}, "README.md has no row"),
    (kernel_places, {"kernels/helper.py": ""}, "device code only"),
    (kernel_places, {"kernels/sub/maxsim.cu": ""}, "has no folders"),
    (
        kernel_places,
        {"kernels/a_triton.py": "", "gpu_lance/kernels/a_triton.py": ""},
        "has a file of that name",
    ),
    (
        kernel_places,
        {
            "kernels/README.md": "| `a` | topk | Triton | opt-in |",
            "kernels/a_triton.py": "",
            "gpu_lance/kernels/a.py": "",
            "tests/parity/test_a.py": "",
            "benchmarks/bench_a.py": "",
        },
        None,
    ),
]


@pytest.mark.parametrize(("rule", "files", "complaint"), WRONG)
def test_a_rule_finds_what_is_wrong(
    tmp_path: Path,
    rule: Callable[[Path], Iterator[str]],
    files: dict[str, str],
    complaint: str | None,
):
    for where, text in files.items():
        path = tmp_path / where
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    found = list(rule(tmp_path))
    if complaint is None:
        assert found == []
    else:
        assert any(complaint in one for one in found), found
