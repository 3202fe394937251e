"""Import an optional package at its point of use."""

from __future__ import annotations

import importlib
from types import ModuleType

from gpu_lance.errors import MissingExtraError


def require(module: str, extra: str) -> ModuleType:
    """Import and return `module`, or say how to install it.

    Parameters
    ----------
    module : str
        Dotted name of the module.
    extra : str
        The extra of this package that brings it, e.g. ``"cpu"``; several are separated by ``|``.

    Returns
    -------
    module
        The imported module.

    Raises
    ------
    MissingExtraError
        If that module is not installed. A module that is installed but fails to import raises
        its own error.

    Examples
    --------
    >>> require("json", extra="cpu").loads("[1]")
    [1]
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module != missing and not module.startswith(missing + "."):
            raise
        lines = " or ".join(f"pip install 'gpu-lance[{name}]'" for name in extra.split("|"))
        raise MissingExtraError(f"{module} is not installed. To get it: {lines}") from error
