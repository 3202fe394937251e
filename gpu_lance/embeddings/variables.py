"""``$var:name`` references: configuration that lives in memory and never in a table."""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import SecretBytes, SecretStr

from gpu_lance.errors import HardcodedSecretError, UnknownVariableError

PREFIX = "$var:"
MASK = "***"
# replacing shorter strings would garble a message and protect nothing
_SHORTEST_SECRET = 4


class Variables:
    """Named values for ``$var:name`` references, in memory only and safe to share by threads.

    Examples
    --------
    >>> variables = Variables()
    >>> variables.set("model", "all-MiniLM-L6-v2")
    >>> variables.get("model")
    'all-MiniLM-L6-v2'
    """

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._lock = threading.Lock()

    def set(self, name: str, value: str) -> None:
        """Set a variable; a name with a colon is a ValueError."""
        if ":" in name:
            raise ValueError(
                f"Variable name {name!r} holds a colon, which separates a name from its default "
                "in '$var:name:default'; choose a name without one."
            )
        with self._lock:
            self._values[name] = value

    def get(self, name: str) -> str:
        """Return a variable; UnknownVariableError (KeyError and ValueError) if it is not set."""
        with self._lock:
            if name in self._values:
                return self._values[name]
        raise UnknownVariableError(
            f"Variable {name!r} was not found: set it with registry.set_var({name!r}, value) "
            "first. Variables live in memory only, so every new Python session sets them again."
        )

    def clear(self) -> None:
        """Forget every variable."""
        with self._lock:
            self._values.clear()


# The values of this process; every registry reads and writes these.
VARIABLES = Variables()


@dataclass(frozen=True)
class Resolved:
    """Arguments with their references replaced.

    Parameters
    ----------
    args : dict
        The arguments to construct a function with.
    secrets : dict of str to str
        Each string that came from a variable, and the reference to show in its place.
    """

    args: dict[str, Any]
    secrets: dict[str, str]


def is_reference(value: object) -> bool:
    """Whether `value` is a ``$var:`` string.

    Examples
    --------
    >>> is_reference("$var:key"), is_reference("key")
    (True, False)
    """
    return isinstance(value, str) and value.startswith(PREFIX)


def resolve(
    args: Mapping[str, Any], sensitive: Collection[str] = (), variables: Variables = VARIABLES
) -> Resolved:
    """Replace ``$var:name`` and ``$var:name:default``, also inside lists, tuples and dicts.

    Parameters
    ----------
    args : mapping
        Arguments by name; not changed.
    sensitive : collection of str
        Keys, at any depth, whose strings must be references without a default: a default would
        be written to table metadata in clear.
    variables : Variables
        Where to look names up.

    Returns
    -------
    Resolved
        The new arguments, and what must not be shown.

    Raises
    ------
    UnknownVariableError
        If a variable without a default is not set.
    HardcodedSecretError
        If a sensitive key holds a secret in clear.

    Examples
    --------
    >>> resolve({"name": "$var:model:tiny", "options": ["$var:mode:fast"]}).args
    {'name': 'tiny', 'options': ['fast']}
    """
    secrets: dict[str, str] = {}

    def look_up(reference: str, secret_key: str | None) -> str:
        name, colon, default = reference[len(PREFIX) :].partition(":")
        if secret_key is not None and default:
            raise _hardcoded(secret_key)
        try:
            value = variables.get(name)
        except UnknownVariableError:
            if not colon or secret_key is not None:
                raise
            return default
        if isinstance(value, str):
            secrets[value] = PREFIX + name
        return value

    def walk(value: Any, secret_key: str | None) -> Any:
        if is_reference(value):
            return look_up(value, secret_key)
        if secret_key is not None and isinstance(value, str | bytes | SecretStr | SecretBytes):
            raise _hardcoded(secret_key)
        if isinstance(value, dict):
            return {
                key: walk(item, secret_key or (key if key in sensitive else None))
                for key, item in value.items()
            }
        if type(value) in (list, tuple):
            return type(value)(walk(item, secret_key) for item in value)
        return value

    return Resolved(walk(dict(args), None), secrets)


def snapshot(value: Any) -> Any:
    """Copy the dicts, lists and tuples of `value`; what they hold stays the same objects.

    Examples
    --------
    >>> original = {"a": [1]}
    >>> snapshot(original)["a"] is original["a"]
    False
    """
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(snapshot(item) for item in value)
    return value


def has_reference(value: Any) -> bool:
    """Whether a ``$var:`` string is anywhere inside `value`."""
    return any(is_reference(leaf) for leaf in leaves(value))


def leaves(value: Any) -> Iterator[Any]:
    """Yield everything inside nested dicts, lists and tuples.

    Examples
    --------
    >>> list(leaves({"a": [1, (2, 3)]}))
    [1, 2, 3]
    """
    if isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def mask(value: Any, sensitive: Collection[str], hide: bool = False) -> Any:
    """Return `value` with the strings under sensitive keys shown as ``***`` (references stay).

    Examples
    --------
    >>> mask({"api_key": "sk-1", "retries": 2}, ["api_key"])
    {'api_key': '***', 'retries': 2}
    """
    if isinstance(value, dict):
        return {key: mask(item, sensitive, hide or key in sensitive) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(mask(item, sensitive, hide) for item in value)
    if not hide or value is None or isinstance(value, bool):
        return value
    # a reference with a default holds the secret itself
    bare = is_reference(value) and ":" not in value[len(PREFIX) :]
    return value if bare else MASK


def holds_secret(value: Any, sensitive: Collection[str]) -> bool:
    """Whether :func:`mask` would hide anything in `value`.

    Examples
    --------
    >>> holds_secret({"api_key": "$var:key"}, ["api_key"])
    False
    """
    pairs = zip(leaves(value), leaves(mask(value, sensitive)), strict=True)
    return any(leaf is not shown for leaf, shown in pairs)


def redact(text: str, secrets: Mapping[str, str]) -> str:
    """Replace every secret in `text` by what stands for it, the longest first.

    Examples
    --------
    >>> redact("bad key sk-12345", {"sk-12345": "$var:key"})
    'bad key $var:key'
    >>> redact(f"bad key {'sk-1234' + chr(10)!r}", {"sk-1234" + chr(10): "$var:key"})
    "bad key '$var:key'"
    """
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _SHORTEST_SECRET:
            # messages also quote values, with escapes
            for form in (secret, repr(secret)[1:-1], json.dumps(secret)[1:-1]):
                text = text.replace(form, secrets[secret])
    return text


def redact_leaves(value: Any, secrets: Mapping[str, str]) -> Any:
    """Apply :func:`redact` to every string inside nested dicts, lists and tuples.

    Examples
    --------
    >>> redact_leaves({"headers": ["Bearer sk-12345"]}, {"sk-12345": "***"})
    {'headers': ['Bearer ***']}
    """
    if isinstance(value, dict):
        return {key: redact_leaves(item, secrets) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(redact_leaves(item, secrets) for item in value)
    return redact(value, secrets) if type(value) is str else value


def _hardcoded(key: str) -> HardcodedSecretError:
    # the same sentence as LanceDB's, which callers match on
    error = HardcodedSecretError(f"Sensitive key '{key}' cannot be set to a hardcoded value")
    error.add_note(
        f"Write {key}='$var:some_name', without a default, and call "
        "registry.set_var('some_name', value) in each session."
    )
    return error
