"""What labels and predictions must be before they are measured; a refusal names field, value and the way out."""

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

Array = np.ndarray
FARTHEST = 1e150
"""Of larger numbers float64 has no squares."""


def numbers(values: ArrayLike, field: str) -> Array:
    """`values` as float64, whatever their shape. Raises ValueError for what is no number: also texts, dates, complex
    numbers, and masked ones, whose mask numpy drops."""
    _refuse_masked(values, field)
    try:
        found = np.asarray(values)
        if found.dtype.kind not in "biufO":
            raise TypeError(found.dtype)
        return found.astype(np.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last one: a tensor with gradients
        raise ValueError(f"{field} must be numbers; of a tensor give .detach().cpu()") from None


def names(values: ArrayLike, rows: int, field: str) -> Array:
    """One name a row, texts or numbers. Raises ValueError for another shape, and for a row without a name: such rows
    would all be one."""
    _refuse_masked(values, field)
    try:
        found_N = np.asarray(values)
    except ValueError:
        raise ValueError(f"{field} must be one text or number a row") from None
    if found_N.shape != (rows,):
        raise ValueError(f"{field} has shape {found_N.shape}; one a row is needed, and there are {rows:,} rows")
    if found_N.dtype.kind in "biu":
        return found_N
    # Of a list numpy makes texts of numbers, and "nan" of a missing one.
    given: Iterable[Any] = found_N if isinstance(values, np.ndarray) else values  # type: ignore[assignment]
    are_texts = set()
    for row, value in enumerate(given):
        if _is_missing(value):
            shown = value if isinstance(value, Real | np.datetime64 | np.timedelta64) else repr(value)
            raise ValueError(f"{field} holds {shown} in row {row}; give each row a name, or leave the row out")
        are_texts.add(isinstance(value, str | bytes))
    if len(are_texts) > 1:
        raise ValueError(f"{field} mixes texts and numbers; give names of one kind, so that '1' and 1 are not confused")
    return found_N


def _is_missing(value: Any) -> bool:
    if value is None or (isinstance(value, str | bytes) and not value):
        return True
    try:
        return bool(value != value) or (isinstance(value, Real) and not np.isfinite(float(value)))
    except (TypeError, ValueError):  # a missing value that equals nothing
        return True


def _refuse_masked(values: ArrayLike, field: str) -> None:
    if np.ma.isMaskedArray(values):
        masked = int(np.ma.getmaskarray(values).sum())
        if masked:
            raise ValueError(f"{field} holds {masked:,} masked values; leave out rows without a value")


def column(values: ArrayLike, field: str) -> Array:
    """`values` as a float64 vector. Raises ValueError for anything but one or more finite numbers in a row."""
    found_N = numbers(values, field)
    if found_N.ndim != 1:
        raise ValueError(f"{field} has shape {found_N.shape}; one number a row is needed")
    if not len(found_N):
        raise ValueError(f"{field} is empty")
    return finite(found_N, field)


def finite(values: Array, field: str) -> Array:
    """The same values. Raises ValueError that counts those that are not finite."""
    bad = ~np.isfinite(values)
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{field} holds {bad.sum():,} values that are not finite, the first in row {first[0]} "
            f"({values[first]}); leave out rows without a value"
        )
    return values


def moderate(values: Array, field: str, most: float = FARTHEST) -> Array:
    """The same values. Raises ValueError for one that is farther from 0 than `most`: what is computed overflows."""
    worst = values.flat[np.abs(values).argmax()] if values.size else 0.0
    if abs(worst) > most:
        raise ValueError(f"{field} holds {worst:.6g}; numbers from -{most:g} to {most:g} can be computed with")
    return values


def pair(first: ArrayLike, second: ArrayLike, names: tuple[str, str]) -> tuple[Array, Array]:
    """Two vectors of one length. Raises ValueError."""
    one_N, two_N = column(first, names[0]), column(second, names[1])
    if len(one_N) != len(two_N):
        raise ValueError(
            f"{names[0]} has {len(one_N):,} rows, {names[1]} has {len(two_N):,}; they must be the same rows"
        )
    return one_N, two_N


def scores(labels: ArrayLike, predictions: ArrayLike) -> tuple[Array, Array]:
    """Labels 0 or 1, both of them present, and any finite scores: the higher, the more likely. Raises ValueError."""
    labels_N, scores_N = pair(labels, predictions, ("labels", "scores"))
    _zero_or_one(labels_N)
    if labels_N.min() == labels_N.max():
        raise ValueError(f"labels hold only {labels_N[0]:.0f}; rows of both classes are needed")
    return labels_N, scores_N


def probabilities(labels: ArrayLike, predictions: ArrayLike) -> tuple[Array, Array]:
    """Labels 0 or 1, both of them present, and probabilities of 1. Raises ValueError."""
    labels_N, found_N = scores(labels, predictions)
    if found_N.min() < 0 or found_N.max() > 1:
        worst = found_N.min() if found_N.min() < 0 else found_N.max()
        raise ValueError(f"probabilities hold {worst:.6g}, outside 0 to 1; apply the sigmoid to logits first")
    return labels_N, found_N


def many_labels(labels: ArrayLike, predictions: ArrayLike) -> tuple[Array, Array]:
    """Tables [rows, labels] of zeros and ones, and of finite scores. Raises ValueError."""
    labels_NK, scores_NK = numbers(labels, "labels"), numbers(predictions, "scores")
    if labels_NK.ndim != 2 or labels_NK.shape != scores_NK.shape:
        raise ValueError(
            f"labels {labels_NK.shape} and scores {scores_NK.shape} must be tables [rows, labels] of one shape"
        )
    if not labels_NK.size:
        raise ValueError("labels is empty")
    finite(labels_NK, "labels")
    finite(scores_NK, "scores")
    _zero_or_one(labels_NK)
    return labels_NK, scores_NK


def values(labels: ArrayLike, predictions: ArrayLike) -> tuple[Array, Array]:
    """True and predicted numbers. Raises ValueError."""
    labels_N, found_N = pair(labels, predictions, ("labels", "predictions"))
    return moderate(labels_N, "labels"), moderate(found_N, "predictions")


def fraction(value: float, field: str) -> float:
    """A number between 0 and 1, both excluded. Raises ValueError."""
    if not isinstance(value, Real) or not 0.0 < value < 1.0:
        raise ValueError(f"{field}={_shown(value)} must lie between 0 and 1")
    return float(value)


def count(value: int, field: str, least: int, most: int | None = None, why: str = "") -> int:
    """A whole number of at least `least`. why: the end of the message. Raises ValueError."""
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_whole or value < least or (most is not None and value > most):
        ends = f"at least {least}" + ("" if most is None else f" and at most {most}")
        raise ValueError(f"{field}={_shown(value)} must be a whole number of {ends}{why}")
    return int(value)


def _shown(value: object) -> str:
    return str(value) if isinstance(value, Real) else repr(value)


def _zero_or_one(labels: Array) -> None:
    other = labels[(labels != 0) & (labels != 1)]
    if other.size:
        raise ValueError(f"labels hold {other[0]:.6g}; they must be 0 or 1")
