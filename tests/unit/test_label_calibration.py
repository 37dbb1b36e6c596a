"""Calibration of several labels at once, what an export knows of its texts, and what of it an export keeps."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from attnzoo.checkpoint.model_files import CONFIG
from attnzoo.clinical.calibration import fit_calibrator, sigmoid
from attnzoo.clinical.evidence import ATTENTION, GRADIENTS
from attnzoo.clinical.label_calibration import LabelCalibration, fit_label_calibration, softmax
from attnzoo.clinical.text_evidence import TextEvidence, WordCount, measure_texts
from attnzoo.clinical.trained_ldam import load_ldam, save_ldam
from attnzoo.clinical.words import Vocabulary
from tests.helpers.clinical_notes import export_notes
from tests.helpers.clinical_texts import text_cohort


def classes(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(labels, logits) of four labels that exclude one another, calibrated by temperature 2."""
    random = np.random.default_rng(seed)
    logits_NK = random.normal(size=(rows, 4)) * 3
    drawn_N1 = random.random((rows, 1))
    chosen_N = (softmax(logits_NK / 2).cumsum(axis=1) < drawn_N1).sum(axis=1)
    return np.eye(4)[chosen_N], logits_NK


def by_gradients(labels_NK: np.ndarray, logits_NK: np.ndarray, weights_N: np.ndarray) -> float:
    """The temperature of greatest likelihood, as torch's optimizer finds it."""
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    steps = torch.optim.LBFGS([scale], max_iter=100, tolerance_grad=1e-12, tolerance_change=1e-14)
    given, labels, weights = (torch.from_numpy(np.asarray(x, float)) for x in (logits_NK, labels_NK, weights_N))

    def loss() -> torch.Tensor:
        steps.zero_grad()
        told = -(weights * (labels * (given * scale).log_softmax(1)).sum(1)).sum()
        told.backward()
        return told

    steps.step(loss)
    return 1 / float(scale.detach())


def test_one_temperature_is_of_the_greatest_likelihood() -> None:
    """As torch finds it, of whole rows and of a bootstrap sample; the order of labels stays, and they add up to 1."""
    labels_NK, logits_NK = classes(300, 0)
    found = fit_label_calibration(labels_NK, logits_NK, exclusive=True, draws=100, seed=3)
    times_N = np.bincount(np.random.default_rng(3).integers(300, size=(100, 300))[7], minlength=300)
    for one, weights_N in ((found.calibrators[0], np.ones(300)), (found.drawn[0][7], times_N)):
        assert one is not None
        assert one.temperature == pytest.approx(by_gradients(labels_NK, logits_NK, weights_N), rel=1e-6)
        assert one.intercept == 0.0
    told_NK = found.probabilities(logits_NK)
    assert told_NK.sum(axis=1) == pytest.approx(1.0)
    assert (told_NK.argsort(axis=1) == logits_NK.argsort(axis=1)).all()
    with pytest.raises(ValueError, match="exactly one 1 in each row"):
        fit_label_calibration(labels_NK * 0, logits_NK, exclusive=True)
    with pytest.raises(ValueError, match="not finite"):
        fit_label_calibration(labels_NK, logits_NK * np.nan, exclusive=True)


def test_intervals_of_labels_cover_the_true_probabilities() -> None:
    """About 38 of 40; it is binomial, so that 33 is the least in a thousand tries."""
    at_1K, held_K = np.array([[2.0, 0.5, -1.0, -4.0]]), np.zeros(4)
    for seed in range(40):
        low_1K, high_1K = fit_label_calibration(*classes(90, seed), exclusive=True, draws=100).interval(at_1K)
        true_1K = softmax(at_1K / 2)
        held_K += ((low_1K <= true_1K) & (true_1K <= high_1K))[0]
    assert (held_K >= 33).all(), held_K


def test_labels_by_themselves_have_a_calibrator_each() -> None:
    """Where rows have and lack the label; another one is told as it is, without an interval."""
    random = np.random.default_rng(1)
    logits_NK = random.normal(size=(200, 3)) * 2
    labels_NK = (random.random((200, 3)) < sigmoid(logits_NK / 2 + 0.5)).astype(float)
    labels_NK[:, 1] = 0.0
    found = fit_label_calibration(labels_NK, logits_NK, exclusive=False, draws=100)
    assert found.calibrators[0] == fit_calibrator(labels_NK[:, 0], logits_NK[:, 0])
    assert (found.calibrators[1], found.drawn[1]) == (None, ())
    told_NK, (low_NK, high_NK) = found.probabilities(logits_NK), found.interval(logits_NK)
    assert told_NK[:, 1] == pytest.approx(sigmoid(logits_NK[:, 1]))
    assert np.isnan([low_NK[:, 1], high_NK[:, 1]]).all()
    assert (low_NK[:, [0, 2]] < high_NK[:, [0, 2]]).all()
    assert LabelCalibration.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    for change in ({"exclusive": True}, {"drawn": found.drawn[:2]}, {"calibrators": ()}):
        with pytest.raises(ValueError, match="calibrator"):
            replace(found, **change)


def test_words_that_training_texts_have() -> None:
    """Neither marks nor digits count, nor what is not read; one text of a hundred may have less."""
    vocabulary = Vocabulary(("<unknown>", ".", "1", "am", "fine", "i"))
    assert WordCount.of("I am 1 . ?! FINE zebra i i", vocabulary, 8) == WordCount(words=4, known=3)
    texts = ["i am fine"] * 150 + ["zebra"] + ["zebra i am"] * 49
    labels_NK = np.stack([np.arange(40) < 6, np.arange(40) >= 6], axis=1).astype(np.float32)
    found = measure_texts(labels_NK, texts, vocabulary, 9, {})
    assert (found.stays, found.shares, found.texts) == (40, (pytest.approx(0.15), pytest.approx(0.85)), 200)
    assert (found.least_known, found.least_share) == (2, pytest.approx(2 / 3))
    assert found.reasons(WordCount(words=3, known=2)) == []
    few = "known to the model; of 200 texts that it had not seen in training 99 % had"
    assert found.reasons(WordCount(words=1, known=1)) == [f"1 of the text's words is {few} 2 or more"]
    assert found.reasons(WordCount(words=8, known=4)) == [f"50% of the text's words are {few} 67% or more"]
    assert TextEvidence.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_an_export_keeps_them_and_those_of_before_have_none(tmp_path: Path) -> None:
    """With the verdicts on explanations; also of a model that reads series, whose words are explained beside them."""
    cohort = text_cohort(60, variables=("HR",))
    run = export_notes(tmp_path, cohort, "task.explained=6", "model.exclusive=false", "model.pooling=shared")
    trained = load_ldam(run)
    assert trained.calibration is not None
    assert trained.evidence is not None
    assert set(trained.evidence.maps) == {GRADIENTS, ATTENTION}
    assert trained.evidence.maps[GRADIENTS].words.startswith("On 6 texts integrated gradients")
    logits_NK = trained.logits(cohort)
    assert trained.predict(cohort) == pytest.approx(trained.calibration.probabilities(logits_NK))
    assert trained.uncalibrated(logits_NK) == pytest.approx(sigmoid(logits_NK.astype(float)))
    path = run / "export" / CONFIG
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "evidence": {**content["evidence"], "shares": [0.5]}}))
    with pytest.raises(ValueError, match=r"is damaged .*evidence.shares has 1 entries; the model has 3"):
        load_ldam(run)
    path.write_text(json.dumps({**content, "calibration": {**content["calibration"], "exclusive": True}}))
    with pytest.raises(ValueError, match="is damaged"):
        load_ldam(run)
    path.write_text(json.dumps({key: content[key] for key in content if key not in ("calibration", "evidence")}))
    before = load_ldam(run)
    assert (before.calibration, before.evidence) == (None, None)
    assert before.predict(cohort) == pytest.approx(before.uncalibrated(logits_NK))
    save_ldam(tmp_path / "again", before)
    assert load_ldam(tmp_path / "again").calibration is None
