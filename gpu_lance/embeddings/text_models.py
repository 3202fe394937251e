"""Three ways to run a sentence-transformers model, from the fastest to the most general.

Packed: BERT-like encoders, over packed tokens. Padded: other encoders, through their own forward,
with padding only where lengths differ. Library: everything else, through ``encode``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_lance.embeddings.backbone import alone, forward_errors, load_backbone, load_errors
from gpu_lance.embeddings.encoder import (
    PACKED_TYPES,
    PackedEncoder,
    can_pack,
    check_vocabulary,
    runs_of,
)
from gpu_lance.embeddings.model_folder import ModelFolder, ModuleFiles
from gpu_lance.embeddings.plain_models import vocabulary_of
from gpu_lance.embeddings.pooling import pool
from gpu_lance.embeddings.tokens import TextTokenizer, Tokens
from gpu_lance.errors import UntrustedModelError
from gpu_lance.optional import require
from gpu_lance.types import Side

if TYPE_CHECKING:
    import torch

EXTRA = "cpu|cuda13|cuda12"


class TextModel(ABC):
    """A loaded model on its device."""

    @abstractmethod
    def __call__(self, data: Any, rows: np.ndarray, side: Side, prompt: str) -> torch.Tensor:
        """Embed some rows of `data`: (b, d), not normalised beyond what the model does."""


class PackedModel(TextModel):
    """Encoder, pooling and what follows it, over packed tokens."""

    def __init__(
        self, model: ModelFolder, weights: Any, device: torch.device, trust_remote_code: bool
    ) -> None:
        weights.to(device)
        self._name = str(model.folder)
        self._encoder = PackedEncoder(weights)
        self._modes = model.pooling
        self._after = [
            load_layer(model, module, device, self._encoder.dtype, trust_remote_code)
            for module in model.modules[2:]
        ]

    def __call__(self, data: Any, rows: np.ndarray, side: Side, prompt: str) -> torch.Tensor:
        """Embed texts that stand in `data` as Tokens."""
        tokens: Tokens = data.take(rows)
        runs = runs_of(tokens.lengths)
        vectors = pool(self._encoder(tokens, runs), runs, self._modes)
        with forward_errors(self._name):
            for module in self._after:
                vectors = module(vectors)
        return vectors


class PaddedModel(TextModel):
    """The library's modules over tokens, padded and masked only where lengths differ.

    On a CPU groups of texts of equal length cost less than the padding and its mask.
    """

    def __init__(
        self, library: Any, tokenizer: TextTokenizer, device: torch.device, name: str
    ) -> None:
        self.library = library
        self._vocabulary = vocabulary_of(library[0].auto_model)
        self._name = name
        self._tokenizer = tokenizer.hf
        self._device = device

    def __call__(self, data: Any, rows: np.ndarray, side: Side, prompt: str) -> torch.Tensor:
        """Embed texts that stand in `data` as Tokens."""
        tokens: Tokens = data.take(rows)
        check_vocabulary(tokens, self._vocabulary)
        if self._device.type != "cpu":
            return self._batch(tokens)
        counts = [run.count for run in runs_of(tokens.lengths)]
        groups = np.split(np.arange(len(rows)), np.cumsum(counts)[:-1])
        made = [self._batch(tokens.take(group)) for group in groups]
        return require("torch", extra=EXTRA).cat(made)

    def _batch(self, tokens: Tokens) -> torch.Tensor:
        lists = np.split(tokens.ids.astype(np.int64), tokens.offsets[1:-1])
        features = dict(
            self._tokenizer.pad({"input_ids": [ids.tolist() for ids in lists]}, return_tensors="pt")
        )
        # a mask without a zero costs a synchronisation and forbids fast attention
        if len(set(tokens.lengths.tolist())) == 1:
            features.pop("attention_mask", None)
        features = {name: tensor.to(self._device) for name, tensor in features.items()}
        features["modality"] = "text"
        with forward_errors(self._name):
            for module in self.library:
                features = module(features)
            return features["sentence_embedding"]


class LibraryModel(TextModel):
    """The library's own ``encode``, on the right side."""

    def __init__(self, library: Any, name: str) -> None:
        self.library = library
        self._name = name

    def __call__(self, data: Any, rows: np.ndarray, side: Side, prompt: str) -> torch.Tensor:
        """Embed texts that stand in `data` as a list."""
        with forward_errors(self._name):
            return self.library.encode(
                [data[row] for row in rows],
                prompt=prompt,
                batch_size=len(rows),
                convert_to_tensor=True,
                convert_to_numpy=False,
                show_progress_bar=False,
                task="query" if side is Side.QUERY else "document",
            )


def load_text_model(
    model: ModelFolder,
    tokenizer: TextTokenizer | None,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> TextModel:
    """Load a model's weights onto a device, for the fastest way that computes what it says.

    Parameters
    ----------
    model : ModelFolder
        Where it is.
    tokenizer : TextTokenizer or None
        Its tokenizer, if the model takes tokens; None takes the library's way.
    device : torch.device
        Where to.
    dtype : torch.dtype
        Precision of the weights.
    trust_remote_code : bool
        Whether code in the folder may run.

    Raises
    ------
    UntrustedModelError
        If the model needs code of its own and that is not allowed.
    EmbeddingError
        If its files are damaged.
    """
    if not trust_remote_code:
        check_activations(model)
    if tokenizer is not None and model.transformer.get("model_type") in PACKED_TYPES:
        transformers = require("transformers", extra=EXTRA)
        path = str(model.folder / model.modules[0].path)
        options = {"local_files_only": True, "trust_remote_code": False}
        with load_errors(str(model.folder)):
            config = transformers.AutoConfig.from_pretrained(path, **options)
            if can_pack(config):
                weights = load_backbone(path, dtype, name=str(model.folder))
                with alone():
                    return PackedModel(model, weights, device, trust_remote_code)
    library = load_library(model, device, dtype, trust_remote_code)
    if tokenizer is not None:
        return PaddedModel(library, tokenizer, device, str(model.folder))
    return LibraryModel(library, str(model.folder))


def load_library(
    model: ModelFolder, device: torch.device, dtype: torch.dtype, trust_remote_code: bool
) -> Any:
    """Load a ``SentenceTransformer`` onto a device."""
    library = require("sentence_transformers", extra=EXTRA)
    if not trust_remote_code:
        check_activations(model)
    with load_errors(str(model.folder)), alone():
        loaded = library.SentenceTransformer(
            str(model.folder),
            device=str(device),
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            model_kwargs={"dtype": dtype} if model.transformer else None,
        )
    return loaded.eval().requires_grad_(False)


def check_activations(model: ModelFolder) -> None:
    """Refuse activation functions that are not torch's; the library would take another one."""
    for module in model.modules:
        name = module.config.get("activation_function")
        if module.kind == "Dense" and name and not str(name).startswith("torch.nn."):
            raise UntrustedModelError(
                f"The model {str(model.folder)!r} has a layer with the activation function "
                f"{name!r}, which is not torch's and does not run unless you allow it. Look at it "
                "first; then pass trust_remote_code=True."
            )


def load_layer(
    model: ModelFolder,
    module: ModuleFiles,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool,
    level: str = "sentence_embedding",
) -> Callable[[Any], Any]:
    """Return a dense or normalising module of the chain as a function of vectors (n, d).

    `level` is what the library calls those vectors: of texts, or of tokens.
    """
    if module.kind == "Normalize":
        # ours, since importing the library takes longer than loading a small model
        normalize = require("torch", extra=EXTRA).nn.functional.normalize
        return lambda vectors: normalize(vectors.float())  # in bfloat16 it would be off by 1e-3
    library = require("sentence_transformers.sentence_transformer.modules", extra=EXTRA)
    loaded = library.Dense.load(
        str(model.folder),
        subfolder=module.path,
        local_files_only=True,
        trust_remote_code=trust_remote_code,
        init_defaults={"module_input_name": level},
    )
    dense = loaded.to(device=device, dtype=dtype).eval().requires_grad_(False)
    return lambda vectors: dense({level: vectors.to(dtype)})[level]
