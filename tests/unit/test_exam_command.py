"""`attnzoo exam` at endpoints whose answers are cut, questions that say what they do not mean, and Ctrl-C."""

import json
from pathlib import Path
from typing import Any

import pytest

from attnzoo.cli import main
from tests.helpers.chat_endpoint import ChatEndpoint, stopped, told_when_stopped


@pytest.fixture
def words(tmp_path: Path, endpoint: ChatEndpoint) -> list[str]:
    rows = [{"question": f"Which? {n}", "choices": ["one", "two"], "answer": "AB"[n % 2]} for n in range(4)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ["exam", str(tmp_path / "q.jsonl"), "--url", endpoint.url, "--parallel", "2"]


def says(endpoint: ChatEndpoint, text: str, reason: Any, cut: str = "Which?") -> list[str]:
    """Answers of one text; those to prompts with the words `cut` end by `reason`. The list holds what was asked."""
    asked: list[str] = []

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        prompt = request["messages"][0]["content"]
        asked.append(prompt)
        ended = reason if cut in prompt else "stop"
        return {"choices": [{"message": {"content": text}, "finish_reason": ended}]}

    endpoint.replies["/chat/completions"] = answer
    return asked


def row_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())["rows"][0]
    return found


def test_whole_answers_count(words, endpoint, tmp_path, capsys) -> None:
    says(endpoint, "<answer>(B)</answer>", "stop")
    assert main([*words, "--json", str(tmp_path / "r.json")]) == 0
    found = row_of(tmp_path / "r.json")
    assert [found[key] for key in ("answered", "right", "answers", "unread", "cut")] == [4, 2, 4, 0, 0]
    assert "cut" not in capsys.readouterr().err


@pytest.mark.parametrize("reason", ["length", "content_filter", "tool_calls", None])
def test_a_cut_answer_is_unread_although_it_marks_a_letter(words, endpoint, tmp_path, capsys, reason) -> None:
    """The last letter counts, and of a cut answer nobody knows the last one."""
    report, answers = tmp_path / "r.json", tmp_path / "a.jsonl"
    asked = says(endpoint, "<answer>(A)</answer> But", reason, cut="Which? 0")
    for _ in range(2):  # the second time from the journal
        assert main([*words, "--json", str(report), "--answers", str(answers)]) == 0
        found = row_of(report)
        assert [found[key] for key in ("answered", "right", "unread", "cut")] == [4, 1, 1, 1]
        error = capsys.readouterr().err
        assert f"1 answer was cut ({reason or 'unsaid'!r}), and counts as unread; " in error
        way = f"raise --max-tokens=1024, and name another --answers: '{answers}' belongs to this limit"
        assert (way in error) == (reason == "length")
        assert ("take another --model" in error) == (reason != "length")
    assert len(asked) == 4


def test_an_exam_without_an_answer_that_can_be_read_has_failed(words, endpoint, tmp_path, capsys) -> None:
    says(endpoint, "<answer>(A)</answer> But", "length")
    assert main([*words, "--json", str(tmp_path / "r.json")]) == 1
    assert "none of the 4 answers holds a letter that can be read; 4 were cut ('length')" in capsys.readouterr().err
    assert row_of(tmp_path / "r.json")["cut"] == 4
    says(endpoint, "I cannot tell.", "stop")
    assert main(words) == 1
    assert "none of the 4 answers holds a letter that can be read; take another --model" in capsys.readouterr().err


@pytest.mark.parametrize("is_kept", [True, False])
@pytest.mark.parametrize("path", ["/models", "/chat/completions"])
def test_ctrl_c_says_what_is_kept_and_waits_for_nobody(words, endpoint, tmp_path, is_kept: bool, path: str) -> None:
    answers = tmp_path / "a.jsonl"
    words += ["--answers", str(answers)] if is_kept else []
    said = told_when_stopped(path, answers if is_kept else None)
    assert stopped(endpoint, words, path) == f"attnzoo exam: {said}\n"


ITEMS = [
    ({"choices": [True, False]}, "option 'A' is True, not a text; write it in quotes"),
    ({"choices": {"A": "yes", "B": False}}, "option 'B' is False, not a text; write it in quotes"),
    ({"question": True}, "question is True, not a text; write it in quotes"),
    ({"id": False}, "id is False, not a text; write it in quotes"),
    ({"domain": True}, "domain is True, not a text; write it in quotes"),
    ({"choices": ["one", float("nan")]}, "option 'B' is nan, not a number that there is; write it in quotes"),
    ({"choices": ["one", "\u200b"]}, "option 'B' must have a letter and a text"),
    ({"question": "\u200b\ufeff"}, "has no text before its options"),
]


@pytest.mark.parametrize(("change", "told"), ITEMS, ids=[told for _, told in ITEMS])
def test_an_item_that_holds_no_text(tmp_path, capsys, change: dict[str, Any], told: str) -> None:
    good = {"question": "Which?", "choices": ["one", "two"], "answer": "A"}
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(json.dumps(each) for each in (good, good | change)))
    assert main(["exam", str(path), "--url", "http://127.0.0.1:9/v1"]) == 2
    assert f"'{path}' question 2" in (error := capsys.readouterr().err)
    assert told in error


def test_choices_of_a_table_that_are_yes_and_no(tmp_path, capsys) -> None:
    path = tmp_path / "q.csv"
    path.write_text('question,choices,answer\nQ,"[True, False]",A\n')
    assert main(["exam", str(path), "--url", "http://127.0.0.1:9/v1"]) == 2
    assert "question 1: option 'A' is True, not a text; write it in quotes" in capsys.readouterr().err


def test_an_id_of_zero_is_an_id(tmp_path) -> None:
    from scripts.exams.questions import read_questions

    path = tmp_path / "q.jsonl"
    path.write_text('{"id": 0, "question": "Which?", "choices": ["one", "two"], "answer": "A", "domain": 0}')
    (found,) = read_questions(path)
    assert (found.id, found.group) == ("0", "0")


def test_what_an_endpoint_says_is_shown_and_not_obeyed(words, endpoint, tmp_path, capsys) -> None:
    """Its errors in one line; the reason of requests that failed, and whether they are asked again."""
    told = "\x1b[2Jno such\nthing\x07"
    asked = says(endpoint, "<answer>(B)</answer>", "stop")
    answer = endpoint.replies["/chat/completions"]

    def refuse(request: dict[str, Any]) -> Any:
        return (400, {"error": {"message": told}}) if asked else answer(request)

    endpoint.replies["/chat/completions"] = refuse
    assert main([*words, "--answers", str(tmp_path / "a.jsonl")]) == 1
    error = capsys.readouterr().err
    assert "3 requests failed, the last one so: " in error
    assert r"(status 400): \x1b[2Jno such" in error
    assert "; the same command asks again" in error
    assert main(words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("attnzoo exam: error: ")
    assert line.endswith(r"\x1b[2Jno such thing\x07")
