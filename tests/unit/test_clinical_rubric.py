"""Rubrics: what a judge is asked, what is read from his answers, and how two judges are compared."""

import pytest

from attnzoo.clinical import rubric as r
from attnzoo.clinical.agreement import gwet_ac2

LIKERT = [
    ("Rating: 4", 4),
    ("It is good, 5 of its 6 values are right.\nRating: **3**", 3),
    ("Rating: 2. On reflection, my rating is 5\nRating: 1", 1),
    ("4", 4),
    ("**5/5**", 5),
    ("Rating: 10", None),
    ("Rating: 4.5", None),
    ("Rating: 0", None),
    ("There are 3 reasons.", None),
    ("", None),
    ("Rating: 1 to 5", None),  # the scale, repeated
    ("Rating: 1-5", None),
    ("Rating: 4/10", None),
    ("Rating: 4 out of 10", None),
    ("Rating: 4,5", None),
    ("Rating: 2\nRating: 3 or 4", None),
    ("Rating: -3", None),
    ("-3", None),
    ("- 3", 3),
    ("Rating: 3/5", 3),
    ("Rating: 3 out of 5.", 3),
    ("Rating: 1 to 5? I say\nRating: 2", 2),
    ("Rating: 4 (out of 10)", None),  # other scales
    ("Rating: **4** (of 10)", None),
    ("Rating: **4**/10", None),
    ("Rating: **4**/5", 4),
    ("Rating: 4 points of 10", None),
    ("Rating: 4 on a scale of 10", None),
    ("Rating: 5%", None),
    ("Rating: 4½", None),
    ("Rating: 1|2|3|4|5", None),  # the form, repeated
    ("Rating: [1|5]", None),
    ("Rating: 1 2 3 4 5", None),
    ("Rating: 1 → 5", None),
    ("Rating: 3~4", None),
    ("Rating: 3 through 5", None),
    ("Rating: 4 (out of 5)", 4),
    ("Rating: 4. Of 10 values, 9 are right.", 4),
    ("Rating: 4\n10 values are right.", 4),
    ("Rating: 4, because 2 values are wrong", 4),
    ("Rating: 5 (not 4)", 5),
]
UNSURE = "4 out of ten;4 %;4+;1 (not at all) to 5 (fully);4 (1-10);4 on a 10-point scale;4th;3 hours of sleep;3 vs 4"
UNSURE += ";3, maybe 4;3, perhaps four;3 => 4;3+4;≥4;> 3;~4;4⁄10;4 in 10;4 von 10;4 (max 10);4 ½;4⅔;4²;1−5;1•2•3•4•5"
UNSURE += ";(1) (2) (3);☐1 ☐2 ☑3;1 \n2 \n3;3\nRating: 4.5;3, Rating: 4;4k"
LIKERT += [(f"Rating: {text}", None) for text in UNSURE.split(";")] + [("4%", None), ("$4", None), ("≥4", None)]
LIKERT += [(f"Rating: {text}", 4) for text in ("4.0/5", "4, since 2 of 3 are right", "4 — good", "4 points", "4!")]
LIKERT += [('{"rating": 4, "why": "good"}', 4), ("__Rating:__ 4", 4), ("Rating: 4 on a scale of 1 to 5", 4)]
LIKERT += [("Rating: 4" + more * 20_000 + "9", None) for more in (" ", ")", "x")]  # read in little time
YES_NO = [("Rating: yes", 1), ("rating - No.", 0), ("Yes.", 1), ("Yes, it does", None), ("Rating: unknown", None)]
YES_NO += [("Rating: yes or no", None), ("Rating: yes, or: Rating: no", None), ("Rating: yes or no?\nRating: no", 0)]
YES_NO += [("Rating: yes/no", None), ("Rating: [yes | no]", None), ("Rating: yes, no.", None)]
YES_NO += [("Rating: yes/no\nRating: yes", 1), ("Rating: yes, no errors", 1), ("Rating: yes\nno value is wrong", 1)]
BOTH = "yes-no;yes no;(yes)/(no);yes → no;yes & no;yes (1) / no (0);[ ] yes [x] no;yes? no?;yes or rather no"
NO_WORDS = "no. 3;no idea;no answer;No rating can be given;no one can tell;no-one"
YES_NO += [(f"Rating: {text}", None) for text in [*f"{BOTH};{NO_WORDS}".split(";"), "yes; no", "yes\nno"]]
YES_NO += [
    ("Rating: yes, there are no errors", 1),
    ("Rating: no, because yes would be wrong", 0),
    ("Rating: no - vague", 0),
]


@pytest.mark.parametrize(
    ("kind", "answer", "value"),
    [("likert", *case) for case in LIKERT] + [("yes_no", *case) for case in YES_NO],
)
def test_the_rating_of_an_answer(kind, answer, value):
    chosen = r.CASE_STUDY if kind == "likert" else r.CASE_STUDY_YES_NO
    assert chosen.rating(answer) == value


def test_every_section_is_judged_by_each_principle_and_the_whole_once():
    assert len(r.CASE_STUDY.principles) == 15
    cases = [
        r.CaseText("1", "HR 60", {"insights": "slow", "etiology": "sport"}),
        r.CaseText("2", "HR 90", {"insights": "fast"}),
    ]
    asked = []

    def kind_judge(prompt: str) -> str:
        asked.append(prompt)
        return f"Rating: {1 + len(asked) % 5}"

    judged = r.judge(r.CASE_STUDY, cases, kind_judge)
    assert len(asked) == len(judged.ratings) == 3 * 12 + 2 * 3
    assert [x.tag for x in judged.ratings if x.case_id == "1" and x.principle == "readable"] == ["overall"]
    assert all(prompt.startswith(("Data:\nHR 60\n", "Data:\nHR 90\n")) for prompt in asked)
    whole = next(prompt for prompt in asked if r.CASE_STUDY.principle("readable").question in prompt)
    assert "insights:\nslow\n\netiology:\nsport" in whole
    assert judged.unread == 0
    first = [x.value for x in judged.ratings if x.principle == "no_assumptions"]
    assert judged.means()["no_assumptions"] == pytest.approx(sum(first) / 3)


def test_two_judges_are_compared_on_what_both_rated():
    cases = [r.CaseText(str(n), "d", {"insights": f"text {n}"}) for n in range(20)]
    rated = r.Rubric(name="short", kind="likert", principles=(r.Principle(name="p", question="Is it so?"),))

    def judge(shift: int) -> r.Judged:
        def ask(prompt: str) -> str:
            number = int(prompt.split("text ")[1].split()[0])
            return "no idea" if number == shift else f"Rating: {min(5, 1 + number % 4 + (number + shift) % 2)}"

        return r.judge(rated, cases, ask)

    one, two = judge(0), judge(7)
    assert (one.unread, two.unread) == (1, 1)
    first, second, ids = r.paired(one, two)
    assert ids == [str(n) for n in range(20) if n not in (0, 7)]
    assert first == [one.by_key()[(each, "insights", "p")] for each in ids]
    assert second == [two.by_key()[(each, "insights", "p")] for each in ids]
    assert -1 < gwet_ac2(rated.categories)(first, second) < 1
    with pytest.raises(ValueError, match="one judge used the rubric 'short', the other 'case study'"):
        r.paired(one, r.Judged(r.CASE_STUDY))
    with pytest.raises(ValueError, match="the two judges rated nothing in common"):
        r.paired(one, r.Judged(rated))


@pytest.mark.parametrize(
    ("cases", "message"),
    [
        ([r.CaseText("1", "d", {"a": "x"}), r.CaseText("1", "d", {"a": "x"})], "case '1' stands twice"),
        ([r.CaseText("1", "d", {})], "case '1' has no sections"),
        ([r.CaseText("0", "d", {"a": "x"}), r.CaseText("1", "d", {"a": " "})], "case '1': section 'a' is empty"),
    ],
)
def test_cases_are_checked_before_anything_is_asked(cases, message):
    with pytest.raises(ValueError, match=message):
        r.judge(r.CASE_STUDY, cases, lambda prompt: pytest.fail("asked"))


def test_rubrics_that_are_none():
    principle = r.Principle(name="p", question="?")
    for changes, message in (
        ({"kind": "stars"}, "kind='stars' must be likert or yes_no"),
        ({"principles": ()}, "principles of 'x': there are none"),
        ({"principles": (principle, principle)}, "principles of 'x': 'p' stands twice"),
    ):
        with pytest.raises(ValueError, match=message):
            r.Rubric(**{"name": "x", "kind": "likert", "principles": (principle,)} | changes)
    with pytest.raises(ValueError, match="unknown principle 'readible' of 'case study'; did you mean 'readable'"):
        r.CASE_STUDY.principle("readible")
