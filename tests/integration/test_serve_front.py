"""What stands before the application, over real sockets: who may ask, what is read, and for how long."""

import asyncio
import contextlib
import json
import socket
import threading
import time

import httpx
import pytest
import uvicorn

from serve.front import guard as guard_module
from serve.front import protocol
from serve.front.guard import read_api_key
from serve.front.hosts import Hosts
from serve.front.limits import Limits, check_host_name
from serve.front.protocol import bounded_protocol
from serve.front.retry import Retry
from tests.integration.test_serve_routes import MODEL, post, running, wait_until

JSON = {"content-type": "application/json"}
BODY = json.dumps({"model": MODEL, "prompt": "Hello", "max_tokens": 2}).encode()


@pytest.fixture(scope="module")
def url():
    with running() as (url, _):
        yield url


@pytest.fixture(scope="module")
def hasty():
    """A server that waits for nobody."""
    with running(header_timeout_s=0.3, body_timeout_s=0.3, write_timeout_s=0.3, max_reading=3) as (url, _):
        yield url


def connect(url: str, sent: bytes = b"") -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(sent)
    return connection


def half_sent(url: str, path: str = "/v1/completions", sent: bytes = b"") -> socket.socket:
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n"
    return connect(url, head.encode() + sent)


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


@pytest.mark.parametrize("sent", [b"", b"{", b'{"model": "small", "prompt": "', b" " * 499])
def test_a_body_that_never_ends_is_408(hasty, sent):
    assert answer_of(half_sent(hasty, sent=sent)) == (408, "body_timeout")


def test_a_trickled_body_is_408(hasty):
    assert ends_while_sent_to(half_sent(hasty), b" ")


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


def head_of(body: bytes, **headers: str) -> bytes:
    fields = {"host": "localhost", **JSON, "content-length": str(len(body)), **headers}
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    return f"POST /v1/completions HTTP/1.1\r\n{lines}\r\n".encode()


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


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": ""},
        {"content-type": "text/plain"},
        {"content-type": "text/plain; application/json"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "application/jsonp"},
        {"content-type": "application/json; charset=utf-16"},
        {"content-type": "text/plain, application/json"},
        {"content-type": "application/json, text/plain"},
        {**JSON, "content-encoding": "gzip"},
    ],
    ids=str,
)
def test_other_content_types_are_refused(url, headers):
    answer = httpx.post(f"{url}/v1/completions", content=BODY, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    "kind",
    ["application/json", "Application/JSON", "application/json; charset=utf-8", 'application/json;charset="UTF-8"'],
)
def test_json_is_json(url, kind):
    assert httpx.post(f"{url}/v1/completions", content=BODY, headers={"content-type": kind}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/models", "/health", "/metrics", "/openapi.json", "/nowhere"])
@pytest.mark.parametrize(
    "name", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.5", "2130706433"]
)
def test_other_names_are_refused(url, path, name):
    answer = httpx.get(url + path, headers={"host": name})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_not_allowed")


def test_one_host_is_needed(url):
    for head in (
        b"GET /health HTTP/1.0\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nhost: evil.example\r\n\r\n",
    ):
        connection = connect(url, head + b"")
        assert connection.recv(12) == b"HTTP/1.1 403"
        connection.close()


@pytest.mark.parametrize(
    ("origin", "good"),
    [
        ("http://localhost:3000", True),
        ("http://127.0.0.1:8000", True),
        ("https://[::1]", True),
        ("http://evil.example", False),
        ("https://localhost.evil.example", False),
        ("http://localhost@evil.example", False),
        ("null", False),
        ("", False),
        ("file://", False),
        ("chrome-extension://localhost", False),
    ],
)
def test_pages_of_others_are_refused(url, origin, good):
    answer = httpx.post(f"{url}/v1/completions", content=BODY, headers={**JSON, "origin": origin})
    assert answer.status_code == (200 if good else 403)
    if not good:
        assert answer.json()["error"]["code"] == "origin_not_allowed"


def test_names_by_configuration():
    local = ["localhost", "LOCALHOST:80", "127.0.0.1:8000", "127.9.9.9", "[::1]:8000", "localhost."]
    loopback, given = Hosts(Limits()), Hosts(Limits(allowed_hosts=("api.example.com", "*.example.org")))
    beyond, anything = Hosts(Limits(host="0.0.0.0")), Hosts(Limits(allowed_hosts=("*",)))
    for host in local:
        assert all(hosts.accepts(host) for hosts in (loopback, given, beyond, anything)), host
    for host in (
        "",
        "localhost:x",
        "localhost/",
        "a b",
        "[::1",
        "::1",
        "127.1",
        "0x7f.1",
        "localhost:80:80",
        "[::1%lo]",
    ):
        assert not any(hosts.accepts(host) for hosts in (loopback, given, beyond)), host
    assert given.accepts("API.example.com:443")
    assert given.accepts("a.b.example.org")
    for host in ("example.org", "example.com", "evilexample.org", "api.example.com.evil.example"):
        assert not given.accepts(host)
    assert beyond.accepts("192.168.1.5:8000")
    assert beyond.accepts(socket.gethostname())
    assert not beyond.accepts("evil.example")
    assert not loopback.accepts("192.168.1.5")
    assert anything.accepts("evil.example")


@pytest.mark.parametrize(
    "name", ["", "http://a.example", "a.example:80", "a.example/x", "*.", "a*b", "*.*.example", 5, None, "[::1"]
)
def test_wrong_names_are_named(name):
    if name == "[::1":
        assert check_host_name(name) == "::1"
    else:
        with pytest.raises(ValueError, match="allowed_hosts"):
            check_host_name(name)


def test_a_configured_name_is_served():
    with running(allowed_hosts=["api.example.com"]) as (url, _):
        assert httpx.get(f"{url}/health", headers={"host": "api.example.com"}).status_code == 200
        assert httpx.get(f"{url}/health", headers={"host": "www.example.com"}).status_code == 403


def test_web_sockets_are_refused(url):
    upgrade = "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: "
    head = f"GET /v1/completions HTTP/1.1\r\nhost: localhost\r\n{upgrade}AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    connection = connect(url, head.encode())
    assert connection.recv(12) == b"HTTP/1.1 403"
    connection.close()


def test_keys_are_sent_as_the_standard_says(monkeypatch):
    monkeypatch.setenv("TEST_KEY", "s3cret")
    with running(api_key_env="TEST_KEY") as (url, _):
        for given in ("Bearer s3cret", "bearer s3cret", "BEARER  s3cret", "bEaReR   s3cret"):
            assert httpx.get(f"{url}/v1/models", headers={"authorization": given}).status_code == 200, given
        for given in (
            "",
            "Bearer",
            "Basic s3cret",
            "s3cret",
            "Bearers3cret",
            "Bearer S3cret",
            "Bearer s3cret x",
        ):
            answer = httpx.get(f"{url}/v1/models", headers={"authorization": given})
            assert answer.status_code == 401, given
            assert answer.headers["www-authenticate"].startswith("Bearer")
        assert answer_of(half_sent(url))[0] == 401  # before a byte of the body is waited for


@pytest.mark.parametrize("key", ["two words", "line\n", "schlüssel", "tab\t"])
def test_a_key_that_cannot_be_sent_is_refused(monkeypatch, key):
    monkeypatch.setenv("TEST_KEY", key)
    with pytest.raises(ValueError, match="TEST_KEY"):
        read_api_key("TEST_KEY")


def test_a_client_gone_in_its_body_is_no_error(caplog):
    with caplog.at_level("DEBUG"), running() as (url, _):
        for sent in (b"", b'{"model"'):
            half_sent(url, sent=sent).close()
        connect(url, b"POST /v1/comp").close()
        assert post(url, max_tokens=2).status_code == 200
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]
    assert "Traceback" not in caplog.text


def test_headers_for_ray_are_taken_away():
    seen = {}

    async def app(scope, receive, send):
        seen.update({name.decode(): value.decode() for name, value in scope["headers"]})
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    steering = {
        "X-Request-Timeout-Seconds": "0.001",
        "x-request-disconnect-disabled": "?1",
        "serve_multiplexed_model_id": "x",
        "serve-multiplexed-model-id": "x",
        "x-session-id": "x",
        "X_Session_Id": "x",
        "x-serve-router-replica": "x",
        "traceparent": "00-0-0-01",
        "x-request-id": "a" * 129,
    }
    with serving(guarded(app)) as url:
        assert httpx.get(url, headers={**steering, "x-mine": "kept"}).status_code == 204
        assert seen["x-mine"] == "kept"
        assert not set(seen) & {name.lower() for name in steering}
        httpx.get(url, headers={"x-request-id": "job-17"})
        assert seen["x-request-id"] == "job-17"


def guarded(app, limits: Limits | None = None):
    for middleware in reversed(guard_module.guard(limits or Limits())):
        app = middleware.cls(app, *middleware.args, **middleware.kwargs)
    return app


class serving:  # noqa: N801
    """Any ASGI application on a free port."""

    def __init__(self, app, limits: Limits | None = None) -> None:
        http = bounded_protocol(limits or Limits())
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", lifespan="off", http=http)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self) -> str:
        self.thread.start()
        wait_until(lambda: self.server.started, "started")
        return f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def __exit__(self, *_) -> None:
        self.server.should_exit = True
        self.thread.join(20)


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


def test_limits_travel_as_json():
    limits = Limits(host="0.0.0.0", allowed_hosts=("a.example",), max_reading=3)
    assert Limits.from_json(limits.to_json()) == limits
    assert Limits.from_json(None) == Limits.from_json("") == Limits()
    for text in ("{", "[]", '{"max_readin": 3}', '"x"', "5"):
        with pytest.raises(ValueError, match="ATTNZOO_FRONT"):
            Limits.from_json(text)


def test_the_loop_goes_on_while_a_long_text_is_read(url):
    """1 MB of anything is refused before it is encoded; what is just short enough is encoded elsewhere."""
    for body in (
        {"prompt": "x" * 1_000_000},
        {"prompt": [5] * 300_000},
        {"prompt": ["x" * 900_000, "y"]},
    ):
        answer = post(url, **body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_nothing_is_encoded_on_the_event_loop(monkeypatch):
    threads = []
    with running() as (url, owner):
        words = owner.engine.tokenizer
        encode = words.encode

        def noted(text, **options):
            threads.append(threading.current_thread().name)
            return encode(text, **options)

        monkeypatch.setattr(words, "encode", noted)
        assert post(url, max_tokens=1).status_code == 200
        assert post(url, prompt="Hello " * 4000, max_tokens=1).status_code == 400
    assert [name.rpartition("_")[0] for name in threads] == ["attnzoo-short-text"]


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


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", f"/v1/models/{MODEL}", "/openapi.json"])
def test_head_is_get_without_a_body(url, path):
    found, whole = httpx.head(url + path), httpx.get(url + path)
    assert (found.status_code, found.content) == (200, b"")
    assert found.headers["content-type"] == whole.headers["content-type"]
    assert httpx.head(f"{url}/v1/completions").status_code == 405
