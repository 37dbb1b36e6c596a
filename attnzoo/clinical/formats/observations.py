"""FHIR R4 observations as measurements: status, LOINC code, time, stay, value and unit; what is left out, and why."""

from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta

from attnzoo.clinical.events import FARTHEST
from attnzoo.clinical.formats.resources import (
    Clock,
    Node,
    Resource,
    Resources,
    codes_of,
    is_date,
    mapping,
    mappings,
)
from attnzoo.clinical.loinc import SYSTEMS
from attnzoo.clinical.units import convert, scale_of
from attnzoo.clinical.variables import VARIABLES

UCUM = "http://unitsofmeasure.org"
FINAL = ("final", "amended", "corrected")
STATUSES = (*FINAL, "preliminary", "registered", "cancelled", "entered-in-error", "unknown")
COMPARATORS = ("<", "<=", ">=", ">")
MEASURED_STATICS = ("height", "weight")
MODIFIER = "modifierExtension"
"""An element that may turn the meaning of what it stands in round; FHIR forbids to go on with one that is unknown."""
MINUTE = timedelta(minutes=1)


class LeftOutError(Exception):
    """Why a value, an observation or an encounter is left out."""


@dataclass(frozen=True)
class Stay:
    """An encounter whose hours become rows of the grid."""

    key: str
    """Its reference."""
    patient: str
    """The patient's reference."""
    start: datetime
    end: datetime | None
    hours: int
    """That exist, without regard to the window."""
    died: float
    """1, 0, or NaN where it is not told."""
    is_referable: bool = True
    """Whether `key` is a reference, and not the place of an encounter without an id."""


@dataclass(frozen=True)
class Measurement:
    """One value of one observation, in the unit of its variable."""

    stay: int
    minute: int
    known: datetime
    name: str
    value: float
    comparator: str
    """"<", "<=", ">=" or ">" where the value is a limit, not a measurement; else empty."""
    source: Resource

    @property
    def is_possible(self) -> bool:
        least, most = VARIABLES[self.name].possible
        return least <= self.value <= most

    @property
    def is_static(self) -> bool:
        """Whether it is a height or weight known at admission."""
        return VARIABLES[self.name].quantity in MEASURED_STATICS and self.minute < 60


@dataclass(frozen=True)
class Rules:
    """Which observations count."""

    statuses: tuple[str, ...]
    at: datetime | None
    """The time of the prediction, after which nothing is known."""


class Observations:
    """Turns observations into measurements, and counts what is left out."""

    def __init__(
        self, codes: dict[str, str], resources: Resources, stays: list[Stay], clock: Clock, rules: Rules
    ) -> None:
        self.codes, self.resources, self.stays, self.clock, self.rules = codes, resources, stays, clock, rules
        self.rows = {stay.key: row for row, stay in enumerate(stays)}
        self.by_patient: dict[str, list[int]] = {}
        for row, stay in enumerate(stays):
            self.by_patient.setdefault(stay.patient, []).append(row)
        self.left_out: Counter[str] = Counter()
        self.unknown_units: Counter[str] = Counter()

    def measurements(self) -> tuple[Measurement, ...]:
        """All of them in the order in which they were known, whatever the order of the file."""
        found: list[Measurement] = []
        for observation in self.resources["Observation"].values():
            try:
                found += self._of(observation)
            except LeftOutError as reason:
                self.left_out[f"observations {reason}"] += 1
        found.sort(key=lambda m: (m.known, m.source.key))
        different: dict[tuple[object, ...], Measurement] = {}
        for m in found:
            different.setdefault((m.stay, m.known, m.name, m.value, m.comparator), m)
        self.left_out["values that repeat another of the same time"] += len(found) - len(different)
        return tuple(different.values())

    def _of(self, observation: Resource) -> list[Measurement]:
        content = observation.content
        status = content.get("status")
        if status not in self.rules.statuses:
            raise LeftOutError(f"of status {status!r}" if status in STATUSES else "without a status of FHIR R4")
        if MODIFIER in content:
            raise LeftOutError(f"with a {MODIFIER}")
        named = []
        for part in _parts(content):
            try:
                named.append((self._name(part), part))
            except LeftOutError as reason:
                self.left_out[f"values {reason}"] += 1
        if not named:
            return []
        known = self._known(observation)
        row = self._row(content, known)
        if self.rules.at is not None and known > self.rules.at:
            raise LeftOutError("known only after the time of prediction")
        minute = min(max((known - self.stays[row].start) // MINUTE, -FARTHEST), FARTHEST)
        found = []
        for name, part in named:
            try:
                value, comparator = self._value(name, part)
            except LeftOutError as reason:
                self.left_out[f"values {reason}"] += 1
            else:
                if value is not None:
                    found.append(Measurement(row, minute, known, name, value, comparator, observation))
        return found

    def _name(self, part: Node) -> str:
        """The variable that a coded part measures."""
        if MODIFIER in part:
            raise LeftOutError(f"with a {MODIFIER}")
        codes = codes_of(mapping(part, "code"), SYSTEMS)
        if not codes:
            raise LeftOutError("without a LOINC code")
        names = {self.codes[code] for code in codes if code in self.codes}
        if len(names) > 1:
            raise LeftOutError("of several variables at once")
        if not names:
            raise LeftOutError("of no variable of the table")
        return names.pop()

    def _known(self, observation: Resource) -> datetime:
        """When the value was there: the latest of `issued` and the time of the measurement."""
        content = observation.content
        given: dict[str, object] = {
            name: content[name] for name in ("issued", "effectiveDateTime", "effectiveInstant") if name in content
        }
        if "end" in (period := mapping(content, "effectivePeriod")):
            given["effectivePeriod.end"] = period["end"]
        if not given:
            raise LeftOutError("without a time at which they were known")
        with_hour = {name: text for name, text in given.items() if not is_date(text)}
        if not with_hour or ("issued" in given and "issued" not in with_hour):
            raise LeftOutError("without an hour")
        times = [self.clock.moment(observation.where, f"Observation.{name}", text) for name, text in with_hour.items()]
        read = [time for time in times if time is not None]
        if len(read) < len(times):
            raise LeftOutError("whose time cannot be read")
        return max(read)

    def _row(self, content: Node, known: datetime) -> int:
        """The stay of an observation: the encounter that it names, else the only one of its patient at that time."""
        patient = self.resources.key_of(mapping(content, "subject"))
        if "encounter" in content:
            row = self.rows.get(self.resources.key_of(mapping(content, "encounter")) or "")
            if row is None:
                raise LeftOutError("of an encounter that is not among the stays")
            if patient is not None and patient != self.stays[row].patient:
                raise LeftOutError("of another patient than their encounter")
            return row
        rows = [row for row in self.by_patient.get(patient or "", ()) if self._is_within(self.stays[row], known)]
        if len(rows) != 1:
            raise LeftOutError("that name no encounter and lie in several" if rows else "of no stay")
        return rows[0]

    def _is_within(self, stay: Stay, known: datetime) -> bool:
        return stay.start <= known and (stay.end is None or known <= stay.end)

    def _value(self, name: str, part: Node) -> tuple[float | None, str]:
        """(the value in the variable's unit, its comparator); None, counted, for a unit that is not known."""
        quantity, number = mapping(part, "valueQuantity"), part.get("valueInteger")
        unit: str | None = ""
        if quantity:
            number, unit = quantity.get("value"), _unit(quantity)
        if number is None:
            is_other = any(key.startswith("value") and key != "valueQuantity" for key in part)
            raise LeftOutError("that are no number" if is_other else "that are missing")
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not abs(number) < 1e30:
            raise LeftOutError("that are no number")
        comparator = quantity.get("comparator", "")
        if comparator not in ("", *COMPARATORS):
            raise LeftOutError("of an unknown comparator")
        if unit is None or scale_of(VARIABLES[name], unit) is None:
            self.unknown_units[name] += 1
            return None, ""
        return float(convert(VARIABLES[name], float(number), unit)), comparator


def _parts(content: Node) -> list[Node]:
    """What holds values: components, and the observation itself unless it only joins others."""
    components = mappings(content, "component")
    has_own = any(key.startswith("value") for key in content)
    return [content, *components] if has_own or not (components or "hasMember" in content) else components


def _unit(quantity: Node) -> str | None:
    """UCUM's code, or without any code the spelling of the unit; None for a code that is not UCUM's."""
    if "code" in quantity or "system" in quantity:
        code = quantity.get("code")
        return code if quantity.get("system") == UCUM and isinstance(code, str) else None
    unit = quantity.get("unit", "")
    return unit if isinstance(unit, str) else None
