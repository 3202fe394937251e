"""Names of embedding functions, and the table metadata that refers to them."""

from __future__ import annotations

import difflib
import importlib
import logging
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, overload

from gpu_lance.embeddings import metadata as metadata_json
from gpu_lance.embeddings.base import EmbeddingFunction, EmbeddingFunctionConfig
from gpu_lance.embeddings.variables import VARIABLES
from gpu_lance.errors import BrokenProviderError, ProviderTakenError, UnknownProviderError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

logger = logging.getLogger(__name__)

F = TypeVar("F", bound=type[EmbeddingFunction])

ENTRY_POINT_GROUP = "gpu_lance.embeddings"

# The same names and targets as this package's entry points in pyproject.toml, so that a checkout
# that was never installed knows them too.
BUILT_IN: dict[str, str] = {
    "cohere": "gpu_lance.embeddings.cohere:CohereEmbeddingFunction",
    "colbert": "gpu_lance.embeddings.colbert:ColbertEmbeddings",
    "huggingface": "gpu_lance.embeddings.huggingface:TransformersEmbeddingFunction",
    "openai": "gpu_lance.embeddings.openai:OpenAIEmbeddings",
    "sentence-transformers": (
        "gpu_lance.embeddings.sentence_transformers:SentenceTransformerEmbeddings"
    ),
}

# LanceDB's other providers, which this package does not have yet.
NOT_YET = frozenset(
    {
        "bedrock-text",
        "colpali",
        "gemini-text",
        "gte-text",
        "imagebind",
        "instructor",
        "jina",
        "ollama",
        "open-clip",
        "siglip",
        "voyageai",
        "watsonx",
    }
)

_ALIAS = "__embedding_function_registry_alias__"


class EmbeddingFunctionRegistry:
    """Find embedding functions by name, and read and write the metadata that names them.

    A name is looked up among the classes registered in this process, then the built-in
    providers, then the entry points of installed packages (group ``gpu_lance.embeddings``); of two
    packages that announce one name the first on ``sys.path`` counts. Only the provider asked for
    is imported. Safe to share by threads.

    Examples
    --------
    >>> registry = EmbeddingFunctionRegistry()
    >>> from gpu_lance.embeddings import TextEmbeddingFunction
    >>> @registry.register("length")
    ... class Length(TextEmbeddingFunction):
    ...     def generate_embeddings(self, texts):
    ...         return [[float(len(text))] for text in texts]
    ...     def ndims(self):
    ...         return 1
    >>> registry.get("length").create().generate_embeddings(["four"])
    [[4.0]]
    """

    def __init__(self) -> None:
        self._functions: dict[str, type[EmbeddingFunction]] = {}
        self._entry_points: dict[str, EntryPoint] | None = None
        self._lock = threading.RLock()

    @classmethod
    def get_instance(cls) -> EmbeddingFunctionRegistry:
        """Return the registry of this process."""
        return _REGISTRY

    @overload
    def register(self, alias: F) -> F: ...
    @overload
    def register(self, alias: str | None = None) -> Callable[[F], F]: ...
    def register(self, alias: Any = None) -> Any:
        """Decorate a class to be found by `alias`, or by its class name if none is given.

        Registering again replaces the class, with a warning if the new one is another class; the
        cell of a notebook may run twice.

        Raises
        ------
        TypeError
            If the class is no EmbeddingFunction.
        ProviderTakenError
            If the alias belongs to a built-in provider (a KeyError).
        """
        if isinstance(alias, type):  # @register without parentheses
            return self._add(None, alias)
        if alias is not None and not isinstance(alias, str):
            raise TypeError(f"An alias is a string, got {alias!r}.")
        return lambda cls: self._add(alias, cls)

    def get(self, name: str) -> type[EmbeddingFunction]:
        """Return the class of that name.

        Raises
        ------
        UnknownProviderError
            If there is none (a KeyError).
        BrokenProviderError
            If an installed package announces it and it cannot be imported (an ImportError).
        """
        if not isinstance(name, str):
            raise self._unknown(name)
        with self._lock:
            found = self._functions.get(name)
        if found is not None:
            return found
        # imported without the lock: an import may wait for another thread that registers
        if name in BUILT_IN:
            module, _, attribute = BUILT_IN[name].partition(":")
            loaded = getattr(importlib.import_module(module), attribute)
        elif name in (entry_points := self._installed()):
            loaded = _load(entry_points[name])
        else:
            raise self._unknown(name)
        _check(loaded, f"The entry point {name!r}")
        with self._lock:
            found = self._functions.setdefault(name, loaded)
            if _ALIAS not in vars(found):
                setattr(found, _ALIAS, name)
        return found

    def names(self) -> list[str]:
        """Return every known name, sorted, without importing any provider."""
        with self._lock:
            return sorted({*self._functions, *BUILT_IN, *self._installed()})

    def reset(self) -> None:
        """Forget every registered class, variable and query; the built-in providers remain."""
        from gpu_lance.embeddings.query_cache import QUERIES

        with self._lock:
            self._functions.clear()
            self._entry_points = None
            VARIABLES.clear()
        QUERIES.clear()

    def set_var(self, name: str, value: str) -> None:
        """Set what ``$var:name`` stands for, in memory only; ValueError if `name` has a colon."""
        VARIABLES.set(name, value)

    def get_var(self, name: str) -> str:
        """Return a variable; UnknownVariableError (a KeyError) if it is not set."""
        return VARIABLES.get(name)

    def parse_functions(
        self, metadata: Mapping[Any, Any] | None
    ) -> dict[str, EmbeddingFunctionConfig]:
        """Return the embedding functions that a table's schema metadata names, by vector column.

        Stored session arguments (`device`, ...) and `trust_remote_code` are ignored. A function
        that cannot be made here, because its name is not registered, it has no ``model``, or a
        variable is not set, becomes one that raises that error when it is used. Of two entries
        for one vector column the last counts.

        Parameters
        ----------
        metadata : mapping or None
            Of an Arrow schema; keys and values are bytes or str.

        Raises
        ------
        SchemaError
            If the metadata is not JSON of the right form.
        """
        return metadata_json.read(metadata, self.get)

    def function_to_metadata(self, conf: EmbeddingFunctionConfig) -> dict[str, Any]:
        """Return what a table stores of a function: name, model, source and vector column.

        Raises
        ------
        UnknownProviderError
            If the function's class was never registered, so that no reader could find it.
        """
        return metadata_json.entry_of(conf, self._name_of)

    def get_table_metadata(
        self, func_list: Sequence[EmbeddingFunctionConfig] | None
    ) -> dict[str, bytes] | None:
        """Return the schema metadata for a table's functions; None if there are none."""
        return metadata_json.write(func_list, self._name_of)

    def _add(self, alias: str | None, cls: Any) -> Any:
        _check(cls, "The class to register")
        name = alias or cls.__name__
        target = _target(cls)
        if name in BUILT_IN and BUILT_IN[name] != target:
            raise ProviderTakenError(
                f"{name!r} is a built-in provider and cannot be replaced by {target}; choose "
                "another alias."
            )
        with self._lock:
            old = self._functions.get(name)
            known = self._installed().get(name)
            before = _target(old) if old else known.value if known else target
            self._functions[name] = cls
            setattr(cls, _ALIAS, name)
        if before != target:
            message = f"The embedding function {name!r} was {before} and is now {target}."
            logger.warning(message)
            warnings.warn(message, UserWarning, stacklevel=3)
        return cls

    def _name_of(self, cls: type[EmbeddingFunction]) -> str:
        # vars(), since a subclass that was not registered must not pass for its parent
        alias = vars(cls).get(_ALIAS)
        if alias is not None:
            return str(alias)
        target = _target(cls)
        with self._lock:
            known = {entry.value: name for name, entry in self._installed().items()}
        known.update({value: name for name, value in BUILT_IN.items()})
        if target in known:
            return known[target]
        raise UnknownProviderError(
            f"{target} is not registered, so no reader of the table could find it; decorate the "
            "class with @register('some-name')."
        )

    def _installed(self) -> dict[str, EntryPoint]:
        """The entry points of other packages; read once, none is imported."""
        with self._lock:
            if self._entry_points is None:
                from importlib.metadata import entry_points

                found: dict[str, EntryPoint] = {}
                for entry in entry_points(group=ENTRY_POINT_GROUP):
                    name = entry.name
                    if name in BUILT_IN:
                        if entry.value != BUILT_IN[name]:
                            logger.warning(
                                "The entry point %s = %s is ignored: the name is built in.",
                                name,
                                entry.value,
                            )
                        continue
                    first = found.setdefault(name, entry)
                    if first.value != entry.value:
                        logger.warning(
                            "Two packages announce the embedding function %r: %s counts, and %s "
                            "is ignored. Uninstall one of them.",
                            name,
                            _announced(first),
                            _announced(entry),
                        )
                self._entry_points = found
            return self._entry_points

    def _unknown(self, name: object) -> UnknownProviderError:
        names = self.names()
        plain = {known.lower().replace("_", "-"): known for known in names}
        wanted = str(name).lower().replace("_", "-")
        near = [plain[match] for match in difflib.get_close_matches(wanted, plain, n=3)]
        hint = f" Did you mean {' or '.join(repr(match) for match in near)}?" if near else ""
        if wanted in NOT_YET:
            hint = " LanceDB's provider of that name is not available here yet."
        return UnknownProviderError(
            f"No embedding function is registered as {name!r}.{hint} Known: {', '.join(names)}; "
            "register a class of your own with @register('name')."
        )


def get_registry() -> EmbeddingFunctionRegistry:
    """Return the registry of this process.

    Examples
    --------
    >>> "sentence-transformers" in get_registry().names()
    True
    """
    return _REGISTRY


@overload
def register(alias: F) -> F: ...
@overload
def register(alias: str | None = None) -> Callable[[F], F]: ...
def register(alias: Any = None) -> Any:
    """Decorate a class to be found by `alias`; see :meth:`EmbeddingFunctionRegistry.register`."""
    return _REGISTRY.register(alias)


def _load(entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except Exception as error:
        raise BrokenProviderError(
            f"The embedding function {entry.name!r}, which is {_announced(entry)}, cannot be "
            f"imported: {type(error).__name__}: {error}. Update or uninstall that package."
        ) from error


def _announced(entry: EntryPoint) -> str:
    package = entry.dist.name if entry.dist is not None else None
    return f"{entry.value} of {f'the package {package}' if package else 'an unknown package'}"


def _target(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _check(cls: Any, what: str) -> None:
    if isinstance(cls, type) and issubclass(cls, EmbeddingFunction):
        return
    hint = ""
    bases = cls.__mro__ if isinstance(cls, type) else ()
    if any(base.__module__.startswith("lancedb.") for base in bases):
        hint = " It derives from lancedb's class; import the base from gpu_lance.embeddings."
    raise TypeError(f"{what} must be a subclass of EmbeddingFunction, got {cls!r}.{hint}")


_REGISTRY = EmbeddingFunctionRegistry()
