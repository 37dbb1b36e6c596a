"""An endpoint of OpenAI's form over HTTP, which answers what a test wants."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from tests.helpers.training import ROOT


class ChatEndpoint(HTTPServer):
    """replies: what it answers by path: content, a text that is sent as it stands, or a function of the request's
    content that gives one of these, or a status and one of these. coding: what it says of its coding."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.replies: dict[str, Any] = {"/models": {"data": [{"id": "m"}]}}
        self.coding: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Answer(BaseHTTPRequestHandler):
    server: ChatEndpoint

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

    def _answer(self, request: Any) -> None:
        reply = self.server.replies[self.path.removeprefix("/v1")]
        found = reply(request) if callable(reply) else reply
        status, content = found if isinstance(found, tuple) else (200, found)
        body = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        if self.server.coding is not None:
            self.send_header("content-encoding", self.server.coding)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Tests have nothing to say."""


@contextmanager
def chat_endpoint() -> Iterator[ChatEndpoint]:
    """One that runs."""
    with ChatEndpoint() as found:
        threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True).start()
        yield found
        found.shutdown()


def stopped(endpoint: ChatEndpoint, words: list[str], path: str) -> str:
    """What a command says on stderr after Ctrl-C while the endpoint thinks about a request for `path`. The command is a
    process of its own; its status must be 130, and it must not wait for the endpoint."""
    asked, done = threading.Event(), threading.Event()

    def thinks(_: Any) -> Any:
        asked.set()
        done.wait(60)
        return {}

    endpoint.replies[path] = thinks
    process = subprocess.Popen([sys.executable, "-m", "attnzoo", *words], cwd=ROOT, text=True, stderr=subprocess.PIPE)
    try:
        assert asked.wait(120), process.communicate(timeout=60)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=50)
        assert not done.is_set()
    finally:
        done.set()
        process.kill()
        process.wait(10)
    assert process.returncode == 130, errors
    return errors


def told_when_stopped(path: str, answers: Path | None) -> str:
    """What a command must say after Ctrl-C during a request for `path`. answers: the file that keeps them."""
    if path == "/models":
        return "stopped before anything was asked"
    if answers is None:
        return "stopped; nothing is kept: only --answers FILE keeps what was answered"
    return f"stopped; '{answers}' keeps what was answered; the same command goes on from there"
