"""Case studies: what a wristband measured in two weeks, and a text about it, written section by section.

Each section is asked for with the sections before it in view (PH-LLM, arXiv 2406.06474: insights, then etiology, then
recommendations), so that a recommendation follows from what was found. The tags of sections are those of the published
ratings, and `attnzoo.clinical.rubric` judges the texts; the questions are our own words.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from attnzoo.clinical.cohort import Cohort
from attnzoo.clinical.rubric import CaseText
from attnzoo.clinical.variables import VARIABLES
from attnzoo.texts import is_blank

Writer = Callable[[str], str]
"""From the prompt of a section to its text."""


@dataclass(frozen=True)
class Section:
    """tag: its name in ratings. question: what the writer is asked."""

    tag: str
    question: str


@dataclass(frozen=True, kw_only=True)
class CaseStudy:
    """A kind of case study. role: who writes. variables: daily measurements that the writer sees. sections: in the
    order in which they are written."""

    name: str
    role: str
    variables: tuple[str, ...]
    sections: tuple[Section, ...]

    def prompt(self, section: Section, data: str, written: Mapping[str, str]) -> str:
        """What the writer of a section reads: the data, the sections before it, and the question."""
        before = [f"{tag}:\n{text.strip()}" for tag, text in written.items()]
        return "\n\n".join([self.role, data, *before, f"{section.question}\nWrite the section alone, {FORM}"])


FORM = "in plain sentences, and use no value that is not in the data."
SLEEP = CaseStudy(
    name="sleep",
    role="You are an expert in sleep medicine. You write about the sleep of one person.",
    variables=(
        *("sleep_minutes", "awake_minutes", "bed_minutes", "sleep_efficiency", "bedtime", "deep_minutes"),
        *("light_sleep_minutes", "rem_minutes", "restlessness", "sleep_score", "resting_heart_rate"),
    ),
    sections=(
        Section(
            "insights",
            "Which findings about regularity, duration, quality and timing of this person's sleep matter most?",
        ),
        Section("etiology", "Which causes can these findings have, from the likeliest to the least likely?"),
        Section("recommendations", "What should this person change, and how will it show whether the change helps?"),
    ),
)
FITNESS = CaseStudy(
    name="fitness",
    role="You are an expert in training. You judge whether one person is ready to train today.",
    variables=(
        *("exercise_minutes", "exercise_steps", "sedentary_minutes", "light_minutes", "moderate_minutes"),
        *("vigorous_minutes", "zone_fat_burn_minutes", "zone_cardio_minutes", "zone_peak_minutes"),
        *("sleep_minutes", "sleep_efficiency", "bedtime", "sleep_score", "resting_heart_rate"),
    ),
    sections=(
        Section(
            "training_load", "How large was the training load, and how does the last week compare with the others?"
        ),
        Section("sleep", "What do duration, timing and quality of sleep say about recovery?"),
        Section("health_metrics", "What does the resting heart rate say about recovery?"),
        Section("assessment", "How ready is this person to train today, and which training do you recommend?"),
    ),
)
CASE_STUDIES = {study.name: study for study in (SLEEP, FITNESS)}


def measured_days(cohort: Cohort, row: int, study: CaseStudy) -> int:
    """Number of days on which any of the study's variables was measured."""
    return int((~np.isnan(_values(cohort, row, study))).any(1).sum())


def data_text(cohort: Cohort, row: int, study: CaseStudy) -> str:
    """The row's days as a table, oldest first, with mean, standard deviation and the extremes of each variable.

    Days are told by their distance from the last one, not by their date. "-" stands for what was not measured; a
    variable that was never measured is left out. Raises ValueError for a cohort whose steps are not days, and for a
    row without any measurement.
    """
    if cohort.grid.step_hours != 24:
        raise ValueError(
            f"a case study needs daily values; the steps of {cohort.name!r} have {cohort.grid.step_hours} h"
        )
    values_TV = _values(cohort, row, study)
    seen = [place for place in range(len(study.variables)) if not np.isnan(values_TV[:, place]).all()]
    if not seen:
        raise ValueError(
            f"{cohort.stay_ids[row]!r} has no measurement for a {study.name} case study; choose another day"
        )
    names = [study.variables[place] for place in seen]
    lines = ["Measurements of the days before today:"]
    lines += [f"- {name}: {VARIABLES[name].meaning}{_unit(name)}" for name in names]
    lines += ["", " | ".join(["day", *names])]
    days = len(values_TV)
    lines += [_line(f"{day - days}", values_TV[day, seen]) for day in range(days)]
    with np.errstate(invalid="ignore"):
        columns = [values_TV[~np.isnan(values_TV[:, place]), place] for place in seen]
        summary: Sequence[tuple[str, Callable[[np.ndarray], float]]] = (
            ("mean", np.mean), ("standard deviation", _deviation), ("lowest", np.min), ("highest", np.max)
        )  # fmt: skip
        lines += [_line(name, np.array([function(column) for column in columns])) for name, function in summary]
    return "\n".join(lines)


def write_case(study: CaseStudy, case_id: str, data: str, write: Writer) -> CaseText:
    """Writes the sections in order, each with those before it in view. Raises ValueError for a section without text,
    from which the next one could not follow."""
    written: dict[str, str] = {}
    for section in study.sections:
        text = write(study.prompt(section, data, written)).strip()
        if is_blank(text):
            raise ValueError(f"case {case_id!r}: the section {section.tag!r} came without a text")
        written[section.tag] = text
    return CaseText(case_id, data, written)


def _values(cohort: Cohort, row: int, study: CaseStudy) -> np.ndarray:
    """[T, variables of the study]; NaN where unmeasured, also for a variable that the cohort does not have."""
    hours = int(cohort.grid.hours_N[row])
    column = {name: place for place, name in enumerate(cohort.grid.variables)}
    found = np.full((hours, len(study.variables)), np.nan, np.float32)
    for place, name in enumerate(study.variables):
        if name in column:
            found[:, place] = cohort.grid.values_NTV[row, :hours, column[name]]
    return found


def _deviation(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def _line(name: str, values: np.ndarray) -> str:
    return " | ".join([name, *("-" if np.isnan(value) else f"{value:.4g}" for value in values)])


def _unit(name: str) -> str:
    unit = VARIABLES[name].unit
    return "" if unit == "1" else f", in {unit}"
