"""Imports that wait: of optional packages, and of what a package exports."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

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


def lazy(
    package: str, exports: Mapping[str, str], modules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make a package's ``__getattr__`` and ``__dir__`` (PEP 562), which import on first use.

    Parameters
    ----------
    package : str
        The package's ``__name__``.
    exports : mapping of str to str
        Which of its modules defines each public name.
    modules : sequence of str
        Modules that are there as attributes without an import of their own.

    Examples
    --------
    >>> get, _ = lazy("json", {"JSONDecoder": "decoder"}, ["tool"])
    >>> get("JSONDecoder").__module__, get("tool").__name__
    ('json.decoder', 'json.tool')
    """

    def get(name: str) -> Any:
        if name in modules:
            return importlib.import_module(f"{package}.{name}")
        if name not in exports:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{exports[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *exports, *modules})

    return get, names
