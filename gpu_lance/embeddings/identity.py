"""What makes two embedding functions the same: their class and fields, never their caches."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from pydantic import BaseModel


class _ByEquality:
    """An unhashable value that still takes part in comparisons."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _ByEquality):
            return NotImplemented
        return self._value is other._value or bool(self._value == other._value)

    def __hash__(self) -> int:
        return hash(type(self._value))


def freeze(value: Any) -> Hashable:
    """Return a hashable stand-in that is equal where `value` is; lists and tuples count as equal.

    JSON has no tuples, so a function must equal itself after a round trip through a table.

    Examples
    --------
    >>> freeze({"a": [1, 2]}) == freeze({"a": (1, 2)})
    True
    """
    if isinstance(value, np.ndarray):
        return ("array", value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, BaseModel):
        fields = {name: value.__dict__.get(name) for name in type(value).model_fields}
        return (type(value), freeze(fields))
    if isinstance(value, Mapping):
        return ("map", frozenset((key, freeze(item)) for key, item in value.items()))
    if isinstance(value, list | tuple):
        return ("list", tuple(freeze(item) for item in value))
    if isinstance(value, set | frozenset):
        return ("set", frozenset(freeze(item) for item in value))
    try:
        hash(value)
    except TypeError:
        return _ByEquality(value)
    return value
