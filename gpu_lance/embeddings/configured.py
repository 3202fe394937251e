"""A pydantic object made from arguments that a table may store, and that shows no secret."""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
import json
import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)
from pydantic_core import InitErrorDetails, PydanticCustomError, PydanticSerializationError

from gpu_lance.embeddings import variables as _variables
from gpu_lance.embeddings.identity import freeze
from gpu_lance.errors import BadInputError

logger = logging.getLogger(__name__)

_told: set[tuple[str, str]] = set()


class Configured(BaseModel):
    """Base of objects that are rebuilt from their arguments; the fields are the arguments.

    :meth:`create` resolves ``$var:`` references and remembers the arguments as written, since
    those are what a table stores. Objects are equal if their class and fields are; what they
    cache counts for nothing, is shared by copies, and stays out of pickles.

    Notes
    -----
    Class attributes that a subclass may override: `session_arguments` are never written to a
    table and ignored when read from one; `unsafe_arguments` likewise, because a stranger's table
    must not be able to switch them on.

    Examples
    --------
    >>> class Scale(Configured):
    ...     factor: float = 1.0
    ...     device: str = "cpu"
    >>> Scale.create(factor=2.0, device="cuda").safe_model_dump()
    {'factor': 2.0}
    """

    model_config = ConfigDict(protected_namespaces=(), hide_input_in_errors=True)

    session_arguments: ClassVar[frozenset[str]] = frozenset({"device", "batch_size", "dtype"})
    unsafe_arguments: ClassVar[frozenset[str]] = frozenset({"trust_remote_code"})

    _original_args: dict[str, Any] | None = PrivateAttr(default=None)

    @classmethod
    def create(cls, **kwargs: Any) -> Self:
        """Return an instance; ``"$var:name"`` and ``"$var:name:default"`` are resolved.

        References are resolved at any depth of lists and dicts.

        Raises
        ------
        UnknownVariableError
            If a variable is not set and has no default (a ValueError and a KeyError).
        HardcodedSecretError
            If a sensitive argument is not a reference (a ValueError).
        pydantic.ValidationError
            If an argument does not fit its field; values of variables are left out of it.
        """
        sensitive = cls.sensitive_keys()
        resolved = _variables.resolve(kwargs, sensitive)
        cls._tell_unknown(kwargs)
        failure: ValidationError
        try:
            instance = cls(**resolved.args)
        except ValidationError as error:
            if not resolved.secrets:
                raise
            failure = _redacted(error, resolved.secrets)
        except Exception as error:
            error.args = tuple(
                _variables.redact(part, resolved.secrets) if isinstance(part, str) else part
                for part in error.args
            )
            raise
        else:
            instance._original_args = _variables.snapshot(kwargs)
            return instance
        # outside the except block, so that the new error does not drag the old one along
        raise failure

    @classmethod
    def from_stored(cls, arguments: Mapping[str, Any]) -> Self:
        """Return an instance from the arguments that a table stores.

        Those of the session and of trust are ignored.
        """
        ignored = cls.session_arguments | cls.unsafe_arguments
        return cls.create(**{key: arg for key, arg in arguments.items() if key not in ignored})

    @staticmethod
    def sensitive_keys() -> list[str]:
        """Return the arguments that hold secrets: only ``$var:`` references may be given."""
        return []

    def safe_model_dump(self) -> dict[str, Any]:
        """Return the arguments to store in a table: as written, with no secret in them.

        Arguments of the session (`session_arguments`) and of trust (`unsafe_arguments`) are left
        out. An instance that the plain constructor made gives the fields that were set, without
        the sensitive ones.

        Raises
        ------
        BadInputError
            If an argument has no JSON form.
        """
        left_out = self.session_arguments | self.unsafe_arguments
        if self._original_args is None:
            return self._constructed_arguments(left_out)
        args = {name: value for name, value in self._original_args.items() if name not in left_out}
        for name, value in args.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise BadInputError(
                    f"Argument {name!r} of {type(self).__name__} is a {type(value).__name__} that "
                    f"a table cannot store as JSON ({error}); pass strings, finite numbers, lists "
                    "or dicts."
                ) from None
        return _variables.snapshot(args)

    # -- the rest is how an instance behaves as a Python object

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Configured) or type(self) is not type(other):
            return NotImplemented
        return bool(self._comparison_key() == other._comparison_key())

    def __hash__(self) -> int:
        return hash(self._comparison_key())

    def __repr_args__(self) -> Any:
        hidden = self._shown_instead()
        for name, value in super().__repr_args__():
            yield name, hidden.get(name or "", value)

    def __repr_str__(self, join_str: str) -> str:
        # a computed field may be built from a secret
        shown = super().__repr_str__(join_str)  # type: ignore[misc]
        return _variables.redact(shown, self._secret_strings())

    @model_serializer(mode="wrap")
    def _serialize_without_secrets(self, handler: SerializerFunctionWrapHandler) -> Any:
        # a schema that holds this function in a field prints it in model_json_schema()
        sensitive = set(self.sensitive_keys())
        for name in sensitive & type(self).model_fields.keys():
            field = type(self).model_fields[name]
            sensitive |= {alias for alias in (field.alias, field.serialization_alias) if alias}
        return _variables.redact_leaves(
            _variables.mask(handler(self), sensitive), self._secret_strings()
        )

    def __getstate__(self) -> dict[Any, Any]:
        # what a cached property holds is made again on the other side
        state = dict(super().__getstate__())
        state["__dict__"] = {
            name: value
            for name, value in state["__dict__"].items()
            if not isinstance(
                inspect.getattr_static(type(self), name, None), functools.cached_property
            )
        }
        return state

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        # arguments are copied; models, clients and locks are shared
        twin = self.__copy__()
        fields = type(self).model_fields
        arguments = {name: value for name, value in self.__dict__.items() if name in fields}
        twin.__dict__.update(copy.deepcopy(arguments, memo))
        if self.__pydantic_extra__:
            object.__setattr__(
                twin, "__pydantic_extra__", copy.deepcopy(self.__pydantic_extra__, memo)
            )
        twin._original_args = _variables.snapshot(self._original_args)
        return twin

    # -- helpers

    def _comparison_key(self) -> Any:
        arguments = {name: self.__dict__.get(name) for name in type(self).model_fields}
        return freeze({**arguments, **(self.__pydantic_extra__ or {})})

    def _shown_instead(self) -> dict[str, Any]:
        """What to show for each field that holds a secret or a variable's value."""
        sensitive = self.sensitive_keys()
        hidden = _variables.mask(
            {name: self.__dict__.get(name) for name in type(self).model_fields}, sensitive
        )
        for name, value in (self._original_args or {}).items():
            if _variables.has_reference(value):
                hidden[name] = _variables.mask(value, sensitive)
        return hidden

    def _secret_strings(self) -> dict[str, str]:
        """Every secret string of the fields, and what to show in its place."""
        fields = {name: self.__dict__.get(name) for name in type(self).model_fields}
        masked = _variables.mask(fields, self.sensitive_keys())
        pairs = zip(_variables.leaves(fields), _variables.leaves(masked), strict=True)
        return {leaf: shown for leaf, shown in pairs if isinstance(leaf, str) and leaf is not shown}

    def _constructed_arguments(self, left_out: frozenset[str]) -> dict[str, Any]:
        sensitive = self.sensitive_keys()
        kept = {
            name
            for name in self.__pydantic_fields_set__ - left_out
            if not _variables.holds_secret({name: self.__dict__.get(name)}, sensitive)
        }
        try:
            args = self.model_dump(mode="json", include=kept)
        except PydanticSerializationError as error:
            raise BadInputError(
                f"An argument of {type(self).__name__} has no JSON form ({error}); pass strings, "
                "numbers, lists or dicts."
            ) from None
        return {name: value for name, value in args.items() if name in kept}

    @classmethod
    def _tell_unknown(cls, kwargs: dict[str, Any]) -> None:
        """Say once that an argument is ignored; pydantic drops it without a word."""
        own_init: Any = cls.__init__
        fields = cls.model_fields
        aliased = any(field.validation_alias for field in fields.values())
        extra = cls.model_config.get("extra", "ignore")
        if own_init is not BaseModel.__init__ or aliased or extra != "ignore":
            return
        for name in kwargs.keys() - fields.keys():
            if (cls.__qualname__, name) in _told:
                continue
            _told.add((cls.__qualname__, name))
            near = difflib.get_close_matches(name, sorted(fields), n=1)
            logger.warning(
                "%s has no argument %r, so it is ignored%s",
                cls.__name__,
                name,
                f"; did you mean {near[0]!r}?" if near else ".",
            )


def _redacted(error: ValidationError, secrets: dict[str, str]) -> ValidationError:
    """Rebuild a validation error without the values of variables."""
    lines = [
        InitErrorDetails(
            type=PydanticCustomError(
                line["type"],
                _variables.redact(line["msg"], secrets),
            ),
            loc=line["loc"],
            input=_variables.MASK,
        )
        for line in error.errors(include_url=False, include_input=False, include_context=False)
    ]
    return ValidationError.from_exception_data(error.title, lines, hide_input=True)
