"""How much memory a search of a multivector column takes: measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("resource")  # not on Windows

SCRIPT = """
import json, resource, sys
import lance, numpy as np, pyarrow as pa, torch
from gpu_lance.index import MultiColumnIndex
from gpu_lance.index.budget import Budget
from gpu_lance.types import Metric

D, ROWS, LENGTH, BATCHES = 128, 64, 100, 96
kind = pa.list_(pa.list_(pa.float32(), D))

def batches(count):
    for i in range(count):
        values = np.random.default_rng(i).random(ROWS * LENGTH * D, np.float32)
        inner = pa.FixedSizeListArray.from_arrays(pa.array(values), D)
        offsets = pa.array(np.arange(ROWS + 1, dtype=np.int32) * LENGTH)
        yield pa.record_batch([pa.ListArray.from_arrays(offsets, inner)], ["v"])

def write(name, count):
    reader = pa.RecordBatchReader.from_batches(pa.schema({"v": kind}), batches(count))
    path = f"{sys.argv[1]}/{name}.lance"
    return lance.write_dataset(reader, path, enable_stable_row_ids=True, max_rows_per_file=512)

def peak_mb():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10

def search(dataset):
    budget = Budget("cpu", 0 if sys.argv[2] == "lance" else None)
    with MultiColumnIndex("v", D, torch.device("cpu"), budget) as index:
        for m in (1, 8):
            queries = torch.ones(32 * m, D)
            found = index.search(dataset, queries, np.arange(m + 1) * 32, 10, Metric.L2)
        assert found.counts.tolist() == [10] * 8
        return index.info()

search(write("warm", 1))
dataset = write("t", BATCHES)
before = peak_mb()
info = search(dataset)
print(json.dumps({
    "mb": peak_mb() - before, "held": info["bytes"] / 2**20, "step": info["step"],
    "data": BATCHES * ROWS * LENGTH * D * 4 / 2**20,
}))
"""


@pytest.mark.parametrize("step", ["float32", "lance"])
def test_a_search_takes_little_beside_what_is_held(step: str, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), step],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    assert told["step"] == step
    assert told["data"] == 300
    assert told["held"] < (320 if step == "float32" else 1)
    assert told["mb"] < told["held"] + 100, told
