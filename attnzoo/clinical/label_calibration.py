"""Calibration of a model that tells the logits of several labels, and how well it is known.

Labels that exclude one another share one temperature, so that their probabilities still add up to 1. Other labels have
a temperature and an intercept each, by `attnzoo.clinical.calibration`. What `attnzoo.clinical.calibration_rule` refuses
is left as the model tells it. Letters: N rows, K labels, R weightings of the rows, D bootstrap samples.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from attnzoo.clinical import checks
from attnzoo.clinical.bootstrap import NUMBERS_AT_ONCE, resampled_weights
from attnzoo.clinical.calibration import TEMPERATURES, Calibrator, sigmoid
from attnzoo.clinical.calibration_rule import Fit, Seen, fit_yes_no, judged, too_few
from attnzoo.clinical.checks import Array
from attnzoo.types import checked

DRAWS = 200
"""Bootstrap samples of the rows on which a model is calibrated."""
HALVINGS = 36


def softmax(logits: Array) -> Array:
    """Over the last axis, without overflow."""
    raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    found: Array = raised / raised.sum(axis=-1, keepdims=True)
    return found


@dataclass(frozen=True, kw_only=True)
class LabelCalibration:
    """rows: on which it was fitted. calibrators: one for all labels where they exclude one another (`exclusive`), else
    one a label, None where none is applied. drawn: for each of these, calibrators of bootstrap samples of the rows.
    refused: for each, why none is applied, as the end of a sentence; empty in exports of before it was said. Raises
    ValueError."""

    exclusive: bool
    rows: int
    calibrators: tuple[Calibrator | None, ...]
    drawn: tuple[tuple[Calibrator, ...], ...]
    refused: tuple[str | None, ...] = ()

    def __post_init__(self) -> None:
        if not self.calibrators or len(self.drawn) != len(self.calibrators):
            raise ValueError(f"drawn has {len(self.drawn)} entries for {len(self.calibrators)} calibrators")
        if self.exclusive and len(self.calibrators) != 1:
            raise ValueError("labels that exclude one another have one calibrator, with its temperature for all")
        if self.refused and len(self.refused) != len(self.calibrators):
            raise ValueError(f"refused has {len(self.refused)} entries for {len(self.calibrators)} calibrators")

    def logits(self, logits_NK: ArrayLike) -> Array:
        """Calibrated logits [N, K], float64."""
        given_NK = self._given(logits_NK)
        each = self.calibrators * (given_NK.shape[1] if self.exclusive else 1)
        columns = [x_N if one is None else one.logits(x_N) for one, x_N in zip(each, given_NK.T, strict=True)]
        return np.stack(columns, axis=1) if columns else given_NK

    def probabilities(self, logits_NK: ArrayLike) -> Array:
        """Calibrated probabilities [N, K], float64."""
        found_NK = self.logits(logits_NK)
        return softmax(found_NK) if self.exclusive else sigmoid(found_NK)

    def interval(self, logits_NK: ArrayLike, level: float = 0.95) -> tuple[Array, Array]:
        """(low, high) [N, K] of the calibrated probabilities; NaN where nothing was drawn. It tells how well the
        calibration is known, not how models of other training runs would differ."""
        checks.fraction(level, "level")
        given_NK, ends = self._given(logits_NK), [(1 - level) / 2, (1 + level) / 2]
        if self.exclusive and self.drawn[0]:
            drawn_DNK = np.stack([softmax(one.logits(given_NK)) for one in self.drawn[0]])
            low_NK, high_NK = np.quantile(drawn_DNK, ends, axis=0)
            return low_NK, high_NK
        found_2NK = np.full((2, *given_NK.shape), np.nan)
        for label, drawn in enumerate(self.drawn):
            if drawn:
                of_label_DN = np.stack([one.probabilities(given_NK[:, label]) for one in drawn])
                found_2NK[:, :, label] = np.quantile(of_label_DN, ends, axis=0)
        return found_2NK[0], found_2NK[1]

    def _given(self, logits_NK: ArrayLike) -> Array:
        """The logits [N, K], float64. Raises ValueError for another shape."""
        given_NK = checks.numbers(logits_NK, "logits")
        labels = given_NK.shape[-1] if self.exclusive and given_NK.ndim == 2 else len(self.calibrators)
        if given_NK.ndim != 2 or given_NK.shape[1] != labels:
            raise ValueError(f"logits has shape {given_NK.shape}; it must be [rows, labels], of {labels} labels")
        return given_NK

    def to_dict(self) -> dict[str, Any]:
        """A mapping that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "LabelCalibration":
        """What `to_dict` wrote. Raises ValueError, KeyError or TypeError for other content."""
        if set(content) | {"refused"} != {one.name for one in fields(cls)}:
            raise ValueError(f"a calibration of labels has the keys {', '.join(map(str, content)) or 'none'}")
        return cls(
            exclusive=bool(content["exclusive"]),
            rows=int(content["rows"]),
            calibrators=tuple(None if one is None else Calibrator.from_dict(one) for one in content["calibrators"]),
            drawn=tuple(tuple(Calibrator.from_dict(one) for one in some) for some in content["drawn"]),
            refused=checked(content.get("refused", ()), tuple[str | None, ...], "calibration.refused"),
        )


def fit_label_calibration(
    labels_NK: ArrayLike, logits_NK: ArrayLike, *, exclusive: bool, draws: int = DRAWS, seed: int = 0, row: str = "row"
) -> LabelCalibration:
    """Of rows that neither trained the model nor are measured. labels_NK: 0 or 1; with exclusive ones, one 1 in each
    row. row: what one is called. Raises ValueError."""
    known_NK, given_NK = checks.many_labels(labels_NK, logits_NK)
    weights_RN = np.concatenate(list(resampled_weights(np.arange(len(known_NK)), draws, seed)))
    if exclusive:
        all_RN = np.concatenate([np.ones((1, len(known_NK))), weights_RN])
        first, *drawn = fit_temperatures(known_NK, given_NK, all_RN)
        refused = too_few({"": len(known_NK)}, numbers=1, row=row)
        within_NK = given_NK - given_NK.mean(axis=1, keepdims=True)  # what a softmax sees
        seen = Seen.of(within_NK, _separated(known_NK, given_NK, all_RN))
        fits = [judged(first, drawn, seen) if refused is None else Fit(refused=refused)]
    else:
        fits = [_fit(*columns, weights_RN, row) for columns in zip(known_NK.T, given_NK.T, strict=True)]
    return LabelCalibration(
        exclusive=exclusive,
        rows=len(known_NK),
        calibrators=tuple(one.calibrator for one in fits),
        drawn=tuple(one.drawn for one in fits),
        refused=tuple(one.refused for one in fits),
    )


def _fit(label_N: Array, logit_N: Array, weights_RN: Array, row: str) -> Fit:
    """Of one label by itself."""
    with_it = int(label_N.sum())
    refused = too_few({"without the label": len(label_N) - with_it, "with the label": with_it}, numbers=2, row=row)
    if refused is not None:
        return Fit(refused=refused)
    return fit_yes_no(label_N, logit_N, weights_RN)


def _separated(labels_NK: Array, logits_NK: Array, weights_RN: Array) -> Array:
    """Whether every row that has weight has the largest logit at its label, for each weighting [R]."""
    of_label_N = (labels_NK * logits_NK).sum(axis=1)
    largest_other_N = np.where(labels_NK == 1, -np.inf, logits_NK).max(axis=1)
    found_R: Array = (weights_RN * (of_label_N <= largest_other_N)).sum(axis=1) == 0
    return found_R


def fit_temperatures(labels_NK: Array, logits_NK: Array, weights_RN: Array) -> list[Calibrator]:
    """The temperature of greatest likelihood of a softmax, within `TEMPERATURES`, for each weighting of the rows.

    The likelihood is concave in s = 1 / temperature, and its slope is sum_n w_n (z_n,y - E_p z_n): the root is found by
    halving. Where every row's label has the largest logit there is no root, and the temperature is the least: it is not
    left to the slope, which rounds to 0 where softmax rounds to 1. Raises ValueError for logits that are not finite,
    and for rows without exactly one label.
    """
    if labels_NK.shape != logits_NK.shape or not (labels_NK.sum(axis=1) == 1).all():
        raise ValueError(f"labels {labels_NK.shape} must have exactly one 1 in each row, as logits {logits_NK.shape}")
    if not np.isfinite(logits_NK).all():
        raise ValueError("logits hold numbers that are not finite")
    of_label_N = (labels_NK * logits_NK).sum(axis=1)
    separated_R = _separated(labels_NK, logits_NK, weights_RN)
    high_R = np.full(len(weights_RN), 1.0 / TEMPERATURES[0])
    low_R = np.where(separated_R, high_R, 1.0 / TEMPERATURES[1])
    blocks = min(len(weights_RN), 1 + len(weights_RN) * logits_NK.size // NUMBERS_AT_ONCE)
    for _ in range(HALVINGS):
        s_R = (low_R + high_R) / 2
        expected_RN = np.concatenate(
            [(softmax(s_S[:, None, None] * logits_NK) * logits_NK).sum(axis=-1) for s_S in np.array_split(s_R, blocks)]
        )
        rises_R = (weights_RN * (of_label_N - expected_RN)).sum(axis=1) > 0
        low_R, high_R = np.where(rises_R, s_R, low_R), np.where(rises_R, high_R, s_R)
    return [Calibrator(temperature=float(2.0 / (low + high))) for low, high in zip(low_R, high_R, strict=True)]
