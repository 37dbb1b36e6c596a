"""MIMIC-III as mimic3-benchmarks lays it out: a listfile of labels, and one csv of 17 variables for each stay.

https://github.com/YerevaNN/mimic3-benchmarks . A stay's file is called SUBJECT_episodeNUMBER_timeseries.csv: the
subject is the patient. The verbal response of intubated patients cannot be assessed and is left out, not taken for the
worst. Cohorts of MIMIC in YAIB's layout are read by `yaib`.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from attnzoo.clinical.cohort import Cohort, StayFacts, cohort_of
from attnzoo.clinical.events import FARTHEST, Events
from attnzoo.clinical.formats.tables import TableRow, check_hours, existing, rows_of
from attnzoo.clinical.units import convert
from attnzoo.clinical.variables import MIMIC3, Table, choose

SERIES = re.compile(r"(\d+)_episode\d+_timeseries\.csv")
TASKS = {"in-hospital-mortality": "mortality", "length-of-stay": "los", "decompensation": "decompensation"}
STAY, PERIOD, LABEL, HOURS = "stay", "period_length", "y_true", "Hours"
NOT_ASSESSED = ("1.0 et/trach", "no response-ett")
SCORES = {
    "Glascow coma scale eye opening": ("none", "to pain", "to speech", "spontaneously"),
    "Glascow coma scale motor response": (
        "no response",
        "abnormal extension",
        "abnormal flexion",
        "flex-withdraws",
        "localizes pain",
        "obeys commands",
    ),
    "Glascow coma scale verbal response": (
        "no response",
        "incomprehensible sounds",
        "inappropriate words",
        "confused",
        "oriented",
    ),
}
"""The words of the scales, from 1 up; files also have the number in front of an abbreviation."""


def load(
    path: str | Path, *, hours: int = 48, variables: tuple[str, ...] | None = None, label: str | None = None
) -> Cohort:
    """The cohort of a listfile, or of the listfile.csv in a directory such as in-hospital-mortality/train.

    The files of stays stand beside the listfile, or, for a train_ or val_listfile.csv, in train/, for a test_ one in
    test/. label: what to call the label; None: after the task's directory. Several label columns (phenotyping) keep
    their names. Raises ValueError that names file, line, field and value.
    """
    check_hours(hours)
    found = existing(path, "path")
    listfile = existing(found / "listfile.csv", "path") if found.is_dir() else found
    table = choose(MIMIC3, variables, "variables")
    listed = _Listed.read(listfile, hours, label)
    events, left_out = _events(_directory(listfile), listed.stays, table)
    facts = StayFacts(
        name=f"mimic {listfile.parent.parent.name}/{listfile.parent.name}",
        hours_N=listed.lengths(),
        statics={},
        stay_ids=tuple(listed.stays),
        patient_ids=tuple(_patient(listfile, stay) for stay in listed.stays),
        labels=listed.labels(),
        left_out=left_out,
    )
    return cohort_of(facts, events, table, hours)


@dataclass
class _Listed:
    """The content of a listfile."""

    hours: int
    is_hourly: bool
    names: dict[str, str]
    """The label's name by its column."""
    stays: dict[str, int] = field(default_factory=dict)
    told: list[tuple[int, float, list[float]]] = field(default_factory=list)
    """(row of the stay, hours of data, labels)."""

    @classmethod
    def read(cls, listfile: Path, hours: int, label: str | None) -> "_Listed":
        rows = list(rows_of(listfile, (STAY,)))
        if not rows:
            raise ValueError(f"{listfile} lists no stay; give a listfile with rows")
        columns = [name for name in rows[0].fields if name not in (STAY, PERIOD)]
        if not columns:
            raise ValueError(f"{listfile} has no column of labels beside {STAY!r}; is it a listfile?")
        task = next((task for part in listfile.parts for known, task in TASKS.items() if known == part), "label")
        names = {columns[0]: label or task} if columns == [LABEL] else {name: name for name in columns}
        listed = cls(hours, PERIOD in rows[0].fields and columns == [LABEL], names)
        for row in rows:
            listed._add(row, columns)
        return listed

    def _add(self, row: TableRow, columns: list[str]) -> None:
        stay = row.text(STAY)
        if SERIES.fullmatch(stay) is None:
            raise row.error(STAY, "is not called SUBJECT_episodeNUMBER_timeseries.csv")
        if stay in self.stays and not self.is_hourly:
            raise row.error(STAY, "is listed twice")
        place = self.stays.setdefault(stay, len(self.stays))
        period = row.known(PERIOD) if PERIOD in row.fields else self.hours
        self.told.append((place, period, [row.number(name) for name in columns]))

    def lengths(self) -> np.ndarray:
        """The hours of data that a stay's rows name; where they name none, the window."""
        hours_N = np.zeros(len(self.stays), np.int64)
        for place, period, _ in self.told:
            hours_N[place] = max(hours_N[place], int(np.ceil(min(period, self.hours))))
        return hours_N

    def labels(self) -> dict[str, np.ndarray]:
        shape = (len(self.stays), self.hours) if self.is_hourly else (len(self.stays),)
        labels = {name: np.full(shape, np.nan, np.float32) for name in self.names.values()}
        for place, period, values in self.told:
            for name, value in zip(labels, values, strict=True):
                if not self.is_hourly:
                    labels[name][place] = value
                elif 1 <= (step := round(period)) <= self.hours:
                    labels[name][place, step - 1] = value  # predicted at the end of the hour
        return labels


def _directory(listfile: Path) -> Path:
    part = listfile.name.removesuffix("_listfile.csv")
    if part == listfile.name:
        return listfile.parent
    return listfile.parent / ("test" if part == "test" else "train")


def _patient(listfile: Path, stay: str) -> str:
    found = SERIES.fullmatch(stay)
    assert found is not None, f"{listfile}: checked when read"
    return found[1]


def _events(directory: Path, stays: dict[str, int], table: Table) -> tuple[Events, dict[str, int]]:
    left_out = Counter[str]()
    rows_E: list[tuple[int, int, int, float]] = []
    for stay, place in stays.items():
        for row in rows_of(existing(directory / stay, STAY), (HOURS, *table)):
            minute = int(np.floor(np.clip(row.known(HOURS) * 60 + 1e-6, -FARTHEST, FARTHEST)))
            for code, name in enumerate(table):
                text = row.text(name)
                if text.lower() in NOT_ASSESSED:
                    left_out["verbal responses of intubated patients"] += 1
                elif text:
                    rows_E.append((place, minute, code, _value(row, name)))
    stays_E, minutes_E, codes_E, values_E = zip(*rows_E, strict=True) if rows_E else ((),) * 4
    values = np.array(values_E, np.float32)
    codes = np.array(codes_E, np.int16)
    for code, name in enumerate(table):
        if name == "Fraction inspired oxygen":
            values[codes == code] = convert(table[name], values[codes == code], "1")
    return Events.of(stays_E, minutes_E, codes, values), dict(left_out)


def _value(row: TableRow, name: str) -> float:
    """A number; for the parts of the coma scale also a word, or a number before an abbreviation."""
    if name not in SCORES:
        return row.number(name)
    text = row.text(name)
    if text.lower() in SCORES[name]:
        return float(SCORES[name].index(text.lower()) + 1)
    number = re.match(r"\d(\.0*)?(?=\s|$)", text)
    if number is None:
        raise row.error(name, f"is no response; known: a number, or {', '.join(SCORES[name])}")
    return float(number[0])
