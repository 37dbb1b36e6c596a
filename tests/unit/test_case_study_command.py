"""`attnzoo case-study` at endpoints whose texts are cut or empty, whose judges do not follow the form, and Ctrl-C."""

import json
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from attnzoo.cli import main
from attnzoo.clinical.case_study import SLEEP
from tests.helpers.chat_endpoint import ChatEndpoint, chat_endpoint
from tests.helpers.clinical_files import write_pmdata
from tests.helpers.training import ROOT

TAGS = [section.tag for section in SLEEP.sections]


@pytest.fixture
def endpoint() -> Iterator[ChatEndpoint]:
    with chat_endpoint() as found:
        yield found


@pytest.fixture
def words(tmp_path: Path, endpoint: ChatEndpoint) -> list[str]:
    data = write_pmdata(tmp_path) / "pmdata"
    stay = ["--stay", "p03 2020-01-09", "--days", "2", "--max-tokens", "9"]
    return ["case-study", str(data), "--url", endpoint.url, "--model", "m", *stay]


@pytest.fixture
def says(endpoint: ChatEndpoint) -> Callable[..., list[str]]:
    """Sets what the endpoint says to a prompt; texts for prompts with the words `cut` end at the limit of tokens. The
    list holds what was asked."""

    def set_answer(reply: Callable[[str], str], cut: str = "none at all") -> list[str]:
        asked: list[str] = []

        def answer(request: dict[str, Any]) -> dict[str, Any]:
            (message,) = request["messages"]
            prompt = message["content"]
            asked.append(prompt)
            reason = "length" if cut in prompt else "stop"
            return {"choices": [{"message": {"content": reply(prompt)}, "finish_reason": reason}]}

        endpoint.replies["/chat/completions"] = answer
        return asked

    return set_answer


def is_judgement(prompt: str) -> bool:
    return "End with a line: Rating:" in prompt


def text_for(prompt: str) -> str:
    """Another text for each section, so that no two judgements are the same request."""
    return f"Text {zlib.crc32(prompt.encode())}"


def test_a_section_that_was_cut_is_marked_and_not_judged(words, says, tmp_path, capsys) -> None:
    report, answers, insights = tmp_path / "r.json", tmp_path / "a.jsonl", SLEEP.sections[0].question
    asked = says(lambda prompt: "Rating: 4" if is_judgement(prompt) else text_for(prompt), cut=insights)
    words += ["--rate", "likert", "--json", str(report), "--answers", str(answers)]
    for _ in range(2):  # the second time from the journal
        assert main(words) == 0
        printed = capsys.readouterr()
        content = json.loads(report.read_text())
        assert content["cases"][0]["cut"] == TAGS[:1]
        assert f"## {TAGS[0]} (cut at the limit of tokens)\n\nText " in printed.out
        assert f"## {TAGS[1]}\n\nText " in printed.out
        told = f"p03 2020-01-09: {TAGS[0]} ended at --max-tokens=9, perhaps within a sentence; raise it. They are not"
        assert told in printed.err
        assert {rating["tag"] for rating in content["ratings"]} == set(TAGS[1:])
    assert len(asked) == 3 + 12 * 2


def test_whole_sections_are_judged_each_and_together(words, says, tmp_path) -> None:
    report = tmp_path / "r.json"
    asked = says(lambda prompt: "Rating: 4" if is_judgement(prompt) else text_for(prompt))
    assert main([*words, "--rate", "likert", "--json", str(report)]) == 0
    content = json.loads(report.read_text())
    assert len(content["ratings"]) == 12 * 3 + 3
    assert {row["ratings"] for row in content["rows"]} == {1, 3}
    assert len(asked) == 3 + 12 * 3 + 3
    assert content["cases"][0]["cut"] == []


def test_an_empty_answer_is_a_failed_request_and_asked_again(words, says, tmp_path, capsys) -> None:
    answers = tmp_path / "a.jsonl"
    says(lambda prompt: "")
    assert main([*words, "--answers", str(answers)]) == 1
    error = capsys.readouterr().err
    assert "answered without a text; run it again, or raise --max-tokens, or take another model" in error
    assert f"'{answers}' keeps what was answered" in error
    says(lambda prompt: "A text.")
    assert main([*words, "--answers", str(answers)]) == 0


def test_a_judge_who_never_follows_the_form_is_told(words, says, capsys) -> None:
    says(lambda prompt: "Rating: 9" if is_judgement(prompt) else text_for(prompt))
    assert main([*words, "--rate", "likert"]) == 1
    error = capsys.readouterr().err
    assert "none of the judge's 39 answers held a rating; the last one began 'Rating: 9'; name another judge" in error


def test_ctrl_c_says_what_is_kept(words, endpoint, tmp_path) -> None:
    """Of a process of its own, while its endpoint thinks."""
    path, asked, done = tmp_path / "a.jsonl", threading.Event(), threading.Event()

    def thinks(request: dict[str, Any]) -> dict[str, Any]:
        asked.set()
        done.wait(60)
        return {"choices": [{"message": {"content": "Late."}}]}

    endpoint.replies["/chat/completions"] = thinks
    command = [sys.executable, "-m", "attnzoo", *words, "--answers", str(path)]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE)
    try:
        assert asked.wait(120), process.communicate(timeout=60)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        done.set()
        process.kill()
        process.wait(10)
    assert process.returncode == 130
    assert f"stopped; '{path}' keeps what was answered; the same command goes on" in errors
    assert "Traceback" not in errors


def test_what_is_wrong_is_known_before_the_data_are_read(words, endpoint, tmp_path, capsys) -> None:
    """Data that cannot be read are not what is told."""
    (tmp_path / "x.jsonl").write_text("no journal\n")
    (tmp_path / "damaged.tar.gz").write_text("no archive")
    words[1] = str(tmp_path / "damaged.tar.gz")
    at = words.index("--url") + 1
    assert main(words) == 2
    assert "damaged.tar.gz" in capsys.readouterr().err
    assert main([*words[:at], "ftp://x", *words[at + 1 :]]) == 2
    assert "must begin with http" in capsys.readouterr().err
    assert main([*words, "--answers", str(tmp_path / "x.jsonl")]) == 2
    assert "is no journal of case studies" in capsys.readouterr().err


def test_a_wrong_name_is_told_in_a_short_line(words, capsys) -> None:
    words[words.index("--stay") + 1] = "garbage"
    assert main(words) == 2
    assert len(capsys.readouterr().err) < 600
