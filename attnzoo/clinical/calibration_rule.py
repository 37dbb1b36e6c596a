"""When a calibration may be applied: the one rule for models of stays and of texts.

A fit finds numbers (temperature; temperature and intercept) by greatest likelihood. It is refused, and predictions are
as the model tells them, without an interval, where

- there are fewer than `FOR_EACH_NUMBER` rows for each number, of a yes or no as many of either class: with fewer,
  the fit follows the accidents of single rows (the usual rule of ten events for each fitted number);
- no temperature within `attnzoo.clinical.calibration.TEMPERATURES` is the best, so that a bound was taken: the classes
  are separated, and any certainty fits them, or the logits rank them the wrong way round or are far too large;
- more than `MOST_SEPARATED` of the bootstrap samples are separated: an end of the 95 % interval, which leaves out as
  many on either side, would be the bound's. Samples at the other bound stay: they make a model less sure, not more.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from attnzoo.clinical.calibration import TEMPERATURES, Calibrator

FOR_EACH_NUMBER = 10
MOST_SEPARATED = 0.025
NEAR = 1e-6
"""The relative distance at which a temperature counts as a bound: a bound that was found by halving is not exact."""


class Fit(NamedTuple):
    """calibrator: fitted to rows; drawn: to bootstrap samples of them. refused: why neither is applied, as the end of a
    sentence."""

    calibrator: Calibrator | None = None
    drawn: tuple[Calibrator, ...] = ()
    refused: str | None = None


def judged(found: Calibrator, drawn: Sequence[Calibrator]) -> Fit:
    """The fit, or why it is refused."""
    refused = _without_best(found, drawn)
    return Fit(found, tuple(drawn)) if refused is None else Fit(refused=refused)


def too_few(counts: Mapping[str, int], numbers: int) -> str | None:
    """Why rows are too few for a fit of so many numbers, as the end of a sentence; None: they suffice. counts: of rows
    of each kind that the fit tells apart, by what they are called."""
    least = FOR_EACH_NUMBER * numbers
    if min(counts.values()) >= least:
        return None
    told = " and ".join(f"{count:,} {name}" for name, count in counts.items())
    return f"the part that calibrates has {told}, and a fit needs {least}{' of each' if len(counts) > 1 else ''}"


def _without_best(found: Calibrator, drawn: Sequence[Calibrator]) -> str | None:
    """Why a fit, and those to bootstrap samples, are no calibration, as the end of a sentence; None: they are one."""
    low, high = TEMPERATURES
    if _is_separated(found):
        return (
            "any certainty fits the part that calibrates: its labels are separated, or the logits hardly differ "
            f"(temperature at its bound {low:g})"
        )
    if found.temperature > high * (1 - NEAR):
        return (
            "in the part that calibrates the logits do not rank the labels, or are far too large "
            f"(temperature at its bound {high:g})"
        )
    lost = sum(map(_is_separated, drawn))
    if lost > MOST_SEPARATED * len(drawn):
        what = "bootstrap samples of the part that calibrates are separated"
        return f"{lost} of {len(drawn)} {what}, so that any certainty fits them (temperature at its bound {low:g})"
    return None


def _is_separated(one: Calibrator) -> bool:
    """Whether its temperature is the least that there may be."""
    return one.temperature < TEMPERATURES[0] * (1 + NEAR)
