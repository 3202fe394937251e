"""The provider ``huggingface``: any text model of transformers, one vector a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from gpu_lance.embeddings import fingerprint as fingerprints
from gpu_lance.embeddings.backbone import load_errors
from gpu_lance.embeddings.model_folder import ModelFolder
from gpu_lance.embeddings.plain_models import OwnForward, PackedTransformer, load_plain_model
from gpu_lance.embeddings.text_function import TextModelFunction
from gpu_lance.embeddings.tokens import LibraryTokenizer, TextTokenizer, load_plain_tokenizer
from gpu_lance.errors import BadInputError, EmbeddingError
from gpu_lance.optional import require
from gpu_lance.types import Side

if TYPE_CHECKING:
    import numpy as np
    import torch

# The most tokens of a text where a model's files state no limit: memory may grow with its square.
NO_LIMIT_SAID = 4_096

_MODES = {"mean": "mean", "cls": "cls", "last": "lasttoken"}


class TransformersEmbeddingFunction(TextModelFunction):
    """Text embeddings by any text model of transformers: its last hidden state, pooled.

    Without `pooling`, `normalize` and `max_length` the vectors are those of LanceDB's provider of
    the same name, within rounding.

    Parameters
    ----------
    name, trust_remote_code, revision
        See :class:`TextModelFunction`. A folder of sentence-transformers is taken for the
        transformers model in it.
    device, batch_size, dtype, max_retries
        See :class:`DeviceEmbeddingFunction`.
    normalize : bool
        Whether vectors are scaled to length 1; not by default, as in LanceDB.
    pooling : str
        ``"mean"`` of the states of a text's tokens, or the state of its first (``"cls"``) or
        ``"last"`` one, as models that only decode want it.
    max_length : int, optional
        The most tokens of a text, special ones included; the rest is cut off. None is what the
        tokenizer allows, and no more than the model has positions for; 4,096 if neither says.
    show_progress_bar : bool
        Accepted, without effect.

    Notes
    -----
    A model of two parts that needs a text to decode, such as T5, embeds by its encoder. One that
    makes the decoder's text itself, such as BART, gives the decoder's states, as in LanceDB.

    Examples
    --------
    >>> function = TransformersEmbeddingFunction.create(name="all-MiniLM-L6-v2", device="cpu")
    >>> function.ndims()
    384
    >>> function.compute_source_embeddings(["a text"])[0].shape
    (384,)
    """

    session_arguments: ClassVar[frozenset[str]] = TextModelFunction.session_arguments | {
        "show_progress_bar"
    }
    cache_queries: ClassVar[bool] = True
    plain: ClassVar[bool] = True

    name: str = "colbert-ir/colbertv2.0"
    normalize: bool = False
    pooling: Literal["mean", "cls", "last"] = "mean"
    max_length: int | None = Field(default=None, ge=1)
    show_progress_bar: bool = True

    def ndims(self) -> int:
        """Return the length of a vector, from the model's configuration."""
        width = self._model_folder().hidden_size
        if width is not None:
            return width
        name = self._told(self.name)
        with load_errors(name):
            config = require("transformers", extra="cpu|cuda13|cuda12").AutoConfig.from_pretrained(
                str(self._model_folder().folder),
                local_files_only=True,
                trust_remote_code=self.trust_remote_code,
            )
        width = getattr(config, "hidden_size", None)
        if not isinstance(width, int):
            raise EmbeddingError(
                f"The model {name!r} does not say how long its vectors are: its config.json has no "
                "hidden_size."
            )
        return width

    def fingerprint(self) -> dict[str, str]:
        """Return what decides the values of the vectors, from the files of the model."""
        return fingerprints.of_text_model(
            "huggingface",
            self._shown(),
            self._model_folder(),
            dims=self.ndims(),
            normalize=self.normalize,
            pooling=self.pooling,
            max_length=str(self._limit()),
        )

    def forward(
        self, data: Any, rows: np.ndarray, side: Side, device: torch.device
    ) -> torch.Tensor:
        """Run the model over a batch."""
        model: PackedTransformer | OwnForward = self._model(device)
        return model(data.take(rows), _MODES[self.pooling])

    # -- finding and loading

    def load_tokenizer(self) -> TextTokenizer | LibraryTokenizer:
        """Load the tokenizer."""
        model = self._model_folder()
        with load_errors(self._told(self.name)):
            return load_plain_tokenizer(
                model.folder, self.max_length, self._limit(), self.trust_remote_code
            )

    def load_model(
        self, device: torch.device, dtype: torch.dtype
    ) -> PackedTransformer | OwnForward:
        """Load the fastest form of the model."""
        name = self._told(self.name)
        return load_plain_model(self._model_folder(), device, dtype, name, self.trust_remote_code)

    def tokenizer_arguments(self) -> dict[str, Any]:
        """Return the arguments that change the tokenizer alone."""
        return {"max_length": self.max_length}

    def _model_folder(self) -> ModelFolder:
        model = super()._model_folder()
        if not model.transformer:
            raise EmbeddingError(
                f"The model {self._told(self.name)!r} has no config.json of a transformers model; "
                "use the provider 'sentence-transformers' for a folder of its modules."
            )
        return model

    def _limit(self) -> int:
        """The most tokens of a text."""
        model = self._model_folder()
        positions = model.positions
        if self.max_length is None:
            limits = [limit for limit in (model.tokenizer_limit, positions) if limit is not None]
            return min(limits, default=NO_LIMIT_SAID)
        if positions is not None and self.max_length > positions:
            raise BadInputError(
                f"max_length is {self.max_length}, but the model {self._told(self.name)!r} has "
                f"positions for {positions} tokens only."
            )
        return self.max_length
