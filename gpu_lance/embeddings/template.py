"""A text with columns in braces, such as ``"{title}\\n{body}"``, read without running anything.

A template may come from the metadata of a stranger's table, so a name in braces is a column and
nothing more: no attribute, no index, no conversion, no format.
"""

from __future__ import annotations

import functools
import string
from collections import Counter
from dataclasses import dataclass
from typing import Any

from gpu_lance.errors import SchemaError

# A stranger's table must not blow up a row.
LONGEST = 10_000  # characters
MOST_OFTEN = 8  # times that a column may stand in it


@dataclass(frozen=True)
class Template:
    """A template, taken apart.

    Parameters
    ----------
    text : str
        As it was written.
    parts : tuple of (str, str or None)
        Text, and the column whose value follows it; None after the last text.
    """

    text: str
    parts: tuple[tuple[str, str | None], ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """Its columns in the order in which they first stand."""
        return tuple(dict.fromkeys(name for _, name in self.parts if name is not None))


def parse(text: Any) -> Template:
    """Take a template apart.

    Parameters
    ----------
    text : str
        Names in braces are columns; ``{{`` and ``}}`` are braces.

    Raises
    ------
    SchemaError
        If it is no text, has no column, or has more than a name between braces.

    Examples
    --------
    >>> parse("{title}: {body} {{1}}").columns
    ('title', 'body')
    """
    if not isinstance(text, str):
        raise SchemaError(
            f"A template is a text with columns in braces, such as '{{title}} {{body}}', got a "
            f"{type(text).__name__}."
        )
    return _parsed(text)


@functools.lru_cache(maxsize=256)
def _parsed(text: str) -> Template:
    if len(text) > LONGEST:
        raise SchemaError(
            f"A template has at most {LONGEST:,} characters, got one of {len(text):,} that begins "
            f"with {text[:40]!r}."
        )
    try:
        found = list(string.Formatter().parse(text))
        text.encode()  # a lone surrogate could not be stored
    except ValueError as error:
        raise SchemaError(
            f"The template {text!r} cannot be read ({error}); for a brace write {{{{ or }}}}."
        ) from None
    parts: list[tuple[str, str | None]] = []
    for literal, name, spec, conversion in found:
        parts.append((literal, name))
        if name is None:
            continue
        if spec or conversion or not name or set(name) & set(".[]{}!:"):
            shown = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise SchemaError(
                f"The template {text!r} has {{{shown}}}; between braces stands the name of a "
                "column and nothing else. For a brace write {{ or }}."
            )
    template = Template(text, tuple(parts))
    places = Counter(name for _, name in parts if name is not None)
    for name, count in places.most_common(1):
        if count > MOST_OFTEN:
            raise SchemaError(
                f"A template names a column at most {MOST_OFTEN} times, got one that names "
                f"{name!r} {count:,} times."
            )
    if not template.columns:
        raise SchemaError(
            f"The template {text!r} names no column; put the columns to embed in braces, such as "
            "'{title} {body}'."
        )
    return template
