"""The full cache: keep every key and value, in the slot of its logical position."""

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.kvcache.base import (
    CACHES,
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
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.common.step_inputs import StepInputs


@dataclass
class FullCacheState(CacheState):
    """keys_BKSH and values_BKSH with S slots; slot s holds the token of position s."""

    keys_BKSH: Tensor
    values_BKSH: Tensor

    @property
    def heads(self) -> tuple[int, int]:
        return self.keys_BKSH.shape[1], self.keys_BKSH.shape[3]

    @property
    def slots(self) -> int:
        return self.keys_BKSH.shape[2]

    def shares(self, after: Any) -> bool:
        return isinstance(after, FullCacheState) and after.keys_BKSH is self.keys_BKSH

    def cut(self, tokens: int) -> "FullCacheState":
        return replace(self, keys_BKSH=self.keys_BKSH[:, :, :tokens], values_BKSH=self.values_BKSH[:, :, :tokens])

    def occupied(self, row: int, length: int) -> Occupied:
        used = self.rows(slice(row, row + 1)).cut(length)
        return Occupied(length, used.nbytes())


@dataclass(frozen=True, kw_only=True)
class FullConfig:
    """No options."""


@CACHES.register("full")
class FullCache(CachePolicy):
    """A cache that grows as needed; memory is 2 * K * H elements per token. Where a model is given this policy, each
    layer keeps its own exact cache: all tokens, or its window."""

    source = "exact"
    Config = FullConfig
    exact = True
    compiles = True

    def __init__(self, config: FullConfig | None = None) -> None:
        self.config = config or FullConfig()

    def init(self, size: CacheSize, capacity: int) -> FullCacheState:
        shape = (capacity, size.head_dim)
        return FullCacheState(size.heads(*shape), size.heads(*shape), policy=self)

    def attend(
        self, state: FullCacheState, score_function: ScoreFunction, new: NewTokens
    ) -> tuple[Tensor, FullCacheState]:
        state, view = append(state, new.k_BKTH, new.v_BKTH, new.step)
        return attend_view(score_function, new.q_BNTH, view, new.step.positions_BT), state

    def compressed_nbytes(self, size: CacheSize, prompt: int, *, tokens: int = 0, joinable: bool = False) -> int:
        return self.nbytes(size, prompt + tokens)


def compressing(cache: Any) -> CachePolicy | None:
    """The policy where it may keep less than the variant's own exact cache; None for None and for "full". Raises
    ValueError for what is no policy, and for another exact one, which belongs to a variant."""
    if cache is None or isinstance(cache, FullCache):
        return None
    if not isinstance(cache, CachePolicy) or cache.exact:
        raise ValueError(f"cache={cache!r} is no cache policy; attnzoo.kvcache.build_cache makes one of a name")
    return cache


def append(
    state: FullCacheState, keys_BKTH: Tensor, values_BKTH: Tensor, step: StepInputs
) -> tuple[FullCacheState, CacheView]:
    """Adds a chunk, whose positions say its slots: (new state, view of all tokens)."""
    check_chunk(keys_BKTH)
    # The compiler does not know lengths, which are values: callers cut the buffers to the used slots before.
    compiling = torch.compiler.is_compiling()
    slots = step.once(_slots, state.keys_BKSH.shape[2] if compiling else None)
    keys = with_room(state.keys_BKSH, slots.used, keys_BKTH)
    values = with_room(state.values_BKSH, slots.used, values_BKTH)
    slots.write(keys, keys_BKTH)
    slots.write(values, values_BKTH)
    held = keys[:, :, : slots.used], values[:, :, : slots.used]
    view = CacheView(*held, slots.positions_B1S, alone=slots.first == 0, mask=slots.mask)
    if keys is state.keys_BKSH:
        return state, view
    return FullCacheState(keys, values, policy=state.policy), view


@dataclass(frozen=True)
class _Slots:
    """The slots that a chunk is written to, and the slots in use afterwards.

    first: the slot of the first token where all rows are equally long and all tokens are real; else None, and `rows`
    and `targets` index B and S for the tokens that real_BT picks (None: all). used: slots of the longest row after the
    chunk; positions_B1S: the logical positions in them; mask: causality between these and the chunk's.
    """

    first: int | None
    rows: Tensor
    targets: Tensor
    real_BT: Tensor | None
    used: int
    positions_B1S: Tensor
    mask: Mask

    def write(self, buffer_BKSH: Tensor, new_BKTH: Tensor) -> None:
        if self.first is not None:
            buffer_BKSH[:, :, self.first : self.used].copy_(new_BKTH)
        else:
            # Indexing B and S around the K axis puts K after the indexed axes: [..., K, H].
            new_BTKH = new_BKTH.transpose(1, 2)
            new = new_BTKH if self.real_BT is None else new_BTKH[self.real_BT]
            buffer_BKSH[self.rows, :, self.targets] = new.to(buffer_BKSH.dtype)


def _slots(step: StepInputs, used: int | None) -> _Slots:
    """used: slots in use after the chunk; None: computed from the positions."""
    positions_BT, ends_B = step.positions_BT, step.after()
    batch, tokens = positions_BT.shape
    first = None
    if used is None:
        lengths, counts = step.integers()
        used = max(map(operator.add, lengths, counts))
        first = lengths[0] if min(lengths) == max(lengths) and min(counts) == tokens else None
    real_BT = None if step.counts_B is None else positions_BT < ends_B[:, None]
    rows_BT = torch.arange(batch, device=positions_BT.device)[:, None].expand(batch, tokens)
    slots_S = torch.arange(used, device=positions_BT.device)
    positions_B1S = torch.where(slots_S < ends_B[:, None], slots_S, EMPTY)[:, None]
    return _Slots(
        first=first,
        rows=rows_BT if real_BT is None else rows_BT[real_BT],
        targets=positions_BT if real_BT is None else positions_BT[real_BT],
        real_BT=real_BT,
        used=used,
        positions_B1S=positions_B1S,
        mask=Mask(query_positions_BT=positions_BT, key_positions_BKS=positions_B1S),
    )


def with_room(buffer: Tensor, used: int, new: Tensor) -> Tensor:
    """The buffer [..., slots, width] to write `new` into, with room for `used` slots: itself where that is safe, a copy
    where autograd or a lack of room asks for one."""
    missing = used - buffer.shape[-2]
    if missing > 0:
        # Doubling keeps the copies of token-by-token growth linear in the final length.
        return F.pad(buffer, (0, 0, 0, max(missing, buffer.shape[-2])))
    if torch.is_grad_enabled() and (new.requires_grad or buffer.requires_grad):
        # Earlier steps of the graph hold this buffer for their backward pass.
        return buffer.clone()
    return buffer
