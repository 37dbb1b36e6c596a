"""Equal real bytes: the value of a policy's knob at which its measured state fits a budget and uses it best."""

from collections.abc import Callable
from dataclasses import dataclass

STEPS = 64
"""Values of a knob that are looked at: 1/64, 2/64, ... 1."""


@dataclass(frozen=True)
class Fit:
    """The knob's value and the bytes measured at it."""

    ratio: float
    nbytes: int


def fit_budget(measure: Callable[[float], int], budget: int, steps: int = STEPS) -> Fit | None:
    """The largest ratio in steps of 1/`steps` whose bytes by `measure` are at most `budget`; None where none is.

    `measure` is called some log2(steps) times and must not fall with the ratio. Bytes include whatever the policy
    allocates beside keys and values: masks, indices, positions, tails.
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
