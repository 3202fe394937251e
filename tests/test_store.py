"""The resident store: what snapshots keep, chunks, sweeping, narrow rows, the plan's word."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gpu_lance.errors import BadVectorError
from gpu_lance.index.chunks import DoesNotNarrowError, NoRoomError
from gpu_lance.index.slots import SlotMap
from gpu_lance.index.snapshot import Snapshot
from gpu_lance.index.store import ResidentStore

CPU = torch.device("cpu")


def new(d: int = 3, dtype: torch.dtype = torch.float32, **more: object) -> ResidentStore:
    return ResidentStore(d, dtype, CPU, **more)  # type: ignore[arg-type]


def contents(snapshot: Snapshot) -> dict[int, list[float]]:
    live = np.ones(len(snapshot), bool) if snapshot.live is None else snapshot.live
    slots = np.flatnonzero(live)
    rows = snapshot.gather(torch.from_numpy(slots)).float()
    return dict(zip(snapshot.row_ids[slots].tolist(), rows.tolist(), strict=True))


def test_random_changes_against_a_dict() -> None:
    """Every snapshot that was published stays as it was, over appends, updates and sweeps."""
    rng = np.random.default_rng(0)
    store = new(4, chunk_bytes=400)
    truth: dict[int, list[float]] = {}
    published: list[tuple[Snapshot, dict[int, list[float]]]] = []
    swept = fresh = 0
    for step in range(200):
        n = int(rng.integers(1, 12))
        rows = rng.standard_normal((n, 4)).astype(np.float32)
        if step % 4 < 2:
            rows[rng.random(n) < 0.1] = np.nan
            valid = rng.random(n) > 0.1
            ids = np.arange(fresh, fresh + n)
            fresh += n
            store.add(torch.from_numpy(rows), ids, step, valid)
            good = valid & np.isfinite(rows).all(1)
        else:
            ids = rng.choice(list(truth), min(len(truth), n), replace=False)
            rows, good = rows[: len(ids)], np.full(len(ids), step % 4 == 2)
            assert store.remove(ids) == len(ids)
            for gone in ids:
                del truth[gone]
            if step % 4 == 2:
                store.add(torch.from_numpy(rows), ids, step)
        truth |= {int(i): r.tolist() for i, r, ok in zip(ids, rows, good, strict=True) if ok}
        if store.wants_sweep:
            for snapshot in store.sweep():
                assert contents(snapshot) == truth
                swept += 1
            assert len(store.slots) == len(truth)
        published.append((store.publish(), dict(truth)))
        assert len(store) == len(truth)
    assert swept > 10
    for snapshot, held in published:
        assert contents(snapshot) == held
        assert snapshot.num_live == len(held)
        slots = torch.arange(len(snapshot))
        lengths = torch.linalg.vector_norm(snapshot.gather(slots), dim=1)
        torch.testing.assert_close(snapshot.norms_of(slots), lengths)
        some = np.array([*list(held)[::2], 10**9])
        mask = snapshot.mask(some)
        assert mask.count == int(mask.bits.sum()) == len(some) - 1
        assert set(snapshot.row_ids[mask.bits.numpy()]) == set(some[:-1])


def test_pieces_are_views_of_the_chunks_in_order() -> None:
    store = new(2, chunk_bytes=30 * 10)
    rows = torch.arange(60.0).view(30, 2)
    for start in range(0, 30, 4):
        store.add(rows[start : start + 4], np.arange(start, min(start + 4, 30)))
    snapshot = store.publish()
    pieces = list(snapshot.pieces())
    assert len(pieces) > 2
    assert [first for first, _, _ in pieces] == list(snapshot.offsets[:-1])
    assert torch.equal(torch.cat([vectors for _, vectors, _ in pieces]), rows)
    assert pieces[0][1].data_ptr() == snapshot.chunks[0].vectors.data_ptr()


def test_an_append_moves_no_chunk() -> None:
    store = new(2)
    store.expect(10)
    store.add(torch.zeros(10, 2), np.arange(10))
    before = store.publish()
    places = [chunk.vectors.data_ptr() for chunk in before.chunks]
    store.add(torch.ones(500, 2), np.arange(10, 510))
    after = store.publish()
    assert [chunk.vectors.data_ptr() for chunk in after.chunks[: len(places)]] == places
    assert len(before) == 10
    assert len(after) == 510
    assert before.chunks[0] is after.chunks[0]


def test_what_is_announced_is_taken_once() -> None:
    taken: list[int] = []
    store = new(2, reserve=lambda size, needed: taken.append(size) is None)
    store.expect(1000)
    for start in range(0, 1000, 100):
        store.add(torch.zeros(100, 2), np.arange(start, start + 100))
    assert len(taken) == 1
    assert taken[0] == 1000 * (8 + 4 + 18)
    store.add(torch.zeros(1, 2), np.array([1000]))
    assert len(taken) == 2


def test_without_room_it_takes_what_it_needs_or_says_so() -> None:
    store = new(2, reserve=lambda size, needed: size <= 3000)
    store.add(torch.zeros(100, 2), np.arange(100))  # 1 MiB at once was refused
    with pytest.raises(NoRoomError, match="101 more rows"):
        store.add(torch.zeros(101, 2), np.arange(100, 201))


def test_a_sweep_frees_and_stops_without_room() -> None:
    counted = [0]

    def release(size: int) -> None:
        counted[0] -= size

    allowed = [True]

    def reserve(size: int, needed: bool) -> bool:
        counted[0] += size if allowed[0] else 0
        return allowed[0]

    store = new(2, reserve=reserve, release=release, chunk_bytes=3000)
    store.expect(300)
    store.add(torch.rand(300, 2), np.arange(300))
    full = counted[0]
    store.remove(np.arange(0, 300, 2))
    assert store.wants_sweep
    allowed[0] = False
    assert list(store.sweep()) == []
    assert len(store.slots) == 300
    allowed[0] = True
    held = [len(snapshot) for snapshot in store.sweep()]
    assert held == sorted(held, reverse=True)
    assert held[-1] == 150
    assert counted[0] == full // 2
    store.remove(np.arange(300))
    assert [len(snapshot) for snapshot in store.sweep()][-1] == 0
    assert counted[0] == 0


def test_lengths_are_known() -> None:
    store = new(2)
    assert store.publish().lengths.deviation == 0.0
    store.add(torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0]]), np.arange(3))
    known = store.publish().lengths
    assert (known.largest, known.smallest, known.zeros) == (5.0, 1.0, True)
    assert known.deviation == 4.0
    directed = store.publish().directed_mask
    assert directed is not None
    assert directed.bits.tolist() == [True, True, False]
    store.remove(np.array([0]))
    directed = store.publish().directed_mask
    assert directed is not None
    assert (directed.bits.tolist(), directed.count) == ([False, True, False], 1)


def test_a_tiny_vector_is_not_zero() -> None:
    store = new(2)
    store.add(torch.tensor([[1e-30, 0.0], [0.0, 0.0], [1e30, 1e30]]), np.arange(3))
    norms = store.publish().chunks[0].norms[:3]
    assert norms[0] > 0
    assert norms[1] == 0
    assert norms[2] == float("inf")  # it overflowed, and the row is there


@pytest.mark.parametrize("given", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_rows_are_held_as_float16(given: torch.dtype) -> None:
    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)).to(given)
    store = new(8, torch.float16)
    store.add(rows, np.arange(50))
    held = store.publish().gather(torch.arange(50))
    assert held.dtype is torch.float16
    assert torch.equal(held, rows.to(torch.float16))


@pytest.mark.parametrize("row", [[1e5, 0.0], [1e-9, 0.0]])
def test_what_float16_cannot_hold_is_refused(row: list[float]) -> None:
    store = new(2, torch.float16)
    with pytest.raises(DoesNotNarrowError, match=r"1 vectors of torch\.float32"):
        store.add(torch.tensor([[1.0, 2.0], row]), np.arange(2))


def test_nan_and_infinity_are_left_out_of_narrow_rows_too() -> None:
    store = new(2, torch.float16)
    rows = torch.tensor([[1.0, 2.0], [float("nan"), 0], [0, float("inf")], [0.0, 0.0], [3.0, 4.0]])
    store.add(rows, np.arange(5))
    assert contents(store.publish()) == {0: [1.0, 2.0], 3: [0.0, 0.0], 4: [3.0, 4.0]}


def test_bad_shapes() -> None:
    store = new(3)
    with pytest.raises(BadVectorError, match="3 values"):
        store.add(torch.zeros(2, 4), np.arange(2))
    with pytest.raises(BadVectorError, match="2 row ids"):
        store.add(torch.zeros(3, 3), np.arange(2))


def test_slot_map_finds_the_newest_live_slot() -> None:
    slots = SlotMap()
    slots.add(np.array([5, 3, 9]), np.array([1, 1, 1]))
    assert slots.remove(np.array([3, 3, 4])) == 1
    assert slots.find(np.array([3, 5, 0, 10])).tolist() == [-1, 0, -1, -1]
    slots.add(np.array([3]), np.array([2]))
    assert slots.find(np.array([3, 9])).tolist() == [3, 2]
    slots.compact(0, 4)
    assert slots.row_ids.tolist() == [5, 9, 3]
    assert slots.updated.tolist() == [1, 1, 2]
    assert slots.find(np.array([3, 9, 5])).tolist() == [2, 1, 0]
    assert len(slots) == slots.num_live == 3


def test_bfloat16_reaches_further_than_float16() -> None:
    store = new(2, torch.float16)
    store.add(torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16), np.array([0]))
    for value in (1e10, 1e-10):
        with pytest.raises(DoesNotNarrowError, match="1 vectors of torch.bfloat16"):
            store.add(torch.full((1, 2), value, dtype=torch.bfloat16), np.array([1]))


def test_norms_of_rows_that_were_swept_out_are_forgotten() -> None:
    store = new(2)
    store.add(torch.tensor([[1e18, 0], [0, 0], [3, 4], [0, 1]]), np.arange(4))
    store.remove(np.array([0, 1]))
    before = store.publish().lengths
    assert (before.largest, before.zeros) == (np.float32(1e18), True)
    assert [snapshot.lengths.largest for snapshot in store.sweep()] == [5.0]
    assert (store.publish().lengths.smallest, store.publish().lengths.zeros) == (1.0, False)
