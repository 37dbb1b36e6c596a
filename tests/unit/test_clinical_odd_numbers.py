"""Numbers that no metric, interval or calibration can be of are refused, with the field and the value."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from attnzoo import intervals
from attnzoo.clinical import agreement as a
from attnzoo.clinical import bootstrap as b
from attnzoo.clinical import calibration as c
from attnzoo.clinical import label_calibration as lc
from attnzoo.clinical import metrics as m

NAN = float("nan")
Y, S = [0, 1, 0, 1], [0.1, 0.2, 0.3, 0.4]
TABLE = np.array([[0, 1], [1, 0], [1, 1]])
ROWS = np.random.default_rng(0)
Y_NK, Z_NK = (ROWS.random((30, 2)) > 0.5) * 1.0, ROWS.normal(size=(30, 2))


def interval(patients: Any = range(4), **options: Any) -> b.Interval:
    return b.interval(m.auroc, Y, S, patients, **options)


def holed(values: np.ndarray, value: float = NAN) -> np.ndarray:
    found = np.array(values, float)
    found[0, 0] = value
    return found


def calibration(labels: Any = Y_NK, logits: Any = Z_NK, **options: Any) -> lc.LabelCalibration:
    return lc.fit_label_calibration(labels, logits, **{"exclusive": False, **options})


FITTED = calibration()
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "masked": (lambda: m.auroc(np.ma.array(Y, mask=[0, 0, 0, 1]), S), "labels holds 1 masked value"),
    "masked table": (lambda: m.macro_auroc(1)(np.ma.array(TABLE, mask=TABLE == 0), TABLE), "labels holds 2 masked"),
    "dates": (lambda: m.auroc(Y, np.array(["2020", "2021", "NaT", "2022"], "M8[Y]")), "scores must be numbers"),
    "complex": (lambda: m.auroc(Y, np.array(S) + 1j), "scores must be numbers"),
    "texts": (lambda: m.auroc(["0", "1", "0", "1"], S), "labels must be numbers"),
    "integers without end": (lambda: m.auroc(Y, [10**400, 1, 2, 3]), "scores must be numbers"),
    "a tensor with gradients": (lambda: m.auroc(Y, torch.rand(4, requires_grad=True)), "scores must be numbers"),
    "a table of words": (lambda: m.macro_auroc(1)([["a"]], [[1]]), "labels must be numbers"),
    "a ragged table": (lambda: m.macro_auroc(1)([[0, 1], [1]], [[0, 1], [1]]), "labels must be numbers"),
    "a difference that overflows": (lambda: m.mean_absolute_deviation([1e308], [-1e308]), "labels holds 1e.308"),
    "ratings that overflow": (lambda: a.icc([1e200, 2e200], [1e200, 3e200]), "ratings holds 2e.200"),
    "threshold": (lambda: m.score_1_at(NAN), "threshold=nan must be a number"),
    "threshold of words": (lambda: m.score_1_at("0.5"), "threshold='0.5' must be a number"),
    "specificity": (lambda: m.sensitivity_at(None), "specificity=None must lie between 0 and 1"),
    "thresholds": (lambda: m.decision_curve(Y, S, ["a"]), "thresholds='a' must lie between 0 and 1"),
    "one threshold": (lambda: m.decision_curve(Y, S, 0.3), "thresholds=0.3 must be a list"),
    "drawn thresholds": (lambda: m.decision_curve(Y, S, (t for t in [0.3])), "thresholds=<generator .* must be a list"),
    "thresholds of nothing": (lambda: m.decision_curve(Y, S, None), "thresholds=None must be a list"),
    "no threshold": (lambda: m.decision_curve(Y, S, ()), r"thresholds=\(\) must be a list"),
    "least": (lambda: m.macro_auroc(-3), "least=-3 must be a whole number of at least 1"),
    "least of words": (lambda: m.macro_auroc("1"), "least='1' must be a whole number"),
    "bins": (lambda: c.calibration_curve(Y, S, 2.5), "bins=2.5 must be a whole number"),
    "more bins than any memory": (lambda: c.calibration_curve(Y, S, 10**10), "bins=10000000000 must be .* at most"),
    "a temperature of words": (lambda: c.Calibrator(temperature="1"), "temperature='1' must be a positive number"),
    "an intercept of words": (lambda: c.Calibrator.from_dict({"temperature": 1, "intercept": "x"}), "must be finite"),
    "huge logits": (lambda: c.fit_calibrator(Y, [1e200, 2e200, 3e200, 1e199]), "logits holds 3e.200"),
    "a negative weight": (lambda: c.fit_calibrators([0, 1, 1], S[:3], np.array([[-1.0, 1, 1]])), "weights holds -1"),
    "a weight of nothing": (lambda: c.fit_calibrators([0, 1, 1], S[:3], np.array([[NAN, 1, 1]])), "weights"),
    "weights of other rows": (lambda: c.fit_calibrators([0, 1, 1], S[:3], np.ones((1, 4))), r"weights .* \[some, 3\]"),
    "a list of weights": (lambda: c.fit_calibrators([0, 1, 1], S[:3], [1, 1, 1]), r"weights .* \[some, 3\]"),
    "patients without a name": (lambda: interval(["a", NAN, "b", NAN]), "patients holds nan in row 1"),
    "objects without a name": (lambda: interval(np.array(["a", NAN, "b", "c"], object)), "patients holds nan in row 1"),
    "no patient": (lambda: interval([1, 2, None, 3]), "patients holds None in row 2"),
    "an empty name": (lambda: interval(["a", "", "b", ""]), "patients holds '' in row 1"),
    "no time": (lambda: interval(np.array(["2020", "NaT", "2021", "NaT"], "M8[Y]")), "patients holds NaT in row 1"),
    "masked patients": (lambda: interval(np.ma.array([1, 2, 3, 4], mask=[0, 0, 1, 1])), "patients holds 2 masked"),
    "names and numbers": (lambda: interval(["1", 1, "2", 2]), "patients mixes texts and numbers"),
    "objects of both": (lambda: interval(np.array(["1", 1, "2", 2], object)), "patients mixes texts and numbers"),
    "a patient alone": (lambda: list(b.resampled_weights(3, 100)), "patients has shape"),
    "nobody": (lambda: list(b.resampled_weights([], 100)), "patients holds 0 patients"),
    "half a resample": (lambda: interval(resamples=100.5), "resamples=100.5 must be a whole number of at least 100"),
    "resamples of words": (lambda: interval(resamples="1000"), "resamples='1000' must be a whole number"),
    "a negative seed": (lambda: interval(seed=-1), "seed=-1 must be a whole number of at least 0"),
    "no seed": (lambda: interval(seed=None), "seed=None must be a whole number"),
    "level": (lambda: interval(level="0.95"), "level='0.95' must lie between 0 and 1"),
    "groups without a name": (
        lambda: b.subgroup_intervals(m.auroc, Y, S, range(4), [1.0, NAN, 1.0, NAN]), "groups holds nan in row 1"
    ),
    "no group": (lambda: b.subgroup_intervals(m.auroc, Y, S, range(4), ["a", None] * 2), "groups holds None in row 1"),
    "resamples of groups": (
        lambda: b.subgroup_intervals(m.auroc, Y, S, range(4), list("abab"), resamples=5), "resamples=5 must be"
    ),
    "a patient of a group": (
        lambda: b.subgroup_intervals(m.auroc, Y, S, [1, NAN, 2, 3], list("aaaa")), "patients holds nan in row 1"
    ),
    "categories of letters": (lambda: a.weighted_kappa("ab", "linear"), "categories=.* must be at least two whole"),
    "categories of halves": (lambda: a.gwet_ac2((1.0, 2.0)), "categories=.* must be at least two whole"),
    "no categories": (lambda: a.gwet_ac2(None), "categories=None must be at least two whole"),
    "weights of a kappa": (lambda: a.weighted_kappa((1, 2), ["linear"]), "weights=.* must be one of"),
    "more right than asked": (lambda: intervals.wilson(11, 10), "right=11 of count=10"),
    "fewer than none": (lambda: intervals.wilson(1, -2), "right=1 of count=-2"),
    "half an answer": (lambda: intervals.wilson(1.5, 3), "right=1.5 of count=3"),
    "no count": (lambda: intervals.wilson(1, NAN), "right=1 of count=nan"),
    "percent": (lambda: intervals.wilson(1, 2, 95), "level=95 must lie between 0 and 1"),
    "percent of a mean": (lambda: intervals.bootstrap_mean([1, 2], level=95), "level=95 must lie between 0 and 1"),
    "a mean of a table": (lambda: intervals.bootstrap_mean([[1, 2], [3, 400]]), r"values has shape \(2, 2\)"),
    "a mean of words": (lambda: intervals.bootstrap_mean(["a"]), "values must be numbers"),
    "a label that is not known": (lambda: calibration(holed(Y_NK)), "labels holds 1 values that are not finite"),
    "a label of two": (lambda: calibration(np.full((30, 2), -1.0)), "labels hold -1"),
    "other columns": (lambda: calibration(Y_NK, Z_NK[:, :1]), "must be tables"),
    "one column": (lambda: calibration(Y_NK[:, 0], Z_NK[:, 0]), "must be tables"),
    "a column of exclusive labels": (lambda: calibration(Y_NK[:, 0], Z_NK[:, 0], exclusive=True), "must be tables"),
    "halves of labels": (lambda: calibration(np.full((30, 2), 0.5), exclusive=True), "labels hold 0.5"),
    "a logit that is not known": (lambda: calibration(np.ones((30, 2)), holed(Z_NK)), "scores holds 1 values"),
    "logits of another model": (lambda: FITTED.interval([[1.0, 2.0, 3.0]]), r"logits has shape \(1, 3\)"),
    "probabilities of another model": (lambda: FITTED.probabilities([[1.0, 2.0, 3.0]]), r"logits has shape \(1, 3\)"),
    "a level of labels": (lambda: FITTED.interval(Z_NK, 95), "level=95 must lie between 0 and 1"),
}  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    call, told = REFUSED[name]
    with pytest.raises(ValueError, match=told):
        call()


def test_what_looks_odd_and_is_right() -> None:
    assert m.auroc(np.ma.array(Y, mask=False), S) == m.auroc(Y, S) == m.auroc([False, True, False, True], S)
    assert m.auroc(Y, np.array([1, 2, 3, 10**300], object)) == 0.75
    assert m.auroc(Y, torch.tensor(S)) == 0.75
    names = [interval(each) for each in (range(4), list("abcd"), np.array(list("abcd")), [0.5, 1.5, 2.5, 3.5])]
    assert len({str(each) for each in names}) == 1
    assert intervals.wilson(np.int64(1), np.int64(3)) == intervals.wilson(1, 3)
