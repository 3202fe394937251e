"""Which tables there are in a place: a local folder, an object store, or memory."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu_lance.errors import BadInputError, StorageError, TableNotFoundError
from gpu_lance.lance_errors import first_line

SUFFIX = ".lance"
SIDECARS = ".gpu_lance"
LONGEST = 240  # file systems take names of 255 bytes, of which the suffix has some


def checked_name(name: Any) -> str:
    """The name of a table, if it is one.

    Raises
    ------
    BadInputError
        A ValueError, unless it consists of at most 240 letters, digits, ``_``, ``-`` and ``.``.

    Examples
    --------
    >>> checked_name("my-table")
    'my-table'
    """
    if isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_.-]+", name) and name.strip("."):
        if len(name) <= LONGEST:
            return name
        raise BadInputError(
            f"A name for a table has at most {LONGEST} characters; {name[:20]}... has {len(name)}."
        )
    raise BadInputError(
        f"{name!r} is no name for a table: it is made of letters, digits, '_', '-' and '.'."
    )


class FolderCatalog:
    """Tables in a local folder: each the sub-folder ``<name>.lance``.

    Parameters
    ----------
    root : str
        The folder; it need not exist yet.
    """

    def __init__(self, root: str) -> None:
        try:
            if b"\0" in os.fsencode(root):
                raise ValueError("it has a NUL character")
        except ValueError as error:  # a lone surrogate is the other
            raise BadInputError(f"{root!r} is no path: {error}.") from error
        self._root = Path(os.path.abspath(os.path.expanduser(root)))
        there = next(path for path in (self._root, *self._root.parents) if os.path.exists(path))
        if not there.is_dir():
            raise BadInputError(f"{str(there)!r} is a file; a database is a folder.")

    def uri(self, name: str) -> str:
        """Where that table is, or would be."""
        return str(self._root / (checked_name(name) + SUFFIX))

    def names(self) -> list[str]:
        """Every table, sorted."""
        try:
            with os.scandir(self._root) as entries:
                return sorted(
                    entry.name.removesuffix(SUFFIX)
                    for entry in entries
                    # a folder without versions is what a writer left that was killed at once
                    if entry.name.endswith(SUFFIX)
                    and os.path.isdir(os.path.join(entry.path, "_versions"))
                )
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageError(f"The tables in {self._root} cannot be listed: {error}") from error

    def drop(self, name: str) -> None:
        """Delete a table's folder and what the index keeps beside it.

        Raises
        ------
        TableNotFoundError
            If there is no such table.
        """
        path = Path(self.uri(name))
        if not path.is_dir():
            raise TableNotFoundError(f"Table '{name}' was not found")
        try:
            if path.is_symlink():
                path.unlink()
            else:
                shutil.rmtree(path)
        except OSError as error:
            raise StorageError(f"Table '{name}' cannot be dropped: {error}") from error
        # through a link it would delete what is not the database's
        if not (self._root / SIDECARS).is_symlink():
            shutil.rmtree(self._root / SIDECARS / name, ignore_errors=True)


class StoreCatalog:
    """Tables in an object store, listed and dropped through Lance.

    Parameters
    ----------
    root : str
        E.g. ``s3://bucket/folder``.
    storage_options : mapping of str to str, optional
        Lance's, e.g. credentials and region.
    """

    def __init__(self, root: str, storage_options: Mapping[str, str] | None) -> None:
        self._root = root.rstrip("/")
        self._options = dict(storage_options or {})

    def uri(self, name: str) -> str:
        """Where that table is, or would be."""
        return f"{self._root}/{checked_name(name)}{SUFFIX}"

    def _namespace(self) -> Any:
        from lance.namespace import DirectoryNamespace

        options = {f"storage.{key}": value for key, value in self._options.items()}
        return DirectoryNamespace(root=self._root, manifest_enabled="false", **options)

    def names(self) -> list[str]:
        """Every table, sorted."""
        from lance_namespace import ListTablesRequest
        from lance_namespace.errors import LanceNamespaceError

        try:
            return sorted(self._namespace().list_tables(ListTablesRequest(id=[])).tables)
        except (LanceNamespaceError, OSError, RuntimeError, ValueError) as error:
            raise StorageError(
                f"The tables in {self._root} cannot be listed: {first_line(error)}"
            ) from error

    def drop(self, name: str) -> None:
        """Delete a table.

        Raises
        ------
        TableNotFoundError
            If there is no such table.
        """
        from lance_namespace import DropTableRequest

        if name not in self.names():
            raise TableNotFoundError(f"Table '{name}' was not found")
        try:
            self._namespace().drop_table(DropTableRequest(id=[name]))
        except RuntimeError as error:
            raise TableNotFoundError(f"Table '{name}': {first_line(error)}") from error
