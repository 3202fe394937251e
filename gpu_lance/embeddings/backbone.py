"""Load the transformers model of a folder: one at a time, whole, and with clear errors."""

from __future__ import annotations

import pickle
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gpu_lance.device import is_out_of_memory
from gpu_lance.embeddings.locate import first_line
from gpu_lance.errors import (
    EmbeddingError,
    GpuLanceError,
    OutOfDeviceMemoryError,
    UntrustedModelError,
)
from gpu_lance.optional import require

if TYPE_CHECKING:
    import torch

EXTRA = "cpu|cuda13|cuda12"

# While transformers makes a model, torch's default dtype is that model's, in all threads; two loads
# at once could leave the wrong one behind.
_loading = threading.Lock()

# Weights behind the last hidden state, of which no vector is made.
_BEHIND = re.compile(r"(^|\.)pooler\.")

# Models of two parts that make the decoder's tokens from the text themselves; their last hidden
# state is the decoder's. The others need a text to decode, so their encoder embeds.
_DECODE_THE_TEXT = frozenset({"bart", "bigbird_pegasus", "fsmt", "mbart", "mvp", "plbart"})

# What a forward raises if texts alone are not what the model takes.
_NOT_FOR_TEXT = (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError)


def load_backbone(
    folder: str, dtype: torch.dtype, *, name: str, trust_remote_code: bool = False
) -> Any:
    """Load what ``AutoModel`` makes of a folder, on the CPU, with every weight from its files.

    Parameters
    ----------
    folder : str
        With ``config.json`` and the weights.
    dtype : torch.dtype
        Precision of the weights.
    name : str
        What messages call the model.
    trust_remote_code : bool
        Whether code in the folder may run.

    Returns
    -------
    transformers.PreTrainedModel
        In eval mode, without gradients; of a model of two parts that needs a text to decode, its
        encoder.

    Raises
    ------
    UntrustedModelError
        If the model needs code of its own and that is not allowed.
    EmbeddingError
        If its files are damaged, or lack weights, which transformers would make up at random.
    """
    transformers = require("transformers", extra=EXTRA)
    with load_errors(name), alone():
        whole, found = transformers.AutoModel.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
        model, prefix = _embedding_part(whole)
    behind = [key for key in found["missing_keys"] if key.startswith(prefix)]
    missing = sorted(key for key in behind if not _BEHIND.search(key))
    if missing:
        raise EmbeddingError(
            f"The model {name!r} cannot be loaded: its files lack {len(missing)} weights of a "
            f"{type(model).__name__}, such as {missing[0]!r}, and transformers would make them up. "
            "Get the model again, or one whose config.json names the architecture of its weights."
        )
    return model.eval().requires_grad_(False)


def _embedding_part(whole: Any) -> tuple[Any, str]:
    """The part of a model that embeds texts, and how the names of its weights begin."""
    # by its parts, since the configuration of an encoder saved by itself denies the decoder
    both = all(hasattr(whole, part) for part in ("encoder", "decoder"))
    if not both or whole.config.model_type in _DECODE_THE_TEXT:
        return whole, ""
    encoder = whole.get_encoder()
    name = next((name for name, module in whole.named_modules() if module is encoder), "")
    return encoder, f"{name}." if name else ""


@contextmanager
def load_errors(name: str) -> Iterator[None]:
    """Say which model it is that cannot be loaded, and why."""
    try:
        yield
    except GpuLanceError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfDeviceMemoryError(
                f"The model {name!r} does not fit into the device's memory. Free memory there, or "
                "use dtype='bfloat16' or a smaller model."
            ) from error
        if _is_unsafe_pickle(error):
            raise UntrustedModelError(
                f"The model {name!r} keeps its weights in a pickle that holds more than tensors, "
                "or that is damaged; it is not read. Get a copy in the safetensors format."
            ) from error
        if isinstance(error, ValueError) and "trust_remote_code" in str(error):
            raise UntrustedModelError(
                f"The model {name!r} brings code of its own, which does not run unless you allow "
                "it. Read that code first; then pass trust_remote_code=True."
            ) from error
        raise EmbeddingError(
            f"The model {name!r} cannot be loaded ({first_line(error)}). If its files are damaged, "
            "get it again."
        ) from error


@contextmanager
def forward_errors(name: str) -> Iterator[None]:
    """Say which model it is that cannot embed texts, and why; lack of memory is left as it is."""
    try:
        yield
    except GpuLanceError:
        raise
    except _NOT_FOR_TEXT as error:
        raise EmbeddingError(
            f"The model {name!r} cannot embed a text by itself ({first_line(error)}). Use a text "
            "model that transformers' AutoModel runs."
        ) from error


def _is_unsafe_pickle(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, pickle.UnpicklingError):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def alone() -> Iterator[None]:
    """Load a model while no other one is loaded, without transformers' bar and report."""
    torch = require("torch", extra=EXTRA)
    # the first batch loads the model, and weights made under inference_mode could not be trained
    with _loading, torch.inference_mode(False), _quiet():
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    logging = require("transformers.utils.logging", extra=EXTRA)
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    # its report of weights that are missing or left over is a warning; the former are an error here
    logging.set_verbosity(max(level, logging.ERROR))
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
