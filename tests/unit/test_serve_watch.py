"""What the terminal says while a server runs, as seen through its port."""

import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from serve import watch
from serve.watch import Watch


class Health(BaseHTTPRequestHandler):
    """Answers as the server's status says."""

    def do_GET(self) -> None:
        assert (self.path, self.headers["host"]) == ("/health", "localhost")
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server():
    with HTTPServer(("127.0.0.1", 0), Health) as found:
        found.status, found.body = 200, b"{}"
        thread = threading.Thread(target=found.serve_forever, args=(0.01,))
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def test_trouble_and_its_end_are_said_once(server):
    said: list[str] = []
    looker = Watch(f"http://127.0.0.1:{server.server_port}", lambda: "attnzoo: 1 starting", said.append)
    assert looker.look()
    assert said == []
    server.status, server.body = 503, b'{"error": {"message": "started anew"}}'
    assert looker.look()
    assert looker.look()
    assert said == ["not answering: /health: 503, started anew (attnzoo: 1 starting)"]
    server.body = b"no JSON"
    assert looker.look()
    assert said[1:] == ["not answering: /health: 503 (attnzoo: 1 starting)"]
    server.status = 200
    assert looker.look()
    assert said[2:] == ["answering again after 0 s"]
    assert looker.look()
    assert len(said) == 3


def test_a_port_without_a_server_and_a_ray_that_is_gone(monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]

        def gone() -> str:
            raise ConnectionError("no controller")

        said: list[str] = []
        looker = Watch(f"http://0.0.0.0:{port}", gone, said.append)
        assert looker.look()
        assert "ConnectionRefusedError" in said[0]
        assert "Ray does not answer: ConnectionError" in said[0]
        monkeypatch.setattr(watch, "GIVE_UP_S", 0.0)
        assert not looker.look()


def test_a_ray_that_hangs_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(watch, "ANSWER_S", 0.1)
    release = threading.Event()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        said: list[str] = []
        looker = Watch(f"http://127.0.0.1:{silent.getsockname()[1]}", lambda: str(release.wait(20)), said.append)
        try:
            assert looker.look()
        finally:
            release.set()
    assert "timed out" in said[0]
    assert "Ray does not answer within 0.1 s" in said[0]
