"""The rows that a run left out are found again, and those of other data are refused."""

from dataclasses import replace

import numpy as np
import pytest

from attnzoo.clinical.cohort import Cohort
from attnzoo.clinical.content import content_digests, data_digest
from attnzoo.clinical.grid import Grid
from attnzoo.clinical.held_out import held_out
from attnzoo.clinical.outcome import Outcome
from attnzoo.clinical.splits import digest_of, fold_of_run
from attnzoo.clinical.trained import TrainedModel
from tests.helpers.clinical_data import small_cohort
from tests.helpers.clinical_models import icu_cohort, small_trained

SPLIT = {"split": "patient", "folds": 4, "fold": 1, "validation": 0.25, "split_seed": 3}


def trained_on(cohort: Cohort) -> TrainedModel:
    fold = fold_of_run(cohort, SPLIT, label="mortality", labels=cohort.label("mortality"))
    made = small_trained(icu_cohort(), judged=0)
    content = content_digests(cohort, cohort.label("mortality"))
    return replace(made, outcome=Outcome(), split={**SPLIT, "digest": digest_of(cohort, fold), "content": content})


def test_the_test_part_is_found_again() -> None:
    """Without rows that have no label."""
    cohort = small_cohort()
    labels = cohort.label("mortality").copy()
    labels[::9] = np.nan
    cohort = replace(cohort, labels={"mortality": labels})
    trained = trained_on(cohort)
    rows = held_out(trained, cohort)
    fold = fold_of_run(cohort, SPLIT, label="mortality", labels=labels)
    assert rows.tolist() == fold.test.tolist()
    assert not np.isnan(labels[rows]).any()
    assert not set(rows) & {*fold.train, *fold.validation}


def test_other_data_are_refused() -> None:
    cohort = small_cohort()
    trained = trained_on(cohort)
    with pytest.raises(ValueError, match="cohort 'made up' is not the one that the run split; load the same data"):
        held_out(trained, small_cohort(39))
    with pytest.raises(ValueError, match="the export does not say how its run split the data"):
        held_out(replace(trained, split={}), cohort)


def changed(cohort: Cohort, part: str) -> Cohort:
    """With one value changed, and every stay's id and mortality as before."""
    grid, statics_NS = cohort.grid, cohort.statics_NS.copy()
    if part == "values":
        values_NTV = grid.values_NTV.copy()
        values_NTV[np.nonzero(~np.isnan(values_NTV))[0][0]] += 1
        return replace(cohort, grid=replace(grid, values_NTV=values_NTV))
    if part == "counts":
        counts_NTV = grid.counts_NTV.copy()
        counts_NTV[3, 2, 1] += 1
        return replace(cohort, grid=replace(grid, counts_NTV=counts_NTV))
    if part == "hours":
        return replace(cohort, grid=replace(grid, hours_N=grid.hours_N - (np.arange(len(cohort)) == 7)))
    if part == "names":
        return replace(cohort, grid=replace(grid, variables=grid.variables[::-1]))
    statics_NS[1, 0] += 1
    return replace(cohort, statics_NS=statics_NS)


PARTS = {**dict.fromkeys(("values", "counts", "hours", "names"), "measurements"), "statics": "statics"}


@pytest.mark.parametrize("part", PARTS)
def test_the_same_stays_with_other_values_are_refused(part: str) -> None:
    cohort = small_cohort()
    told = (
        f"cohort 'made up' has the stays of the run and other {PARTS[part]}: its figures would be those of other data"
    )
    with pytest.raises(ValueError, match=f"{told}; load the same files with the same options, .*, or train anew"):
        held_out(trained_on(cohort), changed(cohort, part))


def test_the_same_stays_with_other_labels_are_refused() -> None:
    """Where the split stays the same: of buckets, by which it is not balanced. A label that is not predicted is not
    compared."""
    cohort = small_cohort()
    days = np.linspace(0.5, 9.5, len(cohort), dtype=np.float32)
    cohort = replace(cohort, labels={"los": days, "mortality": cohort.label("mortality")})
    fold = fold_of_run(cohort, SPLIT, label=None, labels=days)
    split = {**SPLIT, "digest": digest_of(cohort, fold), "content": content_digests(cohort, days)}
    made = replace(small_trained(icu_cohort(), judged=0), evidence=None, split=split)
    trained = replace(made, calibrator=None, outcome=Outcome(label="los", edges=(3.0, 6.0)))
    assert held_out(trained, cohort).tolist() == fold.test.tolist()
    other = replace(cohort, labels={"los": days, "mortality": 1 - cohort.label("mortality")})
    assert held_out(trained, other).tolist() == fold.test.tolist()
    with pytest.raises(ValueError, match="has the stays of the run and other labels"):
        held_out(trained, replace(cohort, labels={"los": days + 1}))


def test_digests_depend_on_values_alone() -> None:
    """Not on how an array stores them."""
    cohort = small_cohort()
    labels, grid = cohort.label("mortality"), cohort.grid
    values_NTV = grid.values_NTV.astype(">f8")
    values_NTV[np.isnan(values_NTV)] *= -1  # a NaN of another sign
    values_NTV[0, 0, 0], grid.values_NTV[0, 0, 0] = -0.0, 0.0
    stored = replace(
        grid,
        values_NTV=np.asfortranarray(values_NTV),
        counts_NTV=grid.counts_NTV.astype(np.int64),
        hours_N=grid.hours_N.astype(np.int16),
    )
    same = replace(cohort, grid=stored, statics_NS=cohort.statics_NS.astype(np.float64))
    found = content_digests(cohort, labels)
    assert content_digests(same, labels.astype(np.int8)) == found
    assert set(found) == {"measurements", "statics", "labels", "patients"}
    values_NTV = np.arange(12, dtype=np.float32).reshape(2, 3, 2) / 8
    values_NTV[0, 1] = np.nan
    fixed = Grid(values_NTV, (~np.isnan(values_NTV)).astype(np.uint8), np.array([3, 2]), ("HR", "pH"), step_hours=24)
    same = Cohort("two", fixed, np.zeros((2, 0), np.float32), (), ("a", "b"), None, {"x": np.array([0, 1])})
    assert (
        content_digests(same, np.array([0, 1]))["measurements"] == "955026f2118bee978bfad6b066ccfe31"
    )  # on every machine


def test_an_export_of_before_says_what_is_not_compared() -> None:
    cohort = small_cohort()
    trained = trained_on(cohort)
    split = {key: value for key, value in trained.split.items() if key != "content"}
    with pytest.warns(UserWarning, match="is of before values were recorded: the cohort's stays are those of the run"):
        rows = held_out(replace(trained, split=split), changed(cohort, "values"))
    assert rows.tolist() == held_out(trained, cohort).tolist()
    assert data_digest(split) == split["digest"]
    assert data_digest(trained.split) not in (None, split["digest"])
    assert data_digest({}) is None
