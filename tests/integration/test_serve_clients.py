"""Clients that crowd in, go away or dawdle, and a server that closes: nobody is held up, nothing is left behind."""

import asyncio
import contextlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.helpers.http_server import (
    connect,
    half_sent,
    open_request,
    post,
    running,
    wait_until,
)


@pytest.fixture(scope="module")
def server():
    with running() as (url, owner):
        yield url, owner


def test_a_full_queue_answers_429_and_recovers():
    with running(delay_s=0.03, max_num_seqs=1, max_queue=1) as (url, owner), ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda i: post(url, max_tokens=8, ignore_eos=True), range(6)))
        codes = sorted(answer.status_code for answer in answers)
        assert codes[:2] == [200, 200]
        assert codes[-1] == 429
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert refused.headers["retry-after"] == "1"
        counted = owner.engine.metrics.registry.get_sample_value
        assert counted("attnzoo_http_responses_total", {"status": "429"}) == codes.count(429)
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert post(url, max_tokens=2).status_code == 200
        # Three prompts can never be admitted here: no waiting helps.
        assert post(url, prompt=["a", "b", "c"]).status_code == 400
        assert not owner._streams


def test_more_choices_than_ever_run_or_wait_are_no_full_queue():
    with running(max_num_seqs=2, max_queue=1) as (url, _):
        answer = post(url, n=4, max_tokens=2)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")
        assert "more than the 3 completions" in answer.json()["error"]["message"]
        assert post(url, n=3, max_tokens=2).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot(stream):
    with running(delay_s=0.1, max_num_seqs=1) as (url, owner):
        scheduler = owner.engine.scheduler
        decoding = open_request(url, max_tokens=240, stream=stream)
        wait_until(lambda: scheduler.num_running == 1, "running")
        waiting = open_request(url, max_tokens=240, stream=stream)
        wait_until(lambda: scheduler.num_waiting == 1, "waiting")
        waiting.close()
        wait_until(lambda: scheduler.num_waiting == 0, "gone from the queue")
        assert scheduler.num_running == 1
        if stream:
            assert b"200 OK" in decoding.recv(100)
        decoding.close()
        wait_until(lambda: scheduler.num_running == 0, "gone from its slot")
        steps = owner.engine.metrics.registry.get_sample_value("attnzoo_steps_total")
        assert steps < 200
        counted = owner.engine.metrics.registry.get_sample_value
        name, reason = "attnzoo_request_success_total", {"finished_reason": "abort"}
        wait_until(lambda: counted(name, reason) == 2, "counted")  # after the slot is free, by the engine's thread
        wait_until(lambda: not owner._streams, "streams closed")
        assert post(url, max_tokens=2).status_code == 200


HEALTH = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
POSTED = HEALTH.replace(b"GET /health", b"POST /v1/completions")[:-2] + b"content-type: application/json\r\n"
LONG, LONGER = (POSTED + b"content-length: %d\r\n\r\n" % size for size in (300_000, 9_000_000))
BEHIND = {
    "one": HEALTH,
    "thirty": 30 * HEALTH,
    "ninety": 90 * HEALTH,
    "part of a head": HEALTH[:20],
    "part of a body": LONG + bytes(200_000),
    "a body": LONG + bytes(300_000),
    "too much": LONGER + bytes(1 << 22),
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("what", BEHIND)
def test_a_client_that_goes_away_has_asked_for_more_already(stream, what):
    """What it sent behind its request is not begun, and the request ends."""
    with running(delay_s=0.1, max_num_seqs=1) as (url, owner):
        scheduler = owner.engine.scheduler
        decoding = open_request(url, max_tokens=240, stream=stream)
        wait_until(lambda: scheduler.num_running == 1, "running")
        with contextlib.suppress(ConnectionError):  # which the server ends where that is too much
            decoding.sendall(BEHIND[what])
        if what not in ("ninety", "too much"):
            time.sleep(0.2)
            assert scheduler.num_running == 1
        decoding.close()
        wait_until(lambda: scheduler.num_running == 0, "gone from its slot")
        assert owner.engine.metrics.registry.get_sample_value("attnzoo_steps_total") < 200
        assert post(url, max_tokens=2).status_code == 200


def test_requests_that_are_sent_at_once_are_answered_in_order(server):
    url, _ = server
    connection = open_request(url, max_tokens=3, stream=False)
    connection.sendall(30 * HEALTH + HEALTH.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
    received = b""
    while data := connection.recv(65536):
        received += data
    assert received.count(b"HTTP/1.1 200 OK") == 32
    assert received.index(b"usage") < received.index(b'{"status":"ok"}')


def test_a_client_gone_in_its_body_is_no_error(caplog):
    with caplog.at_level("DEBUG"), running() as (url, _):
        for sent in (b"", b'{"model"'):
            half_sent(url, sent=sent).close()
        connect(url, b"POST /v1/comp").close()
        assert post(url, max_tokens=2).status_code == 200
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]
    assert "Traceback" not in caplog.text


def test_a_storm_of_dropped_connections_leaves_nothing_behind(server):
    url, owner = server
    for index in range(60):
        connection = open_request(url, max_tokens=200, stream=index % 2 == 0)
        if index % 3 == 0:
            connection.recv(1)
        connection.close()

    def nothing_left() -> bool:
        """The last requests may reach the server after it was idle for a moment, so the slots are looked at again."""
        idle = not owner._streams and not owner.engine.has_work()
        return idle and not any(tensor.any() for tensor in owner.engine.runner.full.state.tensors().values())

    wait_until(nothing_left, "empty slots")
    assert post(url, max_tokens=2).status_code == 200


def test_a_slow_reader_holds_up_nobody(server):
    url, _ = server
    slow = open_request(url, max_tokens=250, stream=True)
    assert post(url, max_tokens=20).status_code == 200
    received = b""
    while b"[DONE]" not in received:
        received += slow.recv(64)
    slow.close()


def test_shutdown_lets_running_requests_finish():
    with ThreadPoolExecutor(1) as pool:
        with running(delay_s=0.02) as (url, owner):
            answer = pool.submit(post, url, max_tokens=40, ignore_eos=True)
            wait_until(lambda: owner.engine.scheduler.num_running == 1, "running")
            owner.draining = True
            assert post(url, max_tokens=2).status_code == 503
            assert httpx.get(f"{url}/health").status_code == 503
        assert answer.result().json()["usage"]["completion_tokens"] == 40


@pytest.mark.parametrize("stream", [True, False])
def test_a_drain_beyond_its_deadline_says_so(stream):
    with running(delay_s=0.05, max_num_seqs=1) as (url, owner):
        answers = []
        asking = threading.Thread(
            target=lambda: answers.append(post(url, stream=stream, max_tokens=240, ignore_eos=True))
        )
        asking.start()
        wait_until(lambda: owner.engine.scheduler.num_running == 1, "running")
        time.sleep(0.2)
        assert asyncio.run_coroutine_threadsafe(owner.drain(0.1), owner._loop).result(10) is False
        asking.join(10)
        wait_until(lambda: owner.engine.scheduler.num_running == 0, "gone")
    if stream:
        last = answers[0].text.strip().split("\n\n")[-1]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert "[DONE]" not in answers[0].text
    else:
        assert answers[0].status_code == 503
        error = answers[0].json()["error"]
    assert error["code"] == "shutting_down"
