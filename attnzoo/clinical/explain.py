"""What a prediction for a stay looked at, cell by cell: a number for every measured cell (hour, variable).

Three maps answer three questions. `integrated_gradients`: how much of the logit's distance from the same stay without
any measurement each cell accounts for, with its sign (arXiv 1703.01365). `occlusion`: by how much the logit falls if
this one cell had not been measured. `attention`: where the attention of an `EhrEncoder` lies. The first two speak of
the model, not of the patient: a cell that raises the logit need not be why a patient is ill. Attention speaks of what
was looked at, not even of what it did to the logit. How well a map points at what the model uses is measured by
`attnzoo.clinical.faithfulness`.

A cell that was not measured is a valid input, so that what is left after cells are taken away is one too; what later
cells say of the time since the last measurement changes with it. Letters: N stays, T hours, V variables, C channels, S
statics, O outputs, E measured cells of a batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from attnzoo.models import EhrEncoder
from attnzoo.models.ehr_cells import CHANNELS, GAP, MEASURED, VALUE, hide_cells
from attnzoo.models.ehr_state import EhrMaps

TOLERANCE = 0.05
"""How far the sum of integrated gradients may be from the difference of logits: this, times the difference where that
is above 1. Where MLPs have kinks, twice the points only halve what is missing."""
STEPS = (16, 32, 64, 128, 256, 512)
"""Points of the path on which gradients are taken: more of them for stays that miss the tolerance."""
BATCH = 256
"""Stays that a model is given at a time."""


@dataclass(frozen=True, eq=False)
class StayCells:
    """What an `EhrEncoder` is given. cells_NTVC, statics_NS, hours_N, variables_NV: as in its `forward`; hours that do
    not exist may hold anything, and come out as zeros. checked: the cells are some of stays that were checked. Raises
    ValueError for shapes that do not fit, and for cells that say something where nothing was measured."""

    cells_NTVC: Tensor
    statics_NS: Tensor
    hours_N: Tensor
    variables_NV: Tensor | None = None
    checked: bool = False

    def __post_init__(self) -> None:
        if self.checked:
            return
        if self.cells_NTVC.dim() != 4 or self.cells_NTVC.shape[-1] != CHANNELS:
            raise ValueError(f"cells_NTVC has shape {list(self.cells_NTVC.shape)}; it must be [N, T, V, {CHANNELS}]")
        for name, tensor in (("statics_NS", self.statics_NS), ("hours_N", self.hours_N)):
            if len(tensor) != len(self):
                raise ValueError(f"{name} has {len(tensor)} rows; cells_NTVC has {len(self)} stays")
        cells = self._existing(self.cells_NTVC)
        plain = self._existing(hide_cells(cells, cells[..., MEASURED] <= 0))
        wrong = ~torch.isclose(cells, plain, rtol=0, atol=1e-4)
        if bool(wrong.any()):
            stay, hour, variable, channel = (int(i) for i in wrong.nonzero()[0])
            raise ValueError(
                f"cells_NTVC[{stay}, {hour}, {variable}, {channel}] is {float(cells[stay, hour, variable, channel]):g},"
                f" and the measurements of the stay make it {float(plain[stay, hour, variable, channel]):g}; build "
                "cells with Statistics.cells"
            )
        object.__setattr__(self, "cells_NTVC", cells)

    def __len__(self) -> int:
        return len(self.cells_NTVC)

    @cached_property
    def exists(self) -> Tensor:
        return torch.arange(self.cells_NTVC.shape[1], device=self.hours_N.device) < self.hours_N[:, None]

    @cached_property
    def observed(self) -> Tensor:
        """Which cells were measured; the others have no part in an explanation."""
        found = self.cells_NTVC[..., MEASURED] > 0
        return found if self.variables_NV is None else found & self.variables_NV[:, None]

    def _existing(self, cells_NTVC: Tensor) -> Tensor:
        return cells_NTVC.masked_fill(~self.exists[..., None, None], 0.0)

    def rows(self, rows: slice | Tensor) -> "StayCells":
        exist = None if self.variables_NV is None else self.variables_NV[rows]
        return StayCells(self.cells_NTVC[rows], self.statics_NS[rows], self.hours_N[rows], exist, checked=True)

    def blocks(self, size: int) -> Iterator["StayCells"]:
        for start in range(0, len(self), size):
            yield self.rows(slice(start, start + size))

    def without(self, hidden_NTV: Tensor) -> Tensor:
        """cells_NTVC as if the hidden cells had not been measured."""
        return self._existing(hide_cells(self.cells_NTVC, hidden_NTV))


@dataclass(frozen=True, eq=False)
class Logit:
    """The logit that is explained. model: an `EhrEncoder` in evaluation mode, or what is called as one. output:
    which of its outputs. hour: of a model with hourly outputs the hour of the prediction, None: each stay's last."""

    model: Callable[..., Tensor]
    output: int = 0
    hour: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.model, nn.Module) and self.model.training:
            raise ValueError("model is in training mode, where it hides cells by chance; call model.eval() first")

    def of(self, stays: StayCells, cells_NTVC: Tensor) -> Tensor:
        """logits_N of the stays with other cells. Raises ValueError for outputs and hours that do not exist."""
        given = {} if stays.variables_NV is None else {"variables_NV": stays.variables_NV}
        logits = self.model(cells_NTVC, stays.statics_NS, stays.hours_N, **given)
        if not 0 <= self.output < logits.shape[-1]:
            raise ValueError(f"output={self.output} does not exist; the model has outputs 0 to {logits.shape[-1] - 1}")
        if logits.dim() == 2:
            if self.hour is not None:
                raise ValueError(f"hour={self.hour}: the model predicts once a stay; leave hour out")
            return logits[:, self.output]
        at_N = stays.hours_N - 1 if self.hour is None else torch.full_like(stays.hours_N, self.hour)
        if bool(((at_N < 0) | (at_N >= stays.hours_N)).any()):
            raise ValueError(f"hour={self.hour} does not exist in stays of hours_N={stays.hours_N.tolist()}")
        return logits[torch.arange(len(stays), device=logits.device), at_N, self.output]

    @torch.no_grad()
    def without(self, stays: StayCells, hidden_NTV: Tensor | None = None) -> Tensor:
        """logits_N of the stays as if the hidden cells had not been measured; None: none is hidden."""
        cells = stays.cells_NTVC if hidden_NTV is None else stays.without(hidden_NTV)
        found = [
            self.of(some, cells[first : first + BATCH])
            for first, some in zip(range(0, len(stays), BATCH), stays.blocks(BATCH), strict=True)
        ]
        return torch.cat(found) if found else cells.new_zeros(0)


class Cells(Protocol):
    """What is explained: N rows of cells, `StayCells` or the words of texts."""

    @property
    def observed(self) -> Tensor:
        """[N, T, V] bool: the cells that there are."""

    def __len__(self) -> int: ...


@dataclass(frozen=True, eq=False)
class CellMap:
    """A number for every cell, 0 where nothing was measured. signed: positive numbers raise the logit and negative ones
    lower it; else the size alone counts."""

    name: str
    values_NTV: Tensor
    signed: bool


def integrated_gradients(logit: Logit, stays: StayCells, *, tolerance: float = TOLERANCE) -> CellMap:
    """Gradients along the straight line from the stay without measurements to the stay, times the distance.

    A cell has those of its value, of its being measured and of its count; and those of the time since the last
    measurement, in its own hour and in all until the next one, because that time tells of this cell. So cells that were
    not measured have 0, and the sum over cells is the difference of the two logits. Raises ValueError if it is not, to
    within `tolerance` (`TOLERANCE` says of what), with the most points in `STEPS`.
    """
    everything = torch.ones_like(stays.observed)
    difference_N = logit.without(stays) - logit.without(stays, everything)
    found = completed(
        difference_N,
        torch.zeros_like(stays.cells_NTVC[..., 0]),
        lambda rows, steps: _path(logit, stays.rows(rows), steps),
        tolerance,
    )
    return CellMap("integrated gradients", found, signed=True)


def completed(
    difference_N: Tensor, found: Tensor, path: Callable[[Tensor, int], Tensor], tolerance: float = TOLERANCE
) -> Tensor:
    """`found`, filled with path(rows, points), the attributions [rows, ...] by so many points of the path: with more of
    them for rows whose sum misses the difference. Raises ValueError as `integrated_gradients` does."""
    left = torch.arange(len(difference_N), device=found.device)
    for steps in STEPS:
        for rows in left.split(BATCH):
            found[rows] = path(rows, steps)
        missing_N = (difference_N - found.flatten(1).sum(1)).abs() / difference_N.abs().clamp(min=1.0)
        left = (~(missing_N <= tolerance)).nonzero()[:, 0]
        if not len(left):
            return found
    raise ValueError(
        f"tolerance={tolerance}: with {STEPS[-1]} points of the path the attributions of {len(left)} rows still miss "
        f"the difference of logits, by {float(missing_N.max()):.3g} at most; compute in float64, or allow more"
    )


def _path(logit: Logit, stays: StayCells, steps: int) -> Tensor:
    """Integrated gradients [N, T, V] by Gauss-Legendre quadrature."""
    start = stays.without(torch.ones_like(stays.observed))
    distance = stays.cells_NTVC - start
    slopes = torch.zeros_like(start)
    for point, weight in quadrature(steps):
        cells = (start + point * distance).requires_grad_()
        with torch.enable_grad():
            total = logit.of(stays, cells).sum()
        slopes += weight * torch.autograd.grad(total, cells)[0]
    shares = slopes * distance
    hours_T1 = torch.arange(start.shape[1], device=start.device)[:, None]
    last = torch.where(stays.cells_NTVC[..., MEASURED] > 0, hours_T1, 0).cummax(dim=1).values
    return shares[..., :GAP].sum(-1).scatter_add(1, last, shares[..., GAP])


def quadrature(steps: int) -> list[tuple[float, float]]:
    """(point between 0 and 1, weight) of Gauss and Legendre's rule."""
    points, weights = np.polynomial.legendre.leggauss(steps)
    return list(zip(((points + 1) / 2).tolist(), (weights / 2).tolist(), strict=True))


def occlusion(logit: Logit, stays: StayCells) -> CellMap:
    """The logit of the stay minus that without the one cell: one more run of the model for every measured cell."""
    places = stays.observed.nonzero()
    whole_N, found = logit.without(stays), torch.zeros_like(stays.cells_NTVC[..., 0])
    for some_E3 in places.split(BATCH):
        stay_E, hour_E, variable_E = some_E3.unbind(-1)
        copies = stays.rows(stay_E)
        hidden = torch.zeros_like(copies.observed)
        hidden[torch.arange(len(stay_E), device=hidden.device), hour_E, variable_E] = True
        found[stay_E, hour_E, variable_E] = whole_N[stay_E] - logit.without(copies, hidden)
    return CellMap("occlusion", found, signed=True)


def attention(encoder: EhrEncoder, stays: StayCells) -> CellMap:
    """Where the encoder's attention lies: weights of the measured cells, which sum to 1 in every stay.

    The pooled sum of the last chunk is followed back to hours (temporal branch) and to variables of each chunk (spatial
    branch) through all maps, mean over heads, a sum with its residual counting half (attention rollout, arXiv
    2005.00928). A cell has the product of its hour's weight and of its variable's in that chunk; of a model with one
    branch, that branch's weight, shared by the measured cells of the hour or of the variable's chunk. What falls on the
    statics is left out. Raises ValueError for a model with hourly outputs, which pools nothing.
    """
    if encoder.config.hourly:
        raise ValueError("encoder has hourly=True and no pooled attention; use integrated_gradients or occlusion")
    if encoder.training:
        raise ValueError("encoder is in training mode, where it hides cells by chance; call encoder.eval() first")
    found = [_attention(encoder, some) for some in stays.blocks(BATCH)]
    return CellMap("attention", torch.cat(found) if found else stays.cells_NTVC[..., 0], signed=False)


def _attention(encoder: EhrEncoder, stays: StayCells) -> Tensor:
    maps = encoder.read_maps(stays.cells_NTVC, stays.statics_NS, stays.hours_N, variables_NV=stays.variables_NV)
    hours, tokens = encoder.config.chunk_hours, stays.cells_NTVC.shape[1]
    seen = stays.observed.to(stays.cells_NTVC.dtype)
    if maps.hours_NT is None:
        assert maps.variables_NV is not None
        weights = _rolled_back(maps, "spatial", maps.variables_NV, stays.hours_N, hours)
        chunk_T = torch.arange(tokens, device=seen.device) // hours
        number = seen.new_zeros(len(stays), weights.shape[1], seen.shape[2]).index_add(1, chunk_T, seen)
        found = seen * (weights / number.clamp(min=1.0))[:, chunk_T]
    else:
        temporal = _rolled_back(maps, "temporal", maps.hours_NT, stays.hours_N, hours).flatten(1)[:, :tokens]
        if maps.variables_NV is None:
            found = seen * (temporal / seen.sum(-1).clamp(min=1.0))[..., None]
        else:
            spatial = _rolled_back(maps, "spatial", maps.variables_NV, stays.hours_N, hours)
            found = seen * temporal[..., None] * spatial.repeat_interleave(hours, dim=1)[:, :tokens]
    total = found.sum((1, 2), keepdim=True)
    return found / total.where(total > 0, 1.0)


def _rolled_back(maps: EhrMaps, branch: str, pooled_NX: Tensor, hours_N: Tensor, chunk_hours: int) -> Tensor:
    """What the pooled sum gives to each chunk's own tokens, [N, chunks, X], without the statics' token."""
    chunks = sum(name.startswith(branch) and name.endswith("self") for name in maps.maps)
    last_N = (hours_N - 1).clamp(min=0) // chunk_hours
    onto = torch.nn.functional.pad(pooled_NX, (1, 0))  # the statics' token comes first
    after, found = torch.zeros_like(onto), []
    for chunk in reversed(range(chunks)):
        flow = torch.where((last_N == chunk)[:, None], onto, after)
        begun = (last_N >= chunk)[:, None, None]
        if chunk:
            cross = maps.maps[f"{branch}.{chunk}.cross"].mean(1).to(flow.dtype).masked_fill(~begun, 0.0)
            flow = flow / 2
            after = (flow[:, None] @ cross)[:, 0]
        own = maps.maps[f"{branch}.{chunk}.self"].mean(1).to(flow.dtype).masked_fill(~begun, 0.0)
        found.append((flow + (flow[:, None] @ own)[:, 0])[:, 1:] / 2)
    return torch.stack(found[::-1], dim=1)


def sizes(stays: StayCells) -> CellMap:
    """|z|: how far each value is from the mean of the training rows; what a map without any model would say."""
    return CellMap("|z|", stays.cells_NTVC[..., VALUE].abs() * stays.observed, signed=False)


def by_chance(stays: Cells, seed: int) -> CellMap:
    """Random numbers between 0 and 1, drawn on the CPU, so that a seed means the same everywhere."""
    drawn = torch.rand(stays.observed.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return CellMap("random", drawn.to(stays.observed.device) * stays.observed, signed=False)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One variable of a stay in an explanation. amount: the sum of the map over its cells; share: its part of all
    sizes; hours: of its measurements; words: the same as a sentence."""

    variable: str
    amount: float
    share: float
    hours: tuple[int, ...]
    words: str


def findings(
    cell_map: CellMap, stays: StayCells, row: int, variables: Sequence[str], *, most: int = 8
) -> list[Finding]:
    """The variables with the largest sums in one stay, at most `most`. Raises ValueError."""
    if len(variables) != stays.cells_NTVC.shape[2]:
        raise ValueError(f"variables has {len(variables)} names; cells_NTVC has {stays.cells_NTVC.shape[2]} variables")
    if most < 1:
        raise ValueError(f"most={most} must be at least 1")
    if not 0 <= row < len(stays):
        raise ValueError(f"row={row} does not exist; there are {len(stays)} stays")
    values_TV, observed_TV = cell_map.values_NTV[row], stays.observed[row]
    sum_V, total = values_TV.sum(0), float(values_TV.sum(0).abs().sum()) or 1.0
    found = []
    for index in sum_V.abs().argsort(descending=True, stable=True)[:most].tolist():
        hours = tuple(int(hour) for hour in observed_TV[:, index].nonzero()[:, 0])
        amount = float(sum_V[index])
        if hours and amount:
            share = abs(amount) / total
            words = _words(cell_map, variables[index], amount, share, hours)
            found.append(Finding(variable=variables[index], amount=amount, share=share, hours=hours, words=words))
    return found


def _words(cell_map: CellMap, variable: str, amount: float, share: float, hours: tuple[int, ...]) -> str:
    when = f"hour {hours[0]}" if len(hours) == 1 else f"{len(hours)} hours from {hours[0]} to {hours[-1]}"
    if not cell_map.signed:
        return f"{share:.0%} of the {cell_map.name} lies on {variable} ({when})."
    what = "raises" if amount > 0 else "lowers"
    return f"{variable} ({when}) {what} the model's logit by {abs(amount):.2f} ({cell_map.name})."
