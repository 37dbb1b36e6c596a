"""POST /tokenize and /detokenize, and the small paths that tell of the server."""

import httpx
import pytest

import attnzoo
from tests.helpers.http_server import MODEL, post, running
from tests.helpers.serving import chat_tokenizer

USER = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello, wörld \U0001f600"}]


@pytest.fixture(scope="module")
def served():
    with running(words=chat_tokenizer()) as served:
        yield served


def ask(url, path, **fields):
    return httpx.post(f"{url}/{path}", json=fields, timeout=30)


@pytest.mark.parametrize("text", ["Hello", "", " two  spaces ", "wörld \U0001f600", "<|im_start|>"])
def test_tokens_are_those_of_a_completion_and_go_back(served, text):
    url, owner = served
    answer = ask(url, "tokenize", model=MODEL, prompt=text, return_token_strs=True).json()
    assert answer["tokens"] == owner.engine.encode(text)
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == owner.engine.max_model_len
    if text:
        usage = post(url, prompt=text, max_tokens=1).json()["usage"]
        assert usage["prompt_tokens"] == answer["count"]
    assert ask(url, "detokenize", tokens=answer["tokens"]).json() == {"prompt": text}


def test_a_prompt_without_the_begin_token(served):
    url, owner = served
    tokens = ask(url, "tokenize", prompt="Hello", add_special_tokens=False).json()["tokens"]
    assert tokens == owner.engine.tokenizer.encode("Hello")
    assert tokens != owner.engine.encode("Hello")


def test_the_tokenizer_tells_its_control_tokens(served):
    url, owner = served
    told, tokenizer = httpx.get(f"{url}/tokenizer_info").json(), owner.engine.tokenizer
    assert told["vocab_size"] == tokenizer.vocab_size
    assert told["chat_template"] == tokenizer.chat_template
    assert told["eos_token"] == tokenizer.spelling(tokenizer.eos_id)
    assert told["bos_token"] == tokenizer.spelling(tokenizer.bos_id)


def test_a_conversation_has_the_tokens_of_a_chat(served):
    url, owner = served
    answer = ask(url, "tokenize", messages=USER, add_generation_prompt=True).json()
    assert answer["tokens"] == owner.engine.encode_chat(USER)
    assert answer["token_strs"] is None
    body = {"model": MODEL, "messages": USER, "max_tokens": 1}
    chat = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).json()
    assert chat["usage"]["prompt_tokens"] == answer["count"]


@pytest.mark.parametrize(
    ("path", "body", "param", "said"),
    [
        ("tokenize", {}, "prompt", "give one of prompt and messages; neither is there"),
        ("tokenize", {"prompt": "a", "messages": USER}, "prompt", "both are there"),
        ("tokenize", {"promt": "a"}, "promt", "did you mean 'prompt'"),
        ("tokenize", {"prompt": 5}, "prompt", "must be"),
        ("tokenize", {"prompt": "a " * 5000}, "prompt", "context"),
        ("tokenize", {"messages": USER, "add_special_tokens": True}, "add_special_tokens", "is for prompts"),
        ("tokenize", {"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role", "tool"),
        ("tokenize", {"messages": USER, "add_generation_prompt": False}, "add_generation_prompt", "not supported"),
        ("detokenize", {}, "tokens", "tokens is missing"),
        ("detokenize", {"tokens": [5, 10**6]}, "tokens", "1000000, which is outside the vocabulary of"),
        ("detokenize", {"tokens": [5, -1]}, "tokens[1]", "must be greater than or equal to 0"),
        ("detokenize", {"tokens": ["a"]}, "tokens[0]", "must be a valid integer"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(served, path, body, param, said):
    answer = ask(served[0], path, **body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert said in error["message"]


def test_another_model_is_not_there(served):
    for path, body in (("tokenize", {"prompt": "a"}), ("detokenize", {"tokens": [5]})):
        answer = ask(served[0], path, model="other", **body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")


def test_without_a_chat_template_there_are_no_conversations():
    with running() as (url, _):
        answer = ask(url, "tokenize", messages=USER)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_chat_template")


def test_ready_and_version(served):
    url, _ = served
    assert httpx.get(f"{url}/version").json() == {"version": attnzoo.__version__}
    assert httpx.get(f"{url}/ready").json() == {"status": "ok"}


def test_a_server_that_ends_is_not_ready():
    with running() as (url, owner):
        owner.stop()
        assert httpx.get(f"{url}/ready").status_code == 503


def test_only_health_and_readiness_are_open_with_a_key(monkeypatch):
    monkeypatch.setenv("KEY_OF_TESTS", "secret")
    with running(api_key_env="KEY_OF_TESTS") as (url, _):
        expected = {"health": 200, "ready": 200, "version": 401, "metrics": 401}
        assert {path: httpx.get(f"{url}/{path}").status_code for path in expected} == expected
        assert ask(url, "tokenize", prompt="a").status_code == 401
