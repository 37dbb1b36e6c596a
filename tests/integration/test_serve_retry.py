"""Replicas that die, as Ray's proxy meets them: a request is tried again before its first byte, and told afterwards."""

import json
import threading
import time

import httpx
import pytest

from serve.front.retry import Retry
from tests.helpers.http_server import BODY, JSON, connect, guarded, head_of, serving


class Dying:
    """Behaves as Ray's proxy does when replicas die: `lives` says what each attempt does before it ends."""

    def __init__(self, *lives: str) -> None:
        self.lives, self.bodies, self.replicas = list(lives), [], 1

    async def __call__(self, scope, receive, send):
        self.bodies.append((await receive())["body"])
        life = self.lives.pop(0)
        if life == "waits":  # for a replica, until the client goes away
            self.replicas = 0
            assert (await receive())["type"] == "http.disconnect"
            return
        if life == "busy":
            await send({"type": "http.response.start", "status": 503, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"no room"})
            return
        if life in ("head", "half", "whole", "json"):
            kind = b"application/json" if life == "json" else b"text/event-stream; charset=utf-8"
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        if life in ("half", "json"):
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        if life == "whole":
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


def ask(*lives: str) -> tuple[httpx.Response, Dying]:
    dying = Dying(*lives)
    with serving(guarded(Retry(dying, lambda: dying.replicas))) as url:
        return httpx.post(f"{url}/v1/completions", content=BODY, headers=JSON, timeout=30), dying


@pytest.mark.parametrize("lives", [("whole",), ("dies", "whole"), ("head", "busy", "whole")])
def test_a_request_is_tried_again_before_its_first_byte(lives):
    answer, dying = ask(*lives)
    assert (answer.status_code, answer.text) == (200, "data: [DONE]\n\n")
    assert dying.bodies == [BODY] * len(lives)


@pytest.mark.parametrize("lives", [("dies",) * 3, ("dies", "waits"), ("waits",)])
def test_without_a_replica_a_request_ends_with_503(monkeypatch, lives):
    monkeypatch.setattr("serve.front.retry.PATIENCE_S", 0.4)
    monkeypatch.setattr("serve.front.retry.POLL_S", 0.05)
    answer, dying = ask(*lives)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert answer.json()["error"]["code"] == "unavailable"
    assert not dying.lives


def test_a_cut_stream_ends_with_an_error_event():
    answer, _ = ask("half")
    first, last = answer.text.strip().split("\n\n")
    assert first == "data: 1"
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_failed"


def test_a_cut_answer_that_is_no_stream_breaks_off():
    with pytest.raises(httpx.RemoteProtocolError):
        ask("json")


def test_a_client_that_leaves_is_not_tried_for_again():
    gone = threading.Event()

    async def app(scope, receive, send):
        await receive()
        assert (await receive())["type"] == "http.disconnect"
        assert not gone.is_set()
        gone.set()

    with serving(guarded(Retry(app, lambda: None))) as url:
        connect(url, head_of(BODY) + BODY).close()
        assert gone.wait(10)
        time.sleep(0.5)
