"""Finds the ratio at which a policy's measured state is as large as a budget of bytes allows."""

from collections.abc import Callable
from dataclasses import dataclass

STEPS = 64
"""Number of ratios to choose from: 1/64, 2/64, ... 1."""


@dataclass(frozen=True)
class Fit:
    """A ratio, and the bytes measured with it."""

    ratio: float
    nbytes: int


def fit_budget(measure: Callable[[float], int], budget: int, steps: int = STEPS) -> Fit | None:
    """The largest ratio, a multiple of 1/`steps`, whose bytes are at most `budget`; None if there is none.

    measure: bytes by ratio; it must not decrease, and is called about log2(steps) times. The bytes must include
    everything that the policy allocates: keys, values, masks, indices, positions, tails.
    """
    found = None
    low, high = 1, steps
    while low <= high:
        middle = (low + high) // 2
        ratio = middle / steps
        nbytes = measure(ratio)
        if nbytes <= budget:
            found, low = Fit(ratio, nbytes), middle + 1
        else:
            high = middle - 1
    return found
