"""The next token of many rows in a few operations, each row by its own options and its own random numbers.

A row's token and log probabilities are the same bits alone and among others. Results are waited for once.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from attnzoo.models.sampling import FLAT, TokenLogprobs, greedy

NUCLEUS = 1024
"""Tokens among which the smallest set of probability top_p is looked for before all are sorted. Measured: of 49,152
they are found in a sixth of the time of sorting."""
MARGIN = 1e-5
"""Where a sum of probabilities is as near to top_p as this, float32's rounding decides, and all tokens are sorted. The
sums of 50,000 float32 numbers are some 1e-6 off."""
BLOCK = 1 << 19
"""Numbers of the logits that are worked on at a time, which bounds memory: some 20 bytes each."""


Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class RowDraw:
    """How a row's token is drawn: as `attnzoo.models.Sampling` says, with noise_V from `exponential_noise`."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    noise_V: Tensor


@dataclass(frozen=True, slots=True)
class RowWish:
    """What is wanted of a row. draw: None takes the most likely token. logprobs: number of alternatives whose log
    probabilities are reported beside the token's; None: no log probabilities. change: of logits_V, before the token is
    chosen (`LogitChanges`)."""

    draw: RowDraw | None = None
    logprobs: int | None = None
    change: Change | None = None


class RowOptions(Protocol):
    """Options of a row's owner, as `attnzoo.models.Sampling` and `RowWish` have them."""

    @property
    def temperature(self) -> float: ...

    @property
    def top_p(self) -> float: ...

    @property
    def top_k(self) -> int: ...

    @property
    def min_p(self) -> float: ...

    @property
    def logprobs(self) -> int | None: ...


Chosen = tuple[int, TokenLogprobs | None]
"""A token id, and its log probabilities where they are wanted: the model's, before anything changes them."""


def exponential_noise(shape: Sequence[int], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """float32 numbers of an exponential distribution, the same bits that `torch.multinomial` divides probabilities
    by."""
    if device.type != "cpu":
        return torch.empty(*shape, device=device).exponential_(1, generator=generator)
    # What `exponential_` does on a CPU, one number at a time, in a third of its time.
    uniform = torch.empty(*shape, dtype=torch.float64).uniform_(generator=generator)
    return uniform.neg_().log1p_().neg_().float()


def row_wish(
    options: RowOptions, logits_RV: Tensor, generator: torch.Generator | None, change: Change | None = None
) -> RowWish:
    """The wish for a row of logits_RV; draws the row's random numbers, unless it takes the most likely token."""
    if greedy(options.temperature):
        return RowWish(logprobs=options.logprobs, change=change)
    noise_V = exponential_noise([logits_RV.shape[-1]], generator, logits_RV.device)
    draw = RowDraw(options.temperature, options.top_p, options.top_k, options.min_p, noise_V)
    return RowWish(draw, options.logprobs, change)


def choose_rows(logits_RV: Tensor, wishes: Sequence[RowWish]) -> list[Chosen | None]:
    """The token of each row as its wish says, or None where the largest of the row's logits is not a finite number,
    which is of no consequence for the other rows."""
    if not wishes:
        return []
    changed_RV = _changed(logits_RV, wishes)
    largest_R1, best_R1 = changed_RV.max(-1, keepdim=True)  # NaN is larger than everything
    tokens_R = best_R1[:, 0].clone()
    drawn = {row: wish.draw for row, wish in enumerate(wishes) if wish.draw is not None}
    for rows in _blocks(list(drawn), logits_RV):
        tokens_R[rows] = draw_tokens(changed_RV[rows], largest_R1[rows], [drawn[row] for row in rows])
    by_count: dict[int, list[int]] = defaultdict(list)
    for row, wish in enumerate(wishes):
        if wish.logprobs is not None:
            by_count[min(wish.logprobs, logits_RV.shape[-1])].append(row)
    # In float64 token ids and float32 numbers keep their values, so that one transfer takes all of them.
    parts = [tokens_R.masked_fill(~largest_R1[:, 0].isfinite(), -1).double()]
    places: list[tuple[int, int]] = []
    for count, reported in by_count.items():
        for rows in _blocks(reported, logits_RV):
            parts.append(row_logprobs(logits_RV[rows], tokens_R[rows], count).flatten())
            places += [(row, count) for row in rows]
    numbers: list[float] = torch.cat(parts).tolist()
    return _unpacked(numbers, len(wishes), places)


def _changed(logits_RV: Tensor, wishes: Sequence[RowWish]) -> Tensor:
    """logits_RV as they are, or a float32 copy in which some rows are changed."""
    changes = [(row, wish.change) for row, wish in enumerate(wishes) if wish.change is not None]
    if not changes:
        return logits_RV
    changed_RV = logits_RV.float().clone()
    for row, change in changes:
        changed_RV[row] = change(changed_RV[row])
    return changed_RV


def _unpacked(numbers: list[float], rows: int, places: list[tuple[int, int]]) -> list[Chosen | None]:
    """places: (row, number of alternatives) of the log probabilities that follow the tokens, in their order."""
    tokens, first = [int(number) for number in numbers[:rows]], rows
    found: dict[int, TokenLogprobs] = {}
    for row, count in places:
        ids = [int(number) for number in numbers[first + 1 : first + 1 + count]]
        values = numbers[first + 1 + count : first + 1 + 2 * count]
        found[row] = TokenLogprobs(tokens[row], numbers[first], tuple(zip(ids, values, strict=True)))
        first += 1 + 2 * count
    return [None if token < 0 else (token, found.get(row)) for row, token in enumerate(tokens)]


def _blocks(rows: list[int], logits_RV: Tensor) -> Iterator[list[int]]:
    size = max(1, BLOCK // max(logits_RV.shape[-1], 1))
    return (rows[first : first + size] for first in range(0, len(rows), size))


def draw_tokens(logits_BV: Tensor, largest_B1: Tensor, draws: Sequence[RowDraw]) -> Tensor:
    """tokens_B drawn from softmax(logits / temperature) after min_p, top_k and top_p. largest_B1: of each row."""
    temperature_B1 = _column([float(min(draw.temperature, FLAT)) for draw in draws], logits_BV.device)
    # The largest is 0, so none overflows to inf; those that overflow to -inf have probability 0.
    scaled_BV = (logits_BV.float() - largest_B1.float()) / temperature_B1
    scaled_BV = drop_unlikely(scaled_BV, [draw.min_p for draw in draws])
    scaled_BV = filter_rows(scaled_BV, [draw.top_k for draw in draws], [draw.top_p for draw in draws])
    # Of exponential times with the rates p, the first is token i's with probability p_i: as `torch.multinomial` draws.
    return scaled_BV.softmax(-1).div_(torch.stack([draw.noise_V for draw in draws])).argmax(-1)


def drop_unlikely(scaled_BV: Tensor, min_p: Sequence[float]) -> Tensor:
    """scaled_BV with -inf, in each row, for tokens less likely than min_p (0: none) times the most likely one (Nguyen
    et al. 2024, arXiv 2407.01082). scaled_BV: logits of which the largest is 0."""
    bounded = [row for row, share in enumerate(min_p) if share > 0]
    if not bounded:
        return scaled_BV
    some_SV = scaled_BV[bounded]
    least_S1 = _column([min_p[row] for row in bounded], scaled_BV.device).log()
    return _replaced(scaled_BV, bounded, some_SV.masked_fill(some_SV < least_S1, -torch.inf))


def filter_rows(scaled_BV: Tensor, top_k: Sequence[int], top_p: Sequence[float]) -> Tensor:
    """scaled_BV with -inf, in each row, for all but the top_k largest (0: all) and the smallest set of probability
    top_p (1.0: all).

    scaled_BV: logits of which the largest is 0. The most likely token always stays. top_p is applied after top_k
    (nucleus sampling, Holtzman et al. 2019, arXiv 1904.09751), and of equal logits takes those that come first.
    """
    counted = [row for row, count in enumerate(top_k) if 0 < count < scaled_BV.shape[-1]]
    if counted:
        some_SV = scaled_BV[counted]
        index_S1 = torch.tensor([[top_k[row] - 1] for row in counted], device=scaled_BV.device)
        smallest_S1 = some_SV.topk(max(top_k[row] for row in counted)).values.gather(-1, index_S1)
        scaled_BV = _replaced(scaled_BV, counted, some_SV.masked_fill(some_SV < smallest_S1, -torch.inf))
    bounded = [row for row, mass in enumerate(top_p) if mass < 1.0]
    if bounded:
        top_p_S1 = _column([top_p[row] for row in bounded], scaled_BV.device)
        scaled_BV = _replaced(scaled_BV, bounded, _nucleus(scaled_BV[bounded], top_p_S1))
    return scaled_BV


def _replaced(values_BV: Tensor, rows: list[int], some_SV: Tensor) -> Tensor:
    if len(rows) == len(values_BV):
        return some_SV
    return values_BV.index_copy(0, torch.tensor(rows, device=values_BV.device), some_SV)


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None]


def _nucleus(scaled_BV: Tensor, top_p_B1: Tensor) -> Tensor:
    if scaled_BV.device.type != "cpu":
        return _nucleus_by_sorting(scaled_BV, top_p_B1)  # what decides below would be waited for
    found_BV, sure_B = _nucleus_of_few(scaled_BV, top_p_B1)
    unsure = (~sure_B).nonzero()[:, 0]
    if len(unsure):
        found_BV[unsure] = _nucleus_by_sorting(scaled_BV[unsure], top_p_B1[unsure])
    return found_BV


def _nucleus_by_sorting(scaled_BV: Tensor, top_p_B1: Tensor) -> Tensor:
    ordered_BV, index_BV = scaled_BV.sort(dim=-1, descending=True, stable=True)
    mass_BV = ordered_BV.softmax(-1)
    drop_BV = mass_BV.cumsum(-1) - mass_BV >= top_p_B1
    drop_BV[..., 0] = False  # also where top_p rounds to 0
    return scaled_BV.masked_fill(torch.zeros_like(drop_BV).scatter(-1, index_BV, drop_BV), -torch.inf)


def _nucleus_of_few(scaled_BV: Tensor, top_p_B1: Tensor) -> tuple[Tensor, Tensor]:
    """What `_nucleus_by_sorting` gives, by the largest `NUCLEUS` logits; and for which rows they are enough to be sure
    of it: their sum exceeds top_p, and no sum on the way is so near to it that rounding decides."""
    width = scaled_BV.shape[-1]
    top_BK = scaled_BV.topk(min(NUCLEUS, width)).values
    mass_BK = top_BK.exp().double() / scaled_BV.exp().sum(-1, keepdim=True, dtype=torch.float64)
    before_BK = mass_BK.cumsum(-1) - mass_BK
    sure_B = ((before_BK - top_p_B1).abs() > MARGIN).all(-1)
    if top_BK.shape[-1] < width:
        sure_B &= before_BK[:, -1] > top_p_B1[:, 0]
    stays_BK = before_BK < top_p_B1
    last_B1 = (stays_BK.sum(-1, keepdim=True) - 1).clamp(min=0)
    least_B1 = top_BK.gather(-1, last_B1)
    equal_BV, ties_B1 = scaled_BV == least_B1, ((top_BK == least_B1) & stays_BK).sum(-1, keepdim=True)
    stays_BV = (scaled_BV > least_B1) | (equal_BV & (equal_BV.cumsum(-1, dtype=torch.int32) <= ties_B1))
    return scaled_BV.masked_fill(~stays_BV, -torch.inf), sure_B


def row_logprobs(logits_BV: Tensor, tokens_B: Tensor, count: int) -> Tensor:
    """[rows, 1 + 2 * count] in float64: the logarithm of the token's probability, and the ids and logarithms of the
    `count` most likely ones."""
    values_BV = logits_BV.float().log_softmax(-1)
    own_B1, best = values_BV.gather(-1, tokens_B[:, None]), values_BV.topk(count)
    return torch.cat([own_B1.double(), best.indices.double(), best.values.double()], dim=-1)
