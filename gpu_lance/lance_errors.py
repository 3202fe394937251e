"""Lance's errors in our words and types."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from lance.commit import CommitConflictError as LanceConflict

from gpu_lance.errors import CommitConflictError, GpuLanceError, StorageError, TableExistsError

# pylance raises one and the same type for a bad question and for a bad file
_DAMAGE = re.compile(
    r"^(External error: )?Not found: |LanceError\((IO|CorruptFile)\)|not appear to be a Lance file"
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


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Raise a file that is missing or damaged as a `StorageError`, and let others pass.

    Raises
    ------
    StorageError

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


@contextlib.contextmanager
def writing(name: str) -> Iterator[None]:
    """Raise what Lance says about a write to the table `name` as our exceptions.

    Raises
    ------
    CommitConflictError, TableExistsError, StorageError
    """
    try:
        yield
    except (OSError, ValueError, LanceConflict) as error:
        text = str(error)
        if isinstance(error, GpuLanceError):
            raise
        if isinstance(error, LanceConflict):
            raise CommitConflictError(
                f"Table '{name}': another writer changed the same rows, and nothing was written "
                f"({first_line(error)}). Try again."
            ) from error
        if is_damage(error):
            raise StorageError(
                f"Table '{name}' cannot be written: {first_line(error)}. Nothing was changed; "
                "look at the folder's permissions, the space that is left, and the table's files."
            ) from error
        if "Invalid user input" in text:
            raise
        if "conflict" in text.lower():
            raise CommitConflictError(
                f"Table '{name}': another writer changed the same rows, and nothing was written "
                f"({first_line(error)}). Try again."
            ) from error
        if "already exists" in text:
            raise TableExistsError(f"Table '{name}' already exists") from error
        raise
