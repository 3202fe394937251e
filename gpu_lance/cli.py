"""The command ``gpu-lance``: index and search the demonstration, look into a database, search it.

Results go to stdout, with ``--json`` one JSON document; progress, notes and errors go to stderr.
The exit code is 0, 1 after a failure, 2 for a wrong command line and 130 after Ctrl-C.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpu_lance import __version__
from gpu_lance.errors import BadInputError, GpuLanceError
from gpu_lance.types import Metric

if TYPE_CHECKING:
    from gpu_lance.demo import Report

logger = logging.getLogger(__name__)

app = typer.Typer(
    name="gpu-lance",
    help="Embed text and search it over Lance tables, on the GPU or without one.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

SHOWN = 300  # characters of a value on a terminal

JsonOption = Annotated[
    bool, typer.Option("--json", help="Write one JSON document to stdout, and nothing else there.")
]
DeviceOption = Annotated[
    str,
    typer.Option(
        help="Where to embed and search: auto, cpu, cuda, cuda:1, mps. A named device must be "
        "there; auto falls back to the CPU."
    ),
]


def _budget(value: str | None) -> str | None:
    """Refuse what is no size, before any work."""
    from gpu_lance.index.sizes import parse_bytes

    if value is not None:
        try:
            parse_bytes(value, lambda: 0, "it")
        except BadInputError as error:
            raise typer.BadParameter(str(error)) from error
    return value


BudgetOption = Annotated[
    str | None,
    typer.Option(
        "--memory-budget",
        help="The most memory that resident vectors take on the device: 8GiB, 500MB, 50%.",
        callback=_budget,
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gpu-lance {__version__}")
        raise typer.Exit


@app.callback()
def main(
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show the log and, of failures, the traceback.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if verbose:
        logging.basicConfig(level=logging.DEBUG, stream=sys.stderr, force=True)
        for name in list(logging.root.manager.loggerDict):
            if not name.startswith("gpu_lance"):
                logging.getLogger(name).setLevel(logging.INFO)


def _text(value: str | None) -> str | None:
    """Refuse an empty text and one that is not UTF-8, before any work."""
    from gpu_lance.demo import check_question

    if value is not None:
        try:
            check_question(value)
        except BadInputError as error:
            raise typer.BadParameter(str(error)) from error
    return value


def _texts(values: list[str] | None) -> list[str]:
    for value in values or []:
        _text(value)
    return values or []


@app.command()
def demo(
    questions: Annotated[
        list[str] | None,
        typer.Argument(help="Questions to answer besides the built-in ones.", callback=_texts),
    ] = None,
    db: Annotated[Path, typer.Option(help="The folder to make the table in.")] = Path("demo_db"),
    device: DeviceOption = "auto",
    memory_budget: BudgetOption = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Answers a question.")] = 3,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Index only so many passages, for a quick look.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Index again.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Index the text of Python's own help and answer questions about it.

    The table stays; a second run finds it and only answers.
    """
    with _failing(as_json):
        from gpu_lance.demo import run

        with _progress_bar() as progress:
            report = run(
                questions or (),
                db=db,
                device=device,
                memory_budget=memory_budget,
                fresh=fresh,
                limit=limit,
                rows=rows,
                progress=progress,
                note=_note,
            )
    with _failing(False):
        if as_json:
            _write_json(report.to_dict())
        else:
            _show_demo(report)


@app.command()
def info(
    db: Annotated[str | None, typer.Argument(help="A folder of tables, or its URI.")] = None,
    table: Annotated[str | None, typer.Argument(help="Only this table.")] = None,
    device: DeviceOption = "auto",
    memory_budget: BudgetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the device, the libraries, and what a database holds."""
    with _failing(as_json):
        from gpu_lance import overview

        found = overview.system(device, memory_budget)
        if db is not None:
            with overview.open_database(db, device, memory_budget) as connection:
                found["database"] = db
                found["tables"] = overview.tables(connection, table)
    with _failing(False):
        if as_json:
            _write_json(found)
        else:
            _show_info(found)
    broken = [entry for entry in found.get("tables", ()) if "error" in entry]
    if broken:
        for entry in broken:
            _say(f"error: table {entry['name']!r} cannot be read: {_plain_text(entry['error'])}")
        raise typer.Exit(1)


@app.command()
def search(
    db: Annotated[str, typer.Argument(help="A folder of tables, or its URI.")],
    table: Annotated[str, typer.Argument(help="The table to search.")],
    query: Annotated[
        str,
        typer.Argument(help="A text to embed; with --vector a list of numbers.", callback=_text),
    ],
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Rows to return.")] = 10,
    column: Annotated[
        str | None,
        typer.Option("--column", "-c", help="The vector column, where there are several."),
    ] = None,
    where: Annotated[
        str | None, typer.Option("--where", "-w", help="An SQL condition that rows must meet.")
    ] = None,
    select: Annotated[
        list[str] | None,
        typer.Option(
            "--select", "-s", help="A column to return; may be repeated. All but vectors otherwise."
        ),
    ] = None,
    distance_type: Annotated[
        Metric | None,
        typer.Option("--distance-type", "-d", help="The table's own otherwise."),
    ] = None,
    vector: Annotated[
        bool, typer.Option("--vector", help='QUERY is a vector, such as "[0.5, 1]".')
    ] = False,
    device: DeviceOption = "auto",
    memory_budget: BudgetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Return the rows of a table that are nearest to a query."""
    wanted = _vector(query) if vector else query
    from gpu_lance import overview

    with _failing(as_json), overview.open_database(db, device, memory_budget) as connection:
        used = str(connection.device)
        opened = overview.open_table(connection, table)
        start = time.perf_counter()
        builder: Any = opened.search(wanted, column).limit(limit)
        if where is not None:
            builder = builder.where(where)
        if distance_type is not None:
            builder = builder.distance_type(distance_type)
        hits = builder.select([*_columns(opened, select), "_distance"]).to_list()
        took = 1e3 * (time.perf_counter() - start)
        found = {
            "database": db,
            "table": table,
            "version": opened.version,
            "rows": opened.count_rows(),
            "device": used,
            "held": [
                {"column": name, **{key: info[key] for key in ("step", "plan", "bytes")}}
                for name, info in opened.resident_columns().items()
            ],
            "query": query,
            "took_ms": took,
            "hits": hits,
        }
    with _failing(False):
        if as_json:
            _write_json(found)
            return
        names = list(hits[0]) if hits else []
        names = ["_distance", *(name for name in names if name != "_distance")]
        _show_table(names, [[hit[name] for name in names] for hit in hits])
        count = _count(len(hits), "row")
        _note(f"{count} of {found['rows']} in {took:.0f} ms on {used}, loading included")
        for held in found["held"]:
            if held["step"] != "float32":
                _note(f"{held['column']}: {held['plan']}")


def _columns(table: Any, select: list[str] | None) -> list[str]:
    from gpu_lance.ingest.lists import vector_length

    if select:
        return [name for name in dict.fromkeys(select) if name != "_distance"]
    return [field.name for field in table.schema if vector_length(field.type) is None]


def _vector(text: str) -> list[float]:
    try:
        numbers = json.loads(text)
        if not isinstance(numbers, list):  # a dict would give its keys
            raise TypeError
        return [float(number) for number in numbers]
    except (ValueError, TypeError, RecursionError) as error:
        raise typer.BadParameter(
            f"with --vector the query is a list of numbers, such as '[0.5, 1]', got {text[:60]!r}.",
            param_hint="QUERY",
        ) from error


# ------------------------------------------------------------------ failing


@contextlib.contextmanager
def _failing(as_json: bool) -> Iterator[None]:
    """Turn what goes wrong into one line on stderr and an exit code."""
    try:
        # whatever a library prints must not end up in the document
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            yield
    except KeyboardInterrupt:
        _say("interrupted")
        raise typer.Exit(130) from None
    except BrokenPipeError:
        raise
    except Exception as error:
        logger.debug("the traceback:", exc_info=True)
        _say(f"error: {_one_line(error)}")
        raise typer.Exit(1) from None


def _one_line(error: BaseException) -> str:
    text = _plain_text(str(error)) or type(error).__name__
    # only our own messages are sentences that stand alone
    return text if isinstance(error, GpuLanceError) else f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def _progress_bar() -> Iterator[Any]:
    """A function of rows done and rows in all, which shows a bar from its first call on."""
    from tqdm.auto import tqdm

    bar: Any = None

    def progress(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            slow = 0.1 if sys.stderr.isatty() else 1.0
            bar = tqdm(total=total, unit="row", file=sys.stderr, mininterval=slow, leave=True)
        bar.update(done - bar.n)

    try:
        yield progress
    finally:
        if bar is not None:
            bar.close()


# ------------------------------------------------------------------ printing


def _say(text: str) -> None:
    typer.echo(f"gpu-lance: {text}", err=True)


def _note(text: str) -> None:
    typer.echo(text, err=True)


def _write_json(document: Any) -> None:
    typer.echo(json.dumps(_plain(document), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    """The value in JSON's types: times and decimals as text, bytes as base64, NaN as null."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (bytes, bytearray)):
        import base64

        return base64.b64encode(value).decode("ascii")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _plain_text(text: str) -> str:
    """The text on one line, without the control characters that could steer a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in _words(text))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _words(text: str) -> str:
    return " ".join(text.split())


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (bytes, bytearray)):
        return f"{len(value)} bytes"
    return _plain_text(str(value))


def _show_table(names: list[str], rows: list[list[Any]]) -> None:
    """A table: drawn on a terminal, else a line a row with tabs between the values."""
    cells = [[_cell(value) for value in row] for row in rows]
    if not sys.stdout.isatty():
        for row in [names, *cells] if rows else []:
            typer.echo("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name in names:
        drawn.add_column(Text(name), overflow="fold")
    for row in cells:
        drawn.add_row(*(Text(textwrap.shorten(cell, SHOWN, placeholder=" ...")) for cell in row))
    Console().print(drawn)


def _show_demo(report: Report) -> None:
    python = ".".join(report.python.split(".")[:2])
    made = (
        "there already (--fresh indexes again)"
        if report.index_s is None
        else f"{report.index_s:.1f} s, {report.rows_per_s:.0f} rows/s"
    )
    lines = {
        "text": f"{report.rows} passages of Python {python}'s help",
        "table": f"{report.path}, version {report.version}",
        "device": f"{report.device}, {report.engine}",
        "model": f"{report.model}, {report.dims} dimensions, ready in {report.model_load_s:.1f} s",
        "indexed": made,
        "search": f"{report.search_ms:.1f} ms a question, embedding it included (median)",
    }
    for name, text in lines.items():
        typer.echo(f"{name:8} {text}")
    for answer in report.answers:
        typer.echo(f"\n{_plain_text(answer.question)}")
        for hit in answer.hits:
            typer.echo(f"  {hit['_distance']:.3f}  {hit['topic']}: {_plain_text(hit['title'])}")
            for line in textwrap.wrap(textwrap.shorten(hit["text"], SHOWN, placeholder=" ..."), 88):
                typer.echo(f"         {line}")
    here = shlex.join([_command(), "search", report.database, report.table])
    typer.echo(f'\nAsk more: {here} "your question"')


def _command() -> str:
    """How this command can be called again: by its path, where the shell does not find it."""
    path = sys.argv[0]
    found = Path(path).stem == "gpu-lance" and shutil.which("gpu-lance") != path
    return path if found else "gpu-lance"


def _show_info(found: dict[str, Any]) -> None:
    from gpu_lance.index.sizes import show_bytes

    device = found["device"]
    free = device["free_bytes"]
    memory = "" if free is None else f", {free / 2**30:.1f} GiB free"
    if device["budget_bytes"] is not None:
        memory += f", {show_bytes(device['budget_bytes'])} for resident vectors"
    typer.echo(f"gpu-lance {found['gpu_lance']}, Python {found['python']}, {found['platform']}")
    typer.echo(f"device    {device['name'] or 'none'} ({device['reason']}){memory}")
    versions = (f"{name} {version}" for name, version in found["libraries"].items())
    typer.echo(f"libraries {', '.join(versions)}")
    if "tables" not in found:
        return
    tables = [table for table in found["tables"] if "error" not in table]
    typer.echo(f"database  {found['database']}, {_count(len(found['tables']), 'table')}\n")
    for table in tables:
        rows = _count(table["rows"], "row")
        typer.echo(f"{table['name']}: {rows}, version {table['version']}, {table['path']}")
        sources = {entry["vector_column"]: entry for entry in table["embedding_functions"]}
        names = ["column", "type", "metric", "made from", "by"]
        _show_table(names, [_column_row(c, sources.get(c["name"])) for c in table["columns"]])
        typer.echo("")


def _column_row(column: dict[str, Any], function: dict[str, Any] | None) -> list[Any]:
    row = [column["name"], column["type"], column.get("metric")]
    if function is None:
        return [*row, None, None]
    model = ", ".join(f"{name}={value}" for name, value in (function.get("model") or {}).items())
    by = f"{function.get('name')}({model})"
    if "error" in function:
        by += f": {function['error']}"
    template = function.get("template")
    return [*row, function["source_column"] if template is None else repr(template), by]


if __name__ == "__main__":
    app()
