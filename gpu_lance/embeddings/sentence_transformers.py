"""The provider ``sentence-transformers``: text models of that library, with our own inference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import Field

from gpu_lance.device import parse_dtype, resolve_device
from gpu_lance.embeddings import fingerprint as fingerprints
from gpu_lance.embeddings.backbone import load_errors
from gpu_lance.embeddings.loading import MODELS
from gpu_lance.embeddings.model_folder import PROMPT_NAMES
from gpu_lance.embeddings.text_function import TextModelFunction
from gpu_lance.embeddings.text_models import TextModel, load_library, load_text_model
from gpu_lance.embeddings.tokens import TextTokenizer
from gpu_lance.embeddings.variables import has_reference
from gpu_lance.errors import EmbeddingError
from gpu_lance.types import Side

if TYPE_CHECKING:
    import numpy as np
    import torch


class SentenceTransformerEmbeddings(TextModelFunction):
    """Text embeddings by a sentence-transformers model.

    Vectors equal those of the library's ``encode_query`` and ``encode_document`` within rounding.

    Parameters
    ----------
    name, trust_remote_code, revision
        See :class:`TextModelFunction`.
    device, batch_size, dtype, normalize, max_retries
        See :class:`DeviceEmbeddingFunction`.
    truncate_dim : int, optional
        Keep only so many leading dimensions, for models that were trained for it.
    prompts : dict of str to str, optional
        Text put before each item, under ``"query"`` and ``"document"``; a value may also be the
        name of a prompt that the model was saved with. By default the model's own are used.

    Examples
    --------
    >>> function = SentenceTransformerEmbeddings.create(device="cpu")
    >>> function.ndims()
    384
    >>> function.generate_embeddings(["a text"])[0].shape
    (384,)
    """

    cache_queries: ClassVar[bool] = True
    organization_first: ClassVar[bool] = True

    name: str = "all-MiniLM-L6-v2"
    truncate_dim: int | None = Field(default=None, ge=1)
    prompts: dict[str, str] | None = None

    def ndims(self) -> int:
        """Return the length of a vector, from the model's configuration."""
        width = self._model_folder().ndims()
        if width is None:
            # only for modules that do not write their width down
            width = self.embedding_model.get_embedding_dimension()
        if width is None:
            more = "" if self.truncate_dim is not None else "; pass truncate_dim"
            name = self._told(self.name)
            raise EmbeddingError(f"The model {name!r} does not say how long its vectors are{more}.")
        return width if self.truncate_dim is None else min(width, self.truncate_dim)

    @property
    def embedding_model(self) -> Any:
        """The ``SentenceTransformer`` itself, for what this class does not offer."""
        return self.get_embedding_model()

    def get_embedding_model(self) -> Any:
        """Return the ``SentenceTransformer``; loaded once for each device."""
        device = resolve_device(self.device)
        library = getattr(self._model(device), "library", None)
        if library is not None:
            return library
        return MODELS.get(
            type(self),
            {**self._load_key(device), "part": "library"},
            device,
            lambda: load_library(
                self._model_folder(),
                device,
                parse_dtype(self.dtype, device),
                self.trust_remote_code,
            ),
        )

    def prompt_of(self, side: Side) -> str:
        """Return the text that is put before each item of that side."""
        stored = self._model_folder().prompts
        given = self.prompts or {}
        # the library knows both names, empty, for every model
        known = {"query": "", "document": "", **stored, **given}
        for name in PROMPT_NAMES[side]:
            if name in known:
                text = known[name]
                return stored.get(text, text) if name in given else text
        return ""

    def fingerprint(self) -> dict[str, str]:
        """Return what decides the values of the vectors, from the files of the model."""
        model, written = self._model_folder(), self._original_args or {}
        prompts = {side.value: self.prompt_of(side) for side in Side}
        return fingerprints.of_text_model(
            "sentence-transformers",
            self._shown(),
            model,
            dims=self.ndims(),
            normalize=self.normalize,
            modules=fingerprints.modules_of(model.modules),
            pooling=" ".join(model.pooling),
            max_seq_length=str(model.max_seq_length or ""),
            prompts=fingerprints.prompts_of(prompts, has_reference(written.get("prompts"))),
        )

    def forward(
        self, data: Any, rows: np.ndarray, side: Side, device: torch.device
    ) -> torch.Tensor:
        """Run the model over a batch."""
        vectors = self._model(device)(data, rows, side, self.prompt_of(side))
        return vectors if self.truncate_dim is None else vectors[:, : self.truncate_dim]

    def load_tokenizer(self) -> TextTokenizer | None:
        """Load the tokenizer; None where only the library can apply the model."""
        model = self._model_folder()
        if not model.is_packable:
            return None
        with load_errors(self._told(self.name)):
            return TextTokenizer.load(model, self.trust_remote_code)

    def load_model(self, device: torch.device, dtype: torch.dtype) -> TextModel:
        """Load the fastest form of the model."""
        tokenizer = cast("TextTokenizer | None", self._tokenizer())
        return load_text_model(
            self._model_folder(), tokenizer, device, dtype, self.trust_remote_code
        )
