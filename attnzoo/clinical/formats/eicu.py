"""The eICU Collaborative Research Database: patient and lab as csv or csv.gz in one directory, vital signs if present.

https://eicu-crd.mit.edu/ . Offsets are minutes since admission to the unit. A laboratory value counts from the time of
its last revision on, because only then does the table hold it. Its unit is the one that the hospital's interface sent;
only where that is empty, the one that the table declares: for CRP and magnesium, values follow the former. Stays of one
patient share a uniquepid.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from attnzoo.clinical.cohort import Cohort, StayFacts, cohort_of
from attnzoo.clinical.events import Events
from attnzoo.clinical.formats.tables import TableRow, check_hours, existing, find_table, rows_of
from attnzoo.clinical.units import convert, scale_of
from attnzoo.clinical.variables import YAIB, Table, choose
from attnzoo.errors import suggest

Task = Literal["mortality", "los"]
LARGEST_LOS = 168.0
"""Remaining hours are capped at a week, as in YAIB."""
LABS = {
    "albumin": "alb", "alkaline phos.": "alp", "ALT (SGPT)": "alt", "AST (SGOT)": "ast", "Base Excess": "be",
    "bicarbonate": "bicar", "HCO3": "bicar", "total bilirubin": "bili", "direct bilirubin": "bili_dir",
    "-bands": "bnd", "BUN": "bun", "calcium": "ca", "ionized calcium": "cai", "CPK": "ck", "CPK-MB": "ckmb",
    "chloride": "cl", "creatinine": "crea", "CRP": "crp", "fibrinogen": "fgn", "FiO2": "fio2", "glucose": "glu",
    "bedside glucose": "glu", "Hgb": "hgb", "PT - INR": "inr_pt", "potassium": "k", "lactate": "lact",
    "-lymphs": "lymph", "MCH": "mch", "MCHC": "mchc", "MCV": "mcv", "Methemoglobin": "methb", "magnesium": "mg",
    "sodium": "na", "-polys": "neut", "O2 Sat (%)": "o2sat", "paCO2": "pco2", "pH": "ph", "phosphate": "phos",
    "platelets x 1000": "plt", "paO2": "po2", "PTT": "ptt", "Temperature": "temp", "troponin - T": "tnt",
    "WBC x 1000": "wbc",
}  # fmt: skip
VITALS = {
    "vitalPeriodic": {
        "temperature": "temp", "sao2": "o2sat", "heartrate": "hr", "respiration": "resp", "systemicsystolic": "sbp",
        "systemicdiastolic": "dbp", "systemicmean": "map",
    },
    "vitalAperiodic": {"noninvasivesystolic": "sbp", "noninvasivediastolic": "dbp", "noninvasivemean": "map"},
}  # fmt: skip
STAY, PATIENT, DISCHARGE, STATUS = "patientunitstayid", "uniquepid", "unitdischargeoffset", "hospitaldischargestatus"
PATIENT_COLUMNS = (STAY, PATIENT, DISCHARGE, STATUS, "gender", "age", "admissionheight", "admissionweight")
LAB_UNITS = ("labmeasurenameinterface", "labmeasurenamesystem")
LAB_COLUMNS = (STAY, "labresultoffset", "labresultrevisedoffset", "labname", "labresult", *LAB_UNITS)
TEXTS = {
    "diagnosis": ("diagnosisoffset", "diagnosisstring"),
    "treatment": ("treatmentoffset", "treatmentstring"),
    "physicalExam": ("physicalexamoffset", "physicalexampath"),
    "admissionDx": ("admitdxenteredoffset", "admitdxpath"),
}
"""Tables of text: the column of minutes, the column of text."""


def load(
    path: str | Path,
    *,
    task: Task = "mortality",
    hours: int = 24,
    variables: tuple[str, ...] | None = None,
    texts: bool = False,
) -> Cohort:
    """The cohort in a directory of eICU tables.

    task: "mortality" keeps stays of at least `hours` hours with a known outcome and labels "mortality" (death in
    hospital). "los" keeps all stays and labels "los": remaining hours in the unit at each hour, at most 168.
    variables: a choice of YAIB's 48. texts: also what was written before the end of `hours` (`load_texts`). Raises
    ValueError that names file, line, field and value.
    """
    check_hours(hours)
    if task not in ("mortality", "los"):
        raise ValueError(f"task={task!r} is not a task of eICU{suggest(task, ('mortality', 'los'))}")
    directory = existing(path, "path")
    table = choose(YAIB, variables, "variables")
    stays, left_out = _stays(_required(directory, "patient"), task, hours)
    place = {stay.row.text(STAY): i for i, stay in enumerate(stays)}
    collected = _Collected(table, place)
    collected.labs(rows_of(_required(directory, "lab"), LAB_COLUMNS))
    for name, columns in VITALS.items():
        if (found := find_table(directory, name)) is not None:
            collected.vitals(rows_of(found, (STAY, "observationoffset", *columns)), columns)
    whole_hours_N = np.array([stay.discharge // 60 for stay in stays], np.int64)
    label_NT = np.clip(whole_hours_N[:, None] - np.arange(hours), 0, LARGEST_LOS).astype(np.float32)
    label_NT[np.arange(hours) > whole_hours_N[:, None]] = np.nan
    facts = StayFacts(
        name=f"eicu {directory.name}",
        hours_N=whole_hours_N + 1 if task == "los" else np.full(len(stays), hours),
        statics=_statics(stays),
        stay_ids=tuple(place),
        patient_ids=tuple(stay.row.text(PATIENT) for stay in stays),
        labels={"los": label_NT} if task == "los" else {"mortality": np.array([s.died for s in stays], np.float32)},
        left_out=left_out,
        unknown_units=collected.unknown_units,
    )
    cohort = cohort_of(facts, collected.events(), table, hours)
    if not texts:
        return cohort
    written = load_texts(directory, hours)
    lines = [dict.fromkeys(text for _, _, text in written.get(stay, ())) for stay in place]
    return replace(cohort, texts=tuple("\n".join(each) for each in lines))


def load_texts(path: str | Path, hours: int) -> dict[str, list[tuple[int, str, str]]]:
    """By stay: (minutes since admission, table, text) of what was written before the end of the first `hours` hours, in
    the order of time. Later diagnoses and treatments tell the outcome, so they are left out."""
    check_hours(hours)
    directory = existing(path, "path")
    written: dict[str, list[tuple[int, str, str]]] = {}
    for name, (offset, text) in TEXTS.items():
        if (found := find_table(directory, name)) is not None:
            for row in rows_of(found, (STAY, offset, text)):
                if (minute := row.integer(offset)) < hours * 60:
                    written.setdefault(row.text(STAY), []).append((minute, name, row.text(text)))
    if not written:
        raise ValueError(
            f"{directory} has no text before hour {hours}; known tables: {', '.join(TEXTS)} as csv or csv.gz"
        )
    return {stay: sorted(rows) for stay, rows in written.items()}


@dataclass(frozen=True)
class _Stay:
    row: TableRow
    discharge: int
    """Minutes from admission to discharge."""
    died: float


def _stays(path: Path, task: Task, hours: int) -> tuple[list[_Stay], dict[str, int]]:
    """(the stays of a task, how many were left out by reason)."""
    stays, left_out, seen = [], Counter[str](), set()
    for row in rows_of(path, PATIENT_COLUMNS):
        status = row.text(STATUS)
        if status not in ("Alive", "Expired", ""):
            raise row.error(STATUS, "is neither Alive nor Expired nor empty")
        if row.text(STAY) in seen:
            raise row.error(STAY, "stands in the table twice")
        if not row.text(PATIENT):
            raise row.error(PATIENT, "is empty, so that stays of one patient cannot be kept together")
        seen.add(row.text(STAY))
        stay = _Stay(row, row.integer(DISCHARGE), float(status == "Expired"))
        if task == "mortality" and stay.discharge < hours * 60:
            left_out[f"stays shorter than {hours} hours"] += 1
        elif task == "mortality" and not status:
            left_out["stays without a known outcome"] += 1
        elif stay.discharge < 0:
            left_out["stays that end before they begin"] += 1
        else:
            stays.append(stay)
    if not stays:
        raise ValueError(
            f"{path} has no stay for task={task!r} with hours={hours} ({dict(left_out)}); give fewer hours"
        )
    return stays, dict(left_out)


def _statics(stays: list[_Stay]) -> dict[str, np.ndarray]:
    """Ages above 89 are written "> 89" and become 90."""
    sexes = {"Female": 0.0, "Male": 1.0}
    ages = [90.0 if stay.row.text("age") == "> 89" else stay.row.number("age") for stay in stays]
    return {
        "age": np.array(ages),
        "sex": np.array([sexes.get(stay.row.text("gender"), np.nan) for stay in stays]),
        "height": np.array([stay.row.number("admissionheight") for stay in stays]),
        "weight": np.array([stay.row.number("admissionweight") for stay in stays]),
    }


class _Collected:
    """Events as they are read."""

    def __init__(self, table: Table, place: dict[str, int]) -> None:
        self.table, self.place = table, place
        self.code = {name: code for code, name in enumerate(table)}
        self.stays: list[int] = []
        self.minutes: list[int] = []
        self.codes: list[int] = []
        self.values: list[float] = []
        self.unknown_units: Counter[str] = Counter()

    def add(self, stay: int, minute: int, name: str, value: float) -> None:
        if not np.isnan(value):
            self.stays.append(stay)
            self.minutes.append(minute)
            self.codes.append(self.code[name])
            self.values.append(value)

    def labs(self, rows: Iterator[TableRow]) -> None:
        for row in rows:
            name, stay = LABS.get(row.text("labname"), ""), self.place.get(row.text(STAY))
            if name not in self.code or stay is None:
                continue
            unit = row.text(LAB_UNITS[0]) or row.text(LAB_UNITS[1])
            if scale_of(self.table[name], unit) is None:
                self.unknown_units[name] += 1
                continue
            known = max(row.integer("labresultoffset"), row.integer("labresultrevisedoffset"))
            self.add(stay, known, name, float(convert(self.table[name], row.number("labresult"), unit)))

    def vitals(self, rows: Iterator[TableRow], columns: dict[str, str]) -> None:
        for row in rows:
            stay = self.place.get(row.text(STAY))
            if stay is not None:
                for column, name in columns.items():
                    if name in self.code:
                        self.add(stay, row.integer("observationoffset"), name, row.number(column))

    def events(self) -> Events:
        return Events.of(self.stays, self.minutes, self.codes, self.values)


def _required(directory: Path, name: str) -> Path:
    found = find_table(directory, name)
    if found is None:
        raise ValueError(f"{directory} has no {name}.csv or {name}.csv.gz; give the directory of eICU's tables")
    return found
