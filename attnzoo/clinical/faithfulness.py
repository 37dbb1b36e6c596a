"""Whether a map of cells points at what the model uses: cells are taken away in its order, and the logit is looked at.

A cell is taken away by making it one that was not measured. With a share k of the measured cells (`SHARES`):

    comprehensiveness(k) = d (f(all) - f(all but the top k))     the more, the better
    sufficiency(k)       = d (f(all) - f(only the top k))        the less, the better

f: the logit; d: the sign of f(all) - f(no measurement), so that both count in the direction of the evidence. A signed
map puts first what supports this direction. Cells of both signs cancel when they are taken away at once; therefore
also, ordered by size, the sum of |f_k - f_k+1| along `PATH`: with the largest cells taken away first (cumulative
prediction difference: the more, the better) and with the smallest first (cumulative prediction preservation: the less,
the better; both arXiv 2506.05035). Every map is compared with random orders and with |z| on the same stays.

Whether a map depends on what the model has learned: `randomisation_check`; whether models that differ by their seed are
explained alike: `stability`. Letters: N stays, T hours, V variables, K shares.

The words of texts (`attnzoo.clinical.explain_words`) are measured in the same way: a word is a cell of one variable, T
counts words, and it is taken away by making it an unknown word.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from attnzoo.clinical import checks
from attnzoo.clinical.bootstrap import Interval, interval
from attnzoo.clinical.explain import CellMap, Cells, StayCells, by_chance, sizes
from attnzoo.clinical.metrics import Metric, mean

SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)
PATH = (0.0, *SHARES[:3], 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)
DRAWS = 3
"""Random orders whose mean is what chance reaches."""

gain = Metric("mean gain", lambda chance_N, found_N, weights_RN: mean(weights_RN, found_N - chance_N), checks.values)
"""Mean of second minus first number of a row."""


class Explained(Protocol):
    """The logit that is explained, as of `attnzoo.clinical.explain.Logit`."""

    def without(self, stays: Any, hidden_NTV: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Ticking:
    """A logit that calls `tick` once a pass over the stays."""

    logit: Explained
    tick: Callable[[], object]

    def without(self, stays: Any, hidden_NTV: Tensor | None = None) -> Tensor:
        """As the logit."""
        found = self.logit.without(stays, hidden_NTV)
        self.tick()
        return found


def passes(maps: int, draws: int = DRAWS) -> int:
    """How often `faithfulness` of so many maps computes the logit of all stays."""
    return (maps + 1 + 2 * draws) * (2 + 2 * len(SHARES) + 2 * len(PATH))


@dataclass(frozen=True, eq=False)
class Removal:
    """What taking cells away does in each stay; the module says how each is defined."""

    comprehensiveness_NK: Tensor
    sufficiency_NK: Tensor
    difference_N: Tensor
    preservation_N: Tensor


@dataclass(frozen=True, kw_only=True)
class Faithfulness:
    """Means over stays of what `Removal` has, K numbers being those of `SHARES`.

    more_comprehensive, less_sufficient: how much better than random orders, mean over shares, with intervals by a
    bootstrap over patients: positive is better. beats_random: both intervals lie above 0. words: the verdict as a
    sentence.
    """

    name: str
    comprehensiveness: tuple[float, ...]
    sufficiency: tuple[float, ...]
    difference: float
    preservation: float
    more_comprehensive: Interval
    less_sufficient: Interval

    @property
    def beats_random(self) -> bool:
        return self.more_comprehensive.low > 0 and self.less_sufficient.low > 0

    @property
    def words(self) -> str:
        better = (
            "points at cells that the model uses, more than chance does"
            if self.beats_random
            else ("is not shown to be better than random cells")
        )
        return (
            f"{self.name} {better}: comprehensiveness is {self.more_comprehensive} above and sufficiency "
            f"{self.less_sufficient} below that of random orders, in logits."
        )


def ranks(importance_NTV: Tensor, observed_NTV: Tensor, seed: int = 0) -> Tensor:
    """The place of each measured cell, the most important one having 0; equal ones are ordered by chance, not by hour
    or variable. Cells that were not measured come last."""
    flat = importance_NTV.masked_fill(~observed_NTV, -torch.inf).flatten(1)
    drawn = torch.rand(flat.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mixed = drawn.argsort(dim=1).to(flat.device)
    order = mixed.gather(1, flat.gather(1, mixed).argsort(dim=1, descending=True, stable=True))
    places = torch.arange(flat.shape[1], device=flat.device).expand_as(order)
    return torch.empty_like(order).scatter(1, order, places).view_as(importance_NTV)


def removal(logit: Explained, stays: Cells, cell_map: CellMap, *, seed: int = 0) -> Removal:
    """Takes cells away in the order of the map. A share is rounded up to whole cells. Raises ValueError."""
    values, observed = cell_map.values_NTV, stays.observed
    if values.shape != observed.shape:
        raise ValueError(f"{cell_map.name} has shape {list(values.shape)}; it must be {list(observed.shape)}")
    if not bool(values.isfinite().all()):
        raise ValueError(f"{cell_map.name} holds values that are not finite; such cells have no order")
    number_N = observed.sum((1, 2))
    all_N = logit.without(stays)
    direction_N = torch.sign(all_N - logit.without(stays, observed))

    def count(share: float) -> Tensor:
        return (share * number_N - 1e-6).ceil().clamp(min=0)[:, None, None]

    support = values * direction_N[:, None, None] if cell_map.signed else values
    place = ranks(support, observed, seed)
    without = [all_N - logit.without(stays, observed & (place < count(share))) for share in SHARES]
    only = [all_N - logit.without(stays, observed & (place >= count(share))) for share in SHARES]
    steps = []
    for first in (values.abs(), -values.abs()):
        place = ranks(first, observed, seed)
        path = [logit.without(stays, observed & (place < count(share))) for share in PATH]
        steps.append(torch.stack(path, -1).diff(dim=-1).abs().sum(-1))
    d_N1 = direction_N[:, None]
    return Removal(d_N1 * torch.stack(without, -1), d_N1 * torch.stack(only, -1), *steps)


def faithfulness(
    logit: Explained,
    stays: Cells,
    maps: Sequence[CellMap],
    *,
    plain: CellMap | None = None,
    patients: ArrayLike | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Faithfulness]:
    """The maps, a plain one and random orders by their names. plain: what a map without any model would say; None: |z|
    of `StayCells`. patients: whose each stay is, None: each its own patient's.

    Random orders themselves are compared with others of the same number. Raises ValueError.
    """
    if plain is None:
        if not isinstance(stays, StayCells):
            raise ValueError("plain is None, and what is explained has no |z|; give a map that needs no model")
        plain = sizes(stays)
    names = [cell_map.name for cell_map in maps]
    if len(set(names)) < len(names) or {plain.name, "random"} & set(names):
        raise ValueError(f"maps are named {names}; names must differ, and {plain.name} and random are added here")
    checks.count(draws, "draws", 1)
    first, second = (random_removal(logit, stays, draws, start) for start in (seed, seed + draws))
    found = {one.name: removal(logit, stays, one, seed=seed) for one in (*maps, plain)} | {"random": second}
    of_N = range(len(stays)) if patients is None else patients
    return {name: summarise(name, one, first, of_N, seed) for name, one in found.items()}


def random_removal(logit: Explained, stays: Cells, draws: int = DRAWS, seed: int = 0) -> Removal:
    """What chance reaches: the mean of so many random orders."""
    found = [removal(logit, stays, by_chance(stays, one), seed=one) for one in range(seed, seed + draws)]
    fields = ("comprehensiveness_NK", "sufficiency_NK", "difference_N", "preservation_N")
    return Removal(*(torch.stack([getattr(one, field) for one in found]).mean(0) for field in fields))


def summarise(name: str, found: Removal, chance: Removal, patients: ArrayLike, seed: int = 0) -> Faithfulness:
    """What taking cells away does in a map's order, against what it does in random ones. patients: whose each row is;
    rows may come from several models, as those of folds do."""

    def above(better: Tensor, worse: Tensor) -> Interval:
        chance_N, found_N = (x.mean(-1).double().cpu().numpy() for x in (worse, better))
        return interval(gain, chance_N, found_N, patients, seed=seed)

    return Faithfulness(
        name=name,
        comprehensiveness=tuple(found.comprehensiveness_NK.mean(0).tolist()),
        sufficiency=tuple(found.sufficiency_NK.mean(0).tolist()),
        difference=float(found.difference_N.mean()),
        preservation=float(found.preservation_N.mean()),
        more_comprehensive=above(found.comprehensiveness_NK, chance.comprehensiveness_NK),
        less_sufficient=above(chance.sufficiency_NK, found.sufficiency_NK),
    )


def rank_correlation(first_NTV: Tensor, second_NTV: Tensor, observed_NTV: Tensor) -> Tensor:
    """Spearman's rho of two maps over the measured cells of each stay, equal values sharing their mean rank; NaN where
    a stay has fewer than two cells or a map is the same on all. Raises ValueError for maps of other shapes."""
    for values in (first_NTV, second_NTV):
        if values.shape != observed_NTV.shape:
            raise ValueError(f"a map has shape {list(values.shape)}; it must be {list(observed_NTV.shape)}")
    seen = observed_NTV.flatten(1)
    centred = []
    for values in (first_NTV, second_NTV):
        flat = values.double().masked_fill(~observed_NTV, torch.inf).flatten(1)  # they come last, and are left out
        ordered = flat.sort(dim=1).values
        below, upto = (torch.searchsorted(ordered, flat, right=right) for right in (False, True))
        rank = (below + upto).double() * seen
        middle = rank.sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp(min=1)
        centred.append((rank - middle) * seen)
    one, two = centred
    scale = (one.square().sum(1) * two.square().sum(1)).sqrt()
    return torch.where(scale > 0, (one * two).sum(1) / scale, torch.nan)


def with_shuffled_weights(model: nn.Module, seed: int) -> nn.Module:
    """A copy in which the numbers of every parameter have changed places: sizes stay, what was learned is gone."""
    generator = torch.Generator().manual_seed(seed)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return copied


def randomisation_check(
    explain: Callable[[nn.Module], CellMap], model: nn.Module, stays: Cells, *, seeds: Sequence[int] = (0, 1, 2)
) -> float:
    """Mean rank correlation of a model's map and those of copies with shuffled weights (arXiv 1810.03292). A map that
    explains the model is near 0; one that stays the same tells of the input alone. NaN where no stay has an order.
    Raises ValueError."""
    if not seeds:
        raise ValueError("seeds is empty; name at least one")
    own = explain(model).values_NTV
    found = [
        rank_correlation(own, explain(with_shuffled_weights(model, seed)).values_NTV, stays.observed) for seed in seeds
    ]
    return float(torch.stack(found).nanmean())


def stability(maps: Sequence[CellMap], stays: Cells) -> float:
    """Mean rank correlation over stays and over pairs of maps, one from each model that differs by its seed alone.
    Raises ValueError for fewer than two."""
    if len(maps) < 2:
        raise ValueError(f"maps has {len(maps)}; stability needs those of at least 2 seeds")
    pairs = itertools.combinations([one.values_NTV for one in maps], 2)
    return float(torch.stack([rank_correlation(*pair, stays.observed) for pair in pairs]).nanmean())
