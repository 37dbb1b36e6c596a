"""Summary features of a grid, by hand and blind to later hours, and the baselines that are fitted on them."""

import sys

import numpy as np
import pytest

from attnzoo.clinical.baselines import LightGbmConfig, fit_lightgbm, fit_logistic_regression
from attnzoo.clinical.cohort import Cohort
from attnzoo.clinical.grid import Grid
from attnzoo.clinical.metrics import auroc
from attnzoo.clinical.summary import KINDS, summary_features

HOURS, VARIABLES = 11, ("heart_rate", "lactate", "ph")


def cohort(stays: int = 300, seed: int = 0) -> Cohort:
    """Deaths follow the last lactate, and how often lactate was measured."""
    random = np.random.default_rng(seed)
    shape = (stays, HOURS, len(VARIABLES))
    counts_NTV = random.poisson([2.0, 0.3, 0.0], size=shape).astype(np.uint8)
    values_NTV = np.where(counts_NTV > 0, random.normal([80, 2, 7], [15, 1, 1], size=shape), np.nan)
    hours_N = random.integers(5, HOURS + 1, size=stays)
    beyond_NT = np.arange(HOURS) >= hours_N[:, None]
    counts_NTV[beyond_NT], values_NTV[beyond_NT] = 0, np.nan
    grid = Grid(values_NTV.astype(np.float32), counts_NTV, hours_N, VARIABLES)
    statics_NS = np.stack([random.normal(60, 15, stays), random.integers(1, 5, stays)], axis=1).astype(np.float32)
    statics_NS[:2, 0] = np.nan
    made = Cohort("made", grid, statics_NS, ("age", "icu_type"), tuple(map(str, range(stays))), None, {})
    table = summary_features(made)
    risk = 0.8 * np.nan_to_num(table.values_NF[:, table.names.index("lactate last")], nan=1.0)
    risk += 0.4 * table.values_NF[:, table.names.index("lactate count")] - 4
    return Cohort(**{**vars(made), "labels": {"mortality": (random.random(stays) < 1 / (1 + np.exp(-risk))) * 1.0}})


def test_features_by_hand():
    values = np.full((2, 6, 1), np.nan, np.float32)
    values[0, [1, 2, 4], 0] = [3.0, 5.0, 4.0]
    values[0, 5, 0] = 99.0  # after the end of the stay
    counts = np.zeros((2, 6, 1), np.uint8)
    counts[0, [1, 2, 4, 5], 0] = [1, 3, 1, 7]
    grid = Grid(values, counts, np.array([5, 6]), ("lactate",))
    statics = np.array([[70.0, 2.0], [np.nan, np.nan]], np.float32)
    found = summary_features(Cohort("c", grid, statics, ("age", "icu_type"), ("a", "b"), None, {}))
    first = dict(zip(found.names, found.values_NF[0].tolist(), strict=True))
    hours, measured = np.array([1, 2, 4]), np.array([3, 5, 4])
    assert [first[f"lactate {kind}"] for kind in KINDS] == pytest.approx(
        [4, 3, 4, 3, 5, measured.std(), np.polyfit(hours, measured, 1)[0], 5, 2 / 5, 1]
    )
    assert first["age"] == 70
    assert [value for name, value in first.items() if name.startswith("icu_type: ")] == [0, 1, 0, 0]
    second = dict(zip(found.names, found.values_NF[1].tolist(), strict=True))
    assert (second["lactate count"], second["lactate missing"]) == (0, 1)
    assert np.isnan([second["age"], *(second[f"lactate {kind}"] for kind in set(KINDS) - {"count", "missing"})]).all()


@pytest.mark.parametrize("hours", [1, 6, HOURS - 1])
def test_later_hours_change_nothing(hours):
    made = cohort()
    values, counts = made.grid.values_NTV.copy(), made.grid.counts_NTV.copy()
    values[:, hours:], counts[:, hours:] = 1e6, 9
    later = Grid(values, counts, np.full(len(made), HOURS), VARIABLES)
    known = np.flatnonzero(made.grid.hours_N >= hours)  # that a stay ended before is known at that hour
    changed = Cohort(**{**vars(made), "grid": later})
    found = summary_features(made, known, hours)
    assert np.array_equal(found.values_NF, summary_features(changed, known, hours).values_NF, equal_nan=True)
    assert not np.array_equal(found.values_NF, summary_features(made, known).values_NF, equal_nan=True)


def test_rows_are_those_of_the_whole_cohort():
    made, rows = cohort(), np.array([299, 0, 17])
    whole, some = summary_features(made), summary_features(made, rows)
    assert np.array_equal(some.values_NF, whole.values_NF[rows], equal_nan=True)
    mask = np.isin(np.arange(300), rows)
    assert np.array_equal(summary_features(made, mask).values_NF, whole.values_NF[mask], equal_nan=True)
    assert (some.names, some.values_NF.dtype) == (whole.names, np.float32)
    assert summary_features(made, []).values_NF.shape == (0, len(whole.names))
    with pytest.raises(ValueError, match="hours=0 must be at least 1"):
        summary_features(made, hours=0)


@pytest.mark.parametrize("name", ["logistic regression", "LightGBM"])
def test_baselines_rank_rows_that_they_have_not_seen(name):
    if name == "LightGBM":
        pytest.importorskip("lightgbm", reason="lightgbm, of the extra [clinical], is not installed")
    made = cohort(1200)
    features, labels = summary_features(made).values_NF, made.labels["mortality"]

    def fit(seed: int = 0, threads: int = 1):
        if name == "LightGBM":
            config = LightGbmConfig(trees=60, leaves=7, threads=threads)
            return fit_lightgbm(features[:800], labels[:800], config=config, seed=seed)
        return fit_logistic_regression(features[:800], labels[:800])

    model = fit()
    found = model(features[800:])
    assert auroc(labels[800:], found) > 0.7
    assert found.mean() == pytest.approx(labels[800:].mean(), abs=0.05)
    assert model(features[800:803]) == pytest.approx(found[:3], rel=1e-9)
    if name == "LightGBM":
        assert np.array_equal(fit(threads=2)(features[800:]), found)
        assert not np.array_equal(fit(seed=1)(features[800:]), found)


def test_what_a_baseline_refuses(monkeypatch):
    features, labels = np.zeros((4, 2)), [0, 1, 0, 1]
    for fit, package in ((fit_logistic_regression, "sklearn"), (fit_lightgbm, "lightgbm")):
        with pytest.raises(ValueError, match="labels hold only 0"):
            fit(features, [0, 0, 0, 0])
        with pytest.raises(ValueError, match="labels has 3 rows, scores has 4"):
            fit(features, [0, 1, 0])
        with pytest.raises(ValueError, match="features hold an infinite value"):
            fit(features + np.inf, labels)
        for module in [each for each in sys.modules if each.split(".")[0] == package] + [package]:
            monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ValueError, match=r"is not installed; run pip install 'attnzoo\[clinical\]'"):
            fit(features, labels)
