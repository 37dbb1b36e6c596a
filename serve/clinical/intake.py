"""From a request to a cohort of its patients, with an account of what became of every value.

Nothing is guessed: a value whose variable or unit is not known is left out and counted with its reason. The rule for
implausible values is that of training (`attnzoo.clinical.events`).
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import numpy as np

from attnzoo.clinical.cohort import Cohort, StayFacts, cohort_of
from attnzoo.clinical.events import FARTHEST, Events, judged
from attnzoo.clinical.units import convert, scale_of, unknown_unit
from attnzoo.clinical.variables import STATICS, Table, Variable
from attnzoo.errors import suggest
from serve.clinical.protocol import MeasurementEntry, PatientEntry, PredictRequest
from serve.openai.errors import ApiError, short_name

FIELDS = {"age": "age_years", "height": "height_cm", "weight": "weight_kg", "sex": "sex", "icu_type": "icu_type"}
"""By static fact: its field of a patient."""
MAX_EXAMPLES = 8
"""Most values of a patient that were left out and are told one by one."""
ACCOUNTED = ("used", "clipped")


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a model takes. window: hours that it can see at most."""

    table: Table
    statics: tuple[str, ...]
    window: int
    max_patients: int


@dataclass
class ValueAccount:
    """What became of the values of a patient: by variable the number "used", of these "clipped", and those left out by
    reason. examples: some of the latter."""

    given: int = 0
    by_variable: dict[str, Counter[str]] = field(default_factory=dict)
    examples: list[dict[str, str]] = field(default_factory=list)

    def count(self, name: str, what: str, number: int = 1) -> None:
        """Adds to what became of values of a variable."""
        self.by_variable.setdefault(short_name(name), Counter())[what] += number

    def leave_out(self, where: str, name: str, reason: str, words: Callable[[], str]) -> None:
        """Counts a value that is not used. words: why, for one of the examples."""
        self.count(name, reason)
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append({"field": where, "reason": reason, "words": words()})

    def to_dict(self) -> dict[str, Any]:
        """The part `measurements` of a reply."""
        total = sum(self.by_variable.values(), Counter[str]())
        return {
            "given": self.given,
            **{what: total[what] for what in ACCOUNTED},
            "rejected": {what: number for what, number in total.items() if what not in ACCOUNTED},
            "by_variable": {name: dict(counts) for name, counts in self.by_variable.items()},
            "examples": self.examples,
        }


@dataclass(frozen=True, kw_only=True)
class GivenValue:
    """A value of one of the model's variables, in its unit, within the hours of the stay. given: as the client wrote
    it."""

    row: int
    minute: int
    variable: int
    value: float
    where: str
    given: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """One patient of a request. hours: of the stay that are used. start: time of hour 0; at: that of the prediction,
    after which nothing is known; None: not told. subject, encounter, basis: references of FHIR."""

    id: str
    hours: int
    start: datetime | None
    account: ValueAccount
    at: datetime | None = None
    subject: str | None = None
    encounter: str | None = None
    basis: tuple[str, ...] = ()

    @property
    def cutoff(self) -> datetime | None:
        """The time from which on nothing is used: the end of the last hour, or a time of prediction within it."""
        if self.start is None:
            return None
        end = self.start + timedelta(hours=self.hours)
        return end if self.at is None else min(end, self.at)


@dataclass(frozen=True, kw_only=True)
class Intake:
    """The patients of a request. cells: for each the cells of which something is known, in the order of hours. bundle:
    what was left out of a FHIR bundle."""

    cohort: Cohort
    patients: tuple[Admitted, ...]
    cells: tuple[list[dict[str, Any]], ...]
    bundle: dict[str, Any] | None = None


def take_in(request: PredictRequest, needs: Needs) -> Intake:
    """The intake of a request in JSON. Raises ApiError 400 that names the field."""
    check_number(len(request.patients), needs.max_patients, "patients")
    ids = check_ids([entry.id for entry in request.patients])
    found, values = [], []
    for row, entry in enumerate(request.patients):
        patient, own = _admit(row, entry, request.cutoff_hour, needs)
        found.append(patient)
        values += own
    statics = {name: np.array([_static(entry, name) for entry in request.patients]) for name in needs.statics}
    facts = StayFacts(
        name="request",
        hours_N=np.array([patient.hours for patient in found], np.int64),
        statics=statics,
        stay_ids=ids,
    )
    cohort = cohort_of(facts, _events(values), needs.table, int(facts.hours_N.max()))
    patients = tuple(found)
    for patient, entry in zip(patients, request.patients, strict=True):
        _account_of_statics(patient.account, entry, needs)
    return Intake(cohort=cohort, patients=patients, cells=cells_of(values, patients, needs.table))


def check_ids(ids: Sequence[str]) -> tuple[str, ...]:
    """The ids of the patients. Raises ApiError for one that two of them have."""
    seen: dict[str, int] = {}
    for row, name in enumerate(ids):
        if name in seen:
            what = f"patients[{row}].id={short_name(name)!r} is that of patients[{seen[name]}] too"
            raise ApiError(400, f"{what}; give each patient an id of its own", param=f"patients[{row}].id")
        seen[name] = row
    return tuple(seen)


def check_number(patients: int, max_patients: int, param: str) -> None:
    """Raises ApiError for more patients than one request may have."""
    if patients > max_patients:
        most = f"{patients} patients are more than the {max_patients} of max_patients; send several requests"
        raise ApiError(400, most, param=param, code="too_many_patients")


def check_cutoff(hour: int | None, window: int, param: str) -> None:
    """Raises ApiError for an hour that no stay has."""
    if hour is not None and not 1 <= hour <= window:
        raise ApiError(400, f"{param}={hour} must be from 1 to {window}, the hours that this model sees", param=param)


def _admit(row: int, entry: PatientEntry, cutoff_hour: int | None, needs: Needs) -> tuple[Admitted, list[GivenValue]]:
    """(the patient, the values that lie within the stay)."""
    where, account = f"patients[{row}]", ValueAccount(given=len(entry.measurements))
    start = _moment(entry.admitted, f"{where}.admitted")
    check_cutoff(cutoff_hour, needs.window, "cutoff_hour")
    check_cutoff(entry.cutoff_hour, needs.window, f"{where}.cutoff_hour")
    place = {name: i for i, name in enumerate(needs.table)}
    timed = []
    for number, given in enumerate(entry.measurements):
        value = _given(row, f"{where}.measurements[{number}]", given, start, place, needs, account)
        if value is not None:
            timed.append(value)
    events = _events(timed)
    is_possible_E, _ = judged(events.variables_E, events.values_E, list(needs.table.values()))
    hours = entry.cutoff_hour or cutoff_hour or last_hour(events.minutes_E[is_possible_E].tolist(), needs.window)
    return Admitted(id=entry.id, hours=hours, start=start, account=account), within(timed, hours, needs.table, account)


def last_hour(minutes: Sequence[int], window: int) -> int:
    """Hours until the end of that of the last possible measurement; at least one."""
    return min(max(max(minutes, default=0) // 60 + 1, 1), window)


def _given(
    row: int,
    where: str,
    given: MeasurementEntry,
    start: datetime | None,
    place: dict[str, int],
    needs: Needs,
    account: ValueAccount,
) -> GivenValue | None:
    """The value in the model's unit; None, counted, where variable or unit are not known."""
    minute = _minute(where, given, start)
    name = given.variable
    if name not in place:
        shown = short_name(name)
        hint = f"{shown!r} is no variable of this model"
        account.leave_out(where, name, "unknown variable", lambda: hint + suggest(shown, place))
        return None
    variable = needs.table[name]
    if scale_of(variable, given.unit) is None:
        account.leave_out(where, name, "unknown unit", lambda: unknown_unit(variable, short_name(given.unit)))
        return None
    value = float(convert(variable, given.value, given.unit))
    written = {"value": given.value, "unit": given.unit, "reference": None}
    return GivenValue(row=row, minute=minute, variable=place[name], value=value, where=where, given=written)


def _minute(where: str, given: MeasurementEntry, start: datetime | None) -> int:
    if (given.hour is None) == (given.time is None):
        both = "has both hour and time; leave one out" if given.hour is not None else "has neither hour nor time"
        raise ApiError(400, f"{where} {both}", param=f"{where}.hour")
    if given.hour is not None:
        return math.floor(given.hour * 60 + 1e-9)
    if start is None:
        patient = where.partition(".")[0]
        what = f"{where}.time needs {patient}.admitted, the time of hour 0; give it, or hour instead of time"
        raise ApiError(400, what, param=f"{patient}.admitted")
    time = _moment(given.time, f"{where}.time")
    assert time is not None
    minute = (time - start) // timedelta(minutes=1)
    return min(max(minute, -FARTHEST), FARTHEST)


def _moment(text: str | None, where: str) -> datetime | None:
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        found = None
    offset = None if found is None else found.utcoffset()
    # FHIR writes offsets in minutes, up to 14 hours.
    is_offset = offset is not None and abs(offset) <= timedelta(hours=14) and not offset % timedelta(minutes=1)
    if found is None or not is_offset or not 1 < found.year < 9999:
        shown = short_name(text)
        what = f"{where}={shown!r} is no time with its offset from UTC; write it as in 2026-03-01T08:00:00+01:00"
        raise ApiError(400, what, param=where)
    return found


def within(values: list[GivenValue], hours: int, table: Table, account: ValueAccount) -> list[GivenValue]:
    """Those within the stay, and what became of all of them is counted."""
    names, kept = list(table), []
    for value in values:
        if 0 <= value.minute < 60 * hours:
            kept.append(value)
        else:
            early = value.minute < 0
            reason = "before admission" if early else "after the cut-off"
            words = "the value is from before hour 0" if early else f"the stay is used until hour {hours}"
            account.leave_out(value.where, names[value.variable], reason, partial(str, words))
    events, variables = _events(kept), list(table.values())
    is_possible_E, clipped_E = judged(events.variables_E, events.values_E, variables)
    for value, possible, clipped in zip(kept, is_possible_E, clipped_E, strict=True):
        variable = variables[value.variable]
        if possible:
            account.count(variable.name, "used")
            if np.float32(value.value) != clipped:
                account.count(variable.name, "clipped")
        else:
            account.leave_out(
                value.where, variable.name, "impossible value", partial(_impossible, value.value, variable)
            )
    return kept


def _impossible(value: float, variable: Variable) -> str:
    return f"{value:g} {variable.unit} is outside of {variable.possible[0]:g} to {variable.possible[1]:g}"


def _events(values: Sequence[GivenValue]) -> Events:
    rows = [(value.row, value.minute, value.variable, value.value) for value in values]
    return Events.of(*(zip(*rows, strict=True) if rows else ((),) * 4))


def cells_of(
    values: Sequence[GivenValue], patients: Sequence[Admitted], table: Table
) -> tuple[list[dict[str, Any]], ...]:
    """For each patient the cells that hold a value, and those whose values were all refused. A cell shows the value
    that counts: the last possible one of its hour."""
    events, variables = _events(values), list(table.values())
    is_possible_E, clipped_E = judged(events.variables_E, events.values_E, variables)
    found: list[dict[tuple[int, int], dict[str, Any]]] = [{} for _ in patients]
    order = np.argsort(events.minutes_E, kind="stable")
    for i in order.tolist():
        value, possible = values[i], bool(is_possible_E[i])
        hour, variable = value.minute // 60, variables[value.variable]
        before = found[value.row].get((hour, value.variable))
        if not possible and before is not None and before["measured"]:
            continue
        clipped = possible and clipped_E[i] != events.values_E[i]
        found[value.row][hour, value.variable] = {
            "hour": hour,
            "variable": variable.name,
            "measured": possible,
            "value": float(f"{clipped_E[i]:.7g}") if possible else None,  # all digits that 32 bits have
            "unit": variable.unit,
            "count": min((before["count"] if before else 0) + possible, 255),
            "flag": "clipped" if clipped else None if possible else "implausible",
            "given": value.given,
        }
    return tuple([cells[key] for key in sorted(cells)] for cells in found)


def _static(entry: PatientEntry, name: str) -> float:
    given = getattr(entry, FIELDS[name])
    if given is None or given == "unknown":
        return math.nan
    codes = {meaning: float(code) for code, meaning in STATICS[name].categories}
    return codes[given] if codes else float(given)


def _account_of_statics(account: ValueAccount, entry: PatientEntry, needs: Needs) -> None:
    """Counts facts that the model does not take, and those that are implausible."""
    for name, of_patient in FIELDS.items():
        value = _static(entry, name)
        if math.isnan(value):
            continue
        (low, high), (least, most) = STATICS[name].plausible, STATICS[name].possible
        if name not in needs.statics:
            words = f"the model does not take {of_patient}"
            account.leave_out(of_patient, of_patient, "not used by this model", partial(str, words))
        elif not least <= value <= most:
            account.leave_out(of_patient, of_patient, "impossible value", partial(_impossible, value, STATICS[name]))
        elif not low <= value <= high:
            account.count(of_patient, "clipped")


def cut(cohort: Cohort, hours_N: np.ndarray) -> Cohort:
    """The cohort in which nothing is known from these hours on."""
    grid = cohort.grid.until(int(hours_N.max(initial=0)))
    hours_N = np.minimum(grid.hours_N, hours_N)
    gone_NT = np.arange(grid.hours) >= hours_N[:, None]
    values_NTV = np.where(gone_NT[..., None], np.float32(np.nan), grid.values_NTV)
    counts_NTV = np.where(gone_NT[..., None], 0, grid.counts_NTV).astype(grid.counts_NTV.dtype)
    return replace(cohort, grid=replace(grid, values_NTV=values_NTV, counts_NTV=counts_NTV, hours_N=hours_N), labels={})
