"""Text embedding through `table.add`: rows per CPU-second beside LanceDB, on the same weights.

Contenders embed the same texts with the same model folder, each in a process of its own with the
same number of threads; they take turns, and the medians of the rounds are compared. CPU seconds
are those of the whole process, so threads that work ahead are paid for. Vectors are compared row
by row first: nothing is reported if one differs.

    python benchmarks/bench_text.py [--rows 1500] [--rounds 3] [--out results.csv]
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import quantile, stamp, write_csv
from text_sides import (
    Job,
    Worker,
    mixed_texts,
    rounds_of,
    serve,
    short_texts,
    table_adder,
    tokens_of,
)

AIM = 1.7
LIBRARIES = ("torch", "transformers", "sentence-transformers", "lancedb", "pylance", "gpu-lance")
CONTENDERS = ("gpu_lance", "lancedb", "sentence_transformers")


@dataclass(frozen=True)
class Case:
    """Which texts are embedded, and with how many threads."""

    name: str
    texts: list[str]
    threads: int


# ------------------------------------------------------------------------------- the contenders


def library(folder: str) -> Callable[[list[str]], Job]:
    """Sentence-transformers alone, with its defaults: no table."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu")
    seen = {"padded": 0}

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        seen["padded"] += 0 if ids is None else ids.numel()

    model[0].auto_model.embeddings.register_forward_pre_hook(count, with_kwargs=True)

    def add(texts: list[str]) -> Job:
        seen["padded"] = 0
        made: list[Any] = []

        def run() -> None:
            made.append(model.encode(texts, normalize_embeddings=True, show_progress_bar=False))

        return Job(run, lambda: made[0], lambda: dict(seen))

    return add


def work(name: str, folder: str, threads: int) -> None:
    """Be one contender."""
    import torch

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as place:
        if name == "sentence_transformers":
            serve(library(folder))
        else:
            serve(table_adder(name, "sentence-transformers", folder, place))


# ------------------------------------------------------------------------------------ the report


def measure(case: Case, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Run a case: rows of the report, one a contender."""
    counts = tokens_of(folder, case.texts)
    print(
        f"\n{case.name}: {len(case.texts)} texts of {min(counts)} to {max(counts)} tokens, "
        f"{sum(counts)} in all, {case.threads} thread(s)",
        flush=True,
    )
    workers = {
        name: Worker((name, str(folder), str(case.threads)), case.threads) for name in CONTENDERS
    }
    try:
        for worker in workers.values():
            worker.embed(case.texts[:64])
        runs, cosines = rounds_of(workers, case.texts, rounds)
    finally:
        for worker in workers.values():
            worker.close()
    padding = runs["sentence_transformers"][0]["padded"] / sum(counts)
    rows = [summary(name, case, runs[name], cosines.get(name)) for name in CONTENDERS]
    for row in rows[1:]:
        row["ours_over_it"] = round(rows[0]["rows_per_cpu_s"] / row["rows_per_cpu_s"], 3)
        print(
            f"  {row['ours_over_it']:.2f}x {row['contender']}'s rows per CPU-second; least cosine "
            f"{row['least_cosine']:.6f}"
        )
    print(f"  the library computes {padding:.2f} tokens for each token of the texts (padding)")
    for row in rows:
        row["padding"] = round(padding, 3)
        print(
            f"  {row['contender']:>22}: {row['rows_per_cpu_s']:7.1f} rows per CPU-s "
            f"({row['p20']:.1f} to {row['p80']:.1f}), {row['rows_per_s']:7.1f} rows/s, "
            f"peak {row['peak_mb']:.0f} MB"
        )
    return rows


def summary(
    name: str, case: Case, runs: list[dict[str, Any]], cosine: float | None
) -> dict[str, Any]:
    """The figures of one contender in one case."""
    rates = [len(case.texts) / run["cpu_s"] for run in runs]
    walls = statistics.median(len(case.texts) / run["wall_s"] for run in runs)
    return {
        "case": case.name,
        "contender": name,
        "threads": case.threads,
        "rows": len(case.texts),
        "rows_per_cpu_s": round(statistics.median(rates), 2),
        "p20": round(quantile(rates, 0.2), 2),
        "p80": round(quantile(rates, 0.8), 2),
        "rows_per_s": round(walls, 2),
        "peak_mb": round(max(run["peak_mb"] for run in runs)),
        "least_cosine": None if cosine is None else round(cosine, 6),
        "ours_over_it": None,
        "padding": None,
    }


def main() -> None:
    """Run the cases and write their table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--rows", type=int, default=1500, help="texts of mixed length")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", default="mixed,mixed-2-threads,short")
    parser.add_argument("--out", type=Path, help="a CSV file for the figures")
    parser.add_argument("--worker", nargs=3, metavar=("NAME", "FOLDER", "THREADS"))
    args = parser.parse_args()
    if args.worker:
        name, folder, threads = args.worker
        work(name, folder, int(threads))
        return
    from gpu_lance.embeddings.locate import locate

    folder = Path(locate("sentence-transformers/all-MiniLM-L6-v2").folder)
    texts = mixed_texts(folder, args.rows)
    cases = {
        "mixed": Case("mixed", texts, 1),
        "mixed-2-threads": Case("mixed-2-threads", texts, 2),
        "short": Case("short", short_texts(folder, 2 * args.rows), 1),
    }
    rows = [
        row for name in args.cases.split(",") for row in measure(cases[name], folder, args.rounds)
    ]
    made = stamp(LIBRARIES)
    print("\n" + ", ".join(f"{name} {value}" for name, value in made.items()))
    if args.out:
        write_csv(args.out, rows, made)
    for row in rows:
        if (row["case"], row["contender"]) == ("mixed", "lancedb") and row["ours_over_it"] < AIM:
            raise SystemExit(f"{row['ours_over_it']} times LanceDB's rate is below {AIM}.")


if __name__ == "__main__":
    main()
