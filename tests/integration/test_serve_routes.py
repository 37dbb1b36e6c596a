"""The HTTP interface over real sockets, without Ray: uvicorn in a thread, httpx and the openai client before it."""

import asyncio
import json
import threading
from dataclasses import replace

import httpx
import openai
import pytest

from attnzoo.models import generate
from serve.async_engine import AsyncEngine
from serve.config import ServeConfig
from serve.engine import Engine
from serve.openai.completions import CompletionAnswer
from serve.openai.protocol import CompletionRequest
from serve.request import Delta, SamplingParams
from tests.helpers.http_server import MODEL, events, post, running, wait_until
from tests.helpers.serving import small_model, tokenizer


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
    ("fields", "param"),
    [
        ({"max_tokens": 10**22}, "max_tokens"),
        ({"n": 10**22}, "n"),
        ({"top_k": -(10**22)}, "top_k"),
        ({"seed": 10**22}, "seed"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 10**400}, "top_p"),
        ({"logprobs": 10**400}, "logprobs"),
        ({"prompt": [10**22]}, "prompt"),
        ({"prompt": [-(2**63) - 1]}, "prompt"),
    ],
)
def test_large_integers_are_a_400_that_names_the_field(url, fields, param):
    answer = post(url, **{"max_tokens": 2, **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_the_loop_goes_on_while_a_long_text_is_read(url):
    """1 MB of anything is refused before it is encoded; what is just short enough is encoded elsewhere."""
    for body in (
        {"prompt": "x" * 1_000_000},
        {"prompt": [5] * 300_000},
        {"prompt": ["x" * 900_000, "y"]},
    ):
        answer = post(url, **body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


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


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", f"/v1/models/{MODEL}", "/openapi.json"])
def test_head_is_get_without_a_body(url, path):
    found, whole = httpx.head(url + path), httpx.get(url + path)
    assert (found.status_code, found.content) == (200, b"")
    assert found.headers["content-type"] == whole.headers["content-type"]
    assert httpx.head(f"{url}/v1/completions").status_code == 405


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
        "policy", "kv_bytes", "kv_bytes_full", "kv_bytes_per_token", "kept_tokens", "not_compressed", "not_cached",
        "ttft_ms",
    }  # fmt: skip
    # What the engine says of each choice is added up; reasons are given once.
    delta = Delta("r", "", 3, finish_reason="stop", prompt_tokens=5, policy="d2o", kept_tokens=4, kv_bytes=70)
    answer = CompletionAnswer.__new__(CompletionAnswer)
    answer.prompt_tokens, answer.index, answer.request = (
        5,
        {"a": 0, "b": 1},
        CompletionRequest(model="m", prompt="p", n=2),
    )
    first = replace(delta, kv_bytes_full=90, cached_tokens=3)
    answer.last = {"a": first, "b": replace(delta, kv_bytes_full=80, not_compressed="short", cached_tokens=4)}
    assert answer._usage()["prompt_tokens_details"] == {"cached_tokens": 3}, (
        "a prompt counts once, as it was first read"
    )
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
