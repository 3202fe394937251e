"""environment.yml asks for what pyproject.toml asks for, with the same floors."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text("utf-8")
ENVIRONMENT = (ROOT / "environment.yml").read_text("utf-8")

# the extras that the environment stands for; cpu is there for the packages that all three have
EXTRAS = ("cpu", "cuda12", "cuda13", "demo", "media", "test")
# conda-forge's name, by the name on the Python package index
CONDA = {"torch": "pytorch-gpu", "cupy-cuda12x": "cupy", "cupy-cuda13x": "cupy"}
# faiss-gpu and pytorch-gpu stand in for them
LEFT_OUT = {"faiss-cpu", "faiss-gpu-cuvs", "triton"}


def bound(requirement: Requirement) -> Version | str:
    """The lowest version that is allowed, or the whole of a specifier that names none."""
    floors = [Version(one.version) for one in requirement.specifier if one.operator == ">="]
    return max(floors) if floors else str(requirement.specifier)


def wanted(project: str) -> dict[str, Version | str]:
    """Bounds by conda's name: of several extras' floors the lowest."""
    table = tomllib.loads(project)["project"]
    lines = [*table["dependencies"]]
    for extra in EXTRAS:
        lines += table["optional-dependencies"][extra]
    found: dict[str, list[Version | str]] = {}
    for requirement in map(Requirement, lines):
        name = canonicalize_name(requirement.name)
        if name not in LEFT_OUT:
            found.setdefault(CONDA.get(name, name), []).append(bound(requirement))
    python = table["requires-python"].removeprefix(">=")
    return {"python": Version(python)} | {name: min(bounds) for name, bounds in found.items()}


def listed(environment: str) -> dict[str, Version | str]:
    lines = yaml.safe_load(environment)["dependencies"]
    (pip,) = [line["pip"] for line in lines if isinstance(line, dict)]
    packages = [line for line in lines if isinstance(line, str) and line != "pip"]
    packages += [line for line in pip if not line.startswith("--editable")]
    requirements = [Requirement(line) for line in packages]
    names = [canonicalize_name(one.name) for one in requirements]
    assert len(names) == len(set(names)), "a package is listed twice"
    return dict(zip(names, map(bound, requirements), strict=True))


def differences(project: str, environment: str) -> list[str]:
    left, right = wanted(project), listed(environment)
    return sorted(
        f"{name}: pyproject.toml says {left.get(name)}, environment.yml says {right.get(name)}"
        for name in left.keys() | right.keys()
        if left.get(name) != right.get(name)
    )


def test_the_environment_asks_for_the_same():
    assert differences(PROJECT, ENVIRONMENT) == []


def test_it_comes_from_conda_forge_alone_and_installs_this_checkout():
    parsed = yaml.safe_load(ENVIRONMENT)
    assert parsed["channels"] == ["conda-forge", "nodefaults"]
    assert {"pip": list} == {
        key: type(value)
        for line in parsed["dependencies"]
        if isinstance(line, dict)
        for key, value in line.items()
    }
    assert "--editable ." in parsed["dependencies"][-1]["pip"]


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (r"python>=3\.11", "python>=3.12", "python: pyproject.toml says 3.11, "),
        (r"pyarrow>=20", "pyarrow>=19", "pyarrow: pyproject.toml says 20, "),
        (r"pytorch-gpu>=2\.10", "pytorch-gpu>=2.11", "pytorch-gpu: pyproject.toml says 2.10, "),
        (r"cupy>=14", "cupy", "cupy: pyproject.toml says 14, environment.yml says "),
        (r"lancedb==0\.40\.\*", "lancedb==0.41.*", "lancedb: pyproject.toml says ==0.40.*, "),
        (r" *- pytest>=9\.0\n", "", "pytest: pyproject.toml says 9.0, environment.yml says None"),
        (r"- pip\n", "- pip\n  - scipy>=1\n", "scipy: pyproject.toml says None, "),
    ],
)
def test_a_difference_is_seen(old: str, new: str, complaint: str):
    changed, count = re.subn(old, new, ENVIRONMENT)
    assert count == 1
    (found,) = differences(PROJECT, changed)
    assert found.startswith(complaint)


def test_a_floor_raised_in_the_project_is_seen():
    changed = PROJECT.replace('"transformers>=5.10"', '"transformers>=6.0"')
    (found,) = differences(changed, ENVIRONMENT)
    assert found == "transformers: pyproject.toml says 6.0, environment.yml says 5.10"
