"""`attnzoo case-study` without a server: texts that are cut or empty, judges who do not follow the form, and Ctrl-C."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from attnzoo.cli import main
from attnzoo.clinical.case_study import SLEEP
from scripts.exams.endpoint import Answer, Endpoint
from tests.helpers.clinical_files import write_pmdata

TAGS = [section.tag for section in SLEEP.sections]


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    data = write_pmdata(tmp_path) / "pmdata"
    stay = ["--stay", "p03 2020-01-09", "--days", "2", "--max-tokens", "9"]
    return ["case-study", str(data), "--url", "http://127.0.0.1:9/v1", "--model", "m", *stay]


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Makes every endpoint say something to a prompt; what was asked is in the list."""

    def set_answer(reply: Callable[[str], Answer]) -> list[str]:
        asked: list[str] = []

        def answer(self: Endpoint, prompt: str, **sampling: object) -> Answer:
            asked.append(prompt)
            return reply(prompt)

        monkeypatch.setattr(Endpoint, "answer", answer)
        return asked

    return set_answer


def is_judgement(prompt: str) -> bool:
    return "End with a line: Rating:" in prompt


def text_for(prompt: str) -> str:
    """Another text for each section, so that no two judgements are the same request."""
    return f"Text {zlib.crc32(prompt.encode())}"


def test_a_section_that_was_cut_is_marked_and_not_judged(words, says, tmp_path, capsys) -> None:
    report, answers, insights = tmp_path / "r.json", tmp_path / "a.jsonl", SLEEP.sections[0].question
    asked = says(
        lambda prompt: Answer("Rating: 4") if is_judgement(prompt) else Answer(text_for(prompt), insights in prompt)
    )
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
    asked = says(lambda prompt: Answer("Rating: 4" if is_judgement(prompt) else text_for(prompt)))
    assert main([*words, "--rate", "likert", "--json", str(report)]) == 0
    content = json.loads(report.read_text())
    assert len(content["ratings"]) == 12 * 3 + 3
    assert {row["ratings"] for row in content["rows"]} == {1, 3}
    assert len(asked) == 3 + 12 * 3 + 3
    assert content["cases"][0]["cut"] == []


def test_an_empty_answer_is_a_failed_request_and_asked_again(words, says, tmp_path, capsys) -> None:
    answers = tmp_path / "a.jsonl"
    says(lambda prompt: Answer(""))
    assert main([*words, "--answers", str(answers)]) == 1
    error = capsys.readouterr().err
    assert "answered without a text; run it again, or raise --max-tokens, or take another model" in error
    assert f"'{answers}' keeps what was answered" in error
    says(lambda prompt: Answer("A text."))
    assert main([*words, "--answers", str(answers)]) == 0


def test_a_judge_who_never_follows_the_form_is_told(words, says, capsys) -> None:
    says(lambda prompt: Answer("Rating: 9" if is_judgement(prompt) else text_for(prompt)))
    assert main([*words, "--rate", "likert"]) == 1
    error = capsys.readouterr().err
    assert "none of the judge's 39 answers held a rating; the last one began 'Rating: 9'; name another judge" in error


def test_ctrl_c_says_what_is_kept(words, says, tmp_path, capsys) -> None:
    def interrupted(prompt: str) -> Answer:
        raise KeyboardInterrupt

    says(interrupted)
    path = tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt):  # which the program turns into the exit status 130
        main([*words, "--answers", str(path)])
    assert f"stopped; '{path}' keeps what was answered; the same command goes on" in capsys.readouterr().err


def test_what_is_wrong_is_known_before_the_data_are_read(words, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("scripts.case_studies.cases.load_cohort", lambda *_, **__: pytest.fail("was read"))
    (tmp_path / "x.jsonl").write_text("no journal\n")
    words[words.index("--url") + 1] = "ftp://x"
    assert main(words) == 2
    assert "must begin with http" in capsys.readouterr().err
    words[words.index("--url") + 1] = "http://127.0.0.1:9/v1"
    assert main([*words, "--answers", str(tmp_path / "x.jsonl")]) == 2
    assert "is no journal of case studies" in capsys.readouterr().err


def test_a_wrong_name_is_told_in_a_short_line(words, capsys) -> None:
    words[words.index("--stay") + 1] = "garbage"
    assert main(words) == 2
    assert len(capsys.readouterr().err) < 600
