"""Late-interaction models: one vector for every token that counts, made on the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_lance.embeddings.backbone import alone, forward_errors, load_backbone, load_errors
from gpu_lance.embeddings.encoder import PackedEncoder, can_pack, runs_of, to_device
from gpu_lance.embeddings.late_recipe import TOKEN_LEVEL, Recipe, linear_weight
from gpu_lance.embeddings.late_tokens import LateTokens
from gpu_lance.embeddings.model_folder import ModelFolder, ModuleFiles
from gpu_lance.embeddings.plain_models import OwnForward, is_own
from gpu_lance.embeddings.text_models import check_activations, load_layer
from gpu_lance.optional import require

if TYPE_CHECKING:
    import torch

EXTRA = "cpu|cuda13|cuda12"

Steps = list[Callable[[Any], Any]]


class LateInteraction(ABC):
    """A transformer and what follows it, over the tokens of texts.

    Parameters
    ----------
    name : str
        What messages call it.
    steps : list of callable
        Each takes and gives (t, d).
    """

    device: torch.device

    def __init__(self, name: str, steps: Steps) -> None:
        self._name = name
        self._steps = steps

    def __call__(self, data: LateTokens, rows: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        """Embed some texts.

        Parameters
        ----------
        data : LateTokens
            Texts; those of equal length must lie side by side in `rows`.
        rows : numpy.ndarray
            (b,), int64, which.

        Returns
        -------
        torch.Tensor
            (t, d), the vectors of their tokens that count, end to end, on the device.
        numpy.ndarray
            (b,), int64, how many each text has.
        """
        part = data.take(rows)
        vectors = self.states(part)
        if not part.scored.all():
            # before the projection, which need not see what does not count
            vectors = vectors[to_device(np.flatnonzero(part.scored), self.device)]
        with forward_errors(self._name):
            for step in self._steps:
                vectors = step(vectors)
        return vectors, part.counts

    @abstractmethod
    def states(self, part: LateTokens) -> torch.Tensor:
        """Return the last hidden state of every token, (t, h)."""


class PackedLateInteraction(LateInteraction):
    """A BERT-like transformer over packed tokens: no padding."""

    def __init__(self, weights: Any, name: str, steps: Steps) -> None:
        super().__init__(name, steps)
        self._encoder = PackedEncoder(weights)
        self.device = self._encoder.device

    def states(self, part: LateTokens) -> torch.Tensor:
        """Return the last hidden state of every token, (t, h)."""
        return self._encoder(part.tokens, runs_of(part.tokens.lengths), part.attended)


class OwnLateInteraction(LateInteraction):
    """Any other transformer, through its own forward."""

    def __init__(self, weights: Any, device: torch.device, name: str, steps: Steps) -> None:
        super().__init__(name, steps)
        self._forward = OwnForward(weights, device, name)
        self.device = device

    def states(self, part: LateTokens) -> torch.Tensor:
        """Return the last hidden state of every token, (t, h)."""
        return self._forward.states(part.tokens, part.attended)


def load_late_interaction(
    model: ModelFolder,
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> LateInteraction:
    """Load a model's weights onto a device.

    Parameters
    ----------
    model : ModelFolder
        Where it is.
    recipe : Recipe
        What it says.
    device : torch.device
        Where to.
    dtype : torch.dtype
        Precision of the weights.
    trust_remote_code : bool
        Whether code in the folder may run.

    Raises
    ------
    UntrustedModelError
        If a file holds more than tensors.
    EmbeddingError
        If a weight is missing or damaged: none is ever left at a random value.
    """
    if not trust_remote_code:
        check_activations(model)
    name = str(model.folder)
    path = model.folder / (model.modules[0].path if model.has_module_list else "")
    weights = load_backbone(str(path), dtype, name=name, trust_remote_code=trust_remote_code)
    with load_errors(name), alone():
        steps = [_step(model, step, device, dtype, trust_remote_code) for step in recipe.steps]
        weights.to(device)
        if can_pack(weights.config) and is_own(weights):
            return PackedLateInteraction(weights, name, steps)
        return OwnLateInteraction(weights, device, name, steps)


def _step(
    model: ModelFolder,
    step: ModuleFiles,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> Callable[[Any], Any]:
    if step.kind != "Linear":
        return load_layer(model, step, device, dtype, trust_remote_code, TOKEN_LEVEL)
    linear = require("torch", extra=EXTRA).nn.functional.linear
    weight = linear_weight(model.folder).to(device=device, dtype=dtype)
    return lambda vectors: linear(vectors.to(dtype), weight)
