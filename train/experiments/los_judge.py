"""What experiment L claims: predictions of remaining length of stay, of the test stays of all folds together.

An hour is a row, and hours of one stay are alike, so that intervals are by a bootstrap over stays.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from attnzoo.clinical.agreement import weighted_kappa
from attnzoo.clinical.bootstrap import Interval, interval, paired_difference
from attnzoo.clinical.metrics import Metric, mean_absolute_deviation
from train.experiments.base import ExperimentConfig, Judgement, Values

ATTENTION, GRU, HOUR = "TSCAN", "GRU", "hour of the stay alone"
MODELS = (HOUR, GRU, ATTENTION)
RESAMPLES = 1000
PERIODS = ((0, 24), (24, 72), (72, 169))
"""Hours since admission that are judged apart."""
EXPECTED_KAPPA = 0.2
NOT_CHECKED = (
    ("TSCAN on MIMIC-IV, linear kappa", "0.451", "MIMIC-IV is not open; formats yaib and mimic read it"),
    ("a split by patient", "", "the table names no patients: stays of one may be in several parts"),
    (
        "remaining stays above 168 hours",
        "",
        "the table caps them at 168, so that the last three of ten buckets are one",
    ),
    ("other hospitals, later years", "", "no external validation"),
)


@dataclass(frozen=True)
class Pooled:
    """One model's predictions of the labelled hours of all stays: each stay by the model of the fold that tested it.

    K hours: the row of the stay, hours since admission, remaining hours and their bucket, the bucket that was told, and
    its typical remaining hours.
    """

    stays_K: np.ndarray
    hours_K: np.ndarray
    remaining_K: np.ndarray
    true_K: np.ndarray
    told_K: np.ndarray
    typical_K: np.ndarray
    categories: int

    @classmethod
    def of(cls, folds: Sequence[Values]) -> "Pooled":
        """Puts folds together, in the order of stays and hours."""
        names = ("stays", "hours", "remaining", "buckets", "typical")
        stays_K, hours_K, remaining_K, told_K, typical_K = (
            np.concatenate([np.array(fold[name]) for fold in folds]) for name in names
        )
        edges, order = folds[0]["edges"], np.lexsort((hours_K, stays_K))
        true_K = np.searchsorted(edges, remaining_K, side="right")
        whole = cls(stays_K, hours_K, remaining_K, true_K, told_K, typical_K, len(edges) + 1)
        return whole.where(order)

    def where(self, chosen_K: np.ndarray) -> "Pooled":
        """Some of the hours, or all in another order."""
        columns = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "categories"}
        return replace(self, **{name: column_K[chosen_K] for name, column_K in columns.items()})

    @property
    def kappa(self) -> Metric:
        """Linear-weighted kappa over all buckets."""
        return weighted_kappa(range(self.categories), "linear")

    def interval(self, what: str, resamples: int) -> Interval:
        """what: "kappa", or "mad" in hours."""
        metric, pairs = self._measured(what)
        return interval(metric, *pairs, self.stays_K, resamples=resamples)

    def less(self, other: "Pooled", what: str, resamples: int) -> Interval:
        """This model's figure less the other's, of the same hours."""
        metric, (true, mine) = self._measured(what)
        _, (_, theirs) = other._measured(what)
        return paired_difference(metric, true, mine, theirs, self.stays_K, resamples=resamples)

    def _measured(self, what: str) -> tuple[Metric, tuple[np.ndarray, np.ndarray]]:
        if what == "kappa":
            return self.kappa, (self.true_K, self.told_K)
        return mean_absolute_deviation, (self.remaining_K, self.typical_K)


def pooled(values: dict[str, Values]) -> dict[str, Pooled]:
    """The predictions of every model, of the same hours. Raises ValueError where they are of other hours."""
    found = {name: Pooled.of([part for key, part in values.items() if key.startswith(f"{name}, ")]) for name in MODELS}
    first = found[MODELS[0]]
    for name, each in found.items():
        same = np.array_equal(each.stays_K, first.stays_K) and np.array_equal(each.hours_K, first.hours_K)
        if not same or len(each.stays_K) != len(np.unique(each.stays_K * 10_000 + each.hours_K)):
            raise ValueError(f"{name} was not tested once on each hour that {MODELS[0]} was tested on")
    return found


def judge(config: ExperimentConfig, values: dict[str, Values]) -> Judgement:
    """The claims L1 and L2, and the tables."""
    found, out = pooled(values), Judgement()
    resamples = 100 if config.quick else RESAMPLES
    of_model = {
        name: {what: each.interval(what, resamples) for what in ("kappa", "mad")} for name, each in found.items()
    }
    mine = found[ATTENTION]
    above = {(name, what): mine.less(found[name], what, resamples) for name in (GRU, HOUR) for what in ("kappa", "mad")}
    out.add("L1 linear kappa of TSCAN", EXPECTED_KAPPA, of_model[ATTENTION]["kappa"].value, 0.0, "at_least")
    out.add("L2 linear kappa of TSCAN less the GRU's", 0.0, above[GRU, "kappa"].value, 0.0, "at_least")
    out.add("L2 low bound of that difference", 0.0, above[GRU, "kappa"].low, 0.0, "at_least")
    out.table(
        "L: models",
        [
            {"model": name, "linear kappa": str(of["kappa"]), "MAD, hours": str(of["mad"])} | _of_folds(name, values)
            for name, of in of_model.items()
        ],
    )
    pairs = [(GRU, "kappa"), (GRU, "mad"), (HOUR, "kappa"), (HOUR, "mad")]
    named = {"kappa": "linear kappa", "mad": "MAD, hours"}
    rows = [
        {"what": f"{named[what]}: TSCAN less {name}", "value": above[name, what].value}
        | {"low": above[name, what].low, "high": above[name, what].high}
        for name, what in pairs
    ]
    out.table("L: paired differences", rows)
    _tell_periods(out, found, resamples)
    out.table("L: buckets", _told_buckets(mine))
    rows = [{"what": what, "published": published, "why not": why} for what, published, why in NOT_CHECKED]
    out.table("L: what is not checked here", rows)
    return out


def _of_folds(name: str, values: dict[str, Values]) -> dict[str, object]:
    runs = [part for key, part in values.items() if key.startswith(f"{name}, ")]
    inner = [run["inner"] for run in runs if "inner" in run]
    if not inner:
        return {"kappa by fold": _kappas(runs)}
    return {
        "kappa by fold": _kappas(runs),
        "inner kappa by fold": " ".join(f"{kappa:.3f}" for kappa in inner),
        "weights": runs[0]["weights"],
    }


def _kappas(runs: Sequence[Values]) -> str:
    each = [Pooled.of([run]) for run in runs]
    return " ".join(f"{one.kappa(one.true_K, one.told_K):.3f}" for one in each)


def _tell_periods(out: Judgement, found: dict[str, Pooled], resamples: int) -> None:
    rows = []
    for first, end in PERIODS:
        some = {name: each.where((each.hours_K >= first) & (each.hours_K < end)) for name, each in found.items()}
        one = some[ATTENTION]
        if len(np.unique(one.stays_K)) < 2:
            continue
        row = {"hours since admission": f"{first} to {end - 1}", "stays": len(np.unique(one.stays_K))}
        rows.append({**row, **{name: str(each.interval("kappa", resamples)) for name, each in some.items()}})
    out.table("L: linear kappa by time since admission", rows)


def _told_buckets(one: Pooled) -> list[dict[str, object]]:
    """How often each bucket is right, and how often it is told."""
    return [
        {
            "bucket": bucket,
            "hours in it": int((one.true_K == bucket).sum()),
            "told by TSCAN": int((one.told_K == bucket).sum()),
            "stays with such an hour": len(np.unique(one.stays_K[one.true_K == bucket])),
        }
        for bucket in range(one.categories)
    ]
