"""Whether this process was forked from one whose threads it would need."""

from __future__ import annotations

import os


class ForkGuard:
    """Tells, in a forked process, that a library had been in use: its threads stayed behind.

    Examples
    --------
    >>> guard = ForkGuard()
    >>> guard.use()
    >>> guard.lost
    False
    """

    def __init__(self) -> None:
        self._used = False
        self.lost = False
        if hasattr(os, "register_at_fork"):  # not on Windows
            os.register_at_fork(after_in_child=self._after_fork)

    def use(self) -> None:
        """Note that the library's threads may be running from now on."""
        self._used = True

    def _after_fork(self) -> None:
        self.lost = self.lost or self._used
