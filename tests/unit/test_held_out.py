"""The rows that a run left out are found again, and those of other data are refused."""

from dataclasses import replace

import numpy as np
import pytest

from attnzoo.clinical.held_out import held_out
from attnzoo.clinical.outcome import Outcome
from attnzoo.clinical.splits import digest_of, fold_of_run
from attnzoo.clinical.trained import TrainedModel
from tests.helpers.clinical_data import small_cohort
from tests.helpers.clinical_models import icu_cohort, small_trained

SPLIT = {"split": "patient", "folds": 4, "fold": 1, "validation": 0.25, "split_seed": 3}


def trained_on(cohort) -> TrainedModel:
    fold = fold_of_run(cohort, SPLIT, label="mortality", labels=cohort.label("mortality"))
    made = small_trained(icu_cohort(), judged=0)
    return replace(made, outcome=Outcome(), split={**SPLIT, "digest": digest_of(cohort, fold)})


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
