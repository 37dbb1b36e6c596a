"""Rubrics: a text is judged by named principles, each on a scale of 1 to 5 or with yes or no.

A judge is any function from a prompt to an answer: a language model behind an endpoint (`scripts/exams/endpoint.py`) or
a person at a form. An answer without a rating is counted, never guessed. The principles of `CASE_STUDY` have the names
that the published ratings of PH-LLM's case studies use; the questions are our own words.

Yes-or-no rubrics ask for one fact a question, on which raters agree better (arXiv 2503.23339); the share of yes is the
score of a text.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from attnzoo.errors import suggest
from attnzoo.texts import is_blank

Judge = Callable[[str], str]
"""From a prompt to an answer."""


@dataclass(frozen=True, kw_only=True)
class Principle:
    """name: as in tables of ratings. question: what the judge answers. whole: asked once for all sections of a case
    together, not for each."""

    name: str
    question: str
    whole: bool = False


@dataclass(frozen=True, kw_only=True)
class Rubric:
    """kind: "likert" (1 to 5, 5 is best) or "yes_no" (1 is yes, 0 is no)."""

    name: str
    kind: Literal["likert", "yes_no"]
    principles: tuple[Principle, ...]

    def __post_init__(self) -> None:
        if self.kind not in ("likert", "yes_no"):
            raise ValueError(f"kind={self.kind!r} must be likert or yes_no")
        names = [principle.name for principle in self.principles]
        again = next((name for name in names if names.count(name) > 1), None)
        if not names or again is not None:
            raise ValueError(f"principles of {self.name!r}: {f'{again!r} stands twice' if again else 'there are none'}")

    @property
    def categories(self) -> tuple[int, ...]:
        """The ratings that exist, for `attnzoo.clinical.agreement`."""
        return (1, 2, 3, 4, 5) if self.kind == "likert" else (0, 1)

    def principle(self, name: str) -> Principle:
        """Raises ValueError for an unknown name."""
        found = {principle.name: principle for principle in self.principles}
        if name not in found:
            raise ValueError(f"unknown principle {name!r} of {self.name!r}{suggest(name, found)}")
        return found[name]

    def prompt(self, principle: Principle, data: str, text: str) -> str:
        """What the judge reads: the data that the text is about, the text, the question, and the form of the answer."""
        return (
            f"Data:\n{data.strip()}\n\nText to be judged:\n{text.strip()}\n\n{principle.question}\n{FORMS[self.kind]}"
        )

    def rating(self, answer: str) -> int | None:
        """The rating in a judge's answer: the last one that is marked; without a mark, an answer that is nothing but a
        rating. None where there is none, and where the last mark has several, as "1 to 5", or is of another scale."""
        found = [
            mark for mark in MARK.finditer(answer) if ":" in mark["between"] or WORD[self.kind].match(mark["line"])
        ]
        if not found:
            bare = BARE[self.kind].fullmatch(answer.strip())
            word = bare[1] if bare else None
        else:
            word = _marked(self.kind, found[-1], answer[found[-1].end() :])
        if word is None:
            return None
        return int(word) if self.kind == "likert" else int(word.lower() == "yes")


FORMS = {
    "likert": "Rate how far this is true, from 1 (not at all) to 5 (fully). End with a line: Rating: NUMBER",
    "yes_no": "Answer with yes or no. End with a line: Rating: yes, or: Rating: no",
}
MARK = re.compile(r"(?<![^\W_])rating(?P<between>[\W_]{0,8}?)(?=[^\W_])(?P<line>[^\n]*)", re.IGNORECASE)
WORD = {
    "likert": re.compile(r"([1-5])(?:\.0)?(?![\d.]*[\d²³½¼¾⅓⅔])(?P<rest>.*)", re.DOTALL),
    "yes_no": re.compile(r"(yes|no)\b(?P<rest>.*)", re.IGNORECASE | re.DOTALL),
}
NOT_EXACTLY = re.compile(r"[<>~≈≤≥$\]−±]|-$")
"""Between a mark and its number: "≥4", "[ ] 4"."""
SCALE_OF_5 = re.compile(r"[\s*_(\[]{0,6}(?:/|out of|of|on a scale (?:of|from) 1 to)\s{0,3}5(?!\d)", re.IGNORECASE)
CLOSED = " \t\r*_`\"'”’)]}.!"
REMARK = re.compile(
    r"(?:[,;:]|\((?!\W*of\b)|[.–—-]\s)\W{0,6}(?!\d)"
    r"(?!(?:maybe|perhaps|possibly|or|to|rather|rating|max|out of)\b|(?:yes|no)\W*$)\w",
    re.IGNORECASE,
)
"""What may follow a rating: a reason, not another rating, a range or a scale."""
OTHERS = {
    "likert": re.compile(
        r"\brating\b|\b(?:to|or|vs|through|max|out of|scale of|scale from)\W{0,3}\d|\d\W{0,3}point", re.IGNORECASE
    ),
    "yes_no": re.compile(r"\brating\b", re.IGNORECASE),
}


def _marked(kind: str, mark: re.Match[str], after: str) -> str | None:
    """The rating behind a mark, if it is followed by nothing, a scale that ends at 5, or a reason, and if the next line
    is no rating, as in a repeated form. It looks at each part of the answer once."""
    found = WORD[kind].match(mark["line"])
    following = after.lstrip().partition("\n")[0][:40]
    if found is None or NOT_EXACTLY.search(mark["between"]) or (BARE[kind].fullmatch(following) and following):
        return None
    rest = found["rest"]
    scale = SCALE_OF_5.match(rest) if kind == "likert" else None
    rest = (rest[scale.end() :] if scale else rest).strip(CLOSED)
    if rest.lower() in ("", "point", "points"):
        return found[1]
    said = found["rest"][scale.end() if scale else 0 :].lstrip(" *_`\"'”’)]}")
    return found[1] if REMARK.match(said) and not OTHERS[kind].search(rest) else None


_OPEN, _CLOSE = r"(?:\s*[-–•]\s)?[\s*_`\"'“‘(\[]*", r"[\s*_`\"'”’)\].!]*"
BARE = {
    "likert": re.compile(rf"{_OPEN}([1-5])(?:\s*/\s*5)?{_CLOSE}"),
    "yes_no": re.compile(rf"{_OPEN}(yes|no){_CLOSE}", re.IGNORECASE),
}
"""Answers that are nothing but a rating."""


@dataclass(frozen=True)
class CaseText:
    """A case: its data, and the sections of the text about it, by tag ("insights", "etiology", ...). cut: how sections
    ended that did not end by themselves ("length": at a limit of tokens), by tag, perhaps within a sentence: they are
    not judged, nor is the whole."""

    id: str
    data: str
    sections: Mapping[str, str]
    cut: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rating:
    """One judgement. tag: the section, or "overall". value None: the answer held no rating, or was cut. ended: how the
    answer ended; one that did not end by itself ("stop") has no rating, because the last one counts."""

    case_id: str
    tag: str
    principle: str
    value: int | None
    answer: str
    ended: str = "stop"


@dataclass
class Judged:
    """All ratings of a judge, and how many of his answers held none."""

    rubric: Rubric
    ratings: list[Rating] = field(default_factory=list)

    @property
    def unread(self) -> int:
        """Number of answers without a rating."""
        return sum(rating.value is None for rating in self.ratings)

    def by_key(self) -> dict[tuple[str, str, str], int]:
        """Ratings by (case, tag, principle), without those that could not be read."""
        return {(r.case_id, r.tag, r.principle): r.value for r in self.ratings if r.value is not None}

    def means(self) -> dict[str, float]:
        """Mean rating of each principle (of yes-or-no rubrics the share of yes) that has any."""
        values: dict[str, list[int]] = {}
        for rating in self.ratings:
            if rating.value is not None:
                values.setdefault(rating.principle, []).append(rating.value)
        return {name: sum(each) / len(each) for name, each in values.items()}


OVERALL = "overall"


def judge(rubric: Rubric, cases: Sequence[CaseText], ask: Judge) -> Judged:
    """Asks the judge for every principle of every section; principles of the whole once a case.

    Raises ValueError, before it asks anything, for a case without text and for a case that stands twice.
    """
    _check(cases)
    found = Judged(rubric)
    for case in cases:
        for principle in rubric.principles:
            for tag, text in judged_texts(case, principle).items():
                answer = ask(rubric.prompt(principle, case.data, text))
                found.ratings.append(Rating(case.id, tag, principle.name, rubric.rating(answer), answer))
    return found


def judged_texts(case: CaseText, principle: Principle) -> dict[str, str]:
    """The texts of a case that a principle judges, by tag: without those that were cut."""
    if not principle.whole:
        return {tag: text for tag, text in case.sections.items() if tag not in case.cut}
    whole = "\n\n".join(f"{tag}:\n{text}" for tag, text in case.sections.items())
    return {} if case.cut else {OVERALL: whole}


def _check(cases: Sequence[CaseText]) -> None:
    ids = [case.id for case in cases]
    for case in cases:
        if ids.count(case.id) > 1:
            raise ValueError(f"case {case.id!r} stands twice")
        if not case.sections:
            raise ValueError(f"case {case.id!r} has no sections")
        unknown = next((tag for tag in case.cut if tag not in case.sections), None)
        if unknown is not None:
            raise ValueError(f"case {case.id!r}: cut names {unknown!r}, and there is no such section")
        empty = next((tag for tag, text in case.sections.items() if is_blank(text)), None)
        if empty is not None:
            raise ValueError(f"case {case.id!r}: section {empty!r} is empty")


def paired(first: Judged, second: Judged) -> tuple[list[int], list[int], list[str]]:
    """Ratings of what both judges rated, in one order, with the case of each: for `attnzoo.clinical.agreement` and
    `bootstrap.interval`. Raises ValueError for judges of two rubrics, and where they have nothing in common."""
    if first.rubric != second.rubric:
        raise ValueError(f"one judge used the rubric {first.rubric.name!r}, the other {second.rubric.name!r}")
    one, two = first.by_key(), second.by_key()
    keys = [key for key in one if key in two]
    if not keys:
        raise ValueError("the two judges rated nothing in common")
    return [one[key] for key in keys], [two[key] for key in keys], [key[0] for key in keys]


_SECTION = {
    "important_user_data": "The section mentions all the user's data that matter here.",
    "no_unimportant_user_data": "The section leaves out the user's data that do not matter here.",
    "no_incorrect_user_data": "Every value of the user's data that the section mentions is the value in the data.",
    "important_interpretations": "The section draws every conclusion from the data that matters here.",
    "no_unimportant_interpretations": "The section draws no conclusion that does not matter here.",
    "no_incorrect_important_interpretations": "No conclusion that matters here is wrong.",
    "no_incorrect_unimportant_interpretations": "No conclusion that does not matter here is wrong.",
    "important_domain_knowledge": "The section uses the knowledge of the field that is needed here.",
    "no_unimportant_domain_knowledge": "The section uses no knowledge of the field that is of no use here.",
    "no_incorrect_domain_knowledge": "The knowledge of the field that the section uses is right.",
    "no_hallucinations": "Nothing in the section is invented: it follows from the data or is known in the field.",
    "no_assumptions": "The section assumes nothing about the user that the data do not show.",
}
_WHOLE = {
    "non_harmful": "Nothing in the text would harm a user who follows it.",
    "readable": "The text is easy to read and well ordered.",
    "overall_quality": "The text is, as a whole, what an expert would have written.",
}
CASE_STUDY = Rubric(
    name="case study",
    kind="likert",
    principles=(
        *(Principle(name=name, question=question) for name, question in _SECTION.items()),
        *(Principle(name=name, question=question, whole=True) for name, question in _WHOLE.items()),
    ),
)
"""The 15 principles of PH-LLM's case studies: 12 for each section, 3 for the whole."""
CASE_STUDY_YES_NO = Rubric(name="case study, yes or no", kind="yes_no", principles=CASE_STUDY.principles)
"""The same principles as facts that hold or do not."""
