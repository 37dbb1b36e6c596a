"""The test part of a training run, which the run did not look at: the rows that its figures may be told of."""

import numpy as np

from attnzoo.clinical.cohort import Cohort
from attnzoo.clinical.splits import digest_of, fold_of_run
from attnzoo.clinical.trained import TrainedModel
from attnzoo.clinical.trained_ldam import TrainedLdam


def held_out(trained: TrainedModel | TrainedLdam, cohort: Cohort) -> np.ndarray:
    """Rows of the cohort that the run left out, split as it did. Raises ValueError where ids or parts of the stays are
    not the run's: rows may then be those that the model has learned from. Values are not compared, so load the data
    with the run's options (`trained.data`)."""
    split = trained.split
    if "digest" not in split:
        raise ValueError("the export does not say how its run split the data; give one that a run has written")
    if isinstance(trained, TrainedLdam):
        label: tuple[str, ...] | str | None = trained.labels
        labels = np.stack([cohort.label(name) for name in trained.labels], axis=1)
    else:
        label = None if trained.outcome.edges else trained.outcome.label
        labels = trained.outcome.labels(cohort)
    fold = fold_of_run(cohort, split, label=label, labels=labels)
    if digest_of(cohort, fold) != split["digest"]:
        raise ValueError(
            f"cohort {cohort.name!r} is not the one that the run split; load the same data with the same options, "
            f"{trained.data}"
        )
    return fold.test
