"""Experiment N: its parts are the folds of the training runs, and its verdict is computed from the predictions."""

from pathlib import Path

import numpy as np
import pytest

from attnzoo.clinical.baselines import fit_text_regression
from attnzoo.clinical.metrics import auroc
from tests.helpers.clinical_texts import TOPICS, text_cohort
from train.config_reader import load_config
from train.experiments import ldam
from train.experiments.base import ExperimentConfig
from train.experiments.ldam_judge import FORMS, REMOVED, SETTINGS, TFIDF, judge
from train.tasks import LdamTask, build_task

FOLDS, ROWS = 5, 60


def predictions(labels_NK: np.ndarray, rows: list[int], signal: float, seed: int) -> list[list[float]]:
    rng = np.random.default_rng(seed)
    found_NK = np.exp(signal * labels_NK[rows] + rng.normal(0, 1, (len(rows), 3)))
    return (found_NK / found_NK.sum(1, keepdims=True)).tolist()


def made_up(signals: dict[str, float]) -> dict:
    """Values of all parts; a model's predictions are as good as its signal is strong."""
    cohort = text_cohort(ROWS)
    labels_NK = ldam.table(cohort)
    folds = ldam.split(cohort)
    parts = {"test": [fold.test.tolist() for fold in folds], "validation": [fold.validation.tolist() for fold in folds]}
    values: dict = {"rows": {"names": list(TOPICS), "labels": labels_NK.astype(int).tolist(), **parts, "words": []}}

    def told(signal: float, seed: int, fold: int) -> dict:
        return {name: predictions(labels_NK, rows[fold], signal, seed) for name, rows in parts.items()}

    strong = {f"{n} {c:g}": (2.0 if (n, c) == (2, 10.0) else 0.2) for n, c in SETTINGS}
    values["tf-idf"] = {name: [told(s, 99 + fold, fold) for fold in range(FOLDS)] for name, s in strong.items()}
    for form in FORMS:
        for fold in range(FOLDS):
            part = {**told(signals.get(form, 1.0), fold, fold), "seconds": 1.0, "parameters": 7}
            rng = np.random.default_rng(fold)
            high, low = ({f: rng.normal(m, 0.1, (9, 5)[: 1 + f.endswith("K")]) for f in REMOVED} for m in (2.0, 0.0))
            high["sufficiency_NK"] = high["sufficiency_NK"] - 4.0
            maps = {"integrated gradients": high, "attention": low, "random": low, "chance": low}
            removal = {k: {f: v.tolist() for f, v in one.items()} for k, one in maps.items()}
            checks = {"integrated gradients": 0.1, "attention": 0.8}
            part |= {"removal": removal, "missing": 0.01, "shuffled": checks, "examples": []}
            values[f"{form}, seed 0, fold {fold}"] = part
    return values


@pytest.mark.parametrize("better", [True, False])
def test_the_verdict_follows_the_predictions(better: bool, tmp_path: Path) -> None:
    values = made_up({"LDAM": 4.0 if better else 0.5, "no definitions": 2.0})
    judged = judge(ExperimentConfig(), values)
    holds = {claim.name: claim.holds for claim in judged.claims}
    assert holds[f"N2 LDAM - {TFIDF}, macro AUROC"] is better
    assert holds["N3 LDAM - no definitions, macro AUROC: lower bound"] is better
    assert not holds["N1 dialogues"]
    assert [name for name in holds if name.startswith(("N8", "N9", "N10")) and not holds[name]] == []
    rows = {row["map"]: row for row in judged.rows if row["table"].startswith("N: words taken away")}
    assert (rows["integrated gradients"]["beats random"], rows["attention"]["beats random"]) == ("yes", "no")
    # The setting is chosen on validation rows, and judged on all test rows together.
    order = np.concatenate(values["rows"]["test"])
    labels_NK = np.array(values["rows"]["labels"])[order]
    found_NK = np.concatenate([one["test"] for one in values["tf-idf"]["2 10"]])
    told = next(r for r in judged.rows if r.get("model") == TFIDF)["macro AUROC"]
    mean = np.mean([auroc(labels_NK[:, k], found_NK[:, k]) for k in range(3)])
    assert told.startswith(f"{mean:.3f} (")
    (drawn,) = ldam.EXPERIMENT.draw(values, tmp_path)
    assert drawn.read_bytes().startswith(b"\x89PNG")


def test_parts_train_on_the_folds_of_the_judgement() -> None:
    config = ExperimentConfig(data=Path("mts"))
    parts = ldam.parts(config)
    assert len(parts) == 2 + 5 * (3 + 3 + 1 + 1)
    assert len(ldam.parts(ExperimentConfig(quick=True))) == 2 + 2 * len(FORMS)
    cohort = text_cohort(ROWS)
    for form, (fold, own) in zip(FORMS, enumerate(ldam.split(cohort)), strict=False):
        task = build_task(load_config(ldam.CONFIG, ldam.words_of(config, form, 1, fold)))
        assert isinstance(task, LdamTask)
        task.cohort = cohort
        for part in ("train", "validation", "test"):
            assert np.array_equal(getattr(task.fold, part), getattr(own, part))


def test_logistic_regression_of_words() -> None:
    cohort = text_cohort(90)
    assert cohort.texts is not None
    class_N = np.arange(90) % 3
    predict = fit_text_regression(cohort.texts[:60], class_N[:60], 4)
    found_NK = predict(cohort.texts[60:])
    assert (found_NK.argmax(1) == class_N[60:]).mean() > 0.9
    assert found_NK.sum(1) == pytest.approx(1.0)
    assert not found_NK[:, 3].any()
    with pytest.raises(ValueError, match="must hold a number below 2"):
        fit_text_regression(cohort.texts[:60], class_N[:60], 2)
