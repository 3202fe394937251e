"""Batches: within their budget, complete, and halved when memory runs out."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpu_lance.embeddings.batching import Budget, next_batch, run_batches
from gpu_lance.errors import OutOfDeviceMemoryError

CPU = torch.device("cpu")


class Device:
    """Takes batches of at most `most` in total cost."""

    def __init__(self, costs: np.ndarray, most: int) -> None:
        self.costs = costs
        self.most = most
        self.tried: list[int] = []

    def __call__(self, start: int, end: int) -> torch.Tensor:
        self.tried.append(end - start)
        if self.costs[start:end].sum() > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return torch.arange(start, end)


def run(costs: list[int], budget: Budget, most: int = 1 << 40) -> tuple[list[int], list[int]]:
    """The items that came out, and the sizes of the batches that were tried."""
    array = np.array(costs, np.int64)
    device = Device(array, most)
    out: list[int] = []
    for start, end, made in run_batches(array, budget, device, CPU, "Model"):
        assert len(made) == end - start
        out += made.tolist()
    return out, device.tried


@given(
    st.lists(st.integers(0, 50), max_size=40),
    st.none() | st.integers(1, 100),
    st.none() | st.integers(1, 10),
    st.integers(50, 200),
)
def test_every_item_comes_out_once_within_the_budget(costs, cost, items, most):
    costs = sorted(costs, reverse=True)
    out, tried = run(costs, Budget(cost, items), most)
    assert out == list(range(len(costs)))
    if items is not None:
        assert max(tried, default=0) <= items
    if cost is not None:
        start = 0
        for size in tried if sum(tried) == len(costs) else []:
            assert size == 1 or size * max(1, costs[start]) <= cost
            start += size


def test_a_batch_takes_as_many_as_the_costliest_allows():
    assert next_batch(np.array([10, 1, 1, 1]), 0, Budget(cost=30)) == 3
    assert next_batch(np.array([10, 1, 1, 1]), 1, Budget(cost=30)) == 4
    assert next_batch(np.array([100, 1]), 0, Budget(cost=30)) == 1
    assert next_batch(np.ones(9), 2, Budget(items=4)) == 6
    assert next_batch(np.ones(9), 0, Budget()) == 9


def test_running_out_of_memory_halves_the_batch_and_is_told_once(caplog):
    budget = Budget()
    with caplog.at_level(logging.WARNING, logger="gpu_lance"):
        out, tried = run([1] * 10, budget, most=3)
    assert out == list(range(10))
    assert tried == [10, 5, 2, 2, 2, 2, 2]
    assert [record.getMessage() for record in caplog.records] == [
        "Model: a batch of 10 items ran out of memory on cpu; batches are halved. Pass a smaller "
        "batch_size to avoid the attempt."
    ]
    # what did not fit once is not tried again
    assert run([1] * 6, budget, most=3)[1] == [2, 2, 2]


def test_halving_counts_cost_and_not_only_items():
    out, tried = run([8, 8, 8, 8, 1, 1, 1, 1, 1, 1, 1, 1], Budget(), most=16)
    assert out == list(range(12))
    assert tried[-1] == 8  # cheap items still go together


def test_batch_size_shrinks_too():
    assert run([1] * 8, Budget(items=8), most=4)[1] == [8, 4, 4]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("MPS backend out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=["cuda", "host", "mps", "cpu"],
)
def test_an_item_that_does_not_fit_by_itself_is_an_error(error):
    def forward(start: int, end: int) -> torch.Tensor:
        raise error

    with pytest.raises(OutOfDeviceMemoryError, match="Model: one item of cost 7 does not") as e:
        list(run_batches(np.array([7, 7, 7]), Budget(), forward, CPU, "Model"))
    assert e.value.__cause__ is error
    assert isinstance(e.value, MemoryError)


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), OutOfDeviceMemoryError("all")])
def test_other_errors_are_not_met_with_smaller_batches(error):
    tried = []

    def forward(start: int, end: int) -> torch.Tensor:
        tried.append(end - start)
        raise error

    with pytest.raises(type(error)) as caught:
        list(run_batches(np.ones(4, np.int64), Budget(), forward, CPU, "Model"))
    assert caught.value is error
    assert tried == [4]
