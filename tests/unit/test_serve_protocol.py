"""What the API refuses, and that every refusal names its field."""

import json

import pytest

from serve.openai.protocol import ApiError, dump, parse_completion, spell_token

GOOD = {"model": "m", "prompt": "hello"}


def parse(**fields):
    return parse_completion(json.dumps({**GOOD, **fields}).encode())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"model": None}, "model"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 2.0}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a", 1]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 9}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"odd": 1}}, "stream_options.odd"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"echo": True}, "echo"),
        ({"logit_bias": {"5": 10}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": -0.5}, "frequency_penalty"),
        ({"min_p": 0.1}, "min_p"),
        ({"temprature": 0.1}, "temprature"),
    ],
    ids=str,
)
def test_bad_fields_are_named(fields, param):
    with pytest.raises(ApiError) as error:
        parse(**fields).sampling(16, 0)
    assert error.value.status == 400
    body = error.value.body()["error"]
    assert body["param"] == param
    assert param.split(".")[-1] in body["message"]
    assert set(body) == {"message", "type", "param", "code"}
    assert body["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"5", b'"x"', b"\xff\xfe", b'{"model": "m", "prompt": "\\ud800"}', b"[" * 9999]
)
def test_what_is_no_json_object(body):
    with pytest.raises(ApiError) as error:
        parse_completion(body)
    assert (error.value.status, error.value.code) == (400, "invalid_json")


def test_missing_fields():
    with pytest.raises(ApiError, match="prompt is missing"):
        parse_completion(b'{"model": "m"}')
    with pytest.raises(ApiError, match="model is missing"):
        parse_completion(b'{"prompt": "m"}')


def test_neutral_values_of_unsupported_fields_are_accepted():
    neutral = {"best_of": 1, "echo": False, "suffix": None, "logit_bias": {}, "presence_penalty": 0.0}
    parse(**neutral, frequency_penalty=0, user="someone", n=1)


def test_a_refusal_does_not_quote_the_prompt():
    for prompt in (5, {"secret": "SECRET"}, [1, "SECRET"]):
        with pytest.raises(ApiError) as error:
            parse(prompt=prompt)
        assert "SECRET" not in json.dumps(error.value.body())


def test_prompts_of_all_four_shapes():
    assert parse(prompt="a").texts_or_tokens() == ["a"]
    assert parse(prompt=[1, 2]).texts_or_tokens() == [[1, 2]]
    assert parse(prompt=["a", "b"]).texts_or_tokens() == ["a", "b"]
    assert parse(prompt=[[1], [2, 3]]).texts_or_tokens() == [[1], [2, 3]]


def test_defaults_are_those_of_openai_and_choices_draw_differently():
    params = parse(seed=2**63 - 1).sampling(16, 0)
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (1.0, 1.0, 0, 2**63 - 1)
    assert parse(seed=2**63 - 1).sampling(16, 1).seed == -(2**63)
    assert parse(temperature=0).sampling(16, 0).temperature == 0.0


def test_tokens_that_are_no_text_are_spelled_as_bytes():
    assert spell_token("é".encode()) == "é"
    assert spell_token("é".encode()[:1]) == "bytes:\\xc3"
    assert dump({"a": "é"}) == '{"a":"é"}'.encode()
