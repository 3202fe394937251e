"""The provider ``openai``: text models of OpenAI, Azure, and every server that speaks like them."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

from pydantic import SecretStr

from gpu_lance.embeddings.api_answers import BadAnswer, in_order
from gpu_lance.embeddings.api_connection import Connection, check_server
from gpu_lance.embeddings.api_failures import Failure
from gpu_lance.embeddings.api_function import ApiEmbeddingFunction
from gpu_lance.embeddings.api_http import bounded
from gpu_lance.optional import require
from gpu_lance.types import Side


class OpenAIEmbeddings(ApiEmbeddingFunction):
    """Text embeddings by OpenAI's API.

    Parameters
    ----------
    name : str
        A model, or with `use_azure` a deployment.
    dim : int, optional
        The length of a vector. The models ``text-embedding-3-*`` are asked for it; another server
        is, if its vectors have another length.
    base_url : str, optional
        Of a server that speaks OpenAI's protocol. It may want no key.
    default_headers : dict of str to str, optional
        More headers. They may hold secrets, so each is a ``"$var:name"``, or all of them are one.
    organization : str, optional
        Sent along.
    use_azure : bool
        Whether the server is Azure's; its address and version are read from
        ``AZURE_OPENAI_ENDPOINT`` and ``OPENAI_API_VERSION``.
    api_key, max_retries, timeout, batch_size, ...
        See :class:`ApiEmbeddingFunction`.

    Examples
    --------
    >>> OpenAIEmbeddings.create().ndims()
    1536
    >>> OpenAIEmbeddings.create(name="text-embedding-3-large", dim=256).ndims()
    256
    """

    cache_queries: ClassVar[bool] = True
    provider: ClassVar[str] = "openai"
    models: ClassVar[Mapping[str, int]] = {
        "text-embedding-ada-002": 1536,
        "text-embedding-3-small": 1536,
        "text-embedding-3-large": 3072,
    }
    flexible: ClassVar[frozenset[str]] = frozenset(
        {"text-embedding-3-small", "text-embedding-3-large"}
    )
    key_variables: ClassVar[tuple[str, ...]] = ("OPENAI_API_KEY",)
    server_variable: ClassVar[str] = "OPENAI_BASE_URL"
    most_texts: ClassVar[int] = 2048
    most_tokens: ClassVar[int | None] = 300_000
    most_item_tokens: ClassVar[int | None] = 8191

    name: str = "text-embedding-ada-002"
    default_headers: dict[str, str] | None = None
    organization: str | None = None
    use_azure: bool = False

    @staticmethod
    def sensitive_keys() -> list[str]:
        """Return the arguments that hold secrets."""
        return ["api_key", "default_headers"]

    @staticmethod
    def model_names() -> list[str]:
        """Return the models whose length is known."""
        return list(OpenAIEmbeddings.models)

    def open(self, key: SecretStr | None) -> tuple[Any, Any]:
        """Make the client of this function."""
        openai = require("openai", extra="openai")
        http = bounded(openai.DefaultHttpxClient)()
        # the client insists on a key, also where the server wants none; Azure's reads its own
        no_key = None if self.use_azure else "none"
        arguments: dict[str, Any] = {
            "base_url": self.base_url,
            "default_headers": self._resolved()["default_headers"],
            "organization": self.organization,
            "api_key": key.get_secret_value() if key else no_key,
        }
        make = openai.AzureOpenAI if self.use_azure else openai.OpenAI
        client = make(
            **{name: value for name, value in arguments.items() if value},
            max_retries=0,
            timeout=self.timeout,
            http_client=http,
        )
        check_server(str(client.base_url), self.server_variable)
        return client, client.close

    def ask(
        self, connection: Connection, texts: list[str], side: Side, length: int | None
    ) -> bytes:
        """Send one request."""
        more = {} if length is None else {"dimensions": length}
        # as bytes: the client would turn every number into a Python object
        answer = connection.client.embeddings.with_raw_response.create(
            input=texts,
            model=self.name,
            encoding_format="float" if connection.plain else "base64",
            timeout=self.timeout,
            **more,
        )
        return bytes(answer.content)

    def rows_of(self, body: Any, count: int) -> Any:
        """Return the vectors in an answer."""
        if not isinstance(body, dict) or "data" not in body:
            raise BadAnswer("no 'data' in it")
        return in_order(body["data"], count)

    def adapt(self, connection: Connection, failure: Failure) -> bool:
        """Ask for lists where a server knows no base64."""
        about_it = "encoding_format" in failure.mentions or "base64" in failure.mentions
        if connection.plain or not about_it:
            return False
        connection.plain = True
        return True

    def query_state(self) -> Hashable:
        """Return what the environment says of the server."""
        if not self.use_azure:
            return super().query_state()
        token = SecretStr(os.environ.get("AZURE_OPENAI_AD_TOKEN", ""))
        return (token, *map(os.environ.get, ("AZURE_OPENAI_ENDPOINT", "OPENAI_API_VERSION")))

    def _key(self) -> SecretStr | None:
        if not self.use_azure:
            return super()._key()
        # the client reads its own variables and tells which are missing
        key = self._resolved()["api_key"] or os.environ.get("AZURE_OPENAI_API_KEY")
        return SecretStr(key) if key else None

    def _secrets(self, key: SecretStr | None) -> dict[str, str]:
        token = os.environ.get("AZURE_OPENAI_AD_TOKEN") if self.use_azure else None
        return super()._secrets(key) | ({token: "***"} if token else {})
