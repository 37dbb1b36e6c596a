"""The bootstrap over patients: its intervals cover what they should, and rows of one patient stay together."""

from statistics import NormalDist

import numpy as np
import pytest

from attnzoo.clinical import bootstrap as b
from attnzoo.clinical import metrics as m

SIMULATIONS, PATIENTS, ROWS = 100, 100, 3


def cohort(random: np.random.Generator, gain: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(labels, one score, another score, patients). All rows of a patient have his label, and nearly his score, so that
    there are PATIENTS observations and not PATIENTS x ROWS. Both scores are normal with variance 1 in each class."""
    labels = np.repeat(random.permutation(PATIENTS) % 3 == 0, ROWS)
    patients = np.repeat(np.arange(PATIENTS), ROWS)
    own = [np.repeat(random.normal(size=PATIENTS), ROWS) for _ in range(2)]
    rest = random.normal(size=(2, PATIENTS * ROWS))
    first, second = (np.sqrt(0.9) * x + np.sqrt(0.1) * e for x, e in zip(own, rest, strict=True))
    return labels, first + gain * labels, second + 0.5 * labels, patients


def truth(gain: float) -> float:
    """AUROC of two normal distributions of variance 1 whose means differ by `gain`."""
    return NormalDist().cdf(gain / np.sqrt(2))


def test_intervals_cover_the_truth_and_intervals_over_rows_do_not():
    random = np.random.default_rng(20261129)
    covered = {"patients": 0, "rows": 0, "difference": 0}
    for _ in range(SIMULATIONS):
        labels, first, second, patients = cohort(random)
        each = {
            "patients": (b.interval(m.auroc, labels, first, patients, resamples=200), truth(1.0)),
            "rows": (b.interval(m.auroc, labels, first, range(len(labels)), resamples=200), truth(1.0)),
            "difference": (
                b.paired_difference(m.auroc, labels, first, second, patients, resamples=200),
                truth(1.0) - truth(0.5),
            ),
        }
        for name, (found, expected) in each.items():
            covered[name] += found.low <= expected <= found.high
    # Within three standard deviations of the binomial distribution of 95 %.
    spread = np.sqrt(0.95 * 0.05 / SIMULATIONS)
    assert 0.95 - 3 * spread <= covered["patients"] / SIMULATIONS <= 0.95 + 3 * spread
    assert 0.95 - 3 * spread <= covered["difference"] / SIMULATIONS <= 0.95 + 3 * spread
    assert covered["rows"] / SIMULATIONS < 0.8


def test_a_resample_is_patients_drawn_with_all_their_rows():
    labels, first, second, patients = cohort(np.random.default_rng(1))
    found = b.interval(m.auroc, labels, first, patients, resamples=150, seed=3)
    draws = np.random.default_rng(3).integers(PATIENTS, size=(150, PATIENTS))
    rows = [np.concatenate([np.flatnonzero(patients == patient) for patient in draw]) for draw in draws]
    values = [m.auroc(labels[each], first[each]) for each in rows]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))
    assert (found.value, found.patients, found.undefined) == (m.auroc(labels, first), PATIENTS, 0)
    # The order of the rows, and what the patients are called, change nothing.
    order = np.random.default_rng(0).permutation(len(labels))
    names = np.array([f"p{patient:03}" for patient in patients])
    assert b.interval(m.auroc, labels[order], first[order], names[order], resamples=150, seed=3) == found
    assert b.interval(m.auroc, labels, first, patients, resamples=150, seed=4) != found
    paired = b.paired_difference(m.auroc, labels, first, second, patients, resamples=150, seed=3)
    values = [m.auroc(labels[each], first[each]) - m.auroc(labels[each], second[each]) for each in rows]
    assert (paired.low, paired.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))
    same = b.paired_difference(m.auroc, labels, first, first, patients, resamples=150)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_pieces_of_the_resamples_are_those_of_the_whole(monkeypatch):
    labels, first, _, patients = cohort(np.random.default_rng(1))
    whole = b.interval(m.auroc, labels, first, patients, resamples=150)
    monkeypatch.setattr(b, "NUMBERS_AT_ONCE", 7 * len(labels))
    assert b.interval(m.auroc, labels, first, patients, resamples=150) == whole


def test_subgroups_and_what_cannot_be_measured_in_them():
    labels, first, _, patients = cohort(np.random.default_rng(1))
    groups = np.where(patients < PATIENTS // 2, "young", np.where(labels, "only deaths", "old"))
    found = b.subgroup_intervals(m.auroc, labels, first, patients, groups, resamples=100)
    young = groups == "young"
    assert found["young"] == b.interval(m.auroc, labels[young], first[young], patients[young], resamples=100)
    assert found["old"] == "labels hold only 0; rows of both classes are needed"
    # One event among 40 patients: a third of the resamples have none.
    rare = b.interval(m.auroc, np.arange(40) == 7, np.arange(40), range(40), resamples=200)
    assert rare.undefined > 20
    assert np.isnan([rare.low, rare.high]).all()
    assert str(found["young"]).startswith(f"{found['young'].value:.3f} (")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patients": [1, 2]}, r"patients has shape \(2,\); one a row is needed, and there are 3 rows"),
        ({"patients": [1, 1, 1]}, "patients holds one patient"),
        ({"patients": ["a", None, "b"]}, "patients holds None"),
        ({"patients": [1.0, np.nan, 2.0]}, "patients holds nan in row 1"),
        ({"resamples": 10}, "resamples=10 must be a whole number of at least 100"),
        ({"level": 95}, "level=95 must lie between 0 and 1"),
        ({"labels": [1, 1, 1]}, "labels hold only 1"),
    ],
)
def test_input_that_gives_no_interval_is_refused(changes, message):
    given = {"labels": [0, 1, 1], "patients": [1, 2, 3], "resamples": 100, "level": 0.95} | changes
    labels, patients = given.pop("labels"), given.pop("patients")
    for call in (
        lambda: b.interval(m.auroc, labels, [0.1, 0.2, 0.3], patients, **given),
        lambda: b.paired_difference(m.auroc, labels, [0.1, 0.2, 0.3], [0.3, 0.2, 0.1], patients, **given),
    ):
        with pytest.raises(ValueError, match=message):
            call()
