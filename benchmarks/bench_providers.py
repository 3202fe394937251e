"""The provider `huggingface` through `table.add`, beside LanceDB's of that name.

Both embed with the same weights: those of all-MiniLM-L6-v2, and a BERT-base of random ones. On the
CPU: rows per CPU-second with one thread; loads of the model are counted. On a GPU: texts a second,
beside sentence-transformers too, with the share of the arithmetic floor, and of the time in which
kernels run. What loading takes is left out of the rates. Contenders have processes of their own
and take turns; medians are compared. Vectors are compared first: nothing is reported if one
differs.

    python benchmarks/bench_providers.py [--device cuda] [--scale 1] [--rounds 3] [--out new.csv]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measuring import quantile, stamp, write_csv
from provider_sides import bert_base, contender
from text_sides import (
    LIMIT,
    Worker,
    least_cosine,
    mixed_texts,
    rounds_of,
    serve,
    short_texts,
    tokens_of,
)

LIBRARIES = ("torch", "transformers", "sentence-transformers", "lancedb", "pylance", "gpu-lance")
SHORT = (5, 8, 12, 16)  # words of texts under 32 tokens
# Texts, and how many times LanceDB's rate is wanted.
CPU = {
    ("minilm", "short"): (1200, 1.7),
    ("minilm", "mixed"): (500, 1.0),
    ("bert-base", "short"): (120, 1.0),
    ("bert-base", "mixed"): (60, 1.0),
}
CUDA = {
    ("minilm", "short"): 80_000,
    ("minilm", "mixed"): 40_000,
    ("bert-base", "short"): 30_000,
    ("bert-base", "mixed"): 15_000,
}
CUDA_AIM = 3.0
FEWER = {"lancedb": 300, "sentence_transformers": 10_000}  # texts of slower contenders on a GPU
BATCHES = (128, 512)  # of sentence-transformers
CLOSE = 0.999  # least cosine of bfloat16 to float32
FLOPS = {"minilm": 22e6, "bert-base": 175e6}  # a token
PEAK = 800e12  # FLOP/s, of an H100 in bfloat16
STAGES = ("read", "prepare", "embed", "store", "write")


def texts_of(kind: str, folder: Path, rows: int) -> list[str]:
    """Different texts of a kind; none is cut off, whatever a provider's limit."""
    if kind == "short":
        found = short_texts(folder, rows, SHORT, 31)
    else:
        found = mixed_texts(folder, rows, LIMIT - 8)
    if len(found) >= rows:
        return found
    return [f"{i} {found[i % len(found)]}" for i in range(rows)]


@contextmanager
def workers_of(
    names: tuple[str, ...], folder: Path, device: str, threads: int | None
) -> Iterator[dict[str, Worker]]:
    """The contenders' processes, started side by side and warm."""
    workers = {name: Worker((name, str(folder), device), threads) for name in names}
    try:
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


# ---------------------------------------------------------------------------------------- the CPU


def on_cpu(
    folders: dict[str, Path], scale: float, rounds: int, missed: list[str]
) -> Iterator[list[Any]]:
    """The rows of the report, case by case, on one thread."""
    for model, folder in folders.items():
        with workers_of(("gpu_lance", "lancedb"), folder, "cpu", 1) as workers:
            for worker in workers.values():
                worker.embed(["a text"] * 8)
            adds = 1
            for (of, kind), (count, aim) in CPU.items():
                if of != model:
                    continue
                texts = texts_of(kind, folder, max(8, round(scale * count)))
                runs, cosines = rounds_of(workers, texts, rounds)
                adds += rounds
                tokens = sum(tokens_of(folder, texts))
                rows = [cpu_row(model, kind, name, texts, tokens, runs[name]) for name in workers]
                ours, theirs = rows
                theirs["least_cosine"] = round(cosines["lancedb"], 6)
                theirs["ours_over_it"] = round(
                    statistics.median(
                        (b["cpu_s"] - b["load_cpu_s"]) / (a["cpu_s"] - a["load_cpu_s"])
                        for a, b in zip(runs["gpu_lance"], runs["lancedb"], strict=True)
                    ),
                    3,
                )
                print(
                    f"\n{model}, {kind}: {len(texts)} texts, {tokens / len(texts):.1f} tokens each,"
                    f" one thread\n  {theirs['ours_over_it']:.2f}x LanceDB's rows per CPU-second "
                    f"(wanted {aim:g}); least cosine {theirs['least_cosine']:.6f}"
                )
                for row in rows:
                    print(
                        f"  {row['contender']:>10}: {row['rows_per_cpu_s']:7.1f} rows per CPU-s "
                        f"({row['p20']:.1f} to {row['p80']:.1f}); {row['loads']} load(s) of "
                        f"the model in {adds} adds, {row['load_cpu_s']:.2f} CPU-s an add",
                        flush=True,
                    )
                if theirs["ours_over_it"] < aim:
                    missed.append(f"{model}, {kind}: {theirs['ours_over_it']:.2f}, not {aim:g}")
                if ours["loads"] != 1:
                    missed.append(f"{model}: {ours['loads']} loads of the model, not one")
                yield rows


def cpu_row(
    model: str, kind: str, name: str, texts: list[str], tokens: int, runs: list[dict[str, Any]]
) -> dict[str, Any]:
    """The figures of one contender in one case; rates leave out what loading took."""
    rates = [len(texts) / (run["cpu_s"] - run["load_cpu_s"]) for run in runs]
    return {
        "model": model,
        "texts": kind,
        "contender": name,
        "rows": len(texts),
        "tokens": tokens,
        "rows_per_cpu_s": round(statistics.median(rates), 2),
        "p20": round(quantile(rates, 0.2), 2),
        "p80": round(quantile(rates, 0.8), 2),
        "rows_per_s": round(statistics.median(len(texts) / run["wall_s"] for run in runs), 2),
        "loads": runs[-1]["loads"],
        "load_cpu_s": round(statistics.median(run["load_cpu_s"] for run in runs), 3),
        "peak_mb": round(max(run["peak_mb"] for run in runs)),
        "ours_over_it": None,
        "least_cosine": None,
    }


# ------------------------------------------------------------------------------------------ a GPU

# What is timed: a name in the report, the process, its options.
WAYS: list[tuple[str, str, dict[str, Any]]] = [
    ("huggingface add", "gpu_lance", {"provider": "huggingface"}),
    ("huggingface bare", "gpu_lance", {"provider": "huggingface", "how": "bare"}),
    ("sentence-transformers add", "gpu_lance", {"provider": "sentence-transformers"}),
    (
        "sentence-transformers bare",
        "gpu_lance",
        {"provider": "sentence-transformers", "how": "bare"},
    ),
    *((f"encode {size}", "sentence_transformers", {"batch_size": size}) for size in BATCHES),
    ("lancedb", "lancedb", {}),
]


def on_gpu(
    folders: dict[str, Path], device: str, scale: float, rounds: int, missed: list[str]
) -> Iterator[list[Any]]:
    """The rows of the report, case by case, on a GPU."""
    names = ("gpu_lance", "lancedb", "sentence_transformers")
    for model, folder in folders.items():
        with (
            workers_of(names, folder, device, None) as workers,
            tempfile.TemporaryDirectory() as place,
        ):
            few = texts_of("mixed", folder, FEWER["lancedb"])
            warm(workers, few, Path(place))
            for (of, kind), count in CUDA.items():
                if of == model:
                    rows = max(64, round(scale * count))
                    yield gpu_case(model, kind, folder, workers, rows, rounds, missed)


def warm(workers: dict[str, Worker], texts: list[str], place: Path) -> None:
    """Load every model, all side by side, and compare their vectors."""
    files = {name: place / f"{name}.npy" for name in workers}
    for name, worker in workers.items():
        worker.ask(texts, str(files[name]))
    for worker in workers.values():
        worker.answer()
    workers["gpu_lance"].embed(texts, str(place / "other.npy"), provider="sentence-transformers")
    files["other"] = place / "other.npy"
    cosines = {name: least_cosine(files["lancedb"], file) for name, file in files.items()}
    print("  least cosine to LanceDB's float32: " + ", ".join(
        f"{name} {cosine:.6f}" for name, cosine in cosines.items()
    ))  # fmt: skip
    if min(cosines["gpu_lance"], cosines["other"]) < CLOSE:
        raise SystemExit(f"The vectors differ: least cosine {cosines}. Nothing is reported.")


def gpu_case(
    model: str, kind: str, folder: Path, workers: dict[str, Worker], count: int, rounds: int,
    missed: list[str],
) -> list[dict[str, Any]]:  # fmt: skip
    """One case on a GPU."""
    texts = texts_of(kind, folder, count)
    tokens = tokens_of(folder, texts)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name, _, _ in WAYS}
    sizes = {name: min(count, FEWER.get(process, count)) for name, process, _ in WAYS}
    for number in range(rounds + 1):
        for name, process, options in WAYS:
            some = texts[: sizes[name] if number else min(sizes[name], count // 4)]
            run = workers[process].embed(some, **options)
            if number:  # the first of the size warms the allocator
                runs[name].append(run)
    watched = workers["gpu_lance"].embed(texts, provider="huggingface", how="profile")
    rows = []
    for name, _, _ in WAYS:
        rates = [sizes[name] / (run["wall_s"] - run.get("load_s", 0.0)) for run in runs[name]]
        rate = statistics.median(rates)
        each = sum(tokens[: sizes[name]]) / sizes[name]
        row: dict[str, Any] = {
            "model": model, "texts": kind, "contender": name, "rows": sizes[name],
            "tokens_a_text": round(each, 2), "texts_per_s": round(rate, 1),
            "p20": round(quantile(rates, 0.2), 1), "p80": round(quantile(rates, 0.8), 1),
            "tokens_per_s": round(rate * each), "floor_share": rate * each * FLOPS[model] / PEAK,
            "loads": runs[name][-1].get("loads"),
        }  # fmt: skip
        row["floor_share"] = round(row["floor_share"], 5)
        if stages := [run["stages"] for run in runs[name] if "stages" in run]:
            for stage in STAGES:
                row[f"{stage}_s"] = round(statistics.median(one[stage] for one in stages), 4)
        if prepared := [run["prepare_s"] for run in runs[name] if "prepare_s" in run]:
            row["prepare_s"] = round(statistics.median(prepared), 4)
            row["embed_s"] = round(count / rate - row["prepare_s"], 4)
        rows.append(row)
    rows[0]["kernel_share"] = round(watched["kernel_s"] / watched["watched_s"], 4)
    show_gpu(model, kind, rows, watched)
    ratio = rows[0]["texts_per_s"] / rows[-1]["texts_per_s"]
    for row in rows[1:]:
        row["ours_over_it"] = round(rows[0]["texts_per_s"] / row["texts_per_s"], 3)
    if ratio < CUDA_AIM:
        missed.append(f"{model}, {kind}: {ratio:.2f} times LanceDB's rate, not {CUDA_AIM:g}")
    return rows


def show_gpu(model: str, kind: str, rows: list[dict[str, Any]], watched: dict[str, Any]) -> None:
    """Print one case."""
    first = rows[0]
    print(f"\n{model}, {kind}: {first['rows']} texts, {first['tokens_a_text']} tokens each")
    for row in rows:
        stages = ", ".join(
            f"{stage} {row[f'{stage}_s']:.3f}" for stage in STAGES if f"{stage}_s" in row
        )
        print(
            f"  {row['contender']:>26}: {row['texts_per_s']:9.0f} texts/s ({row['p20']:.0f} to "
            f"{row['p80']:.0f}), {row['floor_share']:6.1%} of the floor, huggingface add is "
            f"{first['texts_per_s'] / row['texts_per_s']:.2f}x; {stages}"
        )
    print(
        f"  kernels run {first['kernel_share']:.0%} of the add ({watched['kernels']} kernels, "
        f"{watched['kernel_s']:.3f} s of {watched['watched_s']:.3f} s; copies "
        f"{watched['copy_s']:.3f} s)"
    )
    for key, count, ms in watched["longest"]:
        print(f"      {ms:8.1f} ms {count:6} x {key}", flush=True)


def main() -> None:
    """Run the cases and write their table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scale", type=float, default=1.0, help="times the usual number of texts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", default="minilm,bert-base")
    parser.add_argument("--out", type=Path, help="a CSV file for the figures")
    parser.add_argument("--worker", nargs=3, metavar=("NAME", "FOLDER", "DEVICE"))
    args = parser.parse_args()
    if args.worker:
        with tempfile.TemporaryDirectory() as place:
            name, folder, device = args.worker
            serve(contender(name, folder, place, device))
        return
    from gpu_lance.embeddings.locate import locate

    started = time.perf_counter()
    missed: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        minilm = Path(locate("sentence-transformers/all-MiniLM-L6-v2").folder)
        folders = {"minilm": minilm}
        if "bert-base" in args.models:
            folders["bert-base"] = bert_base(Path(place), minilm)
        folders = {name: folders[name] for name in args.models.split(",")}
        if args.device == "cpu":
            cases = on_cpu(folders, args.scale, args.rounds, missed)
        else:
            cases = on_gpu(folders, args.device, args.scale, args.rounds, missed)
        made, rows = stamp(LIBRARIES, args.device), []
        for case in cases:
            rows += case
            if args.out:  # after each, so that a run that is cut off leaves what it has
                write_csv(args.out, rows, made)
    print(f"\n{time.perf_counter() - started:.0f} s; " + ", ".join(map(" ".join, made.items())))
    if missed:
        raise SystemExit("Below what is wanted: " + "; ".join(missed))


if __name__ == "__main__":
    main()
