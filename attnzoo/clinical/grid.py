"""The hourly grid: for each stay, hour and variable the last value of the hour, and how often it was measured."""

from dataclasses import dataclass

import numpy as np

from attnzoo.clinical.events import Events


@dataclass(frozen=True)
class Grid:
    """Measurements of N stays in T hours of V variables."""

    values_NTV: np.ndarray
    """float32, in the unit of the variable's table; NaN where nothing was measured."""
    counts_NTV: np.ndarray
    """uint8: measurements in the hour, at most 255."""
    hours_N: np.ndarray
    """int64: hours that exist; later ones are padding."""
    variables: tuple[str, ...]
    step_hours: int = 1
    """Length of a step: 1, or 24 where the steps are days."""

    def __post_init__(self) -> None:
        shape = self.values_NTV.shape
        if len(shape) != 3 or self.counts_NTV.shape != shape or self.hours_N.shape != shape[:1]:
            raise ValueError(
                f"a grid takes values and counts of one shape [N, T, V] and hours [N]; got values {shape}, counts "
                f"{self.counts_NTV.shape}, hours {self.hours_N.shape}"
            )
        if len(self.variables) != shape[2]:
            raise ValueError(
                f"{len(self.variables)} variables for {shape[2]} columns of the grid; name each column once"
            )
        if len(set(self.variables)) < len(self.variables):
            twice = next(name for name in self.variables if self.variables.count(name) > 1)
            raise ValueError(f"variable {twice!r} stands in the grid twice; keep one of them")
        if len(self.hours_N) and not 0 <= self.hours_N.min() <= self.hours_N.max() <= shape[1]:
            raise ValueError(
                f"hours of {self.hours_N.min()} to {self.hours_N.max()} in a grid of {shape[1]}; give 0 to T"
            )

    def __len__(self) -> int:
        return len(self.values_NTV)

    @property
    def hours(self) -> int:
        """T."""
        return self.values_NTV.shape[1]

    def until(self, hours: int) -> "Grid":
        """The first `hours` hours."""
        values_NTV, counts_NTV = self.values_NTV[:, :hours], self.counts_NTV[:, :hours]
        return Grid(values_NTV, counts_NTV, np.minimum(self.hours_N, hours), self.variables, self.step_hours)

    def take(self, rows: np.ndarray) -> "Grid":
        """The grid of these rows, in their order."""
        parts = (self.values_NTV[rows], self.counts_NTV[rows], self.hours_N[rows])
        return Grid(*parts, self.variables, self.step_hours)


def grid_of(
    events: Events, hours_N: np.ndarray, hours: int, variables: tuple[str, ...], step_hours: int = 1
) -> tuple[Grid, dict[str, int]]:
    """(the grid of the events, how many events lie outside it by reason).

    hours_N: the hours of each stay; hours: T. A step holds the events from its start up to, but not at, its end. Of
    several events of one step the last counts; of one minute the later in `events`.
    """
    hours_N = np.minimum(hours_N, hours).astype(np.int64)
    step_E = events.minutes_E // (60 * step_hours)
    is_early_E, is_late_E = events.minutes_E < 0, step_E >= hours_N[events.stays_E]
    kept = events.where(~is_early_E & ~is_late_E)
    shape = (len(hours_N), hours, len(variables))
    places = (kept.stays_E, kept.minutes_E // (60 * step_hours), kept.variables_E.astype(np.int64))
    cell_E = np.ravel_multi_index(places, shape)
    order = np.lexsort((kept.minutes_E, cell_E))  # stable: by cell, then by minute, then as given
    cell_E = cell_E[order]
    last = np.flatnonzero(np.append(cell_E[1:] != cell_E[:-1], np.ones(min(len(cell_E), 1), bool)))
    values_NTV = np.full(shape, np.nan, np.float32)
    counts_NTV = np.zeros(shape, np.uint8)
    values_NTV.reshape(-1)[cell_E[last]] = kept.values_E[order[last]]
    counts_NTV.reshape(-1)[cell_E[last]] = np.minimum(np.diff(last, prepend=-1), 255)
    outside = {"values before admission": int(is_early_E.sum()), "values after the last hour": int(is_late_E.sum())}
    return Grid(values_NTV, counts_NTV, hours_N, variables, step_hours), outside
