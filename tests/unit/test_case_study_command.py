"""`attnzoo case-study` at endpoints whose texts are cut or empty, whose judges do not follow the form, and Ctrl-C."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attnzoo.cli import main
from attnzoo.clinical.case_study import SLEEP
from tests.helpers.chat_endpoint import ChatEndpoint, stopped, told_when_stopped
from tests.helpers.clinical_files import write_pmdata

TAGS = [section.tag for section in SLEEP.sections]


@pytest.fixture
def words(tmp_path: Path, endpoint: ChatEndpoint) -> list[str]:
    data = write_pmdata(tmp_path) / "pmdata"
    stay = ["--stay", "p03 2020-01-09", "--days", "2", "--max-tokens", "9"]
    return ["case-study", str(data), "--url", endpoint.url, "--model", "m", *stay]


@pytest.fixture
def says(endpoint: ChatEndpoint) -> Callable[..., list[str]]:
    """Sets what the endpoint says to a prompt; texts for prompts with the words `cut` end by `reason`, as the endpoint
    says. The list holds what was asked."""

    def set_answer(reply: Callable[[str], str], cut: str = "none at all", reason: Any = "length") -> list[str]:
        asked: list[str] = []

        def answer(request: dict[str, Any]) -> dict[str, Any]:
            (message,) = request["messages"]
            prompt = message["content"]
            asked.append(prompt)
            ended = reason if cut in prompt else "stop"
            return {"choices": [{"message": {"content": reply(prompt)}, "finish_reason": ended}]}

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
        assert content["cases"][0]["cut"] == {TAGS[0]: "length"}
        assert f"## {TAGS[0]} (cut: 'length')\n\nText " in printed.out
        assert f"## {TAGS[1]}\n\nText " in printed.out
        told = f"p03 2020-01-09: {TAGS[0]} ended at the limit of tokens, perhaps within a sentence; raise --max-tokens"
        assert f"{told}=9, and name another --answers: '{answers}' belongs to this limit. It is not" in printed.err
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
    assert content["cases"][0]["cut"] == {}


def test_an_empty_answer_is_a_failed_request_and_asked_again(words, says, tmp_path, capsys) -> None:
    answers = tmp_path / "a.jsonl"
    says(lambda prompt: "")
    assert main([*words, "--answers", str(answers)]) == 1
    error = capsys.readouterr().err
    assert "answered without a text (finish_reason 'stop'); take another --model" in error
    assert f"'{answers}' keeps what was answered" in error
    says(lambda prompt: "A text.")
    assert main([*words, "--answers", str(answers)]) == 0


@pytest.mark.parametrize("reason", ["content_filter", "tool_calls", "abort", None, ""])
def test_only_a_natural_end_makes_a_section_whole(words, says, tmp_path, capsys, reason) -> None:
    report, answers, insights = tmp_path / "r.json", tmp_path / "a.jsonl", SLEEP.sections[0].question
    says(lambda prompt: "Rating: 4" if is_judgement(prompt) else text_for(prompt), cut=insights, reason=reason)
    named = reason or "unsaid"
    for _ in range(2):
        assert main([*words, "--rate", "likert", "--json", str(report), "--answers", str(answers)]) == 0
        printed, content = capsys.readouterr(), json.loads(report.read_text())
        assert content["cases"][0]["cut"] == {TAGS[0]: named}
        assert f"## {TAGS[0]} (cut: {named!r})" in printed.out
        told = f"p03 2020-01-09: {TAGS[0]} ended by {named!r}, not by itself, perhaps within a sentence; take another"
        assert f"{told} --model. It is not judged" in printed.err
        assert {rating["tag"] for rating in content["ratings"]} == set(TAGS[1:])


def test_where_every_section_was_cut_nothing_was_rated(words, says, tmp_path, capsys) -> None:
    report = tmp_path / "r.json"
    asked = says(text_for, cut="")
    assert main([*words, "--rate", "likert", "--json", str(report)]) == 1
    printed = capsys.readouterr()
    assert "nothing was rated: each of the 3 sections was cut ('length')" in printed.err
    assert "principle" not in printed.out
    content = json.loads(report.read_text())
    assert (content["rows"], content["ratings"]) == ([], [])
    assert set(content["cases"][0]["sections"]) == set(TAGS)
    assert len(asked) == 3


def test_a_rating_in_an_answer_that_was_cut_does_not_count(words, says, tmp_path, capsys) -> None:
    """The last rating counts, and of a cut answer nobody knows the last one."""
    report, answers = tmp_path / "r.json", tmp_path / "a.jsonl"
    says(lambda prompt: "Rating: 4. But" if is_judgement(prompt) else text_for(prompt), cut="Rating: NUMBER")
    words += ["--rate", "likert", "--json", str(report), "--answers", str(answers)]
    for _ in range(2):
        assert main(words) == 1
        error = capsys.readouterr().err
        assert "none of the judge's 39 answers held a rating; 39 were cut ('length'); the last one began" in error
        ratings = json.loads(report.read_text())["ratings"]
        assert {(each["value"], each["answer"], each["ended"]) for each in ratings} == {
            (None, "Rating: 4. But", "length")
        }
    words[words.index(str(answers))] = str(tmp_path / "b.jsonl")
    question = "Nothing in the text would harm"  # one principle alone
    says(lambda prompt: "Rating: 4" if is_judgement(prompt) else text_for(prompt), cut=question)
    assert main(words) == 0
    told = capsys.readouterr()
    assert "1 of the judge's 39 answers was cut ('length') and counts as unread" in told.err
    (row,) = (row for row in json.loads(report.read_text())["rows"] if row["principle"] == "non_harmful")
    assert (row["mean"], row["ratings"], row["unread"]) == (None, 0, 1)
    assert "None" not in told.out


@pytest.mark.parametrize("text", ["\u200b", "\ufeff\u2060 \n", "\u00ad\u200d\ufe0f", "\u3164\u2800", "\u202e"])
def test_a_text_of_nothing_that_can_be_seen_is_empty(words, says, capsys, text) -> None:
    says(lambda prompt: text)
    assert main(words) == 1
    assert "answered without a text" in capsys.readouterr().err


def test_an_answer_that_a_journal_of_before_calls_cut_stays_so(words, says, tmp_path, capsys) -> None:
    answers = tmp_path / "a.jsonl"
    says(text_for, cut=SLEEP.sections[0].question)
    assert main([*words, "--answers", str(answers)]) == 0
    before = answers.read_text()
    answers.write_text(before.replace('"ended": "length"', '"cut": true'))
    assert before != answers.read_text()
    asked = says(text_for)
    assert main([*words, "--answers", str(answers)]) == 0
    assert not asked
    assert f"{TAGS[0]} ended at the limit of tokens" in capsys.readouterr().err


def test_a_judge_who_never_follows_the_form_is_told(words, says, capsys) -> None:
    says(lambda prompt: "Rating: 9" if is_judgement(prompt) else text_for(prompt))
    assert main([*words, "--rate", "likert"]) == 1
    error = capsys.readouterr().err
    assert "none of the judge's 39 answers held a rating; the last one began 'Rating: 9'; name another judge" in error


@pytest.mark.parametrize("is_kept", [True, False])
@pytest.mark.parametrize("path", ["/models", "/chat/completions"])
def test_ctrl_c_says_what_is_kept(words, endpoint, tmp_path, is_kept: bool, path: str) -> None:
    """While the endpoint thinks about its models, and about an answer."""
    answers = tmp_path / "a.jsonl"
    at = words.index("--model")
    words = [*words[:at], *words[at + 2 :], *(["--answers", str(answers)] if is_kept else [])]
    told = stopped(endpoint, words, path)
    said = told_when_stopped(path, answers if is_kept else None)
    assert told == f"attnzoo case-study: {said}\n"


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


def test_a_text_is_shown_and_not_obeyed_by_the_terminal(words, says, tmp_path, capsys) -> None:
    """The file of the report has it as it came."""
    says(lambda prompt: "\x1b[2JSleep\n\tmore\x07")
    assert main([*words, "--json", str(tmp_path / "r.json")]) == 0
    assert "\n\\x1b[2JSleep\n\tmore\\x07\n" in capsys.readouterr().out
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["cases"][0]["sections"][TAGS[0]] == "\x1b[2JSleep\n\tmore\x07"


def test_halves_of_characters_and_characters_that_turn_a_line_are_shown_as_escapes(words, says, tmp_path, capsys):
    """An emoji that the writer's server cut, and a text that turns: shown, judged, and kept as they came."""
    report, written = (
        tmp_path / "r.json",
        "Sleep \ud83d \u202eevil\u2066 line\u2028end \N{WOMAN}\u200d\N{STAFF OF AESCULAPIUS}",
    )
    says(lambda prompt: "Rating: 4" if is_judgement(prompt) else written)
    assert main([*words, "--rate", "likert", "--json", str(report)]) == 0
    shown = r"Sleep \ud83d \u202eevil\u2066 line\u2028end" + " \N{WOMAN}\u200d\N{STAFF OF AESCULAPIUS}"
    assert f"\n{shown}\n" in capsys.readouterr().out
    assert json.loads(report.read_text())["cases"][0]["sections"][TAGS[0]] == written
