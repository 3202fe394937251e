"""The vectors of the last queries, so that a text that is asked again is not embedded again."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_lance.embeddings import calls
from gpu_lance.embeddings.base import EmbeddingFunction
from gpu_lance.errors import GpuLanceError
from gpu_lance.optional import require
from gpu_lance.types import Embeddings, Side

if TYPE_CHECKING:
    import torch

MAX_ITEMS = 1024
MAX_BYTES = 32 << 20


class QueryCache:
    """Vectors (t, d) of single items on their device, the least recently used one let go first.

    Safe to share by threads. What is put in must not be changed afterwards, nor what is got out.

    Parameters
    ----------
    max_items : int
    max_bytes : int
        Of vectors and texts together.

    Examples
    --------
    >>> import torch
    >>> cache = QueryCache(max_items=2)
    >>> for text in ("a", "b", "c"):
    ...     cache.put(text, torch.zeros(1, 4), text)
    >>> [cache.get(text) is not None for text in ("a", "b", "c")]
    [False, True, True]
    """

    def __init__(self, max_items: int = MAX_ITEMS, max_bytes: int = MAX_BYTES) -> None:
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._entries: OrderedDict[Hashable, tuple[torch.Tensor, int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> torch.Tensor | None:
        """The vectors of `key`, to be read only; None if they are not here."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: Hashable, vectors: torch.Tensor, text: str) -> None:
        """Keep the vectors of `text`, unless they alone are too large."""
        size = vectors.element_size() * vectors.nelement() + sys.getsizeof(text)
        if size > self._max_bytes:
            return
        with self._lock:
            old = self._entries.pop(key, None)
            self._bytes += size - (0 if old is None else old[1])
            self._entries[key] = (vectors, size)
            while len(self._entries) > self._max_items or self._bytes > self._max_bytes:
                self._bytes -= self._entries.popitem(last=False)[1][1]

    def clear(self) -> None:
        """Let go of everything."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes of vectors and texts that are held."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._entries)


# The queries of this process.
QUERIES = QueryCache()


def embed(
    function: EmbeddingFunction,
    items: Sequence[Any],
    *,
    ndims: int,
    device: torch.device,
    multi: bool = False,
    state: Hashable = None,
) -> Embeddings:
    """Embed queries as :func:`gpu_lance.embeddings.calls.embed` does, each text once.

    Vectors of texts are remembered if the class of `function` has ``cache_queries = True`` itself;
    an inherited one does not count, since a subclass may do anything. Errors are not remembered.

    Parameters
    ----------
    function, items, ndims, device, multi
        As there.
    state : hashable, optional
        What ``function.query_state()`` said just now; None asks it.

    Returns
    -------
    Embeddings
        The caller's own: it shares no memory with what is remembered.

    Examples
    --------
    >>> import torch
    >>> from gpu_lance.embeddings import TextEmbeddingFunction
    >>> class Length(TextEmbeddingFunction):
    ...     cache_queries = True
    ...     def generate_embeddings(self, texts):
    ...         print(texts)
    ...         return [[float(len(text))] for text in texts]
    ...     def ndims(self):
    ...         return 1
    >>> for texts in (["a", "bb", "a"], ["bb", "ccc"]):
    ...     made = embed(Length(), texts, ndims=1, device=torch.device("cpu"))
    ...     print(made.vectors.tolist())
    ['a', 'bb']
    [[1.0], [2.0], [1.0]]
    ['ccc']
    [[2.0], [3.0]]
    """
    scope = _scope(function, ndims, device, multi, state) if len(items) else None
    if scope is None:
        return calls.embed(function, items, Side.QUERY, ndims=ndims, device=device, multi=multi)
    different, places = _different(items)
    keys = [(scope, item) if type(item) is str else None for item in different]
    known = {
        at: vectors
        for at, key in enumerate(keys)
        if key is not None and (vectors := QUERIES.get(key)) is not None
    }
    absent = [at for at in range(len(different)) if at not in known]
    made = None
    if absent:
        wanted = [different[at] for at in absent]
        made = calls.embed(function, wanted, Side.QUERY, ndims=ndims, device=device, multi=multi)
        _remember(made, [keys[at] for at in absent])
        if len(absent) == len(items):
            return made
    return _joined(known, absent, made, places, multi)


def _scope(
    function: EmbeddingFunction, ndims: int, device: torch.device, multi: bool, state: Hashable
) -> Hashable | None:
    """What decides the vector of a text besides the text; None if nothing is to be remembered."""
    cls = type(function)
    if not vars(cls).get("cache_queries", False):
        return None
    try:
        state = function.query_state() if state is None else state
    except (GpuLanceError, OSError):
        return None  # embedding says what is wrong
    return (cls, function._comparison_key(), state, ndims, str(device), multi)


def _different(items: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """The items with each text once, and where each of `items` stands there."""
    different: list[Any] = []
    seen: dict[str, int] = {}
    places = []
    for item in items:
        place = seen.setdefault(item, len(different)) if type(item) is str else len(different)
        if place == len(different):
            different.append(item)
        places.append(place)
    return different, places


def _remember(made: Embeddings, keys: list[tuple[Hashable, str] | None]) -> None:
    starts = _starts(made)
    kept = [
        (key, made.vectors[starts[i] : starts[i + 1]].detach().clone())
        for i, key in enumerate(keys)
        if key is not None and made.valid[i]
    ]
    if kept and made.vectors.is_cuda:
        # another thread may read them on another stream
        torch = require("torch", extra="cpu|cuda13|cuda12")
        torch.cuda.current_stream(made.vectors.device).synchronize()
    for key, vectors in kept:
        QUERIES.put(key, vectors, key[1])


def _joined(
    known: dict[int, torch.Tensor],
    absent: list[int],
    made: Embeddings | None,
    places: list[int],
    multi: bool,
) -> Embeddings:
    """The vectors of all items, copied from what was remembered and what was made."""
    torch = require("torch", extra="cpu|cuda13|cuda12")
    total = len(known) + len(absent)
    start, length = np.zeros(total, np.int64), np.zeros(total, np.int64)
    valid, errors = np.ones(total, dtype=bool), {}
    parts, at = [], 0
    for place, vectors in known.items():
        if vectors.is_cuda:  # so that its memory is not given away while it is read
            vectors.record_stream(torch.cuda.current_stream(vectors.device))
        parts.append(vectors)
        start[place], length[place] = at, len(vectors)
        at += len(vectors)
    if made is not None:
        parts.append(made.vectors)
        starts = _starts(made)
        start[absent], length[absent] = at + starts[:-1], np.diff(starts)
        valid[absent] = made.valid
        errors = {absent[i]: reason for i, reason in made.errors.items()}
    offsets = np.concatenate(([0], np.cumsum(length[places])))
    rows = np.arange(offsets[-1]) + np.repeat(start[places] - offsets[:-1], length[places])
    table = torch.cat(parts)
    vectors = table.index_select(0, torch.from_numpy(rows).to(table.device))
    reasons = {i: errors[place] for i, place in enumerate(places) if place in errors}
    return Embeddings(vectors, valid[places], reasons, offsets if multi else None)


def _starts(made: Embeddings) -> np.ndarray:
    """(n + 1,) int64: the rows of the items' vectors."""
    return np.arange(len(made) + 1) if made.offsets is None else made.offsets
