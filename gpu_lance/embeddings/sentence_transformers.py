"""The provider ``sentence-transformers``: text models of that library, with our own inference."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field, PrivateAttr

from gpu_lance.device import parse_dtype, resolve_device
from gpu_lance.embeddings import fingerprint as fingerprints
from gpu_lance.embeddings.base import TextEmbeddingFunction
from gpu_lance.embeddings.device_base import DeviceEmbeddingFunction, Payload, derived
from gpu_lance.embeddings.loading import MODELS
from gpu_lance.embeddings.locate import Located, locate
from gpu_lance.embeddings.model_folder import ModelFolder
from gpu_lance.embeddings.text_models import (
    TextModel,
    load_errors,
    load_library,
    load_text_model,
)
from gpu_lance.embeddings.tokens import TextTokenizer
from gpu_lance.embeddings.variables import has_reference, redact
from gpu_lance.errors import EmbeddingError, ModelNotFoundError
from gpu_lance.types import Side

if TYPE_CHECKING:
    import torch

ORGANIZATION = "sentence-transformers"

# The names under which models keep a prompt for each side, in the library's order.
_PROMPT_NAMES = {Side.QUERY: ("query",), Side.SOURCE: ("document", "passage", "corpus")}


class SentenceTransformerEmbeddings(  # type: ignore[misc]  # the names of arguments differ
    DeviceEmbeddingFunction, TextEmbeddingFunction
):
    """Text embeddings by a sentence-transformers model.

    Vectors equal those of the library's ``encode_query`` and ``encode_document`` within rounding.

    Parameters
    ----------
    name : str
        A folder, or a name on the hub; looked for as a folder, in the local cache, in the
        installed package that carries it, and on the hub, in this order.
    device, batch_size, dtype, normalize, max_retries
        See :class:`DeviceEmbeddingFunction`. A text costs its tokens: a batch holds 2,048 of them
        on a CPU and 65,536 on a GPU.
    trust_remote_code : bool
        Whether code that the model brings may run. Never stored in a table.
    revision : str, optional
        A branch, tag or commit on the hub.
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

    cpu_budget: ClassVar[int | None] = 2_048
    device_budget: ClassVar[int | None] = 65_536

    name: str = "all-MiniLM-L6-v2"
    trust_remote_code: bool = False
    revision: str | None = None
    truncate_dim: int | None = Field(default=None, ge=1)
    prompts: dict[str, str] | None = None

    _located: Located | None = PrivateAttr(default=None)
    _folder: ModelFolder | None = PrivateAttr(default=None)

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

    @derived
    def generate_embeddings(self, texts: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """Embed texts as sources: float32 arrays."""
        return self.compute_source_embeddings(texts)

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
            SentenceTransformerEmbeddings,
            {**self._load_arguments(device), "part": "library"},
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
        for name in _PROMPT_NAMES[side]:
            if name in known:
                text = known[name]
                return stored.get(text, text) if name in given else text
        return ""

    def fingerprint(self) -> dict[str, str]:
        """Return what decides the values of the vectors, from the files of the model."""
        located, written = self._locate(), self._original_args or {}
        if has_reference(written.get("name")):
            # what a variable holds is not for the table
            located = dataclasses.replace(located, model=str(written["name"]))
        return fingerprints.of_text_model(
            located,
            self._model_folder(),
            dims=self.ndims(),
            normalize=self.normalize,
            prompts={side.value: self.prompt_of(side) for side in Side},
            hide_prompts=has_reference(written.get("prompts")),
        )

    # -- the two parts

    def prepare_items(self, items: list[Any], side: Side) -> Payload:
        """Tokenise, or keep the texts where only the library can."""
        tokenizer = self._tokenizer()
        if tokenizer is None:
            # about four letters a token
            costs = np.array([len(text) // 4 + 1 for text in items], dtype=np.int64)
            return Payload(items, costs)
        tokens = tokenizer(items, self.prompt_of(side))
        empty = np.flatnonzero(tokens.lengths == 0).tolist()
        reason = "it has no token, so this model has no vector for it"
        return Payload(tokens, tokens.lengths, dict.fromkeys(empty, reason))

    def forward(
        self, data: Any, rows: np.ndarray, side: Side, device: torch.device
    ) -> torch.Tensor:
        """Run the model over a batch."""
        vectors = self._model(device)(data, rows, side, self.prompt_of(side))
        return vectors if self.truncate_dim is None else vectors[:, : self.truncate_dim]

    # -- finding and loading

    def _locate(self) -> Located:
        if self._located is None:
            try:
                self._located = locate(self.name, self.revision, ORGANIZATION)
            except ModelNotFoundError as error:
                told = self._told(str(error))
            else:
                return self._located
            # outside the except block, so that the first message does not come along
            raise ModelNotFoundError(told)
        return self._located

    def _told(self, text: str) -> str:
        """A text for the user, with references where a table or a caller wrote references."""
        written = self._original_args or {}
        values = {"name": self.name, "revision": self.revision}
        return redact(
            text,
            {
                value: str(written[key])
                for key, value in values.items()
                if value is not None and has_reference(written.get(key))
            },
        )

    def _model_folder(self) -> ModelFolder:
        if self._folder is None:
            self._folder = ModelFolder(self._locate().folder)
        return self._folder

    def _load_arguments(self, device: torch.device | None) -> dict[str, Any]:
        dtype = None if device is None else str(parse_dtype(self.dtype, device))
        return {
            "name": self._told(self._locate().model),
            "folder": str(self._locate().folder),
            "files": self._model_folder().stamp(),
            "trust_remote_code": self.trust_remote_code,
            "dtype": dtype,
        }

    def _tokenizer(self) -> TextTokenizer | None:
        def load() -> TextTokenizer | None:
            model = self._model_folder()
            if not model.is_packable:
                return None
            with load_errors(self._told(self.name)):
                return TextTokenizer.load(model, self.trust_remote_code)

        arguments = {**self._load_arguments(None), "part": "tokenizer"}
        return MODELS.get(SentenceTransformerEmbeddings, arguments, "host", load)

    def _model(self, device: torch.device) -> TextModel:
        def load() -> TextModel:
            return load_text_model(
                self._model_folder(),
                self._tokenizer(),
                device,
                parse_dtype(self.dtype, device),
                self.trust_remote_code,
            )

        arguments = self._load_arguments(device)
        return MODELS.get(SentenceTransformerEmbeddings, arguments, device, load)
