"""Bodies that Python would read and nobody should, and answers that every reader of lines can read."""

import json
import sys

import pytest
from pydantic import ValidationError

from serve.openai.errors import ApiError, dump, event
from serve.openai.json_body import MAX_LEVELS, MAX_NAMES, read_object
from serve.openai.protocol import CompletionRequest, parse_completion
from serve.openai.protocol_chat import ChatRequest, parse_chat

HUGE = ["1" + "0" * 22, "-1" + "0" * 400, "9" * 5000, str(2**63), str(2**70)]
INTEGERS = ["max_tokens", "top_k", "seed", "n", "logprobs"]


def refused(parse, body: bytes) -> ApiError:
    with pytest.raises(ApiError) as error:
        parse(body)
    assert error.value.status == 400
    assert len(dump(error.value.body())) < 1000
    return error.value


@pytest.mark.parametrize("number", [*HUGE, "NaN", "Infinity", "-Infinity", "1e400", "-1e999"])
@pytest.mark.parametrize("name", [*INTEGERS, "temperature", "top_p", "min_p", "stop", "user", "priority", "logit_bias"])
def test_numbers_that_no_field_holds_are_refused_by_its_name(name, number):
    body = f'{{"model": "m", "prompt": "x", "{name}": {number}}}'
    assert refused(parse_completion, body.encode()).param == name


@pytest.mark.parametrize("number", [*HUGE, "NaN", "1e400"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", "[1, {}]"),
        ("prompt", "[[1], [{}]]"),
        ("cache", '{{"policy": "think", "repack_every": {}}}'),
        ("cache", '{{"policy": {{"a": [{}]}}}}'),
        ("metadata", '{{"a": {}}}'),
        ("stream_options", '{{"include_usage": {}}}'),
        ("logit_bias", '{{"5": {}}}'),
    ],
)
def test_numbers_inside_of_fields_too(name, value, number):
    body = f'{{"model": "m", "prompt": "x", "{name}": {value.format(number)}}}'.replace(
        '"prompt": "x", "prompt"', '"prompt"'
    )
    assert refused(parse_completion, body.encode()).param == name


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", ["1.0", "1e0", '"1"', "true", "[1]", "{}"])
def test_what_is_no_whole_number_is_none(name, value):
    assert refused(parse_completion, f'{{"model": "m", "prompt": "x", "{name}": {value}}}'.encode()).param == name


@pytest.mark.parametrize("text", ['"\\ud800"', '"a\\udfff"', '["x", "\\ud83d"]', '{"\\udc00": 1}', '"\\ude00\\ud83d"'])
@pytest.mark.parametrize("name", ["prompt", "stop", "user", "cache", "metadata", "suffix", "unheard"])
def test_half_a_surrogate_pair_is_refused_by_its_field(name, text):
    body = f'{{"model": "m", "prompt": "x", "{name}": {text}}}'.replace('"prompt": "x", "prompt"', '"prompt"')
    error = refused(parse_completion, body.encode())
    assert (error.param, "surrogate" in error.message) == (name, True)
    assert read_object(b'{"a": "\\ud83d\\ude00"}', "a") == {"a": "\U0001f600"}


def test_a_name_that_is_half_a_pair_is_repeated_as_text():
    assert refused(parse_completion, b'{"model": "m", "prompt": "x", "\\ud800": 1}').param == "?"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"model": "m", "prompt": "a", "prompt": "b"}', "prompt"),
        (b'{"model": "m", "prompt": "a", "max_tokens": 1, "max_tokens": 1}', "max_tokens"),
        (b'{"model": "m", "prompt": "a", "cache": {"policy": "d2o", "policy": "think"}}', "policy"),
        (b'{"model": "m", "prompt": "a", "m\\u0061x_tokens": 5, "max_tokens": 6}', "max_tokens"),
    ],
)
def test_a_name_given_twice_is_refused(body, param):
    assert refused(parse_completion, body).param == param


@pytest.mark.parametrize("depth", [MAX_LEVELS + 1, 500, 900, 5000, 200_000])
@pytest.mark.parametrize("form", ["list", "object", "mixed"])
def test_deep_nesting_is_refused(depth, form):
    opening, closing = {"list": ("[", "]"), "object": ('{"a":', "}"), "mixed": ('[{"a":', "}]")}[form]
    nested = opening * depth + "1" + closing * depth
    for name in ("prompt", "cache", "metadata", "tools", "unheard"):
        body = f'{{"model": "m", "prompt": "x", "{name}": {nested}}}'.replace('"prompt": "x", "prompt"', '"prompt"')
        error = refused(parse_completion, body.encode())
        assert error.param in (name, None)  # beyond what Python itself can read nothing is known
        assert "levels" in error.message
    refused(parse_completion, opening.encode() * depth)
    assert sys.getrecursionlimit() > 500


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"model": "m", "prompt": "\xff"}', "not UTF-8 at byte 26"),
        (b'{"model": "m", "prompt": "\xed\xa0\x80"}', "not UTF-8"),
        ('{"model": "m"}'.encode("utf-16"), "not UTF-8"),
        (b'{"model": "m",}', "line 1 column"),
        (b'{"model": "m"} x', "Extra data"),
        (b"{'model': 'm'}", "line 1"),
        (b'{"a": .5}', "line 1"),
        (b'{"a": 01}', "line 1"),
        (b'{"a": "\n"}', "control character"),
        (b"\x00", "line 1"),
    ],
)
def test_what_is_no_json(body, words):
    error = refused(parse_completion, body)
    assert error.code == "invalid_json"
    assert words in error.message


def test_a_mark_of_byte_order_is_no_part_of_a_body():
    assert parse_completion(b'\xef\xbb\xbf{"model": "m", "prompt": "x"}').prompt == "x"


def test_long_names_are_not_repeated():
    error = refused(parse_completion, json.dumps({"model": "m", "prompt": "x", "x" * 100_000: 1}).encode())
    assert len(error.param) < 100
    refused(
        parse_chat,
        json.dumps({"model": "m", "messages": [{"role": "user", "content": "a", "y" * 100_000: 1}]}).encode(),
    )


def test_no_character_breaks_a_line():
    every = [chr(code) for code in range(0x11000) if not 0xD800 <= code < 0xE000] + ["\U000e0001", "\U0010ffff"]
    data = dump({"text": "".join(every)})
    assert json.loads(data) == {"text": "".join(every)}
    assert len(data.decode().splitlines()) == 1
    assert len(data.splitlines()) == 1
    assert len(event({"a": "\u2028"}).decode().splitlines()) == 2


def test_what_is_no_number_is_never_sent():
    with pytest.raises(ValueError, match="JSON"):
        dump({"a": float("nan")})


WRONG = [
    (CompletionRequest, "prompt", [1, "a"] * 3000),
    (CompletionRequest, "prompt", [[]] * 5000),
    (CompletionRequest, "prompt", [None] * 5000),
    (CompletionRequest, "prompt", [[None] * 5000]),
    (CompletionRequest, "stop", [{}] * 5000),
    (ChatRequest, "messages", [{}] * 5000),
    (ChatRequest, "messages", [1] * 5000),
    (ChatRequest, "messages", [{"role": "user", "content": "a", "b": 1}] * 5000),
]


@pytest.mark.parametrize(("kind", "name", "value"), WRONG, ids=range(len(WRONG)))
def test_a_long_list_is_wrong_at_its_first_mistake(kind, name, value):
    """The reader keeps Python's lock while it collects mistakes: 3 s for a body of 1 MiB, with every stream waiting."""
    with pytest.raises(ValidationError) as error:
        kind.model_validate({"model": "m", "prompt": "x", "messages": [], name: value})
    assert sum(where["loc"][0] == name for where in error.value.errors()) < 30


@pytest.mark.parametrize("name", [None, "metadata", "cache", "stream_options", "logit_bias"])
def test_an_object_with_too_many_names_is_refused_by_its_field(name):
    many = {f"k{index}": 1 for index in range(MAX_NAMES + 1)}
    body = {"model": "m", "prompt": "x", **(many if name is None else {name: many})}
    error = refused(parse_completion, json.dumps(body).encode())
    assert (error.param, f"more than {MAX_NAMES} names" in error.message) == (name, True)


@pytest.mark.parametrize(
    "text", ["plain", "é", "数", "a\x7fb", "\x85", "\u2028é", "\u2029", "\u2028", 'q"\\\n\x00', "🙂"]
)
def test_an_answer_is_one_line_that_is_the_same_json(text):
    line = dump({"text": [text]})
    assert json.loads(line) == {"text": [text]}
    assert len(line.decode().splitlines()) == 1
    assert b"\x7f" not in line
