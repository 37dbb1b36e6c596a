"""The experiment on length of stay: what it predicts with, and how its models are judged."""

from pathlib import Path

import numpy as np
import pytest

from attnzoo.clinical.agreement import weighted_kappa
from attnzoo.clinical.bootstrap import paired_difference
from tests.helpers.clinical_files import write_yaib_hourly
from train.experiments.base import ExperimentConfig, Values
from train.experiments.los_figure import draw
from train.experiments.los_judge import ATTENTION, GRU, HOUR, Pooled, judge, pooled
from train.experiments.tscan_los import hour_alone, parts, recurrent, task_of, told, words

EDGES = [4.0, 8.0, 12.0]


def made(noise: dict[str, float], stays: int = 24) -> dict[str, Values]:
    """Predictions of two folds, wrong by so many hours; every stay is tested in one."""
    random, found = np.random.default_rng(1), {}
    hours_N = random.integers(6, 30, stays)
    for name, error in noise.items():
        for fold in range(2):
            rows = np.arange(fold, stays, 2)
            stay_K = np.repeat(rows, hours_N[rows])
            hour_K = np.concatenate([np.arange(hours_N[row]) for row in rows])
            remaining_K = hours_N[stay_K] - 1.0 - hour_K
            guess_K = np.clip(remaining_K + random.normal(0, error, len(stay_K)), 0, None)
            values = {
                "stays": stay_K.tolist(),
                "hours": hour_K.tolist(),
                "remaining": remaining_K.tolist(),
                "buckets": np.searchsorted(EDGES, guess_K, side="right").tolist(),
                "typical": guess_K.tolist(),
                "edges": EDGES,
            }
            more = {} if name == HOUR else {"inner": 0.25, "weights": 7}
            found[f"{name}, fold {fold}"] = values | more
    return found


def test_models_are_compared_on_the_same_hours_by_stay(tmp_path: Path) -> None:
    values = made({ATTENTION: 2.0, GRU: 6.0, HOUR: 12.0})
    found, out = pooled(values), judge(ExperimentConfig(quick=True), values)
    mine, other = found[ATTENTION], found[GRU]
    kappa = weighted_kappa(range(4), "linear")
    measured = {claim.name: claim.measured for claim in out.claims}
    assert measured["L1 linear kappa of TSCAN"] == kappa(mine.true_K, mine.told_K)
    apart = paired_difference(kappa, mine.true_K, mine.told_K, other.told_K, mine.stays_K, resamples=100)
    assert apart.patients == 24
    assert measured["L2 linear kappa of TSCAN less the GRU's"] == apart.value
    assert measured["L2 low bound of that difference"] == apart.low
    assert all(claim.holds for claim in out.claims)
    tables = {row["table"] for row in out.rows}
    assert {"L: models", "L: paired differences", "L: linear kappa by time since admission", "L: buckets"} <= tables
    mad = next(row for row in out.rows if row.get("what") == "MAD, hours: TSCAN less GRU")
    truth = np.abs(mine.typical_K - mine.remaining_K).mean() - np.abs(other.typical_K - other.remaining_K).mean()
    assert mad["value"] == pytest.approx(truth)
    assert mad["high"] < 0
    counted = [row for row in out.rows if row["table"] == "L: buckets"]
    assert sum(row["hours in it"] for row in counted) == len(mine.true_K)
    assert [path.name for path in draw(values, tmp_path)] == ["tscan_los.png"]
    assert (tmp_path / "tscan_los.png").stat().st_size > 10_000


def test_worse_models_do_not_hold_and_other_hours_are_refused() -> None:
    values = made({ATTENTION: 6.0, GRU: 2.0, HOUR: 12.0})
    assert [claim.holds for claim in judge(ExperimentConfig(quick=True), values).claims] == [True, False, False]
    one = values[f"{GRU}, fold 0"]
    short = {
        **values,
        f"{GRU}, fold 0": {
            **one,
            **{name: one[name][1:] for name in ("stays", "hours", "remaining", "buckets", "typical")},
        },
    }
    with pytest.raises(ValueError, match="GRU was not tested once on each hour that hour of the stay alone was tested"):
        pooled(short)
    twice = {**values, f"{GRU}, fold 1": one}
    with pytest.raises(ValueError, match="GRU was not tested once on each hour"):
        pooled(twice)


def test_pooled_rows_are_in_the_order_of_stays_and_hours() -> None:
    one, two = (made({GRU: 3.0})[f"{GRU}, fold {fold}"] for fold in range(2))
    first, second = Pooled.of([one, two]), Pooled.of([two, one])
    assert np.array_equal(first.told_K, second.told_K)
    assert np.array_equal(np.lexsort((first.hours_K, first.stays_K)), np.arange(len(first.stays_K)))


def test_parts_by_hand(tmp_path: Path) -> None:
    """What a clock knows, and which hours are told of."""
    config = ExperimentConfig(quick=True, data=write_yaib_hourly(tmp_path / "demo"))
    assert [name for name in parts(config) if "fold 1" in name] == [
        f"{name}, fold 1" for name in (ATTENTION, GRU, HOUR)
    ]
    assert [part.steps for name, part in parts(config).items() if "fold 0" in name] == [4, 1, 1]
    task, ticks = task_of(words(config, 0)), []
    clock = hour_alone(config, lambda: ticks.append(1), 0)
    labels_NT, train, test = task.cohort.label("los"), task.fold.train, task.fold.test
    assert len(ticks) == 1
    assert len(clock["stays"]) == int((~np.isnan(labels_NT[test])).sum())
    assert clock["remaining"] == [
        labels_NT[stay, hour] for stay, hour in zip(clock["stays"], clock["hours"], strict=True)
    ]
    at_hour_2 = np.searchsorted(task.outcome.edges, np.nanmedian(labels_NT[train, 2]), side="right")
    assert {bucket for bucket, hour in zip(clock["buckets"], clock["hours"], strict=True) if hour == 2} == {
        int(at_hour_2)
    }
    labels_NT[test] += 150  # what a clock knows is of training stays
    assert hour_alone(config, lambda: None, 0)["buckets"] == clock["buckets"]
    labels_NT[test] -= 150
    others = task_of(words(config, 1)).fold.test
    assert sorted([*test.tolist(), *others.tolist()]) == list(range(len(task.cohort)))
    gru = recurrent(config, lambda: ticks.append(1), 0)
    assert (len(ticks), gru["stays"], gru["hours"]) == (2, clock["stays"], clock["hours"])
    outcome = task.outcome.fitted(labels_NT[train])
    again = told(task, outcome, np.zeros(labels_NT[test].shape, int))
    assert set(again["typical"]) == {outcome.centers[0]}
