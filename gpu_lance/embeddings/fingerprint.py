"""What made the vectors of a column, so that vectors of two models never mix unseen.

A table keeps it as schema metadata of its own, beside LanceDB's. The device, the batch size and the
precision of a session are no part of it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from gpu_lance.embeddings.base import EmbeddingFunction
from gpu_lance.embeddings.locate import Located, read_json
from gpu_lance.embeddings.model_folder import ModelFolder, ModuleFiles, safetensors_header
from gpu_lance.embeddings.staged import StagedFunction
from gpu_lance.errors import FingerprintError

logger = logging.getLogger(__name__)

METADATA_KEY = b"gpu_lance.fingerprints"

SAMPLES = 64
SAMPLE_SIZE = 64 * 1024

_TOKENIZER_FILES = (
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
)
# Folders of copies of the weights for other runtimes.
_OTHER_RUNTIMES = frozenset({"onnx", "openvino", "coreml"})


def of(function: EmbeddingFunction) -> dict[str, str] | None:
    """Return the fingerprint of a function; None where it has none, as with a user's class.

    It reads configuration and samples of the weights' files; nothing is loaded onto a device.
    """
    return function.fingerprint() if isinstance(function, StagedFunction) else None


def read(metadata: Mapping[Any, Any] | None) -> dict[str, dict[str, str]]:
    """Return the fingerprints in a table's schema metadata, by vector column.

    Metadata of another form is ignored, with a warning: the table must still open.

    Examples
    --------
    >>> read(to_metadata({"vector": {"model": "m"}}))
    {'vector': {'model': 'm'}}
    """
    metadata = metadata or {}
    stored = metadata.get(METADATA_KEY, metadata.get(METADATA_KEY.decode()))
    if stored is None:
        return {}
    try:
        found = json.loads(stored)
        return {
            str(column): {str(key): str(value) for key, value in parts.items()}
            for column, parts in found.items()
        }
    except (ValueError, TypeError, AttributeError, RecursionError):
        logger.warning("The table's metadata %s is not readable and ignored.", METADATA_KEY)
        return {}


def to_metadata(fingerprints: Mapping[str, Mapping[str, str]]) -> dict[bytes, bytes]:
    """Return the schema metadata that holds fingerprints; empty if there are none."""
    if not fingerprints:
        return {}
    plain = {column: dict(parts) for column, parts in fingerprints.items()}
    return {METADATA_KEY: json.dumps(plain, sort_keys=True).encode("utf-8")}


def check(column: str, stored: Mapping[str, str] | None, actual: Mapping[str, str] | None) -> None:
    """Raise FingerprintError if the vectors of a column were made by something else.

    Where both sides know the hash of their weights, names and revisions do not matter: a folder
    may be moved. A part that only one side has is not compared, nor is anything if a side is None.

    Examples
    --------
    >>> check("vector", {"model": "a", "dims": "3"}, {"model": "b", "dims": "3"})
    Traceback (most recent call last):
    gpu_lance.errors.FingerprintError: Column 'vector' holds vectors of 'a', but the embedding \
function in use is 'b'; they differ in model: 'a' and 'b'. Use the first one, or embed the column \
again.
    """
    if not stored or not actual:
        return
    keys = stored.keys() & actual.keys()
    if stored.get("weights") and actual.get("weights"):
        keys -= {"model", "revision"}
    different = sorted(key for key in keys if _plain(key, stored) != _plain(key, actual))
    if not different:
        return
    details = ", ".join(f"{key}: {stored[key]!r} and {actual[key]!r}" for key in different)
    raise FingerprintError(
        f"Column {column!r} holds vectors of {stored.get('model')!r}, but the embedding function "
        f"in use is {actual.get('model')!r}; they differ in {details}. Use the first one, or embed "
        "the column again."
    )


def of_text_model(
    provider: str,
    located: Located,
    model: ModelFolder,
    *,
    dims: int,
    normalize: bool,
    **more: str,
) -> dict[str, str]:
    """Return the fingerprint of a model that runs here.

    Parameters
    ----------
    provider : str
        The registered name of what runs it.
    located : Located
        Where it was found.
    model : ModelFolder
        Its configuration.
    dims : int
        The length of a vector.
    normalize : bool
        Whether vectors are scaled to length 1.
    **more
        What else decides the values of the vectors, such as how token states are pooled.
    """
    weights, tokenizer = hashes(model)
    return {
        "provider": provider,
        "model": located.model,
        "revision": located.revision,
        "weights": weights,
        "dims": str(dims),
        "normalize": str(normalize).lower(),
        "tokenizer": tokenizer,
        **more,
    }


def modules_of(modules: Iterable[ModuleFiles]) -> str:
    """Return the modules of a sentence-transformers model, as a part of a fingerprint."""
    return " ".join(_module(module) for module in modules)


def prompts_of(prompts: Mapping[str, str], hide: bool = False) -> str:
    """Return prompts, by side, as a part of a fingerprint.

    With `hide` only their hashes, since they come from a variable; the two compare equal.
    """
    if hide:
        prompts = {side: _hidden(text) for side, text in prompts.items()}
    return json.dumps(dict(prompts), sort_keys=True, ensure_ascii=False)


def _module(module: ModuleFiles) -> str:
    """The kind of a module, with what else decides its values and is not in the weights."""
    if module.kind == "Dense":
        name = str(module.config.get("activation_function") or "Tanh")
        return f"Dense[{name.rpartition('.')[2]}]"
    lower = module.kind == "Transformer" and module.config.get("do_lower_case")
    return f"{module.kind}[lower]" if lower else module.kind


def _hidden(text: str) -> str:
    if not text or text.startswith("sha256:"):
        return text
    return f"sha256:{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()}"


def _plain(key: str, parts: Mapping[str, str]) -> Any:
    """A part as it is compared: a prompt equals its hash."""
    if key != "prompts":
        return parts[key]
    try:
        return {side: _hidden(str(text)) for side, text in json.loads(parts[key]).items()}
    except (ValueError, AttributeError):
        return parts[key]


def hashes(model: ModelFolder) -> tuple[str, str]:
    """Return the hashes of a model's weights and of its tokenizer."""
    return _hashes(model.folder, model.plain, tuple(model.stamp()))


@lru_cache(maxsize=64)
def _hashes(folder: Path, plain: bool, stamp: tuple[Any, ...]) -> tuple[str, str]:
    """Hash weights and tokenizer; remembered while the files keep their sizes and times."""
    return hash_weights(folder, plain), hash_tokenizer(folder)


def hash_weights(folder: Path, plain: bool = False) -> str:
    """Hash a model's weights by samples, in a time that does not grow with their size.

    SHA-256 over each weights file's name, size, safetensors header, and 64 KiB at 64 evenly spread
    places. A change of single numbers between the samples goes unseen; another training does not.

    Parameters
    ----------
    folder : pathlib.Path
        Of the model. Only the safetensors files count if there are any.
    plain : bool
        Whether the weights in the folder itself are all, as those of a transformers model.

    Returns
    -------
    str
        ``"sha256:..."``; an empty string if there are no weights.
    """
    files = sorted(
        file
        for file in (folder.glob("*") if plain else folder.rglob("*"))
        if file.suffix in (".safetensors", ".bin", ".pt")
        and file.is_file()
        and not _OTHER_RUNTIMES & set(file.relative_to(folder).parts)
    )
    files = [file for file in files if file.suffix == ".safetensors"] or files
    if not files:
        return ""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()}\0{size}\0".encode())
        digest.update(json.dumps(safetensors_header(file), sort_keys=True).encode())
        with file.open("rb") as stream:
            last = max(0, size - SAMPLE_SIZE)
            for place in sorted({last * step // (SAMPLES - 1) for step in range(SAMPLES)}):
                stream.seek(place)
                digest.update(stream.read(SAMPLE_SIZE))
    return f"sha256:{digest.hexdigest()}"


def hash_tokenizer(folder: Path) -> str:
    """Hash a model's tokenizer; an empty string if it has none.

    Of ``tokenizer.json`` the content counts, without its padding and truncation, which are set
    anew for each use; only without one do the older files count.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("tokenizer.json")):
        content = read_json(file, dict) or {}
        content = {key: content[key] for key in content if key not in ("padding", "truncation")}
        digest.update(json.dumps(content, sort_keys=True).encode())
        return f"sha256:{digest.hexdigest()}"
    found = sorted(file for name in _TOKENIZER_FILES for file in folder.rglob(name))
    for file in found:
        digest.update(f"{file.relative_to(folder).as_posix()}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return f"sha256:{digest.hexdigest()}" if found else ""
