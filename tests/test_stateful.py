"""Random histories of a table, with every search compared with brute force over its version.

The table is changed by two connections of this package, by pylance and by lancedb; handles stand
at the latest version or at older ones. The model is tests/search_model.py, and what is done with
both is tests/table_machine.py.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any

import lance
import lancedb
import numpy as np
import pytest
import search_model as model
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test
from search_model import CONDITIONS, KEY, TAG, VECTOR, Condition, Search, Version
from table_machine import NAME, TableUnderTest, Variant

VARIANTS = [
    Variant("float32"),
    Variant("float16", np.float16, 8),
    Variant("float64", np.float64, 5),
    Variant("lancedb", made_by="lancedb"),
    Variant("pylance", np.float16, made_by="pylance"),
    # about 90 rows fit as float32 and 150 as float16; more are read from Lance
    Variant("float32 in 8 kB", ndims=16, budget=8000),
    Variant("float64 in 8 kB", np.float64, 16, budget=8000),
    Variant("lancedb in 8 kB", ndims=16, made_by="lancedb", budget=8000),
]

seeds = st.integers(0, 2**32 - 1)
handles = st.integers(0, 2)
counts = st.sampled_from([1, 2, 3, 5, 8, 13, 40, 150])
conditions = st.sampled_from(CONDITIONS)
places = st.one_of(st.none(), st.integers(0, 60))
searches = st.builds(
    Search,
    seed=seeds,
    batch=st.sampled_from([None, None, 1, 2, 5, 30]),
    metric=st.sampled_from(("l2", "cosine", "dot")),
    k=st.sampled_from([1, 2, 3, 10, 50, 1000]),
    offset=st.sampled_from([0, 0, 0, 1, 4]),
    where=st.one_of(st.none(), conditions),
    prefilter=st.sampled_from([True, True, True, False]),
    low=places,
    high=places,
)


class TableMachine(TableUnderTest):
    """What may happen to the table, and the searches in between."""

    @initialize(seed=seeds, count=st.sampled_from([0, 1, 20, 120, 250]), pydantic=st.booleans())
    def create(self, seed: int, count: int, pydantic: bool) -> None:
        self.make_table(self.fresh(seed, count), pydantic)

    # ------------------------------------------------------------- rows

    @rule(
        number=handles,
        seed=seeds,
        count=counts,
        form=st.sampled_from(["arrow", "dicts", "pydantic"]),
    )
    def add(self, number: int, seed: int, count: int, form: str) -> None:
        rows = self.fresh(seed, count)
        data: Any = self.arrow(rows)
        if form == "dicts":
            data = rows
        elif form == "pydantic" and self.now.columns == (KEY, TAG, "n", VECTOR):
            kind = self.pydantic_model()
            data = [kind(**row) for row in rows]
        self.writer(number).add(data)
        self.committed(self.now.rows | {row[KEY]: row for row in rows})

    @rule(number=handles, seed=seeds, count=counts)
    def overwrite(self, number: int, seed: int, count: int) -> None:
        rows = self.fresh(seed, count)
        self.writer(number).add(self.arrow(rows), mode="overwrite")
        self.committed({row[KEY]: row for row in rows})

    @rule(number=handles, where=conditions, seed=seeds)
    def update_vectors(self, number: int, where: Condition, seed: int) -> None:
        (vector,) = model.vectors(seed, 1, self.variant.ndims, self.variant.dtype)
        values = {VECTOR: None if vector is None else list(vector)}
        self.writer(number).update(
            where.sql(self.now.number), values, parameters=where.values or None
        )
        self.committed(self.change(where, lambda row: {VECTOR: vector}))

    @rule(number=handles, where=conditions, by=st.integers(1, 3))
    def update_numbers(self, number: int, where: Condition, by: int) -> None:
        n = self.now.number
        self.writer(number).update(
            where.sql(n), values_sql={n: f"{n} + {by}"}, parameters=where.values or None
        )
        self.committed(
            self.change(where, lambda row: {n: row[n] if row[n] is None else row[n] + by})
        )

    @rule(number=handles, where=st.sampled_from(CONDITIONS[1:6]))
    def delete(self, number: int, where: Condition) -> None:
        self.writer(number).delete(where.sql(self.now.number), where.values or None)
        self.committed(self.without(where))

    @rule(number=handles)
    def delete_all(self, number: int) -> None:
        self.writer(number).delete("true")
        self.committed({})

    @rule(
        number=handles,
        seed=seeds,
        known=st.integers(0, 6),
        new=st.integers(0, 4),
        kind=st.sampled_from(["upsert", "update", "insert", "replace", "numbers"]),
    )
    def merge(self, number: int, seed: int, known: int, new: int, kind: str) -> None:
        rng, now = np.random.default_rng(seed), self.now
        keys = sorted(now.rows)
        keys = [] if not keys else rng.choice(keys, min(known, len(keys)), replace=False).tolist()
        made = model.vectors(seed, len(keys), self.variant.ndims, self.variant.dtype)
        old = [self.row(key, vector, seed) for key, vector in zip(keys, made, strict=True)]
        rows = old + (self.fresh(seed, new) if kind != "numbers" else [])
        if not rows:
            return
        data, merging = self.arrow(rows), self.writer(number).merge_insert(KEY)
        after = dict(now.rows)
        if kind == "numbers":  # the columns that are not given stay
            data = data.select([KEY, now.number])
            after |= {r[KEY]: {**after[r[KEY]], now.number: r[now.number]} for r in rows}
        if kind != "insert":
            merging = merging.when_matched_update_all()
        if kind not in ("update", "numbers"):
            merging = merging.when_not_matched_insert_all()
        if kind == "replace":
            merging = merging.when_not_matched_by_source_delete(f"{now.number} = 3")
            inside = {row[KEY] for row in rows}
            after = {k: row for k, row in after.items() if k in inside or row[now.number] != 3}
        if kind != "numbers":
            after |= {
                row[KEY]: row
                for row in rows
                if kind in ("upsert", "replace") or (row[KEY] in now.rows) == (kind == "update")
            }
        merging.execute(data)
        self.committed(after)

    # ------------------------------------------------------------- versions

    @rule(number=handles, which=st.integers(0, 100))
    def restore(self, number: int, which: int) -> None:
        version = sorted(self.versions)[which % len(self.versions)]
        handle = self.handles[number]
        if handle.pinned is not None:
            version = handle.pinned
            handle.table.restore()
            handle.pinned = None
        else:
            handle.table.restore(version)
        old = self.versions[version]
        self.committed(old.rows, columns=old.columns, number=old.number)

    @rule(number=st.integers(1, 2), which=st.integers(0, 100))
    def checkout(self, number: int, which: int) -> None:
        handle = self.handles[number]
        handle.pinned = sorted(self.versions)[which % len(self.versions)]
        handle.table.checkout(handle.pinned)

    @rule()
    def checkout_latest(self) -> None:
        self.unpin()

    @rule(number=handles)
    def cleanup(self, number: int) -> None:
        self.unpin()
        self.writer(number).cleanup_old_versions(timedelta(0))
        self.versions = {self.latest: self.now}
        assert [v["version"] for v in lance.dataset(self.path).versions()] == [self.latest]

    @rule(number=handles, compact=st.booleans())
    def upkeep(self, number: int, compact: bool) -> None:
        table = self.writer(number)
        if compact:
            table.compact_files()
        else:
            table.optimize()
        self.committed(most=8)

    # ------------------------------------------------------------- columns

    @rule(number=handles)
    def other_column(self, number: int) -> None:
        n, columns = self.now.number, self.now.columns
        table = self.writer(number)
        if "twice" in columns:
            table.drop_columns(["twice"])
            self.committed(columns=tuple(name for name in columns if name != "twice"))
            return
        table.add_columns({"twice": f"{n} * 2"})
        rows = {
            key: {**row, "twice": None if row[n] is None else row[n] * 2}
            for key, row in self.now.rows.items()
        }
        self.committed(rows, columns=(*columns, "twice"))

    @rule(number=handles)
    def rename(self, number: int) -> None:
        old, new = self.now.number, {"n": "m", "m": "n"}[self.now.number]
        self.writer(number).alter_columns({"path": old, "rename": new})
        rows = {
            key: {new if name == old else name: value for name, value in row.items()}
            for key, row in self.now.rows.items()
        }
        columns = tuple(new if name == old else name for name in self.now.columns)
        self.committed(rows, columns=columns, number=new)

    @rule(number=handles, seed=seeds)
    def vector_column_made_anew(self, number: int, seed: int) -> None:
        table = self.writer(number)
        kind = lance.dataset(self.path).schema.field(VECTOR)
        others = tuple(name for name in self.now.columns if name != VECTOR)
        table.drop_columns([VECTOR])
        table.add_columns([kind])
        rows = {key: {**row, VECTOR: None} for key, row in self.now.rows.items()}
        self.committed(rows, columns=(*others, VECTOR), most=2)
        del self.versions[self.latest - 1]  # it has no vectors

    @rule(number=handles, kind=st.sampled_from([("n", "BTREE"), (TAG, "BITMAP"), (KEY, "BTREE")]))
    def scalar_index(self, number: int, kind: tuple[str, str]) -> None:
        column = self.now.number if kind[0] == "n" else kind[0]
        self.writer(number).create_scalar_index(column, index_type=kind[1])
        self.committed()

    # ------------------------------------------------------------- other writers

    @rule(
        seed=seeds,
        count=counts,
        kind=st.sampled_from(["append", "bad", "update", "delete", "compact", "overwrite"]),
        where=st.sampled_from(CONDITIONS[1:6]),
    )
    def pylance(self, seed: int, count: int, kind: str, where: Condition) -> None:
        dataset, n = lance.dataset(self.path), self.now.number
        rows = self.fresh(seed, count) if kind in ("append", "bad", "overwrite") else []
        if kind == "bad":  # what this package refuses to write
            for row, bad in zip(rows, (math.nan, math.inf, None), strict=False):
                if row[VECTOR] is not None:
                    row[VECTOR] = (*row[VECTOR][:-1], bad)
        after = {} if kind == "overwrite" else dict(self.now.rows)
        after |= {row[KEY]: row for row in rows}
        text = where.sql(n).replace("?", "'it''s'")
        if kind == "update":
            dataset.update({n: "7"}, where=text)
            after = self.change(where, lambda row: {n: 7})
        elif kind == "delete":
            dataset.delete(text)
            after = self.without(where)
        elif kind == "compact":
            dataset.optimize.compact_files()
        else:
            mode = "overwrite" if kind == "overwrite" else "append"
            lance.write_dataset(self.arrow(rows), dataset, mode=mode)
        self.committed(after, most=8)

    @rule(
        seed=seeds,
        count=counts,
        kind=st.sampled_from(["add", "update", "delete", "optimize"]),
        where=st.sampled_from(CONDITIONS[1:6]),
    )
    def lancedb(self, seed: int, count: int, kind: str, where: Condition) -> None:
        dataset, n = lance.dataset(self.path), self.now.number
        theirs = lancedb.connect(self.folder.name).open_table(NAME)
        # it does not keep our B-trees right, as docs/compatibility.md says
        tree = any(index.index_type == "BTree" for index in dataset.describe_indices())
        text, after = where.sql(n).replace("?", "'it''s'"), dict(self.now.rows)
        if kind == "delete":
            theirs.delete(text)
            after = self.without(where)
        elif kind == "update" and not tree:
            theirs.update(text, values_sql={n: f"{n} + 1"})
            after = self.change(where, lambda r: {n: None if r[n] is None else r[n] + 1})
        elif kind == "optimize" and not tree:
            theirs.optimize()
        elif kind == "add":
            rows = self.fresh(seed, count, null=False)
            theirs.add(self.arrow(rows))
            after |= {row[KEY]: row for row in rows}
        self.committed(after, most=8)

    @rule(number=st.integers(0, 1), seed=seeds, count=counts, drop=st.booleans())
    def table_made_anew(self, number: int, seed: int, count: int, drop: bool) -> None:
        self.unpin()
        connection, rows = self.connections[number], self.fresh(seed, count)
        kind = model.schema(self.variant.ndims, self.variant.dtype)
        for row in rows:
            row["n"] = row.pop(self.now.number)
        data, after = model.to_arrow(rows, kind), Version({row[KEY]: row for row in rows})
        if drop:
            connection.drop_table(NAME)
            connection.create_table(NAME, data)
            self.versions, self.latest = {}, 1
        else:
            connection.create_table(NAME, data, mode="overwrite")
            self.latest += 1
        self.versions[self.latest] = after
        self.gone = []
        assert lance.dataset(self.path).version == self.latest
        after.check(lance.dataset(self.path))

    # ------------------------------------------------------------- processes

    @rule()
    def restart(self) -> None:
        for connection in self.connections:
            connection.close()
        self.open()

    @precondition(lambda self: self.variant.budget is not None)
    @rule()
    def search_another_table(self) -> None:
        """It wants the memory that the first one has."""
        rows = [{"vector": [float(i)] * 16} for i in range(40)]
        if self.other is None:
            self.other = self.connections[0].create_table("other", rows)
        assert self.other.search([7.25] * 16).limit(2).to_arrow()["_distance"].to_pylist() == [1, 9]

    @rule(number=st.integers(0, 1))
    def free_memory(self, number: int) -> None:
        self.connections[number].close()

    # ------------------------------------------------------------- searches

    @rule(number=handles, search=searches)
    def search(self, number: int, search: Search) -> None:
        self.check(self.handles[number], search)

    @rule(search=searches)
    def search_plainly(self, search: Search) -> None:
        plain = replace(search, low=None, high=None, where=None, offset=0)
        self.check(self.handles[0], plain)

    @precondition(lambda self: any(handle.pinned for handle in self.handles))
    @rule(search=searches)
    def search_versions_in_turn(self, search: Search) -> None:
        for _ in range(2):
            for handle in self.handles:
                self.check(handle, search)

    @rule(many=st.lists(st.tuples(handles, searches), min_size=4, max_size=8))
    def search_in_threads(self, many: list[tuple[int, Search]]) -> None:
        for handle in self.handles:  # so that threads read the model only
            version = self.latest if handle.pinned is None else handle.pinned
            self.versions[version].check(handle.table.to_lance())
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(self.check, self.handles[n], search) for n, search in many]:
                done.result()


def run(
    variant: Variant, examples: int, steps: int, start: int = 0, shrink: tuple[Phase, ...] = ()
) -> None:
    """Run the machine; each variant has histories of its own."""
    forms: set[str] = set()
    run_state_machine_as_test(
        seed(start + VARIANTS.index(variant))(lambda: TableMachine(variant, forms)),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
            phases=(Phase.generate, *shrink),  # to shrink takes minutes
            print_blob=False,
        ),
    )
    if variant.budget is not None:  # it did what it is for; both steps take many histories
        assert forms & {"float16", "lance"}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_searches_equal_brute_force(variant: Variant) -> None:
    run(variant, examples=10, steps=30)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_searches_equal_brute_force_for_long(variant: Variant) -> None:
    run(variant, examples=200, steps=60, start=1000, shrink=(Phase.shrink,))
