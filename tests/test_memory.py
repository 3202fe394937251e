"""How much memory ingestion takes: measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

resource = pytest.importorskip("resource")  # not on Windows

PRELUDE = """
import json, resource, sys, time
import numpy as np
import pyarrow as pa
import gpu_lance
from gpu_lance.embeddings import EmbeddingFunctionConfig, TextEmbeddingFunction, register

D = 384

@register("stand-in")
class StandIn(TextEmbeddingFunction):
    \"\"\"A vector that depends on the text, as quick as a model is slow.\"\"\"

    def ndims(self):
        return D

    def generate_embeddings(self, texts):
        first = np.array([len(t) for t in texts], np.float32)[:, None]
        return first + np.arange(D, dtype=np.float32) / D

def peak_mb():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10

db = gpu_lance.connect(sys.argv[1], device="cpu")
config = EmbeddingFunctionConfig(
    vector_column="vector", source_column="text", function=StandIn.create()
)
"""

TEXTS = """
schema = pa.schema({"id": pa.int64(), "text": pa.utf8()})
table = db.create_table("t", schema=schema, embedding_functions=[config])
rows = [{"id": i, "text": f"a short text, number {i}"} for i in range(100_000)]
start = time.perf_counter()
table.add(rows)
seconds = time.perf_counter() - start
near = table.search(rows[12_345]["text"]).limit(1).to_list()[0]
print(json.dumps({
    "mb": peak_mb(), "seconds": seconds, "rows": len(table), "version": table.version,
    "distance": near["_distance"], "embedded": table.last_report.embedded,
}))
"""

STREAM = """
ROWS, BATCHES = 4096, int(sys.argv[2])

def batches():
    for i in range(BATCHES):
        matrix = np.random.default_rng(i).random((ROWS, D), np.float32)
        vectors = pa.FixedSizeListArray.from_arrays(matrix.reshape(-1), D)
        yield pa.record_batch({"id": pa.array(np.arange(ROWS) + i * ROWS), "vector": vectors})

db.create_table("warm", [next(batches())])
before = peak_mb()
table = db.create_table("t", batches())
print(json.dumps({
    "mb": peak_mb() - before, "rows": len(table), "data": BATCHES * ROWS * D * 4 / 2**20,
}))
"""

ADDS = """
table = db.create_table("t", {"id": [0], "vector": [[0.0] * 8]})
for i in range(80):
    table.add([{"id": i, "vector": [float(i)] * 8}])
    table.search([1.0] * 8).limit(1).to_list()
    if i == 20:
        before = peak_mb()
print(json.dumps({"mb": peak_mb() - before, "rows": len(table)}))
"""


def measured(script: str, folder: Path, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script, str(folder), *arguments],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_hundred_thousand_texts_in_one_add(tmp_path: Path) -> None:
    found = measured(TEXTS, tmp_path)
    assert (found["rows"], found["embedded"], found["version"]) == (100_000, 100_000, 2)
    assert found["distance"] == 0.0
    assert found["mb"] < 2_500
    assert found["seconds"] < 40


def test_a_stream_takes_no_more_memory_than_a_few_batches(tmp_path: Path) -> None:
    """Ten times the data, the same memory: nothing gathers the stream."""
    short = measured(STREAM, tmp_path / "short", "8")
    long = measured(STREAM, tmp_path / "long", "80")
    assert (short["rows"], long["rows"]) == (8 * 4096, 80 * 4096)
    assert long["data"] == 480
    assert long["mb"] < long["data"] / 2
    assert long["mb"] < short["mb"] + 200


@pytest.mark.parametrize("uri", ["memory://", ""])
def test_many_small_adds_and_searches(uri: str, tmp_path: Path) -> None:
    """A version costs its metadata, and no buffer."""
    found = measured(
        f"db = gpu_lance.connect({uri!r} or sys.argv[1], device='cpu')\n{ADDS}", tmp_path
    )
    assert found["rows"] == 81
    assert found["mb"] < 120  # 60 versions of 6 MB were 360
