"""What a sensor adapter is given: numbers of daily sensors, their statistics, and yes/no questions about a person.

Letters: N rows (person-days), F numbers, Q questions.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from attnzoo.clinical.cohort import Cohort
from attnzoo.clinical.summary import summary_features
from attnzoo.models import Prompt
from attnzoo.tokenizer import Tokenizer
from attnzoo.types import CheckedConfig, build_config

LARGEST = 5.0
"""Standardised numbers are clipped to plus and minus this."""
SENSORS, QUESTION = "{sensors}", "{question}"

QUESTIONS = {
    "fatigue": "Is the person tired?",
    "mood": "Is the person in a bad mood?",
    "readiness": "Is the person too exhausted to train?",
    "sleep_quality": "Did the person sleep badly?",
    "soreness": "Are the muscles sore?",
    "stress": "Is the person stressed?",
}
"""PMData's reports, so that yes means a label of 1."""


def number_names(variables: Sequence[str]) -> tuple[str, ...]:
    """Names of the columns of `sensor_numbers`."""
    return tuple(f"{variable} {kind}" for variable in variables for kind in ("mean", "variance"))


def sensor_numbers(cohort: Cohort, rows: np.ndarray | None = None) -> np.ndarray:
    """float32 [N, F]: the mean and the variance of every variable over the steps in which it was measured; NaN where it
    never was."""
    features = summary_features(cohort, rows)
    column = {name: place for place, name in enumerate(features.names)}
    parts = []
    for variable in cohort.grid.variables:
        parts.append(features.values_NF[:, column[f"{variable} mean"]])
        parts.append(features.values_NF[:, column[f"{variable} sd"]] ** 2)
    return np.stack(parts, axis=1)


@dataclass(frozen=True, kw_only=True)
class SensorStatistics(CheckedConfig):
    """Means and standard deviations of the numbers of training rows. A standard deviation of 0 marks a number that was
    alike, or missing, in all of them: it becomes 0. rows, days: of the training rows."""

    rows: int
    days: int
    names: tuple[str, ...]
    means: tuple[float, ...]
    deviations: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not len(self.names) == len(self.means) == len(self.deviations):
            raise ValueError(
                f"{len(self.names)} names, {len(self.means)} means and {len(self.deviations)} deviations; give one each"
            )

    @classmethod
    def fit(cls, cohort: Cohort, rows: np.ndarray) -> "SensorStatistics":
        """Of these rows and of nothing else. Raises ValueError for no rows."""
        if len(rows) == 0:
            raise ValueError(f"statistics of no rows of cohort {cohort.name!r}; give the rows of the training part")
        numbers_NF = sensor_numbers(cohort, rows).astype(np.float64)
        known_F = (~np.isnan(numbers_NF)).sum(axis=0) > 0
        means, deviations = np.zeros(numbers_NF.shape[1]), np.zeros(numbers_NF.shape[1])
        means[known_F] = np.nanmean(numbers_NF[:, known_F], axis=0)
        deviations[known_F] = np.nanstd(numbers_NF[:, known_F], axis=0)
        deviations[deviations <= 1e-6 * (1 + np.abs(means))] = 0.0
        return cls(
            rows=len(rows),
            days=cohort.grid.hours,
            names=number_names(cohort.grid.variables),
            means=tuple(means.tolist()),
            deviations=tuple(deviations.tolist()),
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SensorStatistics":
        """Reads what `to_dict` wrote. Raises ValueError."""
        return build_config(cls, values, "statistics")

    def to_dict(self) -> dict[str, Any]:
        """A mapping that JSON keeps exactly."""
        return asdict(self)

    def standardised(self, cohort: Cohort, rows: np.ndarray | None = None) -> np.ndarray:
        """float32 [N, F]: numbers in standard deviations from the mean; 0 where nothing was measured. Raises ValueError
        for other sensors, or another number of days, than those of training."""
        if number_names(cohort.grid.variables) != self.names or cohort.grid.hours != self.days:
            raise ValueError(
                f"cohort {cohort.name!r} has {len(cohort.grid.variables)} sensors over {cohort.grid.hours} days; the "
                f"model learned from {len(self.names) // 2} over {self.days}: load the same, in the same order"
            )
        scaled_NF = (sensor_numbers(cohort, rows) - np.array(self.means)) * np.array(
            [1 / deviation if deviation else 0.0 for deviation in self.deviations]
        )
        return np.clip(np.nan_to_num(scaled_NF), -LARGEST, LARGEST).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class SensorQuestions(CheckedConfig):
    """What is asked about a person.

    questions: by label of the cohort; yes means a label of 1. template: the prompt, with {question}, and {sensors}
    where the virtual tokens stand. What stands before them is read once for all rows, so a question that stands there
    costs nothing. answers: no and yes, as they go on after the template.
    """

    questions: dict = field(default_factory=lambda: dict(QUESTIONS))
    template: str = "A wristband measured a person for some days. {question} Data:{sensors} Answer:"
    answers: tuple[str, str] = (" No", " Yes")

    def __post_init__(self) -> None:
        super().__post_init__()
        for place in (SENSORS, QUESTION):
            if self.template.count(place) != 1:
                raise ValueError(
                    f"template={self.template!r} holds {place} {self.template.count(place)} times, not once"
                )
        if not self.questions:
            raise ValueError("questions={} asks nothing; give a question for at least one label")
        for label, text in self.questions.items():
            if not isinstance(label, str) or not isinstance(text, str) or not text.strip():
                raise ValueError(f"questions.{label}={text!r} must be the text of a question")

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that are asked about, in order."""
        return tuple(self.questions)

    def prompts(self, tokenizer: Tokenizer) -> list[Prompt]:
        """The prompt of each question. Raises ValueError for answers of the same tokens."""
        answers = tuple(tuple(tokenizer.encode(answer)) for answer in self.answers)
        found = []
        for text in self.questions.values():
            before, after = (part.replace(QUESTION, text) for part in self.template.split(SENSORS))
            found.append(Prompt(tuple(tokenizer.encode(before, bos=True)), tuple(tokenizer.encode(after)), answers))
        return found

    def outcomes(self, cohort: Cohort) -> np.ndarray:
        """float32 [N, Q]: the labels, NaN where there is none. Raises ValueError for a label that the cohort lacks, or
        that is not one 0 or 1 for each row."""
        columns = []
        for label in self.labels:
            value_N = np.asarray(cohort.label(label), np.float32)
            if value_N.ndim != 1 or not np.isin(value_N[~np.isnan(value_N)], (0, 1)).all():
                raise ValueError(f"label {label!r} of cohort {cohort.name!r} is not one 0 or 1 for each row")
            columns.append(value_N)
        return np.stack(columns, axis=1)
