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

def search():
    return len(table.search(np.ones(8)).limit(3).to_list())

def child(queue, work):
    try:
        queue.put(work())
    except gpu_lance.errors.GpuLanceError as error:
        queue.put(str(error))

def ask(work=search):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue, work))
    process.start()
    answer = queue.get(timeout=60)
    process.join(60)
    return answer

rows = [{"id": i, "vector": np.full(8, i / 100)} for i in range(1000)]
db = gpu_lance.connect(sys.argv[1], device="cpu")
print(ask(lambda: len(db.create_table("first", rows[:5]))))
db.create_table("t", rows)
table = gpu_lance.connect(sys.argv[1], device="cpu").open_table("t")
print(ask())
for write in (
    lambda: table.add(rows),
    lambda: table.update(values={"id": 1}),
    lambda: table.merge_insert("id").when_matched_update_all().execute(rows),
    lambda: table.add_columns({"more": "id"}),
    lambda: db.create_table("u", rows),
):
    print(ask(write))
print(ask(table.count_rows), table.version)
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
    assert run.returncode == 0, run.stderr
    first, before, *writes, counted, own, after = run.stdout.splitlines()
    assert (first, before, counted, own) == ("5", "3", "1000 1", "4")
    assert "spawn" in after
    assert len(writes) == 5
    for line in writes:  # Lance would end the process, now and then
        assert "cannot write rows" in line
