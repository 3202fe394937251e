"""What the configuration of a late-interaction checkpoint says, without loading its weights."""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_lance.embeddings.locate import read_json
from gpu_lance.embeddings.model_folder import (
    IN_AND_OUT,
    PLAIN_TEXT,
    PROMPT_NAMES,
    ModelFolder,
    ModuleFiles,
    safetensors_header,
)
from gpu_lance.errors import EmbeddingError, UntrustedModelError
from gpu_lance.optional import require
from gpu_lance.types import Side

EXTRA = "cpu|cuda13|cuda12"
LINEAR = "linear.weight"
TOKEN_LEVEL = "token_embeddings"

# What Stanford's code takes where a checkpoint says nothing.
_QUERY_LENGTH, _DOCUMENT_LENGTH = 32, 220
# Each query is filled up to its length, which not every model limits by its positions.
_LONGEST_QUERY = 65_536
_MARKERS = {Side.QUERY: ("query_token_id", "[unused0]"), Side.SOURCE: ("doc_token_id", "[unused1]")}
_PREFIXES = {Side.QUERY: "query_prefix", Side.SOURCE: "document_prefix"}
_TASKS = {"query": Side.QUERY, "document": Side.SOURCE}
# PyLate's keys at the top of config_sentence_transformers.json.
_PYLATE_KEYS = (
    "query_prefix", "document_prefix", "query_length", "document_length", "do_query_expansion",
    "query_expansion", "attend_to_expansion_tokens", "attend_to_mask_tokens", "skiplist_words",
)  # fmt: skip
_PUNCTUATION = tuple(string.punctuation)


@dataclass(frozen=True)
class Expansion:
    """How queries are filled up to a length.

    Parameters
    ----------
    length : int
        Tokens that a query has at least.
    fixed : bool
        Whether it also has no more than those.
    attend : bool
        Whether the other tokens attend to the ones that were added.
    token : str or None
        The token added; None for the tokenizer's mask.
    """

    length: int
    fixed: bool = True
    attend: bool = False
    token: str | None = None


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint's authors turn texts into vectors.

    Parameters
    ----------
    markers : dict of Side to str
        The token put, as an id, behind the first one; missing where there is none.
    prompts : dict of Side to str
        Text put before each item.
    query_length, document_length : int or None
        The most tokens; None where only the tokenizer limits them.
    expansion : Expansion or None
        How queries are filled up.
    skip : tuple of str
        Tokens without a vector.
    skip_sides : frozenset of Side
        Where they have none.
    keep : tuple of int
        If not empty, the only ids of a document that have a vector.
    steps : tuple of ModuleFiles
        What follows the transformer in its folder: dense and normalising layers.
    ndims : int
        The length of a vector.
    """

    markers: dict[Side, str]
    prompts: dict[Side, str]
    query_length: int | None
    document_length: int | None
    expansion: Expansion | None
    skip: tuple[str, ...]
    skip_sides: frozenset[Side]
    keep: tuple[int, ...]
    steps: tuple[ModuleFiles, ...]
    ndims: int


def read_recipe(model: ModelFolder, name: str) -> Recipe:
    """Read a checkpoint of Stanford's, of sentence-transformers' MultiVectorEncoder or of PyLate.

    Parameters
    ----------
    model : ModelFolder
        Where it is.
    name : str
        What messages call it.

    Raises
    ------
    EmbeddingError
        If it is no late-interaction model, or says something impossible.
    """
    library = read_json(model.folder / "config_sentence_transformers.json", dict) or {}
    if model.has_module_list:
        late = library.get("model_type") in ("MultiVectorEncoder", "ColBERT")
        late = late or any(key in library for key in _PREFIXES.values())
        kinds = {module.kind for module in model.modules}
        if (late or "MultiVectorMask" in kinds) and "Pooling" not in kinds:
            return _of_modules(model, library, name)
    elif (
        "HF_ColBERT" in (model.transformer.get("architectures") or [])
        or (model.folder / "artifact.metadata").is_file()
    ):
        return _of_stanford(model, name)
    elif _shape_of_linear(model.folder):
        raise EmbeddingError(
            f"The model {name!r} has a {LINEAR!r}, but does not say that it is a ColBERT: its "
            "config.json must name the architecture 'HF_ColBERT', or an artifact.metadata lie "
            "beside it."
        )
    raise _no_projection(name)


def linear_weight(folder: Path) -> Any:
    """Return the projection of a checkpoint of Stanford's: a torch.Tensor (d, h) on the CPU."""
    path = _file_of(folder)
    if path is not None and path.suffix == ".safetensors":
        with require("safetensors", extra=EXTRA).safe_open(str(path), framework="pt") as file:
            return file.get_tensor(LINEAR)
    if path is not None:
        torch = require("torch", extra=EXTRA)
        return torch.load(path, map_location="cpu", weights_only=True)[LINEAR]
    raise EmbeddingError(f"The model {str(folder)!r} has no weights; get it again.")


def _no_projection(name: str) -> EmbeddingError:
    return EmbeddingError(
        f"The model {name!r} has no trained projection for late interaction, so 'colbert' cannot "
        "use it. Use a ColBERT checkpoint such as 'colbert-ir/colbertv2.0', or the provider "
        "'huggingface', which makes one vector a text of any encoder."
    )


# -- Stanford's format


def _of_stanford(model: ModelFolder, name: str) -> Recipe:
    path = model.folder / "artifact.metadata"
    told = read_json(path, dict) or {}
    width = _linear_width(model, name)
    dim = _count(told, "dim", path) or width
    if dim != width:
        raise EmbeddingError(
            f"The model's file {path} says that vectors have {dim} numbers, but its weights make "
            f"{width}; the files of two models are mixed up. Get the model again."
        )
    markers = {}
    for side, (key, default) in _MARKERS.items():
        value = told.get(key)
        value = default if value is None else value
        if not isinstance(value, str) or not value.strip():
            raise _wrong(path, key, value, "a token")
        markers[side] = value.strip()
    attend, mask = told.get("attend_to_mask_tokens", False), told.get("mask_punctuation", True)
    for key, value in (("attend_to_mask_tokens", attend), ("mask_punctuation", mask)):
        if not isinstance(value, bool):
            raise _wrong(path, key, value, "true or false")
    return Recipe(
        markers=markers,
        prompts={},
        query_length=None,
        document_length=_count(told, "doc_maxlen", path) or _DOCUMENT_LENGTH,
        expansion=Expansion(_count(told, "query_maxlen", path) or _QUERY_LENGTH, attend=attend),
        skip=_PUNCTUATION if mask else (),
        skip_sides=frozenset({Side.SOURCE}),
        keep=(),
        steps=(ModuleFiles("Linear", "", {}, True),),
        ndims=width,
    )


def _linear_width(model: ModelFolder, name: str) -> int:
    if _file_of(model.folder) is None:
        raise EmbeddingError(f"The model {name!r} has no weights; get it again.")
    shape = _shape_of_linear(model.folder)
    if not shape:
        raise _no_projection(name)
    hidden = model.hidden_size
    if len(shape) != 2 or hidden not in (None, shape[1]):
        raise EmbeddingError(
            f"The projection of the model {name!r} has the shape {list(shape)}; it must be (d, "
            f"{hidden}), since its transformer gives {hidden} numbers. Get the model again."
        )
    return int(shape[0])


def _shape_of_linear(folder: Path) -> list[int] | None:
    """The shape of the projection in a checkpoint of Stanford's; None if there is none."""
    path = _file_of(folder)
    if path is None:
        return None
    if path.suffix == ".safetensors":
        header = safetensors_header(path)
        if not header:
            raise EmbeddingError(f"The model's file {path} is damaged; get the model again.")
        found: list[int] | None = header.get(LINEAR, {}).get("shape")
        return found
    torch = require("torch", extra=EXTRA)
    held = torch.load(path, map_location="meta", weights_only=True)
    weight = held.get(LINEAR) if isinstance(held, dict) else None
    return None if weight is None else list(weight.shape)


def _file_of(folder: Path) -> Path | None:
    """The file of weights that holds the projection, or would."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
        index = read_json(folder / f"{name}.index.json", dict)
        if index is not None:
            parts = index.get("weight_map") or {}
            part = parts.get(LINEAR) or next(iter(parts.values()), None)
            return None if part is None else folder / Path(part).name
    return None


# -- folders of sentence-transformers and PyLate


def _of_modules(model: ModelFolder, library: dict[str, Any], name: str) -> Recipe:
    path = model.folder / "config_sentence_transformers.json"
    first = model.modules[0]
    own = first.config
    old = _of_pylate(library, path)
    prompts, markers = {}, {}
    known = model.prompts
    for side, names in PROMPT_NAMES.items():
        text = next((known[key] for key in names if key in known), "")
        prefix = library.get(_PREFIXES[side]) or ""
        if not isinstance(prefix, str):
            raise _wrong(path, _PREFIXES[side], prefix, "a text")
        if prefix:
            markers[side] = prefix
        prompts[side] = text.removeprefix(prefix)
    expansion = own.get("query_expansion", old.get("query_expansion"))
    mask = next((m.config for m in model.modules if m.kind == "MultiVectorMask"), None)
    if mask is None:
        # PyLate masked by itself, punctuation by default
        words = library.get("skiplist_words")
        mask = {"skiplist_words": _PUNCTUATION if words is None and old else words}
    tasks = mask.get("skiplist_tasks") or ["document"]
    tasks = [tasks] if isinstance(tasks, str) else tasks
    widths = [
        m.config["out_features"]
        for m in model.modules
        if m.kind == "Dense" and isinstance(m.config.get("out_features"), int)
    ]
    ndims = widths[-1] if widths else model.hidden_size
    if not isinstance(ndims, int) or ndims < 1:
        raise EmbeddingError(f"The model {name!r} does not say how long its vectors are.")
    return Recipe(
        markers=markers,
        prompts=prompts,
        query_length=_count({**old, **own}, "query_length", path),
        document_length=_count({**old, **own}, "document_length", path),
        expansion=_expansion(expansion, path),
        skip=tuple(str(word) for word in mask.get("skiplist_words") or ()),
        skip_sides=frozenset(_TASKS[task] for task in tasks if task in _TASKS),
        keep=tuple(int(token) for token in mask.get("keep_only_token_ids") or ()),
        steps=tuple(m for m in model.modules[1:] if m.kind != "MultiVectorMask"),
        ndims=ndims,
    )


def _of_pylate(library: dict[str, Any], path: Path) -> dict[str, Any]:
    """What PyLate wrote beside the modules, in the words of their own configuration."""
    if not any(key in library for key in _PYLATE_KEYS):
        return {}
    found = {
        key: library[key]
        for key in ("query_length", "document_length")
        if library.get(key) is not None
    }
    if "query_expansion" in library:
        return {**found, "query_expansion": library["query_expansion"]}
    if library.get("do_query_expansion") is False:
        return {**found, "query_expansion": None}
    attend = library.get("attend_to_expansion_tokens", library.get("attend_to_mask_tokens"))
    length = _count(found, "query_length", path) or _QUERY_LENGTH
    found.pop("query_length", None)
    expansion = {"strategy": "fixed", "attend": bool(attend), "length": length}
    return {**found, "query_expansion": expansion}


def _expansion(told: Any, path: Path) -> Expansion | None:
    if told is None:
        return None
    if not isinstance(told, dict) or told.get("strategy") not in ("fixed", "min"):
        raise _wrong(path, "query_expansion", told, "null or a strategy, 'fixed' or 'min'")
    length = _count(told, "length", path)
    if length is None or length > _LONGEST_QUERY:
        raise _wrong(path, "query_expansion", told, f"one with a length up to {_LONGEST_QUERY:,}")
    token = told.get("token")
    return Expansion(
        length, told["strategy"] == "fixed", bool(told.get("attend")), token and str(token)
    )


# -- what we can compute


def check_steps(model: ModelFolder, recipe: Recipe, name: str, trust_remote_code: bool) -> None:
    """Raise unless the model is a text encoder with layers after it that we know.

    Raises
    ------
    UntrustedModelError
        If it brings code of its own, and that is not allowed.
    EmbeddingError
        If it is of another kind.
    """
    if "auto_map" in model.transformer and not trust_remote_code:
        raise UntrustedModelError(
            f"The model {name!r} brings code of its own, which does not run unless you allow it. "
            "Read that code first; then pass trust_remote_code=True."
        )
    own = model.modules[0].config if model.has_module_list else {}
    unknown = [
        key
        for key in ("model_kwargs", "model_args", "processing_kwargs", "tokenizer_name_or_path")
        if own.get(key)
    ]
    if own.get("transformer_task", "feature-extraction") != "feature-extraction":
        unknown.append("transformer_task")
    if own.get("modality_config", PLAIN_TEXT) != PLAIN_TEXT:
        unknown.append("modality_config")
    if model.has_added_weights:
        unknown.append("adapters or quantised weights")
    if model.has_module_list and model.modules[0].kind != "Transformer":
        unknown.append(model.modules[0].kind)
    unknown += [step.kind for step in recipe.steps if not _is_known(step)]
    if unknown:
        raise EmbeddingError(
            f"The model {name!r} is late interaction of a kind that 'colbert' cannot run "
            f"({', '.join(unknown)}); it takes a text encoder, dense layers over its tokens, and "
            "normalising."
        )


def _is_known(step: ModuleFiles) -> bool:
    if step.kind in ("Dense", "Normalize"):
        return all(step.config.get(name) in (None, TOKEN_LEVEL) for name in IN_AND_OUT)
    return step.kind == "Linear"


def _count(told: dict[str, Any], key: str, path: Path) -> int | None:
    value = told.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _wrong(path, key, value, "a positive whole number")
    return value


def _wrong(path: Path, key: str, value: Any, wanted: str) -> EmbeddingError:
    return EmbeddingError(
        f"The model's file {path} has {key!r} = {value!r}; it must be {wanted}. Get the model "
        "again."
    )
