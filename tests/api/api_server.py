"""A server that speaks as OpenAI's and Cohere's do, and does what a test tells it to do wrong."""

from __future__ import annotations

import base64
import json
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from gpu_lance.embeddings import get_registry

KEY = "sk-very-secret-0123456789abcdef"


@dataclass
class Asked:
    """A request as it arrived."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    at: float

    @property
    def texts(self) -> list[str]:
        return self.body["input"] if "input" in self.body else self.body["texts"]


@dataclass
class Answer:
    """What the server sends; `body` is JSON, or bytes as they are."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    announce: int | None = None  # a Content-Length that is not kept
    drip: float | None = None  # seconds between two bytes of the body


def vector_of(text: str, dims: int) -> np.ndarray:
    """The vector of a text: (dims,), float32, of length 1."""
    vector = np.random.default_rng(zlib.crc32(text.encode())).standard_normal(dims)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


class ApiServer:
    """An embedding server; `misbehave` may answer a request otherwise, None leaves it to us.

    Parameters
    ----------
    dims : int
        The length of its vectors, unless a request asks for another.
    """

    def __init__(self, dims: int = 8) -> None:
        self.dims = dims
        self.misbehave: Callable[[Asked, int], Answer | None] = lambda asked, number: None
        self.lists = False  # whether it ignores a wish for base64
        self.asked: list[Asked] = []
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()
        self.released = threading.Event()  # ends what hangs
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked = Asked(self.path, dict(self.headers.items()), body, time.monotonic())
                with outer.lock:
                    outer.asked.append(asked)
                    number = len(outer.asked)
                    outer.under_way += 1
                    outer.most_under_way = max(outer.most_under_way, outer.under_way)
                try:
                    answer = outer.misbehave(asked, number) or outer.answer(asked)
                finally:
                    with outer.lock:
                        outer.under_way -= 1
                content = answer.body
                if not isinstance(content, bytes):
                    content = json.dumps(content).encode()
                try:
                    self.send_response(answer.status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(answer.announce or len(content)))
                    for name, value in answer.headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    if answer.drip is None:
                        self.wfile.write(content)
                    else:
                        for byte in content:
                            self.wfile.write(bytes([byte]))
                            if outer.released.wait(answer.drip):
                                break
                    if answer.announce:
                        self.close_connection = True
                except OSError:
                    self.close_connection = True  # it gave up waiting

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def texts(self) -> list[str]:
        return [text for asked in self.asked for text in asked.texts]

    def answer(self, asked: Asked) -> Answer:
        """The right answer, in the form of the API that was called."""
        if asked.path.endswith("/v2/embed"):
            dims = asked.body.get("output_dimension", self.dims)
            # Cohere's vectors tell sources and queries apart
            kind = asked.body["input_type"]
            rows = [vector_of(f"{kind}:{text}", dims).tolist() for text in asked.texts]
            return Answer(body=cohere_body(rows))
        dims = asked.body.get("dimensions", self.dims)
        rows = [vector_of(text, dims) for text in asked.texts]
        if asked.body.get("encoding_format") == "base64" and not self.lists:
            return Answer(body=openai_body([base64.b64encode(row).decode() for row in rows]))
        return Answer(body=openai_body([row.tolist() for row in rows]))

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def openai_body(rows: list[Any]) -> dict[str, Any]:
    """The wire format of OpenAI."""
    data = [
        {"object": "embedding", "index": place, "embedding": row} for place, row in enumerate(rows)
    ]
    usage = {"prompt_tokens": 1, "total_tokens": 1}
    return {"object": "list", "model": "m", "data": data, "usage": usage}


def cohere_body(rows: list[Any]) -> dict[str, Any]:
    """The wire format of Cohere."""
    return {
        "id": "1",
        "texts": ["" for _ in rows],
        "embeddings": {"float": rows},
        "response_type": "embeddings_by_type",
        "meta": {"api_version": {"version": "2"}, "billed_units": {"input_tokens": 1}},
    }


def body_of(provider: str, rows: list[Any]) -> dict[str, Any]:
    """The wire format of a provider."""
    return openai_body(rows) if provider == "openai" else cohere_body(rows)


def refusal(status: int, message: str, **more: Any) -> Answer:
    """An error as OpenAI and Cohere both understand it."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return Answer(status, {"error": {**error, **more}, "message": message})


def make(provider: str, url: str, **arguments: Any) -> Any:
    """A function whose server is there."""
    if provider == "openai":
        url += "/v1"
    return get_registry().get(provider).create(name="tiny", dim=8, base_url=url, **arguments)
