"""The experiment on PH-LLM: published tables recomputed, baselines on the real data, and claims of made-up scores."""

from pathlib import Path

import numpy as np
import pytest

from attnzoo.clinical.formats import load_cohort
from tests.helpers.clinical_data import DATA, shared_data, small_wearables
from train.experiments import ph_llm, ph_llm_judge
from train.experiments.base import ExperimentConfig, Values
from train.experiments.ph_llm_judge import PUBLISHED, draw, judge

RUNS = ("seed 0", "seed 1", "seed 2", "10 days", "5 days", "half of the rows")


def values_of(compared: Values, published: Values, signal: float) -> dict[str, Values]:
    """Scores that know the answer by `signal`; those of ablations know nothing."""
    random = np.random.default_rng(0)
    labels_NQ = np.array(compared["labels"])

    def told(rows: list[int], known: float) -> list[list[float]]:
        noise_NQ = random.standard_normal((len(rows), labels_NQ.shape[1]))
        return (known * np.nan_to_num(labels_NQ[rows]) + noise_NQ).tolist()

    rows, people = compared["rows"], np.array_split(compared["by person, rows"], ph_llm.PEOPLE_FOLDS)
    adapter = {"scores": told(rows, signal), "rows": rows} | {
        f"noise {size:g}": told(rows, signal) for size in ph_llm.NOISE
    }
    adapter |= {"permuted": told(rows, 0.0), "zeroed": np.zeros((len(rows), 6)).tolist()}
    small = {name: {"scores": told(rows, signal), "rows": rows} for name in RUNS}
    small |= {
        f"people {fold}": {"scores": told(part.tolist(), 0.0), "rows": part.tolist()}
        for fold, part in enumerate(people)
    }
    text = {"scores": told(rows[::3], 0.0), "rows": rows[::3]}
    return {"adapter": adapter, "small decoder": small, "as text": text, "compared": compared, "published": published}


def test_published_tables_and_baselines_and_what_claims_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared_data("pmdata/pmdata.tar.gz")
    monkeypatch.setattr(ph_llm_judge, "RESAMPLES", 100)
    monkeypatch.setattr(ph_llm, "STRENGTHS", (0.01,))
    config, ticks = ExperimentConfig(data=DATA), []
    published = ph_llm.published(config, lambda: ticks.append(1))
    compared = ph_llm.compared(config, lambda: ticks.append(1))
    assert len(ticks) == 2
    assert compared["parts"] == {"train": 1045, "validation": 157, "test": 527}
    assert sorted(compared["by person, rows"]) == list(range(1729))
    good = judge(config, values_of(compared, published, signal=2.0))
    assert {claim.name.split()[0] for claim in good.claims} == {f"H{number}" for number in range(1, 7)}
    assert [claim.name for claim in good.claims if not claim.holds] == []
    assert sum(claim.name.startswith("H1 published mean AUROC") for claim in good.claims) == len(PUBLISHED)
    rows = {row["PMData, split in time"]: row for row in good.rows if "PMData, split in time" in row}
    assert rows["person's mean"]["mean AUROC"] > rows["logistic regression"]["mean AUROC"] > 0.55
    assert rows["adapter, SmolLM2, tokens of zeros"]["fatigue"] == 0.5
    (short,) = [row["in short"] for row in good.rows if "in short" in row]
    assert "better than logistic regression on the same numbers (0.6" in short
    assert (
        "better than the numbers of other rows (0.4" in short or "better than the numbers of other rows (0.5" in short
    )
    bad = judge(config, values_of(compared, {}, signal=0.0))
    failed = {claim.name.split(":")[0] for claim in bad.claims if not claim.holds}
    assert failed == {
        "H3 mean AUROC, SmolLM2",
        "H3 mean AUROC, small decoder, mean of seeds",
        "H4 SmolLM2 less numbers of other rows",
    }
    assert {claim.name.split()[0] for claim in bad.claims} == {"H3", "H4", "H5", "H6"}  # the others have no tables
    (figure,) = draw(values_of(compared, {}, signal=1.0), tmp_path)
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_what_is_compared_learns_from_training_rows_alone() -> None:
    """By hand on few people: a person's mean, and a regression blind to labels that come later."""
    cohort = small_wearables()
    cohort.labels.update(dict.fromkeys(("mood", "readiness", "sleep_quality", "soreness"), cohort.labels["fatigue"]))
    fold = ph_llm.split(cohort)
    found_NQ = ph_llm.person_means(cohort, fold)
    person = np.array(cohort.patient_ids)
    row = 3
    mine = fold.train[person[fold.train] == person[fold.test[row]]]
    tired = cohort.labels["fatigue"]
    assert found_NQ[row, 0] == pytest.approx((tired[mine].sum() + tired[fold.train].mean()) / (len(mine) + 1))
    before = ph_llm.regression(cohort, fold, fold.train)
    cohort.labels["fatigue"][fold.test] = 1 - cohort.labels["fatigue"][fold.test]
    assert np.array_equal(before, ph_llm.regression(cohort, fold, fold.train))


def test_numbers_in_words_and_missing_data(tmp_path: Path) -> None:
    text = ph_llm.in_words(("sleep_minutes", "bedtime", "steps"), np.array([412.3, 1225.0, np.nan, np.nan, 7, 4]))
    assert text.endswith("mean a day: sleep minutes 412 (sd 35), steps 7 (sd 2).")
    with pytest.raises(ValueError, match=r"--data=.* holds no pmdata\.tar\.gz; get it from"):
        ph_llm.parts(ExperimentConfig(data=tmp_path))
    assert ph_llm.published(ExperimentConfig(data=tmp_path), lambda: None) == {}


def test_parts_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every training knows its own rows: fewer days keep the rows, a fold of people is that of its training."""
    shared_data("pmdata/pmdata.tar.gz")
    config = ExperimentConfig(data=DATA)
    parts = ph_llm.parts(config)
    assert set(parts) == {"adapter", "small decoder", "as text", "compared", "published"}
    runs = ph_llm.small_runs(config)
    assert set(runs) == {*RUNS, *(f"people {fold}" for fold in range(4))}
    assert parts["small decoder"].steps == 10 * parts["adapter"].steps + ph_llm.SMALL_STEPS
    assert len({ph_llm.words(overrides, config)[-1] for overrides in runs.values()}) == 1  # the same data
    cohort = load_cohort("pmdata", ph_llm.archive(config), days=5)
    assert (
        ph_llm.split(cohort).test.tolist() == ph_llm.split(load_cohort("pmdata", ph_llm.archive(config))).test.tolist()
    )
    quick_NQ = ph_llm.outcomes(cohort)[ph_llm.split(cohort).test[:: ph_llm.QUICK_EVERY]]
    assert np.nanmax(quick_NQ, axis=0).tolist() == [1.0] * 6  # a quick run has both answers to every question
    for fold in ph_llm.people_folds(cohort):  # so that every training of a fold can select
        labels_NQ = ph_llm.outcomes(cohort)[fold.validation]
        assert np.nanmin(labels_NQ, axis=0).tolist() == [0.0] * 6
        assert np.nanmax(labels_NQ, axis=0).tolist() == [1.0] * 6
