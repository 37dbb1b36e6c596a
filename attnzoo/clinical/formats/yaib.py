"""YAIB's cohorts of MIMIC-III, MIMIC-IV, eICU, HiRID and AmsterdamUMCdb: dyn, sta and outc.parquet in one directory.

https://github.com/rvandewater/YAIB . dyn holds one row an hour, sta one row a stay, outc one label a stay or an hour.
The values of an hour are summaries already, so a measured cell counts as one measurement. There are no patient
identifiers.
"""

from pathlib import Path
from typing import Any

import numpy as np

from attnzoo.clinical.cohort import Cohort, StayFacts, cohort_of
from attnzoo.clinical.events import Events
from attnzoo.clinical.formats.tables import check_hours, existing
from attnzoo.clinical.units import convert
from attnzoo.clinical.variables import YAIB, choose

STATICS = ("age", "sex", "height", "weight")
SEXES = {"Female": 0.0, "Male": 1.0}
STAY, TIME, LABEL = "stay_id", "time", "label"


def load(
    path: str | Path, *, hours: int | None = None, variables: tuple[str, ...] | None = None, label: str | None = None
) -> Cohort:
    """The cohort in a directory of dyn.parquet, sta.parquet and outc.parquet.

    hours: the window; None: all hours of the table. label: what to call the label; None: "mortality" where a stay has
    one label, "los" (remaining hours) where an hour has. Raises ValueError that names file, column and value.
    """
    if hours is not None:
        check_hours(hours)
    directory = existing(path, "path")
    statics = _Parquet(directory / "sta.parquet", (STAY, *STATICS))
    stays = statics.column(STAY)
    place = {stay: row for row, stay in enumerate(stays.tolist())}
    if len(place) < len(stays):
        raise ValueError(f"{statics.path} has several rows of one stay; keep one of each")
    measured = _Parquet(directory / "dyn.parquet", (STAY, TIME))
    table = choose(YAIB, variables or [name for name in measured.names if name not in (STAY, TIME)], "variables")
    outcomes = _Parquet(directory / "outc.parquet", (STAY, LABEL))
    step_R = measured.hours()
    window = hours or int(step_R.max(initial=0)) + 1
    labels, hours_N = _labels(outcomes, place, window, label)
    facts = StayFacts(
        name=f"yaib {directory.parent.name}/{directory.name}",
        hours_N=hours_N,
        statics={name: _static(statics, name) for name in STATICS},
        stay_ids=tuple(map(str, stays.tolist())),
        labels=labels,
    )
    events = _events(measured, measured.rows(place), step_R, tuple(table))
    return cohort_of(facts, events, table, window)


class _Parquet:
    """One file, read column by column."""

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        try:
            import pyarrow.parquet
        except ImportError:
            raise ValueError("parquet files are read by pyarrow: install attnzoo[clinical]") from None
        existing(path, "path")
        self.path = path
        try:
            self.table: Any = pyarrow.parquet.read_table(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} is no readable parquet file ({' '.join(str(error).split())})") from None
        self.names: list[str] = self.table.column_names
        for name in columns:
            if name not in self.names:
                raise ValueError(f"{path} has no column {name!r}; it has {', '.join(self.names)}: is it YAIB's?")

    def column(self, name: str) -> np.ndarray:
        return self.table.column(name).to_numpy()

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers, NaN where it is empty."""
        column = self.table.column(name)
        import pyarrow

        try:
            return column.cast("float64").to_numpy()
        except pyarrow.ArrowException as error:
            raise ValueError(f"{self.path}: column {name!r} of {column.type} holds no numbers ({error})") from None

    def hours(self) -> np.ndarray:
        """The hour of each row: `time` is a duration, or a number of hours."""
        time = self.column(TIME)
        if time.dtype.kind == "m":
            return (time // np.timedelta64(1, "h")).astype(np.int64)
        number = self.numbers(TIME)
        if np.isnan(number).any():
            raise ValueError(
                f"{self.path}, row {int(np.isnan(number).argmax()) + 1}: {TIME} is empty; give each row its hour"
            )
        return np.floor(number).astype(np.int64)

    def rows(self, place: dict[int, int]) -> np.ndarray:
        """The row of each row's stay in sta.parquet."""
        stays = self.column(STAY).tolist()
        for row, stay in enumerate(stays, 1):
            if stay not in place:
                raise ValueError(f"{self.path}, row {row}: {STAY}={stay!r} is not in sta.parquet; the files differ")
        return np.array([place[stay] for stay in stays], np.int32)


def _static(statics: _Parquet, name: str) -> np.ndarray:
    if name != "sex":
        return statics.numbers(name)
    values = statics.column(name).tolist()
    for row, value in enumerate(values, 1):
        if value is not None and value not in SEXES:
            raise ValueError(f"{statics.path}, row {row}: sex={value!r}; known: {', '.join(SEXES)}, or empty")
    return np.array([SEXES.get(value, np.nan) for value in values])


def _events(measured: _Parquet, stay_R: np.ndarray, step_R: np.ndarray, names: tuple[str, ...]) -> Events:
    parts = []
    for code, name in enumerate(names):
        value_R = measured.numbers(name)
        if name == "fio2":
            value_R = convert(YAIB[name], value_R, "%")
        rows = np.flatnonzero(~np.isnan(value_R))
        minutes = (step_R[rows] * 60).astype(np.int32)
        parts.append((stay_R[rows], minutes, np.full(len(rows), code, np.int16), value_R[rows].astype(np.float32)))
    return Events(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _labels(
    outcomes: _Parquet, place: dict[int, int], window: int, label: str | None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """({name: [N] or [N, T]}, hours of each stay). Hours are told by hourly labels, never by a label's value."""
    stay_R, value_R = outcomes.rows(place), outcomes.numbers(LABEL)
    if TIME not in outcomes.names:
        if len(set(stay_R.tolist())) < len(stay_R):
            raise ValueError(f"{outcomes.path} has no {TIME} and several labels of one stay; keep one of each")
        label_N = np.full(len(place), np.nan, np.float32)
        label_N[stay_R] = value_R
        return {label or "mortality": label_N}, np.full(len(place), window)
    step_R = outcomes.hours()
    hours_N = np.zeros(len(place), np.int64)
    np.maximum.at(hours_N, stay_R, step_R + 1)
    label_NT = np.full((len(place), window), np.nan, np.float32)
    is_inside_R = (step_R >= 0) & (step_R < window)
    label_NT[stay_R[is_inside_R], step_R[is_inside_R]] = value_R[is_inside_R]
    return {label or "los": label_NT}, hours_N
