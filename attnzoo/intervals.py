"""Intervals of a share and of a mean over independent things; for rows that belong together see
`attnzoo.clinical.bootstrap`."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

RESAMPLES, LEVEL = 2000, 0.95


def wilson(right: int, count: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval of a share; NaN of nothing.

    >>> [round(x, 3) for x in wilson(8, 10)]
    [0.49, 0.943]
    """
    if not count:
        return math.nan, math.nan
    z, share = NormalDist().inv_cdf((1 + level) / 2), right / count
    middle, below = share + z * z / (2 * count), 1 + z * z / count
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, (middle - half) / below), min(1.0, (middle + half) / below)


def bootstrap_mean(values: Sequence[float] | np.ndarray, seed: int = 0, level: float = LEVEL) -> tuple[float, float]:
    """Bounds of the mean by a bootstrap: percentiles over resamples; NaN of nothing.

    >>> [round(x, 1) for x in bootstrap_mean([1.0] * 9)]
    [1.0, 1.0]
    """
    values_N = np.asarray(values, dtype=np.float64)
    if not len(values_N):
        return math.nan, math.nan
    drawn_RN = np.random.default_rng(seed).integers(len(values_N), size=(RESAMPLES, len(values_N)))
    low, high = np.quantile(values_N[drawn_RN].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
