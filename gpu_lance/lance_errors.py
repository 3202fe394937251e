"""Lance's errors in our words and types."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from lance.commit import CommitConflictError as LanceConflict

from gpu_lance.errors import (
    CommitConflictError,
    GpuLanceError,
    QueryError,
    SchemaError,
    StorageError,
    TableExistsError,
)

T = TypeVar("T")

# pylance raises one and the same type for a bad question and for a bad file
_DAMAGE = re.compile(
    r"^(External error: )?Not found: |LanceError\((IO|CorruptFile)\)|not appear to be a Lance file"
    r"|task \d+ panicked"
)
_PANIC = re.compile(r"task \d+ panicked")  # a decoder's at a bad file, or a bad question's
_QUESTION = re.compile(
    r"Invalid user input|Query Execution error|LanceError\(Arrow\)|^Not supported: "
)


def first_line(error: BaseException) -> str:
    """The first line of a Lance message, without the place in Lance's source that follows it.

    Examples
    --------
    >>> first_line(ValueError("no such column, /home/runner/x.rs:1:2"))
    'no such column'
    """
    lines = str(error).splitlines()
    text = lines[0] if lines else type(error).__name__
    text = text.split(", /home/")[0].split(", /rust")[0]
    text = re.sub(r"^(External error: )?(LanceError\(\w+\): )?", "", text)
    return text.removeprefix("Invalid user input: ").strip().rstrip(".")


def is_damage(error: BaseException) -> bool:
    """Whether the message means that a table's files cannot be read, whatever was asked.

    Examples
    --------
    >>> is_damage(ValueError("External error: Not found: x/data/1.lance"))
    True
    >>> is_damage(ValueError("Invalid user input: No field named x"))
    False
    """
    return _DAMAGE.search(str(error)) is not None


def is_question(error: BaseException) -> bool:
    """Whether the message means that what was asked cannot be run, over files that are whole.

    Examples
    --------
    >>> is_question(OSError("Query Execution error: Arrow error: Divide by zero error"))
    True
    >>> is_question(OSError("LanceError(IO): Permission denied"))
    False
    """
    asked = isinstance(error, ValueError) or _QUESTION.search(str(error)) is not None
    return asked and not is_damage(error)


def is_panic(error: BaseException) -> bool:
    """Whether Lance gave up inside; its own exception for that is no `Exception`.

    Examples
    --------
    >>> is_panic(RuntimeError("Task was aborted")), is_panic(RuntimeError("no"))
    (True, False)
    """
    if isinstance(error, RuntimeError):
        return str(error) == "Task was aborted"
    return type(error).__name__ == "PanicException"


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Raise a file that is missing or damaged as a `StorageError`, and let others pass.

    Raises
    ------
    StorageError
    QueryError
        If Lance panics, which it does at SQL that it can parse and not run, such as ``N'text'``.

    Examples
    --------
    >>> with reading():
    ...     raise OSError("Not found: x/data/1.lance")
    Traceback (most recent call last):
    gpu_lance.errors.StorageError: The table's files cannot be read: Not found: x/data/1.lance. ...
    """
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, GpuLanceError) or not is_damage(error):
            raise
        raise StorageError(
            f"The table's files cannot be read: {first_line(error)}. Restore the file from a copy, "
            "or check out a version that does not need it."
        ) from error
    except BaseException as error:
        if not is_panic(error):
            raise
        raise QueryError(
            f"Lance cannot run what was asked ({first_line(error)}). Say it in other SQL; texts "
            "are written '...', without a letter before. Without SQL, a file is damaged."
        ) from error


def batches_of(scan: Callable[[], Iterable[T]]) -> Iterator[T]:
    """What a scan gives, batch by batch, each read under :func:`reading`.

    Parameters
    ----------
    scan : callable
        Begins the scan.

    Examples
    --------
    >>> list(batches_of(lambda: [1, 2]))
    [1, 2]
    """
    with reading():
        batches = iter(scan())
    while True:
        with reading():
            try:
                batch = next(batches)
            except StopIteration:
                return
        yield batch


@contextlib.contextmanager
def asking(what: str) -> Iterator[None]:
    """Raise what Lance does not understand of a caller's SQL as a `QueryError`.

    Parameters
    ----------
    what : str
        What was asked, for the message, e.g. ``"filter"``.

    Raises
    ------
    QueryError, StorageError

    Examples
    --------
    >>> with asking("filter"):
    ...     raise ValueError("No field named x.")
    Traceback (most recent call last):
    gpu_lance.errors.QueryError: The filter cannot be run: No field named x
    """
    try:
        with reading():
            try:
                yield
            except (ValueError, OSError) as error:
                if isinstance(error, GpuLanceError) or not _PANIC.search(str(error)):
                    raise
                raise QueryError(
                    f"The {what} cannot be run: {first_line(error)}. Say it in other SQL; if "
                    "nothing can be read, a file is damaged."
                ) from error
    except (ValueError, OSError) as error:
        if isinstance(error, GpuLanceError) or not is_question(error):
            raise
        raise QueryError(f"The {what} cannot be run: {first_line(error)}") from error


@contextlib.contextmanager
def writing(name: str) -> Iterator[None]:
    """Raise what Lance says about a write to the table `name` as our exceptions.

    Raises
    ------
    CommitConflictError, TableExistsError, StorageError

    Examples
    --------
    >>> with writing("t"):
    ...     raise OSError("Too many concurrent writers. Attempted 17 times")
    Traceback (most recent call last):
    gpu_lance.errors.CommitConflictError: Table 't': other writers were faster each time, ...
    """
    try:
        yield
    except (OSError, ValueError, LanceConflict) as error:
        text = str(error)
        if isinstance(error, GpuLanceError):
            raise
        conflict = isinstance(error, LanceConflict)
        if not conflict and is_damage(error):
            raise StorageError(
                f"Table '{name}' cannot be written: {first_line(error)}. Nothing was changed; "
                "look at the folder's permissions, the space that is left, and the table's files."
            ) from error
        if not conflict and "Invalid user input" in text:
            raise
        if "Too many concurrent writers" in text:
            raise CommitConflictError(
                f"Table '{name}': other writers were faster each time, and nothing was written "
                f"({first_line(error)}). Try again."
            ) from error
        if conflict or "conflict" in text.lower():
            raise CommitConflictError(
                f"Table '{name}': another writer changed the same rows, and nothing was written "
                f"({first_line(error)}). Try again."
            ) from error
        if "already exists" in text:
            raise TableExistsError(f"Table '{name}' already exists") from error
        raise


@contextlib.contextmanager
def storing() -> Iterator[None]:
    """Raise types that Lance cannot store, at some of which it panics, as a `SchemaError`.

    Raises
    ------
    SchemaError
    """
    try:
        yield
    except BaseException as error:
        if not is_panic(error) and "LanceError(Schema)" not in str(error):
            raise
        raise SchemaError(
            f"Lance cannot store these types ({first_line(error)}). Nothing was changed; give the "
            "columns other types."
        ) from error
