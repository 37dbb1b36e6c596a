"""Measurements as events (stay, minute, variable, value), the rule for implausible values, and the account of both."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from attnzoo.clinical.variables import Variable

FARTHEST = 2**30
"""Minutes: any time that is farther away is outside every window."""


@dataclass(frozen=True)
class Events:
    """Measurements of many stays, each in the unit of its variable's table."""

    stays_E: np.ndarray
    """int32: the row of the stay."""
    minutes_E: np.ndarray
    """int32: minutes since admission at which the value was known."""
    variables_E: np.ndarray
    """int16: the place of the variable in the list of variables."""
    values_E: np.ndarray
    """float32."""

    def __post_init__(self) -> None:
        lengths = {len(self.stays_E), len(self.minutes_E), len(self.variables_E), len(self.values_E)}
        if len(lengths) > 1:
            raise ValueError(
                f"events of unequal lengths {sorted(lengths)}; give one stay, minute, variable and value each"
            )

    @classmethod
    def of(cls, stays: ArrayLike, minutes: ArrayLike, variables: ArrayLike, values: ArrayLike) -> "Events":
        """Of arrays or lists. Minutes farther than `FARTHEST` become that, because int32 holds no others."""
        minutes_E = np.clip(np.asarray(minutes, np.int64), -FARTHEST, FARTHEST).astype(np.int32)
        with np.errstate(over="ignore"):  # too large for float32: infinite, which `clean` drops and counts
            values_E = np.asarray(values, np.float64).astype(np.float32)
        return cls(np.asarray(stays, np.int32), minutes_E, np.asarray(variables, np.int16), values_E)

    def where(self, keep_E: np.ndarray) -> "Events":
        """The events at which `keep_E` is true."""
        return Events(self.stays_E[keep_E], self.minutes_E[keep_E], self.variables_E[keep_E], self.values_E[keep_E])

    def before(self, hours: int) -> "Events":
        """What was known before the end of the first `hours` hours."""
        return self.where(self.minutes_E < hours * 60)


@dataclass(frozen=True)
class DataReport:
    """What a loader did with the values that it found."""

    values: dict[str, dict[str, int]] = field(default_factory=dict)
    """For each variable: values "used", "clipped" (also used), "dropped" (impossible), of an "unknown unit"."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Stays and events that were left out, counted by reason."""

    def lines(self) -> list[str]:
        """The report in sentences: variables with implausible values first, then what was left out."""
        told = [
            f"{name}: {row['used']:,} values used, "
            + ", ".join(f"{count:,} {what}" for what, count in row.items() if what != "used" and count)
            for name, row in self.values.items()
            if sum(row.values()) > row["used"]
        ]
        return [*told, *(f"left out: {count:,} {reason}" for reason, count in self.left_out.items() if count)]

    def to_dict(self) -> dict[str, Any]:
        return {"values": self.values, "left_out": self.left_out}


def judged(variables_E: np.ndarray, values_E: np.ndarray, variables: list[Variable]) -> tuple[np.ndarray, np.ndarray]:
    """(whether each value is possible, the value clipped to its variable's plausible range)."""
    low_V, high_V, least_V, most_V = (
        np.array([pair[end] for pair in pairs], np.float32)
        for pairs in ([v.plausible for v in variables], [v.possible for v in variables])
        for end in (0, 1)
    )
    is_possible_E = (values_E >= least_V[variables_E]) & (values_E <= most_V[variables_E])  # false for NaN
    return is_possible_E, np.clip(values_E, low_V[variables_E], high_V[variables_E])


def clean(
    events: Events, variables: list[Variable], unknown_units: Counter[str] | None = None
) -> tuple[Events, DataReport]:
    """Drops values outside a variable's possible range, and those that are no finite number; clips the others to its
    plausible range. unknown_units: how many values of a variable the loader refused for their unit."""
    is_possible_E, value_E = judged(events.variables_E, events.values_E, variables)
    kept, clipped_E = events.where(is_possible_E), value_E[is_possible_E]
    code_E = events.variables_E

    def counted(codes: np.ndarray) -> list[int]:
        return [int(count) for count in np.bincount(codes, minlength=len(variables))]

    used, dropped = counted(kept.variables_E), counted(code_E[~is_possible_E])
    clipped = counted(kept.variables_E[clipped_E != kept.values_E])
    refused = unknown_units or Counter()
    values = {
        v.name: {"used": used[i], "clipped": clipped[i], "dropped": dropped[i], "unknown unit": refused[v.name]}
        for i, v in enumerate(variables)
    }
    return Events(kept.stays_E, kept.minutes_E, kept.variables_E, clipped_E), DataReport(values=values)
