"""Sizes of memory, as people write them and as they read them."""

from __future__ import annotations

import numbers
import re
from collections.abc import Callable
from typing import Any

from gpu_lance.errors import BadInputError, WrongTypeError

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", 1):
    _UNITS |= {_letter + end: 1000**_power for end in ("", "b")}
    _UNITS |= {_letter + end: 1024**_power for end in ("i", "ib")}
_SIZE = re.compile(r"((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?)\s*([a-z]*|%)")
_MOST = 1 << 62
_EXAMPLES = "such as 2000000000, '8GiB', '500 MB' or '50%' of the device's memory"


def parse_bytes(
    value: Any, total: Callable[[], int] | None = None, name: str = "memory_budget"
) -> int:
    """The number of bytes that `value` stands for.

    Parameters
    ----------
    value : int, float or str
        Bytes, or a number with a unit, in any case: k, kB, M, MB, G, GB, T, TB are powers of 1000,
        KiB, MiB, GiB, TiB powers of 1024. ``"50%"`` is that share of `total`.
    total : callable, optional
        Gives the bytes of which a percentage is taken; without it there are none.
    name : str
        Of the argument or variable, for the error.

    Returns
    -------
    int
        From 0, which keeps nothing resident.

    Raises
    ------
    WrongTypeError
        For a value that is neither a number nor text.
    BadInputError
        For one that is no size.

    Examples
    --------
    >>> parse_bytes("8GiB"), parse_bytes("500 MB"), parse_bytes("1.5e9"), parse_bytes("64k")
    (8589934592, 500000000, 1500000000, 64000)
    >>> parse_bytes("50%", lambda: 1000)
    500
    """
    wrong = f"{name} is {_short(value)}; it is a number of bytes from 0, {_EXAMPLES}."
    if isinstance(value, bool) or not isinstance(value, numbers.Real | str):
        raise WrongTypeError(wrong)
    if isinstance(value, numbers.Integral):
        size: float = int(value)
    elif isinstance(value, numbers.Real):
        size = float(value)
        if not size.is_integer():  # also infinity and NaN; gigabytes were meant, perhaps
            raise BadInputError(wrong)
    else:
        found = _SIZE.fullmatch(value.strip().lower())
        if found is None:
            raise BadInputError(wrong)
        number, unit = float(found[1]), found[2]
        if unit == "%":
            if number > 100 or total is None:
                raise BadInputError(wrong)
            return int(number / 100 * total())
        if unit not in _UNITS:
            raise BadInputError(wrong)
        size = number * _UNITS[unit]
    if not 0 <= size <= _MOST:  # of NaN neither is true
        raise BadInputError(wrong)
    return int(size)


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # an int of too many digits, or an object that cannot say
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def show_bytes(size: float) -> str:
    """A size for people.

    Examples
    --------
    >>> show_bytes(1_536_000_000), show_bytes(1 << 29), show_bytes(700_000), show_bytes(12)
    ('1.43 GiB', '0.50 GiB', '0.67 MiB', '12 bytes')
    """
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale / 10:
            return f"{size / scale:.2f} {unit}"
    return f"{max(0, int(size))} bytes"
