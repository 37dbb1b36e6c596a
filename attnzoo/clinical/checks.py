"""What labels and predictions must be before they are measured; a refusal names field, value and the way out."""

import numpy as np
from numpy.typing import ArrayLike

Array = np.ndarray


def column(values: ArrayLike, field: str) -> Array:
    """`values` as a float64 vector. Raises ValueError for anything but one or more finite numbers in a row."""
    try:
        found_N = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{field} must be numbers") from None
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
    labels_NK, scores_NK = np.asarray(labels, dtype=np.float64), np.asarray(predictions, dtype=np.float64)
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
    return pair(labels, predictions, ("labels", "predictions"))


def fraction(value: float, field: str) -> float:
    """A number between 0 and 1, both excluded. Raises ValueError."""
    if not 0.0 < value < 1.0:
        raise ValueError(f"{field}={value} must lie between 0 and 1")
    return float(value)


def _zero_or_one(labels: Array) -> None:
    other = labels[(labels != 0) & (labels != 1)]
    if other.size:
        raise ValueError(f"labels hold {other[0]:.6g}; they must be 0 or 1")
