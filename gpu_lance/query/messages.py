"""Lance's errors about a query, in our words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from gpu_lance.errors import GpuLanceError, QueryError
from gpu_lance.lance_errors import first_line, reading


@contextmanager
def refused(what: str, names: Sequence[str]) -> Iterator[None]:
    """Raise what Lance refuses as a `QueryError` that names the part and the table's columns.

    Parameters
    ----------
    what : str
        The part of the query that is being run, e.g. ``"filter"``.
    names : sequence of str
        The table's columns.

    Raises
    ------
    QueryError
    StorageError
        If the table's files are damaged, whatever was asked.

    Examples
    --------
    >>> with refused("filter", ["id"]):
    ...     raise ValueError("No field named x. Valid fields are __id.")
    Traceback (most recent call last):
    gpu_lance.errors.QueryError: The filter cannot be run: No field named x. The columns are: id.
    """
    try:
        with reading():
            yield
    except GpuLanceError:
        raise
    except (ValueError, OSError) as error:
        # Lance names the columns of a dataset that may not be the table
        line = first_line(error).split(" Valid fields are ")[0].rstrip(".")
        raise QueryError(
            f"The {what} cannot be run: {line}. The columns are: {', '.join(names)}."
        ) from error
