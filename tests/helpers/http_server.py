"""A server on a free port without Ray, and clients for it: httpx, and raw sockets that send what no library sends."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import uvicorn

from attnzoo.tokenizer import Tokenizer
from serve.async_engine import AsyncEngine
from serve.config import ServeConfig
from serve.engine import Engine
from serve.front import guard as guard_module
from serve.front.limits import Limits
from serve.front.protocol import bounded_protocol
from serve.openai.routes import build_app
from tests.helpers import plain_http  # noqa: F401
from tests.helpers.serving import small_model, tokenizer

MODEL = "small"
JSON = {"content-type": "application/json"}
BODY = json.dumps({"model": MODEL, "prompt": "Hello", "max_tokens": 2}).encode()


@contextlib.contextmanager
def serving(app: Any, limits: Limits | None = None, **options: Any) -> Iterator[str]:
    """Any ASGI application on a free port; yields its URL. `options` are uvicorn's."""
    http = bounded_protocol(limits or Limits())
    options = {"log_level": "critical", "lifespan": "off", **options}
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, http=http, **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive(), "started")
        assert thread.is_alive()
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@contextlib.contextmanager
def running(
    kind: str = "rcmha",
    *,
    delay_s: float = 0.0,
    words: Tokenizer | None = None,
    max_len: int = 256,
    **settings: Any,
) -> Iterator[tuple[str, AsyncEngine]]:
    """A server of a small model; yields (URL, engine). `delay_s` slows every step down; `words`: its tokenizer;
    `max_len`: its context."""
    settings = {"max_num_seqs": 4, "max_batched_tokens": 16, "max_queue": 32, "model_name": MODEL, **settings}
    config = ServeConfig(checkpoint="none", drain_timeout_s=5.0, **settings)
    engine = Engine(config, model=small_model(kind, max_len=max_len), tokenizer=words or tokenizer())
    if delay_s:
        step = engine.step
        engine.step = lambda: (time.sleep(delay_s), step())[1]  # type: ignore[method-assign]
    with running_engine(engine, config) as found:
        yield found


@contextlib.contextmanager
def running_engine(engine: Engine, config: ServeConfig) -> Iterator[tuple[str, AsyncEngine]]:
    """A server of an engine; yields (URL, engine)."""
    owner = AsyncEngine(engine)
    with serving(build_app(owner, config), config.front_limits, log_level="warning", lifespan="auto") as url:
        yield url, owner
    assert not owner._thread.is_alive()


def guarded(app: Any, limits: Limits | None = None) -> Any:
    """An ASGI application behind the guards of the front."""
    for middleware in reversed(guard_module.guard(limits or Limits())):
        app = middleware.cls(app, *middleware.args, **middleware.kwargs)
    return app


def events(response_text: str) -> list[Any]:
    """The events of a whole stream."""
    lines = [line.removeprefix("data: ") for line in response_text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def post(url: str, **fields: Any) -> httpx.Response:
    """Asks for a completion of "Hello"."""
    return httpx.post(f"{url}/v1/completions", json={"model": MODEL, "prompt": "Hello", **fields}, timeout=30)


def wait_until(condition: Callable[[], Any], what: str) -> None:
    """Half a minute at most."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError(f"never: {what}")


def connect(url: str, sent: bytes = b"") -> socket.socket:
    """A raw connection on which `sent` was sent."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(sent)
    return connection


def half_sent(url: str, sent: bytes = b"") -> socket.socket:
    """A request whose body of 500 bytes has only begun."""
    return connect(url, head_of(b" " * 500) + sent)


def answer_of(connection: socket.socket) -> tuple[int, str]:
    """Status and error code of what the server says before it closes the connection; (0, "") when it says nothing."""
    received = b""
    try:
        while part := connection.recv(1 << 16):
            received += part
    except ConnectionError:
        pass
    connection.close()
    if not received:
        return 0, ""
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def ends_while_sent_to(connection: socket.socket, data: bytes) -> bool:
    """Whether the server ends the connection although data keeps coming."""
    with connection:
        for _ in range(300):
            try:
                connection.sendall(data)
            except OSError:
                return True
            time.sleep(0.03)
    return False


def head_of(body: bytes, **headers: str) -> bytes:
    """The head of a request with that body; underscores in names of headers stand for hyphens."""
    fields = {"host": "localhost", **JSON, "content-length": str(len(body)), **headers}
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    return f"POST /v1/completions HTTP/1.1\r\n{lines}\r\n".encode()


def open_request(url: str, **fields: Any) -> socket.socket:
    """A whole request on a raw connection, which can be dropped at any time."""
    body = json.dumps({"model": MODEL, "prompt": "Hello", "ignore_eos": True, **fields}).encode()
    return connect(url, head_of(body) + body)
