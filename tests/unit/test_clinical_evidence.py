"""What an export knows about its predictions: intervals of the calibration, frequencies, verdicts on explanations."""

import json
from pathlib import Path

import numpy as np
import pytest

from attnzoo.checkpoint.model_files import CONFIG
from attnzoo.clinical.calibration import fit_calibrator, sigmoid
from attnzoo.clinical.evidence import ATTENTION, GRADIENTS, Evidence, bootstrap_calibrators, shares
from attnzoo.clinical.outcome import Outcome
from attnzoo.clinical.trained import load_trained
from tests.helpers.clinical_models import export, icu_cohort, small_trained


def drawn(stays: int, hours: int = 0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(labels, logits) that are calibrated by temperature 2 and intercept .5, NaN in some hours."""
    random = np.random.default_rng(seed)
    shape = (stays, hours) if hours else (stays,)
    logits = random.normal(size=shape) * 2
    labels = (random.random(shape) < sigmoid(logits / 2 + 0.5)).astype(float)
    labels[random.random(shape) < 0.1] = np.nan
    return labels, logits


def test_calibrators_are_those_of_whole_stays_drawn_again():
    """Each equals a fit to rows that stand as often as their stay was drawn; the hours of a stay stay together."""
    labels, logits = drawn(40, hours=5)
    found = bootstrap_calibrators(labels, logits, draws=100, seed=3)
    times = np.bincount(np.random.default_rng(3).integers(40, size=(100, 40))[7], minlength=40)
    known = ~np.isnan(labels)
    rows, hours = (np.repeat(axis, times[np.nonzero(known)[0]]) for axis in np.nonzero(known))
    expected = fit_calibrator(labels[rows, hours], logits[rows, hours])
    assert found[7].temperature == pytest.approx(expected.temperature, rel=1e-6)
    assert found[7].intercept == pytest.approx(expected.intercept, abs=1e-6)


def test_intervals_cover_the_true_probability():
    """About 95 of 100 cohorts; it is binomial, so that 88 is the least in a thousand tries."""
    at, held, widths = np.array([-2.0, 0.0, 3.0]), np.zeros(3), []
    for seed in range(100):
        labels, logits = drawn(150, seed=seed)
        one = Evidence(
            stays=1, shares=(0.5,), calibration_stays=150, calibrators=bootstrap_calibrators(labels, logits), maps={}
        )
        low, high = one.interval(at)
        held += (low <= sigmoid(at / 2 + 0.5)) & (sigmoid(at / 2 + 0.5) <= high)
        widths.append(high - low)
    assert (held >= 88).all(), held
    assert 0.05 < np.mean(widths) < 0.3


def test_samples_of_one_class_are_left_out():
    labels, logits = np.array([1.0, 0.0, 0.0, 0.0]), np.array([1.0, 0.5, -1.0, 2.0])
    found = bootstrap_calibrators(labels, logits, draws=200)
    assert 100 < len(found) < 160  # all of four draws miss the one: .32


def test_shares():
    assert shares(Outcome(), np.array([1, 0, 0, np.nan, 1])) == (0.5,)
    assert shares(Outcome(label="los", edges=(1.0, 2.0)), np.array([[0, 1, np.nan], [5, 2, 1.5]])) == (0.2, 0.4, 0.4)


def test_evidence_travels_with_the_export(tmp_path: Path):
    trained = small_trained(icu_cohort())
    path = export(tmp_path, trained)
    again = load_trained(path)
    assert again.evidence == trained.evidence
    assert again.evidence is not None
    assert set(again.evidence.maps) == {GRADIENTS, ATTENTION}
    assert again.evidence.maps[GRADIENTS].words.startswith("On 2 stays integrated gradients")
    content = json.loads((path / CONFIG).read_text())
    del content["evidence"]["maps"]
    (path / CONFIG).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"is damaged .*evidence has the keys"):
        load_trained(path)
    del content["evidence"]  # an export of before
    (path / CONFIG).write_text(json.dumps(content))
    assert load_trained(path).evidence is None


def test_an_intercept_where_all_logits_are_far_away():
    """Newton's method jumps to and fro there: the fit of a small cohort whose classes are separated."""
    labels, logits = np.array([1.0, 0.0, 0.0, 1.0, 0.0]), np.array([12.0, 8.0, -4.0, 15.0, -9.0])
    found = fit_calibrator(labels, logits)
    assert found.probabilities(logits).sum() == pytest.approx(2, abs=1e-6)
    assert found.temperature == pytest.approx(0.05)
