"""Statistics of training rows: they standardise the grid, they are JSON, and they travel with the checkpoint."""

from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from attnzoo.clinical.cohort import Cohort
from attnzoo.clinical.grid import Grid
from attnzoo.clinical.variables import STATICS, VARIABLES, refuse_forbidden
from attnzoo.types import checked, field_types

GAP_HOURS = 48
"""Gaps are shares of two days, whatever the length of the grid, so that padding changes no cell."""
LARGEST = 5.0
"""Standardised values are clipped to plus and minus this."""
CHANNELS = ("value", "measured", "count", "gap")
_ALIKE = (
    *(("variables", name) for name in ("logged", "means", "deviations")),
    *(("static_names", name) for name in ("static_means", "static_deviations")),
)
BLOCK = 256
"""Rows whose intermediate arrays are in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Means and standard deviations of the measured cells of training rows, after log(1 + x) where `logged`.

    A standard deviation of 0 marks a variable that training rows never or always measured alike: its value becomes 0.
    """

    cohort: str
    rows: int
    hours: int
    """T of the training grid."""
    variables: tuple[str, ...]
    logged: tuple[bool, ...]
    means: tuple[float, ...]
    deviations: tuple[float, ...]
    static_names: tuple[str, ...]
    static_means: tuple[float, ...]
    static_deviations: tuple[float, ...]
    least_coverage: float
    """The share of measured cells that 99 % of training rows reach: below it there is not enough data."""

    def __post_init__(self) -> None:
        refuse_forbidden((*self.variables, *self.static_names), "statistics")

    @classmethod
    def fit(cls, cohort: Cohort, rows: np.ndarray) -> "Statistics":
        """Statistics of these rows and of nothing else. Raises ValueError for no rows."""
        if len(rows) == 0:
            raise ValueError(f"statistics of no rows of cohort {cohort.name!r}; give the rows of the training part")
        grid = cohort.grid
        logged = tuple(name in VARIABLES and VARIABLES[name].log1p for name in grid.variables)
        moments = [_moments(_logged(grid.values_NTV[rows, :, i], is_logged)) for i, is_logged in enumerate(logged)]
        statics = [_moments(cohort.statics_NS[rows, i]) for i in range(len(cohort.statics))]
        return cls(
            cohort=cohort.name,
            rows=len(rows),
            hours=grid.hours,
            variables=grid.variables,
            logged=logged,
            means=tuple(mean for mean, _ in moments),
            deviations=tuple(deviation for _, deviation in moments),
            static_names=cohort.statics,
            static_means=tuple(mean for mean, _ in statics),
            static_deviations=tuple(deviation for _, deviation in statics),
            least_coverage=float(np.quantile(coverage(grid, rows), 0.01)),
        )

    def cells(self, grid: Grid, rows: np.ndarray | None = None) -> np.ndarray:
        """float32 [N, T, V, 4]: the standardised value (0 where unmeasured), whether measured, log(1 + measurements in
        the hour), and the hours since the last measurement as a share of GAP_HOURS, at most 1 (1 before the first). All
        are 0 in padding.

        Raises ValueError for a grid of other variables or of stays of more hours than it.
        """
        if grid.variables != self.variables:
            raise ValueError(_differ("variables", grid.variables, self.variables))
        if grid.hours_N.max(initial=0) > self.hours:
            raise ValueError(
                f"a stay of {grid.hours_N.max()} hours; the model was trained on {self.hours}: cut it by grid.until"
            )
        rows = np.arange(len(grid)) if rows is None else np.asarray(rows)
        cells_NTVC = np.empty((len(rows), *grid.values_NTV.shape[1:], len(CHANNELS)), np.float32)
        for start in range(0, len(rows), BLOCK):
            self._fill(cells_NTVC[start : start + BLOCK], grid.take(rows[start : start + BLOCK]))
        return cells_NTVC

    def _fill(self, cells_NTVC: np.ndarray, grid: Grid) -> None:
        scaled_NTV = _logged(grid.values_NTV, np.array(self.logged))
        scaled_NTV -= np.array(self.means, np.float32)
        scaled_NTV *= _inverse(self.deviations)
        is_measured_NTV = ~np.isnan(grid.values_NTV)
        hour_T1 = np.arange(grid.hours)[:, None]
        never = -GAP_HOURS
        last_NTV = np.maximum.accumulate(np.where(is_measured_NTV, hour_T1, never), axis=1)
        cells_NTVC[..., 0] = np.clip(np.nan_to_num(scaled_NTV), -LARGEST, LARGEST)
        cells_NTVC[..., 1] = is_measured_NTV
        cells_NTVC[..., 2] = np.log1p(grid.counts_NTV.astype(np.float32))
        cells_NTVC[..., 3] = np.minimum((hour_T1 - last_NTV) / GAP_HOURS, 1)
        cells_NTVC[np.arange(grid.hours) >= grid.hours_N[:, None]] = 0

    @property
    def static_columns(self) -> tuple[str, ...]:
        """The names of the columns of `statics`."""
        names: list[str] = []
        for name in self.static_names:
            categories = STATICS[name].categories if name in STATICS else ()
            names += [f"{name}: {meaning}" for _, meaning in categories] if categories else [name]
            names.append(f"{name} known")
        return tuple(names)

    def statics(self, cohort: Cohort, rows: np.ndarray | None = None) -> np.ndarray:
        """float32 [N, S']: for each static fact its standardised value, or one column for each category; then whether
        it is known. What is unknown is 0. Raises ValueError for a cohort with other static facts."""
        if cohort.statics != self.static_names:
            raise ValueError(_differ("static facts", cohort.statics, self.static_names))
        given_NS = cohort.statics_NS if rows is None else cohort.statics_NS[rows]
        columns = []
        for i, name in enumerate(self.static_names):
            value_N = given_NS[:, i]
            categories = STATICS[name].categories if name in STATICS else ()
            if categories:
                columns += [value_N == code for code, _ in categories]
            else:
                scaled_N = (value_N - np.float32(self.static_means[i])) * _inverse(self.static_deviations[i : i + 1])
                columns.append(np.clip(np.nan_to_num(scaled_N), -LARGEST, LARGEST))
            columns.append(~np.isnan(value_N))
        return np.stack(columns, 1).astype(np.float32) if columns else np.zeros((len(given_NS), 0), np.float32)

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings and lists: JSON keeps them exactly."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Statistics":
        """What `to_dict` wrote. Raises ValueError that names a field that is missing, unknown, short or of another
        kind."""
        names, hints = [f.name for f in fields(cls)], field_types(cls)
        for name in (*names, *content):
            if (name in names) != (name in content):
                state = "missing" if name in names else "unknown"
                raise ValueError(f"statistics: field {name!r} is {state}; take the file of the same checkpoint")
        values = {name: checked(value, hints[name], f"statistics.{name}") for name, value in content.items()}
        for per, name in _ALIKE:
            if len(values[name]) != len(values[per]):
                raise ValueError(f"statistics: {name!r} has {len(values[name])} entries for {len(values[per])} {per}")
        found = cls(**values)
        is_right = {
            "rows": found.rows >= 1,
            "hours": found.hours >= 1,
            "variables": len(set(found.variables)) == len(found.variables),
            "deviations": min(found.deviations, default=0.0) >= 0,
            "static_deviations": min(found.static_deviations, default=0.0) >= 0,
            "least_coverage": 0 <= found.least_coverage <= 1,
        }
        for name, right in is_right.items():
            if not right:
                raise ValueError(
                    f"statistics: {name}={values[name]} is none of training rows; take the file as written"
                )
        return found


def coverage(grid: Grid, rows: np.ndarray | None = None) -> np.ndarray:
    """[N]: the share of measured cells in the hours that exist; 0 for a stay without hours."""
    counts_NTV = grid.counts_NTV if rows is None else grid.counts_NTV[rows]
    hours_N = grid.hours_N if rows is None else grid.hours_N[rows]
    return np.count_nonzero(counts_NTV, axis=(1, 2)) / np.maximum(hours_N * len(grid.variables), 1)


def missing(grid: Grid, rows: np.ndarray) -> dict[str, dict[str, float]]:
    """For each variable the share of real hours of these rows without a value ("hours"), and of stays without any
    ("stays"). {} for no rows."""
    if len(rows) == 0:
        return {}
    is_measured_NTV, hours_N = grid.counts_NTV[rows] > 0, grid.hours_N[rows]
    measured_NV = is_measured_NTV.sum(axis=1)
    hours_V = 1 - measured_NV.sum(axis=0) / max(int(hours_N.sum()), 1)
    stays_V = (measured_NV == 0).mean(axis=0)
    return {
        name: {"hours": round(float(of_hours), 4), "stays": round(float(of_stays), 4)}
        for name, of_hours, of_stays in zip(grid.variables, hours_V, stays_V, strict=True)
    }


def _logged(values: np.ndarray, is_logged: np.ndarray | bool) -> np.ndarray:
    """log(1 + x) where `is_logged`, a new array."""
    return np.where(is_logged, np.log1p(np.maximum(values, 0)), values)


def _moments(values: np.ndarray) -> tuple[float, float]:
    """(mean, standard deviation) of what is not NaN, in float64; (0, 0) of nothing."""
    known = values[~np.isnan(values)].astype(np.float64)
    if len(known) == 0:
        return 0.0, 0.0
    deviation = float(known.std())
    return float(known.mean()), deviation if deviation > 1e-6 * (1 + abs(float(known.mean()))) else 0.0


def _inverse(deviations: tuple[float, ...]) -> np.ndarray:
    return np.array([1 / deviation if deviation else 0.0 for deviation in deviations], np.float32)


def _differ(what: str, given: tuple[str, ...], wanted: tuple[str, ...]) -> str:
    missing, extra = [n for n in wanted if n not in given], [n for n in given if n not in wanted]
    return (
        f"the cohort's {what} are not those of the statistics (missing: {', '.join(missing) or 'none'}; unknown: "
        f"{', '.join(extra) or 'none'}; else their order differs); load the same {what} as in training"
    )
