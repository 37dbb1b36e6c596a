"""What is known about a trained model's predictions and told beside each of them: how frequent the outcome is, how well
its calibration is known, and whether explanations point at what the model uses.

Everything is measured on rows of the run's own fold: frequencies on training rows, the rest on the inner validation
rows. These also selected the weights, so the calibration is known a little less well than the bootstrap says.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from attnzoo.clinical import checks
from attnzoo.clinical.bootstrap import resampled_weights
from attnzoo.clinical.calibration import Calibrator, fit_calibrators
from attnzoo.clinical.calibration_rule import Fit, fit_yes_no, too_few
from attnzoo.clinical.explain import CellMap, Logit, StayCells, attention, integrated_gradients
from attnzoo.clinical.faithfulness import Ticking, faithfulness
from attnzoo.clinical.outcome import Outcome
from attnzoo.models import EhrEncoder
from attnzoo.report import counted
from attnzoo.types import build_config, checked

DRAWS = 200
"""Bootstrap samples of the stays on which a model is calibrated."""
ATTENTION, GRADIENTS = "attention", "integrated gradients"
"""Names of the maps."""
KINDS = ("without the label", "with the label")
"""How a row has a label of 0 and of 1, in words."""


@dataclass(frozen=True, kw_only=True)
class MapVerdict:
    """Whether a map of cells beats random ones, and a sentence about it; None: it could not be measured."""

    beats_random: bool | None
    words: str


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """stays: in the training part. shares: of its labels that are 1, or that lie in each bucket. calibration_stays: on
    which the model is calibrated; calibrators: fitted again to bootstrap samples of them, none for buckets.
    uncalibrated: why no calibration is applied, as the end of a sentence; None: one is, or there are buckets. maps:
    what is known about explanations, by the map's name."""

    stays: int
    shares: tuple[float, ...]
    calibration_stays: int
    calibrators: tuple[Calibrator, ...] = ()
    uncalibrated: str | None = None
    maps: Mapping[str, MapVerdict]

    def to_dict(self) -> dict[str, Any]:
        """A mapping that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Evidence":
        """What `to_dict` wrote. Raises ValueError, KeyError or TypeError for other content."""
        if set(content) | {"uncalibrated"} != {one.name for one in fields(cls)}:  # exports of before do not have it
            raise ValueError(f"evidence has the keys {', '.join(map(str, content)) or 'none'}")
        return cls(
            stays=checks.count(content["stays"], "evidence.stays", 0),
            shares=read_shares(content["shares"]),
            calibration_stays=checks.count(content["calibration_stays"], "evidence.calibration_stays", 0),
            calibrators=tuple(Calibrator.from_dict(one) for one in content["calibrators"]),
            uncalibrated=checked(content.get("uncalibrated"), str | None, "evidence.uncalibrated"),
            maps=read_verdicts(content["maps"]),
        )

    def interval(self, logits: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray] | None:
        """(low, high) of the calibrated probabilities of logits; None where nothing was drawn. It tells how well the
        calibration is known, not how models of other training runs would differ."""
        if not self.calibrators:
            return None
        drawn = np.stack([one.probabilities(logits) for one in self.calibrators])
        low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
        return low, high


def read_shares(content: Any) -> tuple[float, ...]:
    """`shares` as JSON holds them. Raises ValueError for what is no share."""
    found: tuple[float, ...] = checked(content, tuple[float, ...], "evidence.shares")
    if not found or not all(0 <= share <= 1 for share in found):
        raise ValueError(f"evidence.shares={list(found)} must be one or more numbers from 0 to 1")
    return found


def read_verdicts(content: Mapping[str, Any]) -> dict[str, MapVerdict]:
    """`maps` as JSON holds them. Raises ValueError."""
    return {name: build_config(MapVerdict, one, f"evidence.maps.{name}") for name, one in content.items()}


def shares(outcome: Outcome, labels: np.ndarray) -> tuple[float, ...]:
    """The share of known labels that are 1, or that lie in each bucket."""
    known = labels[~np.isnan(labels)]
    if not outcome.edges:
        return (float(known.mean(dtype=np.float64)),)
    buckets = np.searchsorted(outcome.edges, known, side="right")
    return tuple(float(share) for share in np.bincount(buckets, minlength=len(outcome.edges) + 1) / len(known))


def bootstrap_calibrators(
    labels: np.ndarray, logits: np.ndarray, *, draws: int = DRAWS, seed: int = 0
) -> tuple[Calibrator, ...]:
    """Calibrators of bootstrap samples of the stays. labels, logits: [N], or [N, T] with NaN in hours that have no
    label; hours of one stay are drawn together. Samples that hold one class only are left out."""
    known = ~np.isnan(labels)
    return tuple(fit_calibrators(labels[known], logits[known], _drawn(known, draws, seed)))


def _drawn(known: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Weights [draws, known labels] of bootstrap samples of the stays. known: [N] or [N, T]."""
    rows = np.broadcast_to(np.arange(len(known)).reshape(-1, *[1] * (known.ndim - 1)), known.shape)
    return np.concatenate(list(resampled_weights(rows[known], draws, seed)))


def calibrate(labels: np.ndarray, logits: np.ndarray, *, draws: int = DRAWS, seed: int = 0) -> Fit:
    """Of a yes or no. labels, logits: as of `bootstrap_calibrators`. Hours of one stay tell nearly the same, so that
    stays are counted: those with an hour of the kind."""
    hours_NT, known = labels.reshape(len(labels), -1), ~np.isnan(labels)
    counts = {name: int((hours_NT == kind).any(1).sum()) for kind, name in enumerate(KINDS)}
    refused = too_few(counts, numbers=2, row="stay")
    if refused is not None:
        return Fit(refused=refused)
    return fit_yes_no(labels[known], logits[known], _drawn(known, draws, seed))


def measure(
    outcome: Outcome, training_labels: np.ndarray, stays: int, fit: Fit, maps: Mapping[str, MapVerdict]
) -> Evidence:
    """The evidence. stays: of the inner validation part; fit: of the calibration to them. maps: as `judge_maps` gives
    them."""
    return Evidence(
        stays=len(training_labels),
        shares=shares(outcome, training_labels),
        calibration_stays=stays,
        calibrators=fit.drawn,
        uncalibrated=fit.refused,
        maps=maps,
    )


def judge_maps(
    model: EhrEncoder, outcome: Outcome, stays: StayCells, tick: Callable[[], object] = lambda: None
) -> dict[str, MapVerdict]:
    """Whether each map points at what the model uses, on these stays. tick: as of
    `attnzoo.clinical.faithfulness.Ticking`."""
    logit = Logit(model, output=outcome.outputs // 2)
    maps: list[CellMap] = []
    found: dict[str, MapVerdict] = {}
    for name, explain in {GRADIENTS: integrated_gradients, ATTENTION: _attention}.items():
        try:
            maps.append(explain(logit, stays))
        except ValueError as error:
            found[name] = MapVerdict(beats_random=None, words=f"{name} could not be measured: {error}")
    for name, one in faithfulness(Ticking(logit, tick), stays, maps).items():
        found[name] = MapVerdict(beats_random=one.beats_random, words=f"On {counted(len(stays), 'stay')} {one.words}")
    return {name: found[name] for name in (GRADIENTS, ATTENTION)}


def _attention(logit: Logit, stays: StayCells) -> CellMap:
    assert isinstance(logit.model, EhrEncoder)
    return attention(logit.model, stays)
