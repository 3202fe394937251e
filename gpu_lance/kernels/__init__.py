"""Host side of the kernels: for each one its wrapper and its torch reference.

The device code stands in the folder ``kernels`` at the top of the repository and is reached as
``gpu_lance.kernels.<name>`` everywhere: a wheel carries both folders as this package, and in a
checkout that folder is appended to the places where this package's modules are looked for.
"""

from __future__ import annotations

import re
from pathlib import Path

_OWN_PROJECT = re.compile(r"""^name\s*=\s*["']gpu-lance["']\s*$""", re.MULTILINE)


def checkout_folder(package: Path) -> Path | None:
    """Return the folder of device code beside a checked-out package; None for an installed one.

    A folder of that name beside an installed package is Hugging Face's, so ours counts only
    where this project's own ``pyproject.toml`` stands beside it.

    Parameters
    ----------
    package : Path
        The folder of ``gpu_lance``.

    Examples
    --------
    >>> checkout_folder(Path("nowhere/gpu_lance")) is None
    True
    """
    root = package.parent
    project = root / "pyproject.toml"
    if not (root / "kernels").is_dir() or not project.is_file():
        return None
    return root / "kernels" if _OWN_PROJECT.search(project.read_text("utf-8")) else None


if (_folder := checkout_folder(Path(__file__).resolve().parent.parent)) is not None:
    __path__.append(str(_folder))
