"""The HTTP interface over real sockets, without Ray: uvicorn in a thread, httpx and the openai client before it."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import openai
import pytest
import uvicorn

from attnzoo.models import generate
from serve.async_engine import AsyncEngine
from serve.config import ServeConfig
from serve.engine import Engine
from serve.front.protocol import bounded_protocol
from serve.openai.completions import CompletionAnswer
from serve.openai.routes import build_app
from serve.request import Delta, SamplingParams
from tests.helpers.serving import small_model, tokenizer

MODEL = "small"


@contextlib.contextmanager
def running(kind: str = "rcmha", *, delay_s: float = 0.0, words=None, **settings):
    """A server on a free port; yields (base url, engine). `delay_s` slows every step down; `words`: its tokenizer."""
    settings = {"max_num_seqs": 4, "max_batched_tokens": 16, "max_queue": 32, "model_name": MODEL, **settings}
    config = ServeConfig(checkpoint="none", drain_timeout_s=5.0, **settings)
    engine = Engine(config, model=small_model(kind, max_len=256), tokenizer=words or tokenizer())
    if delay_s:
        step = engine.step
        engine.step = lambda: (time.sleep(delay_s), step())[1]
    owner = AsyncEngine(engine)
    http = bounded_protocol(config.front_limits)
    server = uvicorn.Server(
        uvicorn.Config(build_app(owner, config), host="127.0.0.1", port=0, log_level="warning", http=http)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", owner
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
    assert not owner._thread.is_alive()


@pytest.fixture(scope="module")
def server():
    with running() as (url, owner):
        yield url, owner


@pytest.fixture(scope="module")
def url(server):
    return server[0]


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def post(url: str, **fields) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json={"model": MODEL, "prompt": "Hello", **fields}, timeout=30)


def events(response_text: str) -> list:
    lines = [line.removeprefix("data: ") for line in response_text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def wait_until(condition, what: str) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError(f"never: {what}")


def test_completion_is_that_of_the_plain_loop(server):
    url, owner = server
    answer = post(url, temperature=0, max_tokens=20, ignore_eos=True)
    assert answer.status_code == 200
    body = answer.json()
    prompt = owner.engine.encode("Hello")
    tokens = generate(owner.engine.model, [prompt], max_new_tokens=20)[0]
    assert body["choices"] == [
        {"index": 0, "text": tokenizer().decode(tokens), "logprobs": None, "finish_reason": "length"}
    ]
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(prompt), 20)
    assert usage["total_tokens"] == len(prompt) + 20
    assert usage["attnzoo"]["kv_bytes"] == owner.engine.model.init_state(1, len(prompt) + 19).nbytes()
    assert usage["attnzoo"]["ttft_ms"] > 0
    assert body["object"] == "text_completion"
    assert body["model"] == MODEL


@pytest.mark.parametrize("extra", [{}, {"stop": ["e"]}, {"logprobs": 2}, {"n": 3, "temperature": 40.0, "seed": 5}])
def test_stream_and_whole_are_the_same(url, extra):
    fields = {"temperature": 0, "max_tokens": 24, "prompt": ["One", "Zwei"], **extra}
    whole = post(url, **fields).json()
    with httpx.stream(
        "POST",
        f"{url}/v1/completions",
        json={"model": MODEL, "stream": True, "stream_options": {"include_usage": True}, **fields},
    ) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        chunks = events("".join(response.iter_text()))
    assert chunks[-1]["choices"] == []
    for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert chunks[-1]["usage"][key] == whole["usage"][key]
    for choice in whole["choices"]:
        mine = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        if "logprobs" in extra:
            for key in ("tokens", "text_offset"):
                assert [x for c in mine for x in c["logprobs"][key]] == choice["logprobs"][key]
            assert all(len(top) == 2 for c in mine for top in c["logprobs"]["top_logprobs"])
    assert len(whole["choices"]) == 2 * extra.get("n", 1)


def test_an_interval_between_events_changes_no_text(url):
    fields = {"temperature": 0, "max_tokens": 60, "ignore_eos": True, "logprobs": 0}
    body = {"model": MODEL, "prompt": "Hello", "stream": True, "stream_options": {"include_usage": True}, **fields}
    with (
        running(stream_interval_ms=40.0) as (slow_url, _),
        httpx.stream("POST", f"{slow_url}/v1/completions", json=body) as response,
    ):
        parts = [part for part in response.iter_raw() if part]
    chunks = events(b"".join(parts).decode())
    whole = post(url, **fields).json()
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == whole["choices"][0]["text"]
    assert sum(len(chunk["choices"][0]["logprobs"]["tokens"]) for chunk in chunks[:-1]) == 60
    assert whole["choices"][0]["logprobs"]["top_logprobs"] is None
    assert chunks[-1]["usage"]["completion_tokens"] == 60
    assert len(parts) < 30


def test_openai_client(client):
    whole = client.completions.create(model=MODEL, prompt="Hello", max_tokens=12, temperature=0, logprobs=1)
    assert whole.choices[0].logprobs.token_logprobs[0] <= 0
    assert whole.usage.model_extra["attnzoo"]["kv_bytes_per_token"] > 0
    stream = client.completions.create(model=MODEL, prompt="Hello", max_tokens=12, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="gpt"):
        client.models.retrieve("gpt")
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="gpt", prompt="Hello")
    with pytest.raises(openai.BadRequestError, match="best_of is not supported"):
        client.completions.create(model=MODEL, prompt="Hello", best_of=3)


def test_choices_differ_and_the_seed_repeats_them(url):
    fields = {"n": 3, "temperature": 40.0, "seed": 11, "max_tokens": 12}
    first = [choice["text"] for choice in post(url, **fields).json()["choices"]]
    assert len(set(first)) == 3
    assert [choice["text"] for choice in post(url, **fields).json()["choices"]] == first
    assert post(url, **{**fields, "n": 1}).json()["choices"][0]["text"] == first[0]


def test_prompts_as_tokens(server):
    url, owner = server
    tokens = owner.engine.encode("Hello")
    fields = {"temperature": 0, "max_tokens": 9}
    expected = post(url, **fields).json()["choices"][0]["text"]
    assert post(url, prompt=tokens, **fields).json()["choices"][0]["text"] == expected
    assert post(url, prompt=[tokens], **fields).json()["choices"][0]["text"] == expected


@pytest.mark.parametrize(
    ("fields", "status", "param", "code", "message"),
    [
        ({"prompt": ""}, 400, "prompt", None, "empty"),
        ({"prompt": ["a", ""]}, 400, "prompt", None, "empty"),
        ({"prompt": [100_000]}, 400, "prompt", None, "outside the vocabulary"),
        ({"prompt": [-1]}, 400, "prompt", None, "outside the vocabulary"),
        ({"prompt": [5] * 256}, 400, "prompt", "context_length_exceeded", "context is 256 tokens"),
        ({"prompt": [5] * 200, "max_tokens": 57}, 400, "max_tokens", "context_length_exceeded", "257 were asked for"),
        ({"n": 17}, 400, "n", None, "16"),
        ({"prompt": ["a"] * 17}, 400, "prompt", None, "16"),
        ({"model": "other"}, 404, "model", "model_not_found", "small"),
        ({"temperature": -1}, 400, "temperature", None, "temperature"),
        ({"oddity": 1}, 400, "oddity", "unsupported", "oddity"),
    ],
    ids=str,
)
def test_refusals(url, fields, status, param, code, message):
    answer = post(url, **fields)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, code)
    assert message in error["message"]
    streamed = post(url, stream=True, **fields)
    assert (streamed.status_code, streamed.json()) == (status, answer.json())


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("POST", "/v1", 404), ("GET", "/v1/completions", 405), ("DELETE", "/v1/models", 405),
     ("GET", "/docs", 404), ("GET", "//v1/models", 404), ("GET", "/v1/models/a%2fb", 404)],
)  # fmt: skip
def test_unknown_paths_and_methods_answer_in_the_same_shape(url, method, path, status):
    answer = httpx.request(method, url + path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    if status == 405:
        assert answer.headers["allow"]


def test_a_large_body_is_refused_whether_announced_or_not(url):
    body = json.dumps({"model": MODEL, "prompt": "x" * (1 << 20)}).encode()
    kind = {"content-type": "application/json"}
    assert httpx.post(f"{url}/v1/completions", content=body, headers=kind).status_code == 413

    def chunks():
        for start in range(0, len(body), 1 << 16):
            yield body[start : start + (1 << 16)]

    answer = httpx.post(f"{url}/v1/completions", content=chunks(), headers=kind)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"


def test_health_metrics_and_openapi(url):
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    post(url, max_tokens=5, ignore_eos=True)
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    values = {line.split(" ")[0]: float(line.split(" ")[1]) for line in lines if not line.startswith("#")}
    assert values["attnzoo_generation_tokens_total"] >= 5
    assert values["attnzoo_time_to_first_token_seconds_count"] >= 1
    assert values["attnzoo_inter_token_latency_seconds_count"] >= 4
    assert values['attnzoo_request_success_total{finished_reason="length"}'] >= 1
    assert values["attnzoo_num_requests_running"] == values["attnzoo_kv_bytes"] == 0
    assert values["attnzoo_kv_pool_bytes"] > 0
    document = httpx.get(f"{url}/openapi.json").json()
    assert "/v1/completions" in document["paths"]


def test_what_vllm_bench_serve_sends(url):
    """Its payloads for both backends, as version 0.32 builds them."""
    body = {"model": MODEL, "repetition_penalty": 1.0, "max_tokens": 6, "logprobs": None, "stream": True}
    body |= {"stream_options": {"include_usage": True}, "prompt": "Hello", "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/completions", json=body, headers={"x-request-id": "bench-1"}, timeout=30)
    assert answer.status_code == 200
    chunks = events(answer.text)
    assert chunks[-1]["usage"]["completion_tokens"] == 6
    sampling = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "temperature": 0.0}
    sampling |= {"frequency_penalty": 0.0, "presence_penalty": 0.0}
    assert httpx.post(f"{url}/v1/completions", json=body | sampling, timeout=30).status_code == 200


def test_the_prompt_of_several_choices_counts_once():
    with running() as (url, owner):
        count = owner.engine.metrics.registry.get_sample_value
        usage = post(url, n=3, max_tokens=2, ignore_eos=True).json()["usage"]
        wait_until(lambda: count("attnzoo_generation_tokens_total") == 6, "generated")
        assert count("attnzoo_prompt_tokens_total") == usage["prompt_tokens"] == len(owner.engine.encode("Hello"))
        post(url, prompt=["Hello", "Hello"], n=2, max_tokens=2, ignore_eos=True)
        assert count("attnzoo_prompt_tokens_total") == 3 * usage["prompt_tokens"]


def test_usage_says_how_the_state_was_kept(url, monkeypatch):
    ours = post(url, max_tokens=4, ignore_eos=True).json()["usage"]["attnzoo"]
    assert ours["policy"] == "full"
    assert set(ours) == {
        "policy", "kv_bytes", "kv_bytes_full", "kv_bytes_per_token", "kept_tokens", "not_compressed", "ttft_ms"
    }  # fmt: skip
    # What the engine says of each choice is added up; reasons are given once.
    delta = Delta("r", "", 3, finish_reason="stop", prompt_tokens=5, policy="d2o", kept_tokens=4, kv_bytes=70)
    answer = CompletionAnswer.__new__(CompletionAnswer)
    answer.prompt_tokens = 5
    answer.last = {"a": replace(delta, kv_bytes_full=90), "b": replace(delta, kv_bytes_full=80, not_compressed="short")}
    found = answer._usage()["attnzoo"]
    assert (found["policy"], found["kept_tokens"], found["kv_bytes"], found["kv_bytes_full"]) == ("d2o", 8, 140, 170)
    assert (found["not_compressed"], found["kv_bytes_per_token"]) == ("short", 10.0)


def test_no_reader_of_lines_breaks_an_event(client):
    """A model whose every token is a line separator: the openai client and splitlines see whole events."""

    class Separators(type(tokenizer())):
        def token_bytes(self, token: int) -> bytes:
            return ("\u2028", "\u2029", "\x85", "\x0b", "\x1c", "\r\n")[token % 6].encode()

    words = Separators.__new__(Separators)
    words.__dict__ |= tokenizer().__dict__
    with running(words=words) as (url, _):
        fields = {"max_tokens": 12, "temperature": 40.0, "seed": 1, "ignore_eos": True}
        whole = post(url, **fields).json()["choices"][0]["text"]
        lines = post(url, stream=True, logprobs=1, **fields).text.splitlines()
        assert all(line.startswith("data: ") for line in lines if line)
        parsed = [json.loads(line[6:]) for line in lines if line and line != "data: [DONE]"]
        assert "".join(chunk["choices"][0]["text"] for chunk in parsed) == whole
        there = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        stream = there.completions.create(model=MODEL, prompt="Hello", stream=True, extra_body={"ignore_eos": True},
                                          max_tokens=12, temperature=40.0 / 20, seed=1)  # fmt: skip
        assert len("".join(chunk.choices[0].text for chunk in stream)) >= 12


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


def open_request(url: str, **fields) -> socket.socket:
    """Sends a request on a raw socket, so that it can be dropped at any time."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"model": MODEL, "prompt": "Hello", "ignore_eos": True, **fields}).encode()
    connection = socket.create_connection((host, int(port)))
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    return connection


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


def test_a_slow_reader_holds_up_nobody():
    with running() as (url, _):
        slow = open_request(url, max_tokens=250, stream=True)
        assert post(url, max_tokens=20).status_code == 200
        received = b""
        while b"[DONE]" not in received:
            received += slow.recv(64)
        slow.close()


def test_every_path_but_health_needs_the_key(monkeypatch):
    monkeypatch.setenv("TEST_KEY", "s3cret")
    with running(api_key_env="TEST_KEY") as (url, _):
        assert httpx.get(f"{url}/health").status_code == 200
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere", "//health", "/health/", "/%2e/health"):
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s3cret"}):
                answer = httpx.get(url + path, headers=headers)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key"), path
        assert httpx.get(f"{url}/v1/models", headers={"authorization": "Bearer s3cret"}).status_code == 200
        assert openai.OpenAI(base_url=f"{url}/v1", api_key="s3cret").models.list().data[0].id == MODEL
    monkeypatch.delenv("TEST_KEY")
    with pytest.raises(ValueError, match="TEST_KEY"), running(api_key_env="TEST_KEY"):
        pass


def test_shutdown_lets_running_requests_finish():
    with ThreadPoolExecutor(1) as pool:
        with running(delay_s=0.02) as (url, owner):
            answer = pool.submit(post, url, max_tokens=40, ignore_eos=True)
            wait_until(lambda: owner.engine.scheduler.num_running == 1, "running")
            owner.draining = True
            assert post(url, max_tokens=2).status_code == 503
            assert httpx.get(f"{url}/health").status_code == 503
        assert answer.result().json()["usage"]["completion_tokens"] == 40


def test_no_prompt_text_in_logs(caplog, url):
    with caplog.at_level("INFO"):
        post(url, prompt="SECRET words", max_tokens=3)
        post(url, prompt="SECRET words", temperature=-1)
        post(url, prompt="SECRET words " * 200)
    assert "SECRET" not in caplog.text


def test_streams_of_one_loop_do_not_mix():
    """Many at once, over the asynchronous engine itself: each gets its own tokens."""
    engine = Engine(
        ServeConfig(checkpoint="none", max_num_seqs=4, max_batched_tokens=16),
        model=small_model("mixed"),
        tokenizer=tokenizer(),
    )
    owner = AsyncEngine(engine)
    params = SamplingParams(max_tokens=12, ignore_eos=True)

    async def one(index: int) -> str:
        stream = owner.submit([[3 + index, 50, 7]], [params])
        text = ""
        while news := await stream.next():
            text += "".join(delta.text for delta in news)
        stream.close()
        return text

    async def everything() -> list[str]:
        return await asyncio.gather(*(one(index) for index in range(30)))

    texts = asyncio.run(everything())
    owner.stop()
    alone = Engine(engine.config, model=engine.model, tokenizer=tokenizer())
    assert texts == [done.text for done in alone.generate([[3 + i, 50, 7] for i in range(30)], params)]
