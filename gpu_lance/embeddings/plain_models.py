"""Run a transformers model over tokens and pool its last hidden state, by its fastest way.

BERT-like encoders run over packed tokens. Others run through their own forward: on a GPU a batch
at once, padded, where padding is known to change nothing; else in groups of texts of equal length,
which on a CPU also cost less than the padding and its mask.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_lance.embeddings.backbone import alone, load_backbone, load_errors
from gpu_lance.embeddings.encoder import PackedEncoder, can_pack, runs_of, to_device
from gpu_lance.embeddings.model_folder import ModelFolder
from gpu_lance.embeddings.pooling import pool, pool_padded
from gpu_lance.embeddings.tokens import Tokens
from gpu_lance.errors import EmbeddingError
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

# What a forward raises if texts alone are not what the model takes.
_NOT_FOR_TEXT = (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError)


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
    pads : bool
        Whether texts of several lengths run at once, padded, or in groups of equal length.
    """

    def __init__(self, weights: Any, device: torch.device, name: str, pads: bool) -> None:
        config = weights.config
        if hasattr(config, "use_cache"):
            config.use_cache = False  # keys and values are for generating text
        arguments = inspect.signature(weights.forward).parameters
        self._takes = None if "kwargs" in arguments else set(arguments)
        self._pads = pads
        self._pad_id = int(getattr(config, "pad_token_id", None) or 0)
        self._vocabulary = _vocabulary(weights)
        self._weights = weights
        self._device = device
        self._name = name

    def __call__(self, tokens: Tokens, pooling: str) -> torch.Tensor:
        """Embed texts, those of equal length side by side: (n, h), float32."""
        torch = require("torch", extra=EXTRA)
        largest = int(tokens.ids.max())
        if self._vocabulary is not None and largest >= self._vocabulary:
            # on a GPU it would end the whole process's use of it
            raise EmbeddingError(
                f"The tokenizer gives the token {largest}, but the model knows only "
                f"{self._vocabulary}; the files of two models are mixed up."
            )
        lengths = tokens.lengths
        if self._pads:
            return self._batch(tokens.ids, tokens.more, lengths, pooling)
        made = []
        for run in runs_of(lengths):
            part = slice(run.start, run.stop)
            more = {name: values[part] for name, values in tokens.more.items()}
            made.append(
                self._batch(tokens.ids[part], more, np.full(run.count, run.length), pooling)
            )
        return torch.cat(made)

    def _batch(
        self, ids: np.ndarray, more: dict[str, np.ndarray], lengths: np.ndarray, pooling: str
    ) -> torch.Tensor:
        """One forward over texts that stand end to end, and its pooled states."""
        # a mask without a zero costs a synchronisation and forbids fast attention
        equal = bool((lengths == lengths[0]).all())
        real = np.arange(lengths.max()) < lengths[:, None]  # (n, longest)
        inputs = {"input_ids": self._matrix(ids, real, self._pad_id)}
        for name, values in more.items():
            if self._takes is None or name in self._takes:
                inputs[name] = self._matrix(values, real, 0)
        if not equal:
            inputs["attention_mask"] = to_device(real.astype(np.int64), self._device)
        try:
            states = self._weights(**inputs).last_hidden_state
        except _NOT_FOR_TEXT as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            raise EmbeddingError(
                f"The model {self._name!r} cannot embed a text by itself "
                f"({type(error).__name__}: {reason}). Use a text model that transformers' "
                "AutoModel runs."
            ) from error
        return pool_padded(states, None if equal else lengths, pooling)

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
        if _is_own(weights) and not model.has_added_weights and can_pack(weights.config):
            return PackedTransformer(weights)
        pads = weights.config.model_type in PADDED_TYPES and _is_own(weights)
        return OwnForward(weights, device, name, pads=pads and device.type != "cpu")


def _is_own(weights: Any) -> bool:
    """Whether the model's code is transformers', and not the folder's."""
    return type(weights).__module__.startswith("transformers.")


def _vocabulary(weights: Any) -> int | None:
    try:
        return int(weights.get_input_embeddings().num_embeddings)
    except (AttributeError, NotImplementedError):
        return None
