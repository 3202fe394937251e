"""One cache of loaded models for the whole process."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

from gpu_lance.embeddings.identity import freeze

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Load:
    """One load that happened.

    Parameters
    ----------
    name : str
        What was loaded.
    device : str
        Where to; ``"host"`` for what needs no device, such as a tokenizer.
    seconds : float
        How long it took.
    """

    name: str
    device: str
    seconds: float


class ModelCache:
    """Loaded models by (class, arguments, device); each is loaded once, on first use.

    Threads that ask for the same model wait for one load; different models load side by side. A
    load that fails is not remembered.

    Examples
    --------
    >>> cache = ModelCache()
    >>> [cache.get(dict, {"name": "m"}, "cpu", lambda: object()) is not None for _ in range(3)]
    [True, True, True]
    >>> len(cache.loads)
    1
    """

    def __init__(self) -> None:
        self.loads: list[Load] = []
        self._models: dict[Hashable, Any] = {}
        self._locks: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(
        self, owner: type, arguments: dict[str, Any], device: object, load: Callable[[], T]
    ) -> T:
        """Return the model of that key; `load` makes it if it is not there yet.

        Parameters
        ----------
        owner : type
            The class that loads it.
        arguments : dict
            Everything that decides what is loaded.
        device : torch.device or str
            Where it is loaded to.
        load : callable
            Makes the model.
        """
        key = (owner, freeze(arguments), str(device))
        with self._lock:
            if key in self._models:
                return self._models[key]
            own = self._locks.setdefault(key, threading.Lock())
        with own:
            with self._lock:
                if key in self._models:
                    return self._models[key]
            started = time.perf_counter()
            model = load()
            seconds = time.perf_counter() - started
            name = str(arguments.get("name", owner.__name__))
            with self._lock:
                self._models[key] = model
                self.loads.append(Load(name, str(device), seconds))
                self._locks.pop(key, None)
        logger.info("loaded %s on %s in %.1f s", name, device, seconds)
        return model

    def clear(self) -> None:
        """Forget every model; memory comes back when nothing else uses them."""
        with self._lock:
            self._models.clear()

    def __len__(self) -> int:
        with self._lock:
            return len(self._models)


# The models of this process.
MODELS = ModelCache()
