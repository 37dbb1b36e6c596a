"""The sliding window: keep the newest keys and values and the first few, in constant memory.

Source: windows, Beltagy et al. 2020 (arXiv 2004.05150); attention sinks, Xiao et al. 2023 (arXiv 2309.17453). Exact for
a variant that masks by the same window: only entries that no later query may see are dropped. Positions stay logical,
where StreamingLLM renumbers the cache.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.kvcache.base import (
    EMPTY,
    QKV,
    CachePolicy,
    CacheSize,
    CacheState,
    CacheView,
    Occupied,
    ScoreFunction,
    attend_view,
    check_chunk,
)
from attnzoo.ops.common.masks import check_window
from attnzoo.ops.common.recent import recent


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
class _Chunk:
    """Where a chunk goes. before_BC, after_BC: positions in C slots before and after it, `EMPTY` in empty ones; new_BT:
    its positions, `EMPTY` for padding; rows_L, steps_L, slots_L: the tokens that are written, and where."""

    before_BC: Tensor
    after_BC: Tensor
    new_BT: Tensor
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
        self,
        state: WindowCacheState,
        score_function: ScoreFunction,
        qkv: QKV,
        positions_BT: Tensor,
        counts_B: Tensor | None,
    ) -> tuple[Tensor, WindowCacheState]:
        state, view = self.append(state, qkv[1], qkv[2], positions_BT, counts_B)
        return attend_view(score_function, qkv[0], view, positions_BT), state

    def append(
        self,
        state: WindowCacheState,
        keys_BKTH: Tensor,
        values_BKTH: Tensor,
        positions_BT: Tensor,
        counts_B: Tensor | None,
    ) -> tuple[WindowCacheState, CacheView]:
        """Adds a chunk: (new state, view of what its queries may see)."""
        check_chunk(keys_BKTH)
        have = state.keys_BKCH.shape[2]
        chunk = _chunk(positions_BT, counts_B, self.window, self.sinks, have)
        if counts_B is not None:
            # Padding may hold NaN, and 0 * NaN would leak through the sum of values.
            padding_B1T1 = (chunk.new_BT < 0)[:, None, :, None]
            keys_BKTH, values_BKTH = (x.masked_fill(padding_B1T1, 0.0) for x in (keys_BKTH, values_BKTH))
        if positions_BT.shape[1] == 1:
            # The slot that one token takes held a token that has just left its window.
            state = self._write(state, keys_BKTH, values_BKTH, chunk)
            return state, CacheView(state.keys_BKCH, state.values_BKCH, chunk.after_BC[:, None])
        # Early queries of the chunk may see what its last tokens overwrite: attend to both, then write.
        view = CacheView(
            torch.cat([state.keys_BKCH, keys_BKTH.to(state.keys_BKCH.dtype)], dim=2),
            torch.cat([state.values_BKCH, values_BKTH.to(state.values_BKCH.dtype)], dim=2),
            torch.cat([chunk.before_BC[:, :have], chunk.new_BT], dim=1)[:, None],
        )
        return self._write(state, keys_BKTH, values_BKTH, chunk), view

    def _write(
        self, state: WindowCacheState, keys_BKTH: Tensor, values_BKTH: Tensor, chunk: _Chunk
    ) -> WindowCacheState:
        """The state with the chunk's sinks and its last `window` tokens in their slots."""
        missing = chunk.after_BC.shape[1] - state.keys_BKCH.shape[2]
        keys, values = (F.pad(x, (0, 0, 0, missing)) if missing else x for x in (state.keys_BKCH, state.values_BKCH))
        if torch.is_grad_enabled() and (keys_BKTH.requires_grad or keys.requires_grad):
            # Earlier steps of the graph hold these buffers for their backward pass.
            keys, values = keys.clone(), values.clone()
        keys[chunk.rows_L, :, chunk.slots_L] = keys_BKTH[chunk.rows_L, :, chunk.steps_L].to(keys.dtype)
        values[chunk.rows_L, :, chunk.slots_L] = values_BKTH[chunk.rows_L, :, chunk.steps_L].to(values.dtype)
        return WindowCacheState(keys, values, policy=self)


@recent
def _chunk(positions_BT: Tensor, counts_B: Tensor | None, window: int, sinks: int, have: int) -> _Chunk:
    """`_Chunk` for a cache of `have` slots, which gets as many as the longest sequence needs, at most sinks + window;
    entries keep their slots."""
    tokens, before_B = positions_BT.shape[1], positions_BT[:, 0]
    after_B = before_B + (tokens if counts_B is None else counts_B)
    new_BT = torch.where(positions_BT < after_B[:, None], positions_BT, EMPTY)
    slots = max(have, min(int(after_B.max()), sinks + window))
    kept_BT = (new_BT >= 0) & ((new_BT < sinks) | (new_BT >= after_B[:, None] - window))
    rows_L, steps_L = kept_BT.nonzero(as_tuple=True)
    at_L = new_BT[rows_L, steps_L]
    return _Chunk(
        before_BC=_positions(before_B, slots, window, sinks),
        after_BC=_positions(after_B, slots, window, sinks),
        new_BT=new_BT,
        rows_L=rows_L,
        steps_L=steps_L,
        slots_L=torch.where(at_L < sinks, at_L, sinks + (at_L - sinks) % window),
    )


def _positions(lengths_B: Tensor, slots: int, window: int, sinks: int) -> Tensor:
    """positions_BC in the slots of sequences of these lengths, `EMPTY` where there is no token."""
    slots_C = torch.arange(slots, device=lengths_B.device)
    newest_B1 = lengths_B[:, None] - 1
    # The newest token of those that share a slot; before `sinks` where there is none yet.
    ring_BC = newest_B1 - (newest_B1 - slots_C) % window
    held_BC = torch.where(slots_C < sinks, slots_C < lengths_B[:, None], ring_BC >= sinks)
    return torch.where(held_BC, torch.where(slots_C < sinks, slots_C, ring_BC), EMPTY)
