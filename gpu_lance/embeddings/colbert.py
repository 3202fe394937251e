"""The provider ``colbert``: late interaction, a vector for each token of a text."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
from pydantic import Field, PrivateAttr

from gpu_lance.embeddings import fingerprint as fingerprints
from gpu_lance.embeddings.backbone import load_errors
from gpu_lance.embeddings.base import EmbeddingFunction
from gpu_lance.embeddings.device_base import Payload
from gpu_lance.embeddings.late_interaction import LateInteraction, load_late_interaction
from gpu_lance.embeddings.late_recipe import Recipe, check_steps, read_recipe
from gpu_lance.embeddings.late_tokens import LateTokenizer
from gpu_lance.embeddings.text_function import TextModelFunction
from gpu_lance.embeddings.tokens import TextTokenizer
from gpu_lance.errors import EmbeddingError
from gpu_lance.types import Side

if TYPE_CHECKING:
    import torch


class ColbertEmbeddings(TextModelFunction):
    """Late interaction: a text becomes one vector for each token that counts.

    For a ``MultiVector(function.ndims())`` column. A text is found by the sum, over the vectors of
    the query, of the best match among the vectors of the text. Queries and texts are encoded
    differently, as the checkpoint's authors say: each gets its marker; queries are filled up with
    [MASK] to a fixed length; punctuation in texts has no vector.

    Parameters
    ----------
    name, trust_remote_code, revision
        See :class:`TextModelFunction`. A checkpoint of Stanford's ColBERT, or a folder saved by
        sentence-transformers' ``MultiVectorEncoder`` or by PyLate.
    device, batch_size, dtype, normalize, max_retries
        See :class:`DeviceEmbeddingFunction`.
    query_length : int, optional
        Tokens of a query, the marker and the others of the frame included; None is the
        checkpoint's. A shorter query is filled up if the checkpoint says so, a longer one is cut.
    document_length : int, optional
        The most tokens of a text; None is the checkpoint's.

    Notes
    -----
    Every text has a vector: an empty one, or one of punctuation alone, keeps those of its frame,
    such as [CLS], as in Stanford's code.

    Examples
    --------
    >>> ColbertEmbeddings.create().multivector
    True
    """

    cache_queries: ClassVar[bool] = True
    multivector: ClassVar[bool] = True

    name: str = "colbert-ir/colbertv2.0"
    query_length: int | None = Field(default=None, ge=4)
    document_length: int | None = Field(default=None, ge=4)

    _read: Recipe | None = PrivateAttr(default=None)
    _pooled: EmbeddingFunction | None = PrivateAttr(default=None)

    def ndims(self) -> int:
        """Return the length of a vector, from the files of the model."""
        return self._recipe().ndims

    def pooled(self) -> EmbeddingFunction:
        """Return what LanceDB's ``colbert`` is: one vector a text, the mean of its tokens' states.

        It is the provider ``huggingface`` with the same model.
        """
        from gpu_lance.embeddings.huggingface import TransformersEmbeddingFunction

        if self._pooled is None:
            # as they were written, so that a reference to a variable stays one
            written = self._original_args or {}
            names = ("name", "revision", "device", "dtype", "batch_size", "trust_remote_code")
            given = {name: written.get(name, getattr(self, name)) for name in names}
            self._pooled = TransformersEmbeddingFunction.create(**given)
        return self._pooled

    def single(self, ndims: int) -> EmbeddingFunction | None:
        """Return :meth:`pooled` for a column as wide as the transformer, as LanceDB makes it."""
        return self.pooled() if ndims == self._model_folder().hidden_size else None

    def fingerprint(self) -> dict[str, str]:
        """Return what decides the values of the vectors, from the files of the model."""
        recipe = self._recipe()
        expansion = recipe.expansion
        filled = "" if expansion is None else f"{self.query_length or expansion.length}"
        if expansion is not None:
            filled += " fixed" if expansion.fixed else " min"
            filled += " attended" if expansion.attend else ""
            filled += f" {expansion.token}" if expansion.token else ""
        marks = {side.value: recipe.markers.get(side, "") for side in Side}
        prompts = {side.value: recipe.prompts.get(side, "") for side in Side}
        return fingerprints.of_text_model(
            "colbert",
            self._shown(),
            self._model_folder(),
            dims=recipe.ndims,
            normalize=self.normalize,
            markers=json.dumps(marks, sort_keys=True),
            prompts=fingerprints.prompts_of(prompts),
            query_length=str(self.query_length or recipe.query_length or ""),
            document_length=str(self.document_length or recipe.document_length or ""),
            expansion=filled,
            skiplist=" ".join((*sorted(side.value for side in recipe.skip_sides), *recipe.skip)),
            keep=" ".join(str(token) for token in recipe.keep),
            modules=fingerprints.modules_of(recipe.steps),
        )

    # -- the two parts

    def prepare_items(self, items: list[Any], side: Side) -> Payload:
        """Tokenise for that side."""
        made = self._late_tokenizer()(items, side, self.query_length, self.document_length)
        attended = made.tokens.lengths if made.attended is None else made.attended
        bad = {
            **dict.fromkeys(
                np.flatnonzero(made.counts == 0).tolist(), "none of its tokens has a vector"
            ),
            **dict.fromkeys(
                np.flatnonzero(attended == 0).tolist(),
                "it has no token, so this model has no vector for it",
            ),
        }
        return Payload(made, made.tokens.lengths, bad)

    def forward(
        self, data: Any, rows: np.ndarray, side: Side, device: torch.device
    ) -> tuple[torch.Tensor, np.ndarray]:
        """Run the model over a batch."""
        made: tuple[torch.Tensor, np.ndarray] = self._model(device)(data, rows)
        return made

    # -- loading

    def load_tokenizer(self) -> Any:
        """Load the tokenizer."""
        model, recipe, name = self._model_folder(), self._recipe(), self._told(self.name)
        check_steps(model, recipe, name, self.trust_remote_code)
        with load_errors(name):
            base = TextTokenizer.load(model, self.trust_remote_code)
        if base is None or (recipe.expansion and base.hf.padding_side != "right"):
            raise EmbeddingError(
                f"The model {name!r} has a tokenizer of a kind that 'colbert' cannot use; it takes "
                "a fast tokenizer of text, without a chat template, that pads on the right."
            )
        return LateTokenizer(base, recipe, model, name)

    def load_model(self, device: torch.device, dtype: torch.dtype) -> LateInteraction:
        """Load the fastest form of the model."""
        return load_late_interaction(
            self._model_folder(),
            self._recipe(),
            device,
            dtype,
            self.trust_remote_code,
        )

    def _late_tokenizer(self) -> LateTokenizer:
        return cast(LateTokenizer, self._tokenizer())

    def _recipe(self) -> Recipe:
        if self._read is None:
            name = self._told(self.name)
            with load_errors(name):
                self._read = read_recipe(self._model_folder(), name)
        return self._read
