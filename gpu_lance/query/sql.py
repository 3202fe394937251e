"""SQL text: taking parameters in safely, and refusing what Lance would read only half of.

Lance stops reading a condition where it is complete: of ``id = 1) OR (id = 2`` it runs ``id = 1``
and says nothing. So a condition is checked here and put in parentheses, which makes Lance read
all of it. It takes ``"a"`` for a text, where SQL and LanceDB's conditions mean a column; it gets
backticks here.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import math
import re
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from gpu_lance.errors import BadInputError, QueryError
from gpu_lance.types import lone_surrogate

# 'a string', "a string as well", `a name`, comments, words, and single other characters
_TOKEN = re.compile(
    r"""(?P<string>'(?:[^']|'')*'|"(?:[^"]|"")*")"""
    r"""|(?P<name>`[^`]*`)"""
    r"""|(?P<comment>--[^\n]*|/\*.*?\*/)"""
    r"""|(?P<word>\w+)"""
    r"""|(?P<other>.)""",
    re.DOTALL,
)
_INT_RANGE = range(-(2**63), 2**64)


def tokens(sql: str) -> Iterator[tuple[str, str]]:
    """The pieces of SQL text: (kind, text), kind being string, name, comment, word or other.

    Examples
    --------
    >>> [kind for kind, _ in tokens("a='?'")]
    ['word', 'other', 'string']
    """
    for match in _TOKEN.finditer(sql):
        yield str(match.lastgroup), match.group()


def words(sql: str) -> set[str]:
    """Every word and quoted name in SQL text, among them all columns that it mentions.

    Examples
    --------
    >>> sorted(words("lower(name) = 'x' AND `my col` > 1"))
    ['1', 'AND', 'lower', 'my col', 'name']
    """
    return {text.strip("`") for kind, text in tokens(sql) if kind in ("word", "name")}


def checked(sql: Any, what: str = "filter") -> str:
    """The SQL text in parentheses and without comments, if it is one whole expression.

    Parameters
    ----------
    sql : str
    what : str
        What to call it in messages. In a ``"filter"`` double quotes enclose names, as in LanceDB;
        in other expressions they enclose texts, also as there.

    Raises
    ------
    QueryError
        If it is no text, empty, has an unbalanced parenthesis or quote, a ``;``, or a parameter
        for which no value was given.

    Examples
    --------
    >>> checked("a = 1 -- one")
    '(a = 1)'
    >>> checked('"my col" = 1')
    '(`my col` = 1)'
    """
    if not isinstance(sql, str):
        raise QueryError(f"A {what} is SQL text, got a {type(sql).__name__}.")
    _encodable(sql, what)
    depth, parts, before = 0, [], ""
    for kind, text in tokens(sql):
        if kind == "comment":
            parts.append(" ")
        elif kind == "string" and text[0] == '"' and what == "filter":
            parts.append("`" + text[1:-1].replace('""', '"').replace("`", "``") + "`")
        else:
            parts.append(text)
        if kind == "other":
            depth += {"(": 1, ")": -1}.get(text, 0)
            if depth < 0:
                raise QueryError(f"The {what} {sql!r} closes a parenthesis that it never opened.")
            if text in "'\"`":
                raise QueryError(f"The {what} {sql!r} opens a quote {text} that it never closes.")
            if text == "*" and before == "/":
                raise QueryError(f"The {what} {sql!r} opens a comment that it never closes.")
            if text == ";":
                raise QueryError(f"The {what} {sql!r} has a ';': it must be one expression.")
            if text in "?$":
                raise QueryError(
                    f"The {what} {sql!r} has a parameter {text!r} without a value: pass values "
                    "beside it, as in where('owner = ?', ['Ann']), or quote the character."
                )
        before = text
    if depth:
        raise QueryError(f"The {what} {sql!r} opens a parenthesis that it never closes.")
    whole = "".join(parts).strip()
    if not whole:
        raise QueryError(f"The {what} is empty.")
    return f"({whole})"


def condition(where: Any, parameters: Sequence[Any] | None) -> str:
    """A condition that a caller gave, with its parameters taken in, checked.

    Raises
    ------
    QueryError, BadInputError
        As :func:`checked` and :func:`bind`.

    Examples
    --------
    >>> condition("owner = ?", ["Ann"])
    "(owner = 'Ann')"
    """
    if parameters is None or not isinstance(where, str):
        return checked(where)
    if isinstance(parameters, str | bytes) or not isinstance(parameters, Sequence):
        raise QueryError(
            "The parameters of a filter are a list, as in where('owner = ?', [name]), got a "
            f"{type(parameters).__name__}."
        )
    return checked(bind(where, parameters))


def bind(sql: str, parameters: Sequence[Any]) -> str:
    """Put values in the place of each ``?`` of SQL text, as literals that stay data.

    A ``?`` inside quotes, a quoted name or a comment is no parameter. A list becomes the members
    of an ``IN``: both ``IN ?`` and ``IN (?)`` take one.

    Parameters
    ----------
    sql : str
    parameters : sequence
        str, int, float, bool, bytes, Decimal, date, time, datetime, UUID, enum members, their
        numpy and Arrow kinds, or lists of them. None only after ``IS`` or ``IS NOT``, since
        nothing equals NULL.

    Raises
    ------
    QueryError
        If there are more or fewer values than parameters, or a value has no literal.
    BadInputError
        If a text cannot be stored as UTF-8.

    Examples
    --------
    >>> bind("owner = ? AND id IN (?)", ["O'Neil", [1, 2]])
    "owner = 'O''Neil' AND id IN (1, 2)"
    """
    pieces = list(tokens(sql))
    places = [i for i, piece in enumerate(pieces) if piece == ("other", "?")]
    if len(places) != len(parameters):
        raise QueryError(
            f"The filter {sql!r} has {len(places)} parameters, and {len(parameters)} values were "
            "given."
        )
    texts = [text for _, text in pieces]
    code = ["" if kind == "comment" or text.isspace() else text for kind, text in pieces]
    for place, value in zip(places, parameters, strict=True):
        earlier = [text.upper() for text in code[:place] if text]
        later = next((text for text in code[place + 1 :] if text), "")
        texts[place] = _in_place(value, earlier, later)
    return "".join(texts)


def _in_place(value: Any, earlier: list[str], later: str) -> str:
    if isinstance(value, pa.Scalar):
        value = value.as_py()
    if value is None:
        if earlier[-1:] == ["IS"] or earlier[-2:] == ["IS", "NOT"]:
            return "NULL"
        raise QueryError("A parameter is None, and nothing equals NULL; write IS NULL instead.")
    members = _members(value)
    if members is None:
        return literal(value)
    if not members:
        raise QueryError("A parameter is an empty list, and IN () holds for no row.")
    listed = ", ".join(literal(member) for member in members)
    return listed if earlier[-1:] == ["("] and later == ")" else f"({listed})"


def _members(value: Any) -> list[Any] | None:
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    if isinstance(value, (pa.Array, pa.ChunkedArray)):
        return list(value.to_pylist())
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return list(value.tolist())
    return None


def literal(value: Any) -> str:
    """The SQL literal of one value.

    Raises
    ------
    QueryError
        If the value is None or of a kind that has no literal.
    BadInputError
        If a text cannot be stored as UTF-8.

    Examples
    --------
    >>> literal("it's"), literal(-2), literal(b"ab")
    ("'it''s'", '(-2)', "X'6162'")
    """
    if isinstance(value, pa.Scalar):
        value = value.as_py()
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, np.datetime64):
        value = value.astype("datetime64[us]").item()
    if isinstance(value, np.generic):
        value = value.item()
    if value is None:
        raise QueryError("A parameter holds None, and nothing equals NULL; write IS NULL instead.")
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, str):
        _encodable(value, "parameter")
        return "'" + value.replace("'", "''") + "'"
    if isinstance(value, uuid.UUID):
        return f"'{value}'"
    if isinstance(value, int):
        if value not in _INT_RANGE:
            raise QueryError(f"The parameter {value} is beyond 64 bits.")
        if value == _INT_RANGE.start:
            return f"CAST('{value}' AS BIGINT)"  # Lance negates 2**63, which is a float
        return f"({value})" if value < 0 else str(value)  # x -? must not become a comment
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"X'{bytes(value).hex()}'"
    if isinstance(value, decimal.Decimal):
        return _decimal(value)
    return _moment(value)


def _float(value: float) -> str:
    if math.isfinite(value):
        return f"({value!r})" if math.copysign(1, value) < 0 else repr(value)
    name = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return f"CAST('{name}' AS DOUBLE)"


def _decimal(value: decimal.Decimal) -> str:
    exponent = value.as_tuple().exponent
    if not isinstance(exponent, int):
        raise QueryError(f"The parameter {value!r} is not a finite number.")
    scale = max(-exponent, 0)
    precision = max(len(value.as_tuple().digits) + max(exponent, 0), scale + 1)
    if precision > 38:
        raise QueryError(f"The parameter {value!r} has more than 38 digits.")
    return f"CAST('{value:f}' AS DECIMAL({precision}, {scale}))"


def _moment(value: Any) -> str:
    if isinstance(value, datetime.datetime):
        if value.utcoffset() is None:
            return f"CAST('{value.isoformat()}' AS TIMESTAMP(6))"
        text = value.astimezone(datetime.UTC).isoformat()
        # a plain TIMESTAMP would be read as local time against a column with another zone
        return f"arrow_cast('{text}', 'Timestamp(Microsecond, Some(\"UTC\"))')"
    if isinstance(value, datetime.date):
        return f"DATE '{value.isoformat()}'"
    if isinstance(value, datetime.time):
        return f"arrow_cast('{value.isoformat()}', 'Time64(Microsecond)')"
    raise QueryError(f"A parameter is a {type(value).__name__}, which has no SQL literal.")


def _encodable(text: str, what: str) -> None:
    place = lone_surrogate(text)
    if place is not None:
        raise BadInputError(
            f"The {what} has a lone surrogate at character {place}, which is no text."
        )
