"""Base of functions whose vectors a server makes: limits, retries, bad texts and secrets."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from pydantic import Field, PrivateAttr, SecretStr

from gpu_lance.device import as_tensor
from gpu_lance.embeddings import variables
from gpu_lance.embeddings.api_answers import BadAnswer, WrongLength, parse, to_matrix
from gpu_lance.embeddings.api_calls import Calls, count_tokens, divide
from gpu_lance.embeddings.api_connection import (
    CONNECTIONS,
    Connection,
    check_server,
    reading_a_table,
    refuse_stranger,
    trust,
)
from gpu_lance.embeddings.api_failures import Failure, Then, failure_of, shown
from gpu_lance.embeddings.base import TextEmbeddingFunction
from gpu_lance.embeddings.identity import freeze
from gpu_lance.embeddings.inputs import text_fault, usable
from gpu_lance.embeddings.staged import StagedFunction, derived
from gpu_lance.embeddings.throttle import Throttle
from gpu_lance.errors import (
    ApiError,
    BadInputError,
    EmbeddingError,
    MissingExtraError,
    MissingKeyError,
)
from gpu_lance.types import Embeddings, Side

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Texts:
    """Texts for a server.

    Parameters
    ----------
    texts : list of str
        Those that have a vector.
    costs : list of int
        Their tokens, estimated.
    positions : numpy.ndarray
        (m,), where each stood.
    count : int
        Items in all, null, empty and bad ones too.
    side : Side
    errors : dict of int to str
        The reason for each bad item, by its position.
    """

    texts: list[str]
    costs: list[int]
    positions: np.ndarray
    count: int
    side: Side
    errors: dict[int, str]


class ApiEmbeddingFunction(  # type: ignore[misc]  # the names of arguments differ
    StagedFunction, TextEmbeddingFunction
):
    """Base of providers over HTTP: implement :meth:`open`, :meth:`ask` and :meth:`rows_of`.

    A null and an empty text have a null vector. A text that the server refuses costs one row, with
    what the server said as the reason; what it would say of every text is an error at once.

    Parameters
    ----------
    name : str
        The model.
    dim : int, optional
        The length of a vector; needed for a model that is not known here.
    api_key : str, optional
        ``"$var:name"``; without it an environment variable is read. Never stored, shown or pickled.
    base_url : str, optional
        Another server that speaks the same protocol.
    max_retries : int
        How often a request is sent again after a 408, 409, 429 or 5xx, a lost connection, a
        timeout, or half an answer; all tries of one request take at most `retry_budget` seconds.
    timeout : float
        Seconds to wait for a connection, and for each part of an answer.
    max_concurrent_requests : int
        The most requests under way at once, of all threads.
    requests_per_minute, tokens_per_minute : int, optional
        A limit that the server sets. Tokens are estimated, rather too many than too few.
    batch_size : int, optional
        The most texts in a request; None leaves it to the API's limit.

    Notes
    -----
    `timeout` and what follows it belong to the session: a table never stores them. Functions of
    equal arguments share a client and its limits.
    """

    session_arguments: ClassVar[frozenset[str]] = StagedFunction.session_arguments | {
        "max_concurrent_requests",
        "requests_per_minute",
        "timeout",
        "tokens_per_minute",
    }

    provider: ClassVar[str]
    models: ClassVar[Mapping[str, int]] = {}
    """The length of the vectors of known models."""
    flexible: ClassVar[frozenset[str]] = frozenset()
    """Known models that give vectors of the length that is asked for."""
    key_variables: ClassVar[tuple[str, ...]]
    server_variable: ClassVar[str]
    most_texts: ClassVar[int]
    most_tokens: ClassVar[int | None] = None
    most_item_tokens: ClassVar[int | None] = None

    name: str
    dim: int | None = Field(default=None, ge=1)
    api_key: str | None = None
    base_url: str | None = None
    timeout: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    max_concurrent_requests: int = Field(default=8, ge=1, le=256)
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    batch_size: int | None = Field(default=None, ge=1)

    _named_here: bool = PrivateAttr(default=True)

    # -- what a provider implements

    @abstractmethod
    def open(self, key: SecretStr | None) -> tuple[Any, Any]:
        """Make the client, without retries of its own; return it and what closes it."""

    @abstractmethod
    def ask(
        self, connection: Connection, texts: list[str], side: Side, length: int | None
    ) -> bytes:
        """Send one request and return the body of the answer; `length` is to be asked for."""

    @abstractmethod
    def rows_of(self, body: Any, count: int) -> Any:
        """Return the vectors in an answer, in the order of the texts; BadAnswer if it has none."""

    def adapt(self, connection: Connection, failure: Failure) -> bool:
        """Whether a refused request is worth sending in another form, which is noted."""
        return False

    def answer_headers(self, connection: Connection) -> Mapping[str, str] | None:
        """The headers of this thread's last answer, for a client whose errors have none."""
        return None

    # -- LanceDB's

    @staticmethod
    def sensitive_keys() -> list[str]:
        """Return the arguments that hold secrets."""
        return ["api_key"]

    @classmethod
    def from_stored(cls, arguments: Mapping[str, Any]) -> Self:
        """Return an instance from what a table stores; the server that it names is not trusted."""
        with reading_a_table():
            return super().from_stored(arguments)

    def ndims(self) -> int:
        """Return the length of a vector; nothing is sent for it.

        Raises
        ------
        BadInputError
            For a model that is not known here, without `dim`; and if `dim` is not what it gives.
        """
        known = self.models.get(self.name)
        if known is None:
            if self.dim is None:
                raise BadInputError(
                    f"The length of the vectors of {self._shown_name()!r} is not known here: pass "
                    f"it, as in create(name=..., dim=768). Known are {', '.join(self.models)}."
                )
            return self.dim
        if self.dim is not None and self.dim != known and self.name not in self.flexible:
            raise BadInputError(
                f"{self.name} gives vectors of {known} numbers, and dim is {self.dim}; leave dim "
                f"out, or use a model whose vectors can be shorter: "
                f"{', '.join(sorted(self.flexible))}."
            )
        if self.dim is not None and self.dim > known:
            raise BadInputError(
                f"{self.name} gives vectors of at most {known} numbers, and dim is {self.dim}; "
                "pass less, or leave dim out."
            )
        return self.dim or known

    @derived
    def generate_embeddings(self, texts: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """Embed texts as sources: float32 arrays; None for a null, empty or refused text."""
        return self.compute_source_embeddings(texts)

    def fingerprint(self) -> dict[str, str]:
        """Return what decides the values of the vectors. The server does not: models may move."""
        return {
            "provider": self.provider,
            "model": self._shown_name(),
            "dims": str(self.ndims()),
        }

    # -- the two stages

    def prepare(self, items: Sequence[Any], side: Side) -> Texts:
        """Sort out null, empty and bad items, and estimate the tokens of the rest."""
        # a server refuses an empty text; it counts as a null
        some = [None if isinstance(item, str) and not item else item for item in items]
        texts, positions, errors = usable(some, text_fault)
        texts = [str(text) for text in texts]
        costs = [count_tokens(text) for text in texts]
        return Texts(texts, costs, positions, len(items), side, errors)

    def finish(self, prepared: Texts, *, ndims: int, device: torch.device) -> Embeddings:
        """Have the server make the vectors; see :func:`gpu_lance.embeddings.calls.finish`.

        Raises
        ------
        ApiAccessError
            For a key that the server does not take.
        ApiConnectionError
            If the server cannot be reached or does not answer.
        ApiError
            For anything else that the server refuses, and for an answer that is of no use.
        EmbeddingError
            If its vectors have another length.
        """
        vectors = np.zeros((prepared.count, ndims), np.float32)
        valid = np.zeros(prepared.count, bool)
        errors = dict(prepared.errors)
        if prepared.texts:
            made, bad = self._request(prepared, ndims)
            good = np.ones(len(made), bool)
            good[list(bad)] = False
            kept = prepared.positions[good]
            vectors[kept] = made[good]
            valid[kept] = True
            errors.update((int(prepared.positions[place]), bad[place]) for place in bad)
        return Embeddings(as_tensor(vectors, device), valid, dict(sorted(errors.items())))

    def _request(self, prepared: Texts, ndims: int) -> tuple[np.ndarray, dict[int, str]]:
        connection = self._connection()
        made = np.zeros((len(prepared.texts), ndims), np.float32)

        def ask(texts: list[str]) -> tuple[np.ndarray, dict[int, str]]:
            return self._checked(connection, texts, prepared.side, ndims)

        most = min(self.batch_size or self.most_texts, connection.most or self.most_texts)
        parts = divide(
            prepared.costs,
            most=most,
            tokens=self.most_tokens,
            item_tokens=self.most_item_tokens,
            at_once=self.max_concurrent_requests,
        )
        calls = Calls(connection, ask, max_retries=self.max_retries, time_budget=self.retry_budget)
        error: ApiError
        try:
            return made, calls.run(prepared.texts, prepared.costs, parts, made)
        except Failure as failure:
            error = failure.public(type(self).__name__, self._advice())
        # outside the except block, so that nothing else comes along
        raise error

    def _checked(
        self, connection: Connection, texts: list[str], side: Side, ndims: int
    ) -> tuple[np.ndarray, dict[int, str]]:
        """Send one request, and what is missing in its answer once more."""
        vectors, bad = self._one(connection, texts, side, ndims)
        if bad:
            places = sorted(bad)
            again, bad = self._one(connection, [texts[place] for place in places], side, ndims)
            vectors[places] = again
            bad = {places[place]: reason for place, reason in bad.items()}
        return vectors, bad

    def _one(
        self, connection: Connection, texts: list[str], side: Side, ndims: int
    ) -> tuple[np.ndarray, dict[int, str]]:
        """Send one request; adapt it to the server if need be.

        Raises
        ------
        Failure
        EmbeddingError
            If the vectors have another length.
        """
        wrong = 0
        for _ in range(4):  # each time something was learned of the server
            asked = connection.ask_length or (self.dim is not None and self.name in self.flexible)
            failure: Failure | None = None
            interrupted = False
            try:
                content = self.ask(connection, texts, side, ndims if asked else None)
            except KeyboardInterrupt:
                interrupted = True
            except Exception as error:
                failure = failure_of(
                    error,
                    secrets=connection.secrets,
                    # one that gave vectors is not unknown, whatever is said of a text
                    model="" if connection.works else self.name,
                    headers=self.answer_headers(connection),
                )
            if interrupted:
                raise KeyboardInterrupt  # without the client's frames, whose variables hold the key
            if failure is not None:
                if failure.then is Then.AGAIN:
                    raise failure
                if self.adapt(connection, failure):
                    continue
                if wrong:  # it does not know how to give another length
                    connection.ask_length = False
                    break
                raise failure
            try:
                rows = self.rows_of(parse(content), len(texts))
                return to_matrix(rows, len(texts), ndims)
            except BadAnswer as error:
                said = shown(str(error), connection.secrets)
                failure = Failure(f"the server's answer is of no use: {said}", Then.AGAIN, 200)
            except WrongLength as error:
                wrong = error.got
            if failure is not None:
                raise failure
            # a model that is not known here may give the length that is asked for
            if asked or self.dim is None or self.name in self.models:
                break
            connection.ask_length = True
        raise EmbeddingError(
            f"{type(self).__name__}: the server gave vectors of {wrong} numbers for the model "
            f"{self._shown_name()!r}, and the column wants {ndims}. Pass dim={wrong} when the "
            "function is made, or use the model that made the column."
        )

    # -- the connection, and secrets

    def model_post_init(self, context: Any, /) -> None:
        """Check the address of the server, and note who named it."""
        if self.base_url is not None:
            self._named_here = trust(check_server(self.base_url))

    def query_state(self) -> Hashable:
        """Return what the environment says of the server."""
        return os.environ.get(self.server_variable)

    def _connection(self) -> Connection:
        if self.base_url is not None and not self._named_here and not self._is_variable("base_url"):
            refuse_stranger(self.base_url, self.server_variable)
        key = self._key()
        secret = self.sensitive_keys()
        arguments = {
            name: SecretStr(repr(value)) if name in secret else value
            for name, value in self._resolved().items()
            if name not in ("api_key", "batch_size", "max_retries", "timeout")
        }

        def make() -> Connection:
            client, close = self._opened(key)
            throttle = Throttle(
                self.max_concurrent_requests, self.requests_per_minute, self.tokens_per_minute
            )
            return Connection(client, close, throttle, self._secrets(key))

        return CONNECTIONS.get((type(self), key, self.query_state(), freeze(arguments)), make)

    def _opened(self, key: SecretStr | None) -> tuple[Any, Any]:
        try:
            return self.open(key)
        except MissingExtraError:
            raise
        except Exception as error:
            problem = shown(str(error), self._secrets(key)) or type(error).__name__
        # outside the except block, without frames whose variables hold the key
        raise BadInputError(f"{type(self).__name__} cannot be set up: {problem}.")

    def _key(self) -> SecretStr | None:
        """The key, of the argument or the environment.

        Raises
        ------
        MissingKeyError
            If there is none, or one that no request can carry.
        """
        key = self._resolved()["api_key"]
        for variable in self.key_variables:
            key = key or os.environ.get(variable)
        key = (key or "").strip()
        if not key:
            if self.base_url is not None or os.environ.get(self.server_variable):
                return None  # many a server of one's own wants none
            raise MissingKeyError(
                f"No API key for {self.provider}: set the environment variable "
                f"{' or '.join(self.key_variables)}, or pass api_key='$var:name' after "
                "registry.set_var('name', key)."
            )
        if not key.isascii() or not key.isprintable():
            key = None  # tracebacks may show variables
            raise MissingKeyError(
                f"The API key for {self.provider} holds characters that no key has, such as a line "
                "break; set it again."
            )
        return SecretStr(key)

    def _advice(self) -> str:
        return (
            f"Check the key: {' or '.join(self.key_variables)} in the environment, or the variable "
            "that api_key names."
        )

    def _secrets(self, key: SecretStr | None) -> dict[str, str]:
        hidden = self._resolved()
        masked = variables.mask(hidden, self.sensitive_keys())
        pairs = zip(variables.leaves(hidden), variables.leaves(masked), strict=True)
        found = {
            leaf: variables.MASK
            for leaf, shown_ in pairs
            if isinstance(leaf, str) and leaf is not shown_
        }
        # "Bearer secret" is refused as "secret"
        found.update({word: variables.MASK for leaf in list(found) for word in leaf.split()[1:]})
        if key:
            found[key.get_secret_value()] = variables.MASK
        return found

    def _resolved(self) -> dict[str, Any]:
        """The fields; a reference that a pickle brought is looked up now."""
        fields = {name: self.__dict__.get(name) for name in type(self).model_fields}
        sensitive = {name: fields[name] for name in self.sensitive_keys()}
        return {**fields, **variables.resolve(sensitive).args}

    def _is_variable(self, name: str) -> bool:
        return variables.has_reference((self._original_args or {}).get(name))

    def _shown_name(self) -> str:
        """The model as a table may store it: what a variable holds is not."""
        return str((self._original_args or {})["name"]) if self._is_variable("name") else self.name

    def _with_retries(self, call: Any) -> Any:
        return call  # each request is retried by itself

    def __getstate__(self) -> dict[Any, Any]:
        # a pickle takes references along, no secrets; the other process looks them up
        state = super().__getstate__()
        written = self._original_args or {}
        fields = dict(state["__dict__"])
        for name in self.sensitive_keys():
            reference = written.get(name)
            fields[name] = reference if variables.has_reference(reference) else None
        state["__dict__"] = fields
        return state
