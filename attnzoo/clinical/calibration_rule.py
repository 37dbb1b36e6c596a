"""When a calibration may be applied: the one rule for models of stays and of texts.

A fit finds numbers (temperature; temperature and intercept) by greatest likelihood. It is refused, and predictions are
as the model tells them, without an interval, where

- there are fewer than `FOR_EACH_NUMBER` rows for each number, of a yes or no as many of either class: with fewer,
  the fit follows the accidents of single rows (the usual rule of ten events for each fitted number);
- the logits are all alike but for their rounding (`ALIKE`): a model that tells nothing apart has no slope, and its
  predictions would be the base rate, said as if they were of the row;
- no temperature within `attnzoo.clinical.calibration.TEMPERATURES` is the best, so that a bound was taken: the classes
  are separated, and any certainty fits them; or the logits differ too little; or they rank the classes the wrong way
  round or are far too large;
- more than `MOST_SEPARATED` of the bootstrap samples have the least temperature, because they are separated or their
  logits differ too little: an end of the 95 % interval, which leaves out as many on either side, would be the bound's.
  Samples at the other bound stay: they make a model less sure, not more.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from attnzoo.clinical.calibration import TEMPERATURES, Calibrator, fit_calibrators, separated
from attnzoo.clinical.checks import Array
from attnzoo.report import counted

FOR_EACH_NUMBER = 10
MOST_SEPARATED = 0.025
ALIKE = 1e-6
"""Standard deviation of logits, as a share of the largest or of 1, that is their rounding in float32."""
NEAR = 1e-6
"""The relative distance at which a temperature counts as a bound: a bound that was found by halving is not exact."""


class Fit(NamedTuple):
    """calibrator: fitted to rows; drawn: to bootstrap samples of them. refused: why neither is applied, as the end of a
    sentence."""

    calibrator: Calibrator | None = None
    drawn: tuple[Calibrator, ...] = ()
    refused: str | None = None


class Seen(NamedTuple):
    """What a fit saw. spread: the standard deviation of its logits; largest: the greatest of them without its sign.
    separated: whether its labels are; separated_draws: how many of the bootstrap samples are."""

    spread: float
    largest: float
    separated: bool
    separated_draws: int

    @classmethod
    def of(cls, logits: Array, separated_R: Array) -> "Seen":
        """separated_R: whether the rows are, then whether each sample is."""
        return cls(float(logits.std()), float(np.abs(logits).max()), bool(separated_R[0]), int(separated_R[1:].sum()))


def fit_yes_no(labels_N: Array, logits_N: Array, weights_RN: Array) -> Fit:
    """Temperature and intercept of one label, and of bootstrap samples of the rows, or why they are refused. Raises
    ValueError."""
    all_RN = np.concatenate([np.ones((1, len(labels_N))), weights_RN])
    found, *drawn = fit_calibrators(labels_N, logits_N, all_RN)
    return judged(found, drawn, Seen.of(logits_N, separated(labels_N, logits_N, all_RN)))


def judged(found: Calibrator, drawn: Sequence[Calibrator], seen: Seen) -> Fit:
    """The fit, or why it is refused."""
    refused = _without_best(found, drawn, seen)
    return Fit(found, tuple(drawn)) if refused is None else Fit(refused=refused)


def too_few(counts: Mapping[str, int], numbers: int, row: str) -> str | None:
    """Why rows are too few for a fit of so many numbers, as the end of a sentence; None: they suffice. counts: of rows
    of each kind that the fit tells apart, by the kind's name, such as "with the label". row: what one is called."""
    least = FOR_EACH_NUMBER * numbers
    if min(counts.values()) >= least:
        return None
    told = " and ".join(f"{counted(count, row)} {kind}".rstrip() for kind, count in counts.items())
    return f"the part that calibrates has {told}, and a fit needs {least}{' of each' if len(counts) > 1 else ''}"


def _without_best(found: Calibrator, drawn: Sequence[Calibrator], seen: Seen) -> str | None:
    """Why a fit, and those to bootstrap samples, are no calibration, as the end of a sentence; None: they are one."""
    low, high = TEMPERATURES
    little = f"its logits differ too little (standard deviation {seen.spread:.2g}) for how well they rank its labels"
    if seen.spread <= ALIKE * max(1.0, seen.largest):
        return (
            f"the logits of the part that calibrates are all alike (standard deviation {seen.spread:.2g}): the model "
            "tells nothing apart, and no slope can be fitted"
        )
    if _is_least(found) and seen.separated:
        return (
            f"any certainty fits the part that calibrates: its labels are separated (temperature at its bound {low:g})"
        )
    if _is_least(found):
        return f"the best temperature of the part that calibrates is below {low:g}: {little}"
    if found.temperature > high * (1 - NEAR):
        return (
            "in the part that calibrates the logits do not rank the labels, or are far too large "
            f"(temperature at its bound {high:g})"
        )
    lost, most = sum(map(_is_least, drawn)), MOST_SEPARATED * len(drawn)
    samples = f"of {len(drawn)} bootstrap samples of the part that calibrates"
    if lost > most and seen.separated_draws > most:
        return f"{lost} {samples} are separated, so that any certainty fits them (temperature at its bound {low:g})"
    if lost > most:
        return f"{lost} {samples} have their best temperature below {low:g}: {little}"
    return None


def _is_least(one: Calibrator) -> bool:
    """Whether its temperature is the least that there may be."""
    return one.temperature < TEMPERATURES[0] * (1 + NEAR)
