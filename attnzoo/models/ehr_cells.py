"""What is computed of the cells of a stay without weights: a summary of each variable, the time since it was last
measured, and cells as if they had not been measured.

cells_NTVC: N stays, T hours, V variables, and the four channels of `attnzoo.models.EhrEncoder`: the standardised value
(0 where nothing was measured), whether it was measured, log(1 + measurements in the hour), and the time since the last
hour with a measurement.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.kvcache.state import State, new_zeros

VALUE, MEASURED, COUNT, GAP = range(4)
CHANNELS = 4
GAP_HOURS = 48
"""The time since the last measurement is in units of so many hours, and 1 at most."""
TREND_HOURS = 12
"""The unit of time of the trend."""
SUMMARY = (
    "last",
    "first",
    "mean",
    "smallest",
    "largest",
    "deviation",
    "trend",
    "count",
    "share",
    "recency",
    "measured",
)
"""What `Summary.features` has of each variable; all are 0 where it was never measured.

deviation: variance / sqrt(1 + variance) of its values, their standard deviation where that is large. trend: the slope
of a line through them, drawn towards 0 as if by values spread one `TREND_HOURS`, so that two of one hour say little.
count: log(1 + all measurements). share: of the hours so far, those with a measurement. recency: 1 less the time since
the last, so 0 after `GAP_HOURS`. measured: 1."""


def gaps(measured_NTV: Tensor) -> Tensor:
    """The channel GAP: 0 in an hour with a measurement, 1 where there has been none."""
    hours_T1 = torch.arange(measured_NTV.shape[1], device=measured_NTV.device)[:, None]
    last_NTV = torch.where(measured_NTV > 0, hours_T1, -GAP_HOURS).cummax(dim=1).values
    return ((hours_T1 - last_NTV).to(measured_NTV.dtype) / GAP_HOURS).clamp(max=1.0)


def hide_cells(cells_NTVC: Tensor, hidden_NTV: Tensor) -> Tensor:
    """The cells as if those that are hidden (bool) had not been measured; later cells do not tell that they were."""
    kept_NTVC = cells_NTVC.masked_fill(hidden_NTV[..., None], 0.0)
    gaps_NTV1 = gaps(kept_NTVC[..., MEASURED])[..., None]
    return torch.cat([kept_NTVC[..., :GAP], gaps_NTV1], dim=-1)


@dataclass
class Summary(State):
    """What the hours so far say of each variable. sums_NVK: of hours with a value, values, their squares, times,
    squared times, values times times, measurements; first_NV, last_NV, low_NV, high_NV: values, 0 where there is none.
    """

    sums_NVK: Tensor
    first_NV: Tensor
    last_NV: Tensor
    low_NV: Tensor
    high_NV: Tensor

    @classmethod
    def empty(cls, stays: int, variables: int, device: torch.device, dtype: torch.dtype) -> "Summary":
        zeros = [new_zeros(stays, variables, device=device, dtype=dtype) for _ in range(4)]
        return cls(new_zeros(stays, variables, 7, device=device, dtype=dtype), *zeros)

    def at(self, hour: int) -> "Summary":
        """The summary at one hour of those that `summarise` returns."""
        return self.map(lambda _, tensor: tensor[:, hour])

    def features(self, hours: Tensor, gap_NV: Tensor) -> Tensor:
        """SUMMARY of every variable, [..., V * 11]. hours [...]: how many there were so far; gap_NV: the channel GAP in
        the last of them."""
        measured, total, of_squares, times, squares, products, count = self.sums_NVK.unbind(-1)
        number = measured.clamp(min=1.0)
        mean = total / number
        variance = (of_squares / number - mean * mean).clamp(min=0.0)
        deviation = variance / (1.0 + variance).sqrt()  # a slope of 1 where all values are alike, not an infinite one
        trend = (products - mean * times) / (1.0 + squares - times * times / number)
        share = measured / hours.clamp(min=1)[..., None]
        recency = (1.0 - gap_NV).masked_fill(measured <= 0, 0.0)
        values = [self.last_NV, self.first_NV, mean, self.low_NV, self.high_NV, deviation, trend]
        found = [*values, count.log1p(), share, recency, measured.clamp(max=1.0)]
        return torch.stack(found, dim=-1).flatten(-2)


def summarise(
    cells_NTVC: Tensor, before: Summary | None = None, first_N: Tensor | None = None, *, each_hour: bool = True
) -> Summary:
    """The summary after every hour, tensors [N, T, V, ...]; with each_hour=False after the last one alone, T being 1.
    Hours that do not exist must hold zeros.

    before: of the hours before, None: there are none; first_N: how many they are.
    """
    value_NTV, measured_NTV = cells_NTVC[..., VALUE], cells_NTVC[..., MEASURED]
    real_NTV = measured_NTV > 0
    hours = value_NTV.shape[1]
    index_T1 = torch.arange(hours, device=value_NTV.device)[:, None]
    at = index_T1 if first_N is None else index_T1 + first_N[:, None, None]
    time = (at.to(value_NTV.dtype) / TREND_HOURS).expand_as(value_NTV)
    rows = [measured_NTV, value_NTV, value_NTV.square()]
    rows += [measured_NTV * time, measured_NTV * time * time, value_NTV * time]
    sums = torch.stack([*rows, cells_NTVC[..., COUNT].expm1()], dim=-1)
    sums = sums.cumsum(dim=1) if each_hour else sums.sum(dim=1, keepdim=True)
    low, high = -_largest(-value_NTV, real_NTV, each_hour), _largest(value_NTV, real_NTV, each_hour)
    first = _taken(value_NTV, -_most(torch.where(real_NTV, -index_T1, -hours), each_hour))
    last = _taken(value_NTV, _most(torch.where(real_NTV, index_T1, -1), each_hour))
    nothing = sums[..., 0] <= 0
    if before is not None:
        some, none = before.sums_NVK[:, None, :, 0] > 0, nothing
        sums, nothing = sums + before.sums_NVK[:, None], nothing & ~some
        low = torch.where(some, torch.minimum(low, before.low_NV[:, None]), low)
        high = torch.where(some, torch.maximum(high, before.high_NV[:, None]), high)
        first = torch.where(some, before.first_NV[:, None], first)
        last = torch.where(none, before.last_NV[:, None], last)
    return Summary(sums, first, last, low.masked_fill(nothing, 0.0), high.masked_fill(nothing, 0.0))


def _most(found_NTV: Tensor, each_hour: bool) -> Tensor:
    """The largest so far."""
    return found_NTV.cummax(dim=1).values if each_hour else found_NTV.amax(dim=1, keepdim=True)


def _taken(value_NTV: Tensor, hour_NTV: Tensor) -> Tensor:
    """Values of these hours, 0 where there is no such hour."""
    last = value_NTV.shape[1] - 1
    found = value_NTV.gather(1, hour_NTV.clamp(0, last))
    return found.masked_fill((hour_NTV < 0) | (hour_NTV > last), 0.0)


def _largest(value_NTV: Tensor, real_NTV: Tensor, each_hour: bool) -> Tensor:
    """The largest value so far, -inf where there is none."""
    return _most(value_NTV.masked_fill(~real_NTV, -torch.inf), each_hour)
