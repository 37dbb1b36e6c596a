"""Intervals by a bootstrap over patients: whole patients are drawn with all their rows, because rows of one patient are
alike, and an interval that draws rows is too narrow.

Nothing is fitted again: the predictions are given, usually those of all outer folds together. Bounds are percentiles.
Letters: N rows, C patients, R resamples.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from attnzoo.clinical import checks
from attnzoo.clinical.checks import Array
from attnzoo.clinical.metrics import Metric

RESAMPLES, LEVEL = 1000, 0.95
MOST_UNDEFINED = 0.05
"""Share of resamples without a value (one class was drawn) above which an interval has no bounds."""
NUMBERS_AT_ONCE = 4_000_000
"""Weights that are held at once, 32 MB."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """value: of all rows. low, high: the interval's bounds, NaN where too many resamples have no value (`undefined`
    counts them; `MOST_UNDEFINED` says how many are too many). patients: how many were drawn from."""

    name: str
    value: float
    low: float
    high: float
    level: float
    resamples: int
    undefined: int
    patients: int

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def interval(
    metric: Metric,
    labels: ArrayLike,
    predictions: ArrayLike,
    patients: ArrayLike,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """The metric with its interval. patients: whose each row is; where each row is a patient, `range(len(labels))`.

    Raises ValueError.
    """
    labels_N, predictions_N = metric.check(labels, predictions)
    members_N, count = _numbered(patients, len(labels_N))
    _checked(count, resamples, level, seed)
    drawn_R = np.concatenate(
        [metric.weighted(labels_N, predictions_N, w_RN) for w_RN in _weights(members_N, count, resamples, seed)]
    )
    return _summary(metric.name, metric(labels, predictions), drawn_R, level, count)


def paired_difference(
    metric: Metric,
    labels: ArrayLike,
    first: ArrayLike,
    second: ArrayLike,
    patients: ArrayLike,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """metric(first) - metric(second) on the same rows, with an interval. A resample draws the same patients for both.
    The predictions are told apart where the interval excludes 0. Raises ValueError."""
    labels_N, first_N = metric.check(labels, first)
    _, second_N = metric.check(labels, second)
    members_N, count = _numbered(patients, len(labels_N))
    _checked(count, resamples, level, seed)
    drawn_R = np.concatenate(
        [
            metric.weighted(labels_N, first_N, w_RN) - metric.weighted(labels_N, second_N, w_RN)
            for w_RN in _weights(members_N, count, resamples, seed)
        ]
    )
    value = metric(labels, first) - metric(labels, second)
    return _summary(f"difference of {metric.name}", value, drawn_R, level, count)


def subgroup_intervals(
    metric: Metric,
    labels: ArrayLike,
    predictions: ArrayLike,
    patients: ArrayLike,
    groups: ArrayLike,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval | str]:
    """The metric in each group of rows (`groups` names one for each row), or why it cannot be measured there. Raises
    ValueError for what is wrong with all rows."""
    labels_N, predictions_N = metric.check(labels, predictions)
    groups_N, patients_N = (
        checks.names(found, len(labels_N), field) for field, found in (("groups", groups), ("patients", patients))
    )
    _checked(2, resamples, LEVEL, seed)
    found_by_group: dict[str, Interval | str] = {}
    for group in np.unique(groups_N):
        rows = groups_N == group
        try:
            found_by_group[str(group)] = interval(
                metric, labels_N[rows], predictions_N[rows], patients_N[rows], resamples=resamples, seed=seed
            )
        except ValueError as error:
            found_by_group[str(group)] = str(error)
    return found_by_group


def resampled_weights(patients: ArrayLike, resamples: int, seed: int = 0) -> Iterator[Array]:
    """How often each row was drawn when whole patients are, [some R, N] at a time. Raises ValueError."""
    members_N, count = _numbered(patients, np.size(patients))
    _checked(count, resamples, LEVEL, seed)
    return _weights(members_N, count, resamples, seed)


def _weights(members_N: Array, count: int, resamples: int, seed: int) -> Iterator[Array]:
    """How often each row was drawn, [some R, N] at a time."""
    random = np.random.default_rng(seed)
    at_once = max(1, NUMBERS_AT_ONCE // len(members_N))
    for first in range(0, resamples, at_once):
        now = min(at_once, resamples - first)
        drawn_RC = random.integers(count, size=(now, count)) + count * np.arange(now)[:, None]
        counts_RC = np.bincount(drawn_RC.ravel(), minlength=now * count).reshape(now, count)
        yield counts_RC[:, members_N].astype(np.float64)


def _numbered(patients: ArrayLike, rows: int) -> tuple[Array, int]:
    """The number of each row's patient, and how many patients there are. Raises ValueError."""
    try:
        names, members_N = np.unique(checks.names(patients, rows, "patients"), return_inverse=True)
    except TypeError:
        raise ValueError("patients holds names that have no order; give texts or numbers") from None
    return members_N, len(names)


def _checked(count: int, resamples: int, level: float, seed: int) -> None:
    checks.fraction(level, "level")
    checks.count(resamples, "resamples", 100, why=", or the bounds mean nothing")
    checks.count(seed, "seed", 0)
    if count < 2:
        held = "one patient" if count else "0 patients"
        raise ValueError(f"patients holds {held}; a bootstrap over patients needs at least 2")


def _summary(name: str, value: float, drawn_R: Array, level: float, patients: int) -> Interval:
    defined_R = drawn_R[~np.isnan(drawn_R)]
    undefined = len(drawn_R) - len(defined_R)
    low = high = float("nan")
    if undefined <= MOST_UNDEFINED * len(drawn_R):
        low, high = (float(x) for x in np.quantile(defined_R, [(1 - level) / 2, (1 + level) / 2]))
    return Interval(
        name=name,
        value=value,
        low=low,
        high=high,
        level=level,
        resamples=len(drawn_R),
        undefined=undefined,
        patients=patients,
    )
