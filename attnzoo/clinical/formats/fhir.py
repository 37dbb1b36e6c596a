"""FHIR R4: Patient, Encounter and Observation as bundles of any type or NDJSON; LOINC names variables, UCUM units.

https://hl7.org/fhir/R4/ . An Encounter is a stay; its hours count from period.start. A value counts from the time at
which it was there: `issued`, else the time of the measurement, for a measurement over a period its end. Laboratories
that give no `issued` therefore seem to know results when the sample is taken. Nothing is guessed: what cannot be read
for certain is left out and counted in the report by its reason.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np

from attnzoo.clinical.cohort import Cohort, StayFacts, cohort_of
from attnzoo.clinical.events import Events
from attnzoo.clinical.formats.observations import (
    FINAL,
    MEASURED_STATICS,
    MODIFIER,
    LeftOutError,
    Measurement,
    Observations,
    Rules,
    Stay,
)
from attnzoo.clinical.formats.resources import (
    Clock,
    Document,
    Node,
    Resource,
    Resources,
    codes_of,
    documents_of,
    is_date,
    mapping,
)
from attnzoo.clinical.formats.tables import check_hours, existing
from attnzoo.clinical.loinc import names_by_code
from attnzoo.clinical.variables import PHYSIONET2012, STATICS, VARIABLES, YAIB, Table, choose
from attnzoo.errors import suggest

TABLES: dict[str, Table] = {"physionet2012": PHYSIONET2012, "yaib": YAIB}
DISPOSITION = "http://terminology.hl7.org/CodeSystem/discharge-disposition"
DIED = "exp"
NO_STAY = ("planned", "cancelled", "entered-in-error")
SEXES = {"female": 0.0, "male": 1.0}
GENDERS = (*SEXES, "other", "unknown")
"""Codes of Patient.gender."""
HOUR, LATEST = timedelta(hours=1), datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True, kw_only=True)
class FhirOptions:
    """How resources become a cohort."""

    hours: int = 48
    variables: tuple[str, ...] | None = None
    """A choice of the names."""
    names: str = "yaib"
    """The data set whose names variables get: the one on which the model was trained."""
    tz: str | None = None
    """The time zone of times without an offset, as in Europe/Berlin; None refuses such times."""
    preliminary: bool = False
    """Whether preliminary observations count."""
    at: str | None = None
    """The time of the prediction: what was known later is left out, and stays without an end last until then."""
    classes: tuple[str, ...] | None = None
    """The classes of encounters that are stays, for example IMP; None: all."""

    def __post_init__(self) -> None:
        check_hours(self.hours)
        if not isinstance(self.names, str) or self.names not in TABLES:
            raise ValueError(f"names={self.names!r} is no table of variables{suggest(str(self.names), TABLES)}")
        if isinstance(self.classes, str):
            raise ValueError(f"classes={self.classes!r} is one text; give a list of codes, as in ['IMP']")
        if not isinstance(self.preliminary, bool):
            raise ValueError(f"preliminary={self.preliminary!r} is neither true nor false")


@dataclass(frozen=True)
class FhirCohort:
    """A cohort and the observations behind it."""

    cohort: Cohort
    measurements: tuple[Measurement, ...]
    stays: tuple[Stay, ...]
    """The encounters, in the order of the cohort's rows."""
    at: datetime | None = None
    """The time of the prediction, in UTC; None: it was not told."""

    def basis(self, stay_id: str) -> tuple[str, ...]:
        """References of the observations that a stay's cells and statics hold, in the order of time."""
        row = self.cohort.stay_ids.index(stay_id)
        last, cells = 60 * self.cohort.grid.hours_N[row], self.cohort.grid.variables
        used = [m for m in self.measurements if m.stay == row and m.is_possible and m.minute < last]
        used = [m for m in used if (m.name in cells and m.minute >= 0) or m.is_static]
        return tuple(dict.fromkeys(m.source.key for m in used if m.source.is_referable))


def load(
    path: str | Path,
    *,
    hours: int = 48,
    variables: tuple[str, ...] | None = None,
    names: str = "yaib",
    tz: str | None = None,
    preliminary: bool = False,
    at: str | None = None,
    classes: tuple[str, ...] | None = None,
) -> Cohort:
    """The cohort in a file (.json, .ndjson, .jsonl, with or without .gz) or in all such files of a directory.

    `FhirOptions` explains the options. Label: "mortality" (the encounter's discharge disposition is death), NaN where
    none is told or the stay ends within the window; no label if it is so for all stays. Raises ValueError that names
    the place and the value for what is no JSON, and for a time without an offset where no tz is given.
    """
    source = existing(path, "path")
    options = FhirOptions(
        hours=hours, variables=variables, names=names, tz=tz, preliminary=preliminary, at=at, classes=classes
    )
    return read(documents_of(source), options, f"fhir {source.name}").cohort


def read(documents: Iterable[Document], options: FhirOptions, name: str = "fhir") -> FhirCohort:
    """The cohort in documents: pairs of the place, which errors name, and what JSON holds there."""
    table = choose(TABLES[options.names], options.variables, "variables")
    clock = Clock(options.tz)
    at = None if options.at is None else clock.moment("options", "at", options.at)
    if at is None and options.at is not None:
        raise ValueError(f"at={options.at!r} is no time with an hour; give one as in 2026-03-01T08:00:00+01:00")
    resources = Resources(documents, ("Patient", "Encounter", "Observation"))
    stays, left_out = _stays(resources, options, clock, at)
    rules = Rules((*FINAL, "preliminary") if options.preliminary else FINAL, at)
    observations = Observations(_codes(table, options), resources, stays, clock, rules)
    measurements = observations.measurements()
    facts = StayFacts(
        name=name,
        hours_N=np.array([stay.hours for stay in stays], np.int64),
        statics=_statics(stays, resources, measurements, options),
        stay_ids=tuple(stay.key for stay in stays),
        patient_ids=tuple(stay.patient for stay in stays),
        labels=_labels(stays, options.hours),
        left_out=dict(
            resources.left_out
            + left_out
            + observations.left_out
            + _unused_statics(measurements, table)
            + _unread_facts(stays, resources)
        ),
        unknown_units=observations.unknown_units,
    )
    cohort = cohort_of(facts, _events(measurements, table), table, options.hours)
    compared = Counter(m.name for m in measurements if m.comparator)
    values = {name: {**row, "with a comparator": compared[name]} for name, row in cohort.report.values.items()}
    return FhirCohort(replace(cohort, report=replace(cohort.report, values=values)), measurements, tuple(stays), at)


def _codes(table: Table, options: FhirOptions) -> dict[str, str]:
    """By LOINC code: the variable of the table, else of the statics that are measured."""
    chosen = {code: name for code, name in names_by_code(TABLES[options.names]).items() if name in table}
    return names_by_code({name: STATICS[name] for name in MEASURED_STATICS}) | chosen


def _stays(
    resources: Resources, options: FhirOptions, clock: Clock, at: datetime | None
) -> tuple[list[Stay], Counter[str]]:
    """(the stays in the order of the file, encounters that are none by reason)."""
    stays, left_out = [], Counter[str]()
    for encounter in resources["Encounter"].values():
        try:
            stays.append(_stay(encounter, resources, options, clock, at))
        except LeftOutError as reason:
            left_out[f"encounters {reason}"] += 1
    if not stays:
        raise ValueError(
            f"there is no Encounter that is a stay ({dict(left_out) or 'none at all'}); hours count from "
            "Encounter.period.start, so give the encounters beside the observations"
        )
    return stays, left_out


def _stay(encounter: Resource, resources: Resources, options: FhirOptions, clock: Clock, at: datetime | None) -> Stay:
    content, where = encounter.content, encounter.where
    if "actualPeriod" in content:
        raise ValueError(f"{where}: Encounter has actualPeriod, which is of FHIR R5; give the resources of FHIR R4")
    if content.get("status") in NO_STAY:
        raise LeftOutError(f"of status {content['status']!r}")
    if options.classes is not None and mapping(content, "class").get("code") not in options.classes:
        raise LeftOutError("of another class")
    patient = resources.key_of(mapping(content, "subject"))
    if patient is None:
        raise LeftOutError("without a patient")
    if MODIFIER in content:
        raise LeftOutError(f"with a {MODIFIER}")
    period = mapping(content, "period")
    start, end = (clock.moment(where, f"Encounter.period.{name}", period.get(name)) for name in ("start", "end"))
    if start is None:
        raise LeftOutError("without an hour of period.start")
    if start > LATEST - options.hours * HOUR:
        raise LeftOutError("that begin at the end of the calendar")
    if end is None and "end" in period:
        raise LeftOutError("without an hour of period.end")
    if end is not None and end < start:
        raise LeftOutError("that end before they begin")
    if at is not None and at < start:
        raise LeftOutError("that begin after the time of prediction")
    last = min((time for time in (end, at) if time is not None), default=start + options.hours * HOUR)
    disposition = codes_of(mapping(content, "hospitalization", "dischargeDisposition"), (DISPOSITION,))
    is_told = end is not None and len(disposition) == 1
    died = float(DIED in disposition) if is_told else math.nan
    return Stay(encounter.key, patient, start, end, (last - start) // HOUR + 1, died, encounter.is_referable)


def _statics(
    stays: list[Stay], resources: Resources, measurements: tuple[Measurement, ...], options: FhirOptions
) -> dict[str, np.ndarray]:
    """Age and sex of the patient; height and weight as known last before the end of the first hour. FHIR does not tell
    PhysioNet's kinds of units."""
    patients = [resources["Patient"].get(stay.patient) for stay in stays]
    contents = [{} if patient is None or MODIFIER in patient.content else patient.content for patient in patients]
    statics = {
        "age": np.array([_age(content, stay.start) for content, stay in zip(contents, stays, strict=True)]),
        "sex": np.array([SEXES.get(str(content.get("gender")), math.nan) for content in contents]),
    }
    for name in MEASURED_STATICS:
        statics[name] = np.full(len(stays), math.nan)
    for m in measurements:
        if m.is_static and m.is_possible:
            statics[VARIABLES[m.name].quantity][m.stay] = m.value
    if options.names == "physionet2012":
        statics["icu_type"] = np.full(len(stays), math.nan)
    return statics


def _unused_statics(measurements: tuple[Measurement, ...], table: Table) -> Counter[str]:
    """Heights and weights that are no variables of the table and no facts of admission either, by reason."""
    left_out = Counter[str]()
    for m in measurements:
        if m.name not in table and not m.is_possible:
            left_out[f"values of {m.name} that are impossible"] += 1
        elif m.name not in table and not m.is_static:
            left_out[f"values of {m.name} after the first hour"] += 1
    return left_out


def _unread_facts(stays: list[Stay], resources: Resources) -> Counter[str]:
    """Facts of patients that are told and cannot be read or belong to no stay, by reason."""
    named = {stay.patient for stay in stays}
    # A subject that names the patient by another id leaves the stay without age and sex.
    left_out = Counter({"patients of no stay": len(resources["Patient"].keys() - named)})
    for key in named & resources["Patient"].keys():
        content = resources["Patient"][key].content
        if MODIFIER in content:
            left_out[f"patients with a {MODIFIER}"] += 1
            continue
        left_out["patients whose birthDate cannot be read"] += "birthDate" in content and _born(content) is None
        left_out["patients whose gender is no code of FHIR"] += content.get("gender", "unknown") not in GENDERS
    return left_out


def _age(patient: Node, start: datetime) -> float:
    """In whole years; a birthDate without month or day counts from the first one."""
    born = _born(patient)
    if born is None:
        return math.nan
    return start.year - born.year - ((start.month, start.day) < (born.month, born.day))


def _born(patient: Node) -> date | None:
    text = patient.get("birthDate")
    if not isinstance(text, str) or not is_date(text):
        return None
    year, month, day = (*map(int, text.split("-")), 1, 1)[:3]
    try:
        return date(year, month, day)
    except ValueError:  # a month 13
        return None


def _labels(stays: list[Stay], hours: int) -> dict[str, np.ndarray]:
    is_late = [stay.end is not None and stay.end >= stay.start + hours * HOUR for stay in stays]
    died_N = np.array([stay.died if late else math.nan for stay, late in zip(stays, is_late, strict=True)], np.float32)
    return {} if np.isnan(died_N).all() else {"mortality": died_N}


def _events(measurements: tuple[Measurement, ...], table: Table) -> Events:
    code = {name: i for i, name in enumerate(table)}
    own = [m for m in measurements if m.name in code]
    rows = [(m.stay, m.minute, code[m.name], m.value) for m in own]
    return Events.of(*(zip(*rows, strict=True) if rows else ((),) * 4))
