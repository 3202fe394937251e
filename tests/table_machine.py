"""The table that tests/test_stateful.py changes and searches, beside the model of its versions."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import lance
import lancedb
import numpy as np
import pyarrow as pa
import search_model as model
from hypothesis.stateful import RuleBasedStateMachine
from search_model import KEY, TAG, TAGS, VECTOR, Condition, Row, Search, Version

import gpu_lance
from gpu_lance.pydantic import LanceModel, Vector

NAME = "t"


@dataclass(frozen=True)
class Variant:
    """What kind of table a machine works on."""

    name: str
    dtype: Any = np.float32
    ndims: int = 3
    made_by: str = "gpu_lance"  # the others' tables have no stable row ids
    budget: int | None = None


@dataclass
class Handle:
    """An open table, and the version that was checked out."""

    table: Any
    pinned: int | None = None


class TableUnderTest(RuleBasedStateMachine):
    """A table in a folder of its own, three handles of it, and the model of each version."""

    def __init__(self, variant: Variant, forms: set[str]) -> None:
        super().__init__()
        self.variant = variant
        self.forms = forms  # in which forms the column was held
        self.folder = tempfile.TemporaryDirectory(prefix="stateful-")
        self.path = f"{self.folder.name}/{NAME}.lance"
        self.versions: dict[int, Version] = {}
        self.latest = 0
        self.next_key = 0
        self.gone: list[int] = []  # keys of rows that were deleted, to come again
        self.other: Any = None

    def teardown(self) -> None:
        for connection in getattr(self, "connections", []):
            connection.close()
        self.folder.cleanup()

    # ------------------------------------------------------------- the model's side

    @property
    def now(self) -> Version:
        return self.versions[self.latest]

    def row(self, key: int, vector: Any, seed: int) -> Row:
        rng = np.random.default_rng(seed + key)
        number = None if rng.random() < 0.1 else int(rng.integers(0, 10))
        row = {KEY: key, TAG: TAGS[int(rng.integers(len(TAGS)))], VECTOR: vector}
        return {**row, self.now.number if self.versions else "n": number}

    def fresh(self, seed: int, count: int, *, null: bool = True) -> list[Row]:
        """Rows with new keys, or with some of those that were deleted."""
        made = model.vectors(seed, count, self.variant.ndims, self.variant.dtype, null=null)
        keys = []
        for _ in range(count):
            if self.gone and (seed + len(keys)) % 3 == 0:
                keys.append(self.gone.pop())
            else:
                keys.append(self.next_key)
                self.next_key += 1
        return [self.row(key, vector, seed) for key, vector in zip(keys, made, strict=True)]

    def committed(self, rows: dict[int, Row] | None = None, **changes: Any) -> None:
        """The table got new versions; all hold these rows, and the newest is compared."""
        dataset = lance.dataset(self.path)
        before, now = self.now, dataset.version
        rows = before.rows if rows is None else rows
        self.gone += [key for key in before.rows if key not in rows and key not in self.gone]
        self.gone = [key for key in self.gone if key not in rows]
        number = changes.pop("number", before.number)
        columns = changes.pop("columns", before.columns)
        assert now - self.latest <= changes.pop("most", 1) and not changes
        rows = {key: {name: row.get(name) for name in columns} for key, row in rows.items()}
        for version in range(self.latest + 1, now + 1):
            self.versions[version] = Version(rows, columns, number)
        self.latest = now
        self.now.check(dataset)

    def change(self, condition: Condition, values: Callable[[Row], Row]) -> dict[int, Row]:
        """All rows, with those that meet the condition changed."""
        hit = {row[KEY] for row in condition.rows(self.now.rows.values(), self.now.number)}
        return {
            key: {**row, **values(row)} if key in hit else row for key, row in self.now.rows.items()
        }

    def without(self, where: Condition) -> dict[int, Row]:
        gone = {row[KEY] for row in where.rows(self.now.rows.values(), self.now.number)}
        return {key: row for key, row in self.now.rows.items() if key not in gone}

    def arrow(self, rows: list[Row]) -> pa.Table:
        return model.to_arrow(rows, lance.dataset(self.path).schema)

    # ------------------------------------------------------------- the tables

    def connect(self) -> Any:
        more = {} if self.variant.budget is None else {"memory_budget": self.variant.budget}
        return gpu_lance.connect(self.folder.name, device="cpu", **more)

    def open(self) -> None:
        """Two handles of one connection, and one of another."""
        self.connections = [self.connect(), self.connect()]
        of = [self.connections[0], self.connections[0], self.connections[1]]
        self.handles = [Handle(connection.open_table(NAME)) for connection in of]
        if self.other is not None:
            self.other = self.connections[0].open_table("other")

    def unpin(self) -> None:
        for handle in self.handles:
            if handle.pinned is not None:
                handle.table.checkout_latest()
                handle.pinned = None

    def writer(self, number: int) -> Any:
        """A handle that stands at the latest version; the first always does."""
        handle = self.handles[number]
        return self.handles[0].table if handle.pinned is not None else handle.table

    def make_table(self, rows: list[Row], pydantic: bool) -> None:
        """Make the table as the variant says, and open it."""
        kind = model.schema(self.variant.ndims, self.variant.dtype)
        table = model.to_arrow(rows, kind)
        if self.variant.made_by == "lancedb":
            lancedb.connect(self.folder.name).create_table(NAME, schema=kind)
            lance.write_dataset(table, self.path, mode="append")
        elif self.variant.made_by == "pylance":
            lance.write_dataset(table, self.path, data_storage_version="2.2")
        elif pydantic and self.variant.dtype is np.float32:
            made = self.connect().create_table(NAME, schema=self.pydantic_model())
            made.add(table)
        else:
            self.connect().create_table(NAME, table)
        self.open()
        self.latest = lance.dataset(self.path).version
        self.versions = {v: Version({}) for v in range(1, self.latest)}
        self.versions[self.latest] = Version({row[KEY]: row for row in rows})
        self.now.check(lance.dataset(self.path))

    def pydantic_model(self) -> type[LanceModel]:
        class Item(LanceModel):
            key: int | None
            tag: str | None
            n: int | None
            vector: Vector(self.variant.ndims) | None  # type: ignore[valid-type]

        return Item

    # ------------------------------------------------------------- searches

    def check(self, handle: Handle, search: Search) -> None:
        """Assert that the handle finds what brute force finds in its version."""
        table = handle.table
        version = self.versions[self.latest if handle.pinned is None else handle.pinned]
        version.check(table.to_lance())
        queries = search.queries(self.variant.ndims)
        lower, upper = version.bounds(search, queries[0])
        query = queries[0] if search.batch is None else [list(one) for one in queries]
        builder = table.search(query, vector_column_name=VECTOR).distance_type(search.metric)
        builder = builder.select([KEY]).with_row_id(True).limit(search.k).offset(search.offset)
        if search.where is not None:
            sql, values = search.where.sql(version.number), search.where.values
            builder = builder.where(sql, values or None, search.prefilter)
        if lower is not None or upper is not None:
            builder = builder.distance_range(lower, upper)
        rows = builder.to_arrow()
        # one query in a list is no batch
        of = rows["query_index"].to_numpy() if len(queries) > 1 else np.zeros(len(rows))
        got = list(
            zip(
                of.astype(int).tolist(), rows[KEY].to_pylist(), rows["_rowid"].to_pylist(),
                rows["_distance"].to_numpy().tolist(), strict=True,
            )
        )  # fmt: skip
        want = [
            (line, key, row_id, float(distance))
            for line, one in enumerate(queries)
            for key, row_id, distance in version.nearest(search, one, lower, upper)
        ]
        self.forms.add(table.column_index(VECTOR).info()["step"])
        pairs = enumerate(zip_longest(got, want))
        wrong = [f"at {i} {one}, not {other}" for i, (one, other) in pairs if one != other]
        assert not wrong, f"{search} within {lower}, {upper}: {'; '.join(wrong[:3])}"
