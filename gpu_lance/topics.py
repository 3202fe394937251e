"""Real English text that every Python carries: the language reference behind ``help()``."""

from __future__ import annotations

import importlib
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gpu_lance.errors import GpuLanceError

LEAST, MOST = 160, 600  # characters of a passage: shorter ones are joined, longer ones are cut

_UNDERLINE = re.compile(r"([*=\-~^\"'+])\1{2,}")
_EMPHASIS = re.compile(r"(?<![\w*])(\*{1,2})(?=[^\s*])([^*\n]*[^\s*])\1(?![\w*])")


@dataclass(frozen=True)
class Passage:
    """A piece of a topic.

    Parameters
    ----------
    topic : str
        The name under which ``help()`` knows it.
    title : str
        The heading that it stands under.
    passage : int
        Its number in the topic, from 0.
    text : str
    """

    topic: str
    title: str
    passage: int
    text: str


def passages(topics: Mapping[str, str] | None = None) -> list[Passage]:
    """Split topics into passages of a few sentences, without reST's marks.

    Topics contain one another ("compound" has all of "with"). A text that stands in several is
    taken once, from the shortest of them.

    Parameters
    ----------
    topics : mapping of str to str, optional
        Text by name; Python's own by default.

    Returns
    -------
    list of Passage
        By topic and number; each text is there once.

    Raises
    ------
    GpuLanceError
        If this Python carries no topics.

    Examples
    --------
    >>> text = "Title\\n*****\\n\\nSome *plain*\\nwords.\\n\\n   code(1)"
    >>> passages({"t": text})[0].text
    'Some plain words.\\n\\ncode(1)'
    """
    found = _python_topics() if topics is None else topics
    made: dict[str, Passage] = {}
    for topic, text in sorted(found.items(), key=lambda item: (len(item[1]), item[0])):
        number = 0
        for title, pieces in _sections(topic, text):
            for piece in _joined(pieces):
                made.setdefault(piece, Passage(topic, title, number, piece))
                number += 1
    return sorted(made.values(), key=lambda passage: (passage.topic, passage.passage))


def _python_topics() -> Mapping[str, str]:
    try:
        found: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError) as error:
        raise GpuLanceError(
            "This Python carries no help topics (pydoc_data.topics), which the demo takes its text "
            "from. Use a Python from python.org, conda-forge, uv or your system's full package."
        ) from error
    return found


def _sections(topic: str, text: str) -> Iterator[tuple[str, list[str]]]:
    """The headings of a topic, each with the cleaned paragraphs under it."""
    title: str = topic
    pieces: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.strip("\n").split("\n")
        if len(lines) > 1 and _UNDERLINE.fullmatch(lines[1].strip()):
            if pieces:
                yield title, pieces
            title, pieces = _EMPHASIS.sub(r"\2", lines[0].strip()), []
            lines = lines[2:]
        pieces.extend(_cut(_clean("\n".join(lines))))
    if pieces:
        yield title, pieces


def _clean(paragraph: str) -> str:
    """A paragraph without indentation and marks; prose on one line, code as it was."""
    text = textwrap.dedent(paragraph).strip()
    code = paragraph.startswith("   ") or re.search(r"\n\s{2,}\S", text)
    if not code:
        text = " ".join(text.split())
    return _EMPHASIS.sub(r"\2", text)


def _cut(text: str) -> Iterator[str]:
    """Pieces of at most MOST characters, ending with a line or a sentence where there is one."""
    while len(text) > MOST:
        ends = [match.end() for match in re.finditer(r"\n|[.:;]\s", text[:MOST])]
        end = ends[-1] if ends and ends[-1] > MOST // 3 else text.rfind(" ", 1, MOST)
        end = end if end > 0 else MOST
        yield text[:end].strip()
        text = text[end:].lstrip()
    if text:
        yield text


def _joined(pieces: Sequence[str]) -> Iterator[str]:
    """The pieces, with short ones joined to their followers, or the last to the one before it."""
    made: list[str] = []
    for piece in pieces:
        both = f"{made[-1]}\n\n{piece}" if made else ""
        short = made and (len(made[-1]) < LEAST or (piece is pieces[-1] and len(piece) < LEAST))
        if short and len(both) <= MOST:
            made[-1] = both
        else:
            made.append(piece)
    yield from made
