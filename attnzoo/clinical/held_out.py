"""The test part of a training run, which the run did not look at: the rows that its figures may be told of."""

import warnings

import numpy as np

from attnzoo.clinical.cohort import Cohort
from attnzoo.clinical.content import content_digests
from attnzoo.clinical.splits import digest_of, fold_of_run
from attnzoo.clinical.trained import TrainedModel
from attnzoo.clinical.trained_ldam import TrainedLdam


def held_out(trained: TrainedModel | TrainedLdam, cohort: Cohort) -> np.ndarray:
    """Rows of the cohort that the run left out, split as it did. Raises ValueError where stays, parts, labels or values
    are not the run's: rows may then be those that the model has learned from, and figures those of other data. Of an
    export of before values were recorded, warns that they are not compared."""
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
    if "content" not in split:
        warnings.warn(
            "the export is of before values were recorded: the cohort's stays are those of the run, and whether their "
            "values and labels are is not known; load the data with the run's options, or train anew",
            stacklevel=2,
        )
        return fold.test
    found, known = content_digests(cohort, labels), split["content"]
    other = [name for name in sorted(found.keys() | known.keys()) if found.get(name) != known.get(name)]
    if other:
        raise ValueError(
            f"cohort {cohort.name!r} has the stays of the run and other {', '.join(other)}: its figures would be those "
            f"of other data; load the same files with the same options, {trained.data}, or train anew on these"
        )
    return fold.test
