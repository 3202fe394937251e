"""A table whose files are lost or damaged says so, whatever is asked of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpu_lance.db import connect
from gpu_lance.errors import BadInputError, StorageError
from gpu_lance.table import Table

READS: dict[str, Callable[[Table], Any]] = {
    "search": lambda t: t.search([1.0, 1.0]).to_list(),
    "filtered search": lambda t: t.search([1.0, 1.0]).where("id > 3").to_list(),
    "scan": lambda t: t.search().to_list(),
    "filtered scan": lambda t: t.search().where("id > 3").to_list(),
    "to_arrow": lambda t: t.to_arrow(),
    "to_pandas": lambda t: t.to_pandas(),
    "head": lambda t: t.head(3),
    "count": lambda t: t.count_rows("id > 3"),
    "update": lambda t: t.update("id = 1", {"word": "x"}),
    "delete": lambda t: t.delete("id = 1"),
}


def lose(file: Path) -> None:
    file.unlink()


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def garble(file: Path) -> None:
    file.write_bytes(bytes(range(1, 256)) * (file.stat().st_size // 255 + 1))


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [{"id": i, "word": "w" * 200, "vector": [float(i), 1.0]} for i in range(500)]


@pytest.mark.parametrize("damage", [lose, cut, garble])
def test_damaged_data(tmp_path: Path, rows: list[dict[str, Any]], damage: Any) -> None:
    connect(tmp_path, device="cpu").create_table("t", rows)
    (file,) = (tmp_path / "t.lance" / "data").glob("*.lance")
    damage(file)
    table = connect(tmp_path, device="cpu").open_table("t")
    for name, read in READS.items():
        with pytest.raises(StorageError, match=r"files cannot be read|cannot be written") as info:
            read(table)
        assert "/home/" not in str(info.value), name
    assert table.version == 1
    assert len(table) == 500


def test_a_table_recovers_with_its_file(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    table = connect(tmp_path, device="cpu").create_table("t", rows)
    expected = table.search([7.0, 1.0]).limit(3).to_list()
    (file,) = (tmp_path / "t.lance" / "data").glob("*.lance")
    whole = file.read_bytes()
    garble(file)
    table.close()
    other = connect(tmp_path, device="cpu").open_table("t")
    with pytest.raises(StorageError):
        other.search([7.0, 1.0]).to_list()
    file.write_bytes(whole)
    again = connect(tmp_path, device="cpu").open_table("t")
    assert again.search([7.0, 1.0]).limit(3).to_list() == expected


def test_numbers_beyond_any_table(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    table = connect(tmp_path, device="cpu").create_table("t", rows)
    huge = 10**30
    for search in (table.search([0.0, 1.0]), table.search()):
        assert len(search.limit(huge).to_list()) == 500
        assert search.offset(huge).limit(huge).to_list() == []
    assert table.head(huge).num_rows == 500
    for n in (-1, 2.5, "3"):
        with pytest.raises(BadInputError, match="head"):
            table.head(n)  # type: ignore[arg-type]
