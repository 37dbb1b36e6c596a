"""Exams and rubrics against our own server in this process: what is counted is what the model does."""

import json
import math

import pytest
import torch

from attnzoo.cli import main
from attnzoo.clinical import rubric
from attnzoo.clinical.case_study import SLEEP, data_text, write_case
from attnzoo.clinical.formats import load_cohort
from attnzoo.errors import harmless
from scripts.exams.answers import likeliest
from scripts.exams.endpoint import Endpoint, EndpointError, RefusedError
from scripts.exams.exam import Settings, take
from scripts.exams.journal import Journal
from scripts.exams.questions import Question, read_questions
from tests.helpers.clinical_files import write_pmdata
from tests.helpers.http_server import MODEL, running
from tests.helpers.serving import chat_tokenizer

OPTIONS = ("at dawn", "at noon", "at dusk", "never")
NOWHERE = "http://127.0.0.1:9/v1"
"""The discard port, on which nothing listens here."""


def questions(count: int) -> list[Question]:
    """Questions whose right answers are A, B, C, D, A, ..."""
    options = dict(zip("ABCD", OPTIONS, strict=True))
    return [Question(id=str(n), stem=f"When is {n}?", options=options, answer="ABCD"[n % 4]) for n in range(count)]


@pytest.fixture(scope="module")
def served():
    with running("mha", words=chat_tokenizer(), max_batched_tokens=64, max_len=1024) as (url, owner):
        yield f"{url}/v1", owner


def says_always(model: torch.nn.Module, token: int) -> None:
    """Makes every hidden row the same, and the token's logit the highest there."""
    model.embedding.weight.copy_(model.embedding.weight[:1].expand_as(model.embedding.weight))
    hidden_D = model.hidden(torch.zeros(1, 1, dtype=torch.long))[0, 0]
    model.head.weight.zero_()
    model.head.weight[token] = 100 * hidden_D / hidden_D.square().sum()


def test_letters_are_the_models_likeliest_next_tokens(served):
    url, owner = served
    asked = questions(24)
    with Endpoint(url) as endpoint:
        assert endpoint.model == MODEL  # the only one
        found = take(endpoint, asked, Settings(mode="letters"), Journal(None, {}), parallel=4)
    words, read = chat_tokenizer(), 0
    for each in found:
        tokens = torch.tensor([words.encode(each.question.beginning(), bos=True)])
        values, ids = owner.engine.model(tokens)[0, -1].log_softmax(-1).topk(20)
        spelled = {words.decode([token]): value for token, value in zip(ids.tolist(), values.tolist(), strict=True)}
        expected = likeliest(spelled, "ABCD")
        assert each.by_order == {0: [expected]}, each.question.id
        read += expected is not None
    assert read < len(found)  # some answers are unread


def test_rounds_are_samples_and_an_interrupted_exam_goes_on(served, tmp_path):
    url, _ = served
    settings, asked = Settings(rounds=3, temperature=3.0, tokens=4), questions(3)
    path, before = tmp_path / "answers.jsonl", {"model": MODEL}

    class Interrupted(Endpoint):
        left = 5

        def answer(self, *arguments, **options):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().answer(*arguments, **options)

    with Interrupted(url) as endpoint, Journal(path, before) as journal, pytest.raises(KeyboardInterrupt):
        take(endpoint, asked, settings, journal, parallel=1)
    first = path.read_text("utf-8").splitlines()
    assert len(first) == 1 + 5
    with Endpoint(url) as endpoint:
        with Journal(path, before) as journal:
            found = take(endpoint, asked, settings, journal, parallel=2)
        with Journal(None, {}) as other:
            assert (
                take(endpoint, asked, settings, other, parallel=1) == found
            )  # seeds decide, not the order of requests
    lines = path.read_text("utf-8").splitlines()
    assert lines[: len(first)] == first
    assert len(lines) == 1 + 9  # nothing was asked twice
    assert [each.failed for each in found] == [0, 0, 0]
    assert all(len(each.texts) == 3 for each in found)


def test_what_fails_is_counted_apart_and_asked_again(served, tmp_path):
    url, _ = served
    long = Question(id="long", stem="word " * 600, options={"A": "one", "B": "two"}, answer="A")
    settings = Settings(tokens=1)
    with Endpoint(url, tries=1) as endpoint, Journal(tmp_path / "a.jsonl", {}) as journal:
        found = take(endpoint, [*questions(2), long], settings, journal, parallel=2)
        assert [each.failed for each in found] == [0, 0, 1]
        assert set(journal.entries) == {"0|0|0", "1|0|0"}  # what failed will be asked again
        with pytest.raises(RefusedError, match=r"refuses the request .status 400.: .*context"):
            take(endpoint, [long], settings, journal, parallel=2)
    with Endpoint(NOWHERE, model="m", tries=2, wait_s=0.0) as endpoint:
        assert take(endpoint, questions(2), settings, Journal(None, {}), parallel=2)[1].failed == 1
        with pytest.raises(EndpointError, match="failed 2 times; the last time: ConnectError"):
            endpoint.answer("x", temperature=0.0, max_tokens=1, seed=0)
    with Endpoint(url, model="gpt") as endpoint, pytest.raises(RefusedError, match="status 404"):
        take(endpoint, questions(1), settings, Journal(None, {}), parallel=1)


def test_a_rubric_is_judged_over_an_endpoint(served):
    url, _ = served
    short = rubric.Rubric(name="r", kind="yes_no", principles=(rubric.Principle(name="p", question="Is it so?"),))
    cases = [
        rubric.CaseText("1", "HR 60", {"insights": "slow", "etiology": "sport"}),
        rubric.CaseText("2", "HR 90", {"x": "y"}),
    ]
    with Endpoint(url) as endpoint:
        judged = rubric.judge(
            short, cases, lambda prompt: endpoint.answer(prompt, temperature=0.0, max_tokens=8, seed=0).text
        )
    assert [(r.case_id, r.tag, r.principle) for r in judged.ratings] == [
        ("1", "insights", "p"), ("1", "etiology", "p"), ("2", "x", "p")
    ]  # fmt: skip
    assert all(rating.answer for rating in judged.ratings)
    assert judged.unread == sum(short.rating(rating.answer) is None for rating in judged.ratings)


def test_the_command(tmp_path, capsys):
    """The model always says B: of A, B, C, D, A, B two are right, and no question has one answer in all orders. In a
    chat it never ends by itself, so that no letter of it counts."""
    file, report = tmp_path / "q.jsonl", tmp_path / "report.json"
    lines = [
        {"question": q.stem, "choices": dict(q.options), "answer": q.answer, "domain": "odd" if n % 2 else "even"}
        for n, q in enumerate(questions(6))
    ]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert [q.answer for q in read_questions(file)] == list("ABCDAB")
    answers = ["--answers", str(tmp_path / "answers.jsonl")]
    with running("mha", words=chat_tokenizer(), max_batched_tokens=64) as (url, owner):
        says_always(owner.engine.model, chat_tokenizer().encode("B")[-1])
        words = ["exam", str(file), "--url", f"{url}/v1", "--json", str(report)]
        assert main([*words, "--max-tokens", "1"]) == 1
        assert "none of the 6 answers holds a letter that can be read; 6 were cut" in capsys.readouterr().err
        words += ["--mode", "letters", *answers]
        assert main([*words, "--orders", "3"]) == 0
        assert main([*words, "--orders", "2"]) == 2
        assert "belongs to an exam with orders=3, not 2" in capsys.readouterr().err
        assert main([*words, "--orders", "3", "--limit", "2", "--parallel", "1"]) == 0  # nothing is asked again
    rows = json.loads(report.read_text("utf-8"))["rows"]
    assert [(row["questions"], row["answered"], row["right"], row["unread"], row["failed"]) for row in rows] == [
        ("all", 2, 1, 0, 0), ("even", 1, 0, 0, 0), ("odd", 1, 1, 0, 0)
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert "orders_agree" in printed
    assert math.isclose(rows[0]["accuracy"], 0.5)
    found = [{q.reordered(order, seed=0).original("B") for order in range(3)} for q in read_questions(file)[:2]]
    assert rows[0]["orders_agree"] == sum(len(each) == 1 for each in found) < 2
    assert main(["exam", str(file), "--url", NOWHERE, "--rounds", "5"]) == 2
    assert "rounds=5 needs a temperature above 0" in capsys.readouterr().err
    assert main(["exam", str(file), "--url", NOWHERE, "--orders", "25"]) == 2
    assert "has 24 orders of its options, and orders=25 asks for more; give 24 or fewer" in capsys.readouterr().err
    assert main(["exam", str(file), "--url", "127.0.0.1"]) == 2
    assert "url='127.0.0.1' must begin with http://" in capsys.readouterr().err
    assert main(["exam", str(file), "--url", NOWHERE, "--key-variable", "NO_SUCH_NAME"]) == 2
    assert "--key-variable: the environment has no NO_SUCH_NAME" in capsys.readouterr().err


def test_case_studies_are_written_and_judged_over_an_endpoint(served, tmp_path, capsys):
    url, _ = served
    data = write_pmdata(tmp_path) / "pmdata"
    answers, report = tmp_path / "answers.jsonl", tmp_path / "cases.json"
    words = ["case-study", str(data), "--url", url, "--days", "2", "--stay", "p03 2020-01-09", "--max-tokens", "4"]
    words += ["--answers", str(answers)]
    assert main(words) == 0
    lines = answers.read_text("utf-8").splitlines()
    assert len(lines) == 1 + len(SLEEP.sections)
    cohort = load_cohort("pmdata", data, days=2)
    with Endpoint(url) as endpoint:
        expected = write_case(
            SLEEP,
            "p03 2020-01-09",
            data_text(cohort, cohort.stay_ids.index("p03 2020-01-09"), SLEEP),
            lambda prompt: endpoint.answer(prompt, temperature=0.0, max_tokens=4, seed=0).text,
        )
    printed = capsys.readouterr().out
    mark = " (cut: 'length')"  # the model ends no text by itself
    assert all(f"## {tag}{mark}\n\n{harmless(text)}\n" in printed for tag, text in expected.sections.items())
    assert main([*words, "--rate", "yes_no", "--json", str(report)]) == 1
    assert answers.read_text("utf-8").splitlines() == lines  # nothing is asked twice, and of cut texts nothing
    content = json.loads(report.read_text("utf-8"))
    assert content["cases"][0]["sections"] == dict(expected.sections)
    assert content["cases"][0]["cut"] == dict.fromkeys(expected.sections, "length")
    assert content["ratings"] == []
    told = f"raise --max-tokens=4, and name another --answers: '{answers}' belongs to this limit"
    all_of = f"p03 2020-01-09: {', '.join(expected.sections)} ended at the limit of tokens"
    errors = capsys.readouterr().err
    assert f"{all_of}, perhaps within a sentence; {told}. They are not judged, nor is the whole." in errors
    assert f"nothing was rated: each of the 3 sections was cut ('length'); {told}" in errors
    for more, message in (
        (["--count", "2"], "--stay names the cases and --count draws them"),
        (["--judge-url", url], "--judge-url belongs to --rate; name a rubric"),
        (["--temperature", "-1"], "--temperature=-1.0 must be 0 or more"),
        (["--seed", "1"], "belongs to case studies with seed=0, not 1"),
    ):
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err
