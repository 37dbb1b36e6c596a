"""Intervals of a share and of a mean over independent things; for rows that belong together see
`attnzoo.clinical.bootstrap`."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from statistics import NormalDist

import numpy as np

RESAMPLES, LEVEL = 2000, 0.95


def wilson(right: int, count: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval of a share; NaN of nothing. Raises ValueError.

    >>> [round(x, 3) for x in wilson(8, 10)]
    [0.49, 0.943]
    """
    _check_level(level)
    if not all(isinstance(number, Integral) for number in (right, count)) or not 0 <= right <= count:
        raise ValueError(f"right={right} of count={count} is no share; give whole numbers, of which right is not above")
    if not count:
        return math.nan, math.nan
    z, share = NormalDist().inv_cdf((1 + level) / 2), right / count
    middle, below = share + z * z / (2 * count), 1 + z * z / count
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, (middle - half) / below), min(1.0, (middle + half) / below)


def bootstrap_mean(values: Sequence[float] | np.ndarray, seed: int = 0, level: float = LEVEL) -> tuple[float, float]:
    """Bounds of the mean by a bootstrap: percentiles over resamples; NaN of nothing. Raises ValueError.

    >>> [round(x, 1) for x in bootstrap_mean([1.0] * 9)]
    [1.0, 1.0]
    """
    _check_level(level)
    try:
        values_N = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError("values must be numbers") from None
    if values_N.ndim != 1:
        raise ValueError(f"values has shape {values_N.shape}; one number of each independent thing is needed")
    if not len(values_N):
        return math.nan, math.nan
    drawn_RN = np.random.default_rng(seed).integers(len(values_N), size=(RESAMPLES, len(values_N)))
    low, high = np.quantile(values_N[drawn_RN].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _check_level(level: float) -> None:
    if not isinstance(level, Real) or not 0 < level < 1:
        raise ValueError(f"level={level!r} must lie between 0 and 1")
