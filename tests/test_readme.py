"""What the README says is so: its Python runs, its commands, links and providers exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from gpu_lance import cli
from gpu_lance.embeddings import get_registry
from gpu_lance.embeddings.registry import BUILT_IN, NOT_YET
from gpu_lance.errors import UnknownProviderError

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(get_command(cli.app).commands)  # type: ignore[attr-defined]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_python_runs_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = blocks("python")
    assert len(code) >= 5
    names: dict[str, object] = {"__name__": "readme"}
    for number, block in enumerate(code):
        exec(compile(block, f"README.md, block {number}", "exec", dont_inherit=True), names)
    assert (tmp_path / "my_db" / "notes.lance").is_dir()
    printed = capsys.readouterr().out.splitlines()
    assert {line.split(" ", 1)[1] for line in printed[:2]} == {
        "The lighthouse keeper counts passing ships.",
        "A vessel sailed by at dawn.",
    }
    assert any("Engine: " in line for line in printed)
    assert printed[-1].startswith("cpu ")


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_is_in_the_readme_and_has_help(command: str) -> None:
    assert f"| `gpu-lance {command}" in section("Command line")
    result = CliRunner().invoke(cli.app, [command, "--help"])
    assert result.exit_code == 0
    described = result.stdout.split("\n\n")[1].strip()
    assert described.endswith(".")
    for option in re.findall(r"^  (?:-\w, )?(--[\w-]+)(.*)", result.stdout, re.MULTILINE):
        assert option[1].strip() or option[0] == "--distance-type"


def test_the_commands_and_options_that_it_shows_exist() -> None:
    shown = re.findall(r"\bgpu-lance (\w+)", section("Command line"))
    assert set(shown) == set(COMMANDS)
    known: set[str] = set()
    for command in [[], *([name] for name in COMMANDS)]:
        known |= set(
            re.findall(r"--[\w-]+", CliRunner().invoke(cli.app, [*command, "--help"]).stdout)
        )
    assert set(re.findall(r"--[a-z][\w-]+", section("Command line"))) <= known


def test_the_providers_that_it_names() -> None:
    text = section("Embedding functions")
    table, rest = text.split("Not there yet: ")
    assert set(re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE)) == set(BUILT_IN)
    missing = set(re.findall(r"`([\w-]+)`", rest.split("`get_registry")[0]))
    assert missing == NOT_YET
    for name in missing:
        with pytest.raises(UnknownProviderError, match="not available here yet"):
            get_registry().get(name)


def test_every_link_to_a_file_leads_somewhere() -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert "docs/architecture.md" in links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"\bmake (demo|test|\w+)(?= |$|\n)", "\n".join(blocks(""))))
    assert {"demo", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_it_has_no_line_over_100_characters_outside_tables() -> None:
    long = [line for line in README.splitlines() if len(line) > 100 and not line.startswith("|")]
    assert long == []
