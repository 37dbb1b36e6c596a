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

from attnzoo.kvcache.base import EMPTY, CacheView, ExactCache, check_chunk
from attnzoo.kvcache.state import State, new_zeros
from attnzoo.ops.common.masks import check_window
from attnzoo.types import dtype_bytes


@dataclass
class WindowCacheState(State):
    """keys_BKCH, values_BKCH and next_positions_BC (int64: position + 1, so that an empty slot is 0). Sinks come first;
    the token of position p >= sinks is in slot sinks + (p - sinks) mod window."""

    keys_BKCH: Tensor
    values_BKCH: Tensor
    next_positions_BC: Tensor

    @property
    def rewinds(self) -> bool:
        return False

    def shares(self, after: Any) -> bool:
        return isinstance(after, WindowCacheState) and after.keys_BKCH is self.keys_BKCH


class WindowCache(ExactCache):
    """At most `sinks + window` tokens per sequence. Raises ValueError for a window below 1 or negative sinks."""

    def __init__(self, window: int, sinks: int = 0) -> None:
        check_window(window, sinks)
        self.window, self.sinks = window, sinks

    def _slots(self, capacity: int) -> int:
        return min(capacity, self.sinks + self.window)

    def init(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> WindowCacheState:
        slots = self._slots(capacity)
        shape = (batch, num_kv_heads, slots, head_dim)
        return WindowCacheState(
            new_zeros(*shape, device=device, dtype=dtype),
            new_zeros(*shape, device=device, dtype=dtype),
            new_zeros(batch, slots, device=device, dtype=torch.int64),
        )

    def nbytes(self, batch: int, num_kv_heads: int, head_dim: int, capacity: int, dtype: torch.dtype) -> int:
        entry = 2 * num_kv_heads * head_dim * dtype_bytes(dtype) + dtype_bytes(torch.int64)
        return batch * self._slots(capacity) * entry

    def append(
        self,
        state: WindowCacheState,
        keys_BKTH: Tensor,
        values_BKTH: Tensor,
        positions_BT: Tensor,
        counts_B: Tensor | None,
    ) -> tuple[WindowCacheState, CacheView]:
        check_chunk(keys_BKTH)
        tokens = positions_BT.shape[1]
        real_BT = torch.ones_like(positions_BT, dtype=torch.bool)
        if counts_B is not None:
            real_BT = torch.arange(tokens, device=positions_BT.device) < counts_B[:, None]
        # Padding may hold NaN, and 0 * NaN would leak through the sum of values.
        keys_BKTH = keys_BKTH.masked_fill(~real_BT[:, None, :, None], 0.0)
        values_BKTH = values_BKTH.masked_fill(~real_BT[:, None, :, None], 0.0)
        new_BT = torch.where(real_BT, positions_BT, EMPTY)
        if tokens == 1:
            # The slot that one token takes held a token that has just left its window.
            state = self._write(state, keys_BKTH, values_BKTH, new_BT)
            return state, CacheView(state.keys_BKCH, state.values_BKCH, state.next_positions_BC[:, None] - 1)
        # Early queries of the chunk may see what its last tokens overwrite: attend to both, then write.
        view = CacheView(
            torch.cat([state.keys_BKCH, keys_BKTH.to(state.keys_BKCH.dtype)], dim=2),
            torch.cat([state.values_BKCH, values_BKTH.to(state.values_BKCH.dtype)], dim=2),
            torch.cat([state.next_positions_BC - 1, new_BT], dim=1)[:, None],
        )
        return self._write(state, keys_BKTH, values_BKTH, new_BT), view

    def _write(
        self, state: WindowCacheState, keys_BKTH: Tensor, values_BKTH: Tensor, new_BT: Tensor
    ) -> WindowCacheState:
        """The state with the chunk's sinks and its last `window` tokens in their slots."""
        state = self._with_room(state, int(new_BT.max()) + 1)
        ends_B1 = new_BT.amax(1, keepdim=True)
        kept_BT = (new_BT >= 0) & ((new_BT < self.sinks) | (new_BT > ends_B1 - self.window))
        rows_L, steps_L = kept_BT.nonzero(as_tuple=True)
        positions_L = new_BT[rows_L, steps_L]
        slots_L = torch.where(
            positions_L < self.sinks, positions_L, self.sinks + (positions_L - self.sinks) % self.window
        )
        keys, values, positions = state.keys_BKCH, state.values_BKCH, state.next_positions_BC
        if torch.is_grad_enabled() and (keys_BKTH.requires_grad or keys.requires_grad):
            # Earlier steps of the graph hold these buffers for their backward pass.
            keys, values, positions = keys.clone(), values.clone(), positions.clone()
        keys[rows_L, :, slots_L] = keys_BKTH[rows_L, :, steps_L].to(keys.dtype)
        values[rows_L, :, slots_L] = values_BKTH[rows_L, :, steps_L].to(values.dtype)
        positions[rows_L, slots_L] = positions_L + 1
        return WindowCacheState(keys, values, positions)

    def _with_room(self, state: WindowCacheState, used: int) -> WindowCacheState:
        """The state with as many slots as `used` tokens need, at most sinks + window. Entries keep their slots."""
        have = state.keys_BKCH.shape[2]
        missing = self._slots(max(used, have)) - have
        if missing <= 0:
            return state
        return WindowCacheState(
            F.pad(state.keys_BKCH, (0, 0, 0, missing)),
            F.pad(state.values_BKCH, (0, 0, 0, missing)),
            F.pad(state.next_positions_BC, (0, missing)),
        )
