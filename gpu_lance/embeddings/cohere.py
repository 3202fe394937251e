"""The provider ``cohere``: text models of Cohere, told whether a text is stored or searched for."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import SecretStr

from gpu_lance.embeddings.api_answers import BadAnswer
from gpu_lance.embeddings.api_connection import Connection
from gpu_lance.embeddings.api_function import ApiEmbeddingFunction
from gpu_lance.embeddings.api_http import bounded
from gpu_lance.embeddings.staged import derived
from gpu_lance.optional import require
from gpu_lance.types import Side

# What LanceDB takes where a table names no model; our tables always name theirs.
_LANCEDB_DEFAULT = "embed-multilingual-v2.0"


class CohereEmbeddingFunction(ApiEmbeddingFunction):
    """Text embeddings by Cohere's API.

    Parameters
    ----------
    name : str
        A model. The default is not LanceDB's, which is ``embed-multilingual-v2.0``.
    source_input_type, query_input_type : str
        What Cohere is told of texts that are stored, and of texts that are searched for:
        ``search_document``, ``search_query``, ``classification`` or ``clustering``.
    dim : int, optional
        The length of a vector, for ``embed-v4.0`` and models that are not known here.
    api_key, base_url, max_retries, timeout, batch_size, ...
        See :class:`ApiEmbeddingFunction`.

    Notes
    -----
    Cohere cuts a text that is too long for the model at its end.

    Examples
    --------
    >>> CohereEmbeddingFunction.create().ndims()
    1024
    """

    cache_queries: ClassVar[bool] = True
    provider: ClassVar[str] = "cohere"
    models: ClassVar[Mapping[str, int]] = {
        "embed-v4.0": 1536,
        "embed-english-v3.0": 1024,
        "embed-multilingual-v3.0": 1024,
        "embed-english-light-v3.0": 384,
        "embed-multilingual-light-v3.0": 384,
        "embed-english-v2.0": 4096,
        "embed-english-light-v2.0": 1024,
        "embed-multilingual-v2.0": 768,
    }
    flexible: ClassVar[frozenset[str]] = frozenset({"embed-v4.0"})
    key_variables: ClassVar[tuple[str, ...]] = ("COHERE_API_KEY", "CO_API_KEY")
    server_variable: ClassVar[str] = "CO_API_URL"
    most_texts: ClassVar[int] = 96

    name: str = "embed-english-v3.0"
    source_input_type: str = "search_document"
    query_input_type: str = "search_query"

    @classmethod
    def from_stored(cls, arguments: Mapping[str, Any]) -> Self:
        """Return an instance from what a table stores; without a name LanceDB wrote it."""
        return super().from_stored({"name": _LANCEDB_DEFAULT, **arguments})

    def safe_model_dump(self) -> dict[str, Any]:
        """Return the arguments to store in a table, always with the name of the model."""
        return {"name": self.name, **super().safe_model_dump()}

    def fingerprint(self) -> dict[str, str]:
        """Return what decides the values of the vectors."""
        return {**super().fingerprint(), "input_type": self.source_input_type}

    @derived
    def compute_source_embeddings(  # type: ignore[override]  # the names of arguments differ
        self, items: Any, *args: Any, **kwargs: Any
    ) -> list[Any]:
        """Embed one text or a column; `input_type` takes the place of `source_input_type`."""
        if kind := kwargs.pop("input_type", None):
            other = self.model_copy(update={"source_input_type": kind})
            return other.compute_source_embeddings(items)
        return super().compute_source_embeddings(items)

    @derived
    def generate_embeddings(self, texts: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """Embed texts as sources; `input_type` takes the place of `source_input_type`."""
        return self.compute_source_embeddings(texts, **kwargs)

    def open(self, key: SecretStr | None) -> tuple[Any, Any]:
        """Make the client of this function."""
        cohere = require("cohere", extra="cohere")
        http = _http_client(self.timeout)
        more = {"base_url": self.base_url.rstrip("/")} if self.base_url else {}
        client = cohere.ClientV2(
            api_key=key.get_secret_value() if key else "none",
            httpx_client=http,
            timeout=self.timeout,
            **more,
        )
        return (client, http), http.close

    def ask(
        self, connection: Connection, texts: list[str], side: Side, length: int | None
    ) -> bytes:
        """Send one request."""
        kind = self.query_input_type if side is Side.QUERY else self.source_input_type
        more = {} if length is None else {"output_dimension": length}
        client, http = connection.client
        client.embed(
            texts=texts,
            model=self.name,
            input_type=kind,
            embedding_types=["float"],
            request_options={"max_retries": 0, "timeout_in_seconds": self.timeout},
            **more,
        )
        return bytes(http.last.content)

    def answer_headers(self, connection: Connection) -> Mapping[str, str] | None:
        """The headers of the last answer, which the errors of an older client lack."""
        headers = getattr(connection.client[1].last, "headers", None)
        return None if headers is None else dict(headers)

    def rows_of(self, body: Any, count: int) -> Any:
        """Return the vectors in an answer."""
        found = body.get("embeddings") if isinstance(body, dict) else None
        if isinstance(found, dict):
            found = found.get("float")
        if not isinstance(found, list):
            raise BadAnswer("no 'embeddings' in it")
        return found


def _http_client(timeout: float) -> Any:
    """An HTTP client that keeps each thread's last answer.

    Cohere's client makes five Python objects of each number of an answer. It gets an answer
    without vectors, and those are read from the bytes.
    """
    httpx = require("httpx", extra="cohere")
    empty = json.dumps({"id": "", "embeddings": {}, "response_type": "embeddings_by_type"})
    local = threading.local()

    class Client(bounded(httpx.Client)):  # type: ignore[misc]
        def send(self, request: Any, **arguments: Any) -> Any:
            local.last = None
            response = super().send(request, **arguments)
            local.last = response
            if response.status_code != 200 or not request.url.path.endswith("/embed"):
                return response
            return httpx.Response(200, text=empty, request=request)

        @property
        def last(self) -> Any:
            return getattr(local, "last", None)

    return Client(timeout=timeout)
