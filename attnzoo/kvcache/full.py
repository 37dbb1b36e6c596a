"""The full cache: keep every key and value, in the slot of its logical position."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.kvcache.base import EMPTY, CachePolicy, CacheView
from attnzoo.kvcache.state import State, new_zeros
from attnzoo.types import dtype_bytes


@dataclass
class FullCacheState(State):
    """keys_BKSH and values_BKSH with S slots; slot s holds the token of position s."""

    keys_BKSH: Tensor
    values_BKSH: Tensor


class FullCache(CachePolicy):
    """Grows to whatever is asked of it; memory is 2 * K * H elements a token."""

    def init(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> FullCacheState:
        shape = (batch, num_kv_heads, capacity, head_dim)
        return FullCacheState(
            new_zeros(*shape, device=device, dtype=dtype), new_zeros(*shape, device=device, dtype=dtype)
        )

    def nbytes(self, batch: int, num_kv_heads: int, head_dim: int, capacity: int, dtype: torch.dtype) -> int:
        return 2 * batch * num_kv_heads * capacity * head_dim * dtype_bytes(dtype)

    def append(
        self,
        state: FullCacheState,
        keys_BKTH: Tensor,
        values_BKTH: Tensor,
        positions_BT: Tensor,
        counts_B: Tensor | None,
    ) -> tuple[FullCacheState, CacheView]:
        batch, tokens = positions_BT.shape
        ends_B = positions_BT[:, 0] + (tokens if counts_B is None else counts_B)
        used = int(ends_B.max())
        keys = _with_room(state.keys_BKSH, used, keys_BKTH)
        values = _with_room(state.values_BKSH, used, values_BKTH)

        rows_BT = torch.arange(batch, device=positions_BT.device)[:, None].expand(batch, tokens)
        if counts_B is None:
            real = (rows_BT, positions_BT)
            new_keys, new_values = keys_BKTH.transpose(1, 2), values_BKTH.transpose(1, 2)
        else:
            mask_BT = positions_BT < ends_B[:, None]
            real = (rows_BT[mask_BT], positions_BT[mask_BT])
            new_keys, new_values = keys_BKTH.transpose(1, 2)[mask_BT], values_BKTH.transpose(1, 2)[mask_BT]
        # Indexing B and S around the K axis puts K after the indexed axes: [..., K, H], as in new_keys.
        keys[real[0], :, real[1]] = new_keys.to(keys.dtype)
        values[real[0], :, real[1]] = new_values.to(values.dtype)

        slots_S = torch.arange(used, device=positions_BT.device)
        positions_B1S = torch.where(slots_S < ends_B[:, None], slots_S, EMPTY)[:, None]
        view = CacheView(keys[:, :, :used], values[:, :, :used], positions_B1S)
        return FullCacheState(keys, values), view


def _with_room(buffer_BKSH: Tensor, used: int, new_BKTH: Tensor) -> Tensor:
    """The buffer to write into: itself where that is safe, a copy where autograd or a lack of room asks for one."""
    missing = used - buffer_BKSH.shape[2]
    if missing > 0:
        # Doubling keeps the copies of token-by-token growth linear in the final length.
        return F.pad(buffer_BKSH, (0, 0, 0, max(missing, buffer_BKSH.shape[2])))
    if torch.is_grad_enabled() and (new_BKTH.requires_grad or buffer_BKSH.requires_grad):
        # Earlier steps of the graph hold this buffer for their backward pass.
        return buffer_BKSH.clone()
    return buffer_BKSH
