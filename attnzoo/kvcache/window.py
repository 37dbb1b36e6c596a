"""The sliding window: keep the newest keys and values and the first few, in constant memory.

Source: windows, Beltagy et al. 2020 (arXiv 2004.05150); attention sinks, Xiao et al. 2023 (arXiv 2309.17453). Exact for
a variant that masks by the same window: only entries that no later query may see are dropped. Positions stay logical,
where StreamingLLM renumbers the cache.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.kvcache.base import (
    EMPTY,
    CachePolicy,
    CacheSize,
    CacheState,
    CacheView,
    NewTokens,
    Occupied,
    ScoreFunction,
    attend_view,
    check_chunk,
)
from attnzoo.ops.common.masks import Mask, check_window
from attnzoo.ops.common.step_inputs import StepInputs


@dataclass
class WindowCacheState(CacheState):
    """keys_BKCH, values_BKCH. Sinks come first; the token of position p >= sinks is in slot sinks + (p - sinks) mod
    window. A sequence's length says which slots hold a token, and which."""

    keys_BKCH: Tensor
    values_BKCH: Tensor

    @property
    def heads(self) -> tuple[int, int]:
        return self.keys_BKCH.shape[1], self.keys_BKCH.shape[3]

    @property
    def slots(self) -> int:
        return self.keys_BKCH.shape[2]

    @property
    def rewinds(self) -> bool:
        return False

    def shares(self, after: Any) -> bool:
        return isinstance(after, WindowCacheState) and after.keys_BKCH is self.keys_BKCH

    def occupied(self, row: int, length: int) -> Occupied:
        kept = min(length, self.slots)
        return Occupied(kept, self.rows(slice(row, row + 1)).nbytes() * kept // max(1, self.slots))


@dataclass(frozen=True)
class _Plan:
    """Where a chunk goes. slots: C after it; seen_B1S: the positions of what its queries may see, `EMPTY` in empty
    slots and for padding; mask: the window between them; rows_L, steps_L, slots_L: the tokens that are written, and
    where."""

    slots: int
    seen_B1S: Tensor
    mask: Mask
    rows_L: Tensor
    steps_L: Tensor
    slots_L: Tensor


class WindowCache(CachePolicy):
    """At most `sinks + window` tokens per sequence. Raises ValueError for a window below 1 or negative sinks."""

    source = "exact"
    exact = True

    def __init__(self, window: int, sinks: int = 0) -> None:
        check_window(window, sinks)
        self.window, self.sinks = window, sinks

    def describe(self) -> str:
        return f"window(window={self.window}, sinks={self.sinks})"

    def kept(self, context: int) -> int:
        return min(context, self.sinks + self.window)

    def init(self, size: CacheSize, capacity: int) -> WindowCacheState:
        shape = (self.kept(capacity), size.head_dim)
        return WindowCacheState(size.heads(*shape), size.heads(*shape), policy=self)

    def compressed_nbytes(self, size: CacheSize, prompt: int, *, tokens: int = 0, joinable: bool = False) -> int:
        return self.nbytes(size, prompt + tokens)

    def attend(
        self, state: WindowCacheState, score_function: ScoreFunction, new: NewTokens
    ) -> tuple[Tensor, WindowCacheState]:
        check_chunk(new.k_BKTH)
        keys, values = new.k_BKTH, new.v_BKTH
        plan = new.step.once(_plan, self.window, self.sinks, state.slots)
        if new.step.counts_B is not None:
            # Padding may hold NaN, and 0 * NaN would leak through the sum of values.
            padding_BT = torch.arange(new.tokens, device=keys.device) >= new.step.counts_B[:, None]
            keys, values = (x.masked_fill(padding_BT[:, None, :, None], 0.0) for x in (keys, values))
        held = state.keys_BKCH, state.values_BKCH
        if new.tokens > 1:
            # Early queries of the chunk may see what its last tokens overwrite: they attend to both.
            both = [torch.cat([x, y.to(x.dtype)], dim=2) for x, y in zip(held, (keys, values), strict=True)]
            state = self._written(state, keys, values, plan)
        else:
            # The slot that one token takes held a token that has just left its window.
            state = self._written(state, keys, values, plan)
            both = [state.keys_BKCH, state.values_BKCH]
        view = CacheView(both[0], both[1], plan.seen_B1S, mask=plan.mask)
        return attend_view(score_function, new.q_BNTH, view, new.step.positions_BT), state

    def _written(self, state: WindowCacheState, new_keys: Tensor, new_values: Tensor, plan: _Plan) -> WindowCacheState:
        """The state with the chunk's sinks and its last `window` tokens in their slots."""
        keys, values, missing = state.keys_BKCH, state.values_BKCH, plan.slots - state.slots
        if missing:
            keys, values = F.pad(keys, (0, 0, 0, missing)), F.pad(values, (0, 0, 0, missing))
        elif torch.is_grad_enabled() and (new_keys.requires_grad or keys.requires_grad):
            # Earlier steps of the graph hold these buffers for their backward pass.
            keys, values = keys.clone(), values.clone()
        keys[plan.rows_L, :, plan.slots_L] = new_keys[plan.rows_L, :, plan.steps_L].to(keys.dtype)
        values[plan.rows_L, :, plan.slots_L] = new_values[plan.rows_L, :, plan.steps_L].to(values.dtype)
        return WindowCacheState(keys, values, policy=self)


def _plan(step: StepInputs, window: int, sinks: int, have: int) -> _Plan:
    """`_Plan` for a cache of `have` slots, which gets as many as the longest sequence needs, at most sinks + window;
    entries keep their slots."""
    positions_BT, before_B, after_B = step.positions_BT, step.before(), step.after()
    new_BT = torch.where(positions_BT < after_B[:, None], positions_BT, EMPTY)
    slots = max(have, min(max(map(operator.add, *step.integers())), sinks + window))
    kept_BT = (new_BT >= 0) & ((new_BT < sinks) | (new_BT >= after_B[:, None] - window))
    rows_L, steps_L = kept_BT.nonzero(as_tuple=True)
    at_L = new_BT[rows_L, steps_L]
    if step.tokens == 1:
        seen_BS = _positions(after_B, slots, window, sinks)
    else:
        seen_BS = torch.cat([_positions(before_B, have, window, sinks), new_BT], dim=1)
    slots_L = torch.where(at_L < sinks, at_L, sinks + (at_L - sinks) % window)
    seen_B1S = seen_BS[:, None]
    mask = Mask(window=window, sinks=sinks, query_positions_BT=positions_BT, key_positions_BKS=seen_B1S)
    return _Plan(slots, seen_B1S, mask, rows_L, steps_L, slots_L)


def _positions(lengths_B: Tensor, slots: int, window: int, sinks: int) -> Tensor:
    """positions_BC in the slots of sequences of these lengths, `EMPTY` where there is no token."""
    slots_C = torch.arange(slots, device=lengths_B.device)
    newest_B1 = lengths_B[:, None] - 1
    # The newest token of those that share a slot; before `sinks` where there is none yet.
    ring_BC = newest_B1 - (newest_B1 - slots_C) % window
    held_BC = torch.where(slots_C < sinks, slots_C < lengths_B[:, None], ring_BC >= sinks)
    return torch.where(held_BC, torch.where(slots_C < sinks, slots_C, ring_BC), EMPTY)
