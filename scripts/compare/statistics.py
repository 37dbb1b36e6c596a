"""Means with 95 % confidence intervals over a few seeds, by Student's t distribution."""

import math
from collections.abc import Iterable, Sequence


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half width of the 95 % confidence interval, t(n-1) * s / sqrt(n)); NaN half width for a single value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, t_quantile(len(values) - 1) * math.sqrt(variance / len(values))


def interval(values: Iterable[float]) -> str:
    """Mean ± half width as text, to two digits of the half width; a single value has no half width.

    >>> interval([2.0, 2.1, 2.2])
    '2.10 ± 0.25'
    """
    mean, half = mean_interval(list(values))
    if math.isnan(half) or half == 0.0:
        return f"{mean:.4f}"
    digits = max(1, 1 - math.floor(math.log10(half)))
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def t_quantile(freedom: int, mass: float = 0.95) -> float:
    """The t with P(|T| < t) = `mass` for Student's distribution with `freedom` degrees of freedom.

    >>> round(t_quantile(2), 4)
    4.3027
    """
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _mass_within(middle, freedom) < mass else (low, middle)
    return (low + high) / 2


def _mass_within(t: float, freedom: int) -> float:
    """P(|T| < t) for integer degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= cosine * cosine * ((k - 1) / k)
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
