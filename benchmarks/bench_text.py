"""Text embedding through `table.add`: rows per CPU-second beside LanceDB, on the same weights.

Contenders embed the same texts with the same model folder, each in a process of its own with the
same number of threads; they take turns, and the medians of the rounds are compared. CPU seconds
are those of the whole process, so threads that work ahead are paid for. Vectors are compared row
by row first: nothing is reported if one differs.

    python benchmarks/bench_text.py [--rows 1500] [--rounds 3] [--out results.csv]
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import quantile, stamp, write_csv

LIMIT = 256  # tokens, all-MiniLM-L6-v2's own
LEAST = 9
AIM = 1.7
SAME = 0.9999  # least cosine between two contenders' vectors of a text
LIBRARIES = ("torch", "transformers", "sentence-transformers", "lancedb", "pylance", "gpu-lance")
CONTENDERS = ("gpu_lance", "lancedb", "sentence_transformers")


@dataclass(frozen=True)
class Case:
    """Which texts are embedded, and with how many threads."""

    name: str
    texts: list[str]
    threads: int


# ------------------------------------------------------------------------------- the contenders


def gpu_lance(folder: str, work: str) -> Callable[[list[str]], Any]:
    """Add to a new table of this package."""
    import gpu_lance
    from gpu_lance.embeddings import get_registry
    from gpu_lance.pydantic import LanceModel, Vector

    return _adder(gpu_lance.connect(work, device="cpu"), get_registry(), LanceModel, Vector, folder)


def lancedb(folder: str, work: str) -> Callable[[list[str]], Any]:
    """Add to a new table of LanceDB."""
    import lancedb
    from lancedb.embeddings import get_registry
    from lancedb.pydantic import LanceModel, Vector

    return _adder(lancedb.connect(work), get_registry(), LanceModel, Vector, folder)


def _adder(db: Any, registry: Any, base: Any, kind: Any, folder: str) -> Any:
    function = registry.get("sentence-transformers").create(name=folder, device="cpu")

    class Row(base):  # type: ignore[misc]
        text: str = function.SourceField()
        vector: kind(function.ndims()) = function.VectorField()  # type: ignore[valid-type]

    def add(texts: list[str]) -> Any:
        table = db.create_table("bench", schema=Row, mode="overwrite")
        rows = [{"text": text} for text in texts]

        def run() -> None:
            table.add(rows)

        def vectors() -> Any:
            import numpy as np

            column = table.to_arrow()["vector"].combine_chunks()
            return np.asarray(column.flatten()).reshape(len(texts), -1)

        return run, vectors

    return add


def sentence_transformers(folder: str, work: str) -> Callable[[list[str]], Any]:
    """The library alone, with its defaults: no table."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu")
    seen = {"padded": 0}

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        seen["padded"] += 0 if ids is None else ids.numel()

    model[0].auto_model.embeddings.register_forward_pre_hook(count, with_kwargs=True)

    def add(texts: list[str]) -> Any:
        seen["padded"] = 0
        made: list[Any] = []

        def run() -> None:
            made.append(model.encode(texts, normalize_embeddings=True, show_progress_bar=False))

        return run, lambda: made[0]

    add.padded = lambda: seen["padded"]  # type: ignore[attr-defined]
    return add


def work(name: str, folder: str, threads: int) -> None:
    """Serve one contender: a JSON list of texts a line in, its figures a line out."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    import numpy as np
    import torch

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as place:
        add = globals()[name](folder, place)
        for line in sys.stdin:
            asked = json.loads(line)
            run, vectors = add(asked["texts"])
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if asked["save"]:
                np.save(asked["save"], np.asarray(vectors(), dtype=np.float32))
            answer = {
                "cpu_s": cpu,
                "wall_s": wall,
                "padded": add.padded() if hasattr(add, "padded") else None,
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
            print(json.dumps(answer), file=answers, flush=True)


class Worker:
    """A contender's process."""

    def __init__(self, name: str, folder: str, threads: int) -> None:
        env = {
            **os.environ,
            **dict.fromkeys(
                ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), str(threads)
            ),
            "TOKENIZERS_PARALLELISM": "false" if threads == 1 else "true",
            "HF_HUB_OFFLINE": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", name, folder, str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
        )  # fmt: skip

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def embed(self, texts: list[str], save: str | None = None) -> dict[str, Any]:
        """Embed and give the figures."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({"texts": texts, "save": save}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("A contender stopped; its error is above.")
        return dict(json.loads(line))


# ------------------------------------------------------------------------------------- the texts


def tokens_of(folder: Path, texts: list[str]) -> list[int]:
    """Tokens of each text, special ones included, at most LIMIT."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LIMIT)
    return [len(encoding.ids) for encoding in tokenizer.encode_batch_fast(texts)]


def mixed_texts(folder: Path, rows: int) -> list[str]:
    """Paragraphs of Python's help topics of LEAST to LIMIT tokens, in an order of no meaning."""
    import random
    from pydoc_data.topics import topics

    found = (part.strip() for text in topics.values() for part in re.split(r"\n\s*\n", text))
    texts = sorted({text for text in found if text})
    counts = tokens_of(folder, texts)
    kept = [text for text, n in zip(texts, counts, strict=True) if LEAST <= n <= LIMIT]
    random.Random(0).shuffle(kept)
    return kept[:rows]


def short_texts(folder: Path, rows: int) -> list[str]:
    """Seven words of the help topics in a row, of 9 to 12 tokens: short, and nearly uniform."""
    from pydoc_data.topics import topics

    words = " ".join(topics.values()).split()
    texts = list(dict.fromkeys(" ".join(words[i : i + 7]) for i in range(0, len(words), 7)))
    counts = tokens_of(folder, texts)
    return [text for text, n in zip(texts, counts, strict=True) if 9 <= n <= 12][:rows]


# ------------------------------------------------------------------------------------ the report


def measure(case: Case, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Run a case: rows of the report, one a contender."""
    counts = tokens_of(folder, case.texts)
    print(
        f"\n{case.name}: {len(case.texts)} texts of {min(counts)} to {max(counts)} tokens, "
        f"{sum(counts)} in all, {case.threads} thread(s)",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as place:
        workers = {name: Worker(name, str(folder), case.threads) for name in CONTENDERS}
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
        try:
            for worker in workers.values():
                worker.embed(case.texts[:64])
            for number in range(rounds):
                for name, worker in workers.items():
                    save = str(Path(place) / f"{name}.npy") if number == 0 else None
                    runs[name].append(worker.embed(case.texts, save))
        finally:
            for worker in workers.values():
                worker.close()
        cosines = {name: least_cosine(place, name) for name in CONTENDERS[1:]}
    if min(cosines.values()) < SAME:
        raise SystemExit(f"The vectors differ: least cosine {cosines}. Nothing is reported.")
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


def least_cosine(place: str, name: str) -> float:
    """The least cosine, over all texts, between a contender's vectors and ours."""
    import numpy as np

    ours, theirs = (np.load(Path(place) / f"{each}.npy") for each in (CONTENDERS[0], name))
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return float(((ours * theirs).sum(axis=1) / norms).min())


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
