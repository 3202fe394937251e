"""What a table must hold and find, in plain Python and numpy: the model that tests compare with.

A version of the table is a dict of rows by key. A search of it is brute force in float64, summed
in the order of gpu_lance/index/rescore.py, so that distances are equal to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import lance
import numpy as np
import pyarrow as pa

Row = dict[str, Any]
KEY, TAG, VECTOR = "key", "tag", "vector"
TAGS = ("a", "b", "it's", None)
DTYPES = {np.float16: pa.float16(), np.float32: pa.float32(), np.float64: pa.float64()}


def vectors(
    seed: int, count: int, ndims: int, dtype: Any = np.float32, *, null: bool = True
) -> list[tuple[float, ...] | None]:
    """Vectors of which many tie: small whole numbers, zeros, duplicates; some large, some null."""
    rng = np.random.default_rng(seed)
    made: list[tuple[float, ...] | None] = []
    for kind in rng.choice(8, size=count, p=[0.5, 0.15, 0.1, 0.05, 0.05, 0.05, 0.05, 0.05]):
        if kind == 7 and null:
            made.append(None)
        elif kind == 6 and made:
            made.append(made[int(rng.integers(len(made)))])
        else:
            scale = {1: 0.1, 2: 1 / 3, 3: 1000.0, 4: 0.0}.get(int(kind), 1.0)
            whole = rng.integers(-2, 3, ndims)
            values = rng.standard_normal(ndims) if kind == 2 else whole
            made.append(tuple((values * scale).astype(dtype).tolist()))
    if not null:
        made = [(0.0,) * ndims if vector is None else vector for vector in made]
    return made


def schema(ndims: int, dtype: Any, number: str = "n") -> pa.Schema:
    """The columns that a table starts with."""
    return pa.schema(
        {
            KEY: pa.int64(),
            TAG: pa.utf8(),
            number: pa.int64(),
            VECTOR: pa.list_(DTYPES[dtype], ndims),
        }
    )


def to_arrow(rows: Iterable[Row], kind: pa.Schema) -> pa.Table:
    """Rows as an Arrow table; a column that they do not have is null."""
    rows = list(rows)

    def column(name: str, kind: pa.DataType) -> pa.Array:
        values = [row.get(name) for row in rows]
        if name == VECTOR and pa.types.is_float16(kind.value_type):  # Arrow wants numpy's
            values = [v and [u if u is None else np.float16(u) for u in v] for v in values]
        return pa.array(values, kind)

    return pa.table([column(f.name, f.type) for f in kind], schema=kind)


def tree_sum(values: np.ndarray) -> np.ndarray:
    """Sum over the last axis by halving."""
    values = values.copy()
    width = values.shape[-1]
    while width > 1:
        half = (width + 1) // 2
        values[..., : width - half] += values[..., half:width]
        width = half
    return values[..., 0]


def distances(metric: str, query: Sequence[float], found: np.ndarray) -> np.ndarray:
    """(n,) float32 from the query (d,) and the stored vectors (n, d); NaN for no distance."""
    q = np.asarray(query, np.float32).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        x = found.astype(np.float64)
        if metric == "l2":
            exact = tree_sum((x - q) ** 2)
        elif metric == "dot":
            exact = 1 - tree_sum(x * q)
        else:
            exact = 1 - tree_sum(x * q) / (np.sqrt(tree_sum(q * q)) * np.sqrt(tree_sum(x * x)))
            exact = np.maximum(exact, 0)  # NaN stays
        exact[~np.isfinite(x).all(axis=1)] = np.nan
        return exact.astype(np.float32)


@dataclass(frozen=True)
class Condition:
    """An SQL condition with ``{n}`` for the number column, its values, and what it means."""

    text: str
    holds: Callable[[Any, Any, int], bool] = field(repr=False)  # of n, tag and key
    values: tuple[Any, ...] = field(default=(), repr=False)

    def sql(self, number: str) -> str:
        return self.text.format(n=number)

    def rows(self, rows: Iterable[Row], number: str) -> list[Row]:
        return [row for row in rows if self.holds(row[number], row[TAG], row[KEY])]


CONDITIONS = (
    Condition("{n} >= ?", lambda n, t, k: n is not None and n >= 4, (4,)),
    Condition("{n} = 3", lambda n, t, k: n == 3),
    Condition("tag = ?", lambda n, t, k: t == "it's", ("it's",)),
    Condition("tag = 'a' AND {n} < 7", lambda n, t, k: t == "a" and n is not None and n < 7),
    Condition("tag IS NULL OR key % 3 = 0", lambda n, t, k: t is None or k % 3 == 0),
    Condition("NOT (tag = 'b')", lambda n, t, k: t is not None and t != "b"),
    Condition("key % 2 = 0", lambda n, t, k: k % 2 == 0),
    Condition("{n} IS NOT NULL AND {n} IN (1, 2, 9)", lambda n, t, k: n in (1, 2, 9)),
    Condition("key < 0", lambda n, t, k: False),
)


@dataclass(frozen=True)
class Search:
    """One search: queries made from a seed, none for a single one, and what is asked of them."""

    seed: int
    batch: int | None
    metric: str
    k: int
    offset: int = 0
    where: Condition | None = None
    prefilter: bool = True
    low: int | None = None  # bounds are distances that there are: the one at this place, ascending
    high: int | None = None

    def queries(self, ndims: int) -> list[tuple[float, ...]]:
        return vectors(self.seed, self.batch or 1, ndims, null=False)  # type: ignore[return-value]


Found = list[tuple[int, int, np.float32]]  # key, row id, distance


@dataclass
class Version:
    """What a version of the table holds.

    Parameters
    ----------
    rows : dict of int to Row
        By key.
    columns : tuple of str
    number : str
        What the column of numbers is called.
    row_ids : dict of int to int
        Lance's, by key; read from the dataset by :meth:`check`.
    """

    rows: dict[int, Row]
    columns: tuple[str, ...] = (KEY, TAG, "n", VECTOR)
    number: str = "n"
    row_ids: dict[int, int] = field(default_factory=dict)
    checked: bool = False

    def check(self, dataset: lance.LanceDataset) -> None:
        """Assert that the dataset holds these rows, each once, and note their ids."""
        if self.checked:
            return
        table = dataset.scanner(with_row_id=True).to_table()
        assert set(table.column_names) == {*self.columns, "_rowid"}
        stored = table.to_pylist()
        keys = [row[KEY] for row in stored]
        ids = [row.pop("_rowid") for row in stored]
        assert len(set(ids)) == len(ids) == len(set(keys)), "a row is there twice"
        got = {row[KEY]: _plain(row) for row in stored}
        want = {key: _plain(row) for key, row in self.rows.items()}
        assert got == want
        self.row_ids = dict(zip(keys, ids, strict=True))
        self.checked = True

    def bounds(self, search: Search, query: Sequence[float]) -> tuple[float | None, float | None]:
        """The distances at the places that the search names."""
        known = np.sort(self._measured(search.metric, query)[1])
        known = known[~np.isnan(known)]

        def at(place: int | None) -> float | None:
            if place is None or len(known) == 0:
                return None
            return float(known[place % len(known)])

        return at(search.low), at(search.high)

    def _measured(self, metric: str, query: Sequence[float]) -> tuple[list[int], np.ndarray]:
        whole = {
            key: row[VECTOR]
            for key, row in self.rows.items()
            if row[VECTOR] is not None and None not in row[VECTOR]
        }
        found = np.array(list(whole.values()), np.float64).reshape(len(whole), len(query))
        return list(whole), distances(metric, query, found)

    def nearest(
        self,
        search: Search,
        query: Sequence[float],
        lower: float | None = None,
        upper: float | None = None,
    ) -> Found:
        """What the search must find for one query, in its order."""
        keys, measured = self._measured(search.metric, query)
        low, high = -math.inf if lower is None else lower, math.inf if upper is None else upper
        allowed = set(self.rows)
        if search.where is not None:
            allowed = {row[KEY] for row in search.where.rows(self.rows.values(), self.number)}
        found = [
            (distance, self.row_ids[key], key)
            for key, distance in zip(keys, measured, strict=True)
            if distance >= low
            and (upper is None or distance < high)
            and (key in allowed or not search.prefilter)
        ]
        found.sort()
        if search.prefilter:
            page = found[search.offset : search.offset + search.k]
        else:  # the nearest first, then those of them that qualify, then the page
            nearest = found[: search.offset + search.k]
            page = [hit for hit in nearest if hit[2] in allowed][search.offset :][: search.k]
        return [(key, row_id, distance) for distance, row_id, key in page]


def _plain(row: Row) -> str:
    """A row as text, in which NaN equals NaN."""
    values = {name: row[name] for name in sorted(row)}
    if values[VECTOR] is not None:
        values[VECTOR] = [None if v is None else float(v) for v in values[VECTOR]]
    return repr(values)
