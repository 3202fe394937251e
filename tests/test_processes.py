"""Processes that write to one table while another searches it; their work is process_workers.py."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lance
import numpy as np
import pytest
from process_workers import NAME, NUMBERS, SCHEMA, vectors

import gpu_lance

WORKERS = Path(__file__).with_name("process_workers.py")
SOAK_SECONDS = float(os.environ.get("GPU_LANCE_SOAK_SECONDS", "600"))
SLACK = 32 << 20  # bytes by which a process may grow whatever the table does

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="the workers read their memory from /proc"
)


@dataclass
class Worker:
    """A running process, and the files that its output goes to."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def lines(self) -> list[list[str]]:
        """Its whole lines so far, in words; a last one without its end does not count."""
        text = self.log.read_text()
        return [line.split() for line in text[: text.rfind("\n") + 1].splitlines()]

    def done(self, timeout: float) -> None:
        """Wait for its end, which must be a good one."""
        code = self.process.wait(timeout)
        assert code == 0, f"{self.log.name}: {code}\n{self.log.with_suffix('.err').read_text()}"

    def kill(self) -> None:
        """Kill it, unless it has failed by then."""
        assert self.process.poll() is None, self.log.with_suffix(".err").read_text()
        self.process.kill()
        self.process.wait()


class Workers:
    """Starts processes for one folder, and leaves none behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.all: list[Worker] = []
        gpu_lance.connect(folder, device="cpu").create_table(NAME, schema=SCHEMA)

    def start(self, *arguments: object) -> Worker:
        log = self.folder / f"{len(self.all)}-{'-'.join(map(str, arguments))}.log"
        role, *more = map(str, arguments)
        with log.open("wb") as out, log.with_suffix(".err").open("wb") as err:
            process = subprocess.Popen(
                [sys.executable, str(WORKERS), role, str(self.folder), *more],
                stdout=out, stderr=err, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        self.all.append(Worker(process, log))
        return self.all[-1]

    def start_searching(self) -> Worker:
        """A searcher that has searched already when this returns."""
        worker = self.start("search")
        while ["ready"] not in worker.lines:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.done(0.05)
        return worker

    def stop(self) -> None:
        (self.folder / "stop").touch()


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Workers]:
    made = Workers(tmp_path)
    yield made
    for worker in made.all:
        if worker.process.poll() is None:
            worker.process.kill()
            worker.process.wait()


def check_table(workers: Workers) -> None:
    """Every acknowledged row is there unless it was deleted, once, with its vector."""
    table = lance.dataset(f"{workers.folder}/{NAME}.lance").to_table()
    held = {name: table[name].to_numpy() for name in NUMBERS}
    keys = set(zip(held["writer"].tolist(), held["number"].tolist(), strict=True))
    assert len(keys) == table.num_rows, "a row is there twice"
    stored = table["vector"].combine_chunks().values.to_numpy()
    np.testing.assert_array_equal(stored, vectors(held["writer"], held["number"]).ravel())
    batches = np.stack([held["writer"], held["batch"], held["size"]])
    batches, counts = np.unique(batches, axis=1, return_counts=True)
    np.testing.assert_array_equal(batches[2], counts, "a part of a batch is there")
    there = set(zip(batches[0].tolist(), batches[1].tolist(), strict=True))

    maybe, surely = {}, {}  # by writer, up to which batch they were deleted
    for worker in workers.all:
        for word, *numbers in worker.lines:
            if word in ("deleting", "deleted"):
                writer, last = map(int, numbers)
                for of in (maybe,) if word == "deleting" else (maybe, surely):
                    of[writer] = max(last, of.get(writer, -1))
    assert not [one for one in there if one[1] <= surely.get(one[0], -1)], "a deleted row is back"
    for worker in workers.all:
        if "write" not in worker.log.name:
            continue
        writer = int(worker.log.stem.split("-")[2])
        added = [int(line[1]) for line in worker.lines if line[0] == "added"]
        lost = [b for b in added if (writer, b) not in there and b > maybe.get(writer, -1)]
        assert not lost, f"acknowledged batches of writer {writer} are lost: {lost}"


def test_every_search_sees_one_version(workers: Workers) -> None:
    searcher = workers.start_searching()
    writers = [workers.start("write", number, 40, 0) for number in (1, 2)]
    for worker in writers:
        worker.done(60)
        assert sum(line[0] == "added" for line in worker.lines) == 40
    workers.stop()
    searcher.done(60)
    check_table(workers)
    (versions,) = [int(line[1]) for line in searcher.lines if line[0] == "versions"]
    assert versions > 5  # it did search while they wrote
    assert lance.dataset(f"{workers.folder}/{NAME}.lance").version == 81


@pytest.mark.soak
@pytest.mark.timeout(SOAK_SECONDS + 300)
def test_writers_are_killed_while_another_searches(workers: Workers) -> None:
    rng = random.Random(8)
    searcher = workers.start_searching()
    tidy = workers.start("maintain")
    writers = [workers.start("write", number, 1_000_000, 0.2) for number in (1, 2)]
    end, number = time.monotonic() + SOAK_SECONDS, 3
    while time.monotonic() < end:
        with contextlib.suppress(subprocess.TimeoutExpired):
            searcher.done(rng.uniform(0.5, 12))
            pytest.fail("the searcher ended")
        victim = rng.randrange(5)
        if victim == 4:
            tidy.kill()
            tidy = workers.start("maintain")
        else:
            writers[victim % 2].kill()
            writers[victim % 2] = workers.start("write", number, 1_000_000, 0.2)
            number += 1
    for worker in writers:
        worker.kill()
    workers.stop()
    for worker in (tidy, searcher):
        worker.done(120)
    check_table(workers)
    check_memory([json.loads("".join(words)) for word, *words in searcher.lines if word == "round"])


def check_memory(rounds: list[tuple[float, int, int, int]]) -> None:
    """After the first fifth a process grows by no more than its table explains."""
    seconds, resident, rows, searches = np.array(rounds).T
    warm = seconds > 0.2 * seconds[-1]
    first, last = np.array_split(resident[warm], 4)[0], np.array_split(resident[warm], 4)[-1]
    more_rows = max(0, rows[warm].max() - rows[~warm].max())
    grown = np.median(last) - np.median(first)
    assert grown < SLACK + 4 * more_rows * (4 * vectors(rows[:1], rows[:1]).size + 64), (
        f"grew by {grown / 2**20:.0f} MiB from {np.median(first) / 2**20:.0f} MiB in "
        f"{seconds[-1]:.0f} s, {searches[-1]} searches, {rows.max()} rows at most"
    )
