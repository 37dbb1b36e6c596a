"""The OpenAPI document says what the server does: real answers of every kind are held against it."""

import json
import re

import httpx
import jsonschema
import pytest

from serve.openai.neutral import CHAT, COMPLETION, SHARED
from serve.openai.protocol import CompletionRequest
from serve.openai.protocol_chat import ChatRequest
from tests.helpers.http_server import MODEL, events, running
from tests.helpers.serving import chat_tokenizer

USER = [{"role": "user", "content": "Hello"}]
READS = [{"mass": {}}, {"top_keys": {"k": 2}}, {"entropy": {}}, {"key_sums": {}}, {"map": {"where": {"layers": 0}}}]
ATTENTION = {"read": READS, "edits": [{"scale": {"where": {"keys": "a"}, "factor": 2}}], "spans": {"a": [0, 1]}}


@pytest.fixture(scope="module")
def url():
    with running(words=chat_tokenizer(), attention="edit") as (url, _):
        yield url


@pytest.fixture(scope="module")
def document(url):
    return httpx.get(f"{url}/openapi.json").json()


def check(value, document, schema) -> None:
    """Raises for a value that the schema of the document does not describe."""
    jsonschema.Draft202012Validator({**schema, "components": document["components"]}).validate(value)


def operation(document, method: str, path: str) -> dict:
    found = re.sub(r"^/v1/models/.+", "/v1/models/{model_id}", path)
    found = re.sub(r"^/v1/attention/.+", "/v1/attention/{map_id}", found)
    return document["paths"][found][method.lower()]


def test_every_reference_leads_somewhere(document):
    references = re.findall(r'"\$ref":\s*"([^"]*)"', json.dumps(document))
    assert references
    for reference in references:
        found = document
        assert reference.startswith("#/")
        for part in reference[2:].split("/"):
            found = found[part]
        assert found
    for name, schema in document["components"]["schemas"].items():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert schema.get("properties") or schema.get("enum"), name


def test_no_schema_says_nothing(document):
    def walk(value, where):
        if isinstance(value, dict):
            for key, part in value.items():
                assert not (key in ("schema", "items") and part == {}), where
                if key == "properties":
                    assert all(part.values()), (where, [name for name, schema in part.items() if not schema])
                walk(part, f"{where}.{key}")
        elif isinstance(value, list):
            for part in value:
                walk(part, where)

    walk(document, "")


def test_all_paths_are_there(document, url):
    assert set(document["paths"]) == {
        "/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{model_id}", "/v1/attention/{map_id}",
        "/tokenize", "/detokenize", "/tokenizer_info", "/health", "/ready", "/version", "/metrics"
    }  # fmt: skip
    for path, methods in document["paths"].items():
        for method, described in methods.items():
            responses = described["responses"]
            assert {"200", "400", "401", "404", "405", "413", "415", "429", "500", "503"} <= set(responses), (
                path,
                method,
            )
            assert all(response["description"] for response in responses.values())


CASES = [
    ("GET", "/health", None, 200),
    ("GET", "/ready", None, 200),
    ("GET", "/version", None, 200),
    ("GET", "/metrics", None, 200),
    ("GET", "/tokenizer_info", None, 200),
    ("POST", "/tokenize", {"prompt": "Hello", "add_special_tokens": False}, 200),
    ("POST", "/tokenize", {"messages": USER, "return_token_strs": True, "add_generation_prompt": True}, 200),
    ("POST", "/tokenize", {}, 400),
    ("POST", "/detokenize", {"tokens": [5, 6]}, 200),
    ("POST", "/detokenize", {"tokens": [-1]}, 400),
    ("GET", "/v1/models", None, 200),
    ("GET", f"/v1/models/{MODEL}", None, 200),
    ("GET", "/v1/models/other", None, 404),
    ("DELETE", "/v1/models", None, 405),
    ("POST", "/v1/completions", {"prompt": "Hello", "max_tokens": 3}, 200),
    ("POST", "/v1/completions", {"prompt": ["a", "b"], "n": 2, "logprobs": 2, "temperature": 40.0}, 200),
    ("POST", "/v1/completions", {"prompt": "a", "cache": {"policy": "streaming", "max_tokens": 8}}, 200),
    ("POST", "/v1/completions", {"prompt": "a b", "attention": ATTENTION}, 200),
    ("POST", "/v1/completions", {"prompt": "a b", "cache": {"policy": "d2o"}, "attention": ATTENTION}, 200),
    ("POST", "/v1/completions", {"prompt": "a", "attention": {"read": [{"mass": {"where": {"layers": 9}}}]}}, 400),
    ("GET", "/v1/attention/unknown", None, 404),
    ("POST", "/v1/completions", {"prompt": "a", "temperature": -1}, 400),
    ("POST", "/v1/completions", {"prompt": "a", "logit_bias": {"5": -1.5}, "stop_token_ids": [6], "min_p": 0.1}, 200),
    ("POST", "/v1/completions", {"prompt": "a", "logit_bias": {"x": 1}}, 400),
    ("POST", "/v1/completions", {"prompt": "a", "model": "x"}, 404),
    ("POST", "/v1/completions", {"prompt": "a" * (1 << 20)}, 413),
    ("POST", "/v1/chat/completions", {"messages": USER, "max_tokens": 3}, 200),
    ("POST", "/v1/chat/completions", {"messages": USER, "max_tokens": 3, "logprobs": True, "top_logprobs": 2}, 200),
    ("POST", "/v1/chat/completions", {"messages": []}, 400),
    ("POST", "/v1/chat/completions", {"messages": USER * 300}, 400),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} {case[1]} {case[3]} {str(case[2])[:60]}")
def test_answers_are_as_described(url, document, case):
    method, path, body, status = case
    described = {} if method == "DELETE" else operation(document, method, path)
    body = None if body is None else {"model": MODEL, **body}
    answer = httpx.request(method, url + path, json=body, timeout=60)
    assert answer.status_code == status, answer.text
    kind = answer.headers["content-type"].split(";")[0]
    if described:
        content = described["responses"][str(status)]["content"]
        assert kind in content
        if kind == "application/json":
            check(answer.json(), document, content[kind]["schema"])
        if body is not None and status == 200:
            check(body, document, described["requestBody"]["content"]["application/json"]["schema"])
    else:
        check(answer.json(), document, {"$ref": "#/components/schemas/ErrorBody"})


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_events_are_as_described(url, document, path):
    extra = {"prompt": "Hello", "logprobs": 1} if path == "/v1/completions" else {"messages": USER, "logprobs": True}
    extra |= {"attention": ATTENTION}
    body = {"model": MODEL, "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 5, **extra}
    answer = httpx.post(url + path, json=body, timeout=60)
    content = operation(document, "POST", path)["responses"]["200"]["content"]["text/event-stream"]["schema"]
    chunks = events(answer.text)
    for chunk in chunks:
        check(chunk, document, content["x-event"])
    assert chunks[-1]["usage"]["attnzoo"]["policy"] == "full"
    assert sum("attention" in choice for chunk in chunks for choice in chunk["choices"]) == 1


@pytest.mark.parametrize(
    ("path", "kind"), [("/v1/completions", CompletionRequest), ("/v1/chat/completions", ChatRequest)]
)
def test_a_described_neutral_value_is_taken_and_another_is_refused(url, document, path, kind):
    """The schema and the server agree on every field that is there to be neutral."""
    schema = operation(document, "POST", path)["requestBody"]["content"]["application/json"]["schema"]
    base = {"model": MODEL, "max_tokens": 1}
    base |= {"prompt": "a"} if kind is CompletionRequest else {"messages": USER}
    assert set(kind.neutral) == {*SHARED, *(COMPLETION if kind is CompletionRequest else CHAT)}
    for most in range(max(map(len, kind.neutral.values()))):
        body = {**base, **{name: values[min(most, len(values) - 1)] for name, values in kind.neutral.items()}}
        check(body, document, schema)
        assert httpx.post(url + path, json=body, timeout=60).status_code == 200
    for name in kind.neutral:
        body = {**base, name: "something else"}
        answer = httpx.post(url + path, json=body).json()["error"]
        assert (answer["param"], answer["code"]) == (name, "unsupported")
        with pytest.raises(jsonschema.ValidationError):
            check(body, document, schema)
