"""Memory is planned before it is taken: sizes, counts, who has to go, and the ladder."""

from __future__ import annotations

import gc
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import gpu_lance
from gpu_lance import cli, overview
from gpu_lance.device import free_memory, total_memory
from gpu_lance.errors import BadInputError
from gpu_lance.index import budget as budgets
from gpu_lance.index.budget import OTHER_SCRATCH, VARIABLE, Budget
from gpu_lance.index.plan import Home, Step, column_bytes, plan
from gpu_lance.index.resident import ResidentIndexes
from gpu_lance.index.sizes import show_bytes

CPU = torch.device("cpu")
MB = 1_000_000
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may have set the variable."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(Budget, "_shared", {})


class Column:
    """An owner as the index's columns are: a lock, which is not waited for when it has to go."""

    def __init__(self, budget: Budget, name: str = "", busy: bool = False) -> None:
        self.budget = budget
        self.name = name
        self.lock = threading.Lock()
        self.busy = busy
        self.evicted = 0

    def evict(self) -> bool:
        if self.busy or not self.lock.acquire(blocking=False):
            return False
        try:
            self.evicted += 1
            self.budget.release(self)
            return True
        finally:
            self.lock.release()


def fix_free(monkeypatch: pytest.MonkeyPatch, **free: int) -> dict[str, int]:
    """Set what columns may take of each kind of device; the real figure changes all the time."""

    def fixed(device: torch.device) -> int:
        scratch = budgets.SCRATCH.get(device.type, OTHER_SCRATCH)
        return -(-(free[device.type] + scratch) * 10 // 9)

    monkeypatch.setattr(budgets, "free_memory", fixed)
    return free


def gpu_budget(limit: Any = None) -> Budget:
    """The budget of a GPU, of which only the counting is used."""
    budget = Budget("cuda", limit)
    budget.device = torch.device("cuda", 0)
    return budget


# ------------------------------------------------------------------ counting


def test_it_counts_and_evicts_the_least_recently_used() -> None:
    budget = Budget("cpu", 10 * MB)
    a, b, c = (Column(budget, name) for name in "abc")
    assert budget.reserve(a, 4 * MB)
    assert budget.reserve(b, 4 * MB)
    assert budget.reserve(a, 2 * MB)  # that uses a
    assert (budget.held, budget.held_by(a), budget.held_by(b)) == (10 * MB, 6 * MB, 4 * MB)
    assert budget.reserve(c, 3 * MB)
    assert (a.evicted, b.evicted, budget.held) == (0, 1, 9 * MB)
    budget.release(c)
    assert budget.reserve(b, 4 * MB)
    budget.touch(a)
    budget.touch(b)
    assert budget.reserve(c, 3 * MB)
    assert (a.evicted, b.evicted, budget.held) == (1, 1, 7 * MB)
    budget.release(b, MB)
    assert (budget.held_by(b), budget.held) == (3 * MB, 6 * MB)
    budget.release(b, 100 * MB)
    assert budget.held == 3 * MB
    budget.release(c)
    budget.release(c)
    budget.release(a)  # which holds nothing
    budget.touch(a)
    assert (budget.held, budget.info()["columns"]) == (0, 0)


def test_only_as_many_go_as_needed_and_none_in_vain() -> None:
    budget = Budget("cpu", 16 * MB)
    small, large, last, wants = (Column(budget) for _ in range(4))
    for column, size in ((small, 1), (large, 9), (last, 5)):
        assert budget.reserve(column, size * MB)
    assert budget.reserve(wants, 9 * MB)  # the large one does, though the small one is older
    assert (small.evicted, large.evicted, last.evicted) == (0, 1, 0)
    assert not budget.reserve(large, 17 * MB)
    assert budget.refusal(large, 17 * MB) == "the memory budget is 15.26 MiB"
    assert (small.evicted, last.evicted, wants.evicted, budget.held) == (0, 0, 0, 15 * MB)
    assert budget.reserve(large, 0)
    with pytest.raises(BadInputError):
        budget.reserve(large, -1)


def test_who_is_busy_stays() -> None:
    budget = Budget("cpu", 10 * MB)
    busy, idle, wants = Column(budget, busy=True), Column(budget), Column(budget)
    assert budget.reserve(busy, 6 * MB)
    assert budget.reserve(idle, 4 * MB)
    assert budget.reserve(wants, 3 * MB)
    assert (budget.held_by(busy), idle.evicted) == (6 * MB, 1)
    assert budget.refusal(wants, 5 * MB) == "0.95 MiB of the memory budget are left"


def test_an_owner_that_only_frees_is_released() -> None:
    class Plain:
        def evict(self) -> bool:
            return True

    budget = Budget("cpu", 10)
    first, second = Plain(), Plain()
    assert budget.reserve(first, 10)
    assert budget.reserve(second, 10)
    assert (budget.held_by(first), budget.held_by(second)) == (0, 10)


def test_an_owner_that_cannot_go_is_an_error_that_passes_through() -> None:
    class Broken:
        def evict(self) -> bool:
            raise OSError("stuck")

    budget = Budget("cpu", 10)
    broken, other = Broken(), Column(budget)
    assert budget.reserve(broken, 10)
    with pytest.raises(OSError, match="stuck"):
        budget.reserve(other, 1)
    budget.release(broken)
    assert budget.reserve(other, 10)  # no lock was left behind


def test_a_dropped_column_counts_no_more() -> None:
    class Releasing(Column):
        def __del__(self) -> None:
            self.budget.release(self)  # maybe while this very thread counts

    budget = Budget("cpu", 10 * MB)
    for kind in (Column, Releasing):
        column = kind(budget, busy=True)
        assert budget.reserve(column, 10 * MB)
        assert budget.held == 10 * MB
        del column
        gc.collect()
        assert budget.held == 0
        for _ in range(1000):  # new ones get the same ids
            assert budget.reserve(kind(budget), 10 * MB)
    gc.collect()
    assert budget.info()["columns"] == 0


def test_columns_that_compare_equal_are_two() -> None:
    class Same(Column):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = None  # type: ignore[assignment]

    budget = Budget("cpu", 10)
    a, b = Same(budget), Same(budget)
    assert budget.reserve(a, 5)
    assert budget.reserve(b, 3)
    assert (budget.held_by(a), budget.held_by(b)) == (5, 3)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "reserve", "reserve", "instead", "release", "part", "touch"]),
        st.integers(0, 4),
        st.integers(0, 12),
    ),
    max_size=40,
)


@given(STEPS, st.lists(st.booleans(), min_size=5, max_size=5), st.integers(0, 20))
def test_against_a_model(steps: Any, busy: list[bool], limit: int) -> None:
    """The counts, who goes and who stays are those of a few lines over a dict in order of use."""
    budget = Budget("cpu", limit)
    columns = [Column(budget, busy=one) for one in busy]
    model: dict[int, int] = {}
    for what, n, size in steps:
        column, before = columns[n], [each.evicted for each in columns]
        if what in ("reserve", "instead"):
            got = budget.refusal(column, size, instead=what == "instead") is None
            gone = {i for i, each in enumerate(columns) if each.evicted > before[i]}
            base = {i: held for i, held in model.items() if what == "reserve" or i != n}
            others = [i for i, held in model.items() if i != n and held and not busy[i]]
            over = sum(base.values()) + size - limit
            assert gone <= set(others)
            # every one that went was needed; the tests above say which of several goes
            freed = [model[i] for i in gone]
            if got:
                assert size == 0 or sum(freed) >= over
                assert all(sum(freed) - one < over for one in freed)
                for i in gone:
                    model[i] = 0
                held = size + (model.pop(n, 0) if what == "reserve" else 0)
                model.pop(n, None)
                model[n] = held
            else:
                assert sum(model[i] for i in others) < over or any(busy)
                for i in gone:
                    model[i] = 0
        elif what == "release":
            budget.release(column)
            model[n] = 0
        elif what == "part":
            budget.release(column, size)
            if n in model:
                model[n] = max(0, model[n] - size)
        else:
            budget.touch(column)
        assert [budget.held_by(each) for each in columns] == [model.get(i, 0) for i in range(5)]
        assert budget.held == sum(model.values()) <= limit


# ------------------------------------------------------------------ what is free


def test_what_is_free_holds_without_a_limit() -> None:
    budget = Budget("cpu")
    column = Column(budget)
    assert budget.limit is None
    refused = budget.refusal(column, 2 * free_memory(CPU))
    assert refused is not None
    assert refused.endswith("can be taken on cpu")
    assert budget.held == 0
    assert budget.reserve(column, 1)
    info = budget.info()
    assert (info["device"], info["limit"], info["held"], info["columns"]) == ("cpu", None, 1, 1)
    assert 0 < info["free"] < total_memory(CPU)


def test_headroom_and_scratch_stay_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "free_memory", lambda device: 1000 * MB)
    budget = Budget("cpu")
    column = Column(budget)
    room = 900 * MB - (128 << 20)
    assert not budget.reserve(column, room + 1)
    assert budget.reserve(column, room)
    gpu = gpu_budget()
    monkeypatch.setattr(budgets, "free_memory", lambda device: 2000 * MB)
    room = 1800 * MB - (1 << 30)  # 256 MiB, and what FAISS takes for itself
    assert gpu.refusal(column, room + 1) == f"{show_bytes(room)} can be taken on cuda:0"
    assert gpu.reserve(column, room)


def test_what_is_promised_is_not_promised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    free = fix_free(monkeypatch, cpu=10 * MB)
    one, two = Budget("cpu"), Budget("cpu")  # of two connections
    a, b = Column(one), Column(two)
    assert one.reserve(a, 6 * MB)
    assert two.refusal(b, 5 * MB) == "3.81 MiB can be taken on cpu"
    assert two.reserve(b, 4 * MB)
    assert not one.reserve(a, 1)
    free["cpu"] = 4 * MB  # a has taken its bytes
    one.settle(a)
    assert not one.reserve(a, 1)
    two.release(b)
    assert one.reserve(a, 4 * MB)
    assert one.held == 10 * MB


def test_eviction_for_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    free = fix_free(monkeypatch, cpu=10 * MB)
    budget = Budget("cpu")

    class Taking(Column):
        def take(self, size: int) -> bool:
            done = budget.reserve(self, size)
            if done:
                free["cpu"] -= size * 10 // 9  # headroom is kept of what is free
                budget.settle(self)
            return done

        def evict(self) -> bool:
            free["cpu"] += budget.held_by(self) * 10 // 9
            return super().evict()

    columns = [Taking(budget) for _ in range(3)]
    assert columns[0].take(4 * MB)
    assert columns[1].take(4 * MB)
    assert columns[2].take(3 * MB)
    assert [column.evicted for column in columns] == [1, 0, 0]
    assert not columns[0].take(11 * MB)
    assert [column.evicted for column in columns] == [1, 0, 0]


# ------------------------------------------------------------------ threads


def test_two_columns_that_want_each_other_gone_do_not_wait() -> None:
    """Both hold their own lock and evict the other, at once and again and again."""
    budget = Budget("cpu", 10)
    columns = [Column(budget), Column(budget)]
    ready = threading.Barrier(2)
    got = [0, 0]

    def work(n: int) -> None:
        ready.wait()
        for _ in range(3000):
            with columns[n].lock:
                got[n] += budget.reserve(columns[n], 10 - budget.held_by(columns[n]))

    run([threading.Thread(target=work, args=(n,), daemon=True) for n in (0, 1)])
    assert max(got) > 0  # whose turn it was is the system's business
    for column in columns:
        with column.lock:
            assert budget.reserve(column, 10 - budget.held_by(column))
        assert budget.held == budget.held_by(column) == 10


def test_many_threads_never_hold_more_than_the_limit() -> None:
    limit = 1000
    budget = Budget("cpu", limit)
    counting = threading.Lock()
    real = {"now": 0, "most": 0}

    class Real(Column):
        """Counts what it has really taken, for all to see."""

        size = 0

        def load(self, size: int) -> bool:
            with self.lock:
                if not budget.reserve(self, size):
                    return False
                with counting:
                    real["now"] += size
                    real["most"] = max(real["most"], real["now"])
                self.size += size
                budget.settle(self)
                return True

        def evict(self) -> bool:
            if not self.lock.acquire(blocking=False):
                return False
            try:
                with counting:
                    real["now"] -= self.size
                self.size = 0
                budget.release(self)
                return True
            finally:
                self.lock.release()

    columns = [Real(budget) for _ in range(12)]
    loaded = [0] * 6

    def work(n: int) -> None:
        choose = random.Random(n)
        for _ in range(400):
            column = columns[choose.randrange(len(columns))]
            loaded[n] += column.load(choose.randrange(1, 400))
            budget.touch(columns[choose.randrange(len(columns))])
            if choose.random() < 0.1:
                column.evict()

    run([threading.Thread(target=work, args=(n,), daemon=True) for n in range(6)])
    assert min(loaded) > 0
    assert real["most"] <= limit
    assert budget.held == real["now"] == sum(column.size for column in columns)


def test_the_last_bytes_are_given_once() -> None:
    need = column_bytes(100, 8, np.dtype("float16"), CPU)
    budget = Budget("cpu", 3 * need)
    columns = [Column(budget, busy=True) for _ in range(8)]
    ready = threading.Barrier(8)
    plans: list[Any] = [None] * 8

    def work(n: int) -> None:
        ready.wait()
        plans[n] = plan(100, 8, np.dtype("float16"), CPU, budget, columns[n])

    run([threading.Thread(target=work, args=(n,), daemon=True) for n in range(8)])
    assert sorted(each.step for each in plans) == [Step.FLOAT16] * 3 + [Step.LANCE] * 5
    assert budget.held == 3 * need


def run(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "they wait for each other"


# ------------------------------------------------------------------ the ladder

F16, F32, F64 = (np.dtype(name) for name in ("float16", "float32", "float64"))


@pytest.mark.parametrize(
    ("stored", "limit", "step", "dtype", "reason"),
    [
        (F32, 1558, "float32", F32, "as stored"),
        (F16, 790, "float16", F16, "as stored"),
        (F64, 1558, "float32", F32, "float64 is searched as float32, and candidates are measured"),
        (F32, 1557, "float16", F16, "float32 needs 1.52 KiB, the memory budget is 1.52 KiB; float"),
        (F64, 790, "float16", F16, "float32 needs 1.52 KiB, the memory budget is 0.77 KiB; float1"),
        (
            F32,
            789,
            "lance",
            F32,
            "float32 needs 1.52 KiB, the memory budget is 0.77 KiB; float16 n",
        ),
        (F16, 789, "lance", F16, "float16 needs 0.77 KiB, the memory budget is 0.77 KiB; each sea"),
        (F64, 0, "lance", F32, "float32 needs 1.52 KiB, the memory budget is 0 bytes; float16 nee"),
    ],
)
def test_the_steps_on_a_cpu(
    stored: np.dtype, limit: int, step: str, dtype: np.dtype, reason: str
) -> None:
    budget = Budget("cpu", limit)
    column = Column(budget)
    found = plan(1, 384, stored, CPU, budget, column)
    wanted = 0 if step == "lance" else column_bytes(1, 384, dtype, CPU)
    assert (found.step, found.dtype, found.nbytes) == (step, dtype, wanted)
    assert found.home is (Home.LANCE if step == "lance" else Home.DEVICE)
    assert found.place(budget) is budget
    assert found.reason.startswith(reason)
    assert budget.held == budget.held_by(column) == wanted
    if found.dtype.itemsize < stored.itemsize:
        assert "measured again from the stored values" in found.reason or step == "lance"


def test_the_steps_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    free = fix_free(monkeypatch, cpu=1 << 30, cuda=1 << 30)
    budget = gpu_budget(2 * MB)
    device, column = budget.device, Column(budget)
    found = plan(1000, 384, F32, device, budget, column)
    assert (found.step, found.home, found.nbytes) == ("float32", "device", 1000 * (384 * 4 + 4))
    found = plan(2000, 384, F32, device, budget, column)
    assert (found.step, found.dtype, found.nbytes) == ("float16", F16, 2000 * (384 * 2 + 4))
    assert (budget.held, budget.host.held) == (found.nbytes, 0)
    for stored, dtype in ((F32, F32), (F64, F32), (F16, F16)):
        found = plan(3000, 384, stored, device, budget, column)
        assert (found.step, found.home, found.dtype) == ("host", "host", dtype)
        assert found.nbytes == 3000 * (384 * dtype.itemsize + 22)
        assert (budget.held, budget.host.held) == (0, found.nbytes)
        assert found.place(budget) is budget.host
        assert found.reason.endswith("the host holds it, and each search streams it to the device")
    free["cpu"] = MB
    found = plan(3000, 384, F32, device, budget, column)
    assert (found.step, found.nbytes, budget.held, budget.host.held) == ("lance", 0, 0, 0)
    assert "on the host it needs 4.46 MiB, 0.95 MiB can be taken on cpu" in found.reason
    free["cpu"] = 1 << 30
    assert plan(3000, 384, F32, device, budget, column).step is Step.HOST
    assert plan(1, 384, F32, device, budget, column).step is Step.FLOAT32  # and the host is free
    assert budget.host.held == 0
    free["cuda"] = 100  # less than any column
    assert plan(3000, 384, F32, device, budget, column).step is Step.HOST
    budget.release(column)
    assert budget.info()["held_on_host"] == 0


def test_a_plan_takes_the_place_of_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    free = fix_free(monkeypatch, cpu=2 * MB)
    budget = Budget("cpu")
    column = Column(budget)
    first = plan(1000, 384, F32, CPU, budget, column)
    assert first.step is Step.FLOAT32
    free["cpu"] -= first.nbytes * 10 // 9
    budget.settle(column)
    assert not budget.reserve(column, MB)  # 100 rows more would not fit beside it
    again = plan(1200, 384, F32, CPU, budget, column)
    assert (again.step, budget.held) == (Step.FLOAT16, again.nbytes)
    assert again.reason.startswith("float32 needs 1.78 MiB, 1.")


def test_others_go_before_a_column_is_narrowed() -> None:
    budget = Budget("cpu", 2 * MB)
    old, new, busy = Column(budget), Column(budget), Column(budget, busy=True)
    assert plan(1000, 384, F32, CPU, budget, old).step is Step.FLOAT32
    assert plan(1000, 384, F32, CPU, budget, new).step is Step.FLOAT32
    assert (old.evicted, budget.held_by(old)) == (1, 0)
    new.busy = True
    found = plan(500, 384, F32, CPU, budget, busy)
    assert found.step is Step.FLOAT16
    assert found.reason.startswith(
        "float32 needs 0.74 MiB, 0.42 MiB of the memory budget are left; float16 is held instead"
    )


def test_no_rows_and_bad_columns() -> None:
    budget = Budget("cpu", 0)
    column = Column(budget)
    found = plan(0, 384, F32, CPU, budget, column)
    assert (found.step, found.nbytes, found.reason) == ("float32", 0, "as stored")
    for rows, ndims, dtype in ((-1, 8, F32), (1, 0, F32), (1, 8, np.dtype("uint8"))):
        with pytest.raises(BadInputError, match="0 or more vectors of float16"):
            plan(rows, ndims, dtype, CPU, budget, column)


@pytest.mark.gpu
def test_a_real_gpu() -> None:
    device = torch.device("cuda", 0)
    budget = Budget("cuda")
    column = Column(budget)
    rows = 2 * total_memory(device) // (384 * 2)
    assert plan(rows, 384, F32, device, budget, column).home in (Home.HOST, Home.LANCE)
    assert plan(1000, 384, F32, device, budget, column).step is Step.FLOAT32
    assert (budget.held, budget.host.held) == (1000 * 1540, 0)


# ------------------------------------------------------------------ the option's way


def test_it_is_checked_before_torch_is_there() -> None:
    code = """
import json, sys, gpu_lance
gpu_lance.connect("memory://", memory_budget="50%")
try:
    gpu_lance.connect("memory://", memory_budget="much")
except ValueError as error:
    print(json.dumps([str(error), "torch" in sys.modules]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    message, torch_loaded = json.loads(done.stdout)
    assert message == (
        "memory_budget is 'much'; it is a number of bytes from 0, such as 2000000000, '8GiB', "
        "'500 MB' or '50%' of the device's memory."
    )
    assert not torch_loaded


def test_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Budget, "_shared", {})
    monkeypatch.setenv(VARIABLE, "lots")
    db = gpu_lance.connect("memory://", device="cpu")  # which asks for nothing yet
    with pytest.raises(BadInputError, match="^GPU_LANCE_MEMORY_BUDGET is 'lots'; it is a number"):
        Budget.of(db.device)
    for value in (" 1 GiB ", "2 GiB"):  # once used, it stays
        monkeypatch.setenv(VARIABLE, value)
        shared = ResidentIndexes("cpu").budget
        assert (shared.limit, shared is Budget.of("cpu")) == (1 << 30, True)
    assert ResidentIndexes("cpu", Budget("cpu", 5)).budget.limit == 5
    for value, wanted in ((" ", None), ("50%", total_memory(CPU) // 2)):
        monkeypatch.setattr(Budget, "_shared", {})
        monkeypatch.setenv(VARIABLE, value)
        assert Budget.of("cpu").limit == wanted


def test_a_connection_has_one_budget_for_its_tables(tmp_path: Path) -> None:
    rows = [{"vector": [1.0, 2.0]}]
    plain = gpu_lance.connect(tmp_path / "plain", device="cpu")
    bounded = gpu_lance.connect(tmp_path / "bounded", device="cpu", memory_budget="1 MB")
    tables = [bounded.create_table("a", rows), bounded.create_table("b", rows)]
    tables.append(gpu_lance.connect(tmp_path / "bounded", memory_budget="1 MB").open_table("a"))
    held = [table._indexes.budget for table in tables]
    assert held[0] is held[1]
    assert held[1] is not held[2]
    assert [each.limit for each in held] == [MB, MB, MB]
    other = plain.create_table("a", rows)
    assert other._indexes.budget is Budget.of("cpu")
    assert other.schema.metadata == tables[0].schema.metadata
    assert repr(bounded) == f"LanceDBConnection(uri={str(tmp_path / 'bounded')!r})"
    assert ResidentIndexes("cpu").budget is Budget.of("cpu")


def test_the_commands_take_it(tmp_path: Path) -> None:
    gpu_lance.connect(tmp_path, device="cpu").create_table("t", [{"n": 1, "vector": [1.0, 2.0]}])
    call = CliRunner().invoke
    found = call(cli.app, ["info", str(tmp_path), "--memory-budget", "2 GiB", "--json"])
    assert json.loads(found.stdout)["device"]["budget_bytes"] == 2 << 30
    assert "2.00 GiB for resident" in call(cli.app, ["info", "--memory-budget", "2GiB"]).stdout
    assert overview.system("cpu")["device"]["budget_bytes"] is None
    search = ["search", str(tmp_path), "t", "[1, 2]", "--vector", "--device", "cpu", "--json"]
    found = call(cli.app, [*search, "--memory-budget", "0"])
    assert json.loads(found.stdout)["hits"] == [{"n": 1, "_distance": 0.0}]
    for command in (["demo"], ["info"], search):
        assert "--memory-budget" in call(cli.app, [command[0], "--help"]).stdout
        refused = call(cli.app, [*command, "--memory-budget", "much"])
        assert refused.exit_code == 2
        assert "--memory-budget" in refused.stderr
        assert "'much'" in refused.stderr
