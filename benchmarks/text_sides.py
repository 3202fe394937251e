"""What the benchmarks of text embedding share: the texts, and contenders in their own processes."""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT = 256  # tokens, all-MiniLM-L6-v2's own
LEAST = 9
SAME = 0.9999  # least cosine between two contenders' vectors of a text


# ------------------------------------------------------------------------------------- the texts


def tokens_of(folder: Path, texts: list[str]) -> list[int]:
    """Tokens of each text, special ones included, at most LIMIT."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LIMIT)
    return [len(encoding.ids) for encoding in tokenizer.encode_batch_fast(texts)]


def mixed_texts(folder: Path, rows: int, most: int = LIMIT) -> list[str]:
    """Paragraphs of Python's help topics of LEAST to `most` tokens, in an order of no meaning."""
    import random
    from pydoc_data.topics import topics

    found = (part.strip() for text in topics.values() for part in re.split(r"\n\s*\n", text))
    texts = sorted({text for text in found if text})
    counts = tokens_of(folder, texts)
    kept = [text for text, n in zip(texts, counts, strict=True) if LEAST <= n <= most]
    random.Random(0).shuffle(kept)
    return kept[:rows]


def short_texts(folder: Path, rows: int, words: Sequence[int] = (7,), most: int = 12) -> list[str]:
    """Words of the help topics in a row, LEAST to `most` tokens; `words` are how many, in turn."""
    from pydoc_data.topics import topics

    found = " ".join(topics.values()).split()
    texts, start = [], 0
    while start < len(found):
        count = words[len(texts) % len(words)]
        texts.append(" ".join(found[start : start + count]))
        start += count
    texts = list(dict.fromkeys(texts))
    counts = tokens_of(folder, texts)
    return [text for text, n in zip(texts, counts, strict=True) if LEAST <= n <= most][:rows]


# ------------------------------------------------------------------------------- the contenders


@dataclass(frozen=True)
class Job:
    """What a contender does with some texts.

    Parameters
    ----------
    run : callable
        Does it; this is what is measured.
    vectors : callable
        Gives the vectors (n, d) that it made.
    more : callable
        Gives further figures.
    """

    run: Callable[[], Any]
    vectors: Callable[[], Any]
    more: Callable[[], dict[str, Any]] = dict


def table_adder(
    package: str, provider: str, folder: str, place: str, device: str = "cpu", **options: Any
) -> Callable[[list[str]], Job]:
    """Add texts to a new table of `package`, gpu_lance or lancedb; both are called alike."""
    main = importlib.import_module(package)
    registry = importlib.import_module(f"{package}.embeddings").get_registry()
    models = importlib.import_module(f"{package}.pydantic")
    db = main.connect(place, device=device) if package == "gpu_lance" else main.connect(place)
    function = registry.get(provider).create(name=folder, device=device, **options)

    class Row(models.LanceModel):  # type: ignore[misc]
        text: str = function.SourceField()
        vector: models.Vector(function.ndims()) = function.VectorField()  # type: ignore[valid-type]

    def add(texts: list[str]) -> Job:
        table = db.create_table("bench", schema=Row, mode="overwrite")
        rows = [{"text": text} for text in texts]

        def vectors() -> Any:
            import numpy as np

            column = table.to_arrow()["vector"].combine_chunks()
            return np.asarray(column.flatten()).reshape(len(texts), -1)

        def more() -> dict[str, Any]:
            report = getattr(table, "last_report", None)
            return {} if report is None else {"stages": report.seconds}

        return Job(lambda: table.add(rows), vectors, more)

    return add


def serve(add: Callable[..., Job]) -> None:
    """Be a contender's process: a JSON line with texts in, a JSON line with figures out."""
    import numpy as np

    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    for line in sys.stdin:
        asked = json.loads(line)
        job = add(asked["texts"], **asked["options"])
        cpu, wall = time.process_time(), time.perf_counter()
        job.run()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        if asked["save"]:
            np.save(asked["save"], np.asarray(job.vectors(), dtype=np.float32))
        answer = {
            "cpu_s": cpu,
            "wall_s": wall,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            **job.more(),
        }
        print(json.dumps(answer), file=answers, flush=True)


class Worker:
    """A contender's process: the running script, which gets ``--worker`` and `words`.

    Parameters
    ----------
    words : sequence of str
        Say which contender it is.
    threads : int, optional
        The most threads; None leaves that to the libraries.
    """

    def __init__(self, words: Sequence[str], threads: int | None = None) -> None:
        env = {**os.environ, "HF_HUB_OFFLINE": "1"}
        if threads is not None:
            pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
            env.update(dict.fromkeys(pools, str(threads)))
            env["TOKENIZERS_PARALLELISM"] = "false" if threads == 1 else "true"
        self._process = subprocess.Popen(
            [sys.executable, sys.argv[0], "--worker", *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
        )  # fmt: skip

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def embed(self, texts: list[str], save: str | None = None, **options: Any) -> dict[str, Any]:
        """Embed and give the figures."""
        self.ask(texts, save, **options)
        return self.answer()

    def ask(self, texts: list[str], save: str | None = None, **options: Any) -> None:
        """Start to embed; :meth:`answer` waits for the figures."""
        assert self._process.stdin is not None
        asked = {"texts": texts, "save": save, "options": options}
        print(json.dumps(asked), file=self._process.stdin, flush=True)

    def answer(self) -> dict[str, Any]:
        """The figures of what was asked."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("A contender stopped; its error is above.")
        return dict(json.loads(line))


def rounds_of(
    workers: dict[str, Worker], texts: list[str], rounds: int
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, float]]:
    """Let contenders take turns: their figures, and each one's least cosine to the first's vectors.

    Ends the process if vectors differ: figures of other vectors mean nothing.
    """
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    first, *others = workers
    with tempfile.TemporaryDirectory() as place:
        for number in range(rounds):
            for name, worker in workers.items():
                save = str(Path(place) / f"{name}.npy") if number == 0 else None
                runs[name].append(worker.embed(texts, save))
        files = {name: Path(place) / f"{name}.npy" for name in workers}
        cosines = {name: least_cosine(files[first], files[name]) for name in others}
    if min(cosines.values()) < SAME:
        raise SystemExit(f"The vectors differ: least cosine {cosines}. Nothing is reported.")
    return runs, cosines


def least_cosine(one: Path, two: Path) -> float:
    """The least cosine, over all texts, between the vectors (n, d) of two files."""
    import numpy as np

    ours, theirs = np.load(one), np.load(two)
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return float(((ours * theirs).sum(axis=1) / norms).min())
