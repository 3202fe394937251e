"""Exact search of a column with any number of vectors a row, beside padded torch and LanceDB.

Rows have 20 to 100 unit vectors of 128 values, queries 32; cosine, the 10 nearest, ids fetched. The
sides take turns on one table and must give the same ids.

    python benchmarks/bench_multivectors.py [--rows 20000] [--rounds 5] [--out new.csv]
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from measuring import Side, figures, flat, over, show, stamp, turns, write_csv

import gpu_lance

LIBRARIES = ("torch", "lancedb", "pylance", "gpu-lance")
D, WIDTH, K = 128, 32, 10
COLUMNS = ["id", "_distance"]
AIM = 1.0  # times LanceDB's time that ours may take at most
PART = 2_000  # rows that torch pads at once; all together would be slower


def unit(random: np.random.Generator, *shape: int) -> np.ndarray:
    """Unit vectors (*shape, d), for which torch's plain product orders as cosine does."""
    vectors = random.standard_normal((*shape, D), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def documents(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The vectors (t, d) of all rows end to end, and where each row's begin (rows + 1,)."""
    random = np.random.default_rng(0)
    bounds = np.concatenate(([0], np.cumsum(random.integers(20, 101, rows))))
    return unit(random, int(bounds[-1])), bounds


def through_table(search: Any) -> Side:
    """One call of a table's search for all queries, or one for each."""

    def side(queries: np.ndarray) -> tuple[float, np.ndarray]:
        start = time.perf_counter()
        ids = search(queries)
        return 1e3 * (time.perf_counter() - start), np.asarray(ids)

    return side


def ours(table: Any) -> Side:
    """This package, all queries in one call."""

    def search(queries: np.ndarray) -> np.ndarray:
        found = table.search(queries).distance_type("cosine").limit(K).select(COLUMNS).to_arrow()
        return found["id"].to_numpy().reshape(len(queries), K)

    return through_table(search)


def lancedb(path: Path) -> Side:
    """LanceDB, which takes one such query a call."""
    import lancedb as theirs

    table = theirs.connect(path).open_table("t")

    def search(queries: np.ndarray) -> list[Any]:
        made = [table.search(one, vector_column_name="v") for one in queries]
        return [
            one.distance_type("cosine").limit(K).select(COLUMNS).to_arrow()["id"].to_pylist()
            for one in made
        ]

    return through_table(search)


def padded(vectors: np.ndarray, bounds: np.ndarray, device: str) -> Side:
    """Plain torch over documents padded to one length, on the device; no table."""
    lengths = np.diff(bounds)
    there = torch.from_numpy(np.arange(lengths.max()) < lengths[:, None]).to(device)
    room = torch.zeros((*there.shape, D), device=device)
    room[there] = torch.from_numpy(vectors).to(device)

    def search(queries: np.ndarray) -> np.ndarray:
        found = []
        for query in torch.from_numpy(queries).to(device):
            scores = [
                torch.einsum("qd,ntd->qnt", query, some)
                .masked_fill_(~mask, -torch.inf)
                .amax(-1)
                .sum(0)
                for some, mask in zip(room.split(PART), there.split(PART), strict=True)
            ]
            found.append(torch.cat(scores).topk(K).indices)
        return torch.stack(found).cpu().numpy()

    return through_table(search)


def main() -> None:
    """Run the cases and write their table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="a CSV file for the figures")
    args = parser.parse_args()
    vectors, bounds = documents(args.rows)
    report: list[dict[str, Any]] = []
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), D)
        column = pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), values)
        table = gpu_lance.connect(folder, device=args.device).create_table(
            "t", pa.table({"id": np.arange(args.rows), "v": column})
        )
        sides = {
            "gpu_lance": ours(table),
            "torch, padded": padded(vectors, bounds, args.device),
            "lancedb": lancedb(Path(folder)),
        }
        random = np.random.default_rng(1)
        for many in (1, 10):
            rounds = [[unit(random, many, WIDTH)] for _ in range(args.rounds)]
            times, ids = turns(sides, rounds)
            print(f"\n{args.rows} rows, {len(vectors)} vectors; {many} queries of {WIDTH} vectors")
            for name in sides:
                for mine, other in zip(
                    itertools.chain(*ids["gpu_lance"]), itertools.chain(*ids[name]), strict=True
                ):
                    if not np.array_equal(mine, other):
                        raise SystemExit(f"{name} finds other rows; nothing is reported.")
                ratio = round(over(times, name), 3)
                row = figures(flat(times[name]), many, side=name, rows=args.rows, over_ours=ratio)
                report.append(row)
                show(row, name)
                print(f"    {'':>24}  {ratio:.2f} times our time")
            if over(times, "lancedb") < AIM:
                missed.append(f"{many} queries: LanceDB takes less time")
    made = stamp(LIBRARIES, args.device)
    print("\n" + ", ".join(f"{name} {value}" for name, value in made.items()))
    if args.out:
        write_csv(args.out, report, made)
    if missed:
        raise SystemExit("; ".join(missed))


if __name__ == "__main__":
    main()
