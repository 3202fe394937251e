"""A process that was forked after a search says so, where it would wait for ever."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import multiprocessing, sys
import numpy as np
import gpu_lance

def child(queue):
    try:
        queue.put(len(table.search(np.ones(8)).limit(3).to_list()))
    except gpu_lance.errors.DeviceError as error:
        queue.put(str(error))

def ask():
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    answer = queue.get(timeout=60)
    process.join(60)
    return answer

rows = [{"id": i, "vector": np.full(8, i / 100)} for i in range(1000)]
db = gpu_lance.connect(sys.argv[1], device="cpu")
db.create_table("t", rows)
table = gpu_lance.connect(sys.argv[1], device="cpu").open_table("t")
print(ask())
print(len(table.search(np.ones(8)).limit(4).to_list()))
print(ask())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_fork_after_a_search_is_refused(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    before, own, after = run.stdout.splitlines() or (run.stderr, "", "")
    assert (before, own) == ("3", "4")
    assert "spawn" in after
