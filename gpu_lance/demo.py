"""The demonstration: real English text, embedded into a table on disk, and searched."""

from __future__ import annotations

import logging
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_lance.errors import BadInputError
from gpu_lance.topics import Passage, passages
from gpu_lance.types import lone_surrogate

if TYPE_CHECKING:
    from gpu_lance.table import Table

logger = logging.getLogger(__name__)

DATABASE = "demo_db"
TABLE = "python_topics"
QUESTIONS = (
    "How do I catch an exception and run clean-up code afterwards?",
    "What makes an object usable in a with statement?",
    "How are keyword arguments passed to a function?",
    "Which values count as false?",
)
COLUMNS = tuple(Passage.__dataclass_fields__)
BATCH = 64  # passages between two reports of progress
REPEATS = 7  # searches per question after the first, of which the median is reported


@dataclass(frozen=True)
class Answer:
    """What a question found.

    Parameters
    ----------
    question : str
    hits : list of dict
        ``topic``, ``title``, ``passage``, ``text`` and ``_distance``, the nearest first.
    first_ms : float
        Of the first search, which may load the table's vectors.
    median_ms : float
        Of the searches after it: embedding the question, searching, and fetching the rows.
    """

    question: str
    hits: list[dict[str, Any]]
    first_ms: float
    median_ms: float


@dataclass(frozen=True)
class Report:
    """What the demonstration did, and how long it took.

    Parameters
    ----------
    database, table, path : str
        Where the table is: what was given to ``connect``, its name, and its own folder.
    rows : int
    version : int
    reused : bool
        Whether the table was there already; then ``index_s`` and ``rows_per_s`` are None.
    device : str
        Where the text was embedded and is searched.
    engine : str
        What searches.
    model : str
        What embeds.
    dims : int
        Length of a vector.
    model_load_s : float
        Seconds to find and load the model and run it once.
    index_s, rows_per_s : float, optional
        Seconds to embed all rows and commit them, and the rate that this makes.
    answers : list of Answer
    python : str
        Whose documentation the text is.
    """

    database: str
    table: str
    path: str
    rows: int
    version: int
    reused: bool
    device: str
    engine: str
    model: str
    dims: int
    model_load_s: float
    index_s: float | None
    rows_per_s: float | None
    answers: list[Answer] = field(default_factory=list)
    python: str = field(default_factory=platform.python_version)

    @property
    def search_ms(self) -> float:
        """The median over the questions."""
        return statistics.median(answer.median_ms for answer in self.answers)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return {**asdict(self), "search_ms": self.search_ms}


def run(
    questions: Sequence[str] = (),
    *,
    db: str | Path = DATABASE,
    device: str = "auto",
    memory_budget: str | None = None,
    fresh: bool = False,
    limit: int = 3,
    rows: int | None = None,
    progress: Callable[[int, int], Any] | None = None,
    note: Callable[[str], None] = logger.info,
) -> Report:
    """Index Python's help topics into a table, unless it is there, and answer questions.

    Parameters
    ----------
    questions : sequence of str
        Answered after the built-in ones.
    db : str or Path
        The folder of the database.
    device : str
        ``"auto"``, ``"cpu"``, ``"cuda"``, ...
    memory_budget : str, optional
        As in :func:`gpu_lance.connect`.
    fresh : bool
        Index again even if the table is there.
    limit : int
        Hits for each question.
    rows : int, optional
        Only so many passages, for a quick look.
    progress : callable, optional
        Told how many passages are indexed, and how many there are.
    note : callable
        Told, in words, what is being done.

    Returns
    -------
    Report

    Raises
    ------
    BadInputError
        If a question is no text, if the folder has a table of that name which is not the demo's,
        or if `rows` or `limit` is below 1.
    ModelNotFoundError
        If the model is nowhere.
    DeviceError
        If the named device is not there.
    """
    for name, value in (("rows", rows), ("limit", limit)):
        if value is not None and value < 1:
            raise BadInputError(f"{name} is {value}; it must be at least 1.")
    for question in questions:
        check_question(question)
    from gpu_lance.db import connect
    from gpu_lance.embeddings import get_registry

    text = passages()[:rows]
    with connect(db, device=device, memory_budget=memory_budget) as connection:
        used = connection.device  # a device that is not there is an error before any work
        there = _there(connection)
        function: Any = get_registry().get("sentence-transformers").create(device=device)
        note(f"loading the model {function.name} on {used}")
        start = time.perf_counter()
        function.generate_embeddings(["The first run is slower than those after it."])
        loaded = time.perf_counter() - start

        reused = there is not None and not fresh and _holds(there, text)
        index_s = None
        if there is not None and reused:
            table = there
        else:
            note(f"embedding {len(text)} passages")
            table, index_s = _indexed(connection, function, text, progress)
        answers = [_answer(table, question, limit) for question in (*QUESTIONS, *questions)]
        return Report(
            database=str(db),
            table=TABLE,
            path=table.uri,
            rows=table.count_rows(),
            version=table.version,
            reused=reused,
            device=str(used),
            engine=str(table.column_index("vector").info()["engine"]),
            model=function.name,
            dims=function.ndims(),
            model_load_s=loaded,
            index_s=index_s,
            rows_per_s=None if index_s is None else len(text) / index_s,
            answers=answers,
        )


def check_question(text: Any) -> str:
    """The text of a question, if it is one.

    Raises
    ------
    BadInputError
        If it is no text, empty, or has a lone surrogate.

    Examples
    --------
    >>> check_question("Why?")
    'Why?'
    """
    if not isinstance(text, str):
        raise BadInputError(f"A question is a text, got a {type(text).__name__}.")
    if not text.strip():
        raise BadInputError("The question is empty; give at least one word.")
    place = lone_surrogate(text)
    if place is not None:
        raise BadInputError(
            f"The question has a lone surrogate at character {place}, which is no text; give it as "
            "UTF-8."
        )
    return text


def _schema(function: Any) -> Any:
    from gpu_lance.pydantic import LanceModel, Vector

    class Topic(LanceModel):
        topic: str
        title: str
        passage: int
        text: str = function.SourceField()
        vector: Vector(function.ndims()) = function.VectorField()  # type: ignore[valid-type]

    return Topic


def _there(connection: Any) -> Table | None:
    """The table of that name; an error if it is not the demo's, which is never overwritten."""
    if TABLE not in connection:
        return None
    table: Table = connection.open_table(TABLE)
    if table.schema.names != [*COLUMNS, "vector"] or "vector" not in table.embedding_functions:
        raise BadInputError(
            f"{table.uri} is not the demo's table (it has the columns "
            f"{', '.join(table.schema.names)}) and is left alone. Give another folder (--db)."
        )
    return table


def _holds(table: Table, text: Sequence[Passage]) -> bool:
    """Whether the table has just this text; another Python's is indexed again."""
    if table.count_rows() != len(text):
        return False
    stored = table.search().select(list(COLUMNS)).limit(None).to_list()
    return [{name: row[name] for name in COLUMNS} for row in stored] == [asdict(p) for p in text]


def _indexed(
    connection: Any,
    function: Any,
    text: Sequence[Passage],
    progress: Callable[[int, int], Any] | None,
) -> tuple[Table, float]:
    """The table, made in one commit, and how many seconds it took."""
    import pyarrow as pa

    rows = [asdict(passage) for passage in text]
    # a GPU is done before a bar could move; on a CPU it moves with each batch
    step = BATCH if connection.device.type == "cpu" else len(rows)
    batches = (pa.RecordBatch.from_pylist(rows[i : i + step]) for i in range(0, len(rows), step))

    def report(state: dict[str, Any]) -> None:
        if progress is not None:
            progress(state["output_rows"], len(rows))

    start = time.perf_counter()
    table: Table = connection.create_table(
        TABLE, data=batches, schema=_schema(function), mode="overwrite", progress=report
    )
    return table, time.perf_counter() - start


def _answer(table: Table, question: str, limit: int) -> Answer:
    took: list[float] = []
    hits: list[dict[str, Any]] = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        hits = table.search(question).limit(limit).select([*COLUMNS, "_distance"]).to_list()
        took.append(1e3 * (time.perf_counter() - start))
    return Answer(question, hits, took[0], statistics.median(took[1:]))
