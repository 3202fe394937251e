"""Helpers for writers of embedding functions: retries, limits, caches, downloads."""

from __future__ import annotations

import email.utils
import gc
import http.client
import http.server
import logging
import socket
import threading
import urllib.error
import weakref
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from gpu_lance.embeddings import fetch, utils
from gpu_lance.embeddings import retries as retries_module
from gpu_lance.embeddings.retries import is_transient, retry_after, status_of
from gpu_lance.embeddings.utils import (
    FunctionWrapper,
    RateLimiter,
    api_key_not_found_help,
    retry,
    retry_with_exponential_backoff,
    url_retrieve,
    weak_lru,
)
from gpu_lance.errors import FetchError, RefusedURLError

SECRET = "sk-planted-0123456789"


class ApiError(Exception):
    """An error as API clients raise it."""

    def __init__(self, message="", headers=None, **attributes):
        super().__init__(message)
        self.__dict__.update(attributes)
        if headers is not None:
            self.response = SimpleNamespace(headers=headers)


class Clock:
    """Time that passes only while sleeping."""

    def __init__(self):
        self.now = 0.0
        self.slept = []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def failing(*errors):
    """A function that raises each error in turn, then returns how often it was called."""
    left = list(errors)
    calls = []

    def func():
        calls.append(1)
        if left:
            raise left.pop(0)
        return len(calls)

    func.calls = calls
    return func


def http_status(status):
    return [
        ApiError(status_code=status),
        ApiError(status=status),
        ApiError(response=SimpleNamespace(status_code=status)),
        ApiError(response={"ResponseMetadata": {"HTTPStatusCode": status}}),
        urllib.error.HTTPError("http://a", status, "", None, None),
    ]


def named(name, base=Exception):
    return type(name, (base,), {})()


# -- which errors


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 529])
def test_transient_statuses(status):
    for error in http_status(status):
        assert status_of(error) == status
        assert is_transient(error)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_permanent_statuses(status):
    for error in http_status(status):
        assert status_of(error) == status
        assert not is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(),
        ConnectionRefusedError(),
        TimeoutError(),
        http.client.RemoteDisconnected(),
        http.client.IncompleteRead(b""),
        urllib.error.URLError(ConnectionRefusedError()),
        FetchError("slow"),
        named("ReadTimeout"),
        named("Sub", type("ConnectError", (Exception,), {})),
        named("ConnectionError", OSError),  # requests has one of its own
        named("APIConnectionError"),
        named("ServerDisconnectedError"),
        named("EndpointConnectionError"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_transient_types(error):
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        ValueError(),
        TypeError(),
        KeyError(),
        MemoryError(),
        RuntimeError("CUDA out of memory"),
        FileNotFoundError(),
        PermissionError(),
        OSError("disk"),
        ImportError(),
        urllib.error.URLError("no scheme"),
        FetchError("gone", 404),
        RefusedURLError("private"),
        named("OfflineModeIsEnabled", ConnectionError),
        named("AuthenticationError", ConnectionError),
        named("OutOfMemoryError", RuntimeError),
        ApiError(status_code="429"),
        ApiError(code="rate_limit"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_permanent_types(error):
    assert not is_transient(error)


# -- how long to wait


@pytest.mark.parametrize(
    ("headers", "wanted"),
    [
        ({"Retry-After": "3"}, 3.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"Retry-After": email.utils.formatdate(1_000_007, usegmt=True)}, 7.0),
        ({"Retry-After": email.utils.formatdate(999_000, usegmt=True)}, 0.0),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "-1"}, None),
        ({"Retry-After": "inf"}, None),
        ({}, None),
        (None, None),
    ],
)
def test_retry_after(headers, wanted):
    assert retry_after(ApiError(headers=headers), now=1_000_000) == wanted


def test_retry_after_of_urllib():
    headers = http.client.HTTPMessage()
    headers["Retry-After"] = "4"
    assert retry_after(urllib.error.HTTPError("http://a", 429, "", headers, None)) == 4.0


def test_backoff_grows_to_a_limit():
    clock = Clock()
    func = failing(*[ConnectionError()] * 7)
    call = retry_with_exponential_backoff(func, jitter=False, sleep=clock.sleep, clock=clock)
    assert call() == 8
    assert clock.slept == [1, 2, 4, 8, 16, 32, 60]


def test_backoff_with_jitter_waits_between_one_and_two_times_as_long():
    seen = set()
    for _ in range(20):
        clock = Clock()
        func = failing(*[ConnectionError()] * 3)
        retry_with_exponential_backoff(func, 2.0, 3.0, sleep=clock.sleep, clock=clock)()
        for slept, base in zip(clock.slept, [2, 6, 18], strict=True):
            assert base <= slept <= 2 * base
            seen.add(slept)
    assert len(seen) > 30


def test_the_server_decides_how_long():
    clock = Clock()
    func = failing(
        ApiError(status_code=429, headers={"Retry-After": "17"}),
        ApiError(status_code=503, headers={"Retry-After": "0"}),
    )
    assert retry_with_exponential_backoff(func, jitter=False, sleep=clock.sleep, clock=clock)() == 3
    assert clock.slept == [17, 2]  # zero is no wait at all: back off as usual


def test_the_last_error_is_raised_with_a_note():
    clock = Clock()
    errors = [ConnectionError(number) for number in range(9)]
    func = failing(*errors)
    with pytest.raises(ConnectionError) as caught:
        retry_with_exponential_backoff(
            func, jitter=False, max_retries=3, sleep=clock.sleep, clock=clock
        )()
    assert caught.value is errors[3]
    assert caught.value.__notes__ == ["Gave up after 3 retries in 7.0 s."]


def test_zero_retries_and_local_errors_pass_unchanged():
    for error, kwargs in [(ConnectionError(), {"max_retries": 0}), (ValueError(), {})]:
        clock = Clock()
        func = failing(error)
        with pytest.raises(type(error)) as caught:
            retry_with_exponential_backoff(func, sleep=clock.sleep, clock=clock, **kwargs)()
        assert caught.value is error
        assert not hasattr(error, "__notes__")
        assert clock.slept == []
        assert len(func.calls) == 1


def test_the_time_budget_ends_retries():
    clock = Clock()
    func = failing(*[ConnectionError()] * 100)
    with pytest.raises(ConnectionError):
        retry_with_exponential_backoff(
            func, jitter=False, max_retries=50, sleep=clock.sleep, clock=clock
        )()
    assert 540 <= clock.now <= 600
    clock = Clock()
    func = failing(ApiError(status_code=429, headers={"Retry-After": "3600"}))
    with pytest.raises(ApiError):
        retry_with_exponential_backoff(func, sleep=clock.sleep, clock=clock)()
    assert clock.slept == []


def test_log_records_quote_no_message(caplog):
    caplog.set_level(logging.DEBUG)
    func = failing(ApiError(f"Bad key {SECRET}", status_code=500))
    retry_with_exponential_backoff(func, sleep=lambda seconds: None)()
    assert "ApiError (HTTP 500): retry 1 of 7" in caplog.text
    assert SECRET not in caplog.text


def test_wrapped_functions_keep_their_name():
    def embed(texts):
        """Say what."""

    assert retry_with_exponential_backoff(embed).__name__ == "embed"
    assert retry()(embed).__doc__ == "Say what."


def test_retry_decorator(monkeypatch):
    waits = []
    monkeypatch.setattr(retries_module, "pause", waits.append)
    errors = [ValueError(number) for number in range(20)]
    func = failing(*errors)
    with pytest.raises(ValueError) as caught:
        retry(tries=5)(func)()
    assert caught.value is errors[4]
    assert len(func.calls) == 5
    assert waits == [2, 4, 10, 28]
    assert retry(tries=3, delay=0, jitter=0)(failing(ValueError()))() == 2
    with pytest.raises(ValueError):
        retry(retriable=is_transient)(failing(ValueError()))()


# -- the rest


def test_rate_limiter_lets_no_more_begin_in_a_period():
    clock = Clock()
    starts = []
    call = RateLimiter(2, 1.0, sleep=clock.sleep, clock=clock)(lambda: starts.append(clock.now))
    for _ in range(6):
        call()
    assert starts == [0, 0, 1, 1, 2, 2]
    clock.now = 10.0
    call()
    assert starts[-1] == 10.0


@pytest.mark.parametrize(("given", "wanted"), [(0.9, 1), (0, 1), (2.9, 2), (1e30, 2**63 - 1)])
def test_rate_limiter_rounds_down(given, wanted):
    limiter = RateLimiter(max_calls=given)
    assert (limiter.max_calls, limiter.period) == (wanted, 1.0)


def test_function_wrapper_batches():
    sizes = []

    def embed(texts):
        assert type(texts) is list
        sizes.append(len(texts))
        return [[len(text)] for text in texts]

    texts = ["a" * n for n in range(7)]
    for given in (texts, np.array(texts), pa.array(texts), pa.chunked_array([texts])):
        sizes.clear()
        assert FunctionWrapper(embed).batch_size(3)(given) == [[n] for n in range(7)]
        assert sizes == [3, 3, 1]
    sizes.clear()
    assert len(FunctionWrapper(embed)(texts)) == 7
    assert sizes == [7]
    assert FunctionWrapper(embed).batch_size(3)([]) == []
    with pytest.raises(ValueError, match="batch_size is 0"):
        FunctionWrapper(embed).batch_size(0)


def test_function_wrapper_retries_and_limits(monkeypatch):
    waits = []
    monkeypatch.setattr(retries_module, "pause", waits.append)
    errors = [ConnectionError(), ConnectionError()]

    def embed(texts):
        if errors:
            raise errors.pop()
        return texts

    wrapper = FunctionWrapper(embed).retry(tries=3, delay=2).batch_size(2).rate_limit(100, 1.0)
    assert wrapper(["a", "b", "c"]) == ["a", "b", "c"]
    assert waits == [3, 7]
    assert wrapper.retry_kwargs["tries"] == 3
    assert wrapper.rate_limiter_kwargs == {"max_calls": 100, "period": 1.0}
    assert "embed" in repr(wrapper)


def test_function_wrapper_shows_progress(capsys):
    pytest.importorskip("tqdm")
    assert FunctionWrapper(list).batch_size(1).show_progress()(["a", "b"]) == ["a", "b"]
    assert "2/2" in capsys.readouterr().err


class Counted:
    """Counts the calls that a cache lets through; equal to every other of its kind."""

    def __init__(self):
        self.calls = []

    def __eq__(self, other):
        return isinstance(other, Counted)

    __hash__ = None

    @weak_lru(maxsize=2)
    def square(self, x, *, plus=0):
        self.calls.append(x)
        return x * x + plus


def test_weak_lru():
    counted, other = Counted(), Counted()
    assert [counted.square(x) for x in (1, 1, 2, 1, 3, 1, 2)] == [1, 1, 4, 1, 9, 1, 4]
    assert counted.calls == [1, 2, 3, 2]  # 2 was the least recently used when 3 came
    assert counted.square(2, plus=1) == 5
    assert other.square(2) == 4
    assert other.calls == [2]


def test_weak_lru_keeps_nothing_alive():
    counted = Counted()
    counted.square(1)
    alive = weakref.ref(counted)
    del counted
    gc.collect()
    assert alive() is None
    fresh = Counted()
    assert fresh.square(1) == 1
    assert fresh.calls == [1]


def test_api_key_not_found_help(caplog):
    with pytest.raises(ValueError, match="OPENAI_API_KEY"):
        api_key_not_found_help("openai")
    with pytest.raises(ValueError, match="VOYAGE_AI_API_KEY"):
        api_key_not_found_help("voyage-ai")
    assert "openai" in caplog.text


def test_names_of_the_module():
    wanted = {"TEXT", "IMAGES", "AUDIO", "DATA", *utils.__all__}
    assert {name for name in wanted if getattr(utils, name, None) is None} == set()


# -- downloads

BODY = bytes(range(256)) * 400


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        path, _, query = self.path.partition("?")
        if path == "/body":
            self.answer(200, BODY)
        elif path == "/echo":
            self.answer(200, f"{query}|{self.headers['Host']}".encode())
        elif path == "/chunked":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
        elif path == "/redirect":
            self.answer(302, Location=query or "/body")
        elif path == "/loop":
            self.answer(302, Location="/loop")
        elif path == "/status":
            self.answer(int(query[:3]))
        elif path == "/short":
            self.answer(200, b"abc", Content_Length="10")
            self.close_connection = True
        elif path == "/drip":
            self.send_response(200)
            self.end_headers()
            try:
                while not self.server.stop.wait(0.05):
                    self.wfile.write(b"x")
                    self.wfile.flush()
            except OSError:
                pass
            self.close_connection = True


@pytest.fixture(scope="module")
def site():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *args: None  # a client that hangs up is what some tests do
    server.stop = threading.Event()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.stop.set()
    server.shutdown()
    server.server_close()
    thread.join()


def local(url, **kwargs):
    return url_retrieve(url, allow_private=True, **kwargs)


def test_download(site):
    assert local(f"{site}/body") == BODY
    assert local(f"{site}/chunked") == b"abcde"
    assert local(f"{site}/redirect") == BODY
    assert local(f"{site}/redirect?{site}/body") == BODY
    host = site.removeprefix("http://")
    assert local(f"{site}/echo?a=1&b=%20ü#part") == f"a=1&b=%20%C3%BC|{host}".encode()


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://example.com/a",
        "data:text/plain,a",
        "/etc/passwd",
        "http://",
        "http://a:99999/",
        "http://[::1/",
        "http://exa mple.com/",
        "http://example.com/\r\nX: y",
    ],
)
def test_urls_that_are_refused(url):
    with pytest.raises(RefusedURLError):
        local(url)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "localhost",
        "10.0.0.1",
        "192.168.1.1",
        "172.16.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[fe80::1]",
        "[fc00::1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
    ],
)
def test_private_addresses_are_refused(host, monkeypatch):
    def connect(*args, **kwargs):
        raise AssertionError("connected")

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(RefusedURLError, match="allow_private"):
        url_retrieve(f"http://{host}:1/")


@pytest.mark.parametrize("address", ["93.184.215.14", "8.8.8.8", "2606:4700::1111"])
def test_public_addresses(address):
    assert fetch.is_public(address)


def test_a_name_with_one_private_address_is_refused(monkeypatch):
    answers = [(2, 1, 6, "", ("8.8.8.8", 80)), (2, 1, 6, "", ("10.0.0.1", 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: answers)
    with pytest.raises(RefusedURLError, match=r"10\.0\.0\.1"):
        url_retrieve("http://example.com/")


def test_redirects_are_checked_again(site, monkeypatch):
    monkeypatch.setattr(fetch, "is_public", lambda address: address == "127.0.0.1")
    assert url_retrieve(f"{site}/redirect") == BODY
    other = site.replace("127.0.0.1", "127.0.0.2")
    with pytest.raises(RefusedURLError, match=r"127\.0\.0\.2"):
        url_retrieve(f"{site}/redirect?{other}/body")
    with pytest.raises(RefusedURLError, match="'file'"):
        url_retrieve(f"{site}/redirect?file:///etc/passwd")


def test_the_connection_goes_to_the_checked_address(site, monkeypatch):
    port = int(site.rpartition(":")[2])
    lookups = []

    def resolve(host, *args, **kwargs):
        lookups.append(host)
        return [(2, 1, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(fetch, "is_public", lambda address: True)
    connected = []
    original = socket.create_connection

    def connect(address, *args, **kwargs):
        connected.append(address)
        monkeypatch.undo()  # the real resolver knows the numeric address only
        return original(address, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", connect)
    found = url_retrieve(f"http://changing.example:{port}/echo")
    assert found == f"|changing.example:{port}".encode()
    assert lookups == ["changing.example"]
    assert connected == [("127.0.0.1", port)]


def test_a_size_limit_holds_whatever_is_announced(site):
    assert local(f"{site}/body", max_bytes=len(BODY)) == BODY
    for path in ("body", "chunked"):
        with pytest.raises(RefusedURLError, match="larger than 4 bytes"):
            local(f"{site}/{path}", max_bytes=4)


@pytest.mark.parametrize("status", [404, 500, 204])
def test_a_status_is_reported(site, status):
    with pytest.raises(ConnectionError, match=str(status)) as caught:
        local(f"{site}/status?{status}")
    assert caught.value.status_code == status
    assert is_transient(caught.value) == (status == 500)


def test_other_failures_are_connection_errors(site):
    with pytest.raises(FetchError, match="3 of 10 bytes"):
        local(f"{site}/short")
    with pytest.raises(FetchError, match="more than 5 times"):
        local(f"{site}/loop")
    with pytest.raises(FetchError, match="timeout"):
        local(f"{site}/drip", timeout=0.3)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    with pytest.raises(FetchError, match="could not be downloaded"):
        local(f"http://127.0.0.1:{port}/")
    with pytest.raises(FetchError, match="not found"):
        local("http://no-such-host.invalid/")


def test_errors_do_not_quote_credentials(site):
    url = f"{site}/status?404&signature={SECRET}".replace("http://", f"http://user:{SECRET}@")
    with pytest.raises(FetchError) as caught:
        local(url)
    assert SECRET not in str(caught.value)
    assert "/status" in str(caught.value)
