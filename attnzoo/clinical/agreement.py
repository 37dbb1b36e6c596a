"""How far two raters agree: exact agreement, weighted kappa, Gwet's AC2, ICC(2,1).

Each is a `Metric` of two columns of ratings, one pair of ratings a row, so that `attnzoo.clinical.bootstrap.interval`
gives its interval over cases. Ratings are categories 1..K or 0..K-1; all categories of the scale count, also those that
nobody used, because chance agreement depends on them.

Letters: N pairs, K categories, R weightings of the pairs. With p[k, l] the share of pairs rated k by the first and l by
the second, and w[k, l] the weight of that pair (1 on the diagonal),
    kappa = (sum w p - sum w (row x column)) / (1 - sum w (row x column)),
    AC2   = (sum w p - e) / (1 - e),  e = sum(w) / (K (K - 1)) sum_k q_k (1 - q_k),  q = (row + column) / 2,
where row and column are the sums of p. Chance agreement e of AC2 stays small when most ratings are equal; that of kappa
grows, so that kappa is low although raters agree. ICC(2,1) is of single raters, two-way random, absolute agreement.

Source: Cohen 1968 (weighted kappa); Gwet, Handbook of Inter-Rater Reliability (AC2); Shrout and Fleiss 1979 (ICC).
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from numbers import Integral
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from attnzoo.clinical import checks
from attnzoo.clinical.checks import Array
from attnzoo.clinical.metrics import Metric, mean

LIKERT = (1, 2, 3, 4, 5)
Weighting = Literal["linear", "quadratic", "none"]


def weighted_kappa(categories: Sequence[int], weights: Weighting) -> Metric:
    """Cohen's kappa with linear or quadratic weights, or none. Raises ValueError."""
    return _of_table(f"{weights} kappa" if weights != "none" else "kappa", categories, weights, _kappa)


def gwet_ac2(categories: Sequence[int], weights: Weighting = "quadratic") -> Metric:
    """Gwet's AC2; with weights "none" his AC1. Raises ValueError."""
    return _of_table("AC1" if weights == "none" else f"AC2, {weights}", categories, weights, _ac2)


def _exact(first_N: Array, second_N: Array, weights_RN: Array) -> Array:
    return mean(weights_RN, (first_N == second_N).astype(np.float64))


def _icc(first_N: Array, second_N: Array, weights_RN: Array) -> Array:
    pairs_R = weights_RN.sum(axis=1)
    first_R, second_R = mean(weights_RN, first_N), mean(weights_RN, second_N)
    grand_R = (first_R + second_R) / 2
    cases_R = 2 * (weights_RN * ((first_N + second_N) / 2 - grand_R[:, None]) ** 2).sum(axis=1)
    raters_R = pairs_R * ((first_R - grand_R) ** 2 + (second_R - grand_R) ** 2)
    within_R = (weights_RN * (first_N - second_N) ** 2).sum(axis=1) / 2
    freedom_R = pairs_R - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        cases_R, error_R = cases_R / freedom_R, (within_R - raters_R) / freedom_R
        found_R = (cases_R - error_R) / (cases_R + error_R + 2 * (raters_R - error_R) / pairs_R)
    return np.where(np.isfinite(found_R), found_R, np.nan)


def _two_raters(first: ArrayLike, second: ArrayLike) -> tuple[Array, Array]:
    names = ("the first rater's ratings", "the second rater's ratings")
    one_N, two_N = checks.pair(first, second, names)
    return checks.moderate(one_N, names[0]), checks.moderate(two_N, names[1])


exact_agreement = Metric("exact agreement", _exact, _two_raters)
"""Share of pairs of equal ratings."""
icc = Metric("ICC(2,1)", _icc, _two_raters)
"""Share of the ratings' variance that is between cases. NaN where all ratings are equal."""


def _kappa(share_RKK: Array, weights_KK: Array) -> Array:
    chance_RKK = share_RKK.sum(axis=2)[:, :, None] * share_RKK.sum(axis=1)[:, None, :]
    return _beyond_chance((share_RKK * weights_KK).sum(axis=(1, 2)), (chance_RKK * weights_KK).sum(axis=(1, 2)))


def _ac2(share_RKK: Array, weights_KK: Array) -> Array:
    k = len(weights_KK)
    used_RK = (share_RKK.sum(axis=1) + share_RKK.sum(axis=2)) / 2
    chance_R = weights_KK.sum() / (k * (k - 1)) * (used_RK * (1 - used_RK)).sum(axis=1)
    return _beyond_chance((share_RKK * weights_KK).sum(axis=(1, 2)), chance_R)


def _beyond_chance(found_R: Array, chance_R: Array) -> Array:
    """(found - chance) / (1 - chance); NaN where chance agreement is complete."""
    room_R = 1 - chance_R
    return np.divide(found_R - chance_R, room_R, out=np.full(len(room_R), np.nan), where=room_R > 1e-12)


def _of_table(
    name: str, categories: Sequence[int], weights: Weighting, formula: Callable[[Array, Array], Array]
) -> Metric:
    """A metric that is a function of the table of pairs."""
    scale = tuple(categories) if isinstance(categories, Iterable) else ()
    is_whole = all(isinstance(one, Integral) for one in scale)
    if len(scale) < 2 or not is_whole or scale != tuple(range(scale[0], scale[0] + len(scale))):
        raise ValueError(
            f"categories={scale or categories} must be at least two whole numbers that follow one another, as 1, 2, 3"
        )
    distance_KK = np.abs(np.subtract.outer(np.arange(len(scale)), np.arange(len(scale)))) / (len(scale) - 1)
    by_weighting = {"linear": distance_KK, "quadratic": distance_KK**2, "none": (distance_KK > 0).astype(np.float64)}
    if not isinstance(weights, str) or weights not in by_weighting:
        raise ValueError(f"weights={weights!r} must be one of {', '.join(by_weighting)}")

    def check(first: ArrayLike, second: ArrayLike) -> tuple[Array, Array]:
        one_N, two_N = _two_raters(first, second)
        for found_N in (one_N, two_N):
            strange = found_N[~np.isin(found_N, scale)]
            if strange.size:
                raise ValueError(
                    f"ratings hold {strange[0]:.6g}; the scale has the categories {scale[0]} to {scale[-1]}"
                )
        return one_N - scale[0], two_N - scale[0]

    return Metric(name, partial(_by_table, formula, 1 - by_weighting[weights]), check)


def _by_table(
    formula: Callable[[Array, Array], Array], weights_KK: Array, first_N: Array, second_N: Array, weights_RN: Array
) -> Array:
    k = len(weights_KK)
    cell_N = (first_N * k + second_N).astype(int)
    table_RC = np.stack([np.bincount(cell_N, weights_N, minlength=k * k) for weights_N in weights_RN])
    return formula((table_RC / table_RC.sum(axis=1, keepdims=True)).reshape(-1, k, k), weights_KK)
