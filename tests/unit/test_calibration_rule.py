"""A calibration that a few stays, or separated ones, would make too sure of itself is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from attnzoo.checkpoint.model_files import CONFIG
from attnzoo.clinical.calibration import sigmoid
from attnzoo.clinical.calibration_rule import FOR_EACH_NUMBER, Fit
from attnzoo.clinical.evidence import calibrate
from attnzoo.clinical.label_calibration import LabelCalibration, fit_label_calibration
from attnzoo.clinical.trained import load_trained
from tests.helpers.clinical_models import ask, clinical_client, export, icu_cohort, request_of, small_trained


def refused(labels: np.ndarray, logits: np.ndarray) -> str:
    """Why; nothing of the fit is kept."""
    found = calibrate(labels, logits)
    assert found == Fit(refused=found.refused)
    assert found.refused is not None
    return found.refused


def test_too_few_of_either_kind() -> None:
    logits = np.random.default_rng(0).normal(size=100)
    for events in (19, 81):
        labels = (np.arange(100) < events).astype(float)
        told = f"{100 - events} stays without the label and {events} stays with the label, and a fit needs 20 of each"
        assert refused(labels, logits) == f"the part that calibrates has {told}"
    labels = np.arange(100) % 5 == 0
    assert calibrate(labels.astype(float), logits + labels).refused is None
    assert FOR_EACH_NUMBER == 10


def test_hours_of_one_stay_are_no_stays() -> None:
    """Nineteen stays of many hours with the label are nineteen."""
    logits = np.random.default_rng(0).normal(size=(60, 30))
    labels = np.zeros((60, 30))
    labels[:19, 10:] = 1
    labels[40:, 20:] = np.nan
    assert "60 stays without the label and 19 stays with the label" in refused(labels, logits)
    labels[19, 5] = 1
    assert calibrate(labels, logits + 0.5 * np.nan_to_num(labels)).refused is None


def test_separated_stays_and_logits_that_rank_the_wrong_way_round() -> None:
    labels = (np.arange(200) < 80).astype(float)
    random = np.random.default_rng(1)
    assert refused(labels, labels * 4 + random.random(200)) == (
        "any certainty fits the part that calibrates: its labels are separated (temperature at its bound 0.05)"
    )
    assert refused(labels, random.normal(size=200) - labels) == (
        "in the part that calibrates the logits do not rank the labels, or are far too large "
        "(temperature at its bound 20)"
    )


def test_stays_that_one_of_them_keeps_from_being_separated() -> None:
    """A third of the bootstrap samples lacks it, so that the interval would reach to certainty."""
    labels = (np.arange(200) < 80).astype(float)
    logits = labels * 4 + np.random.default_rng(1).random(200)
    logits[0] = -4.0
    assert "of 200 bootstrap samples of the part that calibrates are separated, so that any" in refused(labels, logits)


@pytest.mark.parametrize("size", [1.0, 100.0])
@pytest.mark.parametrize("noise", [0.0, 1e-8])
def test_logits_that_are_all_alike_are_not_calibrated_to_the_base_rate(size: float, noise: float) -> None:
    labels, random = (np.arange(200) < 80).astype(float), np.random.default_rng(1)
    told = refused(labels, size * (-1.5 + noise * random.normal(size=200)))
    assert told.startswith("the logits of the part that calibrates are all alike (standard deviation ")
    assert told.endswith("): the model tells nothing apart, and no slope can be fitted")
    rows_NK = np.tile([0.5, -0.5, 0.0], (60, 1))
    alike = fit_label_calibration(np.eye(3)[np.arange(60) % 3], 0 * rows_NK + size, exclusive=True)
    assert "are all alike (standard deviation 0)" in str(alike.refused[0])
    either = fit_label_calibration(np.eye(3)[np.arange(60) % 3][:, :2], size * rows_NK[:, :2], exclusive=False)
    assert ["are all alike" in str(one) for one in either.refused] == [True, True]


def test_logits_that_hardly_differ_are_not_said_to_be_separated() -> None:
    """They rank the labels with many mistakes, and only their scale is too small."""
    random = np.random.default_rng(1)
    labels = (np.arange(200) < 80).astype(float)
    logits = labels + random.normal(size=200)
    assert calibrate(labels, logits).refused is None
    assert refused(labels, 0.01 * logits) == (
        "the best temperature of the part that calibrates is below 0.05: its logits differ too little (standard "
        f"deviation {0.01 * logits.std():.2g}) for how well they rank its labels"
    )
    some = refused(labels, 0.065 * logits)
    assert "of 200 bootstrap samples of the part that calibrates have their best temperature below 0.05" in some
    assert "logits differ too little" in some
    rows_NK = np.eye(3)[np.arange(300) % 3]
    near_NK = 0.01 * (rows_NK + random.normal(size=rows_NK.shape))
    told = str(fit_label_calibration(rows_NK, near_NK, exclusive=True).refused[0])
    assert told.startswith("the best temperature of the part that calibrates is below 0.05: its logits differ too")


def test_labels_of_texts_follow_the_same_rule() -> None:
    random = np.random.default_rng(1)
    logits_NK = random.normal(size=(200, 3)) * 2
    labels_NK = (random.random((200, 3)) < sigmoid(logits_NK / 2)).astype(float)
    labels_NK[:, 1] = np.arange(200) < 9
    labels_NK[:, 2] = logits_NK[:, 2] > 0
    found = fit_label_calibration(labels_NK, logits_NK, exclusive=False)
    assert found.refused[0] is None
    assert found.refused[1] == (
        "the part that calibrates has 191 rows without the label and 9 rows with the label, and a fit needs 20 of each"
    )
    assert found.refused[2] is not None
    assert "its labels are separated" in found.refused[2]
    assert [one is None for one in found.calibrators] == [False, True, True]
    assert [len(drawn) for drawn in found.drawn] == [200, 0, 0]
    content = json.loads(json.dumps(found.to_dict()))
    assert LabelCalibration.from_dict(content) == found
    del content["refused"]  # an export of before
    assert LabelCalibration.from_dict(content).calibrators == found.calibrators


def test_labels_that_exclude_one_another() -> None:
    logits_NK = np.random.default_rng(2).normal(size=(60, 3))
    separated = fit_label_calibration(np.eye(3)[logits_NK.argmax(1)], logits_NK, exclusive=True)
    assert separated.calibrators == (None,)
    assert separated.refused[0] is not None
    assert "its labels are separated" in separated.refused[0]
    assert separated.probabilities(logits_NK).sum(axis=1) == pytest.approx(1.0)
    assert separated.logits(logits_NK) == pytest.approx(logits_NK)
    assert np.isnan(separated.interval(logits_NK)).all()
    few = fit_label_calibration(np.eye(3)[[0, 1, 2] * 3], logits_NK[:9], exclusive=True)
    assert few.refused == ("the part that calibrates has 9 rows, and a fit needs 10",)


@pytest.mark.parametrize("margin", [1.0, 3.0, 5.0, 12.0, 40.0])
@pytest.mark.parametrize("wrong", [0, 1])
def test_exclusive_labels_that_are_separated_whatever_their_margin(margin: float, wrong: int) -> None:
    """Also where softmax rounds to 1 long before the bound; and where one row of 300 is wrong, which a third of the
    bootstrap samples leave out."""
    random = np.random.default_rng(0)
    rows = np.eye(3)[np.arange(300) % 3]
    logits = margin * rows + 0.1 * random.normal(size=rows.shape)
    labels = rows.copy()
    labels[:wrong] = np.roll(labels[:wrong], 1, axis=1)
    found = fit_label_calibration(labels, logits, exclusive=True)
    assert found.calibrators == (None,)
    assert found.drawn == ((),)
    told = "any certainty fits the part" if not wrong else "bootstrap samples of the part that calibrates are separated"
    assert told in str(found.refused[0])


def test_an_answer_says_why_there_is_no_interval(tmp_path: Path) -> None:
    cohort = icu_cohort()
    path = export(tmp_path, small_trained(cohort))
    content, why = json.loads((path / CONFIG).read_text()), "the part that calibrates has 3 stays with the label"
    content["evidence"] |= {"calibrators": [], "uncalibrated": why}
    (path / CONFIG).write_text(json.dumps({**content, "calibration": None}))
    with clinical_client(path) as client:
        reply = ask(client, request_of(cohort, [0]))
        body = request_of(cohort, [0])
        body["patients"][0] |= {"id": "s0", "admitted": "2026-03-01T08:00:00Z"}
        risk = ask(client, body, headers={"accept": "application/fhir+json"})
    said = risk["prediction"][0]["rationale"]
    assert said.endswith(f"No interval: this model is not calibrated, and has no interval: {why}.")
    assert reply["interval"] is None
    assert reply["interval_reason"] == f"this model is not calibrated, and has no interval: {why}"
    (patient,) = reply["patients"]
    assert (patient["low"], patient["high"]) == (None, None)
    trained = load_trained(path)
    assert patient["probability"] == pytest.approx(float(trained.predict(cohort, np.array([0]))[0]), abs=1e-6)
