"""What was asked for: frozen descriptions that a builder makes and an execution reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gpu_lance.errors import QueryError
from gpu_lance.types import Metric

if TYPE_CHECKING:
    from gpu_lance.query.inputs import Queries

DEFAULT_LIMIT = 10


@dataclass(frozen=True)
class ColumnOrdering:
    """One key to order rows by.

    Parameters
    ----------
    column_name : str
        A column, or a dotted path into a struct.
    ascending : bool
    nulls_first : bool

    Examples
    --------
    >>> ColumnOrdering("price", ascending=False).column_name
    'price'
    """

    column_name: str
    ascending: bool = True
    nulls_first: bool = False

    @classmethod
    def parse(cls, value: Any) -> ColumnOrdering:
        """An ordering from one, from a column's name, or from anything with the same attributes.

        Raises
        ------
        QueryError
            For anything else.
        """
        if isinstance(value, str):
            return cls(value)
        name = getattr(value, "column_name", None)
        if not isinstance(name, str):
            raise QueryError(
                f"order_by takes ColumnOrdering(column_name, ascending, nulls_first) or names of "
                f"columns, got a {type(value).__name__}."
            )
        return cls(
            name,
            bool(getattr(value, "ascending", True)),
            bool(getattr(value, "nulls_first", False)),
        )


@dataclass(frozen=True)
class QuerySpec:
    """What every search has.

    Parameters
    ----------
    limit : int or None
        Most rows, of each query; None for all.
    offset : int
        Rows to skip, of each query.
    where : str or None
        A checked SQL condition in parentheses.
    prefilter : bool
        Whether it is applied before the nearest rows are taken, rather than after.
    columns : dict of str to str, or tuple of str, or None
        SQL by name, or names; None for every column.
    row_id : bool
        Whether ``_rowid`` is returned.
    order_by : tuple of ColumnOrdering
    """

    limit: int | None = None
    offset: int = 0
    where: str | None = None
    prefilter: bool = True
    columns: dict[str, str] | tuple[str, ...] | None = None
    row_id: bool = False
    order_by: tuple[ColumnOrdering, ...] = ()


@dataclass(frozen=True)
class VectorSpec(QuerySpec):
    """A search for the nearest vectors.

    Parameters
    ----------
    column : str
        The vector column.
    queries : Queries
    metric : Metric
    lower, upper : float or None
        lower <= distance < upper.
    settings : dict of str to object
        Settings of approximate indexes; an exact search has no use for them.
    """

    column: str = ""
    queries: Queries = field(kw_only=True)
    metric: Metric = Metric.L2
    lower: float | None = None
    upper: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
