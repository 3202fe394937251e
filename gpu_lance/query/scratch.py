"""SQL over the few rows that a search found, where it mentions what only the search knows.

Lance cannot filter, order or compute by a distance that it did not measure. So the rows' columns
that the SQL mentions, the distances and the rows' places go into a small dataset in memory, and
Lance runs the SQL there: the same dialect, and a millisecond.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lance
import numpy as np
import pyarrow as pa
from lance.dataset import ColumnOrdering as LanceOrdering

from gpu_lance.errors import QueryError
from gpu_lance.query.messages import refused
from gpu_lance.query.projection import DISTANCE, QUERY_INDEX, ROW_ID
from gpu_lance.query.sql import tokens, words
from gpu_lance.types import free_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gpu_lance.query.spec import ColumnOrdering


class Scratch:
    """The rows that a search found, as a dataset in memory.

    Parameters
    ----------
    dataset : lance.LanceDataset
        Where the rows come from.
    row_ids : numpy.ndarray
        (n,) int64, in the result's order, with repetitions.
    distances : numpy.ndarray
        (n,) float32.
    query_index : numpy.ndarray
        (n,) int32.
    mentioned : set of str
        Words of the SQL that will be run; the columns among them are read.
    batch : bool
        Whether the result has a column ``query_index``, which then hides one of the table's.
    """

    def __init__(
        self,
        dataset: lance.LanceDataset,
        row_ids: np.ndarray,
        distances: np.ndarray,
        query_index: np.ndarray,
        mentioned: set[str],
        batch: bool,
    ) -> None:
        self._columns = dataset.schema.names
        self._place, self._row_id, query = (
            free_name(name, self._columns) for name in ("__place", "__row_id", "__query")
        )
        self._query = QUERY_INDEX if batch or QUERY_INDEX not in self._columns else query
        place = np.arange(len(row_ids), dtype=np.int64)
        added = {
            pa.field(self._place, pa.int64()): pa.array(place),
            pa.field(self._row_id, pa.uint64()): pa.array(row_ids.astype(np.uint64)),
            pa.field(DISTANCE, pa.float32()): pa.array(distances),
            pa.field(self._query, pa.int32(), nullable=False): pa.array(query_index),
        }
        table = pa.table(list(added.values()), schema=pa.schema(list(added)))
        own = set(table.column_names)
        found = {word.lower() for word in mentioned}  # as Lance finds them where no other fits
        names = [name for name in self._columns if name.lower() in found and name not in own]
        if names:
            table = take(dataset, row_ids, names).drop_columns([ROW_ID])  # Lance reserves the name
            for field, values in added.items():
                table = table.append_column(field, values)
        self._dataset = lance.write_dataset(table, "memory://")

    def places(self, where: str | None, order_by: Sequence[ColumnOrdering]) -> np.ndarray:
        """Which rows meet the condition, in the order asked for within each query.

        Returns
        -------
        numpy.ndarray
            (n,) int64 places in the row ids that were given.

        Raises
        ------
        QueryError
            If Lance does not understand the condition or has no such column to order by.
        """
        keys = None
        if order_by:
            keys = [LanceOrdering(self._query)]
            keys += [
                LanceOrdering(key.column_name, ascending=key.ascending, nulls_first=key.nulls_first)
                for key in order_by
            ]
            keys.append(LanceOrdering(self._place))
        columns = [self._place]
        table = self._run("filter", where, columns=columns, order_by=keys, with_row_id=True)
        places: np.ndarray = table[self._place].to_numpy()
        return places

    def evaluate(self, expressions: Mapping[str, str]) -> pa.Table:
        """The expressions' values for every row, in the rows' order.

        Raises
        ------
        QueryError
            If Lance does not understand one.
        """
        columns = {name: self._own_row_id(text) for name, text in expressions.items()}
        return self._run("selection", None, columns=columns)

    def _run(self, what: str, where: str | None, **more: Any) -> pa.Table:
        own = None if where is None else self._own_row_id(where)
        with refused(what, self._columns):
            return self._dataset.scanner(filter=own, **more).to_table()

    def _own_row_id(self, sql: str) -> str:
        """The SQL with the table's row id in the place of the dataset in memory's."""
        parts = tokens(sql)
        return "".join(self._row_id if text.strip("`") == ROW_ID else text for _, text in parts)


def take(
    dataset: lance.LanceDataset,
    row_ids: np.ndarray,
    columns: Sequence[str] | Mapping[str, str],
) -> pa.Table:
    """Columns of the rows with those ids, in their order and as often as they are named.

    Raises
    ------
    QueryError
        If Lance does not understand an expression.
    """
    wanted: Any = dict(columns) if isinstance(columns, dict) else list(columns)
    # the row id keeps a projection of constants readable, and is the cheapest column to add
    if isinstance(wanted, dict):
        wanted.setdefault(ROW_ID, ROW_ID)
    elif ROW_ID not in wanted:
        wanted.append(ROW_ID)
    with refused("selection", dataset.schema.names):
        table = dataset._take_rows(pa.array(row_ids.astype(np.uint64)), columns=wanted)
    if table.num_rows != len(row_ids):
        raise QueryError(
            f"{len(row_ids) - table.num_rows} of {len(row_ids)} rows that the index found are not "
            "in the table's version any more; run the search again."
        )
    return table


def mentioned(where: str | None, order_by: Sequence[ColumnOrdering]) -> set[str]:
    """The words of a condition and the columns to order by."""
    found = words(where) if where else set()
    for key in order_by:
        found.add(key.column_name.split(".")[0].strip("`"))
    return found
