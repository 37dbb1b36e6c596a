"""What the API refuses, and that every refusal names its field."""

import json

import pytest

from attnzoo.models.sampling import TokenLogprobs
from serve.openai.errors import ApiError, dump
from serve.openai.protocol import parse_completion, spell_token
from serve.openai.protocol_chat import chat_logprobs_object, parse_chat

GOOD = {"model": "m", "prompt": "hello"}
USER = {"role": "user", "content": "hello"}


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
        ({"top_k": -2}, "top_k"),
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
        ({"max_tokens": 0, "echo": False}, "max_tokens"),
        ({"echo": "yes"}, "echo"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"logit_bias": {"-5": 1}}, "logit_bias"),
        ({"logit_bias": {"5": "much"}}, "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"logit_bias": dict.fromkeys(map(str, range(301)), 1)}, "logit_bias"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": "high"}, "repetition_penalty"),
        ({"min_p": 1.1}, "min_p"),
        ({"min_p": True}, "min_p"),
        ({"repetition_penalty": True}, "repetition_penalty"),
        ({"min_tokens": False}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids"),
        ({"stop_token_ids": 5}, "stop_token_ids"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids"),
        ({"length_penalty": 1.2}, "length_penalty"),
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


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"promt": "a"}, "promt", "unknown field 'promt'; did you mean 'prompt'?"),
        ({"prompt": "a", "max_token": 3}, "max_token", "unknown field 'max_token'; did you mean 'max_tokens'?"),
        ({"prompt": "a", "zzz": 3}, "zzz", "unknown field 'zzz'; this server does not support it"),
        (
            {"prompt": "a", "stream": True, "stream_options": {"include_usag": True}},
            "stream_options.include_usag",
            "unknown field 'stream_options.include_usag'; did you mean 'include_usage'?",
        ),
        ({"prompt": "a", "temperature": -1}, "temperature", "temperature=-1 must be greater than or equal to 0"),
        ({"prompt": "a", "max_tokens": "5"}, "max_tokens", 'max_tokens="5" must be a valid integer'),
        ({"prompt": "a", "user": "u" * 600}, "user", f'user="{"u" * 63}... must have at most 512 characters'),
        ({"prompt": "a", "model": None}, "model", "model=null must be a valid string"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_messages_show_the_value_and_the_way_out(body, param, message):
    with pytest.raises(ApiError) as error:
        parse_completion(json.dumps({"model": "m", **body}).encode())
    assert (error.value.param, error.value.message) == (param, message)


def test_a_message_of_an_unknown_field_has_the_nearest():
    with pytest.raises(ApiError) as error:
        parse_chat(b'{"model": "m", "messages": [{"role": "user", "contents": "a"}]}')
    assert error.value.message == "unknown field 'messages[0].contents'; did you mean 'content'?"


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


def chat(**fields):
    return parse_chat(json.dumps({"model": "m", "messages": [USER], **fields}).encode())


VIDEO = {"type": "video_url", "video_url": {"url": "http://127.0.0.1:9/x.mp4"}}


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": []}, "messages", None),
        ({"messages": "hello"}, "messages", None),
        ({"messages": None}, "messages", None),
        ({"messages": ["hello"]}, "messages[0]", None),
        ({"messages": [USER, {"role": "user"}]}, "messages[1].content", None),
        ({"messages": [{"content": "x"}]}, "messages[0].role", None),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", None),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role", None),
        ({"messages": [{"role": "tool", "content": "x", "name": "f"}]}, "messages[0].role", "unsupported"),
        ({"messages": [{**USER, "content": 5}]}, "messages[0].content", None),
        ({"messages": [{**USER, "content": []}]}, "messages[0].content", None),
        ({"messages": [{**USER, "content": ["x"]}]}, "messages[0].content[0]", None),
        ({"messages": [{**USER, "content": [{"type": "text"}]}]}, "messages[0].content[0]", None),
        ({"messages": [{**USER, "content": [{"type": "text", "text": "a", "b": 1}]}]}, "messages[0].content[0]", None),
        ({"messages": [{**USER, "content": [{"type": ["text"], "text": "a"}]}]}, "messages[0].content[0]", None),
        (
            {"messages": [USER, {**USER, "content": [{"type": "text", "text": "a"}, VIDEO]}]},
            "messages[1].content[1]",
            "unsupported",
        ),
        ({"messages": [{**USER, "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]", "unsupported"),
        ({"messages": [{**USER, "name": 5}]}, "messages[0].name", None),
        ({"messages": [{**USER, "name": "x" * 257}]}, "messages[0].name", None),
        ({"messages": [{**USER, "reasoning_content": "x"}]}, "messages[0].reasoning_content", "unsupported"),
        ({"messages": [{**USER, "oddity": 1}]}, "messages[0].oddity", "unsupported"),
        ({"messages": [{**USER, "role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls", "unsupported"),
        ({"max_tokens": 0}, "max_tokens", None),
        ({"max_completion_tokens": 0}, "max_completion_tokens", None),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_completion_tokens", None),
        ({"logprobs": 1}, "logprobs", None),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", None),
        ({"top_logprobs": 2}, "top_logprobs", None),
        ({"logprobs": False, "top_logprobs": 2}, "top_logprobs", None),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
        ({"temperature": -1}, "temperature", None),
        ({"stop": "x" * 257}, "stop", None),
        ({"prompt": "x"}, "prompt", "unsupported"),
        ({"chat_template": "{{ 1 }}"}, "chat_template", "unsupported"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported"),
        ({"tool_choice": "required"}, "tool_choice", "unsupported"),
        ({"functions": [{}]}, "functions", "unsupported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported"),
        ({"presence_penalty": 2.5}, "presence_penalty", None),
        ({"frequency_penalty": "high"}, "frequency_penalty", None),
        ({"logit_bias": {"5": 101}}, "logit_bias", None),
        ({"modalities": ["text", "audio"]}, "modalities", "unsupported"),
        ({"store": True}, "store", "unsupported"),
    ],
    ids=str,
)
def test_bad_fields_of_a_chat_are_named(fields, param, code):
    with pytest.raises(ApiError) as error:
        chat(**fields).sampling(16, 0)
    body = error.value.body()["error"]
    assert (error.value.status, body["param"], body["code"]) == (400, param, code)
    assert param.split(".")[-1] in body["message"]


def test_what_is_no_chat_at_all():
    with pytest.raises(ApiError, match="fields model and messages"):
        parse_chat(b"[]")
    with pytest.raises(ApiError, match="messages is missing"):
        parse_chat(b'{"model": "m"}')


def test_a_conversation_is_roles_and_texts():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    echoed = {"role": "assistant", "content": "", "refusal": None, "annotations": [], "audio": None, "tool_calls": None}
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}, echoed, USER]
    assert chat(messages=messages).conversation() == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": ""},
        USER,
    ]


def test_neutral_values_of_unsupported_chat_fields_are_accepted():
    neutral = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "modalities": ["text"]}
    chat(**neutral, parallel_tool_calls=True, presence_penalty=0.0, logit_bias={}, store=False, user="someone", n=1)


def test_limits_and_logprobs_of_a_chat():
    assert chat().limit is None
    assert chat(max_tokens=5).limit == chat(max_completion_tokens=5).limit == 5
    assert chat(max_tokens=5, max_completion_tokens=5).limit == 5
    assert chat(max_completion_tokens=5).limit_name == "max_completion_tokens"
    assert chat().sampling(5, 0).logprobs is None
    assert chat(logprobs=True).sampling(5, 0).logprobs == 0
    assert chat(logprobs=True, top_logprobs=3).sampling(5, 0).logprobs == 3


def test_a_refusal_of_a_chat_does_not_quote_the_conversation():
    for messages in (["SECRET"], [{**USER, "role": "SECRET"}], [{**USER, "content": [{"type": "SECRET"}]}]):
        with pytest.raises(ApiError) as error:
            chat(messages=messages)
        assert "SECRET" not in json.dumps(error.value.body())


def test_logprobs_in_the_shape_of_a_chat():
    spell = [b"a", "é".encode()[:1]].__getitem__
    assert chat_logprobs_object([TokenLogprobs(1, -0.5, [(0, -0.25)])], spell) == {
        "content": [
            {
                "token": "bytes:\\xc3",
                "logprob": -0.5,
                "bytes": [0xC3],
                "top_logprobs": [{"token": "a", "logprob": -0.25, "bytes": [97]}],
            }
        ]
    }


def test_what_clients_of_vllm_always_write_is_accepted():
    request = {"repetition_penalty": 1.0, "logprobs": None, "stream": True, "stream_options": {"include_usage": True}}
    parse(**request, max_tokens=5, ignore_eos=True, top_k=-1, min_p=0.0, skip_special_tokens=True, min_tokens=0)
    chat(**{**request, "logprobs": False}, max_completion_tokens=5, add_generation_prompt=True, echo=False)
    assert parse(top_k=-1).sampling(1, 0).top_k == 0
    assert parse(stream=True, stream_options={"include_usage": None}).stream_options.include_usage is None
    chat(metadata={"a": "b"}, prompt_cache_key="k", safety_identifier="s", session_id="i", user="u", cache_salt="c")


@pytest.mark.parametrize(
    ("name", "value"),
    [("skip_special_tokens", False), ("skip_special_tokens", 1), ("bad_words", ["x"]),
     ("response_format", {"type": "json_object"}), ("response_format", {}), ("best_of", True), ("length_penalty", "1"),
     ("length_penalty", True), ("vllm_xargs", {"a": 1}), ("add_special_tokens", False), ("prompt_logprobs", 0)],
)  # fmt: skip
def test_other_values_of_them_are_refused_by_name(name, value):
    with pytest.raises(ApiError, match=name) as error:
        parse(**{name: value})
    assert (error.value.param, error.value.code) == (name, "unsupported")


def test_names_and_empty_contents_of_messages():
    messages = [{"role": "assistant", "content": None}, {**USER, "name": "Ada"}, {**USER, "name": None}]
    assert chat(messages=messages).conversation() == [
        {"role": "assistant", "content": ""},
        {**USER, "name": "Ada"},
        USER,
    ]


def test_only_the_first_choice_counts_its_prompt():
    assert [parse(n=3).sampling(1, choice).counts_prompt for choice in range(3)] == [True, False, False]
