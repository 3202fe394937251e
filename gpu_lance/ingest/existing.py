"""Whether what a caller describes is a table that is there already."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from gpu_lance.embeddings import EmbeddingFunctionConfig, get_registry
from gpu_lance.embeddings.variables import mask
from gpu_lance.errors import SchemaError
from gpu_lance.ingest.lists import is_multivector_type, vector_length

Configs = Mapping[str, EmbeddingFunctionConfig]


def check_same(
    name: str, there: tuple[pa.Schema, Configs], given: tuple[pa.Schema, Configs]
) -> None:
    """Refuse to take a table for one with other columns or other embedding functions.

    Whether a column takes nulls is not compared, nor are the session arguments of functions.

    Parameters
    ----------
    name : str
        The table's.
    there : (pyarrow.Schema, mapping of str to EmbeddingFunctionConfig)
        What it has.
    given : (pyarrow.Schema, mapping of str to EmbeddingFunctionConfig)
        What the caller expects.

    Raises
    ------
    SchemaError
        It names what differs.

    Examples
    --------
    >>> schema = pa.schema({"n": pa.int64()})
    >>> check_same("t", (schema, {}), (schema, {}))
    >>> check_same("t", (schema, {}), (pa.schema({"n": pa.string()}), {}))
    Traceback (most recent call last):
    gpu_lance.errors.SchemaError: Table 't' already exists, and column 'n' is int64 in it and \
string in what was given. Open it as it is with open_table, or replace it with mode='overwrite'.
    """
    differs = _columns(there[0], given[0]) or _functions(there[1], given[1])
    if differs:
        raise SchemaError(
            f"Table {name!r} already exists{differs}. Open it as it is with open_table, or replace "
            "it with mode='overwrite'."
        )


def _columns(there: pa.Schema, given: pa.Schema) -> str:
    if there.names != given.names:
        return (
            f" with the columns {', '.join(there.names)}, and what was given has "
            f"{', '.join(given.names)}"
        )
    for old, new in zip(there, given, strict=True):
        if _form(old.type) != _form(new.type):
            return f", and column {old.name!r} is {old.type} in it and {new.type} in what was given"
    return ""


def _form(kind: pa.DataType) -> Any:
    """What two types that hold the same values have in common."""
    ndims = vector_length(kind)
    if ndims is not None:  # the name of what is in a list says nothing
        vector = kind.value_type if is_multivector_type(kind) else kind
        return (ndims, is_multivector_type(kind), vector.value_type)
    # Lance stores views as what they are views of
    return str(kind).replace(" not null", "").replace("_view", "")


def _functions(there: Configs, given: Configs) -> str:
    for column in sorted({*there, *given}):
        old, new = _entry(column, there, given), _entry(column, given, there)
        if old == new:
            continue
        told = f", and the embedding function of column {column!r} differs: "
        if not old or not new:
            has, lacks = ("the table", "what was given") if old else ("what was given", "the table")
            made = _made(old or new)
            return f"{told}{has} has {made}, and {lacks} has none"
        if _made(old) != _made(new):
            return f"{told}the table has {_made(old)}, and what was given has {_made(new)}"
        return told + _arguments(
            old["model"], new["model"], given[column].function.sensitive_keys()
        )
    return ""


def _entry(column: str, configs: Configs, others: Configs) -> dict[str, Any]:
    """What a table stores of a column's function, without what belongs to a session."""
    if column not in configs:
        return {}
    # as JSON, which knows no tuples
    entry = json.loads(json.dumps(get_registry().function_to_metadata(configs[column])))
    left_out = set[str]()
    for function in [side[column].function for side in (configs, others) if column in side]:
        left_out |= function.session_arguments | function.unsafe_arguments
    model = {key: value for key, value in (entry["model"] or {}).items() if key not in left_out}
    return {**entry, "model": model}


def _made(entry: Mapping[str, Any]) -> str:
    source = entry["source_column"]
    text = f"the template {entry['template']!r}" if "template" in entry else f"column {source!r}"
    return f"{entry['name']!r} of {text}"


def _arguments(old: Mapping[str, Any], new: Mapping[str, Any], sensitive: list[str]) -> str:
    shown = [mask(side, sensitive) for side in (old, new)]
    parts = []
    for key in sorted({*old, *new}):
        if key in old and key in new and old[key] == new[key]:
            continue
        was, now = (f"{side[key]!r}" if key in side else "not set" for side in shown)
        parts.append(f"its argument {key} is {was} in the table and {now} in what was given")
    return ", ".join(parts)
