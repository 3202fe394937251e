"""Why a request to an API gave no vectors, in words that hold no secret, and what to do then."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

from gpu_lance.embeddings.retries import is_transient, status_of
from gpu_lance.embeddings.variables import redact
from gpu_lance.errors import ApiAccessError, ApiConnectionError, ApiError

LONGEST_REASON = 300  # characters of a server's message

# Of a request that is the same for every text.
_SETTINGS = frozenset(
    "model dimensions encoding_format user input_type embedding_types output_dimension".split()
)
# 429s that no waiting cures.
_SPENT = frozenset({"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"})
# Causes that waiting does not cure, whatever the client makes of them.
_PERMANENT = frozenset(
    "AnswerTooLarge InvalidURL LocalProtocolError SSLCertVerificationError UnicodeEncodeError "
    "UnsupportedProtocol".split()
)
_DEEPEST = 8  # levels of a server's message
_NO_MODEL = ("not found", "does not exist", "unknown", "not supported", "unsupported", "no such")


class Then(Enum):
    """What to do after a failure."""

    AGAIN = "again"  # the same request may succeed later
    DIVIDE = "divide"  # one of its texts may be to blame, or it is too large
    GIVE_UP = "give up"


class Failure(Exception):
    """One request that gave no vectors. It keeps text only, never the client's own error.

    Parameters
    ----------
    reason : str
        What happened, without secrets.
    then : Then
    status : int, optional
        The HTTP status.
    headers : mapping of str to str
        Of the answer; only ``Retry-After`` is kept.
    mentions : str
        The whole message of the server, in lower case.
    """

    def __init__(
        self,
        reason: str,
        then: Then,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
        mentions: str = "",
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.then = then
        self.status_code = status
        self.mentions = mentions
        kept = ("retry-after", "retry-after-ms")
        lower = {str(key).lower(): str(value) for key, value in (headers or {}).items()}
        self.headers = {key: lower[key] for key in kept if key in lower}

    @property
    def for_all(self) -> bool:
        """Whether the server wants everybody to wait, not this request alone."""
        return self.status_code == 429 or bool(self.headers)

    def public(self, name: str, advice: str) -> ApiError:
        """Return the error for the caller of the function `name`."""
        notes = " ".join(getattr(self, "__notes__", ()))
        text = f"{name}: {self.reason}.{' ' + notes if notes else ''}"
        if self.status_code in (401, 403):
            return ApiAccessError(f"{text} {advice}", self.status_code)
        if self.status_code is None and self.then is Then.AGAIN:
            return ApiConnectionError(text)
        return ApiError(text, self.status_code)


def failure_of(
    error: BaseException,
    *,
    secrets: Mapping[str, str],
    model: str,
    headers: Mapping[str, str] | None = None,
) -> Failure:
    """Say what an exception of a client library means.

    Parameters
    ----------
    error : BaseException
        Anything that the client raised.
    secrets : mapping of str to str
        What must not be shown, and what to show instead.
    model : str
        The name of the model, to tell a refused model from a refused text.
    headers : mapping, optional
        Of the answer, for a client whose errors have none.

    Examples
    --------
    >>> error = ConnectionResetError("by sk-1234")
    >>> failure = failure_of(error, secrets={"sk-1234": "***"}, model="")
    >>> failure.reason, failure.then.value
    ('no connection to the server (ConnectionResetError: by ***)', 'again')
    """
    status = status_of(error)
    if status is None:
        return _without_status(error, secrets)
    found = (
        headers
        or getattr(error, "headers", None)
        or getattr(getattr(error, "response", None), "headers", None)
    )
    message, code, param = problem_of(getattr(error, "body", None))
    mentions = message.lower()
    said = f": {shown(message, secrets)}" if message else ""

    def failure(then: Then, what: str) -> Failure:
        return Failure(f"{what} (HTTP {status}){said}", then, status, found, mentions=mentions)

    if 300 <= status < 400:
        where = shown((found or {}).get("location") or "elsewhere", secrets)
        what = f"the server redirects to {where}; if you trust that, pass it as base_url"
        return failure(Then.GIVE_UP, what)
    if status < 400:
        return failure(Then.AGAIN, "the server's answer could not be read")
    if status in (401, 403):
        return failure(Then.GIVE_UP, "the server refused the key")
    if status == 429 and code in _SPENT:
        return failure(Then.GIVE_UP, "the account has nothing left to spend")
    if is_transient(error):
        what = "too many requests" if status == 429 else "the server failed"
        return failure(Then.AGAIN, what)
    if status in (400, 413, 422):
        wrong_model = (
            bool(model)
            and model.lower() in mentions
            and any(word in mentions for word in _NO_MODEL)
        )
        if param in _SETTINGS or code == "model_not_found" or wrong_model:
            return failure(Then.GIVE_UP, "the server refused the request")
        return failure(Then.DIVIDE, "the server refused it")
    return failure(Then.GIVE_UP, "the server refused the request")


def shown(text: str, secrets: Mapping[str, str]) -> str:
    """A server's text on one line, short, without a secret.

    Examples
    --------
    >>> shown("bad  key sk-1234", {"sk-1234": "***"})
    'bad key ***'
    """
    plain = " ".join(redact(text, secrets).split())  # first, or half a secret would survive
    plain = redact(plain, secrets).rstrip(" .")
    return plain if len(plain) <= LONGEST_REASON else f"{plain[:LONGEST_REASON]}..."


def problem_of(body: Any, level: int = 0) -> tuple[str, str, str]:
    """Return the message, code and parameter that the body of a refusal names; "" for none.

    Examples
    --------
    >>> problem_of({"error": {"message": "too long", "code": None, "param": "input"}})
    ('too long', '', 'input')
    >>> problem_of({"detail": [{"loc": ["body", "input"], "msg": "too long"}]})
    ('too long', '', '')
    """
    if level > _DEEPEST:
        return "", "", ""
    if isinstance(body, bytes):
        body = body.decode("utf-8", "replace")
    if isinstance(body, str):
        try:
            parsed = json.loads(body)
        except (ValueError, RecursionError):
            return body, "", ""
        return problem_of(parsed, level + 1) if isinstance(parsed, dict | list) else (body, "", "")
    if isinstance(body, list):
        return ("; ".join(filter(None, (problem_of(part, level + 1)[0] for part in body))), "", "")
    if not isinstance(body, Mapping):
        return "", "", ""
    inner = body.get("error")
    if isinstance(inner, Mapping):
        body = inner
    for key in ("message", "msg", "detail", "error"):
        message = body.get(key)
        if isinstance(message, list | Mapping):
            message = problem_of(message, level + 1)[0]
        if isinstance(message, str) and message:
            return message, str(body.get("code") or ""), str(body.get("param") or "")
    return "", str(body.get("code") or ""), str(body.get("param") or "")


def _without_status(error: BaseException, secrets: Mapping[str, str]) -> Failure:
    chain = list(_causes(error))
    last = chain[-1]
    said = shown(str(last), secrets)
    detail = f"{type(last).__name__}: {said}" if said else type(last).__name__
    if any("Timeout" in type(cause).__name__ for cause in chain):
        return Failure("the server did not answer in time", Then.AGAIN)
    permanent = any(type(cause).__name__ in _PERMANENT for cause in chain)
    if is_transient(error) and not permanent:
        return Failure(f"no connection to the server ({detail})", Then.AGAIN)
    return Failure(f"the request failed ({detail})", Then.GIVE_UP)


def _causes(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    for _ in range(8):
        if current is None:
            return
        yield current
        current = current.__cause__ or current.__context__
