"""Metrics of predictions for patients: against scikit-learn, by hand, and what they refuse."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn import metrics as sklearn

from attnzoo.clinical import calibration as c
from attnzoo.clinical import metrics as m

RATES = [("few ties", 997, 3), ("many ties", 211, 1), ("all but one positive", 13, 2)]


def drawn(rows: int, digits: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and probabilities that know something about them, rounded so that some are equal."""
    random = np.random.default_rng(seed)
    x = random.normal(size=rows)
    labels = (random.random(rows) < c.sigmoid(x - 1.5)).astype(int)
    if rows == 13:
        labels[:], labels[4] = 1, 0
    return labels, np.clip(np.round(c.sigmoid(1.4 * x - 1 + random.normal(size=rows)), digits), 0.001, 0.999)


def best_score_1(labels, scores) -> float:
    """By a loop over thresholds."""
    called = [scores >= t for t in set(scores)]
    return max(min(labels[c].sum() / labels.sum(), labels[c].mean()) for c in called)


@pytest.mark.parametrize(("rows", "digits"), [rate[1:] for rate in RATES], ids=[rate[0] for rate in RATES])
def test_what_scikit_learn_has_is_equal(rows, digits):
    labels, p = drawn(rows, digits)
    assert m.auroc(labels, p) == pytest.approx(sklearn.roc_auc_score(labels, p), rel=1e-12)
    assert m.auprc(labels, p) == pytest.approx(sklearn.average_precision_score(labels, p), rel=1e-12)
    assert m.brier(labels, p) == pytest.approx(sklearn.brier_score_loss(labels, p), rel=1e-12)
    assert m.scaled_brier(labels, p) == pytest.approx(sklearn.d2_brier_score(labels, p), rel=1e-12)
    assert m.mean_absolute_deviation(labels, p) == pytest.approx(sklearn.mean_absolute_error(labels, p), rel=1e-12)
    assert m.score_1(labels, p) == pytest.approx(best_score_1(labels, p), rel=1e-12)
    false, true, thresholds = sklearn.roc_curve(labels, p, drop_intermediate=False)
    for specificity in (0.5, 0.8, 0.9):
        enough = np.flatnonzero(1 - false >= specificity - 1e-12)[-1]
        assert m.sensitivity_at(specificity)(labels, p) == pytest.approx(true[enough])
        assert m.threshold_at(labels, p, specificity) == thresholds[enough]
        if enough:
            expected = sklearn.precision_score(labels, p >= thresholds[enough])
            assert m.precision_at(specificity)(labels, p) == pytest.approx(expected)
    threshold = m.score_1_threshold(labels, p)
    assert m.score_1_at(threshold)(labels, p) == pytest.approx(m.score_1(labels, p), rel=1e-12)


def test_a_weight_is_a_row_that_is_there_so_often():
    labels, p = drawn(301, 2)
    weights = np.random.default_rng(1).integers(0, 4, size=(5, 301))
    tables = np.stack([labels, 1 - labels], axis=1), np.stack([p, p[::-1]], axis=1)
    metrics = [
        m.auroc, m.auprc, m.score_1, m.score_1_at(0.3), m.brier, m.scaled_brier, m.mean_absolute_deviation,
        m.sensitivity_at(0.9), m.precision_at(0.9), c.calibration_slope, c.calibration_intercept,
        c.expected_calibration_error, c.observed_to_expected, m.macro_auroc(10),
    ]  # fmt: skip
    for metric in metrics:
        found, predicted = metric.check(*(tables if "macro" in metric.name else (labels, p)))
        each = metric.weighted(found, predicted, weights.astype(float))
        for row, value in zip(weights, each, strict=True):
            assert value == pytest.approx(metric(np.repeat(found, row, 0), np.repeat(predicted, row, 0))), metric.name


def test_calibration_is_that_of_greatest_likelihood():
    labels, p = drawn(997, 3)
    x = c.logit(p)

    def loss(at, slope=True):
        z = at[0] + (at[1] if slope else 1.0) * x
        return np.mean(np.logaddexp(0, z) - labels * z)

    intercept, slope = minimize(loss, [0, 1], tol=1e-12).x
    assert c.calibration_slope(labels, p) == pytest.approx(slope, rel=1e-4)
    assert c.calibration_intercept(labels, p) == pytest.approx(minimize(loss, [0], args=(False,)).x[0], rel=1e-4)
    fitted = c.fit_calibrator(labels, x)
    assert (1 / fitted.temperature, fitted.intercept) == pytest.approx((slope, intercept), rel=1e-4)
    assert c.observed_to_expected(labels, p) == pytest.approx(labels.sum() / p.sum())
    # Three bins by hand: 0.05 with one of two, 0.25 with none, 0.95 with both of two.
    by_hand = c.calibration_curve([1, 0, 0, 1, 1], [0.04, 0.06, 0.25, 0.9, 1.0])
    assert by_hand.predicted == pytest.approx([0.05, 0.25, 0.95])
    assert by_hand.observed.tolist() == [0.5, 0, 1]
    assert by_hand.rows.tolist() == [2, 1, 2]
    found = c.expected_calibration_error([1, 0, 0, 1, 1], [0.04, 0.06, 0.25, 0.9, 1.0])
    assert found == pytest.approx((2 * 0.45 + 0.25 + 2 * 0.05) / 5)


@pytest.mark.parametrize("scale", [0.2, 1.0, 3.0, -0.5])
def test_a_fitted_temperature_calibrates_and_never_changes_the_ranking(scale):
    random = np.random.default_rng(2)
    truth = random.normal(-1.5, 1.0, size=40_000)
    labels, logits = random.random(40_000) < c.sigmoid(truth), scale * truth + 0.7
    inner, outer = np.arange(40_000) < 20_000, np.arange(40_000) >= 20_000
    fitted = c.fit_calibrator(labels[inner], logits[inner])
    assert m.auroc(labels, fitted.logits(logits)) == m.auroc(labels, logits)
    assert c.Calibrator.from_dict(fitted.to_dict()) == fitted
    told = fitted.probabilities(logits[outer])
    if scale > 0:
        assert 0.9 < c.calibration_slope(labels[outer], told) < 1.1
        assert c.expected_calibration_error(labels[outer], told) < 0.02
    else:  # a ranking that is wrong stays as it is, and tells everybody nearly the same
        assert fitted.temperature == pytest.approx(c.TEMPERATURES[1])
    assert told.mean() == pytest.approx(labels[outer].mean(), abs=0.03)


def test_separated_and_constant_logits_have_a_finite_calibration():
    labels = np.array([0, 0, 0, 1, 1])
    assert np.isnan(c.calibration_slope(labels, labels * 0.8 + 0.1))
    assert c.fit_calibrator(labels, labels - 0.5).temperature == pytest.approx(c.TEMPERATURES[0])
    assert c.fit_calibrator(labels, 0.5 - labels).temperature == pytest.approx(c.TEMPERATURES[1])
    constant = c.fit_calibrator(labels, np.full(5, 3.0))
    assert constant.probabilities([3.0]) == pytest.approx([0.4])
    for content in ({"temperature": 0, "intercept": 0}, {"temperature": 1, "intercept": math.inf}, {"temperature": 1}):
        with pytest.raises(
            ValueError, match=r"temperature=0|must be finite numbers|holds temperature and intercept, not"
        ):
            c.Calibrator.from_dict(content)


def test_the_decision_curve_by_hand():
    curve = m.decision_curve([1, 1, 0, 0], [0.9, 0.2, 0.3, 0.1], thresholds=[0.2, 0.5])
    assert curve.model == pytest.approx([2 / 4 - 1 / 4 * 0.25, 1 / 4])
    assert curve.treat_all == pytest.approx([0.5 - 0.5 * 0.25, 0.0])
    assert curve.treat_none.tolist() == [0, 0]
    assert (len(m.THRESHOLDS), m.THRESHOLDS[0], m.THRESHOLDS[-1]) == (46, 0.05, 0.5)


def test_the_macro_auroc_takes_labels_that_are_frequent_enough():
    random = np.random.default_rng(3)
    labels = random.random((200, 4)) < [0.3, 0.2, 0.02, 1.0]
    scores = random.normal(size=(200, 4)) + labels
    each = [sklearn.roc_auc_score(labels[:, k], scores[:, k]) for k in range(3)]
    assert 1 <= labels[:, 2].sum() < 10  # and the last one, which every row has, is never taken
    assert m.macro_auroc(10)(labels, scores) == pytest.approx(np.mean(each[:2]))
    assert m.macro_auroc(1)(labels, scores) == pytest.approx(np.mean(each))


@pytest.mark.parametrize(
    ("measure", "labels", "predictions", "message"),
    [
        (m.auroc, [0, 1, 1], [0.1, 0.2], "labels has 3 rows, scores has 2"),
        (m.auroc, [0, 0], [0.1, 0.2], "labels hold only 0"),
        (m.auprc, [0, 2], [0.1, 0.2], "labels hold 2; they must be 0 or 1"),
        (m.score_1, [0, np.nan], [0.1, 0.2], r"labels holds 1 values that are not finite, the first in row 1 \(nan\)"),
        (m.sensitivity_at(0.9), [0, 1], [0.1, np.inf], "scores holds 1 values that are not finite"),
        (m.auroc, [], [], "labels is empty"),
        (m.auroc, [[0, 1]], [0.1, 0.2], r"labels has shape \(1, 2\)"),
        (m.auroc, ["no", "yes"], [0.1, 0.2], "labels must be numbers"),
        (m.brier, [0, 1], [-0.5, 0.2], "probabilities hold -0.5, outside 0 to 1; apply the sigmoid"),
        (c.calibration_slope, [1, 1], [0.5, 0.2], "labels hold only 1"),
        (c.fit_calibrator, [0, 1], [np.nan, 0.2], "scores holds 1 values that are not finite"),
        (c.calibration_curve, [0, 1], [0.5, 1.2], "probabilities hold 1.2"),
        (m.decision_curve, [0, 1], [0.5, 1.2], "probabilities hold 1.2"),
        (m.mean_absolute_deviation, [0, 1], [0.5], "labels has 2 rows, predictions has 1"),
        (m.macro_auroc(3), [[0], [1]], [[0.1], [0.2]], r"no column has least=3 rows \(the most frequent has 1\)"),
        (m.macro_auroc(1), [[0, 1], [1, 0]], [[0.1], [0.2]], "must be tables"),
    ],
)
def test_input_that_is_no_measurement_is_refused(measure, labels, predictions, message):
    with pytest.raises(ValueError, match=message):
        measure(labels, predictions)


def test_settings_that_mean_nothing_are_refused():
    for build in (
        lambda: m.sensitivity_at(1.0),
        lambda: m.precision_at(-0.1),
        lambda: m.threshold_at([0, 1], [0, 1], 2),
    ):
        with pytest.raises(ValueError, match=r"specificity=.* must lie between 0 and 1"):
            build()
    with pytest.raises(ValueError, match=r"thresholds=1\.0 must lie between 0 and 1"):
        m.decision_curve([0, 1], [0.1, 0.2], [1.0])
    with pytest.raises(ValueError, match="bins=0 must be a whole number of at least 1"):
        c.calibration_curve([0, 1], [0.1, 0.2], bins=0)


def test_nobody_is_called_positive_where_the_highest_score_is_a_tie():
    labels, scores = [0, 0, 1, 1], [1, 1, 1, 1]
    assert m.threshold_at(labels, scores, 0.9) == np.inf
    assert m.sensitivity_at(0.9)(labels, scores) == 0.0
    assert np.isnan(m.precision_at(0.9)(labels, scores))
