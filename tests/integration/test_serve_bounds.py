"""What a server reads before it works: heads, bodies and trailers, within bounds of size and time."""

import contextlib
import threading
import time

import httpx
import pytest

from serve.front import guard as guard_module
from serve.front import protocol
from serve.front.limits import Limits
from tests.helpers.http_server import (
    BODY,
    answer_of,
    connect,
    ends_while_sent_to,
    half_sent,
    head_of,
    post,
    running,
    serving,
)


@pytest.fixture(scope="module")
def url():
    with running() as (url, _):
        yield url


@pytest.fixture(scope="module")
def hasty():
    """A server that waits for nobody."""
    with running(header_timeout_s=0.3, body_timeout_s=0.3, write_timeout_s=0.3, max_reading=3) as (url, _):
        yield url


@pytest.mark.parametrize("sent", [b"", b"{", b'{"model": "small", "prompt": "', b" " * 499])
def test_a_body_that_never_ends_is_408(hasty, sent):
    assert answer_of(half_sent(hasty, sent=sent)) == (408, "body_timeout")


def test_a_trickled_body_is_408(hasty):
    assert ends_while_sent_to(half_sent(hasty), b" ")


def test_many_half_sent_bodies_hold_up_nobody(monkeypatch):
    monkeypatch.setattr(guard_module, "GRACE_S", 0.2)
    with running(max_reading=8, body_timeout_s=60.0) as (url, _):
        stuck = [half_sent(url) for _ in range(100)]
        assert httpx.get(f"{url}/health").status_code == 200
        assert post(url, max_tokens=2).status_code == 200
        assert [answer_of(connection) for connection in stuck[:90]] == [(408, "body_timeout")] * 90
        stuck[-1].sendall(b"x")  # one of the last eight: still waited for
        stuck[-1].settimeout(0.2)
        with pytest.raises(TimeoutError):
            stuck[-1].recv(1)
        assert post(url, max_tokens=2).status_code == 200
        for connection in stuck:
            connection.close()


def test_a_burst_of_whole_bodies_is_no_crowd(hasty):
    connections = []
    for _ in range(20):
        connections.append(connect(hasty, head_of(BODY) + BODY))
    for connection in connections:
        assert connection.recv(12) == b"HTTP/1.1 200"
        connection.close()


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"", (0, "")),
        (b"\r\n", (408, "header_timeout")),
        (b"GET /health HTTP/1.1\r\nhost: loc", (408, "header_timeout")),
        (b"POST", (408, "header_timeout")),
        (b"GET / HTTP/1.1\r\nx: " + b"a" * 70_000, (431, "headers_too_large")),
        (b"GET /" + b"a" * 70_000, (431, "headers_too_large")),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n", (431, "headers_too_large")),
        (b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 12_000 + b"\r\n", (431, "headers_too_large")),
        (b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 2_000_000, (431, "headers_too_large")),
        (b"GET / HTTP/1.1\r\nhost: localhost\r\ncookie: " + b"a" * 70_000 + b"\r\n\r\n", (431, "headers_too_large")),
        (b"\r\n" * 40_000, (431, "headers_too_large")),
        (b"HELO you\r\n\r\n", (400, "invalid_http")),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", (400, "invalid_http")),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (400, "invalid_http")),
        (b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n", (400, "invalid_http")),
    ],
    ids=range(15),
)
def test_what_comes_instead_of_headers(hasty, sent, expected):
    connection = connect(hasty)
    try:
        connection.sendall(sent)
    except ConnectionError:
        connection.close()
        assert expected[0] == 431  # refused while it was still sending
        return
    assert answer_of(connection) == expected


def test_headers_below_the_bound_are_read(url):
    assert httpx.get(f"{url}/health", headers={"cookie": "a" * 60_000}).status_code == 200


@pytest.mark.parametrize("size", [0, 60_000, 65_400, 65_536, 70_000, 100_000, 131_072, 200_000, 262_144])
def test_a_body_in_one_piece_with_its_headers_is_no_header(url, size):
    body = BODY + b" " * size
    for _ in range(3):
        with connect(url, head_of(body) + body) as connection:
            assert connection.recv(12) == b"HTTP/1.1 200"


def test_endless_trailers_are_refused(hasty):
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    sent = head + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n" + b"x: y\r\n" * 20_000
    assert answer_of(connect(hasty, sent)) == (431, "headers_too_large")


def test_trailers_do_not_become_headers(url):
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    sent = head + b"transfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\ncontent-type: text/plain\r\n\r\n" % (
        len(BODY),
        BODY,
    )
    connection = connect(url, sent)
    assert connection.recv(12) == b"HTTP/1.1 200"
    connection.close()


def test_requests_on_one_connection(url):
    """Whole ones, one after the other and at once, with bodies larger than the bound for headers."""
    with httpx.Client(base_url=url) as client:
        for size in (10, 100_000, 10):
            answer = client.post("/v1/completions", json={"model": "other", "prompt": "x" * size})
            assert answer.status_code == 404
    large = b'{"model": "other", "prompt": "' + b"x" * 70_000 + b'"}'
    connection = connect(url, (head_of(large) + large) * 3)
    received = b""
    while received.count(b"model_not_found") < 3:
        received += connection.recv(1 << 16)
    assert received.count(b"HTTP/1.1 404") == 3
    connection.close()


def test_a_body_that_goes_on_after_its_refusal_is_not_read_for_ever(monkeypatch, hasty):
    monkeypatch.setattr(protocol, "LINGER_S", 0.3)
    connection = connect(
        hasty, b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 900000000\r\n\r\n"
    )
    assert connection.recv(12) == b"HTTP/1.1 413"
    assert ends_while_sent_to(connection, b" ")


def test_who_does_not_read_is_cut_off():
    ended = threading.Event()

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(64):
            await send({"type": "http.response.body", "body": b"x" * (1 << 20), "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        ended.set()

    with serving(app, Limits(write_timeout_s=0.2)) as url:
        connection = connect(url, b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert ended.wait(10)
        received = 0
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(1 << 20):
                received += len(part)
        assert received < 64 << 20
        connection.close()


def test_idle_connections_make_room(monkeypatch):
    monkeypatch.setattr(protocol, "MAX_WAITING", 5)
    with running() as (url, _):
        idle = [connect(url, b"GET /hea") for _ in range(20)]
        assert idle[0].recv(10) == b""
        assert httpx.get(f"{url}/health").status_code == 200
        for connection in idle:
            connection.close()


UPGRADE = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAARAAAAAAAIAAAAA"}


@pytest.mark.parametrize("cut", [None, -40, -1])
def test_a_wish_for_another_protocol_loses_no_body(url, cut):
    """Java's own client asks for HTTP/2 with its first request, whatever it sends."""
    sent = head_of(BODY, **UPGRADE) + BODY
    connection = connect(url, sent[:cut])
    if cut is not None:
        time.sleep(0.1)
        connection.sendall(sent[cut:])
    assert connection.recv(12) == b"HTTP/1.1 200"
    connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close, upgrade\r\nupgrade: h2c\r\n\r\n")
    received = b""
    while part := connection.recv(1 << 16):
        received += part
    connection.close()
    assert received.endswith(b'{"status":"ok"}')


@pytest.mark.parametrize("coding", ["gzip, chunked", "x, chunked", "gzip\r\ntransfer-encoding: chunked"])
def test_bodies_in_other_codings_are_refused(url, coding):
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
    sent = f"{head}transfer-encoding: {coding}\r\n\r\n".encode() + chunks
    assert answer_of(connect(url, sent)) == (415, "unsupported_media_type")
    plain = f"{head}transfer-encoding: Chunked \r\n\r\n".encode() + chunks
    assert connect(url, plain).recv(12) == b"HTTP/1.1 200"
