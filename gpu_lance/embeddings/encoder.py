"""BERT-like encoders over packed tokens: texts end to end, no padding, no masks.

Texts come sorted by length, so texts of equal length lie side by side and attention runs over
each such run as one batch. The weights are those of the loaded transformers model.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_lance.embeddings.tokens import Tokens
from gpu_lance.errors import EmbeddingError
from gpu_lance.optional import require

if TYPE_CHECKING:
    import torch

EXTRA = "cpu|cuda13|cuda12"

# Models with absolute positions and post-norm layers, by transformers' model_type.
PACKED_TYPES = frozenset({"bert", "roberta", "xlm-roberta", "camembert", "distilbert"})


@dataclass(frozen=True)
class Run:
    """Texts of one length that lie side by side.

    Parameters
    ----------
    start, stop : int
        Their tokens.
    count : int
        Texts.
    length : int
        Tokens of each.
    """

    start: int
    stop: int
    count: int
    length: int


def runs_of(lengths: np.ndarray) -> list[Run]:
    """Group neighbours of equal length.

    Parameters
    ----------
    lengths : numpy.ndarray
        (n,), tokens of each text.

    Examples
    --------
    >>> [(run.start, run.stop, run.count) for run in runs_of(np.array([3, 3, 2]))]
    [(0, 6, 2), (6, 8, 1)]
    """
    edges = np.flatnonzero(np.diff(lengths)) + 1
    starts = np.concatenate(([0], edges))
    counts = np.diff(np.concatenate((starts, [len(lengths)])))
    runs: list[Run] = []
    token = 0
    for first, count in zip(starts.tolist(), counts.tolist(), strict=True):
        length = int(lengths[first])
        runs.append(Run(token, token + count * length, count, length))
        token += count * length
    return runs


@dataclass(frozen=True)
class Layer:
    """Weights of one layer; query, key and value are one matrix."""

    qkv: torch.nn.Linear
    out: torch.nn.Linear
    attention_norm: torch.nn.LayerNorm
    up: torch.nn.Linear
    activation: Callable[[Any], Any]
    down: torch.nn.Linear
    norm: torch.nn.LayerNorm


class PackedEncoder:
    """The forward of a BERT-like model over packed tokens.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Of a type in PACKED_TYPES, in eval mode, on its device. Its query, key and value weights
        become views of one matrix, so that nothing is held twice.
    """

    def __init__(self, model: Any) -> None:
        torch = require("torch", extra=EXTRA)
        config = model.config
        self.heads = int(config.num_attention_heads)
        self.pad_id = -1
        self.first_position = 0
        embeddings = model.embeddings
        if config.model_type in ("roberta", "xlm-roberta", "camembert"):
            self.pad_id = int(embeddings.padding_idx)
            self.first_position = self.pad_id + 1
        self.words = embeddings.word_embeddings.weight
        positions = embeddings.position_embeddings.weight
        if hasattr(embeddings, "token_type_embeddings"):
            # every token of a single text has type 0
            positions = positions + embeddings.token_type_embeddings.weight[0]
        self.positions = positions.detach()
        self.norm = embeddings.LayerNorm
        blocks = model.transformer.layer if hasattr(model, "transformer") else model.encoder.layer
        self.layers = [_layer(block) for block in blocks]
        self.device = self.words.device
        self.dtype = self.words.dtype
        self._varlen = _varlen(self.device, self.dtype, self.words.shape[1] // self.heads)
        self._torch = torch

    def __call__(
        self, tokens: Tokens, runs: list[Run], attended: np.ndarray | None = None
    ) -> torch.Tensor:
        """Return the last hidden state of every token.

        Parameters
        ----------
        tokens : Tokens
            Of n texts, t tokens in all; texts of equal length side by side.
        runs : list of Run
            ``runs_of(tokens.lengths)``.
        attended : numpy.ndarray, optional
            (n,), to how many of its tokens, from the first, each text attends, at least one; None
            for all.

        Returns
        -------
        torch.Tensor
            (t, h), on the model's device, in its dtype.
        """
        torch = self._torch
        check_vocabulary(tokens, self.words.shape[0])
        places = self._positions_of(tokens)
        if int(places.max()) >= len(self.positions):
            raise EmbeddingError(
                f"A text has {int(tokens.lengths.max())} tokens, but the model has positions for "
                f"{len(self.positions) - self.first_position} only."
            )
        ids = self._to_device(tokens.ids)
        positions = self._to_device(places)
        attend = self._attention(tokens, runs, attended)
        functional = torch.nn.functional
        hidden = self.norm(
            functional.embedding(ids, self.words) + functional.embedding(positions, self.positions)
        )
        for layer in self.layers:
            mixed = layer.out(attend(layer.qkv(hidden)))
            hidden = layer.attention_norm(mixed.add_(hidden))
            wide = layer.down(layer.activation(layer.up(hidden)))
            hidden = layer.norm(wide.add_(hidden))
        return hidden

    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        return to_device(values, self.device)

    def _positions_of(self, tokens: Tokens) -> np.ndarray:
        starts = np.repeat(tokens.offsets[:-1], tokens.lengths)
        places = np.arange(len(tokens.ids)) - starts
        padding = tokens.ids == self.pad_id
        if not padding.any():
            return (places + self.first_position).astype(np.int32)
        # a text that spells out the padding token: such models do not count it
        counted = np.cumsum(~padding)
        before = np.concatenate(([0], counted))[starts]
        return np.where(padding, self.pad_id, counted - before + self.pad_id).astype(np.int32)

    def _attention(
        self, tokens: Tokens, runs: list[Run], attended: np.ndarray | None
    ) -> Callable[[Any], Any]:
        """Return what maps (t, 3h) queries, keys and values to (t, h)."""
        torch = self._torch
        heads, attend = self.heads, self._varlen
        if attend is not None:
            edges = key_edges = self._to_device(tokens.offsets.astype(np.int32))
            longest = longest_key = max(run.length for run in runs)
            chosen: Any = slice(None)
            if attended is not None:
                # keys and values of the attended tokens alone, end to end
                places = np.arange(len(tokens.ids)) - np.repeat(tokens.offsets[:-1], tokens.lengths)
                chosen = self._to_device(
                    np.flatnonzero(places < np.repeat(attended, tokens.lengths))
                )
                ends = np.concatenate(([0], np.cumsum(attended)))
                key_edges = self._to_device(ends.astype(np.int32))
                longest_key = int(attended.max())

            def packed(qkv: Any) -> Any:
                query, key, value = qkv.view(qkv.shape[0], 3, heads, -1).unbind(1)
                key, value = key[chosen], value[chosen]
                mixed = attend(query, key, value, edges, key_edges, longest, longest_key)
                return mixed.reshape(qkv.shape[0], -1)

            return packed

        masks = self._masks(runs, attended)

        def by_run(qkv: Any) -> Any:
            mixed = qkv.new_empty((qkv.shape[0], qkv.shape[1] // 3))
            for run, mask in zip(runs, masks, strict=True):
                part = qkv[run.start : run.stop].view(run.count, run.length, 3, heads, -1)
                query, key, value = part.permute(2, 0, 3, 1, 4)  # each (count, heads, length, d)
                state = torch.nn.functional.scaled_dot_product_attention(
                    query, key, value, attn_mask=mask
                )
                target = mixed[run.start : run.stop].view(run.count, run.length, heads, -1)
                target.copy_(state.transpose(1, 2))
            return mixed

        return by_run

    def _masks(self, runs: list[Run], attended: np.ndarray | None) -> list[Any]:
        """For each run which keys its texts attend to, (count, 1, 1, length), or None for all."""
        masks: list[Any] = []
        first = 0
        for run in runs:
            counts = None if attended is None else attended[first : first + run.count]
            first += run.count
            if counts is None or (counts == run.length).all():
                masks.append(None)
            else:
                seen = np.arange(run.length) < counts[:, None]
                masks.append(self._to_device(seen[:, None, None, :]))
        return masks


def check_vocabulary(tokens: Tokens, known: int | None) -> None:
    """Raise EmbeddingError for a token beyond the `known` ones; None knows any.

    On a GPU it would end the whole process's use of it.
    """
    largest = int(tokens.ids.max(initial=-1))
    if known is not None and largest >= known:
        raise EmbeddingError(
            f"The tokenizer gives the token {largest}, but the model knows only {known}; the files "
            "of two models are mixed up."
        )


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy an array to a device; a GPU's copy does not make the caller wait."""
    tensor = require("torch", extra=EXTRA).from_numpy(values)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def can_pack(config: Any) -> bool:
    """Whether :class:`PackedEncoder` computes what a model of that configuration does."""
    return (
        config.model_type in PACKED_TYPES
        and not getattr(config, "is_decoder", False)
        and not getattr(config, "add_cross_attention", False)
        and (getattr(config, "position_embedding_type", None) or "absolute") == "absolute"
    )


def _layer(block: Any) -> Layer:
    if hasattr(block, "sa_layer_norm"):  # DistilBERT
        attention, feed = block.attention, block.ffn
        return Layer(
            _fuse(attention.q_lin, attention.k_lin, attention.v_lin),
            attention.out_lin,
            block.sa_layer_norm,
            feed.lin1,
            feed.activation,
            feed.lin2,
            block.output_layer_norm,
        )
    own = block.attention.self
    return Layer(
        _fuse(own.query, own.key, own.value),
        block.attention.output.dense,
        block.attention.output.LayerNorm,
        block.intermediate.dense,
        block.intermediate.intermediate_act_fn,
        block.output.dense,
        block.output.LayerNorm,
    )


def _fuse(*parts: Any) -> torch.nn.Linear:
    """Put linear layers of one input into one, and make the parts views of it."""
    torch = require("torch", extra=EXTRA)
    weight = torch.cat([part.weight.detach() for part in parts])
    bias = torch.cat([part.bias.detach() for part in parts])
    fused = torch.nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    fused.weight = torch.nn.Parameter(weight, requires_grad=False)
    fused.bias = torch.nn.Parameter(bias, requires_grad=False)
    start = 0
    for part in parts:
        stop = start + part.weight.shape[0]
        part.weight = torch.nn.Parameter(weight[start:stop], requires_grad=False)
        part.bias = torch.nn.Parameter(bias[start:stop], requires_grad=False)
        start = stop
    return fused


def _varlen(device: torch.device, dtype: torch.dtype, width: int) -> Callable[..., Any] | None:
    """Torch's attention over packed sequences, where it runs: half precision on Ampere or newer.

    `width` is that of a head; flash attention takes multiples of 8 up to 256.
    """
    torch = require("torch", extra=EXTRA)
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return None
    if width % 8 or width > 256:
        return None
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    if not torch.backends.cuda.is_flash_attention_available():
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if "num_splits" not in inspect.signature(varlen_attn).parameters:
        return varlen_attn
    # given, it keeps torch from cuDNN, which builds a graph for every new number of tokens: tens of
    # milliseconds a batch
    return functools.partial(varlen_attn, num_splits=1)
