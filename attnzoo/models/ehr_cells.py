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
SUMMARY = ("last", "mean", "smallest", "largest", "trend", "count")
"""What `summary_features` has of each variable. trend: the slope of a line through its values, drawn towards 0 as if
by values spread one `TREND_HOURS`, so that two of one hour say little. count: log(1 + all measurements)."""


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
    """What the hours so far say of each variable. sums_NVK: of hours with a value, values, times, squared times, values
    times times, measurements; low_NV, high_NV, last_NV: values, 0 where there is none."""

    sums_NVK: Tensor
    low_NV: Tensor
    high_NV: Tensor
    last_NV: Tensor

    @classmethod
    def empty(cls, stays: int, variables: int, device: torch.device, dtype: torch.dtype) -> "Summary":
        zeros = [new_zeros(stays, variables, device=device, dtype=dtype) for _ in range(3)]
        return cls(new_zeros(stays, variables, 6, device=device, dtype=dtype), *zeros)

    def at(self, hour: int) -> "Summary":
        """The summary at one hour of those that `summarise` returns."""
        return self.map(lambda _, tensor: tensor[:, hour])

    def features(self) -> Tensor:
        """SUMMARY of every variable, [..., V * 6]."""
        hours, total, times, squares, products, count = self.sums_NVK.unbind(-1)
        number = hours.clamp(min=1.0)
        trend = (products - total * times / number) / (1.0 + squares - times * times / number)
        found = [self.last_NV, total / number, self.low_NV, self.high_NV, trend, count.log1p()]
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
    index_T1 = torch.arange(value_NTV.shape[1], device=value_NTV.device)[:, None]
    at = index_T1 if first_N is None else index_T1 + first_N[:, None, None]
    time = (at.to(value_NTV.dtype) / TREND_HOURS).expand_as(value_NTV)
    rows = [measured_NTV, value_NTV, measured_NTV * time, measured_NTV * time * time, value_NTV * time]
    sums = torch.stack([*rows, cells_NTVC[..., COUNT].expm1()], dim=-1)
    sums = sums.cumsum(dim=1) if each_hour else sums.sum(dim=1, keepdim=True)
    low, high = -_largest(-value_NTV, real_NTV, each_hour), _largest(value_NTV, real_NTV, each_hour)
    latest = torch.where(real_NTV, index_T1, -1)
    latest = latest.cummax(dim=1).values if each_hour else latest.amax(dim=1, keepdim=True)
    last = value_NTV.gather(1, latest.clamp(min=0)).masked_fill(latest < 0, 0.0)
    if before is not None:
        some = before.sums_NVK[:, None, :, 0] > 0
        sums = sums + before.sums_NVK[:, None]
        low = torch.where(some, torch.minimum(low, before.low_NV[:, None]), low)
        high = torch.where(some, torch.maximum(high, before.high_NV[:, None]), high)
        last = torch.where(latest < 0, before.last_NV[:, None], last)
    nothing = sums[..., 0] <= 0
    return Summary(sums, low.masked_fill(nothing, 0.0), high.masked_fill(nothing, 0.0), last)


def _largest(value_NTV: Tensor, real_NTV: Tensor, each_hour: bool) -> Tensor:
    """The largest value so far, -inf where there is none."""
    value_NTV = value_NTV.masked_fill(~real_NTV, -torch.inf)
    return value_NTV.cummax(dim=1).values if each_hour else value_NTV.amax(dim=1, keepdim=True)
