"""YAIB's cohorts of MIMIC-III, MIMIC-IV, eICU, HiRID and AmsterdamUMCdb: dyn, sta and outc.parquet in one directory.

https://github.com/rvandewater/YAIB . dyn holds one row an hour, sta one row a stay, outc one label a stay or an hour.
`time` is a duration or a number of hours since admission, `sex` is Female or Male, age is in years, height in cm and
weight in kg. The values of an hour are summaries already, so a measured cell counts as one measurement. There are no
patient identifiers, so that a cohort is split by stay (`task.split=stay`).
"""

from pathlib import Path
from typing import Any

import numpy as np

from attnzoo.clinical.cohort import Cohort, StayFacts, cohort_of
from attnzoo.clinical.events import FARTHEST, Events
from attnzoo.clinical.formats.tables import LONGEST, check_hours, existing
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
    if not place:
        raise ValueError(f"{statics.path} has no stay; give the cohort's sta.parquet")
    if len(place) < len(stays):
        raise ValueError(f"{statics.path} has several rows of one stay; keep one of each")
    measured = _Parquet(directory / "dyn.parquet", (STAY, TIME))
    table = choose(YAIB, variables or [name for name in measured.names if name not in (STAY, TIME)], "variables")
    outcomes = _Parquet(directory / "outc.parquet", (STAY, LABEL))
    step_R = measured.hours()
    window = hours or int(step_R.max(initial=0)) + 1
    if window > LONGEST:
        raise ValueError(
            f"{measured.path}: {TIME} reaches hour {window - 1:,}; give hours={LONGEST} or fewer, or mend it"
        )
    labels, hours_N = _labels(outcomes, place, window, label)
    facts = StayFacts(
        name=f"yaib {directory.parent.name}/{directory.name}",
        hours_N=hours_N,
        statics={name: _static(statics, name) for name in STATICS},
        stay_ids=tuple(map(str, stays.tolist())),
        labels=labels,
    )
    stay_R = measured.rows(place)
    measured.once(stay_R, step_R)
    events = _events(measured, stay_R, step_R, tuple(table))
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
            hour_R = np.where(np.isnat(time), np.nan, time / np.timedelta64(1, "h"))
        else:
            hour_R = self.numbers(TIME)
        if np.isnan(hour_R).any():
            raise ValueError(
                f"{self.path}, row {int(np.isnan(hour_R).argmax()) + 1}: {TIME} is empty; give each row its hour"
            )
        return np.floor(np.clip(hour_R, -FARTHEST, FARTHEST)).astype(np.int64)

    def once(self, stay_R: np.ndarray, step_R: np.ndarray) -> None:
        """Raises ValueError where a stay has two rows of one hour."""
        order_R = np.lexsort((step_R, stay_R))
        is_again_R = (np.diff(stay_R[order_R]) == 0) & (np.diff(step_R[order_R]) == 0)
        if is_again_R.any():
            row = int(order_R[1:][is_again_R].min())
            raise ValueError(
                f"{self.path}, row {row + 1}: {STAY}={self.column(STAY)[row]} has another row of hour {step_R[row]}; "
                "keep one of them"
            )

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
        parts.append((stay_R[rows], step_R[rows] * 60, np.full(len(rows), code), value_R[rows]))
    return Events.of(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _labels(
    outcomes: _Parquet, place: dict[int, int], window: int, label: str | None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """({name: [N] or [N, T]}, hours of each stay). Hours are told by hourly labels, never by a label's value."""
    stay_R, value_R = outcomes.rows(place), outcomes.numbers(LABEL)
    if np.isinf(value_R).any():
        raise ValueError(
            f"{outcomes.path}, row {int(np.isinf(value_R).argmax()) + 1}: {LABEL} is infinite; mend the row"
        )
    if TIME not in outcomes.names:
        if len(set(stay_R.tolist())) < len(stay_R):
            raise ValueError(f"{outcomes.path} has no {TIME} and several labels of one stay; keep one of each")
        label_N = np.full(len(place), np.nan, np.float32)
        label_N[stay_R] = value_R
        return {label or "mortality": label_N}, np.full(len(place), window)
    step_R = outcomes.hours()
    outcomes.once(stay_R, step_R)
    hours_N = np.zeros(len(place), np.int64)
    np.maximum.at(hours_N, stay_R, step_R + 1)
    label_NT = np.full((len(place), window), np.nan, np.float32)
    is_inside_R = (step_R >= 0) & (step_R < window)
    label_NT[stay_R[is_inside_R], step_R[is_inside_R]] = value_R[is_inside_R]
    return {label or "los": label_NT}, hours_N
