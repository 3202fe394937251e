"""Values that a caller sets on a search, checked where they are set."""

from __future__ import annotations

import math
import operator
from datetime import timedelta
from typing import Any

from gpu_lance.errors import QueryError, QueryTypeError

MOST = 2**62  # rows; sums of two of them are still 64-bit numbers
BEYOND = 2.0**128 - 2.0**103  # from here on a number is infinite in float32


def whole(value: Any, name: str, least: int = 0) -> int:
    """A whole number of at least `least`; one beyond every table's size becomes `MOST`.

    Raises
    ------
    QueryTypeError
        If it is no number.
    QueryError
        If it has a fraction or is too small.

    Examples
    --------
    >>> whole(3.0, "limit")
    3
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, float):
        raise QueryError(f"{name} is {value}; it must be a whole number.")
    try:
        number = operator.index(value)
    except TypeError as error:
        raise QueryTypeError(
            f"{name} is a {type(value).__name__}; it must be a whole number."
        ) from error
    if number < least:
        raise QueryError(f"{name} is {number}; it must be at least {least}.")
    return min(number, MOST)


def bound(value: Any, name: str) -> float | None:
    """A bound on distances, or None.

    Raises
    ------
    QueryError
        If it is no number, or NaN.
    """
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise QueryError(f"{name} is {value!r}; it must be a number or None.") from error
    except OverflowError:  # an int of hundreds of digits
        number = math.inf if value > 0 else -math.inf
    if math.isnan(number):
        raise QueryError(f"{name} is NaN, and no distance compares with it.")
    return math.copysign(math.inf, number) if abs(number) >= BEYOND else number


def seconds(timeout: timedelta | None) -> float | None:
    """The seconds of a timeout.

    Raises
    ------
    QueryTypeError
        Unless it is a timedelta or None.

    Examples
    --------
    >>> seconds(timedelta(milliseconds=500))
    0.5
    """
    if timeout is None:
        return None
    if not isinstance(timeout, timedelta):
        raise QueryTypeError(f"timeout is a {type(timeout).__name__}; pass a datetime.timedelta.")
    return timeout.total_seconds()
