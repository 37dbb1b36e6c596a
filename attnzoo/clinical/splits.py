"""Splits of a cohort: k folds with an inner validation part, by patient; or by time.

Who goes where is decided by a hash of the seed and the identifier, so it depends neither on the machine nor on the
order of the rows.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from attnzoo.clinical.cohort import Cohort
from attnzoo.errors import suggest
from attnzoo.report import counted

By = Literal["patient", "stay"]
UNLABELLED = -1


@dataclass(frozen=True)
class Fold:
    """Rows of a cohort, ascending: `train` is learned from, `validation` selects, `test` is only reported."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def folds(
    cohort: Cohort,
    k: int,
    *,
    by: By = "patient",
    label: str | Sequence[str] | None = None,
    seed: int = 0,
    validation: float = 0.125,
) -> list[Fold]:
    """k folds; every row is a test row of one of them.

    by: "patient" keeps all stays of a patient in one part. "stay" may put stays of one patient in several parts; it has
    to be asked for by name. label: a 0/1 label whose share becomes nearly equal in all parts; of several, the share of
    each of their combinations. validation: the share of what is not tested that goes to the inner validation part; may
    be 0.

    Raises ValueError for a cohort without patient identifiers unless by="stay", and for too few groups.
    """
    if k < 2:
        raise ValueError(f"k={k} folds; give 2 or more")
    if not 0 <= validation < 1:
        raise ValueError(f"validation={validation} is no share of the training rows; give 0 up to, but not, 1")
    groups, group_N = _groups(cohort, by)
    strata = _strata(cohort, label, group_N, len(groups))
    if len(groups) < k:
        raise ValueError(
            f"cohort {cohort.name!r} has {counted(len(groups), by)}, fewer than k={k} folds; give a smaller k"
        )
    order = _dealt(groups, strata, f"{seed} folds")
    fold_G = np.empty(len(groups), np.int64)
    fold_G[order] = np.arange(len(groups)) % k
    made = []
    for fold in range(k):
        rest = np.flatnonzero(fold_G != fold)
        inner = _dealt([groups[i] for i in rest], strata[rest], f"{seed} validation {fold}")
        chosen = rest[inner[_spread(len(rest), validation)]]
        part_G = np.where(fold_G == fold, 2, 0)
        part_G[chosen] = 1
        made.append(_fold_of(part_G[group_N], f"fold {fold} of cohort {cohort.name!r}"))
    return made


def fold_of_run(
    cohort: Cohort, split: Mapping[str, Any], *, label: str | Sequence[str] | None, labels: np.ndarray
) -> Fold:
    """The fold of a training run: `split` has the keys split, folds, fold, validation and split_seed, as an export's
    split has. label: as of `folds`; labels: [N, ...], rows whose labels are all NaN are left out. Raises ValueError."""
    if split["split"] == "time":
        found = time_split(cohort, validation=split["validation"])
    else:
        options = {"label": label, "seed": split["split_seed"], "validation": split["validation"]}
        found = folds(cohort, split["folds"], by=split["split"], **options)[split["fold"]]
    known_N = ~np.isnan(labels.reshape(len(labels), -1)).all(axis=1)
    return Fold(*(rows[known_N[rows]] for rows in (found.train, found.validation, found.test)))


def digest_of(cohort: Cohort, fold: Fold) -> str:
    """Of the stays of each part, by their identifiers."""
    ids = np.array(cohort.stay_ids)
    parts = [ids[rows].tolist() for rows in (fold.train, fold.validation, fold.test)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def time_split(cohort: Cohort, *, test: float = 0.3, validation: float = 0.125, gap_days: int = 0) -> Fold:
    """Tests the last `test` of each patient's dates (of all dates where patients are unknown), and validates with the
    last `validation` of those before.

    gap_days: dates closer than this before a later part are left out. Raises ValueError for a cohort without dates.
    """
    if cohort.dates is None:
        raise ValueError(f"cohort {cohort.name!r} has no dates, so it cannot be split in time; use folds")
    if not (0 < test < 1 and 0 <= validation < 1):
        raise ValueError(f"test={test}, validation={validation}: give shares between 0 and 1")
    group_N = np.zeros(len(cohort), np.int64) if cohort.patient_ids is None else _groups(cohort, "patient")[1]
    part_N = np.full(len(cohort), -1)
    for group in np.unique(group_N):
        rows = np.flatnonzero(group_N == group)
        date_R = cohort.dates[rows]
        begin_test = _last_part(date_R, test)
        before_R = date_R[date_R < begin_test - gap_days]
        begin_validation = _last_part(before_R, validation) if validation and len(before_R) else begin_test
        part_N[rows[date_R < begin_validation - gap_days]] = 0
        part_N[rows[(date_R >= begin_validation) & (date_R < begin_test - gap_days)]] = 1
        part_N[rows[date_R >= begin_test]] = 2
    return _fold_of(part_N, f"the split in time of cohort {cohort.name!r}")


def _last_part(dates: np.ndarray, share: float) -> np.datetime64:
    """The date at which the last `share` of the dates begins."""
    ordered = np.sort(dates)
    return ordered[min(int(len(ordered) * (1 - share)), len(ordered) - 1)]


def _groups(cohort: Cohort, by: str) -> tuple[list[str], np.ndarray]:
    """(identifiers of patients or stays, the place of each row's)."""
    if by not in ("patient", "stay"):
        raise ValueError(f"by={by!r} is no way to split{suggest(by, ('patient', 'stay'))}")
    ids = cohort.stay_ids if by == "stay" else cohort.patient_ids
    if ids is None:
        raise ValueError(
            f"cohort {cohort.name!r} has no patient identifiers, so its rows cannot be split by patient: stays of one "
            "patient might stand in training and test; split by stay (by='stay'; in a run task.split=stay)"
        )
    groups, group_N = np.unique(np.array(ids, dtype=str), return_inverse=True)
    return groups.tolist(), group_N


def _strata(cohort: Cohort, label: str | Sequence[str] | None, group_N: np.ndarray, groups: int) -> np.ndarray:
    """For each group the number of its combination of labels, the largest value of its rows counting: of one label 0, 1
    or UNLABELLED; all equal without a label."""
    names = [] if label is None else [label] if isinstance(label, str) else list(label)
    strata_GK = np.full((groups, len(names)), UNLABELLED)
    for column, name in enumerate(names):
        value_N = cohort.label(name)
        if value_N.ndim != 1 or not np.isin(value_N[~np.isnan(value_N)], (0, 1)).all():
            raise ValueError(f"label={name!r} is not one 0 or 1 for each row; name such a label, or none")
        np.maximum.at(strata_GK[:, column], group_N, np.nan_to_num(value_N, nan=UNLABELLED).astype(np.int64))
    return np.unique(strata_GK, axis=0, return_inverse=True)[1].reshape(groups)


def _dealt(groups: list[str], strata_G: np.ndarray, salt: str) -> np.ndarray:
    """An order of the groups: stratum after stratum, within one by hash. Dealing it out in turn is stratified."""
    hashes = [hashlib.sha256(f"{salt} {group}".encode()).digest() for group in groups]
    return np.array(sorted(range(len(groups)), key=lambda i: (strata_G[i], hashes[i])), np.int64)


def _spread(count: int, share: float) -> np.ndarray:
    """round(count * share) places, spread evenly over `count`."""
    chosen = round(count * share)
    return (np.arange(chosen) * count) // max(chosen, 1)


def _fold_of(part_N: np.ndarray, where: str) -> Fold:
    """Raises ValueError if nothing is left to learn from or to test."""
    fold = Fold(*(np.flatnonzero(part_N == part) for part in (0, 1, 2)))
    if not len(fold.train) or not len(fold.test):
        raise ValueError(
            f"{where} has {counted(len(fold.train), 'training row')} and "
            f"{counted(len(fold.test), 'test row')}; give more rows or other shares"
        )
    return fold
