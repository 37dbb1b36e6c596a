"""PMData: five months of a wristband and daily reports of 16 people, a directory or a tar archive of p01, p02, ...

https://datasets.simula.no/pmdata/ . A row is a person's report on one day; its steps are the days before that day, so
that nothing measured on the day itself, or later, can tell the answer. Days are those written in the files.
"""

import io
import json
import re
import tarfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np

from attnzoo.clinical.cohort import Cohort, StayFacts, cohort_of
from attnzoo.clinical.events import Events
from attnzoo.clinical.formats.tables import check_hours, existing, rows_in, unreadable
from attnzoo.clinical.variables import PMDATA, Table, choose

QUESTIONS = {"fatigue": 5, "mood": 5, "readiness": 10, "sleep_quality": 5, "soreness": 5, "stress": 5}
"""The highest answer; more is better. 0 is no answer. The label is 1 for an answer below the middle of the scale."""
FILE = re.compile(r"(?:^|.*/)(p\d+)/(?:fitbit|pmsys)/([a-z_]+)\.(?:json|csv)")
DAILY = {
    "sedentary_minutes": "sedentary_minutes",
    "lightly_active_minutes": "light_minutes",
    "moderately_active_minutes": "moderate_minutes",
    "very_active_minutes": "vigorous_minutes",
}
ZONES = {
    "BELOW_DEFAULT_ZONE_1": "zone_below_minutes",
    "IN_DEFAULT_ZONE_1": "zone_fat_burn_minutes",
    "IN_DEFAULT_ZONE_2": "zone_cardio_minutes",
    "IN_DEFAULT_ZONE_3": "zone_peak_minutes",
}
OWN_ZONE = "values of zones that a person set"
NIGHT = {
    "minutesAsleep": "sleep_minutes",
    "minutesAwake": "awake_minutes",
    "timeInBed": "bed_minutes",
    "efficiency": "sleep_efficiency",
}
STAGES = {"deep": "deep_minutes", "light": "light_sleep_minutes", "rem": "rem_minutes"}
SCORES = {"overall_score": "sleep_score", "restlessness": "restlessness"}
DAY = np.dtype("datetime64[D]")

Files = dict[str, tuple[str, bytes]]
"""(path, content) of one person's files, by name."""
Answered = tuple[str, str, list[float]]
"""(person, day, answers to the questions)."""
Measured = Iterator[tuple[str, str, float]]
"""(day, variable, value)."""


def load(path: str | Path, *, days: int = 15, variables: tuple[str, ...] | None = None) -> Cohort:
    """A row for each day on which a person answered, with the `days` days before it. Labels: one for each question.

    variables: a choice of the 21 daily ones. Raises ValueError that names the file and what is wrong in it.
    """
    check_hours(days, "days", most=366)
    table = choose(PMDATA, variables, "variables")
    people: dict[str, Files] = {}
    for where, content in _files(existing(path, "path")):
        if (found := FILE.fullmatch(where)) is not None:
            people.setdefault(found[1], {})[found[2]] = where, content
    rows, left_out = _reports(people)
    if not rows:
        raise ValueError(f"{path} holds no report of a person; PMData has p01/pmsys/wellness.csv and so on")
    events = _windows(rows, {person: _measured(files, table, left_out) for person, files in people.items()}, days)
    answers = np.array([answer for _, _, answer in rows], np.float32).reshape(len(rows), len(QUESTIONS))
    labels = {}
    for column, (question, most) in enumerate(QUESTIONS.items()):
        given = answers[:, column]
        labels[question] = np.where(np.isnan(given), np.nan, given < (most + 1) // 2).astype(np.float32)
    facts = StayFacts(
        name="pmdata",
        hours_N=np.full(len(rows), days),
        statics={},
        stay_ids=tuple(f"{person} {day}" for person, day, _ in rows),
        patient_ids=tuple(person for person, _, _ in rows),
        labels=labels,
        left_out=dict(left_out),
        dates=np.array([day for _, day, _ in rows], DAY),
    )
    return cohort_of(facts, events, table, days, step_hours=24)


def _files(root: Path) -> Iterator[tuple[str, bytes]]:
    """(path, content) of every file of an archive or below a directory."""
    try:
        if root.is_dir():
            for path in sorted(root.rglob("*.*")):
                if FILE.fullmatch(path.as_posix()):
                    yield path.as_posix(), path.read_bytes()
            return
        with tarfile.open(root) as archive:
            for member in archive:
                if member.isfile() and (file := archive.extractfile(member)) is not None:
                    yield member.name, file.read()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise unreadable(root, error) from None


def _reports(people: dict[str, Files]) -> tuple[list[Answered], Counter[str]]:
    """((person, day, answers) in order, what was left out). Of several reports of a day the first counts."""
    rows, left_out = [], Counter[str]()
    for person, files in sorted(people.items()):
        if "wellness" not in files:
            left_out["people without reports"] += 1
            continue
        days = set()
        where, content = files["wellness"]
        for row in rows_in(where, io.BytesIO(content), ("effective_time_frame", *QUESTIONS)):
            day = _day(row.text("effective_time_frame"), f"{where}, line {row.line}")
            answers = [row.number(question) or np.nan for question in QUESTIONS]
            for answer, (question, most) in zip(answers, QUESTIONS.items(), strict=True):
                if not (np.isnan(answer) or 1 <= answer <= most):
                    raise row.error(question, f"is no answer from 0 to {most}")
            if day in days:
                left_out["second reports of a day"] += 1
            elif np.isnan(answers).all():
                left_out["reports without an answer"] += 1
            else:
                days.add(day)
                rows.append((person, day, answers))
    return rows, left_out


def _windows(rows: list[Answered], measured: dict[str, Any], days: int) -> Events:
    """Each row's events: what its person measured in the days before it."""
    parts: list[list[np.ndarray]] = [[], [], [], []]
    for place, (person, day, _) in enumerate(rows):
        day_E, code_E, value_E = measured[person]
        step_E = (day_E - (np.datetime64(day) - days)).astype(np.int64)
        chosen = np.flatnonzero((step_E >= 0) & (step_E < days))
        minutes_E = (step_E[chosen] * 1440).astype(np.int32)
        arrays = (np.full(len(chosen), place, np.int32), minutes_E, code_E[chosen], value_E[chosen])
        for part, array in zip(parts, arrays, strict=True):
            part.append(array)
    return Events(*(np.concatenate(part) for part in parts))


def _measured(files: Files, table: Table, left_out: Counter[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(days, codes, values) of one person."""
    code = {name: place for place, name in enumerate(table)}
    days, codes, values = [], [], []
    for name, (where, content) in files.items():
        reader = READERS.get(name)
        try:
            found = list(reader(where, content)) if reader else []
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where} is built in another way ({error!r}); is it PMData's?") from None
        for day, variable, value in found:
            left_out[OWN_ZONE] += variable == OWN_ZONE
            if variable in code:
                days.append(_day(day, where))
                codes.append(code[variable])
                values.append(value)
    return np.array(days, DAY), np.array(codes, np.int16), np.array(values, np.float32)


def _daily(where: str, content: bytes) -> Measured:
    variable = DAILY[Path(where).stem]
    for entry in _entries(where, content, "dateTime", "value"):
        yield entry["dateTime"], variable, _number(entry["value"], where)


def _resting(where: str, content: bytes) -> Measured:
    for entry in _entries(where, content, "dateTime", "value"):
        if value := _number(entry["value"]["value"], where):  # 0 on days without a measurement
            yield entry["dateTime"], "resting_heart_rate", value


def _zones(where: str, content: bytes) -> Measured:
    for entry in _entries(where, content, "dateTime", "value"):
        for zone, value in entry["value"]["valuesInZones"].items():
            # Other zones are those that a person set; they cannot be compared.
            yield entry["dateTime"], OWN_ZONE if "CUSTOM" in zone else ZONES[zone], _number(value, where)


def _exercise(where: str, content: bytes) -> Measured:
    """Sums of the day."""
    sums: dict[tuple[str, str], float] = defaultdict(float)
    for entry in _entries(where, content, "startTime", "activeDuration"):
        day = _day(entry["startTime"], where)
        sums[day, "exercise_minutes"] += _number(entry["activeDuration"], where) / 60000
        sums[day, "exercise_steps"] += _number(entry.get("steps", 0), where)
    for (day, variable), value in sums.items():
        yield day, variable, value


def _nights(where: str, content: bytes) -> Measured:
    """Of each day the longest sleep that ends on it; stages only where the device found them."""
    entries = list(_entries(where, content, "dateOfSleep", "startTime", "levels", *NIGHT))
    for entry in sorted(entries, key=lambda entry: entry["timeInBed"]):  # of one day the last counts
        day = entry["dateOfSleep"]
        for field, variable in NIGHT.items():
            yield day, variable, _number(entry[field], where)
        try:
            start = datetime.fromisoformat(entry["startTime"])
        except ValueError:
            raise ValueError(f"{where}: startTime={entry['startTime']!r} is no time; mend the entry") from None
        yield day, "bedtime", (start.hour + start.minute / 60 - 12) % 24
        for stage, variable in STAGES.items():
            if stage in entry["levels"].get("summary", {}):
                yield day, variable, _number(entry["levels"]["summary"][stage]["minutes"], where)


def _scores(where: str, content: bytes) -> Measured:
    for row in rows_in(where, io.BytesIO(content), ("timestamp", *SCORES)):
        for column, variable in SCORES.items():
            if not np.isnan(value := row.number(column)):
                yield row.text("timestamp"), variable, value


READERS: dict[str, Callable[[str, bytes], Measured]] = {
    **dict.fromkeys(DAILY, _daily),
    "resting_heart_rate": _resting,
    "time_in_heart_rate_zones": _zones,
    "exercise": _exercise,
    "sleep": _nights,
    "sleep_score": _scores,
}


def _entries(where: str, content: bytes, *keys: str) -> Iterator[dict[str, Any]]:
    """The objects of a JSON list. Raises ValueError that names the file and the place in the list."""
    try:
        entries = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}); copy it again") from None
    if not isinstance(entries, list):
        raise ValueError(f"{where} holds a {type(entries).__name__}, not a list; is it PMData's?")
    for place, entry in enumerate(entries):
        for key in keys:
            if not isinstance(entry, dict) or key not in entry:
                raise ValueError(f"{where}, entry {place}: there is no {key!r}; is it PMData's?")
        yield entry


def _number(value: Any, where: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{where}: {str(value)[:60]!r} is no number; mend it or remove the entry") from None


def _day(text: Any, where: str) -> str:
    try:
        if re.match(r"\d{4}-\d{2}-\d{2}", text):
            return date.fromisoformat(text[:10]).isoformat()
    except (TypeError, ValueError):  # no text, a month 13
        pass
    raise ValueError(f"{where}: {text!r} does not begin with a day as in 2019-11-30; mend it")
