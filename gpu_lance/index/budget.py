"""The memory of a device that resident columns may take, counted before it is taken.

Two things bound it: a limit, if there is one, on what columns hold, and always what is free on the
device. Where a column does not fit beside the others, those that were used least recently are
dropped.

Locks: one lock guards all counts and is held for a moment only, never while a column is asked to
go. A column calls in here while it holds a lock of its own; asked to go, it must not wait for that
lock, and refuses where somebody has it. So no two threads can wait for each other.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from gpu_lance.device import free_memory, resolve_device, total_memory
from gpu_lance.errors import BadInputError
from gpu_lance.index.faiss_binding import HANDLE_BYTES, TEMPORARY_BYTES
from gpu_lance.index.sizes import parse_bytes, show_bytes

if TYPE_CHECKING:
    import torch

VARIABLE = "GPU_LANCE_MEMORY_BUDGET"
SCRATCH = {"cuda": (256 << 20) + TEMPORARY_BYTES + HANDLE_BYTES}  # what a search takes for itself
OTHER_SCRATCH = 128 << 20


class Owner(Protocol):
    """What memory is counted for: a column. It is known by identity and held weakly."""

    def evict(self) -> bool:
        """Free everything, release it and say True; say False at once where it is in use.

        It is called in another column's thread, which may hold that column's lock, so it waits for
        no lock but the budget's own. What was freed is to be released under the column's lock.
        """


@dataclass(eq=False)
class _Entry:
    """What one owner holds in one budget, in bytes."""

    owner: Callable[[], Any]  # a weak reference
    held: int = 0
    promised: int = 0  # of `held`, what is not taken from the device yet
    used: int = 0  # when, by the clock below
    changes: int = 0

    @property
    def gain(self) -> int:
        """How many bytes more could be taken of the device without it."""
        return _less_headroom(self.held - self.promised) + self.promised


_NOTHING = _Entry(lambda: None)
_clock = itertools.count(1)
# re-entrant: a column may be collected, and release what it held, while this thread counts
_lock = threading.RLock()
_budgets: weakref.WeakSet[Budget] = weakref.WeakSet()


class Budget:
    """Bytes for resident columns on one device.

    A column reserves before it takes, says when it has taken (:meth:`settle`), and releases. What
    is reserved and not taken yet counts against the free memory too, across all budgets of the
    device, so that two columns never count on the same bytes.

    Parameters
    ----------
    device : str or torch.device
        Resolved when memory is first asked for, so that a connection does not wait for torch.
    limit : int or str, optional
        The most bytes that columns may hold, as :func:`parse_bytes` reads it; a percentage is of
        the device's memory. None for no limit but what is free.

    Raises
    ------
    BadInputError
        If the limit is no size.

    Examples
    --------
    >>> class Column:
    ...     def evict(self):
    ...         return True
    >>> budget, first, second = Budget("cpu", "1 MB"), Column(), Column()
    >>> budget.reserve(first, 600_000), budget.reserve(second, 600_000)  # the first had to go
    (True, True)
    >>> budget.held, budget.reserve(second, 600_000)
    (600000, False)
    """

    _shared: ClassVar[dict[str, Budget]] = {}

    def __init__(self, device: str | torch.device = "auto", limit: int | str | None = None) -> None:
        self._wanted = device
        self._wanted_limit = limit
        self._name = "memory_budget"
        if limit is not None:
            parse_bytes(limit, lambda: 0)
        self._entries: dict[int, _Entry] = {}
        self._host: Budget | None = None
        with _lock:
            _budgets.add(self)

    @classmethod
    def of(cls, device: str | torch.device) -> Budget:
        """The budget that everything on a device shares unless a connection has its own.

        Its limit is that of the environment variable GPU_LANCE_MEMORY_BUDGET when it is first
        asked for, None if that is not set.

        Raises
        ------
        BadInputError
            If the variable is no size.

        Examples
        --------
        >>> Budget.of("cpu") is Budget.of("cpu")
        True
        """
        resolved = resolve_device(device)
        with _lock:
            found = cls._shared.get(str(resolved))
            if found is None:
                text = os.environ.get(VARIABLE, "").strip() or None
                if text is not None:
                    parse_bytes(text, lambda: 0, VARIABLE)
                found = cls._shared[str(resolved)] = cls(resolved, text)
                found._name = VARIABLE
            return found

    @cached_property
    def device(self) -> torch.device:
        """Where the memory is; DeviceError if it is not there."""
        return resolve_device(self._wanted)

    @cached_property
    def limit(self) -> int | None:
        """The most bytes that columns may hold; None for no limit."""
        if self._wanted_limit is None:
            return None
        return parse_bytes(self._wanted_limit, lambda: total_memory(self.device), self._name)

    @property
    def host(self) -> Budget | None:
        """For a GPU, the count of what its columns hold in the host's memory: it has no limit.

        None for another device. :meth:`release`, :meth:`settle` and :meth:`touch` pass on to it.
        """
        if self.device.type != "cuda":
            return None
        with _lock:
            if self._host is None:
                self._host = Budget("cpu")
            return self._host

    # ---------------------------------------------------------------- asking

    def reserve(self, owner: Owner, nbytes: int, *, evict: bool = True) -> bool:
        """Make sure that `nbytes` more fit for `owner`, and count them.

        The least recently used others of this budget are evicted if that makes the room, and only
        as many as it takes.

        Parameters
        ----------
        owner : object with ``evict()``
        nbytes : int
            Beside what it holds already.
        evict : bool, default True
            False takes only what is left beside the others.

        Returns
        -------
        bool
            False if the room cannot be had; then nothing is counted.
        """
        return self.refusal(owner, nbytes, evict=evict) is None

    def refusal(
        self, owner: Owner, nbytes: int, *, instead: bool = False, evict: bool = True
    ) -> str | None:
        """:meth:`reserve`, which says why not.

        Parameters
        ----------
        owner : object with ``evict()``
        nbytes : int
        instead : bool
            `nbytes` in all: the owner gives up what it holds, before it takes them.
        evict : bool, default True
            As in :meth:`reserve`.

        Returns
        -------
        str or None
            None if they are reserved; else half a sentence, such as "0.50 GiB of the memory budget
            are left".
        """
        if nbytes < 0:
            raise BadInputError(f"A reservation is of 0 bytes or more, got {nbytes}.")
        limit, device = self.limit, self.device  # may import torch, so not under the lock
        tried: set[_Entry] = set()
        while True:
            with _lock:
                mine = self._entry(owner)
                given = mine if instead else _NOTHING
                left = math.inf if limit is None else limit - self.held + given.held
                free = _usable(device) + given.gain
                if nbytes == 0 or (nbytes <= left and nbytes <= free):
                    before = _NOTHING if instead else mine
                    _count(mine, before.held + nbytes, before.promised + nbytes)
                    mine.used = next(_clock)
                    return None
                known = self._living() if evict else ()
                others = sorted(
                    (e for e in known if e.held and e is not mine and e not in tried),
                    key=lambda entry: entry.used,
                )
                victims, enough = _victims(others, nbytes - left, nbytes - free)
                if not enough:
                    left += sum(entry.held for entry in others)
                    free += sum(entry.gain for entry in others)
                    return _why(nbytes, limit, left, free, device)
                victim = victims[0]
                changes, target = victim.changes, victim.owner()
            tried.add(victim)
            if target is not None and target.evict():
                with _lock:
                    if victim.changes == changes:  # it did not release, nor reserve anew
                        _count(victim, 0, 0)

    # ---------------------------------------------------------------- telling

    def settle(self, owner: Owner) -> None:
        """Note that the owner has taken from the device what it reserved."""
        with _lock:
            entry = self._found(owner)
            if entry is not None:
                entry.promised = 0
        self._pass_on("settle", owner)

    def release(self, owner: Owner, nbytes: int | None = None) -> None:
        """Count `nbytes` less for the owner, which has freed them; None for all that it holds."""
        with _lock:
            entry = self._found(owner)
            if entry is not None:
                less = entry.held if nbytes is None else min(nbytes, entry.held)
                _count(entry, entry.held - less, max(0, entry.promised - less))
        if nbytes is None:
            self._pass_on("release", owner)

    def touch(self, owner: Owner) -> None:
        """Note that the owner was used just now; it waits for nobody."""
        entry = self._found(owner)
        if entry is not None:
            entry.used = next(_clock)
        self._pass_on("touch", owner)

    def _pass_on(self, verb: str, owner: Owner) -> None:
        if self._host is not None:
            getattr(self._host, verb)(owner)

    # ---------------------------------------------------------------- showing

    @property
    def held(self) -> int:
        """Bytes that columns hold on the device, or have reserved there."""
        with _lock:
            return sum(entry.held for entry in self._living())

    def held_by(self, owner: Owner) -> int:
        """Bytes that are counted for one owner."""
        with _lock:
            entry = self._found(owner)
            return 0 if entry is None else entry.held

    def info(self) -> dict[str, Any]:
        """What there is, as plain values.

        Returns
        -------
        dict
            ``device`` (str), ``limit`` (bytes or None), ``held``, ``held_on_host`` and ``free``
            (bytes; what columns may still take of the device's memory, whatever the limit),
            ``columns`` (how many hold memory).

        Examples
        --------
        >>> Budget("cpu", "1 GiB").info()["limit"]
        1073741824
        """
        limit, device = self.limit, self.device
        with _lock:
            return {
                "device": str(device),
                "limit": limit,
                "held": self.held,
                "held_on_host": 0 if self._host is None else self._host.held,
                "free": max(0, _usable(device)),
                "columns": sum(1 for entry in self._living() if entry.held),
            }

    def __repr__(self) -> str:
        return f"{type(self).__name__}(device={self._wanted!s}, limit={self._wanted_limit!r})"

    # ---------------------------------------------------------------- counting, under the lock

    def _living(self) -> Iterator[_Entry]:
        for key, entry in list(self._entries.items()):
            if entry.owner() is not None:
                yield entry
            elif self._entries.get(key) is entry:
                del self._entries[key]

    def _found(self, owner: Owner) -> _Entry | None:
        entry = self._entries.get(id(owner))
        return entry if entry is not None and entry.owner() is owner else None

    def _entry(self, owner: Owner) -> _Entry:
        for _ in self._living():  # those of dropped columns go
            pass
        entry = self._found(owner)
        if entry is None:
            entry = self._entries[id(owner)] = _Entry(weakref.ref(owner), used=next(_clock))
        return entry


def _victims(
    others: list[_Entry], over_limit: int | float, over_free: int
) -> tuple[list[_Entry], bool]:
    """As few of `others`, the first ones first, as must go; and whether that is enough."""
    chosen: list[_Entry] = []
    for other in others:
        if over_limit <= 0 and over_free <= 0:
            break
        chosen.append(other)
        over_limit, over_free = over_limit - other.held, over_free - other.gain
    enough = over_limit <= 0 and over_free <= 0
    for other in reversed(chosen.copy()):  # the more recently used stay, if any can
        if over_limit + other.held <= 0 and over_free + other.gain <= 0:
            chosen.remove(other)
            over_limit, over_free = over_limit + other.held, over_free + other.gain
    return chosen, enough


def _why(nbytes: int, limit: int | None, left: float, free: int, device: torch.device) -> str:
    if limit is None or nbytes <= left:
        return f"{show_bytes(free)} can be taken on {device}"
    if left == limit:
        return f"the memory budget is {show_bytes(limit)}"
    return f"{show_bytes(left)} of the memory budget are left"


def _count(entry: _Entry, held: int, promised: int) -> None:
    entry.held, entry.promised = held, promised
    entry.changes += 1


def _less_headroom(size: int) -> int:
    return size * 9 // 10


def _usable(device: torch.device) -> int:
    """Bytes of a device's free memory that columns may take."""
    promised = sum(
        entry.promised
        for budget in list(_budgets)
        if budget.__dict__.get("device") == device
        for entry in budget._living()
    )
    scratch = SCRATCH.get(device.type, OTHER_SCRATCH)
    return _less_headroom(free_memory(device)) - scratch - promised
