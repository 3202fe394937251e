"""What a search returns: which columns, made of what, in which order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpu_lance.errors import QueryError
from gpu_lance.query.sql import checked, words

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pyarrow as pa

DISTANCE = "_distance"
ROW_ID = "_rowid"
QUERY_INDEX = "query_index"
# columns that Lance has for every row without storing them
_VIRTUAL = {
    "_rowid",
    "_rowaddr",
    "_rowoffset",
    "_row_created_at_version",
    "_row_last_updated_at_version",
}


@dataclass(frozen=True)
class Projection:
    """The columns to read from Lance, and those to return.

    Parameters
    ----------
    read : tuple of str, or dict of str to str
        Names, or SQL by name, for Lance.
    output : tuple of str
        Names of the result's columns, in order; some are computed by the search.
    computed : frozenset of str
        Those of `output` that the search itself fills: the distance, the query, the row id.
    late : bool
        Whether an expression of `read` mentions a computed column, so that it can only be
        evaluated after the search.
    """

    read: tuple[str, ...] | dict[str, str]
    output: tuple[str, ...]
    computed: frozenset[str]
    late: bool = False


def quoted(path: str) -> str:
    """A column's name, or a dotted path into structs, as SQL.

    Examples
    --------
    >>> quoted("my col"), quoted("a.b")
    ('`my col`', '`a`.`b`')
    """
    return ".".join(f"`{part}`" for part in path.replace("`", "").split("."))


def project(
    columns: Mapping[str, str] | tuple[str, ...] | None,
    schema: pa.Schema,
    *,
    row_id: bool = False,
    distance: bool = False,
    query_index: bool = False,
) -> Projection:
    """Plan which columns are read and returned.

    Parameters
    ----------
    columns : mapping of str to str, or tuple of str, or None
        What was selected; nothing means every column.
    schema : pyarrow.Schema
        The table's.
    row_id, distance, query_index : bool
        Whether the search adds that column. The query comes first, then what was selected, then
        the distance unless it was selected itself, then the row id: LanceDB's order.

    Raises
    ------
    QueryError
        If a name is selected twice or is no column, or an expression is no SQL.

    Examples
    --------
    >>> import pyarrow as pa
    >>> schema = pa.schema({"id": pa.int64(), "name": pa.string()})
    >>> project(("name",), schema, row_id=True, distance=True).output
    ('name', '_distance', '_rowid')
    """
    added = {QUERY_INDEX: query_index, DISTANCE: distance, ROW_ID: row_id}
    computed = {name for name, wanted in added.items() if wanted}
    read: tuple[str, ...] | dict[str, str]
    if isinstance(columns, dict) and columns:
        given = list(columns)
        sql = {name: _expression(columns[name]) for name in given}
        # an alias wins over what the search would add, and `_distance` alone is no expression
        for name in given:
            if name == DISTANCE and sql[name].strip("()` ") != DISTANCE:
                computed.discard(DISTANCE)
        read = {name: text for name, text in sql.items() if name not in computed}
    else:
        given = list(columns) if columns else [n for n in schema.names if n not in computed]
        _check_names(given, schema, computed)
        names = tuple(name for name in given if name not in computed)
        plain = all(name in schema.names or name in _VIRTUAL for name in names)
        read = names if plain else {name: quoted(name) for name in names}
    order = [QUERY_INDEX] if query_index else []
    order += [name for name in given if name not in (QUERY_INDEX, ROW_ID) or name not in computed]
    if distance and DISTANCE not in order:
        order.append(DISTANCE)
    if row_id:
        order.append(ROW_ID)
    late = isinstance(read, dict) and any(
        words(text) & (computed - {ROW_ID} | ({DISTANCE} if distance else set()))
        for text in read.values()
    )
    return Projection(read, tuple(order), frozenset(computed), late)


def _expression(text: Any) -> str:
    text = text.to_sql() if hasattr(text, "to_sql") else text
    return checked(text, "expression")


def _check_names(names: list[str], schema: pa.Schema, computed: set[str]) -> None:
    known = set(schema.names)
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise QueryError(f"Column {name!r} is selected twice.")
        seen.add(name)
        if name in computed or name in known or name in _VIRTUAL or _resolves(name, schema):
            continue
        raise QueryError(
            f"There is no column {name!r} to select; the table has {', '.join(schema.names)}. "
            "For an expression pass a dict, as in select({'total': 'price * n'})."
        )


def _resolves(path: str, schema: pa.Schema) -> bool:
    """Whether a dotted path leads to a field of a struct."""
    import pyarrow as pa

    parts = path.replace("`", "").split(".")
    if parts[0] not in schema.names:
        return False
    kind = schema.field(parts[0]).type
    for part in parts[1:]:
        if not pa.types.is_struct(kind) or kind.get_field_index(part) < 0:
            return False
        kind = kind.field(part).type
    return True
