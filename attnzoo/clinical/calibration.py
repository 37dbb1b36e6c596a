"""Whether probabilities mean what they say, and how they are made to: temperature and intercept, fitted on inner rows.

The calibration slope is b in the logistic regression label ~ a + b logit(p) (1 is right; below 1, predictions are too
extreme). The calibration intercept is a in label ~ a + logit(p) (0 is right; above 0, risks are told too low on
average). Logits are cut at ±`MAX_LOGIT`, because a probability of exactly 0 or 1 has none.

Letters: N rows, R weightings of the rows (`attnzoo.clinical.metrics`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from attnzoo.clinical import checks
from attnzoo.clinical.checks import Array
from attnzoo.clinical.metrics import Metric, mean

MAX_LOGIT = 16.0
"""A probability of 1e-7 from 0 or 1."""
BINS, MOST_BINS = 10, 10_000
STEPS, CONVERGED = 100, 1e-9
NEWTON_STEPS = 30
LONGEST_STEP = 2.0
"""Of Newton's method: a longer step may overshoot."""
LARGEST_LOGIT = 1e30
"""Of larger logits no spread can be computed; a model that tells such has diverged."""
FARTHEST = 40.0
"""From all logits an intercept lies at most so far away, whatever the share of positives."""
TEMPERATURES = (0.05, 20.0)
"""Temperatures that a fit may find: positive, so that no fit can turn the ranking round."""


@dataclass(frozen=True)
class CalibrationCurve:
    """Rows in bins of equal width of their probability: mean probability, share of positives and number of rows of each
    bin that has any."""

    predicted: Array
    observed: Array
    rows: Array


def calibration_curve(labels: ArrayLike, probabilities: ArrayLike, bins: int = BINS) -> CalibrationCurve:
    """The points of a calibration plot. Raises ValueError."""
    labels_N, found_N = checks.probabilities(labels, probabilities)
    checks.count(bins, "bins", 1, MOST_BINS)
    rows_B, predicted_B, observed_B = (
        each[0] for each in _binned(labels_N, found_N, np.ones((1, len(labels_N))), bins)
    )
    kept_B = rows_B > 0
    rows_B = rows_B[kept_B]
    return CalibrationCurve(predicted_B[kept_B] / rows_B, observed_B[kept_B] / rows_B, rows_B.astype(int))


def _slope(labels_N: Array, probabilities_N: Array, weights_RN: Array) -> Array:
    return fit_slope(labels_N, logit(probabilities_N), weights_RN)


def _intercept(labels_N: Array, probabilities_N: Array, weights_RN: Array) -> Array:
    return fit_intercept(labels_N, np.broadcast_to(logit(probabilities_N), weights_RN.shape), weights_RN)


def _expected_error(labels_N: Array, probabilities_N: Array, weights_RN: Array) -> Array:
    rows_RB, predicted_RB, observed_RB = _binned(labels_N, probabilities_N, weights_RN, BINS)
    return np.abs(predicted_RB - observed_RB).sum(axis=1) / rows_RB.sum(axis=1)


def _observed_to_expected(labels_N: Array, probabilities_N: Array, weights_RN: Array) -> Array:
    expected_R = weights_RN @ probabilities_N
    return np.divide(weights_RN @ labels_N, expected_R, out=np.full(len(expected_R), np.nan), where=expected_R > 0)


calibration_slope = Metric("calibration slope", _slope, checks.probabilities)
"""b of label ~ a + b logit(p). NaN where the probabilities separate the classes, so that no finite b is the best."""
calibration_intercept = Metric("calibration intercept", _intercept, checks.probabilities)
"""a of label ~ a + logit(p): the calibration in the large."""
expected_calibration_error = Metric("ECE", _expected_error, checks.probabilities)
"""Mean absolute difference of mean probability and share of positives, over `BINS` bins of equal width."""
observed_to_expected = Metric("O:E", _observed_to_expected, checks.probabilities)
"""Positives over the sum of probabilities: 1 is right, above 1 the risk is told too low."""


@dataclass(frozen=True, kw_only=True)
class Calibrator:
    """calibrated logit = logit / temperature + intercept. The temperature is positive, so that the ranking, and with it
    AUROC, stays as it is."""

    temperature: float = 1.0
    intercept: float = 0.0

    def __post_init__(self) -> None:
        if not (_is_finite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature={self.temperature!r} must be a positive number")
        if not _is_finite(self.intercept):
            raise ValueError(f"intercept={self.intercept!r} must be a finite number")

    def logits(self, logits: ArrayLike) -> Array:
        """Calibrated logits."""
        return np.asarray(logits, dtype=np.float64) / self.temperature + self.intercept

    def probabilities(self, logits: ArrayLike) -> Array:
        """Calibrated probabilities of these logits."""
        return sigmoid(self.logits(logits))

    def to_dict(self) -> dict[str, float]:
        """For a JSON file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Calibrator":
        """The inverse of `to_dict`. Raises ValueError for other content."""
        if set(content) != {"temperature", "intercept"}:
            raise ValueError(
                f"a calibrator holds temperature and intercept, not {', '.join(map(str, content)) or 'nothing'}"
            )
        if not all(_is_finite(value) for value in content.values()):
            raise ValueError(f"temperature and intercept must be finite numbers, not {dict(content)}")
        return cls(temperature=float(content["temperature"]), intercept=float(content["intercept"]))


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and bool(np.isfinite(value))  # type: ignore[call-overload]


def fit_calibrator(labels: ArrayLike, logits: ArrayLike) -> Calibrator:
    """Temperature and intercept of greatest likelihood, the temperature within `TEMPERATURES`.

    Fit it on an inner split: rows that neither trained the model nor are measured. Raises ValueError for labels of one
    class, and for logits that are not finite.
    """
    labels_N, logits_N = checks.scores(labels, logits)
    (found,) = fit_calibrators(labels_N, logits_N, np.ones((1, len(labels_N))))
    return found


def fit_calibrators(labels: ArrayLike, logits: ArrayLike, weights_RN: Array) -> list[Calibrator]:
    """As `fit_calibrator`, one for each weighting of the rows in which both classes have weight. Raises ValueError as
    `fit_calibrator`."""
    labels_N, logits_N = checks.scores(labels, logits)
    checks.moderate(logits_N, "logits", LARGEST_LOGIT)
    weights_RN = checks.numbers(weights_RN, "weights")
    if weights_RN.ndim != 2 or weights_RN.shape[1] != len(labels_N):
        raise ValueError(f"weights has shape {weights_RN.shape}; it must be [some, {len(labels_N)}], one a row")
    if checks.finite(weights_RN, "weights").min(initial=0.0) < 0:
        raise ValueError(f"weights holds {weights_RN.min():.6g}; a row is drawn at least 0 times")
    positive_R, all_R = weights_RN @ labels_N, weights_RN.sum(axis=1)
    weights_RN = weights_RN[(positive_R > 0) & (positive_R < all_R)]
    slope_R = np.ones(len(weights_RN))
    if np.ptp(logits_N) > 0:
        slope_R = fit_slope(labels_N, logits_N, weights_RN)
        for row in np.flatnonzero(np.isnan(slope_R)):
            slope_R[row] = _separated(labels_N, logits_N, weights_RN[row] > 0)
    # The likelihood is concave: where its maximum lies outside, the nearest bound is the best within.
    slope_R = np.clip(slope_R, 1.0 / TEMPERATURES[1], 1.0 / TEMPERATURES[0])
    intercept_R = fit_intercept(labels_N, slope_R[:, None] * logits_N, weights_RN)
    return [
        Calibrator(temperature=float(1.0 / slope), intercept=float(intercept))
        for slope, intercept in zip(slope_R, intercept_R, strict=True)
    ]


def separated(labels_N: Array, logits_N: Array, weights_RN: Array) -> Array:
    """Whether of the rows that have weight no negative has a larger logit than a positive, for each weighting [R], so
    that the greater a slope is, the better it fits. False where a weighting has one class."""
    drawn_RN, positive_N = weights_RN > 0, labels_N == 1
    highest_R = np.where(drawn_RN & ~positive_N, logits_N, -np.inf).max(axis=1)
    lowest_R = np.where(drawn_RN & positive_N, logits_N, np.inf).min(axis=1)
    found_R: Array = (highest_R > -np.inf) & (lowest_R < np.inf) & (highest_R <= lowest_R)
    return found_R


def _separated(labels_N: Array, logits_N: Array, drawn_N: Array) -> float:
    """The slope where none is the best: the logits of the drawn rows are all alike, or separate the classes."""
    if np.ptp(logits_N[drawn_N]) == 0:
        return 1.0
    positive_N = labels_N == 1
    above = logits_N[drawn_N & positive_N].mean() > logits_N[drawn_N & ~positive_N].mean()
    return float("inf") if above else float("-inf")


def fit_slope(labels_N: Array, x_N: Array, weights_RN: Array) -> Array:
    """b of greatest weighted likelihood of label ~ a + b x, by Newton's method, for all weightings at once. NaN where
    there is no finite optimum (separated classes) or no single one (constant x)."""
    spread_RN = x_N - mean(weights_RN, x_N)[:, None]
    scale_R = np.sqrt((weights_RN * spread_RN**2).sum(axis=1) / np.maximum(weights_RN.sum(axis=1), 1e-300))
    z_RN = np.divide(spread_RN, scale_R[:, None], out=np.zeros_like(spread_RN), where=scale_R[:, None] > 1e-12)
    a_R, b_R = logit(np.nan_to_num(mean(weights_RN, labels_N), nan=0.5)), np.zeros(len(weights_RN))
    step_R = np.full(len(weights_RN), np.inf)
    for _ in range(STEPS):
        p_RN = sigmoid(a_R[:, None] + b_R[:, None] * z_RN)
        error_RN, curve_RN = weights_RN * (labels_N - p_RN), weights_RN * p_RN * (1.0 - p_RN)
        g0_R, g1_R = error_RN.sum(axis=1), (error_RN * z_RN).sum(axis=1)
        h00_R, h01_R, h11_R = curve_RN.sum(axis=1), (curve_RN * z_RN).sum(axis=1), (curve_RN * z_RN**2).sum(axis=1)
        determinant_R = h00_R * h11_R - h01_R**2
        # Of separated classes b grows without end, and the curvature vanishes on the way.
        solvable_R = determinant_R > 1e-12 * np.maximum(h00_R, 1e-300) ** 2
        inverse_R = np.divide(1.0, determinant_R, out=np.full_like(determinant_R, np.nan), where=solvable_R)
        da_R, db_R = (h11_R * g0_R - h01_R * g1_R) * inverse_R, (h00_R * g1_R - h01_R * g0_R) * inverse_R
        step_R = np.maximum(np.abs(da_R), np.abs(db_R))
        shorten_R = np.minimum(1.0, LONGEST_STEP / np.maximum(step_R, 1e-300))
        a_R, b_R = a_R + shorten_R * da_R, b_R + shorten_R * db_R
        if not (step_R > CONVERGED).any():
            break
    found_R = (step_R <= CONVERGED) & (np.abs(b_R) < 1e3) & (scale_R > 1e-12)
    return np.divide(b_R, scale_R, out=np.full_like(b_R, np.nan), where=found_R)


def fit_intercept(labels_N: Array, offset_RN: Array, weights_RN: Array) -> Array:
    """a of greatest weighted likelihood of label ~ a + offset; NaN where a weighting has one class.

    By Newton's method; where offsets are so far apart that all probabilities are near 0 and 1, it jumps to and fro, and
    halving an interval that holds a finds it.
    """
    wanted_R = weights_RN @ labels_N
    one_class_R = (wanted_R == 0) | (wanted_R == weights_RN.sum(axis=1))
    a_R, step_R = np.zeros(len(weights_RN)), np.full(len(weights_RN), np.inf)
    for _ in range(NEWTON_STEPS):
        p_RN = sigmoid(offset_RN + a_R[:, None])
        missing_R = wanted_R - (weights_RN * p_RN).sum(axis=1)
        curve_R = (weights_RN * p_RN * (1.0 - p_RN)).sum(axis=1)
        step_R = np.clip(missing_R / np.maximum(curve_R, 1e-300), -LONGEST_STEP, LONGEST_STEP)
        a_R = a_R + step_R
        if (np.abs(step_R) <= CONVERGED).all():
            break
    left = np.flatnonzero(~one_class_R & (np.abs(step_R) > CONVERGED))
    if len(left):
        offset_LN, weights_LN = np.broadcast_to(offset_RN, weights_RN.shape)[left], weights_RN[left]
        a_R[left] = _halved(wanted_R[left], offset_LN, weights_LN)
    return np.where(one_class_R, np.nan, a_R)


def _halved(wanted_R: Array, offset_RN: Array, weights_RN: Array) -> Array:
    """a of `fit_intercept`: the sum of probabilities grows with it."""
    low_R, high_R = -offset_RN.max(axis=1) - FARTHEST, -offset_RN.min(axis=1) + FARTHEST
    for _ in range(STEPS):
        a_R = (low_R + high_R) / 2
        is_low_R = (weights_RN * sigmoid(offset_RN + a_R[:, None])).sum(axis=1) < wanted_R
        low_R, high_R = np.where(is_low_R, a_R, low_R), np.where(is_low_R, high_R, a_R)
    return (low_R + high_R) / 2


def sigmoid(logits: Array) -> Array:
    """1 / (1 + exp(-x)) without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * logits))


def logit(probabilities: ArrayLike) -> Array:
    """log(p / (1 - p)), cut at ±`MAX_LOGIT`."""
    found = np.asarray(probabilities, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return np.clip(np.log(found) - np.log1p(-found), -MAX_LOGIT, MAX_LOGIT)


def _binned(labels_N: Array, probabilities_N: Array, weights_RN: Array, bins: int) -> tuple[Array, Array, Array]:
    """[R, bins]: weight, summed probability and summed label of each bin."""
    bin_N = np.minimum((probabilities_N * bins).astype(int), bins - 1)
    member_NB = (bin_N[:, None] == np.arange(bins)).astype(np.float64)
    return (
        weights_RN @ member_NB,
        weights_RN @ (member_NB * probabilities_N[:, None]),
        weights_RN @ (member_NB * labels_N[:, None]),
    )
