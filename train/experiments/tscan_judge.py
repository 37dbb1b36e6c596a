"""What experiment T claims: TSCAN's predictions of all test rows together, beside those of other models.

Logits are calibrated by temperature and intercept on the inner validation rows of their fold, as a run's export is.
Intervals are by a bootstrap over stays, because the data set does not tell patients.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnzoo.clinical.bootstrap import Interval, interval, paired_difference, subgroup_intervals
from attnzoo.clinical.calibration import (
    Calibrator,
    calibration_intercept,
    calibration_slope,
    expected_calibration_error,
    fit_calibrator,
    observed_to_expected,
)
from attnzoo.clinical.metrics import (
    Metric,
    auprc,
    auroc,
    brier,
    decision_curve,
    precision_at,
    scaled_brier,
    score_1,
    sensitivity_at,
)
from train.experiments.base import ExperimentConfig, Judgement, Values

ENSEMBLE = "ensemble"
TSCAN, TEMPORAL, SPATIAL = "TSCAN", "TSCAN, temporal branch", "TSCAN, spatial branch"
LIGHTGBM, WITH_INNER, SEEDS = "LightGBM", "LightGBM, inner rows too", "TSCAN, mean of seeds"
ATTENTION, HEAD = "TSCAN without the summary head", "TSCAN, summary head alone"
STACK = "stack of TSCAN and LightGBM"
ARMS = {"both": TSCAN, "temporal": TEMPORAL, "spatial": SPATIAL, "attention": ATTENTION}
BASELINES = ("logistic regression", LIGHTGBM, WITH_INNER, "GRU")
MARGIN = 0.01
"""How much lower AUROC may be and still count as no worse."""
MINUTES, MEBIBYTES = 15.0, 3072.0
FEWEST = 10
"""Deaths, and survivors, of a group that is measured apart."""
WITH_INTERVAL = (auroc, auprc, score_1, brier)
PLAIN = (
    calibration_slope,
    calibration_intercept,
    expected_calibration_error,
    observed_to_expected,
    sensitivity_at(0.9),
    precision_at(0.9),
)
SHOWN_THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
NOT_CHECKED = (
    ("TSCAN on MIMIC-IV: AUROC of death in hospital", "0.907", "MIMIC-IV is not open; formats yaib and mimic read it"),
    ("TSCAN on MIMIC-IV: linear kappa of length of stay", "0.451", "MIMIC-IV is not open"),
    ("a split by patient", "", "the data set does not tell which stays are of one patient: the split is by stay"),
    ("other hospitals, later years", "", "one set of one challenge; no external validation"),
)


@dataclass(frozen=True)
class Told:
    """What a model told of a fold: logits of its test rows and of its inner validation rows."""

    rows: np.ndarray
    test: np.ndarray
    validation: np.ndarray

    @classmethod
    def of(cls, values: Values) -> "Told":
        return cls(np.array(values["rows"]), np.array(values["test"]), np.array(values["validation"]))


class Stays:
    """The stays with their outcomes, and calibration on the inner validation rows of each fold."""

    def __init__(self, values: Values) -> None:
        self.labels = np.array(values["labels"])
        self.groups = {name: np.array(groups) for name, groups in values["groups"].items()}
        self._validation = [np.array(rows) for rows in values["validation"]]

    def calibrators(self, folds: Sequence[Told]) -> list[Calibrator]:
        """Those of each fold."""
        pairs = zip(self._validation, folds, strict=True)
        return [fit_calibrator(self.labels[rows], told.validation) for rows, told in pairs]

    def calibrated(self, folds: Sequence[Told]) -> list[Told]:
        """Calibrated logits."""
        pairs = zip(self.calibrators(folds), folds, strict=True)
        return [Told(told.rows, fitted.logits(told.test), fitted.logits(told.validation)) for fitted, told in pairs]

    def mean(self, *models: Sequence[Told]) -> list[Told]:
        """The mean of calibrated logits, calibrated again: a mean of models that disagree is too cautious."""
        found = []
        for members in zip(*models, strict=True):
            test, validation = ([getattr(each, part) for each in members] for part in ("test", "validation"))
            found.append(Told(members[0].rows, np.mean(test, axis=0), np.mean(validation, axis=0)))
        return self.calibrated(found)

    def pooled(self, folds: Sequence[Told]) -> np.ndarray:
        """Probabilities of all stays, each by the model of the fold that tested it."""
        found = np.full(len(self.labels), np.nan)
        for told in folds:
            found[told.rows] = Calibrator().probabilities(told.test)
        return found


def predictions(values: dict[str, Values]) -> tuple[Stays, dict[str, list[Told]]]:
    """(the stays, calibrated logits of every model by fold). The model that learned from the inner rows too cannot be
    calibrated on them, and is as it is."""
    stays, found = Stays(values["stays"]), {}
    of_folds = [values[name] for name in values if name.startswith("baselines, ")]
    for name in BASELINES:
        told = [Told.of(each[name]) for each in of_folds]
        found[name] = told if name == WITH_INNER else stays.calibrated(told)
    by_seed: dict[str, list[list[Told]]] = {}
    for arm, name in ARMS.items():
        kinds = {part.rpartition(", fold ")[0] for part in values if part.startswith(f"{arm}, seed ")}
        for kind in sorted(kinds, key=lambda each: int(each.rpartition(" ")[2])):
            told = [Told.of(values[part]) for part in values if part.startswith(f"{kind}, fold ")]
            by_seed.setdefault(name, []).append(stays.calibrated(told))
        found[name] = by_seed[name][0]
    heads = [Told.of(run["head"]) for part, run in values.items() if part.startswith("both, seed ")]
    found[HEAD] = stays.calibrated(heads[: len(of_folds)])
    if len(by_seed[TSCAN]) > 1:
        found[SEEDS] = stays.mean(*by_seed[TSCAN])
    found[STACK] = stays.mean(found[TSCAN], found[LIGHTGBM])
    order = [*BASELINES, HEAD, ATTENTION, TEMPORAL, SPATIAL, TSCAN, SEEDS, STACK]
    return stays, {name: found[name] for name in order if name in found}


class ModelTable:
    """Metrics of the models on all stays, with their intervals."""

    def __init__(self, stays: Stays, models: dict[str, list[Told]], resamples: int) -> None:
        self.labels, self.resamples = stays.labels, resamples
        self.found = {name: stays.pooled(folds) for name, folds in models.items()}
        self._patients = np.arange(len(self.labels))

    def interval(self, metric: Metric, model: str) -> Interval:
        """Of one model."""
        return interval(metric, self.labels, self.found[model], self._patients, resamples=self.resamples)

    def difference(self, metric: Metric, first: str, second: str) -> Interval:
        """first less second, on the same stays."""
        pair = (self.found[first], self.found[second])
        return paired_difference(metric, self.labels, *pair, self._patients, resamples=self.resamples)

    def groups(self, metric: Metric, model: str, groups: np.ndarray) -> dict[str, Interval | str]:
        """Of the stays of each group."""
        given = (self.labels, self.found[model], self._patients, groups)
        return subgroup_intervals(metric, *given, resamples=self.resamples)


def judge(config: ExperimentConfig, values: dict[str, Values]) -> Judgement:
    """The claims T1 to T6 and the tables."""
    stays, models = predictions(values)
    table, out = ModelTable(stays, models, 100 if config.quick else 1000), Judgement()
    _judge_one_seed(out, table)
    _judge_pairs(out, table)
    _judge_cost(out, values, config.seed)
    if SEEDS in table.found:
        one = table.found[SEEDS]
        for metric, bar in ((auroc, 0.855), (auprc, 0.51), (score_1, 0.5)):
            out.add(f"T6 mean of seeds: {metric.name}", bar, metric(table.labels, one), 0.0, "at_least")
    _tell_groups(out, table, stays)
    _tell_benefit(out, table)
    _tell_folds(out, stays, models, values)
    rows = [{"what": what, "published": published, "why not": why} for what, published, why in NOT_CHECKED]
    out.table("T: what is not checked here", rows)
    return out


def _judge_one_seed(out: Judgement, table: ModelTable) -> None:
    labels, one = table.labels, table.found[TSCAN]
    out.add("T1 one seed: AUROC", 0.85, auroc(labels, one), 0.0, "at_least")
    out.add("T1 one seed: AUPRC", 0.49, auprc(labels, one), 0.0, "at_least")
    out.add("T2 one seed: Brier", 0.092, brier(labels, one), 0.0, "at_most")
    out.add("T2 one seed: ECE", 0.02, expected_calibration_error(labels, one), 0.0, "at_most")
    out.add("T2 one seed: calibration slope", 1.0, calibration_slope(labels, one), 0.1, "equal")
    rows = []
    for name, found in table.found.items():
        told = {metric.name: str(table.interval(metric, name)) for metric in WITH_INTERVAL}
        rows.append({"model": name, **told, **{metric.name: metric(labels, found) for metric in PLAIN}})
    out.table("T: models", rows)
    every = (*WITH_INTERVAL, scaled_brier, *PLAIN)
    out.table("T: TSCAN, one seed", [_row(table.interval(metric, TSCAN)) for metric in every])


def _row(found: Interval) -> dict[str, Any]:
    return {"what": found.name, "value": found.value, "low": found.low, "high": found.high}


def _judge_pairs(out: Judgement, table: ModelTable) -> None:
    others = (TEMPORAL, SPATIAL, HEAD, ATTENTION, LIGHTGBM, WITH_INNER, "logistic regression", "GRU")
    pairs = [(TSCAN, other) for other in others] + [(STACK, LIGHTGBM), (STACK, TSCAN)]
    pairs += [(SEEDS, LIGHTGBM), (SEEDS, WITH_INNER)] if SEEDS in table.found else []
    found = {pair: table.difference(auroc, *pair) for pair in pairs}
    for other in (TEMPORAL, SPATIAL):
        name = f"T3 AUROC above the {other.removeprefix('TSCAN, ')} alone, low bound"
        out.add(name, 0.0, found[TSCAN, other].low, 0.0, "at_least")
    for other in (LIGHTGBM, WITH_INNER):
        out.add(f"T4 AUROC less that of {other}, low bound", -MARGIN, found[TSCAN, other].low, 0.0, "at_least")
    rows = [
        {"first": first, "second": second, "AUROC": str(of_auroc), "AUPRC": str(table.difference(auprc, first, second))}
        for (first, second), of_auroc in found.items()
    ]
    out.table("T: first less second", rows)


def _judge_cost(out: Judgement, values: dict[str, Values], seed: int) -> None:
    kinds: dict[str, list[Values]] = {}
    for part, found in values.items():
        if ", seed " in part:
            kinds.setdefault(part.rpartition(", fold ")[0], []).append(found)
    rows = []
    for kind, runs in kinds.items():
        seconds = [run["seconds"] for run in runs]
        row = {"what": kind, "runs": len(runs), "minutes, two at a time": two_at_a_time(seconds) / 60}
        rows.append({**row, "peak MiB of a run": max(run["peak_mib"] for run in runs)})
    of_folds = [found for part, found in values.items() if part.startswith("baselines, ")]
    for name in BASELINES:
        seconds = [found[name]["seconds"] for found in of_folds]
        rows.append({"what": name, "runs": len(seconds), "minutes, two at a time": two_at_a_time(seconds) / 60})
    out.table("T: time and memory", rows)
    own = next(row for row in rows if row["what"] == f"both, seed {seed}")
    out.add("T5 minutes of all folds of one seed", MINUTES, own["minutes, two at a time"], 0.0, "at_most")
    out.add("T5 peak MiB of two runs", MEBIBYTES, 2 * own["peak MiB of a run"], 0.0, "at_most")


def two_at_a_time(seconds: Sequence[float]) -> float:
    """How long runs take on two cores, one a core, each begun when a core is free."""
    lanes = [0.0, 0.0]
    for run in seconds:
        lanes[lanes.index(min(lanes))] += run
    return max(lanes)


def _tell_groups(out: Judgement, table: ModelTable, stays: Stays) -> None:
    rows = []
    for kind, groups in stays.groups.items():
        of_auroc, of_auprc = (table.groups(metric, TSCAN, groups) for metric in (auroc, auprc))
        of_ratio = table.groups(observed_to_expected, TSCAN, groups)
        for group, found in of_auroc.items():
            here = groups == group
            stays_here, deaths = int(here.sum()), int(table.labels[here].sum())
            row = {"group": f"{kind}: {group}", "stays": stays_here, "deaths": deaths}
            told = {"AUROC": found, "AUPRC": of_auprc[group], "observed / expected": of_ratio[group]}
            some = min(deaths, stays_here - deaths) >= FEWEST
            rows.append({**row, **{name: str(each) if some else "too few" for name, each in told.items()}})
    out.table("T: TSCAN by group", rows)


def _tell_benefit(out: Judgement, table: ModelTable) -> None:
    curves = {name: decision_curve(table.labels, table.found[name], SHOWN_THRESHOLDS) for name in (TSCAN, LIGHTGBM)}
    rows = [
        {"act from a risk of": at, **{name: curve.model[i] for name, curve in curves.items()}}
        | {"for everybody": curves[TSCAN].treat_all[i]}
        for i, at in enumerate(SHOWN_THRESHOLDS)
    ]
    out.table("T: net benefit", rows)


def _tell_folds(out: Judgement, stays: Stays, models: dict[str, list[Told]], values: dict[str, Values]) -> None:
    raw = [Told.of(values[part]) for part in values if part.startswith("both, seed ")][: len(models[TSCAN])]
    rows = []
    for fold, (told, other, fitted) in enumerate(
        zip(models[TSCAN], models[LIGHTGBM], stays.calibrators(raw), strict=True)
    ):
        labels = stays.labels[told.rows]
        row = {"fold": fold, "stays": len(labels), "deaths": int(labels.sum())}
        scores = {TSCAN: auroc(labels, told.test), LIGHTGBM: auroc(labels, other.test)}
        rows.append({**row, **{f"AUROC of {name}": found for name, found in scores.items()}, **fitted.to_dict()})
    out.table("T: folds", rows)
