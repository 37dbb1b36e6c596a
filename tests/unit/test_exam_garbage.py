"""Exams whose endpoint, questions or journal hold garbage: nothing of it is counted as an answer of the model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attnzoo.cli import main
from scripts.exams.endpoint import Endpoint, EndpointError, RefusedError
from scripts.exams.journal import Journal
from scripts.exams.questions import read_questions
from tests.helpers.chat_endpoint import ChatEndpoint, chat_endpoint

URL = "http://127.0.0.1:9/v1"
"""Where nobody listens."""
NAN = float("nan")


@pytest.fixture
def garbage() -> Iterator[ChatEndpoint]:
    with chat_endpoint() as found:
        yield found


def chat(message: Any) -> Any:
    return {"choices": [{"message": message}]}


GARBAGE = [
    ("null", "answered without 'choices'"),
    ({"choices": None}, "answered with a NoneType as 'choices'"),
    ({"choices": []}, "answered with an empty list as 'choices'; is it OpenAI's interface?"),
    (chat(None), "answered without 'content'"),
    (chat({"content": 5}), "answered with a int, not a text"),
    (chat({"content": {"a": 1}}), "answered with a dict, not a text"),
    ({"choices": [{"message": {"content": "x"}, "finish_reason": 5}]}, "answered with a int as 'finish_reason'"),
    (chat({"content": [{"type": "text", "text": "<answer>(A)</answer>"}]}), "answered with a list, not a text"),
    ("[" * 200_000, "answered no JSON"),
]


@pytest.mark.parametrize(("content", "told"), GARBAGE, ids=[str(told) for _, told in GARBAGE])
def test_garbage_is_no_answer(garbage: ChatEndpoint, content: Any, told: str) -> None:
    garbage.replies["/chat/completions"] = content
    with Endpoint(garbage.url) as endpoint, pytest.raises(RefusedError, match=told):
        endpoint.answer("?", temperature=0.0, max_tokens=1, seed=0)


def test_an_answer_without_a_text_is_empty(garbage: ChatEndpoint) -> None:
    garbage.replies["/chat/completions"] = chat({"content": None, "refusal": "no"})
    with Endpoint(garbage.url) as endpoint:
        assert endpoint.answer("?", temperature=0.0, max_tokens=1, seed=0) == ("", "unsaid")


def test_a_wrong_coding_is_tried_again(garbage: ChatEndpoint) -> None:
    with Endpoint(garbage.url, tries=2, wait_s=0.0) as endpoint:
        garbage.replies["/chat/completions"], garbage.coding = "not compressed", "gzip"
        with pytest.raises(EndpointError, match="failed 2 times"):
            endpoint.answer("?", temperature=0.0, max_tokens=1, seed=0)


@pytest.mark.parametrize("value", [None, "x", "NaN", 1e4, True, [1]])
def test_what_is_no_log_probability(garbage: ChatEndpoint, value: Any) -> None:
    garbage.replies["/completions"] = json.dumps({"choices": [{"logprobs": {"top_logprobs": [{"A": value, "B": -1}]}}]})
    if value == "NaN":
        garbage.replies["/completions"] = garbage.replies["/completions"].replace('"NaN"', "NaN")
    with (
        Endpoint(garbage.url) as endpoint,
        pytest.raises(RefusedError, match=r"gave 'A' the log probability .*, which is none"),
    ):
        endpoint.next_tokens("?", 20)
    garbage.replies["/completions"] = {"choices": [{"logprobs": None}]}
    with Endpoint(garbage.url) as endpoint, pytest.raises(RefusedError, match="gave no top_logprobs"):
        endpoint.next_tokens("?", 20)


@pytest.mark.parametrize(
    "models", [{"data": None}, {"data": 5}, {"data": [{"id": None}]}, {"data": {"a": {"id": "x"}}}]
)
def test_a_list_of_models_that_is_none(garbage: ChatEndpoint, models: Any) -> None:
    garbage.replies["/models"] = models
    with pytest.raises(RefusedError, match="lists no models by their ids"):
        Endpoint(garbage.url)


@pytest.mark.parametrize("key", ["k\ny", "schlüssel", " ", "k y"])
def test_a_key_that_no_header_can_hold(key: str) -> None:
    with pytest.raises(ValueError, match="key holds a character that no header may have") as caught:
        Endpoint(URL, key=key)
    assert not key.strip() or key not in str(caught.value)


@pytest.mark.parametrize("entry", [{}, {"text": 5}, {"text": None}, {"next_tokens": 5}, {"next_tokens": {"A": "x"}}])
def test_a_damaged_journal_is_refused_and_kept(tmp_path: Path, entry: dict[str, Any]) -> None:
    path = tmp_path / "answers.jsonl"
    for damaged in (json.dumps({"key": "0|0|0", **entry}), "[" * 100_000):
        path.write_text(json.dumps({"model": "m"}) + "\n" + damaged + "\n")
        with pytest.raises(ValueError, match=r"is no journal of an exam \(line 2\)"):
            Journal(path, {"model": "m"})
        assert damaged in path.read_text()


ROW = '"question": "Q", "answer": "A"'
TABLE = "question,choices,answer"
BAD = {
    "two answers": ("x.jsonl", f'{{{ROW}, "choices": ["a", "b"], "answer": "B"}}', "'answer' is set twice"),
    "two of a letter": ("x.jsonl", f'{{{ROW}, "choices": {{"A": "1", "A": "2", "B": "3"}}}}', "'A' is set twice"),
    "one text twice": ("x.jsonl", f'{{{ROW}, "choices": ["a", "a"]}}', "the options A and B are the same text 'a'"),
    "no text": ("x.jsonl", f'{{{ROW}, "choices": ["a", null]}}', "option 'B' is None, not a text"),
    "a list for a text": ("x.jsonl", f'{{{ROW}, "choices": [["a"], "b"]}}', "option 'A' is .*, not a text"),
    "a list for an id": ("x.jsonl", f'{{{ROW}, "id": [1], "choices": ["a", "b"]}}', r"id is \[1\], not a text"),
    "half a pair": ("x.jsonl", f'{{{ROW}, "choices": ["\\ud800", "b"]}}', "half a surrogate pair"),
    "no end": ("x.jsonl", "[" * 100_000, "line 1 is not JSON"),
    "more cells": ("x.csv", f"{TABLE}\nQ,\"['a','b']\",A,B\n", "question 1 has more cells than the 3 columns"),
    "columns twice": ("x.csv", f"{TABLE},answer\nQ,\"['a','b']\",A,B\n", "the column 'answer' stands twice"),
    "letters twice": ("x.csv", f"{TABLE}\nQ,\"{{'A': '1', 'A': '2', 'B': '3'}}\",A\n", "choices are neither"),
    "no end of a cell": ("x.csv", f"{TABLE}\n{'Q' * 200_000},\"['a','b']\",A\n", "is not a table of comma-separated"),
}


@pytest.mark.parametrize("name", BAD)
def test_questions_that_say_two_things(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    file, content, told = BAD[name]
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=told):
        read_questions(tmp_path / file)
    assert main(["exam", str(tmp_path / file), "--url", URL]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_marks_of_editors_are_no_garbage(tmp_path: Path) -> None:
    """A byte order mark, and a line separator within a text."""
    (tmp_path / "x.csv").write_text(f"{TABLE}\nQ,\"['a','b']\",A\n", encoding="utf-8-sig")
    (tmp_path / "x.jsonl").write_text(f'{{{ROW}, "choices": ["a\u2028b", "c"]}}\r\n')
    assert [read_questions(tmp_path / file)[0].answer for file in ("x.csv", "x.jsonl")] == ["A", "A"]
