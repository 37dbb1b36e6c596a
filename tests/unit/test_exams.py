"""Exams without a server: questions, letters in answers, votes, intervals, the journal."""

import json
import math
from pathlib import Path

import pytest

from attnzoo.intervals import wilson
from scripts.exams.answers import likeliest, read_letter, vote
from scripts.exams.endpoint import Endpoint
from scripts.exams.exam import Answered, Settings, fingerprint, rows
from scripts.exams.journal import Journal
from scripts.exams.questions import Question, read_questions

DEMO = Path(__file__).resolve().parents[3] / "shared" / "data" / "phllm" / "synthetic_mcq_data.csv"

ANSWERS = [
    ("<answer>(C)</answer>", "C"),
    ("First <answer>(A)</answer>. Wait, that is wrong: <answer>(D)</answer>", "D"),
    ("The tag was forgotten: <answer>B", "B"),
    ("<answer>option (e), the last</answer>", "E"),
    ("<answer>Option C</answer>", "C"),
    ("<answer>A good night's sleep</answer>", None),  # an option's text, of which A is a word
    ("<answer>I'd say so</answer>", None),
    ("<answer>A: a good night's sleep</answer>", "A"),
    ("<answer>a</answer>", "A"),
    (r"\boxed{\text{A good night}}", None),
    (r"\boxed{\text{A}}", "A"),
    ('The answer is "C".', "C"),
    ("The correct option is: [D]", "D"),
    ("The answer is 'A good night'", None),
    ("<answer>(F)</answer>", None),  # the question ends at E
    ("<answer>(A)</answer> or rather <answer>(F)</answer>", None),  # nor does an earlier letter count then
    ("So the answer is (B).", "B"),
    ("The correct answer is C because light delays the rhythm.", "C"),
    ("**Final answer:** D", "D"),
    ("Answer: **E**", "E"),
    ("ANSWER: (a)", "A"),
    ("The answer is A", "A"),
    ("The answer is A good night's sleep.", None),
    (r"We get $\boxed{B}$", "B"),
    ("The best choice is (C). Option (B) is wrong.", "C"),
    ("Options (A) and (B) can be excluded.", None),
    ("(D)", "D"),
    ("b) Light in the morning", "B"),
    ("E.g. light in the morning", None),
    ("A) Light in the evening\nB) Light in the morning", None),  # repeats the options
    ("B) Light in the morning\nThe sun (A) rises late.", "B"),
    ("I cannot tell.", None),
    ("", None),
    ("The answer is not B. The answer should be D!", "D"),
    ("<answer>(A) or (B)</answer>", None),
    ("<answer>A, B</answer>", None),
    ("<answer>A and C</answer>", None),
    ("The answer is (C) and (D).", None),
    ("The answer is C or D", None),
    (r"$\boxed{A, C}$", None),
    ("(A) or (B)", None),
    ("<answer>(A) or (B)</answer> No: <answer>B</answer>", "B"),
    ("The answer is (C), not (D).", "C"),
    ("The answer is (C), which (D) is not.", "C"),
    ("<answer>(B), (b)</answer>", "B"),
    ("<answer>(B) or (F)</answer>", "B"),  # the question ends at E
]
NAMES = ("B vitamins", "B-cells", "C-reactive protein", "D-dimer", "E coli", "K+")  # no letters of options
TWO = ("C D", "C | D", "C-D", "C–D", "C vs D", "C then D", "C, or perhaps D", "C as well as D", "C &amp; D", "C\\D")
FORMS = ("<answer>{}</answer>", "The answer is {}", "\\boxed{{{}}}")
ANSWERS += [(form.format(text), None) for form in FORMS for text in (*NAMES, *TWO)]
ANSWERS += [("\\boxed{A \\text{ and } B}", None), ("<answer>A|B|C|D</answer>", None)]
ANSWERS += [(text, "C") for text in ("<Answer>C</Answer>", "\\boxed{\\mathbf{C}}", "\\boxed{\\text{Option C}}")]
ANSWERS += [(text, "C") for text in ("The answer is «C».", "<answer>Choice (C)</answer>", "[C]", '"C"', "C) D-dimer")]
ANSWERS += [(text, "C") for text in ("<answer>C: a B vitamin</answer>", "Answer: C\nD is wrong", "Answer: C - B-cells")]


@pytest.mark.parametrize(("answer", "letter"), ANSWERS, ids=[text[:30] or "empty" for text, _ in ANSWERS])
def test_the_letter_of_an_answer(answer, letter):
    assert read_letter(answer, "ABCDE") == letter


def test_votes_and_likeliest_letters():
    assert vote(["B", None, "C", "C"]) == ("C", False)
    assert vote(["B", "C", "C", "B", None]) == ("B", True)
    assert vote([None, None]) == vote([]) == (None, False)
    # Two tokens of one letter count together; what is no letter of the question does not count.
    tokens = {"The": -0.1, "A": math.log(0.2), " B": math.log(0.15), "B)": math.log(0.1), "E": math.log(0.3)}
    assert likeliest(tokens, "ABCD") == "B"
    assert likeliest({"The": -0.1}, "ABCD") is None


def question(**changes) -> Question:
    values = {
        "id": "q",
        "stem": "Which?",
        "options": {"A": "one", "B": "two", "C": "three"},
        "answer": "B",
        "group": "g",
    }
    return Question(**values | changes)


def test_endpoints_and_groups_that_there_are_not(tmp_path):
    for url in ("http://", "http://127.0.0.1:99999/v1", "http://127.0.0.1:0/v1", "http://x:y/v1"):
        with pytest.raises(ValueError, match="must have a host, and a port of 1 to 65535 where it names one"):
            Endpoint(url, model="m")
    with pytest.raises(ValueError, match="url='http://x/v1 y' has white space in it"):
        Endpoint("http://x/v1 y", model="m")
    path = write(tmp_path / "q.jsonl", {"question": "Which?", "choices": ["one", "two"], "answer": "A", "topic": "t"})
    assert [each.group for group in ("domain", "topic") for each in read_questions(path, group)] == ["", "t"]
    with pytest.raises(
        ValueError, match=r"--group='topics': .*has no such column; did you mean 'topic'\? known: answer"
    ):
        read_questions(path, "topics")


def test_orders_of_the_options():
    asked = question()
    all_orders = [asked.reordered(order, seed=1) for order in range(6)]
    assert all_orders[0] == asked
    assert len({tuple(each.options.values()) for each in all_orders}) == 6
    for each in all_orders:
        assert each.options[each.answer] == "two"
        assert each.original(each.answer) == "B"
        assert all(asked.options[each.original(letter)] == text for letter, text in each.options.items())
        assert each.text.splitlines()[1] == f"(A) {each.options['A']}"
    assert asked.reordered(3, seed=1) == all_orders[3]
    with pytest.raises(
        ValueError, match="question 'q' has 6 orders of its options, and orders=7 asks for more; give 6 or fewer"
    ):
        asked.reordered(6, seed=1)


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in lines), encoding="utf-8")
    return path


def test_questions_are_read_from_both_forms(tmp_path):
    listed = write(
        tmp_path / "q.jsonl",
        {"id": "x", "question": "Which?\n(A) one\n(B) two", "choices": ["one", "two"], "answer": "(B)", "domain": "d"},
        {"question": "What?", "choices": {"(B)": "two", "(A)": "one"}, "answer": "A"},
    )
    first, second = read_questions(listed)
    assert first == question(id="x", options={"A": "one", "B": "two"}, group="d")
    assert (second.id, second.text) == ("2", "What?\n(A) one\n(B) two")
    csv = write(
        tmp_path / "q.csv",
        "question,choices,domain,answer",
        "\"Which?\n(A) one\",\"{'(A)': 'one', '(B)': 'two'}\",d,(B)",
    )
    assert read_questions(csv) == [question(id="1", options={"A": "one", "B": "two"}, group="d")]
    assert fingerprint([first]) != fingerprint([second])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "question 1 has no question; a question has question, choices, answer"),
        ({"question": "Q", "choices": ["a"], "answer": "A"}, "choices must be 2 to 26 options"),
        ({"question": "Q", "choices": ["a", "b"], "answer": "C"}, "answer 'C' is none of its options A, B"),
        ({"question": "Q", "choices": {"A": "a", "C": "b"}, "answer": "A"}, "letters A, C, not A to B"),
        ({"question": "Q", "choices": {"A": "a", "B": " "}, "answer": "A"}, "option 'B' must have a letter and a text"),
        ({"question": "Q", "choices": "open('x')", "answer": "A"}, "neither a JSON object nor a list"),
        ({"question": "(A) a", "choices": ["a", "b"], "answer": "A"}, "has no text before its options"),
        ("[1]", "line 1 holds a list, not an object"),
        ("{", "line 1 is not JSON"),
        ("", "holds no question"),
    ],
)
def test_questions_that_cannot_be_asked(row, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_questions(write(tmp_path / "q.jsonl", row))
    with pytest.raises(ValueError, match=r"must be a \.csv or a \.jsonl file"):
        read_questions(write(tmp_path / "q.txt", row))


def test_two_questions_of_one_id(tmp_path):
    row = {"id": "x", "question": "Q", "choices": ["a", "b"], "answer": "A"}
    with pytest.raises(ValueError, match="the id 'x' stands twice"):
        read_questions(write(tmp_path / "q.jsonl", row, row))


@pytest.mark.skipif(not DEMO.is_file(), reason="../shared/data, the demonstration's questions, is not here")
def test_the_demonstration_of_ph_llm():
    found = read_questions(DEMO)
    assert "".join(q.group[0] + q.answer + str(len(q.options)) for q in found) == "SC5SC5SB5FD4FC4FA4"
    assert all("(A)" not in q.stem and q.stem.endswith(("?", ".")) for q in found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 5}, "rounds=5 needs a temperature above 0"),
        ({"mode": "letters", "rounds": 5, "temperature": 1.0}, "mode='letters' samples nothing"),
        ({"mode": "essay"}, "mode='essay' must be one of chat, letters"),
        ({"orders": 0}, "orders=0 must be at least 1"),
        ({"temperature": math.nan}, "temperature=nan must be 0 or more"),
    ],
)
def test_settings_that_contradict_one_another(changes, message):
    with pytest.raises(ValueError, match=message):
        Settings(**changes)


def test_wilsons_interval():
    """Against the roots of |share - p| = z sqrt(p (1 - p) / n), of which it consists."""
    for right, count in ((0, 7), (3, 11), (11, 11)):
        for bound in wilson(right, count):
            assert abs(right / count - bound) == pytest.approx(
                1.959964 * math.sqrt(bound * (1 - bound) / count), abs=1e-6
            )
    assert all(map(math.isnan, wilson(0, 0)))


def test_what_is_unread_is_wrong_and_what_failed_is_counted_apart():
    answered = [
        Answered(question(id="1"), {0: ["B", None, "B"], 1: ["B", "B", "B"]}, {"x", "y"}),
        Answered(question(id="2"), {0: ["A", "C", "B"], 1: ["C", "C", "C"]}, {"x", "y", "z"}),
        Answered(question(id="3", group="h"), {0: [None, None, None], 1: ["A", "A", "A"]}, {"x"}),
        Answered(question(id="4", group="h"), {1: ["B"]}, set(), failed=5),
    ]
    everything, one, two = rows(answered, Settings(rounds=3, temperature=1.0, orders=2))
    assert everything | {"low": 0, "high": 0} == {
        "questions": "all", "answered": 3, "right": 1, "accuracy": 1 / 3, "low": 0, "high": 0, "answers": 18,
        "unread": 4, "cut": 0, "failed": 5, "tied_votes": 1, "texts_differ": 2, "orders_agree": 1,
    }  # fmt: skip
    assert (one["questions"], one["answered"], one["right"]) == ("g", 2, 1)
    assert (two["questions"], two["answered"], two["right"], two["failed"]) == ("h", 1, 0, 5)


def test_the_journal_survives_a_crash_and_refuses_what_is_not_its_own(tmp_path):
    path, settings = tmp_path / "answers.jsonl", {"model": "m", "rounds": 2}
    with Journal(path, settings) as journal:
        journal.add("1|0|0", {"text": "é"})
        assert path.read_bytes().count(b"\n") == 2  # on the disk before it is closed
        journal.add("1|0|1", {"text": "b"})
    whole = path.read_bytes()
    for cut in range(whole.rindex(b'{"key"'), len(whole)):  # a crash while the last line was written
        path.write_bytes(whole[:cut])
        with Journal(path, settings) as journal:
            assert journal.entries == {"1|0|0": {"key": "1|0|0", "text": "é"}}
            journal.add("1|0|1", {"text": "b"})
        assert path.read_bytes() == whole
    with pytest.raises(ValueError, match="belongs to an exam with rounds=2, not 3; name another file"):
        Journal(path, settings | {"rounds": 3})
    for content in ("my notes", "my notes\n", '[1]\n{"key": "x"}\n', whole.decode() + "\n{}\n"):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match="is no journal of an exam"):
            Journal(path, settings)
        assert path.read_text(encoding="utf-8") == content
