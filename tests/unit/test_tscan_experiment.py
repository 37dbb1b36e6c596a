"""Experiment T, without its runs: what is judged of made-up predictions, and on which rows they are calibrated."""

from pathlib import Path

import numpy as np
import pytest

from attnzoo.clinical.calibration import fit_calibrator
from attnzoo.clinical.metrics import auroc
from train.experiments import tscan
from train.experiments.base import ExperimentConfig, Values
from train.experiments.tscan_figures import draw
from train.experiments.tscan_judge import (
    ATTENTION,
    HEAD,
    LIGHTGBM,
    SEEDS,
    STACK,
    TSCAN,
    WITH_INNER,
    Stays,
    Told,
    judge,
    predictions,
    two_at_a_time,
)

ROOT = Path(__file__).resolve().parents[2]
N, FOLDS = 600, 2


def made_up(without: tuple[str, ...] = ()) -> dict[str, Values]:
    """Values of all parts: noisy logits, of which some models are twice too sure."""
    random = np.random.default_rng(3)
    truth = random.normal(-2.0, 1.5, N)
    labels = (random.random(N) < 1 / (1 + np.exp(-truth))).astype(int)
    order = random.permutation(N)
    test = [np.sort(order[fold::FOLDS]) for fold in range(FOLDS)]
    validation = [np.setdiff1d(np.arange(N), rows)[::3] for rows in test]

    def told(fold: int, noise: float, sure: float = 1.0) -> Values:
        logits = sure * (truth + random.normal(0, noise, N))
        here = {"test": logits[test[fold]].tolist(), "validation": logits[validation[fold]].tolist()}
        return {"rows": test[fold].tolist(), **here, "seconds": 60.0 + fold, "peak_mib": 700.0}

    groups = {"sex": ["female", "male"] * (N // 2), "age": ["65 to 79"] * N, "ICU": ["medical"] * N}
    values: dict[str, Values] = {
        "stays": {"labels": labels.tolist(), "validation": [rows.tolist() for rows in validation], "groups": groups}
    }
    config = ExperimentConfig(quick=True, without=without)
    kinds = [("both", seed, 0.7) for seed in tscan.seeds(config)] + [("temporal", 0, 2.0), ("spatial", 0, 1.6)]
    for arm, seed, noise in kinds:
        for fold in range(FOLDS):
            values[f"{arm}, seed {seed}, fold {fold}"] = told(fold, noise, sure=2.0)
    for fold in range(FOLDS):
        names = ("logistic regression", "LightGBM", "LightGBM, inner rows too", "GRU")
        values[f"baselines, fold {fold}"] = {name: told(fold, 1.0) for name in names}
    for fold in range(FOLDS):
        values[f"attention, seed 0, fold {fold}"] = told(fold, 2.5)
        for seed in tscan.seeds(config):
            values[f"both, seed {seed}, fold {fold}"]["head"] = told(fold, 1.4 + seed, sure=3.0)
    return values


def test_every_claim_table_and_figure(tmp_path: Path) -> None:
    values = made_up()
    assert {name for name in values if name != "stays"} == {
        name for name in tscan.parts(ExperimentConfig(quick=True, data=tmp_path)) if name != "stays"
    }
    judged = judge(ExperimentConfig(quick=True), values)
    assert {claim.name.split()[0] for claim in judged.claims} == {f"T{number}" for number in range(1, 7)}
    held = {claim.name: claim.holds for claim in judged.claims}
    assert held["T2 one seed: calibration slope"]  # although the logits are twice too sure
    assert held["T3 AUROC above the temporal branch alone, low bound"]
    assert held["T5 peak MiB of two runs"]
    rows = {(row["table"], row.get("model")): row for row in judged.rows}
    wanted = {TSCAN, SEEDS, STACK, LIGHTGBM, HEAD, ATTENTION}
    assert {model for table, model in rows if table == "T: models"} >= wanted
    apart = {row["second"] for row in judged.rows if row["table"] == "T: first less second" and row["first"] == TSCAN}
    assert apart >= {HEAD, ATTENTION, LIGHTGBM}
    groups = {row["group"]: row for row in judged.rows if row["table"] == "T: TSCAN by group"}
    female = np.arange(N) % 2 == 0
    deaths = int(np.array(values["stays"]["labels"])[female].sum())
    assert (groups["sex: female"]["stays"], groups["sex: female"]["deaths"]) == (N // 2, deaths)
    page = (ROOT / "docs" / "experiments" / "tscan.md").read_text(encoding="utf-8")
    for table in {row["table"] for row in judged.rows}:
        assert f"<!-- rows tscan.json {table}" in page
    (figure,) = draw(values, tmp_path)
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert f"(../results/{figure.name})" in page


def test_without_the_ensemble_nothing_is_claimed_of_it() -> None:
    judged = judge(ExperimentConfig(quick=True, without=("ensemble",)), made_up(without=("ensemble",)))
    assert not [claim for claim in judged.claims if claim.name.startswith("T6")]
    assert SEEDS not in {row.get("model") for row in judged.rows}


def test_outcomes_of_test_rows_calibrate_nothing() -> None:
    """Logits are calibrated on the inner validation rows of their own fold alone; the ranking within a fold stays."""
    values = made_up()
    stays, models = predictions(values)
    raw = [Told.of(values[f"both, seed 0, fold {fold}"]) for fold in range(FOLDS)]
    inner = [np.array(rows) for rows in values["stays"]["validation"]]
    for fold, (told, before) in enumerate(zip(models[TSCAN], raw, strict=True)):
        fitted = fit_calibrator(stays.labels[inner[fold]], before.validation)
        assert np.array_equal(told.test, fitted.logits(before.test))
        labels = stays.labels[told.rows]
        assert auroc(labels, told.test) == auroc(labels, before.test)
        alone = Told.of(values[f"both, seed 0, fold {fold}"]["head"])
        fitted = fit_calibrator(stays.labels[inner[fold]], alone.validation)
        assert np.array_equal(models[HEAD][fold].test, fitted.logits(alone.test))
    # Stays that a model has learned from cannot calibrate it.
    as_it_is = Told.of(values["baselines, fold 0"][WITH_INNER])
    assert np.array_equal(models[WITH_INNER][0].test, as_it_is.test)
    found = stays.pooled(models[TSCAN])
    assert found[models[TSCAN][1].rows[3]] == pytest.approx(1 / (1 + np.exp(-models[TSCAN][1].test[3])))
    assert not np.isnan(found).any()


def test_models_that_disagree_are_averaged_and_calibrated_again() -> None:
    labels = np.array([0, 1, 0, 1, 1, 0])
    stays = Stays({"labels": labels, "validation": [[0, 1, 2, 3]], "groups": {}})
    one, other = (
        Told(np.array([4, 5]), test, logits)
        for test, logits in (
            (np.array([2.0, -1.0]), np.array([-1.0, 0.5, 0.7, 2.0])),
            (np.array([0.0, -3.0]), np.array([-2.0, 1.5, -0.5, -0.2])),
        )
    )
    (mean,) = stays.mean([one], [other])
    middle = (one.validation + other.validation) / 2
    assert np.allclose(mean.test, fit_calibrator(labels[:4], middle).logits(np.array([1.0, -2.0])))


def test_runs_two_at_a_time_take_the_longer_lane() -> None:
    assert two_at_a_time([3.0, 1.0, 1.0, 1.0, 4.0]) == 7.0
    assert two_at_a_time([2.0]) == 2.0
