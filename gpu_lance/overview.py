"""What there is: the device, the libraries, and what a database holds; no model is loaded."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_lance import __version__
from gpu_lance import device as devices
from gpu_lance.errors import BadInputError, MissingExtraError, TableNotFoundError
from gpu_lance.index.budget import Budget
from gpu_lance.optional import require

if TYPE_CHECKING:
    from gpu_lance.db import LanceDBConnection
    from gpu_lance.table import Table

# Distributions, not modules: three of them bring the module faiss, of which one may be there.
LIBRARIES = (
    "numpy",
    "pyarrow",
    "pylance",
    "torch",
    "faiss-cpu",
    "faiss-gpu",
    "faiss-gpu-cuvs",
    "sentence-transformers",
    "transformers",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "triton",
)


def system(device: str = "auto", memory_budget: str | None = None) -> dict[str, Any]:
    """The device that would be used, and the versions of what is installed.

    Parameters
    ----------
    device : str
        ``"auto"``, ``"cpu"``, ``"cuda"``, ...
    memory_budget : str, optional
        As in :func:`gpu_lance.connect`.

    Returns
    -------
    dict
        ``gpu_lance``, ``python`` and ``platform`` (str), ``device`` (dict of ``name``, which is
        None without torch, ``reason``, ``free_bytes`` and ``budget_bytes``, the limit of what
        resident vectors take, if there is one), ``libraries`` (version by name).

    Raises
    ------
    DeviceError
        If the named device is not there.
    BadInputError
        If the budget is no size.

    Examples
    --------
    >>> system("cpu")["device"]["name"]
    'cpu'
    """
    return {
        "gpu_lance": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": _device(device, memory_budget),
        "libraries": libraries(),
    }


def libraries() -> dict[str, str]:
    """The version of each library that matters here and is installed; none is imported.

    Examples
    --------
    >>> "numpy" in libraries()
    True
    """
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _device(wanted: str, memory_budget: str | None) -> dict[str, Any]:
    try:
        used = devices.resolve_device(wanted)
    except MissingExtraError as error:
        return {"name": None, "reason": str(error), "free_bytes": None, "budget_bytes": None}
    if used.type == "cuda":
        reason = require("torch", extra="cuda13|cuda12").cuda.get_device_name(used)
    elif wanted == "auto":
        reason = devices.why_no_cuda()  # None if the environment asked for it
    else:
        reason = None
    reason = reason or "as asked for"
    budget = Budget.of(used) if memory_budget is None else Budget(used, memory_budget)
    return {
        "name": str(used),
        "reason": reason,
        "free_bytes": devices.free_memory(used),
        "budget_bytes": budget.limit,
    }


def describe(table: Table) -> dict[str, Any]:
    """A table's rows, version, columns and embedding functions, as plain values.

    Parameters
    ----------
    table : Table

    Returns
    -------
    dict
        ``name``, ``path``, ``rows``, ``version``, ``columns`` (``name``, ``type``; of vectors also
        ``dims`` and ``metric``), ``embedding_functions`` (``vector_column``, ``source_column``,
        ``name``, ``model``, ``template`` where there is one, and ``error`` where one cannot be
        made here).

    Examples
    --------
    >>> import gpu_lance
    >>> table = gpu_lance.connect("memory://").create_table("t", [{"vector": [0.0, 1.0]}])
    >>> describe(table)["columns"]
    [{'name': 'vector', 'type': 'fixed_size_list<item: float>[2]', 'dims': 2, 'metric': 'l2'}]
    """
    from gpu_lance.embeddings import get_registry
    from gpu_lance.embeddings.unavailable import UnavailableFunction

    functions = []
    for config in table.embedding_functions.values():
        stored = get_registry().function_to_metadata(config)
        if isinstance(config.function, UnavailableFunction):
            stored["error"] = str(config.function.error)
        functions.append(stored)
    return {
        "name": table.name,
        "path": table.uri,
        "rows": table.count_rows(),
        "version": table.version,
        "columns": [_column(table, field) for field in table.schema],
        "embedding_functions": functions,
    }


def _column(table: Table, field: Any) -> dict[str, Any]:
    from gpu_lance.ingest.lists import vector_length

    shown = {"name": field.name, "type": str(field.type)}
    ndims = vector_length(field.type)
    if ndims is None:
        return shown
    return {**shown, "dims": ndims, "metric": str(table.default_metric(field.name))}


def open_database(
    uri: str, device: str = "auto", memory_budget: str | None = None
) -> LanceDBConnection:
    """Connect to a database that is there already.

    Raises
    ------
    BadInputError
        If there is no such folder, or it is a file or a table, or the budget is no size.
    """
    from gpu_lance.db import connect

    if "://" not in uri:
        folder = Path(uri).expanduser()
        if folder.is_dir() and folder.suffix == ".lance":
            raise BadInputError(
                f"{uri!r} is a table; give the folder that it is in and its name: "
                f"{str(folder.parent)!r} {folder.stem!r}."
            )
        if not folder.exists():
            raise BadInputError(f"There is no folder {uri!r}; `gpu-lance demo` makes 'demo_db'.")
    return connect(uri, device=device, memory_budget=memory_budget)


def open_table(connection: LanceDBConnection, name: str) -> Table:
    """Open a table.

    Raises
    ------
    TableNotFoundError
        If there is none of that name; the message names those that there are.
    """
    try:
        return connection.open_table(name)
    except TableNotFoundError as error:
        names = ", ".join(connection.table_names()) or "no tables"
        raise TableNotFoundError(
            f"Table '{name}' was not found in {connection.uri!r}, which has {names}."
        ) from error


def tables(connection: LanceDBConnection, name: str | None = None) -> list[dict[str, Any]]:
    """What :func:`describe` says of one table or of all.

    Of all of them, one that cannot be read does not hide the others: it has ``name`` and ``error``
    only.
    """
    if name is not None:
        return [describe(open_table(connection, name))]
    found = []
    for each in connection.table_names():
        try:
            found.append(describe(connection.open_table(each)))
        except Exception as error:  # whatever Lance makes of a damaged file
            found.append({"name": each, "error": f"{type(error).__name__}: {error}"})
    return found
