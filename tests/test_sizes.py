"""Sizes of memory: what is read as one, what is refused, and how one is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gpu_lance
from gpu_lance.device import total_memory
from gpu_lance.errors import BadInputError, WrongTypeError
from gpu_lance.index.budget import Budget
from gpu_lance.index.sizes import parse_bytes, show_bytes


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (0, 0),
        ("0", 0),
        (123, 123),
        (np.int64(7), 7),
        (1.5e9, 1_500_000_000),
        (np.float32(8), 8),
        ("8GiB", 8 << 30),
        (" 8 gib ", 8 << 30),
        ("500 MB", 500_000_000),
        ("1.5e9", 1_500_000_000),
        ("1e3k", 1_000_000),
        ("64k", 64_000),
        ("64Ki", 65_536),
        (".5 TiB", 1 << 39),
        ("2.t", 2 * 10**12),
        ("12 B", 12),
        ("1.9", 1),
    ],
)
def test_a_size(value: Any, wanted: int) -> None:
    found = parse_bytes(value)
    assert (found, type(found)) == (wanted, int)


def test_a_share() -> None:
    assert parse_bytes("12.5 %", lambda: 800) == 100
    assert parse_bytes("100%", lambda: 801) == 801
    assert parse_bytes("0%", lambda: 801) == 0
    with pytest.raises(BadInputError):
        parse_bytes("50%")  # of nothing
    cpu = torch.device("cpu")
    assert Budget(cpu, "50%").limit == total_memory(cpu) // 2


@pytest.mark.parametrize(
    "value",
    [
        *("", " ", "GiB", "8 GiBs", "8 Q", "-1", "-8GiB", "nan", "inf", "1e999", "1e30", "1,5 GiB"),
        *("1_000", "0x10", "8 8", "8GiB!", "101%", "%", "-5%", "1e", "٣", "8\nGiB\n8", "9" * 5000),
        *(-1, -0.5, 1.5, float("nan"), float("inf"), 10**400, 1 << 63),
    ],
    ids=lambda value: repr(value)[:12],
)
def test_what_is_no_size(value: Any) -> None:
    with pytest.raises(
        BadInputError, match=r"^of_mine is .+; it is a number of .+ '8GiB'"
    ) as found:
        parse_bytes(value, lambda: 100, "of_mine")
    assert len(str(found.value)) < 250
    with pytest.raises(BadInputError, match="^memory_budget is "):
        gpu_lance.connect("memory://", memory_budget=value)


@pytest.mark.parametrize("value", [True, False, [], {}, b"8GiB", object(), 1j, Path("8")])
def test_what_cannot_be_a_size(value: Any) -> None:
    with pytest.raises(WrongTypeError, match="^memory_budget is "):
        gpu_lance.connect("memory://", memory_budget=value)


@given(st.integers(0, 1 << 50))
def test_a_shown_size_is_near(size: int) -> None:
    shown = show_bytes(size).replace("bytes", "B")
    # two decimals of at least 0.1 of a unit
    assert abs(parse_bytes(shown) - size) <= 0.05 * size
