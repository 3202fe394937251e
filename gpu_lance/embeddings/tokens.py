"""Texts to token ids: a whole chunk a call, no padding, in any thread."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gpu_lance.embeddings.model_folder import ModelFolder
from gpu_lance.errors import BadInputError, EmbeddingError
from gpu_lance.optional import require

EXTRA = "cpu|cuda13|cuda12"

# Characters and texts tokenised in one call; the encodings of two calls live side by side, and each
# holds its whole text's tokens before they are cut off. As many texts as a batch of an add has, in
# which other work goes on meanwhile: one more thread would wait for Python's lock.
_CHUNK = 2_000_000
_CHUNK_TEXTS = 8_192
# transformers' way to say that there is no limit is a number beyond this one.
_NO_LIMIT = 1 << 31
_PROBES = ["A probe, with 3 words!", "Zweite Probe: naïve café 你好", "x" * 300, ""]


@dataclass(frozen=True)
class Tokens:
    """Token ids of n texts, end to end.

    Parameters
    ----------
    ids : numpy.ndarray
        (t,), int32.
    offsets : numpy.ndarray
        (n + 1,), int64: text i has the ids from ``offsets[i]`` to ``offsets[i + 1]``.
    more : dict of str to numpy.ndarray
        (t,) each, int64: what else the model takes of each token, by the name of its argument.
    """

    ids: np.ndarray
    offsets: np.ndarray
    more: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def lengths(self) -> np.ndarray:
        """(n,), tokens of each text."""
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> Tokens:
        """Return the tokens of some texts, in the order of `rows`.

        Examples
        --------
        >>> Tokens(np.array([1, 2, 3]), np.array([0, 1, 3])).take(np.array([1, 0])).ids
        array([2, 3, 1])
        """
        lengths = self.lengths[rows]
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        index = np.arange(offsets[-1]) + np.repeat(self.offsets[rows] - offsets[:-1], lengths)
        more = {name: values[index] for name, values in self.more.items()}
        return Tokens(self.ids[index], offsets, more)


class TextTokenizer:
    """A model's fast tokenizer, set to its length limit once, so that threads can share it.

    The tokenizers of transformers set padding and truncation anew in each call, which fails when
    two threads do; this one works on its own copy of the fast part.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerFast
        The model's tokenizer.
    limit : int or None
        The most tokens of a text, special ones included.

    Raises
    ------
    EmbeddingError
        If the limit leaves no room for the special tokens; the library would then cut nothing off.
    """

    def __init__(self, tokenizer: Any, limit: int | None) -> None:
        special = tokenizer.num_special_tokens_to_add(pair=False)
        if limit is not None and limit < max(1, special):
            raise EmbeddingError(
                f"The model's files allow a text {limit} tokens, but {special} special ones stand "
                "around each; get the model again."
            )
        backend = tokenizer.backend_tokenizer
        fast = type(backend).from_str(backend.to_str())
        fast.encode_special_tokens = backend.encode_special_tokens
        fast.no_padding()  # the file may hold a fixed padding, which would change vectors
        fast.no_truncation()
        if limit is not None:
            fast.enable_truncation(limit, direction=tokenizer.truncation_side)
        self.limit = limit
        self.hf = tokenizer
        self._fast = fast

    @classmethod
    def load(cls, model: ModelFolder, trust_remote_code: bool) -> TextTokenizer | None:
        """Load the tokenizer of a packable model; None if only the library can apply it."""
        transformers = require("transformers", extra=EXTRA)
        limits = {} if model.max_seq_length is None else {"model_max_length": model.max_seq_length}
        module = model.modules[0]
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(model.folder / module.path),
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            **limits,
        )
        if not _is_plain(tokenizer):
            return None
        if not model.has_module_list and getattr(tokenizer, "chat_template", None):
            return None  # the library would wrap each text into a message
        if module.config.get("do_lower_case"):
            _lower(tokenizer)
        limit = tokenizer.model_max_length
        if model.positions is not None and (not limits or model.has_absolute_positions):
            # the library lets a text of more tokens than positions fail
            limit = tokenizer.model_max_length = min(limit, model.positions)
        if limit >= _NO_LIMIT:
            limit = None
        loaded = cls(tokenizer, limit)
        return loaded if loaded.agrees() else None

    def __call__(self, texts: list[str], prompt: str = "") -> Tokens:
        """Tokenise `texts`, each with `prompt` before it."""
        lengths = np.empty(len(texts), dtype=np.int64)
        parts: list[np.ndarray] = []
        done = 0

        def encode(chunk: list[str]) -> Any:
            return self._fast.encode_batch_fast([prompt + text for text in chunk])

        for made in _one_ahead(encode, _chunks(texts)):
            lists = [encoding.ids for encoding in made]
            sizes = [len(ids) for ids in lists]
            lengths[done : done + len(lists)] = sizes
            done += len(lists)
            flat = itertools.chain.from_iterable(lists)  # twice as fast as a generator of ours
            parts.append(np.fromiter(flat, dtype=np.int32, count=sum(sizes)))
        ids = np.concatenate(parts) if parts else np.empty(0, np.int32)
        return Tokens(ids, np.concatenate(([0], np.cumsum(lengths))))

    def agrees(self) -> bool:
        """Whether this copy gives what the model's own tokenizer gives, with type ids of zero."""
        probes = [*_PROBES, "long " * min(2 * (self.limit or 1), 2048)]
        given = self.hf(probes, truncation=self.limit is not None, return_token_type_ids=True)
        ours = self(probes)
        same = [ids.tolist() for ids in np.split(ours.ids, ours.offsets[1:-1])]
        types = [kind for kinds in given.get("token_type_ids", []) for kind in kinds]
        return same == [list(ids) for ids in given["input_ids"]] and not any(types)


class LibraryTokenizer:
    """A model's tokenizer as it is, slow or with more than ids; one thread at a time.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        The model's tokenizer.
    limit : int
        The most tokens of a text, special ones included.
    """

    def __init__(self, tokenizer: Any, limit: int) -> None:
        self.limit = limit
        self.hf = tokenizer
        self._lock = threading.Lock()

    def __call__(self, texts: list[str], prompt: str = "") -> Tokens:
        """Tokenise `texts`, each with `prompt` before it."""
        lists: dict[str, list[list[int]]] = {"input_ids": []}
        for chunk in _chunks(texts):
            with self._lock:
                made = self.hf(
                    [prompt + text for text in chunk],
                    truncation=True,
                    max_length=self.limit,
                    padding=False,
                    return_attention_mask=False,
                )
            for name, values in made.items():
                lists.setdefault(name, []).extend(values)
        lengths = [len(ids) for ids in lists["input_ids"]]
        flat = {
            name: np.fromiter((value for row in rows for value in row), np.int64, sum(lengths))
            for name, rows in lists.items()
        }
        ids = flat.pop("input_ids").astype(np.int32)
        return Tokens(ids, np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))), flat)


def load_plain_tokenizer(
    folder: Path, asked: int | None, most: int, trust_remote_code: bool
) -> TextTokenizer | LibraryTokenizer:
    """Load the tokenizer of a plain transformers model, in its fast form if that gives the same.

    Parameters
    ----------
    folder : pathlib.Path
        Of the model.
    asked : int or None
        The most tokens of a text, special ones included; None is what the tokenizer allows.
    most : int
        And no more than so many then.
    trust_remote_code : bool
        Whether code in the folder may run.

    Raises
    ------
    BadInputError
        If `asked` leaves no room beside the special tokens.
    """
    transformers = require("transformers", extra=EXTRA)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        str(folder), trust_remote_code=trust_remote_code, local_files_only=True
    )
    limit = int(min(most, tokenizer.model_max_length)) if asked is None else asked
    special = tokenizer.num_special_tokens_to_add(pair=False)
    if limit <= special:
        raise BadInputError(
            f"max_length is {limit}, but the model puts {special} special tokens around each text; "
            f"it must be at least {special + 1}."
        )
    if _is_plain(tokenizer):
        tokenizer.model_max_length = limit
        loaded = TextTokenizer(tokenizer, limit)
        if loaded.agrees():
            return loaded
    return LibraryTokenizer(tokenizer, limit)


def _is_plain(tokenizer: Any) -> bool:
    """Whether it has a fast part, and gives its model no more than ids, types and a mask."""
    known = {"input_ids", "attention_mask", "token_type_ids"}
    return getattr(tokenizer, "is_fast", False) and not set(tokenizer.model_input_names) - known


def _one_ahead(call: Callable[[Any], Any], items: Iterator[Any]) -> Iterator[Any]:
    """What `call` makes of each item; of the next one in a thread, while the caller has the last.

    The tokenizer runs without Python's lock; making arrays of what it gave does not.
    """
    first, second = next(items, None), next(items, None)
    if second is None:
        if first is not None:
            yield call(first)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="gpu-lance-tokens") as pool:
        waiting = pool.submit(call, first)
        for item in itertools.chain([second], items):
            made = waiting.result()
            waiting = pool.submit(call, item)
            yield made
        yield waiting.result()


def _chunks(texts: list[str]) -> Iterator[list[str]]:
    start = size = 0
    for index, text in enumerate(texts):
        size += len(text)
        if size >= _CHUNK or index + 1 - start >= _CHUNK_TEXTS:
            yield texts[start : index + 1]
            start, size = index + 1, 0
    if start < len(texts):
        yield texts[start:]


def _lower(tokenizer: Any) -> None:
    """Make a tokenizer lower its texts first, as the library does where a model asks for it."""
    normalizers = require("tokenizers.normalizers", extra=EXTRA)
    backend = tokenizer.backend_tokenizer
    present = backend.normalizer
    steps = list(present) if isinstance(present, normalizers.Sequence) else [present]
    if not any(isinstance(step, normalizers.Lowercase) for step in steps):
        kept = [step for step in steps if step is not None]
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *kept])
