"""What the host's memory and the limits of cgroups and the process leave, over small trees."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gpu_lance.host_memory import available, total

MB = 1 << 20
ROOT = Path(__file__).resolve().parent.parent
NO_LIMIT = 9223372036854771712  # what cgroup v1 shows

V1 = ("memory/", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("", "memory.max", "memory.current", "inactive_file")
LINE = {V1: "4:cpu,memory:{}\n0::/elsewhere\n", V2: "0::{}\n"}
both = pytest.mark.parametrize("version", [V1, V2], ids=["v1", "v2"])


class Tree:
    """A machine with 8000 MB, of which 6000 are available."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.write("proc/meminfo", f"MemTotal: {8000 << 10} kB\nMemAvailable: {6000 << 10} kB\n")

    def write(self, path: str, text: Any) -> None:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def own(self, version: Any, path: str) -> None:
        self.write(
            "proc/self/cgroup", "9:name=systemd:/x\n3:cpuset:/\n" + LINE[version].format(path)
        )

    def group(self, version: Any, path: str, limit: Any, used: Any, inactive: Any = None) -> None:
        """A cgroup's files, where None leaves one out; numbers are in MB."""
        mount, limit_name, used_name, field = version
        where = f"sys/fs/cgroup/{mount}{path.lstrip('/')}"
        for name, value in ((limit_name, limit), (used_name, used)):
            if value is not None:
                self.write(f"{where}/{name}", value * MB if isinstance(value, int) else value)
        if inactive is not None:
            value = inactive * MB if isinstance(inactive, int) else inactive
            # names that end like it, and the other version's, mean other things
            lines = ("anon 5", f"not_{field} 9", f"{field}s 9", f"{field} {value}", "x_file 7")
            self.write(f"{where}/memory.stat", "\n".join(lines))

    def mb(self) -> tuple[int, int]:
        """What is available, and the total, in MB."""
        found = available(str(self.folder)), total(str(self.folder))
        assert [size % MB for size in found] == [0, 0]
        return found[0] // MB, found[1] // MB


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_without_cgroups_it_is_the_machines(tree: Tree):
    assert tree.mb() == (6000, 8000)


@both
def test_one_limit(tree: Tree, version: Any):
    tree.own(version, "/a/b")
    tree.group(version, "/a/b", 1000, 700, 200)
    assert tree.mb() == (500, 1000)
    tree.group(version, "/a/b", 1000, 900, 0)
    assert tree.mb() == (100, 1000)
    tree.group(version, "/a/c", 10, 10, 0)  # another's
    assert tree.mb() == (100, 1000)


@both
def test_a_limit_beyond_the_machine(tree: Tree, version: Any):
    tree.own(version, "/a")
    tree.group(version, "/a", 9000, 100, 50)
    assert tree.mb() == (6000, 8000)
    tree.group(version, "/a", 7000, 900, 300)  # 6100 without the cached files
    assert tree.mb() == (6000, 7000)
    tree.group(version, "/a", 7000, 1500, 300)
    assert tree.mb() == (5800, 7000)


@both
@pytest.mark.parametrize(
    ("limits", "wanted"),
    [
        # limit, used and cached of the root, of /pod and of /pod/box
        (((NO_LIMIT, 5, 0), (3000, 1000, 0), (1000, 400, 100)), (700, 1000)),
        (((NO_LIMIT, 5, 0), (3000, 2900, 50), (1000, 400, 100)), (150, 1000)),
        (((NO_LIMIT, 5, 0), (500, 450, 50), (1000, 400, 100)), (100, 500)),
        (((200, 150, 0), (500, 450, 50), (1000, 400, 100)), (50, 200)),
        (((NO_LIMIT, 5, 0), (500, 450, 50), (NO_LIMIT, 400, 100)), (100, 500)),
        (((NO_LIMIT, 5, 0), (None, None, None), (1000, 400, 100)), (700, 1000)),
        (((NO_LIMIT, 5, 0), (NO_LIMIT, 5, 0), (NO_LIMIT, 5, 0)), (6000, 8000)),
    ],
)
def test_the_least_of_nested_limits(tree: Tree, version: Any, limits: Any, wanted: Any):
    tree.own(version, "/pod/box")
    for path, (limit, used, inactive) in zip(("/", "/pod", "/pod/box"), limits, strict=True):
        none = "max" if version is V2 else str(NO_LIMIT)
        tree.group(version, path, none if limit == NO_LIMIT else limit, used, inactive)
    assert tree.mb() == wanted


@both
@pytest.mark.parametrize(
    "path", ["/kubepods/pod1/box", "/../box", "/", "", "/box (deleted)", "/\0"]
)
def test_a_path_that_is_not_below_the_mount(tree: Tree, version: Any, path: str):
    tree.own(version, path)
    tree.group(version, "/", 1000, 600, 100)
    tree.group(version, "../box", 1, 1, 0)  # beside the mount
    assert tree.mb() == (500, 1000)


def test_both_versions_at_once(tree: Tree):
    tree.own(V1, "/a")
    tree.group(V1, "/a", 2000, 500, 0)
    tree.group(V2, "/elsewhere", 1000, 100, 0)
    assert tree.mb() == (900, 1000)


def test_a_path_with_colons_and_odd_bytes(tree: Tree):
    (tree.folder / "proc/self").mkdir()
    (tree.folder / "proc/self/cgroup").write_bytes(b"0::/a:b/\xff c\n")
    folder = os.fsencode(tree.folder) + b"/sys/fs/cgroup/a:b/\xff c"
    try:
        os.makedirs(folder)
    except OSError:
        pytest.skip("this file system wants UTF-8")
    for name, value in ((b"memory.max", 1000), (b"memory.current", 600)):
        with open(folder + b"/" + name, "w") as file:
            file.write(str(value * MB))
    assert tree.mb() == (400, 1000)


@both
@pytest.mark.parametrize("odd", ["", "max", "-1", "1e9", "nan", "12 MB", "²", "9" * 5000, None])
def test_a_limit_that_makes_no_sense_is_none(tree: Tree, version: Any, odd: Any):
    tree.own(version, "/a")
    tree.group(version, "/a", odd, 100, 50)
    assert tree.mb() == (6000, 8000)
    tree.group(version, "/", 500, 100, 50)
    assert tree.mb() == (450, 500)


@both
@pytest.mark.parametrize("odd", ["", "max", "-1", "1e9", "9" * 5000, None])
def test_a_limit_holds_where_its_use_is_not_told(tree: Tree, version: Any, odd: Any):
    tree.own(version, "/a")
    tree.group(version, "/a", 1000, 800, odd)
    assert tree.mb() == (200, 1000)
    tree.group(version, "/b", 1000, odd, 100)
    tree.own(version, "/b")
    assert tree.mb() == (1000, 1000)


@both
def test_figures_that_contradict_each_other(tree: Tree, version: Any):
    tree.own(version, "/a")
    tree.group(version, "/a", 1000, 1500, 100)  # the limit was lowered
    assert tree.mb() == (0, 1000)
    tree.group(version, "/a", 1000, 100, 300)  # read at another moment
    assert tree.mb() == (1000, 1000)
    tree.group(version, "/a", 0, 0, 0)
    assert tree.mb() == (0, 0)


@both
def test_folders_where_files_should_be(tree: Tree, version: Any):
    tree.own(version, "/a")
    for name in version[1:3]:
        (tree.folder / "sys/fs/cgroup" / version[0] / "a" / name).mkdir(parents=True)
    assert tree.mb() == (6000, 8000)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n\n",
        ":",
        "0",
        "0:",
        "0::",
        "::::",
        "x:y:z",
        "1:memory",
        "\0",
        "1:memoryx:/a",
        "0:cpu:/a",
    ],
)
def test_a_list_of_cgroups_that_makes_no_sense(tree: Tree, text: str):
    tree.write("proc/self/cgroup", text)
    tree.group(V1, "/a", 1, 1, 0)
    tree.group(V2, "/a", 1, 1, 0)
    assert tree.mb() == (6000, 8000)


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="this system tells no size")
@pytest.mark.parametrize("text", [None, "", "MemAvailable:", "MemAvailable: x kB\nMemTotal: -1"])
def test_without_meminfo_it_is_half_the_machines(tree: Tree, text: str | None):
    (tree.folder / "proc/meminfo").unlink()
    if text is not None:
        tree.write("proc/meminfo", text)
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    where = str(tree.folder)
    assert (available(where), total(where)) == (machine // 2, machine)
    tree.own(V2, "/a")
    tree.group(V2, "/a", 10, 4, 1)
    assert tree.mb() == (7, 10)


def test_a_system_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(os, "sysconf", raising=False)
    assert (available(str(tmp_path)), total(str(tmp_path))) == (4 << 30, 4 << 30)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_limited_address_space():
    code = """
import resource
from gpu_lance.host_memory import available, total
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
first = available()
block = bytearray(200 << 20)
print(first, available(), total())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
    )
    first, later, most = map(int, done.stdout.split())
    assert most <= 1 << 30
    assert 200 * MB < first < 1 << 30
    assert later <= first - 199 * MB


def test_here():
    assert 0 < available() <= total()
    took = []
    for _ in range(200):
        start = time.perf_counter()
        available()
        took.append(time.perf_counter() - start)
    assert statistics.median(took) < 1e-3  # 0.1 ms, and room for a busy machine
