"""Who may ask, over real sockets: hosts, origins, keys, kinds of content, and headers that are Ray's alone."""

import socket

import httpx
import openai
import pytest

from serve.front.guard import read_api_key
from serve.front.hosts import Hosts
from serve.front.limits import Limits, check_host_name
from tests.helpers.http_server import BODY, JSON, MODEL, answer_of, connect, guarded, half_sent, running, serving


@pytest.fixture(scope="module")
def url():
    with running() as (url, _):
        yield url


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


def test_web_sockets_are_refused(url):
    upgrade = "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: "
    head = f"GET /v1/completions HTTP/1.1\r\nhost: localhost\r\n{upgrade}AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    connection = connect(url, head.encode())
    assert connection.recv(12) == b"HTTP/1.1 403"
    connection.close()


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


def test_every_path_but_health_and_the_page_needs_the_key(monkeypatch):
    monkeypatch.setenv("TEST_KEY", "s3cret")
    with running(api_key_env="TEST_KEY") as (url, _):
        for given in ("Bearer s3cret", "bearer s3cret", "BEARER  s3cret", "bEaReR   s3cret"):
            assert httpx.get(f"{url}/v1/models", headers={"authorization": given}).status_code == 200, given
        for given in (
            "",
            "Bearer",
            "Bearer wrong",
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
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/patients/page.js").status_code == 404  # a file of the page, which this server lacks
        others = ("/nowhere", "//health", "/health/", "/%2e/health", "/patients-of/x", "//patients/page.js")
        for path in ("/v1/models", "/metrics", "/openapi.json", *others):
            answer = httpx.get(url + path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key"), path
        assert openai.OpenAI(base_url=f"{url}/v1", api_key="s3cret").models.list().data[0].id == MODEL


@pytest.mark.parametrize("key", [None, "two words", "line\n", "schlüssel", "tab\t"])
def test_a_key_that_is_absent_or_cannot_be_sent_is_refused(monkeypatch, key):
    monkeypatch.delenv("TEST_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("TEST_KEY", key)
    with pytest.raises(ValueError, match="TEST_KEY"):
        read_api_key("TEST_KEY")


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


def test_limits_travel_as_json():
    limits = Limits(host="0.0.0.0", allowed_hosts=("a.example",), max_reading=3)
    assert Limits.from_json(limits.to_json()) == limits
    assert Limits.from_json(None) == Limits.from_json("") == Limits()
    for text in ("{", "[]", '{"max_readin": 3}', '"x"', "5"):
        with pytest.raises(ValueError, match="ATTNZOO_FRONT"):
            Limits.from_json(text)
