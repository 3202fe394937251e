"""Device code is reached as gpu_lance.kernels.<name>, and never hides Hugging Face's kernels."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import gpu_lance.kernels
from gpu_lance.kernels import checkout_folder

ROOT = Path(__file__).resolve().parent.parent
PROBE = 'NAME = "device code of ours"\n'

# what an installed or checked-out gpu_lance says of itself, run in its own interpreter
REPORT = """
import importlib, json
import gpu_lance.kernels
found = {"path": list(gpu_lance.kernels.__path__)}
for name in ("gpu_lance.kernels.probe_triton", "kernels"):
    try:
        found[name] = importlib.import_module(name).NAME
    except (ImportError, AttributeError) as error:
        found[name] = type(error).__name__
print(json.dumps(found))
"""


def report(folder: Path) -> dict[str, object]:
    """What `gpu_lance` in `folder` finds; nothing else of the project is on the path."""
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n" + REPORT
    # -S: an editable installation must not bring this checkout in
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
        timeout=60,
    )
    found = json.loads(done.stdout)
    assert all(Path(one).is_relative_to(folder) for one in found["path"])
    return found


def copy_of_the_project(folder: Path) -> Path:
    """A checkout with one piece of device code more."""
    clean = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("gpu_lance", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=clean)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "kernels" / "probe_triton.py").write_text(PROBE)
    (folder / "kernels" / "probe.cu").write_text("// none\n")
    return folder


def hugging_face(folder: Path) -> None:
    """Another package named `kernels`, as Hugging Face's stands in site-packages."""
    (folder / "kernels").mkdir(exist_ok=True)
    (folder / "kernels" / "__init__.py").write_text('NAME = "theirs"\n')
    (folder / "kernels" / "probe_triton.py").write_text('NAME = "theirs, by accident"\n')


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    source = copy_of_the_project(tmp_path_factory.mktemp("source"))
    out = tmp_path_factory.mktemp("wheel")
    code = f"from hatchling.build import build_wheel; build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=source, timeout=120)
    (built,) = out.glob("*.whl")
    return built


def test_this_checkout_finds_its_device_code():
    assert str(ROOT / "kernels") in gpu_lance.kernels.__path__
    assert checkout_folder(ROOT / "gpu_lance") == ROOT / "kernels"


def test_a_checkout_imports_its_device_code(tmp_path: Path):
    found = report(copy_of_the_project(tmp_path))
    assert found["path"] == [str(tmp_path / "gpu_lance" / "kernels"), str(tmp_path / "kernels")]
    assert found["gpu_lance.kernels.probe_triton"] == "device code of ours"


@pytest.mark.parametrize(
    "project",
    [None, '[project]\nname = "another"\n', '[tool.x]\nrename = "gpu-lance"\n'],
    ids=["no pyproject.toml", "another project's", "a mention of ours"],
)
def test_beside_an_installed_package_it_is_somebody_elses(tmp_path: Path, project: str | None):
    shutil.copytree(ROOT / "gpu_lance", tmp_path / "gpu_lance")
    hugging_face(tmp_path)
    if project is not None:
        (tmp_path / "pyproject.toml").write_text(project)
    found = report(tmp_path)
    assert found["path"] == [str(tmp_path / "gpu_lance" / "kernels")]
    assert found["gpu_lance.kernels.probe_triton"] == "ModuleNotFoundError"
    assert found["kernels"] == "theirs"


def test_a_checkout_without_device_code_has_one_folder(tmp_path: Path):
    shutil.rmtree(copy_of_the_project(tmp_path) / "kernels")
    assert report(tmp_path)["path"] == [str(tmp_path / "gpu_lance" / "kernels")]


def test_a_wheel_carries_the_device_code_inside_the_package(wheel: Path):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    assert {
        "gpu_lance/kernels/__init__.py",
        "gpu_lance/kernels/probe.cu",
        "gpu_lance/kernels/probe_triton.py",
        "gpu_lance/py.typed",
    } <= names
    (info,) = {name.partition("/")[0] for name in names} - {"gpu_lance"}
    assert info.endswith(".dist-info")
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "gpu_lance").rglob("*.py")}
    assert sources <= names


def test_an_installed_wheel_leaves_hugging_faces_alone(wheel: Path, tmp_path: Path):
    hugging_face(tmp_path)
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path)
    found = report(tmp_path)
    assert found == {
        "path": [str(tmp_path / "gpu_lance" / "kernels")],
        "gpu_lance.kernels.probe_triton": "device code of ours",
        "kernels": "theirs",
    }


def test_the_command_and_the_providers_are_in_the_wheel(wheel: Path):
    with zipfile.ZipFile(wheel) as file:
        (entry,) = [name for name in file.namelist() if name.endswith("entry_points.txt")]
        text = file.read(entry).decode()
    assert "gpu-lance = gpu_lance.cli:app" in text
    assert "[gpu_lance.embeddings]" in text
