"""Base of the providers of text whose models run here: finding, loading, tokenising."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import PrivateAttr

from gpu_lance.device import parse_dtype
from gpu_lance.embeddings.backbone import load_errors
from gpu_lance.embeddings.base import TextEmbeddingFunction
from gpu_lance.embeddings.device_base import DeviceEmbeddingFunction, Payload
from gpu_lance.embeddings.loading import MODELS
from gpu_lance.embeddings.locate import Located, locate
from gpu_lance.embeddings.model_folder import ModelFolder
from gpu_lance.embeddings.staged import derived
from gpu_lance.embeddings.tokens import LibraryTokenizer, TextTokenizer
from gpu_lance.embeddings.variables import has_reference, redact
from gpu_lance.errors import ModelNotFoundError
from gpu_lance.types import Side

if TYPE_CHECKING:
    import torch

ORGANIZATION = "sentence-transformers"


class TextModelFunction(  # type: ignore[misc]  # the names of arguments differ
    DeviceEmbeddingFunction, TextEmbeddingFunction
):
    """Base of functions that run a text model from a folder, a package or the hub.

    A provider implements ``ndims``, ``forward``, :meth:`load_tokenizer` and :meth:`load_model`.
    This class finds the model, loads each part once a process, and tokenises.

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

    Notes
    -----
    Class attributes: `plain` says whether a folder of modules counts as the transformers model in
    it; `organization_first` whether a name without an owner means sentence-transformers' model, or
    the one of just that name, if a place has both.
    """

    cpu_budget: ClassVar[int | None] = 2_048
    device_budget: ClassVar[int | None] = 65_536
    plain: ClassVar[bool] = False
    organization_first: ClassVar[bool] = False

    name: str
    trust_remote_code: bool = False
    revision: str | None = None

    _located: Located | None = PrivateAttr(default=None)
    _folder: ModelFolder | None = PrivateAttr(default=None)

    # -- what a provider implements

    @abstractmethod
    def load_tokenizer(self) -> TextTokenizer | LibraryTokenizer | None:
        """Load the model's tokenizer; None where texts reach the model as they are.

        Called once for equal :meth:`tokenizer_arguments` in a process.
        """

    @abstractmethod
    def load_model(self, device: torch.device, dtype: torch.dtype) -> Any:
        """Load the model onto a device; called once for equal arguments in a process."""

    def prompt_of(self, side: Side) -> str:
        """Return the text that is put before each item of that side."""
        return ""

    def load_arguments(self) -> dict[str, Any]:
        """Return the arguments that change what is loaded, beside the name and the precision."""
        return {"trust_remote_code": self.trust_remote_code}

    def tokenizer_arguments(self) -> dict[str, Any]:
        """Return the arguments that change the tokenizer alone."""
        return {}

    # -- derived

    @derived
    def generate_embeddings(self, texts: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """Embed texts as sources: float32 arrays."""
        return self.compute_source_embeddings(texts)

    def query_state(self) -> Hashable:
        """Return where the model's files are, and their sizes and times."""
        return str(self._locate().folder), tuple(self._model_folder().stamp())

    def prepare_items(self, items: list[Any], side: Side) -> Payload:
        """Tokenise, or keep the texts where there is no tokenizer to do it."""
        tokenizer = self._tokenizer()
        if tokenizer is None:
            # about four letters a token
            costs = np.array([len(text) // 4 + 1 for text in items], dtype=np.int64)
            return Payload(items, costs)
        tokens = tokenizer(items, self.prompt_of(side))
        empty = np.flatnonzero(tokens.lengths == 0).tolist()
        reason = "it has no token, so this model has no vector for it"
        return Payload(tokens, tokens.lengths, dict.fromkeys(empty, reason))

    # -- finding and loading

    def _locate(self) -> Located:
        if self._located is None:
            try:
                self._located = locate(
                    self.name, self.revision, ORGANIZATION, self.organization_first
                )
            except ModelNotFoundError as error:
                told = self._told(str(error))
            else:
                return self._located
            # outside the except block, so that the first message does not come along
            raise ModelNotFoundError(told)
        return self._located

    def _shown(self) -> Located:
        """Where the model was found, as a table may store it: what a variable holds is not."""
        written = self._original_args or {}
        if has_reference(written.get("name")):
            return dataclasses.replace(self._locate(), model=str(written["name"]))
        return self._locate()

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
            folder = ModelFolder(self._locate().folder, plain=self.plain)
            with load_errors(self._told(self.name)):
                folder.check()
            self._folder = folder
        return self._folder

    def _load_key(self, device: torch.device | None) -> dict[str, Any]:
        return {
            "name": self._told(self._locate().model),
            "folder": str(self._locate().folder),
            "files": self._model_folder().stamp(),
            "dtype": None if device is None else str(parse_dtype(self.dtype, device)),
            **self.load_arguments(),
        }

    def _tokenizer(self) -> TextTokenizer | LibraryTokenizer | None:
        key = {**self._load_key(None), **self.tokenizer_arguments(), "part": "tokenizer"}
        return MODELS.get(type(self), key, "host", self.load_tokenizer)

    def _model(self, device: torch.device) -> Any:
        def load() -> Any:
            return self.load_model(device, parse_dtype(self.dtype, device))

        return MODELS.get(type(self), self._load_key(device), device, load)
