"""Agreement of raters: by hand, against scikit-learn, and the published ratings of PH-LLM's case studies."""

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from attnzoo.clinical import agreement as a
from attnzoo.clinical.bootstrap import interval


def columns(table: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of ratings 1..K, from how many pairs have each combination."""
    pairs = [(i, j) for i, row in enumerate(table, 1) for j, count in enumerate(row, 1) for _ in range(count)]
    return np.array(pairs).T


def test_kappa_and_ac2_by_hand():
    """Ten pairs on three levels. Shares: 5, 1 and 0; 1, 1 and 1; 0, 0 and 1 tenths.

    Quadratic weights: 1 on the diagonal, 3/4 beside it, 0 in the corner. Observed 0.7 + 0.3 * 3/4 = 0.925.
    kappa: rows .6 .3 .1, columns .6 .2 .2; expected .36+.06+.02 + 3/4 (.12+.18+.06+.02) = .44+.285 = .725.
    AC2: used .6 .25 .15, sum of q (1 - q) .24+.1875+.1275 = .555; sum of weights 3 + 4 * 3/4 = 6; e = 6/6 * .555.
    """
    pair = columns([[5, 1, 0], [1, 1, 1], [0, 0, 1]])
    levels = (1, 2, 3)
    assert a.exact_agreement(*pair) == pytest.approx(0.7)
    assert a.weighted_kappa(levels, "quadratic")(*pair) == pytest.approx((0.925 - 0.725) / (1 - 0.725))
    assert a.gwet_ac2(levels)(*pair) == pytest.approx((0.925 - 0.555) / (1 - 0.555))
    # Without weights: observed .7; kappa expects .44; AC1 expects .555 * 3 / 6.
    assert a.weighted_kappa(levels, "none")(*pair) == pytest.approx((0.7 - 0.44) / 0.56)
    assert a.gwet_ac2(levels, "none")(*pair) == pytest.approx((0.7 - 0.2775) / (1 - 0.2775))
    # Linear: beside the diagonal 1/2; observed .7 + .15, expected .44 + .38 / 2.
    assert a.weighted_kappa(levels, "linear")(*pair) == pytest.approx((0.85 - 0.63) / 0.37)
    # A level that nobody uses changes what chance is.
    assert a.gwet_ac2((1, 2, 3, 4))(*pair) > a.gwet_ac2(levels)(*pair)


def test_icc_by_hand():
    """Three cases rated (1, 2), (2, 3), (4, 4). Means of cases 1.5, 2.5, 4; of raters 7/3, 3; of all 8/3.

    Between cases 2 * (49/36 + 1/36 + 64/36) = 114/18, by 2: 19/6. Between raters 3 * 2 * (1/3)^2 = 2/3.
    Within cases 1/2 + 1/2 + 0 = 1, less 2/3, by 2: error 1/6. So 3 / (19/6 + 1/6 + 2/3 (2/3 - 1/6)) = 3 / (11/3).
    """
    assert a.icc([1, 2, 4], [2, 3, 4]) == pytest.approx(9 / 11)
    assert a.icc([1, 2, 4], [1, 2, 4]) == pytest.approx(1.0)
    assert np.isnan(a.icc([5, 5, 5], [5, 5, 5]))


@pytest.mark.parametrize("weights", ["linear", "quadratic", "none"])
def test_kappa_is_scikit_learns(weights):
    random = np.random.default_rng(0)
    first = random.integers(0, 10, size=500)
    second = np.clip(first + random.integers(-2, 3, size=500), 0, 9)
    expected = cohen_kappa_score(first, second, weights=None if weights == "none" else weights, labels=range(10))
    assert a.weighted_kappa(range(10), weights)(first, second) == pytest.approx(expected, rel=1e-12)


def test_agreement_has_intervals_over_cases():
    random = np.random.default_rng(0)
    first = random.integers(1, 6, size=300)
    second = np.clip(first + random.integers(-1, 2, size=300), 1, 5)
    for metric in (a.weighted_kappa(a.LIKERT, "quadratic"), a.gwet_ac2(a.LIKERT), a.exact_agreement, a.icc):
        found = interval(metric, first, second, np.repeat(np.arange(60), 5), resamples=200)
        assert found.low < found.value < found.high
        counts = np.random.default_rng(1).integers(0, 3, size=300)
        by_weights = metric.weighted(*metric.check(first, second), counts[None].astype(float))[0]
        assert by_weights == pytest.approx(metric(np.repeat(first, counts), np.repeat(second, counts)))


@pytest.mark.parametrize(
    ("build", "pair", "message"),
    [
        (lambda: a.gwet_ac2(a.LIKERT), ([1, 6], [1, 2]), "ratings hold 6; the scale has the categories 1 to 5"),
        (lambda: a.gwet_ac2(a.LIKERT), ([1, 2.5], [1, 2]), "ratings hold 2.5"),
        (lambda: a.icc, ([1, 2], [1]), "the first rater's ratings has 2 rows, the second rater's ratings has 1"),
        (
            lambda: a.exact_agreement,
            ([1, np.nan], [1, 2]),
            "the first rater's ratings holds 1 values that are not finite",
        ),
        (lambda: a.gwet_ac2((1, 3)), None, r"categories=\(1, 3\) must be at least two whole numbers"),
        (lambda: a.weighted_kappa((0, 1), "cubic"), None, "weights='cubic' must be one of linear, quadratic, none"),
    ],
)
def test_ratings_that_cannot_be_compared(build, pair, message):
    with pytest.raises(ValueError, match=message):
        build()(*pair)


def test_where_all_agree_on_one_level_kappa_is_undefined_and_ac2_is_not():
    assert np.isnan(a.weighted_kappa(a.LIKERT, "quadratic")([5, 5], [5, 5]))
    assert a.gwet_ac2(a.LIKERT)([5, 5], [5, 5]) == 1.0
