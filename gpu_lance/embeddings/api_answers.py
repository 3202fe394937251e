"""Vectors out of a server's answer, or the reason why there are none; never a wrong row."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

_NUMBERS = {float, int, type(None)}  # JSON has no NaN, so some servers write null
_NO_NUMBERS = "vectors that hold something other than numbers"


class BadAnswer(Exception):
    """The answer as a whole cannot be used."""


class WrongLength(Exception):
    """Every vector of the answer has another length than it shall have."""

    def __init__(self, got: int) -> None:
        super().__init__(got)
        self.got = got


def parse(content: bytes) -> Any:
    """Return the JSON of an answer.

    Raises
    ------
    BadAnswer
        If it is cut off, or something else.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        text = content[:40].decode("utf-8", "replace")
        raise BadAnswer(f"{len(content)} bytes that are no JSON, beginning {text!r}") from None


def in_order(found: Any, count: int) -> list[Any]:
    """Put ``[{"index": 1, "embedding": ...}, ...]`` into the order of the texts.

    Without any index they are in order already.

    Raises
    ------
    BadAnswer
        If a vector is missing or there twice.

    Examples
    --------
    >>> in_order([{"index": 1, "embedding": "b"}, {"index": 0, "embedding": "a"}], 2)
    ['a', 'b']
    """
    if not isinstance(found, list) or not all(isinstance(part, dict) for part in found):
        raise BadAnswer("no list of vectors")
    if len(found) != count:
        raise BadAnswer(f"{len(found)} vectors for {count} texts")
    places = [part.get("index") for part in found]
    if all(place is None for place in places):
        return [part.get("embedding") for part in found]
    # a bool is an int, and 1.0 equals 1
    if not all(type(place) is int for place in places) or sorted(places) != list(range(count)):
        raise BadAnswer("vectors whose numbers are not those of the texts")
    rows: list[Any] = [None] * count
    for place, part in zip(places, found, strict=True):
        rows[place] = part.get("embedding")
    return rows


def to_matrix(rows: Any, count: int, ndims: int) -> tuple[np.ndarray, dict[int, str]]:
    """Put vectors into a matrix.

    Parameters
    ----------
    rows : list
        Each a list of numbers, or base64 of little-endian float32.
    count : int
        How many there must be.
    ndims : int
        How long each must be.

    Returns
    -------
    (numpy.ndarray, dict of int to str)
        (count, ndims), float32; and what is wrong with the rows that cannot be used.

    Raises
    ------
    WrongLength
        If the vectors have another length.
    BadAnswer
        If there are more or fewer, or something that is no vector.

    Examples
    --------
    >>> matrix, bad = to_matrix([[1, 2], None, "AACAPwAAAEA="], 3, 2)
    >>> matrix[2].tolist(), bad
    ([1.0, 2.0], {1: 'the server gave no vector for it'})
    """
    if not isinstance(rows, list):
        raise BadAnswer("no list of vectors")
    if len(rows) != count:
        raise BadAnswer(f"{len(rows)} vectors for {count} texts")
    decoded = [_decode(row) for row in rows]
    absent = [place for place, row in enumerate(decoded) if row is None]
    lengths = {len(row) for row in decoded if row is not None}
    if lengths and lengths != {ndims}:
        if len(lengths) == 1:
            raise WrongLength(lengths.pop())
        raise BadAnswer(f"vectors of different lengths ({_listed(lengths)})")
    matrix = _stack(decoded, ndims)
    bad = dict.fromkeys(absent, "the server gave no vector for it")
    for place in np.flatnonzero(~np.isfinite(matrix).all(axis=1)).tolist():
        bad.setdefault(place, "the server gave a vector with NaN or infinity for it")
    return matrix, bad


def _decode(row: Any) -> Any:
    """A sequence of numbers, or None for none."""
    if row is None or (isinstance(row, list | str) and not row):
        return None
    if isinstance(row, str):
        try:
            data = base64.b64decode(row, validate=True)
        except ValueError:  # binascii.Error is one
            raise BadAnswer("a vector that is no base64") from None
        if len(data) % 4:
            raise BadAnswer(f"a vector of {len(data)} bytes, which are no float32 numbers")
        return np.frombuffer(data, "<f4")
    if not isinstance(row, list):
        raise BadAnswer(f"a {type(row).__name__} in the place of a vector")
    if not set(map(type, row)) <= _NUMBERS:  # numpy would read numbers out of texts
        raise BadAnswer(_NO_NUMBERS)
    return row


def _stack(decoded: Sequence[Any], ndims: int) -> np.ndarray:
    filler = np.zeros(ndims, np.float32)
    rows = [filler if row is None else row for row in decoded]
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            return np.array(rows, dtype=np.float32).reshape(len(rows), ndims)
    except OverflowError:  # of an integer
        raise BadAnswer(_NO_NUMBERS) from None


def _listed(lengths: set[int]) -> str:
    return ", ".join(map(str, sorted(lengths)[:4]))
