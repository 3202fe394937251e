"""The form in which a table's schema metadata names its embedding functions.

It is LanceDB's: under the key ``embedding_functions`` the JSON of a list of objects with ``name``,
``model`` (the arguments of ``create``), ``source_column`` and ``vector_column``. A ``template`` of
several columns is a key of ours beside them, and ``source_column`` is then its first column.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpu_lance.embeddings.base import EmbeddingFunction, EmbeddingFunctionConfig
from gpu_lance.embeddings.unavailable import UnavailableFunction
from gpu_lance.errors import SchemaError, UnknownProviderError

logger = logging.getLogger(__name__)

METADATA_KEY = "embedding_functions"


def read(
    metadata: Mapping[Any, Any] | None, get: Callable[[str], type[EmbeddingFunction]]
) -> dict[str, EmbeddingFunctionConfig]:
    """Make the functions that schema metadata names, by vector column; `get` finds a class.

    A function that cannot be made becomes an UnavailableFunction.

    Raises
    ------
    SchemaError
        If the metadata is not JSON of the right form.
    """
    metadata = metadata or {}
    stored = metadata.get(METADATA_KEY.encode(), metadata.get(METADATA_KEY))
    if stored is None:
        return {}
    configs: dict[str, EmbeddingFunctionConfig] = {}
    for entry in _entries(stored):
        column = entry["vector_column"]
        if column in configs:
            logger.warning(
                "Column %r has several embedding functions in the table's metadata; the last one "
                "counts.",
                column,
            )
        configs[column] = _config(entry, get)
    return configs


def entry_of(
    conf: EmbeddingFunctionConfig, name_of: Callable[[type[EmbeddingFunction]], str]
) -> dict[str, Any]:
    """Return what a table stores of one function; `name_of` gives the name of a class."""
    columns = {"source_column": conf.source_column, "vector_column": conf.vector_column}
    if conf.template is not None:
        columns["template"] = conf.template
    if isinstance(conf.function, UnavailableFunction):
        return {**conf.function.entry, **columns}
    name = name_of(type(conf.function))
    return {"name": name, "model": conf.function.safe_model_dump(), **columns}


def write(
    configs: Sequence[EmbeddingFunctionConfig] | None,
    name_of: Callable[[type[EmbeddingFunction]], str],
) -> dict[str, bytes] | None:
    """Return the schema metadata for functions; None if there are none."""
    if not configs:
        return None
    entries = [entry_of(conf, name_of) for conf in configs]
    return {METADATA_KEY: json.dumps(entries, indent=2).encode("utf-8")}


def _entries(stored: Any) -> list[dict[str, Any]]:
    """Parse the stored JSON and check its form."""
    try:
        entries = json.loads(stored)
    except (ValueError, TypeError, RecursionError) as error:
        raise SchemaError(
            f"The table's schema metadata {METADATA_KEY!r} is not JSON ({error}); write it again "
            "or remove that key."
        ) from None
    columns = ("vector_column", "source_column")
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in columns)
        for entry in entries
    ):
        raise SchemaError(
            f"The table's schema metadata {METADATA_KEY!r} must be a list of objects, each with "
            "'name', 'model', 'source_column' and 'vector_column'."
        )
    return entries


def _config(
    entry: dict[str, Any], get: Callable[[str], type[EmbeddingFunction]]
) -> EmbeddingFunctionConfig:
    column, source = entry["vector_column"], entry["source_column"]
    function = _revive(entry, get)
    try:
        return EmbeddingFunctionConfig(
            vector_column=column,
            source_column=source,
            function=function,
            template=entry.get("template"),
        )
    except SchemaError as error:
        # what a table says of itself must not keep it from being opened
        logger.warning("The embedding function of column %r cannot be used: %s", column, error)
        broken = UnavailableFunction.from_entry(entry, error)
        return EmbeddingFunctionConfig(vector_column=column, source_column=source, function=broken)


def _revive(
    entry: dict[str, Any], get: Callable[[str], type[EmbeddingFunction]]
) -> EmbeddingFunction:
    name, column = entry.get("name"), entry["vector_column"]
    try:
        if not isinstance(entry.get("model"), dict):
            raise SchemaError(
                f"The embedding function of column {column!r} was stored without its 'model', so "
                "its arguments are not known; set it again."
            )
        cls = get(name)  # type: ignore[arg-type]  # anything but a string is unknown to it
        return cls.from_stored(entry["model"])
    except Exception as error:
        # a search by vector needs no function, so the table must still open
        if isinstance(error, UnknownProviderError):
            error = UnknownProviderError(
                f"Column {column!r} of the table is embedded by {name!r}, and no function of that "
                f"name is registered here: import the module that defines it first. ({error})"
            )
        logger.info(
            "The embedding function %r of column %r is not available (%s).",
            name,
            column,
            type(error).__name__,
        )
        return UnavailableFunction.from_entry(entry, error)
