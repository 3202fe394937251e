"""What the configuration files of a sentence-transformers folder say, without any weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gpu_lance.embeddings.locate import read_json
from gpu_lance.errors import EmbeddingError
from gpu_lance.types import Side

_TRANSFORMER_FILES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# What older versions of the library wrote, one flag a mode, in the order of concatenation.
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ROBERTA_KIN = frozenset(
    {
        "camembert",
        "data2vec-text",
        "ibert",
        "longformer",
        "luke",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)
_ABSOLUTE = _ROBERTA_KIN | {"bert", "distilbert", "electra", "albert", "gpt2", "openai-gpt"}
# Models that call the number of their positions so; for T5, whose are relative, it means nothing.
_N_POSITIONS = frozenset({"codegen", "ctrl", "gpt2", "gpt_bigcode", "gptj", "openai-gpt"})
# What models that project their last state call its width.
_PROJECTED = {"embedding_gemma2_text": "embedding_dim", "opt": "word_embed_proj_dim"}
# What a layer calls its input and its output.
IN_AND_OUT = ("module_input_name", "module_output_name")
# No width or length of a model comes near it.
_MOST = 1 << 24
POOLING_MODES = frozenset(_POOLING_FLAGS.values())
# How a model of text alone says that it takes texts.
PLAIN_TEXT = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
# The names under which models keep a prompt for each side, in the library's order.
PROMPT_NAMES = {Side.QUERY: ("query",), Side.SOURCE: ("document", "passage", "corpus")}


@dataclass(frozen=True)
class ModuleFiles:
    """One module of the chain: the name of its class, its folder, and its configuration."""

    kind: str
    path: str
    config: dict[str, Any]
    ours: bool


@dataclass(frozen=True)
class ModelFolder:
    """A folder that holds a model; every property reads configuration only.

    Parameters
    ----------
    folder : pathlib.Path
        With ``modules.json``, or with a plain transformers model.
    plain : bool
        Whether it is taken for a plain transformers model in any case.

    Notes
    -----
    Files are read once for each object.
    """

    folder: Path
    plain: bool = False

    @cached_property
    def modules(self) -> list[ModuleFiles]:
        """The chain of modules; a plain transformers model gets the library's mean pooling."""
        listed = self._listed
        if listed is None:
            causal = str((self.transformer.get("architectures") or [""])[0]).endswith("ForCausalLM")
            mode = "lasttoken" if causal and self.transformer.get("is_causal", True) else "mean"
            return [
                ModuleFiles("Transformer", "", {}, True),
                ModuleFiles("Pooling", "", {"pooling_mode": mode}, True),
            ]
        return [self._module(entry) for entry in listed]

    @cached_property
    def has_module_list(self) -> bool:
        """Whether the folder lists its modules, or is a plain transformers model."""
        return not self.plain and (self.folder / "modules.json").is_file()

    @cached_property
    def transformer(self) -> dict[str, Any]:
        """The transformers configuration of the first module, or an empty dict."""
        path = self._listed[0].get("path", "") if self._listed else ""
        return read_json(self.folder / path / "config.json", dict) or {}

    @cached_property
    def hidden_size(self) -> int | None:
        """The length of the transformer's states, if its configuration says so."""
        return _hidden_size(self.transformer)

    @cached_property
    def positions(self) -> int | None:
        """The most tokens for which the transformer has positions, if that is limited."""
        name = "max_position_embeddings"
        if self.transformer.get("model_type") in _N_POSITIONS:
            name = "n_positions"
        count = self.transformer.get(name, -1)
        if not isinstance(count, int) or count <= 0:
            return None
        return count - self.first_position

    @cached_property
    def has_absolute_positions(self) -> bool:
        """Whether a text of more tokens than positions cannot be embedded at all."""
        return self.transformer.get("model_type") in _ABSOLUTE

    @cached_property
    def first_position(self) -> int:
        """The position of the first token: RoBERTa and its kin count from behind the padding id."""
        if self.transformer.get("model_type") not in _ROBERTA_KIN:
            return 0
        return int(self.transformer.get("pad_token_id", 1)) + 1

    @cached_property
    def prompts(self) -> dict[str, str]:
        """The prompts that the model was saved with, by name."""
        stored = self._library.get("prompts") or {}
        return {str(name): text for name, text in stored.items() if isinstance(text, str)}

    @cached_property
    def pooling(self) -> tuple[str, ...]:
        """The pooling modes; empty without a pooling module."""
        for module in self.modules:
            if module.kind == "Pooling":
                return _pooling_modes(module.config)
        return ()

    @cached_property
    def max_seq_length(self) -> int | None:
        """The most tokens of a text that the model's authors allow, if they say so."""
        first = self.modules[0].config if self.modules else {}
        value = first.get("max_seq_length")
        return int(value) if value is not None else None

    @cached_property
    def tokenizer_limit(self) -> int | None:
        """The most tokens of a text that the tokenizer's configuration allows, if it says so."""
        config = read_json(self.folder / "tokenizer_config.json", dict) or {}
        value = config.get("model_max_length", config.get("max_len"))
        if isinstance(value, int | float) and 0 < value < 1 << 31:
            return int(value)
        return None

    @cached_property
    def is_packable(self) -> bool:
        """Whether the chain is a text transformer, pooling, then dense layers and normalising."""
        modules = self.modules
        if [module.kind for module in modules[:2]] != ["Transformer", "Pooling"]:
            return False
        if not all(module.ours and _is_plain(module) for module in modules):
            return False
        if self.has_added_weights:
            return False
        if not self.has_module_list and (self.folder / "chat_template.jinja").is_file():
            return False
        return "auto_map" not in self.transformer  # custom code is the library's business

    @cached_property
    def has_added_weights(self) -> bool:
        """Whether its layers are more than their weights: with an adapter, or quantised."""
        adapter = (self.folder / "adapter_config.json").is_file()
        return adapter or "quantization_config" in self.transformer

    def ndims(self) -> int | None:
        """The length of a vector; None where only the loaded model knows it."""
        for module in reversed(self.modules):
            size = self._width(module)
            if size is not None:
                return size
        return None

    def check(self) -> None:
        """Read all that the properties give, so that none of them fails later.

        Raises
        ------
        EmbeddingError
            If a width or a length is no number that a model can have.
        Exception
            Of any kind, if a value is of a kind that makes no sense.
        """
        told = {
            "vectors of length": self.ndims(),
            "states of length": self.hidden_size,
            "positions up to": self.positions,
            "texts of tokens up to": self.max_seq_length,
        }
        for what, count in told.items():
            if count is not None and not 0 < count <= _MOST:
                raise EmbeddingError(
                    f"The configuration of the model in {self.folder} says {what} {count}, which "
                    "is impossible; get the model again."
                )
        _ = self.prompts, self.pooling, self.tokenizer_limit, self.is_packable

    def stamp(self) -> list[tuple[str, int, int]]:
        """Name, size and time of every file: a model saved anew to its folder is another one."""
        return sorted(
            (file.relative_to(self.folder).as_posix(), stat.st_size, stat.st_mtime_ns)
            for file in self.folder.rglob("*")
            if file.is_file()
            for stat in [file.stat()]
        )

    # -- helpers

    @cached_property
    def _library(self) -> dict[str, Any]:
        return read_json(self.folder / "config_sentence_transformers.json", dict) or {}

    @cached_property
    def _listed(self) -> list[dict[str, Any]] | None:
        """What ``modules.json`` holds, or None without one."""
        if self.plain:
            return None
        path = self.folder / "modules.json"
        listed = read_json(path, list)
        if listed is not None and not (listed and all(isinstance(m, dict) for m in listed)):
            raise EmbeddingError(
                f"The model's file {path} must list the model's modules; get the model again."
            )
        return listed

    def _module(self, entry: dict[str, Any]) -> ModuleFiles:
        target, path = str(entry.get("type", "")), str(entry.get("path", ""))
        kind = target.rpartition(".")[2]
        config: dict[str, Any] | None = None
        if kind == "Transformer":
            names: tuple[str, ...] = _TRANSFORMER_FILES
        elif kind == "WordEmbeddings":
            names = ("wordembedding_config.json", "config.json")
        elif kind in ("CNN", "LSTM"):
            names = (f"{kind.lower()}_config.json", "config.json")
        else:
            names = ("config.json",)
        for name in names:
            config = read_json(self.folder / path / name, dict)
            if config:
                break
        ours = target.startswith("sentence_transformers.")
        return ModuleFiles(kind, path, config or {}, ours)

    def _width(self, module: ModuleFiles) -> int | None:
        config = module.config
        if module.kind == "Pooling":
            width = config.get("embedding_dimension", config.get("word_embedding_dimension"))
            if width is None:
                width = _hidden_size(self.transformer)
            return None if width is None else int(width) * len(_pooling_modes(config))
        if module.kind == "Dense":
            return int(config["out_features"])
        if module.kind == "Transformer":
            return _hidden_size(self.transformer)
        if module.kind == "CLIPModel":
            width = self.transformer.get("projection_dim")
            return None if width is None else int(width)
        if module.kind == "StaticEmbedding":
            return _static_width(self.folder / module.path)
        if module.kind == "LSTM" and "hidden_dim" in config:
            return int(config["hidden_dim"]) * (2 if config.get("bidirectional", True) else 1)
        return None


def _pooling_modes(config: dict[str, Any]) -> tuple[str, ...]:
    mode = config.get("pooling_mode")
    if isinstance(mode, str):
        return (mode,)
    if mode:
        return tuple(str(name) for name in mode)
    return tuple(name for flag, name in _POOLING_FLAGS.items() if config.get(flag)) or ("mean",)


def _is_plain(module: ModuleFiles) -> bool:
    """Whether we know what a module of a packable chain does with its configuration."""
    config = module.config
    if module.kind == "Transformer":
        options = ("model", "processor", "tokenizer", "config")
        given = [config.get(f"{name}_{form}") for name in options for form in ("kwargs", "args")]
        own = ("query_length", "document_length", "query_expansion", "processing_kwargs")
        return (
            not any(given)
            and not any(config.get(name) for name in own)
            and config.get("transformer_task", "feature-extraction") == "feature-extraction"
            and config.get("modality_config", PLAIN_TEXT) == PLAIN_TEXT
            and config.get("module_output_name", "token_embeddings") == "token_embeddings"
            and not config.get("tokenizer_name_or_path")
        )
    if module.kind == "Pooling":
        return (
            bool(config.get("include_prompt", True))
            and set(_pooling_modes(config)) <= POOLING_MODES
        )
    if module.kind in ("Dense", "Normalize"):
        return all(config.get(name) in (None, "sentence_embedding") for name in IN_AND_OUT)
    return False


def _hidden_size(config: dict[str, Any]) -> int | None:
    projected = _PROJECTED.get(str(config.get("model_type")), "")
    for name in (projected, "hidden_size", "dim", "d_model", "n_embd", "emb_dim"):
        if isinstance(config.get(name), int):
            return int(config[name])
    inner = config.get("text_config")
    return _hidden_size(inner) if isinstance(inner, dict) else None


def _static_width(folder: Path) -> int | None:
    """The width of an embedding table, from the header of its file."""
    header = safetensors_header(folder / "model.safetensors")
    for name in ("embedding.weight", "embeddings"):
        if name in header:
            return int(header[name]["shape"][-1])
    return None


def safetensors_header(path: Path) -> dict[str, Any]:
    """Return names, types and shapes of the tensors in a safetensors file; {} without the file.

    Examples
    --------
    >>> safetensors_header(Path("no-such-file.safetensors"))
    {}
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > 100_000_000:  # the format's own limit
                return {}
            header = json.loads(file.read(size))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return header if isinstance(header, dict) else {}
