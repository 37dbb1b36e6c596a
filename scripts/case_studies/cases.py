"""Writes case studies over an endpoint, section by section, and judges them."""

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from attnzoo import interrupts
from attnzoo.clinical.case_study import CASE_STUDIES, CaseStudy, data_text, measured_days, write_case
from attnzoo.clinical.cohort import Cohort
from attnzoo.clinical.formats import load_cohort
from attnzoo.clinical.rubric import (
    CASE_STUDY,
    CASE_STUDY_YES_NO,
    CaseText,
    Judged,
    Rubric,
    judge,
    judged_texts,
)
from attnzoo.errors import complain, harmless, suggest
from attnzoo.files import user_path, write_atomic
from attnzoo.progress import Progress
from attnzoo.report import Report, counted
from attnzoo.texts import is_blank
from scripts.exams.cli import kept, key_from, stopped
from scripts.exams.endpoint import LENGTH, STOP, Answer, Endpoint, EndpointError, told_ends, way_out
from scripts.exams.journal import Journal

RUBRICS = {"likert": CASE_STUDY, "yes_no": CASE_STUDY_YES_NO}


def carry_out(options: argparse.Namespace) -> int:
    """Writes the cases of `attnzoo case-study`, and judges them where asked for; returns the exit status. Raises
    ValueError."""
    _check(options)
    study = CASE_STUDIES[options.kind]
    report = Report.start(command=options.command, seed=options.seed)
    writer, rater = _endpoints(options)
    sampling = {"temperature": options.temperature, "max_tokens": options.max_tokens, "seed": options.seed}
    path, most = options.answers, options.max_tokens
    with writer, rater, Journal(path, sampling, "case studies") as journal:
        try:
            # Read last: it takes long, and what is wrong with the rest is known at once.
            cohort = load_cohort("pmdata", user_path(options.data, "DATA"), days=options.days)
            rows = chosen_rows(cohort, study, options.stay, options.count, options.seed)
            interrupts.say(f"attnzoo case-study: {stopped(path)}")
            cases = written(study, cohort, rows, Asked(writer, journal, sampling))
            told = _told_cut(cases, most, path, bool(options.rate))
            judging = Asked(rater, journal, sampling | {"temperature": 0.0}, may_be_empty=True)
            judged = rated(RUBRICS[options.rate], cases, judging) if options.rate else None
        except EndpointError as error:
            return complain("attnzoo case-study", f"{error}; {kept(path)}", 1)
    interrupts.say("")
    for case in cases:
        parts = [f"# {case.id}", *(f"## {tag}{_mark(case, tag)}\n\n{text}" for tag, text in case.sections.items())]
        print(harmless("\n\n".join(parts)), end="\n\n")
    content: dict[str, Any] = {"cases": [vars(case) for case in cases]}
    if judged is not None:
        report.rows += rating_rows(judged)
        if report.rows:
            replace(
                report, rows=[{**row, "mean": "-"} if row["mean"] is None else row for row in report.rows]
            ).print_table()
        content["ratings"] = [vars(rating) for rating in judged.ratings]
    if options.json is not None:
        write_atomic(options.json, (json.dumps({**report.to_dict(), **content}, indent=2) + "\n").encode("utf-8"))
    for line in told:
        print(harmless(line), file=sys.stderr)
    return 0 if judged is None else _judged_badly(judged, cases, most, path)


def _mark(case: CaseText, tag: str) -> str:
    return f" (cut: {case.cut[tag]!r})" if tag in case.cut else ""


def _told_cut(cases: list[CaseText], most: int, path: Path | None, is_judged: bool) -> list[str]:
    """Which sections did not end by themselves, and the way out, a line for each case and end."""
    told = []
    for case in cases:
        for end in dict.fromkeys(case.cut.values()):
            tags = [tag for tag in case.cut if case.cut[tag] == end]
            how = "ended at the limit of tokens" if end == LENGTH else f"ended by {end!r}, not by itself"
            also = f" {'It is' if len(tags) == 1 else 'They are'} not judged, nor is the whole." if is_judged else ""
            way = way_out([end], most, path)
            told.append(f"{case.id}: {', '.join(tags)} {how}, perhaps within a sentence; {way}.{also}")
    return told


def _judged_badly(judged: Judged, cases: list[CaseText], most: int, path: Path | None) -> int:
    """Says where answers of the judge cannot be read, and the way out; returns the exit status: 1 where nothing was
    rated."""
    if not judged.ratings:
        ends = [end for case in cases for end in case.cut.values()]
        each = f"each of the {len(ends):,} sections was cut ({told_ends(ends)})"
        return complain("attnzoo case-study", f"nothing was rated: {each}; {way_out(ends, most, path)}", 1)
    cut = [rating.ended for rating in judged.ratings if rating.ended != STOP]
    was = "was cut" if len(cut) == 1 else "were cut"
    way = (
        way_out(cut, most, path)
        if cut and set(cut) == {LENGTH}
        else "name another judge with --judge-url or --judge-model"
    )
    if judged.unread == len(judged.ratings):
        last = judged.ratings[-1].answer.strip()
        what = f"none of the judge's {counted(judged.unread, 'answer')} held a rating"
        also = f"; {len(cut):,} {was} ({told_ends(cut)})" if cut else ""
        return complain("attnzoo case-study", f"{what}{also}; the last one began {last[:60]!r}; {way}", 1)
    if cut:
        all_of = f"{len(cut):,} of the judge's {counted(len(judged.ratings), 'answer')}"
        count = "counts" if len(cut) == 1 else "count"
        print(f"{all_of} {was} ({told_ends(cut)}) and {count} as unread; {way}", file=sys.stderr)
    return 0


class Asked:
    """Answers of an endpoint that a journal remembers: what a model was asked once is not asked again.

    may_be_empty: whether an answer without a text is one; otherwise it is a failed request, and not remembered."""

    def __init__(
        self, endpoint: Endpoint, journal: Journal, sampling: dict[str, Any], may_be_empty: bool = False
    ) -> None:
        self.endpoint, self.journal, self.sampling, self.may_be_empty = endpoint, journal, sampling, may_be_empty

    def __call__(self, prompt: str) -> Answer:
        """The answer to a prompt. Raises EndpointError and RefusedError."""
        asked = json.dumps([self.endpoint.url, self.endpoint.model, self.sampling, prompt])
        key = hashlib.sha256(asked.encode()).hexdigest()[:32]
        if key not in self.journal.entries:
            found = self.endpoint.answer(prompt, **self.sampling)
            if is_blank(found.text) and not self.may_be_empty:
                way = way_out([found.ended], self.sampling["max_tokens"], self.journal.path)
                raise EndpointError(
                    f"{self.endpoint.url} answered without a text (finish_reason {found.ended!r}); {way}"
                )
            self.journal.add(key, found.entry())
        return Answer.of_entry(self.journal.entries[key])


def chosen_rows(cohort: Cohort, study: CaseStudy, stays: list[str], count: int | None, seed: int) -> list[int]:
    """Rows of the named person-days, or `count` drawn from those of which half of the days are measured. Raises
    ValueError for an unknown name, one that stands twice, and for more cases than there are."""
    place = {name: row for row, name in enumerate(cohort.stay_ids)}
    for name in stays:
        if name not in place:
            raise ValueError(f"--stay={name!r}: no such person and day{suggest(name, place)}")
        if stays.count(name) > 1:
            raise ValueError(f"--stay={name!r} stands twice")
    if stays:
        return [place[name] for name in stays]
    enough = [row for row in range(len(cohort)) if 2 * measured_days(cohort, row, study) >= cohort.grid.hours_N[row]]
    wanted = 1 if count is None else count
    if not 1 <= wanted <= len(enough):
        raise ValueError(f"--count={count} must be 1 to {len(enough)}, the person-days with enough measurements")
    return sorted(random.Random(seed).sample(enough, wanted))


def written(study: CaseStudy, cohort: Cohort, rows: list[int], asked: Asked) -> list[CaseText]:
    """A case for each row. Raises EndpointError."""
    data = [data_text(cohort, row, study) for row in rows]  # before anything is asked
    progress = Progress(len(rows) * len(study.sections))
    cases, ends = [], list[str]()

    def write(prompt: str) -> str:
        answer = asked(prompt)
        ends.append(answer.ended)
        progress.add(1)
        return answer.text

    for row, text in zip(rows, data, strict=True):
        ends.clear()
        case = write_case(study, cohort.stay_ids[row], text, write)
        cut = {tag: end for tag, end in zip(case.sections, ends, strict=True) if end != STOP}
        cases.append(replace(case, cut=cut))
    progress.close()
    return cases


def rated(rubric: Rubric, cases: list[CaseText], ask: Callable[[str], Answer]) -> Judged:
    """The judge's ratings of every principle. An answer that was cut has none: the last rating counts, and of a cut
    answer nobody knows the last one. Raises EndpointError."""
    progress = Progress(sum(len(judged_texts(case, p)) for case in cases for p in rubric.principles))
    ends: list[str] = []

    def counted_ask(prompt: str) -> str:
        answer = ask(prompt)
        ends.append(answer.ended)
        progress.add(1)
        return answer.text

    judged = judge(rubric, cases, counted_ask)
    progress.close()
    judged.ratings = [
        replace(rating, value=rating.value if end == STOP else None, ended=end)
        for rating, end in zip(judged.ratings, ends, strict=True)
    ]
    return judged


def rating_rows(judged: Judged) -> list[dict[str, Any]]:
    """A row for each principle, none where nothing was judged; mean None where no answer held a rating."""
    if not judged.ratings:
        return []
    means = judged.means()
    return [
        {
            "principle": principle.name,
            "mean": means.get(principle.name),
            "ratings": sum(r.principle == principle.name and r.value is not None for r in judged.ratings),
            "unread": sum(r.principle == principle.name and r.value is None for r in judged.ratings),
        }
        for principle in judged.rubric.principles
    ]


def _endpoints(options: argparse.Namespace) -> tuple[Endpoint, Endpoint]:
    """The writer's and the judge's: the same where no other is named. A key goes to the endpoint it is for alone."""
    key = key_from(options.key_variable, "--key-variable")
    writer = Endpoint(options.url, model=options.model, key=key)
    if not options.judge_url:
        return writer, Endpoint(options.url, model=options.judge_model or writer.model, key=key)
    judge_key = key_from(options.judge_key_variable, "--judge-key-variable")
    return writer, Endpoint(options.judge_url, model=options.judge_model, key=judge_key)


def _check(options: argparse.Namespace) -> None:
    if options.stay and options.count is not None:
        raise ValueError("--stay names the cases and --count draws them; give one of the two")
    for name in ("judge_url", "judge_model", "judge_key_variable"):
        if getattr(options, name) and not options.rate:
            raise ValueError(f"--{name.replace('_', '-')} belongs to --rate; name a rubric")
    if options.judge_key_variable and not options.judge_url:
        raise ValueError("--judge-key-variable belongs to --judge-url; the writer's key is --key-variable")
    if not 0 <= options.temperature < float("inf"):
        raise ValueError(f"--temperature={options.temperature} must be 0 or more")
    if options.max_tokens < 1:
        raise ValueError(f"--max-tokens={options.max_tokens} must be at least 1")
