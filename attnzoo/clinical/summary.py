"""Summary features: what the hours of a stay come to, variable by variable, for models that read a table.

Letters: N stays, T hours, V variables, F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attnzoo.clinical.cohort import Cohort
from attnzoo.clinical.grid import Grid
from attnzoo.clinical.variables import STATICS

KINDS = ("last", "first", "mean", "min", "max", "sd", "slope", "count", "missing", "since_last")
"""Of each variable: the last and first value; mean, minimum, maximum and standard deviation of the hours' values; their
slope per hour by least squares; the number of measurements; the share of hours without one; hours since the last."""
BLOCK = 256
"""Stays whose intermediate arrays are in memory at a time."""


@dataclass(frozen=True)
class Features:
    """values_NF: float32, NaN where a feature does not exist (nothing was measured). names: "heart_rate last", ..."""

    values_NF: np.ndarray
    names: tuple[str, ...]


def summary_features(
    cohort: Cohort, rows: Sequence[int] | np.ndarray | None = None, hours: int | None = None
) -> Features:
    """The summary of the first `hours` hours (None: of all) of these stays, and their static facts; a static category
    is one column for each of its codes. Later hours change nothing. Raises ValueError for fewer than one hour."""
    if hours is not None and hours < 1:
        raise ValueError(f"hours={hours} must be at least 1")
    everyone_N = np.arange(len(cohort))
    chosen = everyone_N if rows is None else everyone_N[list(rows)]
    grid = cohort.grid if hours is None else cohort.grid.until(hours)
    parts = [_of_grid(grid.take(chosen[start : start + BLOCK])) for start in range(0, max(len(chosen), 1), BLOCK)]
    static_NS, static_names = _of_statics(cohort, chosen)
    names = tuple(f"{variable} {kind}" for variable in grid.variables for kind in KINDS)
    return Features(np.concatenate([np.concatenate(parts), static_NS], axis=1), names + static_names)


def _of_grid(grid: Grid) -> np.ndarray:
    """float32 [N, V * kinds]."""
    hour_T = np.arange(grid.hours, dtype=np.float64)
    exists_NT1 = (hour_T < grid.hours_N[:, None])[:, :, None]
    measured_NTV = np.isfinite(grid.values_NTV) & exists_NT1
    values_NTV = np.where(measured_NTV, grid.values_NTV, 0.0).astype(np.float64)
    hours_NTV = np.where(measured_NTV, hour_T[:, None], 0.0)
    count_NV = measured_NTV.sum(axis=1)
    any_NV = count_NV > 0
    of = np.where(any_NV, count_NV, np.nan)
    last_NV = grid.hours - 1 - np.argmax(measured_NTV[:, ::-1], axis=1)
    first_NV = np.argmax(measured_NTV, axis=1)
    mean_NV, hour_NV = values_NTV.sum(axis=1) / of, hours_NTV.sum(axis=1) / of
    from_mean_NTV = np.where(measured_NTV, values_NTV - mean_NV[:, None], 0.0)
    from_hour_NTV = np.where(measured_NTV, hours_NTV - hour_NV[:, None], 0.0)
    spread_NV = (from_hour_NTV**2).sum(axis=1)
    stay_hours_N1 = grid.hours_N[:, None].astype(np.float64)
    by_kind = {
        "last": np.take_along_axis(values_NTV, last_NV[:, None], axis=1)[:, 0],
        "first": np.take_along_axis(values_NTV, first_NV[:, None], axis=1)[:, 0],
        "mean": mean_NV,
        "min": np.where(measured_NTV, values_NTV, np.inf).min(axis=1),
        "max": np.where(measured_NTV, values_NTV, -np.inf).max(axis=1),
        "sd": np.sqrt((from_mean_NTV**2).sum(axis=1) / of),
        "slope": (from_mean_NTV * from_hour_NTV).sum(axis=1) / np.where(spread_NV > 0, spread_NV, np.nan),
        "since_last": stay_hours_N1 - last_NV,
    }
    by_kind = {kind: np.where(any_NV, found_NV, np.nan) for kind, found_NV in by_kind.items()}
    by_kind["count"] = np.where(exists_NT1, grid.counts_NTV, 0).sum(axis=1)
    by_kind["missing"] = 1.0 - count_NV / np.maximum(stay_hours_N1, 1.0)
    return (
        np.stack([by_kind[kind] for kind in KINDS], axis=2)
        .reshape(len(count_NV), len(grid.variables) * len(KINDS))
        .astype(np.float32)
    )


def _of_statics(cohort: Cohort, rows: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    columns, names = [np.empty((len(rows), 0), np.float32)], []
    for index, name in enumerate(cohort.statics):
        value_N = cohort.statics_NS[rows, index]
        categories = STATICS[name].categories if name in STATICS else ()
        for code, meaning in categories:
            names.append(f"{name}: {meaning}")
            columns.append((value_N == code)[:, None].astype(np.float32))
        if not categories:
            names.append(name)
            columns.append(value_N[:, None].astype(np.float32))
    return np.concatenate(columns, axis=1), tuple(names)
