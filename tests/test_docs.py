"""The code of docs/ is run in order, a page in an empty folder, and prints what the page says."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gpu_lance.embeddings import TextEmbeddingFunction, get_registry

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("providers.md", "compatibility.md")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """Fenced text of a page: its language, its lines, and where they begin."""

    language: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert text.count("\n```") % 2 == 0, f"a fence of {page} is not closed"
    return [
        Block(match[1], match[2], text.count("\n", 0, match.start(2)))
        for match in FENCE.finditer(text)
    ]


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # a package that is installed here may announce a name that the page gives a class of its own
    monkeypatch.setattr(get_registry(), "_entry_points", {})
    space: dict[str, Any] = {"__name__": f"docs_{Path(page).stem}"}
    found = blocks(page)
    assert any(block.language == "python" for block in found)
    for block, after in zip(found, [*found[1:], None], strict=True):
        if block.language != "python":
            continue
        # blank lines before it, so that a traceback names the line of the page
        code = compile("\n" * block.line + block.text, str(DOCS / page), "exec", dont_inherit=True)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code, space)
        wanted = after.text if after is not None and after.language == "text" else ""
        assert out.getvalue() == wanted, f"{page}, the code from line {block.line + 1}"


def test_an_own_provider_is_short() -> None:
    classes = re.compile(r"^@register.*?(?=^\S(?!lass )|\Z)", re.M | re.S)
    found = [found for b in blocks("providers.md") for found in classes.findall(b.text)]
    assert len(found) == 4
    assert all(len(text.strip().splitlines()) < 25 for text in found)


@pytest.mark.parametrize("installed", [(), ("other_package",)], ids=["alone", "beside another"])
def test_the_entry_point_of_the_page(
    installed: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package that is installed with those lines is found by name, and imported only then."""
    (block,) = (block for block in blocks("providers.md") if block.language == "toml")
    ((group, points),) = tomllib.loads(block.text)["project"]["entry-points"].items()
    ((name, target),) = points.items()
    module, _, attribute = target.partition(":")
    file = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
    file.parent.mkdir(parents=True)
    file.write_text(
        "from gpu_lance.embeddings import TextEmbeddingFunction\n"
        f"class {attribute}(TextEmbeddingFunction):\n"
        "    def ndims(self):\n        return 1\n"
        "    def generate_embeddings(self, texts):\n        return [[len(t)] for t in texts]\n"
    )
    for package in (*installed, "my_package"):
        folder = tmp_path if package == "my_package" else tmp_path / package
        metadata = folder / f"{package}-1.0.dist-info"
        metadata.mkdir(parents=True)
        text = f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
        (metadata / "METADATA").write_text(text)
        announced = target if package == "my_package" else f"{package}:Other"
        (metadata / "entry_points.txt").write_text(f"[{group}]\n{name} = {announced}\n")
        monkeypatch.syspath_prepend(folder)
    registry = get_registry()
    monkeypatch.setattr(registry, "_entry_points", None)
    monkeypatch.setattr(registry, "_functions", {})
    assert name in registry.names()
    assert module not in sys.modules
    try:
        cls = registry.get(name)
        assert issubclass(cls, TextEmbeddingFunction)
        assert cls.create().generate_embeddings(["four"]) == [[4]]
    finally:
        for part in (module, module.split(".")[0]):
            sys.modules.pop(part, None)
