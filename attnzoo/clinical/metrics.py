"""How good predictions for patients are: ranking, alarms at a threshold, probabilities, benefit, lengths of stay.

A metric is called with labels and predictions and returns a number: `auroc(labels, scores)`. `Metric.weighted` computes
the same for many weightings of the rows at once, which is what a bootstrap needs (`attnzoo.clinical.bootstrap`): a row
that was drawn twice has weight 2. What is undefined for a weighting (a single class was drawn) is NaN there.

Letters: N rows, R weightings, G distinct scores, K labels of a row. How calibrated probabilities are:
`attnzoo.clinical.calibration`; agreement between raters, and kappa: `attnzoo.clinical.agreement`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real

import numpy as np
from numpy.typing import ArrayLike

from attnzoo.clinical import checks
from attnzoo.clinical.checks import Array

Weighted = Callable[[Array, Array, Array], Array]
"""(labels, predictions, weights [R, N]) -> [R]. The arguments have been checked."""
Check = Callable[[ArrayLike, ArrayLike], tuple[Array, Array]]


@dataclass(frozen=True, eq=False)
class Metric:
    """A metric with its name. check: returns labels and predictions as arrays, or raises ValueError."""

    name: str
    weighted: Weighted
    check: Check

    def __call__(self, labels: ArrayLike, predictions: ArrayLike) -> float:
        """The metric of all rows. Raises ValueError that names what is wrong with the input."""
        found, predicted = self.check(labels, predictions)
        return float(self.weighted(found, predicted, np.ones((1, len(found))))[0])


@dataclass(frozen=True)
class Cuts:
    """How many rows are called positive, rightly and wrongly, with each distinct score as the threshold: a row is
    called positive when its score is at least the threshold. Thresholds fall from left to right."""

    thresholds_G: Array
    true_RG: Array
    false_RG: Array

    @classmethod
    def of(cls, labels_N: Array, scores_N: Array, weights_RN: Array) -> "Cuts":
        """Sorts once for all weightings."""
        order_N = np.argsort(-scores_N, kind="stable")
        sorted_N = scores_N[order_N]
        ends_G = np.flatnonzero(np.append(sorted_N[1:] != sorted_N[:-1], True))
        weights_RN = weights_RN[:, order_N]
        true_RN = np.cumsum(weights_RN * labels_N[order_N], axis=1)
        all_RN = np.cumsum(weights_RN, axis=1)
        return cls(sorted_N[ends_G], true_RN[:, ends_G], (all_RN - true_RN)[:, ends_G])

    def sensitivity(self) -> Array:
        """Share of the positive rows that are called positive; NaN where a weighting has none."""
        return _ratio(self.true_RG, self.true_RG[:, -1:])

    def precision(self) -> Array:
        """Share of rows called positive that are positive (positive predictivity); 0 where none is called positive."""
        called_RG = self.true_RG + self.false_RG
        return np.divide(self.true_RG, called_RG, out=np.zeros_like(self.true_RG), where=called_RG > 0)

    def specificity(self) -> Array:
        """Share of the negative rows that are not called positive; NaN where a weighting has none."""
        return 1.0 - _ratio(self.false_RG, self.false_RG[:, -1:])


def _auroc(labels_N: Array, scores_N: Array, weights_RN: Array) -> Array:
    cuts = Cuts.of(labels_N, scores_N, weights_RN)
    # Pairs of a positive and a negative row; a tie counts half.
    won_RG = np.diff(cuts.false_RG, prepend=0.0, axis=1) * (
        cuts.true_RG - 0.5 * np.diff(cuts.true_RG, prepend=0.0, axis=1)
    )
    return _ratio(won_RG.sum(axis=1), cuts.true_RG[:, -1] * cuts.false_RG[:, -1])


def _average_precision(labels_N: Array, scores_N: Array, weights_RN: Array) -> Array:
    cuts = Cuts.of(labels_N, scores_N, weights_RN)
    gained_RG = np.diff(cuts.true_RG, prepend=0.0, axis=1)
    return _ratio((gained_RG * cuts.precision()).sum(axis=1), cuts.true_RG[:, -1])


def _score_1(labels_N: Array, scores_N: Array, weights_RN: Array) -> Array:
    cuts = Cuts.of(labels_N, scores_N, weights_RN)
    return np.minimum(cuts.sensitivity(), cuts.precision()).max(axis=1)


def _brier(labels_N: Array, probabilities_N: Array, weights_RN: Array) -> Array:
    return mean(weights_RN, (probabilities_N - labels_N) ** 2)


def _scaled_brier(labels_N: Array, probabilities_N: Array, weights_RN: Array) -> Array:
    prevalence_R = mean(weights_RN, labels_N)
    return 1.0 - _ratio(_brier(labels_N, probabilities_N, weights_RN), prevalence_R * (1.0 - prevalence_R))


auroc = Metric("AUROC", _auroc, checks.scores)
"""Area under the ROC curve: how often a positive row has the higher score of a pair; a tie counts half."""
auprc = Metric("AUPRC", _average_precision, checks.scores)
"""Area under the precision-recall curve as average precision: the sum over thresholds of precision times recall gained,
without interpolation. Rows of equal scores enter together."""
score_1 = Metric("Score 1", _score_1, checks.scores)
"""min(sensitivity, positive predictivity) at the threshold that is best for these very rows. The choice is part of the
metric, so that it flatters; `score_1_at` takes a threshold that was chosen on other rows."""
brier = Metric("Brier", _brier, checks.probabilities)
"""Mean squared difference of probability and label; lower is better."""
scaled_brier = Metric("scaled Brier", _scaled_brier, checks.probabilities)
"""1 - Brier / p (1 - p) with the prevalence p: 1 is perfect, 0 is as good as telling everyone the prevalence."""
mean_absolute_deviation = Metric(
    "MAD", lambda labels_N, found_N, weights_RN: mean(weights_RN, np.abs(found_N - labels_N)), checks.values
)
"""Mean absolute difference of true and predicted values, for lengths of stay."""


def score_1_threshold(labels: ArrayLike, scores: ArrayLike) -> float:
    """The threshold with the highest min(sensitivity, positive predictivity): one of the scores, of equals the highest.
    Choose it on rows that are not measured. Raises ValueError."""
    cuts = _cuts(labels, scores)
    return float(cuts.thresholds_G[np.argmax(np.minimum(cuts.sensitivity()[0], cuts.precision()[0]))])


def score_1_at(threshold: float) -> Metric:
    """Score 1 when rows with a score of at least `threshold` are called positive. Raises ValueError."""
    if not isinstance(threshold, Real) or threshold != threshold:
        raise ValueError(f"threshold={threshold!r} must be a number")

    def at(labels_N: Array, scores_N: Array, weights_RN: Array) -> Array:
        called_N = scores_N >= threshold
        right_R = weights_RN @ (called_N * labels_N)
        called_R, positive_R = weights_RN @ called_N, weights_RN @ labels_N
        precision_R = np.divide(right_R, called_R, out=np.zeros_like(right_R), where=called_R > 0)
        return np.minimum(_ratio(right_R, positive_R), precision_R)

    return Metric(f"Score 1 at {threshold:.4g}", at, checks.scores)


def threshold_at(labels: ArrayLike, scores: ArrayLike, specificity: float) -> float:
    """The lowest threshold among the scores with at least that specificity; infinite where the highest score has less.
    Raises ValueError."""
    cuts = _cuts(labels, scores)
    index = int(_last_specific(cuts, checks.fraction(specificity, "specificity"))[0])
    return float(cuts.thresholds_G[index]) if index >= 0 else float("inf")


def sensitivity_at(specificity: float) -> Metric:
    """Sensitivity at the lowest threshold with at least that specificity; 0 where no score reaches it."""
    least = checks.fraction(specificity, "specificity")
    return Metric(
        f"sensitivity at specificity {least:g}",
        partial(_at_specificity, least, lambda cuts: cuts.sensitivity(), 0.0),
        checks.scores,
    )


def precision_at(specificity: float) -> Metric:
    """Precision (positive predictivity) at the lowest threshold with at least that specificity; NaN where no score
    reaches it, because then nobody is called positive."""
    least = checks.fraction(specificity, "specificity")
    return Metric(
        f"precision at specificity {least:g}",
        partial(
            _at_specificity,
            least,
            lambda cuts: _ratio(cuts.true_RG, cuts.true_RG + cuts.false_RG),
            np.nan,
        ),
        checks.scores,
    )


def macro_auroc(least: int = 10) -> Metric:
    """Mean AUROC over the labels (columns) that at least `least` rows have and at least one row lacks. Raises
    ValueError, also when called with a table that has no such label."""
    least = checks.count(least, "least", 1)

    def check(labels: ArrayLike, predictions: ArrayLike) -> tuple[Array, Array]:
        labels_NK, scores_NK = checks.many_labels(labels, predictions)
        kept_K = frequent_labels(labels_NK, least)
        if not kept_K.any():
            most = int(labels_NK.sum(axis=0).max())
            raise ValueError(f"labels: no column has least={least} rows (the most frequent has {most}); lower `least`")
        return labels_NK[:, kept_K], scores_NK[:, kept_K]

    def weighted(labels_NK: Array, scores_NK: Array, weights_RN: Array) -> Array:
        columns = zip(labels_NK.T, scores_NK.T, strict=True)
        return np.mean([_auroc(labels_N, scores_N, weights_RN) for labels_N, scores_N in columns], axis=0)

    return Metric(f"macro AUROC over labels of {least} rows", weighted, check)


def frequent_labels(labels_NK: Array, least: int) -> Array:
    """Which columns have at least `least` ones and at least one zero."""
    counts_K = labels_NK.sum(axis=0)
    return (counts_K >= max(least, 1)) & (counts_K < len(labels_NK))


@dataclass(frozen=True)
class DecisionCurve:
    """Net benefit at each threshold probability of acting by the model, for everybody, and for nobody (0)."""

    thresholds: Array
    model: Array
    treat_all: Array
    treat_none: Array


THRESHOLDS = tuple(round(0.05 + 0.01 * step, 2) for step in range(46))
"""Threshold probabilities of a decision curve: 0.05 to 0.50."""


def decision_curve(
    labels: ArrayLike, probabilities: ArrayLike, thresholds: Sequence[float] = THRESHOLDS
) -> DecisionCurve:
    """Net benefit TP/n - FP/n t/(1 - t), where rows with a probability of at least t are acted on.

    Raises ValueError."""
    labels_N, found_N = checks.probabilities(labels, probabilities)
    is_list = isinstance(thresholds, Iterable) and not isinstance(thresholds, str) and np.ndim(thresholds) == 1
    if not is_list or not len(thresholds):
        raise ValueError(f"thresholds={thresholds!r} must be a list of numbers between 0 and 1")
    at_T = np.array([checks.fraction(t, "thresholds") for t in thresholds])
    acted_TN = found_N >= at_T[:, None]
    odds_T = at_T / (1.0 - at_T)
    prevalence = labels_N.mean()
    true_T, false_T = (acted_TN * labels_N).mean(axis=1), (acted_TN * (1.0 - labels_N)).mean(axis=1)
    return DecisionCurve(at_T, true_T - false_T * odds_T, prevalence - (1.0 - prevalence) * odds_T, np.zeros_like(at_T))


def mean(weights_RN: Array, values_N: Array) -> Array:
    """Weighted means [R]; NaN where all weights are zero."""
    return _ratio(weights_RN @ values_N, weights_RN.sum(axis=1))


def _cuts(labels: ArrayLike, scores: ArrayLike) -> Cuts:
    labels_N, scores_N = checks.scores(labels, scores)
    return Cuts.of(labels_N, scores_N, np.ones((1, len(labels_N))))


def _last_specific(cuts: Cuts, specificity: float) -> Array:
    """Index of the lowest threshold with that specificity, for each weighting; -1 where there is none."""
    # A hair's breadth: 1 - 3/30 must count as 0.9.
    return (cuts.specificity() >= specificity - 1e-12).sum(axis=1) - 1


def _at_specificity(
    specificity: float,
    read: Callable[[Cuts], Array],
    nobody: float,
    labels_N: Array,
    scores_N: Array,
    weights_RN: Array,
) -> Array:
    cuts = Cuts.of(labels_N, scores_N, weights_RN)
    last_R = _last_specific(cuts, specificity)
    found_R = np.take_along_axis(read(cuts), np.maximum(last_R, 0)[:, None], axis=1)[:, 0]
    found_R = np.where(last_R >= 0, found_R, nobody)
    undefined_R = (cuts.true_RG[:, -1] == 0) | (cuts.false_RG[:, -1] == 0)
    return np.where(undefined_R, np.nan, found_R)


def _ratio(above: Array, below: Array) -> Array:
    """above / below, NaN where below is zero."""
    above, below = np.broadcast_arrays(above, below)
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below != 0)
