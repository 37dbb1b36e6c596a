"""A cohort: the stays of one data set with their grid, statics, identifiers and labels."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from attnzoo.clinical.events import DataReport, Events, clean
from attnzoo.clinical.grid import Grid, grid_of
from attnzoo.clinical.variables import STATICS, Table, refuse_forbidden


@dataclass(frozen=True)
class Cohort:
    """N stays: what was measured, what was known at admission, and what became of them."""

    name: str
    grid: Grid
    statics_NS: np.ndarray
    """float32; NaN where unknown."""
    statics: tuple[str, ...]
    stay_ids: tuple[str, ...]
    patient_ids: tuple[str, ...] | None
    """None where the data set does not tell which stays belong to one patient."""
    labels: dict[str, np.ndarray]
    """By name: [N], or [N, T] for what is predicted each hour; NaN where there is no label. Never features."""
    report: DataReport = field(default_factory=DataReport)
    dates: np.ndarray | None = None
    """datetime64[D] of each row, where the data set has dates: for splits in time."""
    texts: tuple[str, ...] | None = None
    """What was written of each stay before the prediction; empty where nothing was. None: the data set has no texts."""

    def __post_init__(self) -> None:
        stays, where = len(self.grid), f"cohort {self.name!r}"
        refuse_forbidden((*self.grid.variables, *self.statics), where)
        if self.statics_NS.shape != (stays, len(self.statics)):
            raise ValueError(f"{where}: statics of shape {self.statics_NS.shape}, not {(stays, len(self.statics))}")
        sizes = {"stay_ids": len(self.stay_ids), **{f"label {name!r}": len(row) for name, row in self.labels.items()}}
        if self.patient_ids is not None:
            sizes["patient_ids"] = len(self.patient_ids)
        if self.dates is not None:
            sizes["dates"] = len(self.dates)
        if self.texts is not None:
            sizes["texts"] = len(self.texts)
        for what, size in sizes.items():
            if size != stays:
                raise ValueError(f"{where}: {what} has {size} rows for {stays} stays; give one each")
        if len(set(self.stay_ids)) < stays:
            again = Counter(self.stay_ids).most_common(1)[0][0]
            raise ValueError(f"{where}: stay {again!r} stands in it twice; keep one of them")

    def __len__(self) -> int:
        return len(self.grid)

    def label(self, name: str) -> np.ndarray:
        """A label by name. Raises ValueError that lists the labels."""
        if name not in self.labels:
            known = ", ".join(sorted(self.labels)) or "none: it was loaded without outcomes"
            raise ValueError(f"cohort {self.name!r} has no label {name!r}; it has {known}")
        return self.labels[name]


def chosen_rows(cohort: Cohort, rows: np.ndarray | None) -> np.ndarray:
    """Rows of a cohort as int64; None: all of them. Raises ValueError for what are no numbers of its rows."""
    found = np.arange(len(cohort)) if rows is None else np.asarray(rows)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise ValueError(f"rows is an array of {found.dtype} of shape {found.shape}; give the numbers of rows")
    if found.size and not 0 <= found.min() <= found.max() < len(cohort):
        worst = found.min() if found.min() < 0 else found.max()
        raise ValueError(f"rows holds {worst}; cohort {cohort.name!r} has the rows 0 to {len(cohort) - 1}")
    return found.astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class StayFacts:
    """What a loader knows about N stays beside their events; `cohort_of` makes a cohort of both."""

    name: str
    hours_N: np.ndarray
    """Hours of each stay, without regard to the window."""
    statics: dict[str, np.ndarray]
    """By name of `variables.STATICS`: [N] in the table's unit, NaN where unknown."""
    stay_ids: tuple[str, ...]
    patient_ids: tuple[str, ...] | None = None
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    unknown_units: Counter[str] = field(default_factory=Counter)
    dates: np.ndarray | None = None


def cohort_of(facts: StayFacts, events: Events, table: Table, hours: int, step_hours: int = 1) -> Cohort:
    """The cohort of the first `hours` steps, with implausible values clipped or dropped by rule and counted."""
    events, report = clean(events, list(table.values()), facts.unknown_units)
    grid, outside = grid_of(events, facts.hours_N, hours, tuple(table), step_hours)
    statics_NS, counts = _clean_statics(facts, len(grid))
    values = {**report.values, **{f"{name} at admission": row for name, row in counts.items()}}
    return Cohort(
        name=facts.name,
        grid=grid,
        statics_NS=statics_NS,
        statics=tuple(facts.statics),
        stay_ids=facts.stay_ids,
        patient_ids=facts.patient_ids,
        labels=facts.labels,
        report=DataReport(values=values, left_out={**facts.left_out, **outside}),
        dates=facts.dates,
    )


def _clean_statics(facts: StayFacts, stays: int) -> tuple[np.ndarray, dict[str, dict[str, int]]]:
    """([N, S] after the same rule as for measurements, counts by name)."""
    statics_NS = np.full((stays, len(facts.statics)), np.nan, np.float32)
    counts = {}
    for column, (name, given_N) in enumerate(facts.statics.items()):
        codes = [code for code, _ in STATICS[name].categories]
        # A kind that does not exist is as impossible as a value that cannot be.
        value_N = np.where(np.isnan(given_N) | np.isin(given_N, codes), given_N, np.inf) if codes else given_N
        known = np.flatnonzero(~np.isnan(value_N))
        zeros = np.zeros(len(known), np.int32)
        given = Events(known.astype(np.int32), zeros, zeros.astype(np.int16), value_N[known].astype(np.float32))
        kept, report = clean(given, [STATICS[name]], facts.unknown_units)
        statics_NS[kept.stays_E, column] = kept.values_E
        counts.update(report.values)
    return statics_NS, counts
