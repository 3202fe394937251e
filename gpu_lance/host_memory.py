"""How much memory this process may take on the host: the machine's, and what its limits leave.

Inside a container /proc/meminfo tells of the whole machine; the process is killed at the limit of
its cgroup, or of any cgroup above.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

_UNLIMITED = 1 << 62  # cgroup v1 has no "max": no limit is the largest number of whole pages
_GUESS = 4 << 30  # neither Linux nor POSIX: a modest one


class _Files(NamedTuple):
    """Where a version of cgroups keeps its figures, each for a cgroup and all below it."""

    mount: str
    limit: str
    used: str
    reclaimable: bytes  # in memory.stat: cached pages of files, dropped before anyone is killed


_V1 = _Files(
    "sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    b"total_inactive_file ",
)
_V2 = _Files("sys/fs/cgroup", "memory.max", "memory.current", b"inactive_file ")


def available(root: str = "/") -> int:
    """Bytes of memory that this process can still take.

    The least of what the system calls available (or, where it does not tell, half of the machine's
    memory) and of what is left below the limit of each cgroup from the process's own up to the
    root, and below its RLIMIT_AS. A file that is missing or makes no sense sets no limit.

    Parameters
    ----------
    root : str
        The folder in which ``proc`` and ``sys`` are.

    Examples
    --------
    >>> 0 <= available() <= total()
    True
    """
    kilobytes = _field(_read(os.path.join(root, "proc/meminfo")), b"MemAvailable:")
    if kilobytes is not None:
        left = kilobytes * 1024
    elif machine := _physical():
        left = machine // 2
    else:
        left = _GUESS
    for limit, folder, files in _cgroup_limits(root):
        used = _number(_read(f"{folder}/{files.used}")) or 0
        left = min(left, limit)
        if limit - used < left:  # otherwise memory.stat, which is slow to read, changes nothing
            used -= _field(_read(f"{folder}/memory.stat"), files.reclaimable) or 0
            left = min(left, limit - used)
    address_space = _address_space()
    if address_space is not None:
        pages = _number(_read(os.path.join(root, "proc/self/statm")).partition(b" ")[0]) or 0
        left = min(left, address_space - pages * os.sysconf("SC_PAGE_SIZE"))
    return max(left, 0)


def total(root: str = "/") -> int:
    """Bytes of memory that this process could have: the machine's, or its least limit.

    Parameters
    ----------
    root : str
        The folder in which ``proc`` and ``sys`` are.

    Examples
    --------
    >>> total() > 0
    True
    """
    kilobytes = _field(_read(os.path.join(root, "proc/meminfo")), b"MemTotal:")
    machine = (_physical() or _GUESS) if kilobytes is None else kilobytes * 1024
    limits = [limit for limit, _, _ in _cgroup_limits(root)]
    address_space = _address_space()
    return min(machine, *limits, machine if address_space is None else address_space)


def _cgroup_limits(root: str) -> Iterator[tuple[int, str, _Files]]:
    """Each limit in bytes that there is, and the folder and file names of its cgroup."""
    for line in _read(os.path.join(root, "proc/self/cgroup")).split(b"\n"):
        number, _, rest = line.partition(b":")
        controllers, _, path = rest.partition(b":")
        if number == b"0" and not controllers:
            files = _V2
        elif b"memory" in controllers.split(b","):
            files = _V1
        else:
            continue
        names = [name for name in os.fsdecode(path).split("/") if name]
        if ".." in names:  # above the root of the process's namespace, where nothing can be read
            names = []
        # without a namespace the path may be the machine's, of which a container has only the end,
        # as the root of its mount: what is missing sets no limit, and the root is always read
        mount = os.path.join(root, files.mount)
        for depth in range(len(names), -1, -1):
            folder = "/".join((mount, *names[:depth]))
            limit = _number(_read(f"{folder}/{files.limit}"))
            if limit is not None and limit < _UNLIMITED:
                yield limit, folder, files


def _address_space() -> int | None:
    """RLIMIT_AS in bytes, if it is set."""
    if sys.platform == "win32":
        return None
    import resource

    if not hasattr(resource, "RLIMIT_AS"):
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return limit if 0 <= limit < _UNLIMITED else None


def _physical() -> int | None:
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _read(path: str) -> bytes:
    """What a file holds; nothing if it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except (OSError, ValueError):  # ValueError: a zero byte in the path
        return b""


def _field(text: bytes, name: bytes) -> int | None:
    """The number after `name`, which starts a line."""
    _, _, rest = (b"\n" + text).partition(b"\n" + name)
    words = rest.partition(b"\n")[0].split()
    return _number(words[0]) if words else None


def _number(text: bytes) -> int | None:
    text = text.strip()
    return int(text) if text.isdigit() and len(text) <= 20 else None
