"""From data to a committed Lance version: read, prepare, embed and write, each in its thread.

The CPU part of the next batches runs ahead of the device, and the vectors of the last batch are
on their way to the host and to disk meanwhile. Queues are bounded, so memory is too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gpu_lance.ingest.channel import Channel, Stage, Stopped
from gpu_lance.ingest.embed import (
    Embedded,
    Prepared,
    check_sources,
    complete,
    embed,
    prepare,
)
from gpu_lance.ingest.lists import valid_rows
from gpu_lance.ingest.read import MAX_ROWS, Source
from gpu_lance.ingest.vector_column import Policy, VectorColumn
from gpu_lance.optional import require
from gpu_lance.types import Embeddings, OnBadVectors

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

AHEAD = 2  # batches that wait between two stages
PATIENCE = 5.0  # seconds
KEPT_BYTES = 1 << 30
# Rows and bytes of text of a batch whose function may give each word a vector: hundreds of bytes
# each, of which several batches are under way. So much text takes longer to tokenise than a GPU
# takes to embed it, so smaller batches cost nothing.
MULTIVECTOR_ROWS = 1024
MULTIVECTOR_TEXT = 1 << 19


class Placed(Protocol):
    """What knows its device."""

    @property
    def device(self) -> torch.device: ...

    def room(self) -> int:
        """Bytes of new vectors that may wait on the device for their commit."""


@dataclass
class Kept:
    """The vectors of new rows, still on the device, for an index to take in after the commit.

    Parameters
    ----------
    budget : int
        Bytes that may be kept; beyond it everything is let go and read back later.

    Examples
    --------
    >>> import torch
    >>> kept = Kept(budget=1 << 20)
    >>> kept.add("vector", Embeddings(torch.zeros(2, 3), np.ones(2, bool)), rows=2)
    >>> kept.take("vector", rows=2).vectors.shape
    torch.Size([2, 3])
    """

    budget: int
    _parts: dict[str, list[Embeddings]] = field(default_factory=dict)
    _rows: dict[str, int] = field(default_factory=dict)
    _bytes: int = 0
    _over: bool = False

    def add(self, name: str, made: Embeddings, rows: int) -> None:
        """Keep the vectors of one batch of `rows` rows, if they are all of them and fit."""
        size = made.vectors.element_size() * made.vectors.nelement()
        # joining the parts takes the same again
        if self._over or len(made) != rows or 2 * (self._bytes + size) > self.budget:
            self.let_go()
            return
        self._bytes += size
        self._parts.setdefault(name, []).append(made)
        self._rows[name] = self._rows.get(name, 0) + rows

    def let_go(self) -> None:
        """Keep nothing, now or later: not all that is stored is on the device."""
        self._over = True
        self._parts.clear()

    def take(self, name: str, rows: int) -> Embeddings | None:
        """The vectors of all rows; None unless those are exactly `rows`."""
        parts = self._parts.pop(name, None)
        if self._over or parts is None or self._rows.get(name) != rows:
            return None
        torch = require("torch", extra="cpu|cuda13|cuda12")
        if len(parts) == 1:
            return parts[0]
        offsets = None
        if parts[0].offsets is not None:
            lengths = [np.diff(part.offsets) for part in parts if part.offsets is not None]
            offsets = np.concatenate(([0], np.cumsum(np.concatenate(lengths))))
        return Embeddings(
            torch.cat([part.vectors for part in parts]),
            np.concatenate([part.valid for part in parts]),
            offsets=offsets,
        )


@dataclass
class Report:
    """What one run did and where its time went.

    Parameters
    ----------
    rows : int
        Rows that were written.
    embedded : int
        Vectors that were made.
    seconds : dict of str to float
        Wall time in each stage; stages overlap.
    """

    rows: int = 0
    embedded: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("read", "prepare", "embed", "store", "write"), 0.0)
    )


class Pipeline:
    """One run of the stages over one source.

    Parameters
    ----------
    schema : pyarrow.Schema
        The table's.
    columns : list of VectorColumn
        Its vector columns.
    policy : Policy
    place : object with `device` and `room()`
        Says where vectors are kept, and how many; asked only if there is something to embed.
    progress : callable, optional
        Called with the number of rows embedded so far, after each batch.

    Examples
    --------
    >>> from gpu_lance.ingest.read import read
    >>> schema = pa.schema({"id": pa.int64()})
    >>> run = Pipeline(schema, [], Policy(), None)
    >>> run.write(read({"id": [1, 2]}), lambda batches: sum(b.num_rows for b in batches))
    2
    """

    def __init__(
        self,
        schema: pa.Schema,
        columns: list[VectorColumn],
        policy: Policy,
        place: Placed | None,
        progress: Callable[[int], Any] | None = None,
    ) -> None:
        self._schema = schema
        self._columns = columns
        self._policy = policy
        made = any(column.function is not None for column in columns)
        # what is made into several vectors a row
        self._texts = {
            name
            for column in columns
            if column.function is not None and column.multi
            for name in column.sources
        }
        self._rows = MULTIVECTOR_ROWS if self._texts else MAX_ROWS
        self._device = place.device if place is not None and made else None
        self._progress = progress
        self.report = Report()
        self.kept = Kept(0)
        if place is not None and self._device is not None:
            self.kept.budget = min(place.room(), KEPT_BYTES)

    def write(self, source: Source, write: Callable[[Iterator[pa.RecordBatch]], T]) -> T:
        """Run everything; `write` consumes the finished batches, and its result is returned.

        An error in any stage stops all of them and is raised here. Data of one batch runs without
        threads.

        Raises
        ------
        SchemaError
            If the data has neither a vector column nor the column that it is made from.
        """
        if source.num_rows != 0:
            check_sources(source.schema.names, self._columns)
        parts = self._prepared(source)
        if source.num_rows is not None and source.num_rows <= self._rows:
            few = list(parts)
            if len(few) <= 1 or not self._texts:
                batches = [self._stored(self._embed(p)) for p in few]
                with self._timed("write"):
                    return write(iter(batches))
            parts = iter(few)
        return self._threaded(parts, write)

    def _threaded(
        self, parts: Iterator[Prepared], write: Callable[[Iterator[pa.RecordBatch]], T]
    ) -> T:
        ready: Channel[Prepared] = Channel(AHEAD)
        done: Channel[pa.RecordBatch] = Channel(AHEAD)

        def read() -> None:
            try:
                for prepared in parts:
                    ready.put(prepared)
            except Stopped:
                return
            except BaseException as error:
                ready.close(error)
            else:
                ready.close()

        def store() -> T:
            try:
                with self._timed("write"):
                    return write(iter(done))
            finally:
                done.stop()

        # the caller's own functions run in the caller's thread
        reader, writer = Stage("read", read), Stage("write", store)
        try:
            behind: Embedded | None = None
            for prepared in ready:
                embedded = self._embed(prepared)
                if behind is not None:
                    done.put(self._stored(behind))
                behind = embedded
            if behind is not None:
                done.put(self._stored(behind))
        except Stopped:
            pass  # the writer's error is raised below
        except BaseException as error:
            done.close(error)
            writer.join()
            raise
        finally:
            ready.stop()
            reader.join(PATIENCE)  # it may be waiting inside the caller's own iterator
        done.close()
        return writer.result()

    def _prepared(self, source: Source) -> Iterator[Prepared]:
        first_row = 0
        batches = iter(source.batches)
        while True:
            with self._timed("read"):
                batch = next(batches, None)
            if batch is None:
                return
            for part in self._cut(batch):
                with self._timed("prepare"):
                    prepared = prepare(part, self._schema, self._columns, self._policy, first_row)
                first_row += part.num_rows
                yield prepared

    def _cut(self, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        """A batch in parts whose vectors fit into memory; a longer text is one by itself."""
        before = np.zeros(batch.num_rows + 1, np.int64)  # bytes of text
        for name in self._texts & set(batch.schema.names):
            before[1:] += np.cumsum(_text_bytes(batch.column(name)))
        start = 0
        while start < batch.num_rows:
            most = before[start] + MULTIVECTOR_TEXT
            stop = int(np.searchsorted(before, most, side="right")) - 1
            stop = min(max(stop, start + 1), start + self._rows)
            yield batch.slice(start, stop - start)
            start = stop

    def _embed(self, prepared: Prepared) -> Embedded:
        if self._device is None or not prepared.wanted:
            return Embedded(prepared)
        with self._timed("embed"):
            embedded = embed(prepared, self._device)
        self.report.embedded += sum(len(made) for _, _, made, _ in embedded.parts)
        return embedded

    def _stored(self, embedded: Embedded) -> pa.RecordBatch:
        with self._timed("store"):
            batch = complete(embedded, self._schema, self._policy)
        self._keep(embedded, batch)
        self.report.rows += batch.num_rows
        if self._progress is not None:
            self._progress(self.report.rows)
        return batch

    def _keep(self, embedded: Embedded, batch: pa.RecordBatch) -> None:
        """Keep the batch's vectors on the device where they are what was stored."""
        parts = {column.name: made for column, _, made, _ in embedded.parts}
        dropped = batch.num_rows != embedded.prepared.batch.num_rows
        for column in self._columns:
            if column.function is None:
                continue
            made = parts.get(column.name)
            filled = self._policy.on_bad is OnBadVectors.FILL
            if made is None or dropped or filled or len(made) != batch.num_rows:
                self.kept.let_go()
                return
            valid = valid_rows(batch.column(batch.schema.get_field_index(column.name)))
            self.kept.add(column.name, replace(made, valid=valid, errors={}), batch.num_rows)

    def _timed(self, stage: str) -> _Timer:
        return _Timer(self.report.seconds, stage)


def _text_bytes(array: pa.Array) -> np.ndarray:
    """Bytes of each text (n,), int64; zeros for what is no column of texts."""
    kind = array.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return np.zeros(len(array), np.int64)
    return pc.binary_length(array).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)


class _Timer:
    def __init__(self, seconds: dict[str, float], stage: str) -> None:
        self._seconds = seconds
        self._stage = stage

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._stage] += time.perf_counter() - self._start
