"""Texts to the token ids of late interaction: markers, expanded queries, and which tokens count."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from gpu_lance.embeddings.late_recipe import Recipe
from gpu_lance.embeddings.model_folder import ModelFolder
from gpu_lance.embeddings.tokens import TextTokenizer, Tokens
from gpu_lance.errors import EmbeddingError
from gpu_lance.types import Side


@dataclass(frozen=True)
class LateTokens:
    """Token ids of n texts, t in all.

    Parameters
    ----------
    tokens : Tokens
        The ids.
    scored : numpy.ndarray
        (t,), bool: which of them have a vector.
    attended : numpy.ndarray or None
        (n,), to how many of its tokens, from the first, each text attends; None for all.
    """

    tokens: Tokens
    scored: np.ndarray
    attended: np.ndarray | None = None

    @property
    def counts(self) -> np.ndarray:
        """(n,), vectors of each text."""
        before = np.concatenate(([0], np.cumsum(self.scored)))
        return np.diff(before[self.tokens.offsets])

    def take(self, rows: np.ndarray) -> LateTokens:
        """Return some texts, in the order of `rows`."""
        scored = Tokens(self.scored, self.tokens.offsets).take(rows).ids
        attended = None if self.attended is None else self.attended[rows]
        return LateTokens(self.tokens.take(rows), scored, attended)


class LateTokenizer:
    """A model's tokenizer, with what late interaction does to its ids.

    Parameters
    ----------
    base : TextTokenizer
        The model's tokenizer.
    recipe : Recipe
        What the checkpoint says.
    model : ModelFolder
        Where it is.
    name : str
        What messages call it.

    Notes
    -----
    A marker goes in as an id, so no text can be mistaken for one, and none is cut off. Special
    tokens that a text spells out, such as ``[MASK]``, are those tokens, as for every model; in an
    expanded query they are attended to like words. Safe to share by threads.
    """

    def __init__(self, base: TextTokenizer, recipe: Recipe, model: ModelFolder, name: str) -> None:
        self.hf = base.hf
        self._recipe = recipe
        self._name = name
        self._positions = model.positions if model.has_absolute_positions else None
        self._limit = base.limit
        self._made: dict[int | None, TextTokenizer] = {}
        self._lock = threading.Lock()
        self._markers: dict[Side, int] = {}
        self._prompts = dict(recipe.prompts)
        for side, marker in recipe.markers.items():
            self._mark(side, marker)
        self._expand_by = self._expansion_id()
        self._skip = np.array(self._skip_ids(), dtype=np.int32)
        self._keep = np.array(recipe.keep, dtype=np.int32)

    def __call__(
        self,
        texts: list[str],
        side: Side,
        query_length: int | None = None,
        document_length: int | None = None,
    ) -> LateTokens:
        """Tokenise `texts`; lengths that are given go before the checkpoint's.

        Raises
        ------
        EmbeddingError
            If a length is more than the model has positions for.
        """
        floor, limit = self.lengths(side, query_length, document_length)
        marker = self._markers.get(side)
        tokens = self._cut_to(limit, marker is not None)(texts, self._prompts.get(side, ""))
        if marker is not None:
            tokens = _insert(tokens, marker)
        attended = None
        if floor is not None:
            attended = tokens.lengths
            tokens = _fill(tokens, floor, self._expand_by)
            assert self._recipe.expansion is not None
            if self._recipe.expansion.attend or (attended == tokens.lengths).all():
                attended = None
        scored = np.ones(len(tokens.ids), dtype=bool)
        if side in self._recipe.skip_sides and len(self._skip):
            scored &= ~np.isin(tokens.ids, self._skip)
        if side is Side.SOURCE and len(self._keep):
            scored &= np.isin(tokens.ids, self._keep)
        return LateTokens(tokens, scored, attended)

    def lengths(
        self, side: Side, query_length: int | None = None, document_length: int | None = None
    ) -> tuple[int | None, int | None]:
        """Return how many tokens a text of that side has at least and at most; None: no bound."""
        recipe, floor = self._recipe, None
        if side is Side.SOURCE:
            given, limit = document_length, document_length or recipe.document_length
        else:
            given, limit = query_length, query_length or recipe.query_length
            if recipe.expansion is not None:
                floor = query_length or recipe.expansion.length
                if recipe.expansion.fixed:
                    limit = floor
                elif limit is not None:
                    limit = max(recipe.query_length or 0, floor)
        if limit is None:
            limit = self._limit
        most = self._positions
        if most is None:
            return floor, limit
        if max(given or 0, floor or 0) > most:
            what = "documents" if side is Side.SOURCE else "queries"
            raise EmbeddingError(
                f"The model {self._name!r} has {most} positions, but {what} are to have "
                f"{max(given or 0, floor or 0)} tokens. Pass a smaller "
                f"{'document_length' if side is Side.SOURCE else 'query_length'}."
            )
        return floor, most if limit is None else min(limit, most)

    # -- helpers

    def _cut_to(self, limit: int | None, marked: bool) -> TextTokenizer:
        if limit is not None and marked:
            limit -= 1
        with self._lock:
            if limit not in self._made:
                self._made[limit] = TextTokenizer(self.hf, limit)
            return self._made[limit]

    def _mark(self, side: Side, marker: str) -> None:
        """Take a marker as an id if the tokenizer has it, or as text if it comes from a prompt."""
        for text in (marker, marker.split()[0] if marker.split() else marker):
            token = self._id_of(text)
            if token is not None:
                if len(TextTokenizer(self.hf, None)([""]).ids) == 0:
                    break
                self._markers[side] = token
                rest = marker[len(text) :].lstrip()
                self._prompts[side] = rest + self._prompts.get(side, "")
                return
        if not self._recipe.prompts:
            raise EmbeddingError(
                f"The model {self._name!r} marks texts by the token {marker!r}, which its "
                "tokenizer does not have; the files of two models are mixed up. Get the model "
                "again."
            )
        self._prompts[side] = marker + self._prompts.get(side, "")

    def _expansion_id(self) -> int:
        expansion = self._recipe.expansion
        if expansion is None:
            return -1
        if expansion.token is not None:
            token = self._id_of(expansion.token)
        else:
            token = self.hf.mask_token_id
            token = self.hf.eos_token_id if token is None else token
        if token is None:
            raise EmbeddingError(
                f"The model {self._name!r} fills queries up with "
                f"{expansion.token or 'its mask token'!r}, which its tokenizer does not have. Get "
                "the model again."
            )
        return int(token)

    def _skip_ids(self) -> list[int]:
        found = (self._id_of(word) for word in self._recipe.skip)
        return [token for token in found if token is not None]

    def _id_of(self, token: str) -> int | None:
        found = self.hf.convert_tokens_to_ids(token)
        unknown = found is None or (found == self.hf.unk_token_id and token != self.hf.unk_token)
        return None if unknown else int(found)


def _insert(tokens: Tokens, marker: int) -> Tokens:
    """Put an id behind the first one of each text."""
    ids = np.insert(tokens.ids, tokens.offsets[:-1] + 1, marker)
    return Tokens(ids, tokens.offsets + np.arange(len(tokens.offsets)))


def _fill(tokens: Tokens, floor: int, token: int) -> Tokens:
    """Fill each text up to `floor` ids."""
    lengths = np.maximum(tokens.lengths, floor)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    ids = np.full(offsets[-1], token, dtype=np.int32)
    index = np.arange(len(tokens.ids)) + np.repeat(
        offsets[:-1] - tokens.offsets[:-1], tokens.lengths
    )
    ids[index] = tokens.ids
    return Tokens(ids, offsets)
