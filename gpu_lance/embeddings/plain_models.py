"""Run a transformers model over tokens and pool its last hidden state, by its fastest way.

BERT-like encoders run over packed tokens. Others run through their own forward: on a GPU a batch
at once, padded, where padding is known to change nothing; else in groups of texts of equal length,
which on a CPU also cost less than the padding and its mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_lance.embeddings.backbone import alone, forward_errors, load_backbone, load_errors
from gpu_lance.embeddings.encoder import (
    PackedEncoder,
    can_pack,
    check_vocabulary,
    runs_of,
    to_device,
)
from gpu_lance.embeddings.model_folder import ModelFolder
from gpu_lance.embeddings.pooling import pool, pool_padded
from gpu_lance.embeddings.tokens import Tokens
from gpu_lance.optional import require

if TYPE_CHECKING:
    import torch

EXTRA = "cpu|cuda13|cuda12"

# Models, by transformers' model_type, of which a padded text has the states of a text by itself.
# Others see their padding: they mix it in, or cut the padded text into pieces of another length.
PADDED_TYPES = frozenset(
    (
        "albert bart bert bert-generation camembert data2vec-text deberta deberta-v2 distilbert "
        "electra ernie esm eurobert gemma gemma2 gemma3_text gpt2 gpt_neo gpt_neox granite "
        "jina_embeddings_v3 llama m2m_100 marian mbart megatron-bert ministral mistral modernbert "
        "mpnet mt5 nomic_bert olmo opt phi phi3 plbart qwen2 qwen3 rembert roberta "
        "roberta-prelayernorm roformer smollm3 starcoder2 t5 umt5 xlm-roberta xlm-roberta-xl xlnet"
    ).split()
)


class PackedTransformer:
    """A BERT-like encoder over packed tokens."""

    def __init__(self, weights: Any) -> None:
        self._encoder = PackedEncoder(weights)

    def __call__(self, tokens: Tokens, pooling: str) -> torch.Tensor:
        """Embed texts, those of equal length side by side: (n, h), float32."""
        runs = runs_of(tokens.lengths)
        return pool(self._encoder(tokens, runs), runs, (pooling,))


class OwnForward:
    """Any other model, through its own forward.

    Parameters
    ----------
    weights : transformers.PreTrainedModel
        On its device.
    device : torch.device
        Which that is.
    name : str
        What messages call it.
    pads : bool, optional
        Whether texts of several lengths run at once, padded, or in groups of equal length. None
        pads models of PADDED_TYPES, but on a CPU, where groups cost less.
    """

    def __init__(
        self, weights: Any, device: torch.device, name: str, pads: bool | None = None
    ) -> None:
        config = weights.config
        if hasattr(config, "use_cache"):
            config.use_cache = False  # keys and values are for generating text
        arguments = inspect.signature(weights.forward).parameters
        self._takes = None if "kwargs" in arguments else set(arguments)
        if pads is None:
            pads = device.type != "cpu" and config.model_type in PADDED_TYPES and is_own(weights)
        self._pads = pads
        self._pad_id = int(getattr(config, "pad_token_id", None) or 0)
        self._vocabulary = vocabulary_of(weights)
        self._weights = weights
        self._device = device
        self._name = name

    def __call__(self, tokens: Tokens, pooling: str) -> torch.Tensor:
        """Embed texts, those of equal length side by side: (n, h), float32."""
        made = []
        for part, _ in self._parts(tokens):
            lengths = part.lengths
            equal = bool((lengths == lengths[0]).all())
            made.append(pool_padded(self._forward(part), None if equal else lengths, pooling))
        return require("torch", extra=EXTRA).cat(made)

    def states(self, tokens: Tokens, attended: np.ndarray | None = None) -> torch.Tensor:
        """Return the last hidden state of every token; see :class:`PackedEncoder`."""
        made = []
        for part, rows in self._parts(tokens):
            states = self._forward(part, None if attended is None else attended[rows])
            real = np.flatnonzero(_before(part.lengths, part.lengths))
            flat = states.reshape(-1, states.shape[-1])
            made.append(flat if len(real) == len(flat) else flat[to_device(real, self._device)])
        return require("torch", extra=EXTRA).cat(made)

    def _parts(self, tokens: Tokens) -> Iterator[tuple[Tokens, slice]]:
        """What may run at once: texts, and which they are."""
        check_vocabulary(tokens, self._vocabulary)
        if self._pads:
            yield tokens, slice(None)
            return
        first = 0
        for run in runs_of(tokens.lengths):
            rows = slice(first, first + run.count)
            first += run.count
            yield tokens.take(np.arange(rows.start, rows.stop)), rows

    def _forward(self, tokens: Tokens, attended: np.ndarray | None = None) -> torch.Tensor:
        """The states of texts, padded on the right: (n, longest, h)."""
        real = _before(tokens.lengths, tokens.lengths)
        inputs = {"input_ids": self._matrix(tokens.ids, real, self._pad_id)}
        for name, values in tokens.more.items():
            if self._takes is None or name in self._takes:
                inputs[name] = self._matrix(values, real, 0)
        seen = real if attended is None else _before(attended, tokens.lengths)
        # a mask without a zero costs a synchronisation and forbids fast attention
        if not seen.all():
            inputs["attention_mask"] = to_device(seen.astype(np.int64), self._device)
        with forward_errors(self._name):
            return self._weights(**inputs).last_hidden_state

    def _matrix(self, values: np.ndarray, real: np.ndarray, fill: int) -> torch.Tensor:
        """Values that stand end to end as rows, padded on the right: (n, longest), int64."""
        rows = np.full(real.shape, fill, dtype=np.int64)
        rows[real] = values
        return to_device(rows, self._device)


def load_plain_model(
    model: ModelFolder,
    device: torch.device,
    dtype: torch.dtype,
    name: str,
    trust_remote_code: bool,
) -> PackedTransformer | OwnForward:
    """Load a transformers model onto a device, for the fastest way that computes what it says.

    Parameters
    ----------
    model : ModelFolder
        Where it is, as a plain transformers model.
    device : torch.device
        Where to.
    dtype : torch.dtype
        Precision of the weights.
    name : str
        What messages call it.
    trust_remote_code : bool
        Whether code in the folder may run.

    Raises
    ------
    UntrustedModelError, EmbeddingError
        See :func:`load_backbone`.
    """
    weights = load_backbone(
        str(model.folder), dtype, name=name, trust_remote_code=trust_remote_code
    )
    with load_errors(name), alone():
        weights.to(device)
        if is_own(weights) and not model.has_added_weights and can_pack(weights.config):
            return PackedTransformer(weights)
        return OwnForward(weights, device, name)


def is_own(weights: Any) -> bool:
    """Whether the model's code is transformers', and not the folder's."""
    return type(weights).__module__.startswith("transformers.")


def _before(counts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(n, longest), bool: the first so many places of each row."""
    return np.arange(lengths.max()) < counts[:, None]


def vocabulary_of(weights: Any) -> int | None:
    """How many tokens a model has embeddings for; None if it does not say."""
    try:
        return int(weights.get_input_embeddings().num_embeddings)
    except (AttributeError, NotImplementedError):
        return None
