"""The state of compressed caches, and attention over it: a compressed prefix, then a tail of uncompressed entries.

Before `compress` the prefix is empty and the tail is the full cache. Autograd is refused: evicted tokens have no
gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.kvcache.base import EMPTY, CachePolicy, CacheView, ScoreFunction, check_chunk
from attnzoo.kvcache.full import FullCache, FullCacheState
from attnzoo.kvcache.state import STATIC, State, new_zeros
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.common.rows import known
from attnzoo.ops.paged_decode import Decoded, Entries, paged_decode
from attnzoo.types import accumulation_dtype, dtype_bytes

FULL = FullCache()
PAGE = 64
"""A tail grows by multiples of this many slots."""
BLOCK_BYTES = 64 << 20
"""Bytes of attention scores over a compressed cache that are computed at once."""


@dataclass
class Prefix(State):
    """The compressed entries, in P slots per kv head. places_BKP: int32 position + 1, 0 for an empty slot; None: slot s
    holds position s, up to where the tail starts. channels_BKC, value_channels_BKV (int64): the channels stored of keys
    and values; [B, K, 0] means all. accumulated_BKP: accumulated attention of each entry; norms_BKP: norms of the
    stored keys; merge_counts_BKP: number of tokens that each entry stands for.
    """

    keys_BKPC: Tensor
    values_BKPV: Tensor
    channels_BKC: Tensor | None = None
    value_channels_BKV: Tensor | None = None
    places_BKP: Tensor | None = None
    accumulated_BKP: Tensor | None = None
    norms_BKP: Tensor | None = None
    merge_counts_BKP: Tensor | None = None

    @property
    def slots(self) -> int:
        return self.keys_BKPC.shape[2]

    def map_entries(self, fn: Callable[[Tensor], Tensor]) -> "Prefix":
        """The prefix with `fn` applied to all tensors that have a slot axis."""
        return self.map(lambda name, x: x if name.endswith(("channels_BKC", "channels_BKV")) else fn(x))


@dataclass
class Ring(State):
    """The newest R = window + 1 entries, uncompressed, position p in slot p mod R. R is 0 before that is needed."""

    keys_BKRH: Tensor
    values_BKRH: Tensor
    accumulated_BKR: Tensor | None = None
    merge_counts_BKR: Tensor | None = None


@dataclass
class CompressedState(State):
    """The prefix, then either the tail, whose slot s holds position starts_B + s, or the ring.

    queries_BNWH: the last W queries, the newest last (N axis 0 where they are not needed). accumulated_BKS: accumulated
    attention of the tail. moments_BK3: `budgets.moments` of the accumulated attention of tokens evicted while the
    prompt was read. budgets_B: tokens to keep (all of the prompt where nothing is evicted), 0 until `compress`.
    thresholds_BK: the merge threshold plus 2; 0 means that there is none yet.
    """

    prefix: Prefix
    tail: FullCacheState
    starts_B: Tensor
    budgets_B: Tensor
    queries_BNWH: Tensor | None = None
    accumulated_BKS: Tensor | None = None
    moments_BK3: Tensor | None = None
    thresholds_BK: Tensor | None = None
    ring: Ring | None = None
    policy: Any = field(default=None, compare=False, metadata=STATIC)

    @property
    def rewinds(self) -> bool:
        # The tail alone: entries of the ring are replaced, and accumulated attention is added to.
        return self.accumulated_BKS is None and (self.ring is None or self.ring.keys_BKRH.shape[2] == 0)

    def shares(self, after: Any) -> bool:
        if not isinstance(after, CompressedState):
            return False
        if self.ring is not None and after.ring is not None and self.ring.keys_BKRH.shape[2]:
            return after.ring.keys_BKRH is self.ring.keys_BKRH
        return self.tail.shares(after.tail)


def empty_state(
    policy: CachePolicy,
    batch: int,
    num_kv_heads: int,
    head_dim: int,
    capacity: int,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype,
) -> CompressedState:
    """A state with an empty prefix and a tail with room for `capacity` tokens per sequence."""

    def zeros(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return new_zeros(batch, *shape, device=device, dtype=kind)

    entries = (num_kv_heads, 0, head_dim)
    return CompressedState(
        prefix=Prefix(zeros(*entries), zeros(*entries)),
        tail=FULL.init(batch, num_kv_heads, head_dim, capacity, device=device, dtype=dtype),
        starts_B=zeros(kind=torch.int64),
        budgets_B=zeros(kind=torch.int64),
        policy=policy,
    )


def empty_bytes(batch: int, num_kv_heads: int, head_dim: int, capacity: int, dtype: torch.dtype) -> int:
    """Bytes of `empty_state`."""
    return batch * (2 * num_kv_heads * capacity * head_dim * dtype_bytes(dtype) + 16)


def least_kept(config: Any) -> int:
    """The fewest tokens that a policy with `TokenOptions` keeps of a longer prompt."""
    if config.max_tokens is not None:
        return int(config.least)
    return int(max(config.least, PAGE if config.min_tokens is None else config.min_tokens))


def reading(state: CompressedState) -> bool:
    """Whether the prompt is still being read: `compress` has not set budgets yet."""
    return not bool((state.budgets_B > 0).any())


def check_call(q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor) -> None:
    """Raises ValueError where gradients would be silently wrong, and for a chunk without tokens."""
    check_chunk(k_BKTH)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q_BNTH, k_BKTH, v_BKTH)):
        raise ValueError("a compressed cache has no gradients: extend under torch.no_grad(), or use cache=None")


def append(
    state: CompressedState, k_BKTH: Tensor, v_BKTH: Tensor, positions_BT: Tensor, counts_B: Tensor | None
) -> tuple[CompressedState, CacheView]:
    """Appends a chunk to the tail: (new state, view of the tail with logical positions)."""
    starts_B1 = state.starts_B[:, None]
    tail = state.tail
    if state.prefix.slots or not reading(state):
        # The tail grows by pages instead of doubling, to keep memory after the prompt small.
        needed = int((positions_BT[:, 0] - state.starts_B).max()) + positions_BT.shape[1]
        tail = FullCacheState(paged(tail.keys_BKSH, needed), paged(tail.values_BKSH, needed))
    tail, view = FULL.append(tail, k_BKTH, v_BKTH, positions_BT - starts_B1, counts_B)
    if state.prefix.slots:
        places = torch.where(view.positions_BKS >= 0, view.positions_BKS + starts_B1[:, None], EMPTY)
        view = CacheView(view.keys_BKSH, view.values_BKSH, places)
    return replace(state, tail=tail), view


def paged(buffer_BKSX: Tensor, needed: int) -> Tensor:
    """The buffer with at least `needed` slots, in whole pages where it grows."""
    missing = needed - buffer_BKSX.shape[2]
    if missing <= 0:
        return buffer_BKSX
    return F.pad(buffer_BKSX, (0, 0, 0, pages(needed) - buffer_BKSX.shape[2]))


def pages(slots: int) -> int:
    """`slots` rounded up to whole pages."""
    return -(-slots // PAGE) * PAGE


def prefix_positions(state: CompressedState) -> Tensor:
    """positions_BKP (int64, `EMPTY` in empty slots); the K axis is 1 where all kv heads keep the same tokens."""
    prefix = state.prefix
    if prefix.places_BKP is not None:
        return prefix.places_BKP.long() - 1
    slots_P = torch.arange(prefix.slots, device=state.starts_B.device)
    return torch.where(slots_P < state.starts_B[:, None], slots_P, EMPTY)[:, None]


def all_held(state: CompressedState) -> bool:
    """Whether every slot of the prefix holds an entry. False on a GPU, where looking would mean to wait for it."""
    prefix = state.prefix
    if state.starts_B.device.type != "cpu":
        return False
    if prefix.places_BKP is not None:
        return known(prefix.places_BKP.amin() > 0)
    return known(state.starts_B.min() >= prefix.slots)


def prefix_entries(state: CompressedState, score_function: ScoreFunction, *, held: bool) -> Entries:
    """The prefix in the form that `paged_decode` reads. held: every slot holds an entry."""
    prefix = state.prefix
    log_counts = None if prefix.merge_counts_BKP is None else prefix.merge_counts_BKP.clamp(min=1).log()
    # Kernels skip empty slots by their positions; in torch it is cheaper to give empty slots a log count of -inf.
    placed = score_function.relative or state.starts_B.device.type != "cpu"
    if not placed and not held:
        some = torch.zeros((), dtype=accumulation_dtype(prefix.keys_BKPC.dtype)) if log_counts is None else log_counts
        log_counts = torch.where(_empty(state), -torch.inf, some).expand(prefix.keys_BKPC.shape[:3])
    return Entries(
        keys_BKSC=prefix.keys_BKPC,
        values_BKSV=prefix.values_BKPV,
        positions_BKS=prefix_positions(state) if placed else None,
        channels_BKC=_stored(prefix.channels_BKC),
        value_channels_BKV=_stored(prefix.value_channels_BKV),
        log_counts_BKS=log_counts,
    )


def _empty(state: CompressedState) -> Tensor:
    """empty_BKP (bool): prefix slots without an entry; K axis 1 where all kv heads keep the same tokens."""
    return prefix_positions(state) < 0 if state.prefix.places_BKP is None else state.prefix.places_BKP == 0


def _stored(channels_BKC: Tensor | None) -> Tensor | None:
    return None if channels_BKC is None or channels_BKC.shape[2] == 0 else channels_BKC


def whole(state: CompressedState) -> bool:
    """Whether the prefix's entries have all channels and count as one token: any attention can read them."""
    prefix = state.prefix
    return (
        _stored(prefix.channels_BKC) is None
        and _stored(prefix.value_channels_BKV) is None
        and (prefix.merge_counts_BKP is None or prefix.slots == 0)
    )


def attend(
    state: CompressedState, score_function: ScoreFunction, q_BNTH: Tensor, view: CacheView, positions_BT: Tensor
) -> Tensor:
    """o_BNTH over the prefix and a view of the tail."""
    out_BNTH = _unedited(state, score_function, q_BNTH, view, positions_BT)
    if score_function.edits is None:
        return out_BNTH
    tail = Entries(keys_BKSC=view.keys_BKSH, values_BKSV=view.values_BKSH, positions_BKS=view.positions_BKS)
    segments = [tail] if state.prefix.slots == 0 else [placed_prefix(state), tail]
    return score_function.edits(out_BNTH, q_BNTH, positions_BT, segments)


def placed_prefix(state: CompressedState) -> Entries:
    """The prefix with the positions of its entries, -1 in empty slots."""
    prefix = state.prefix
    return Entries(
        keys_BKSC=prefix.keys_BKPC,
        values_BKSV=prefix.values_BKPV,
        positions_BKS=prefix_positions(state),
        channels_BKC=_stored(prefix.channels_BKC),
        value_channels_BKV=_stored(prefix.value_channels_BKV),
        log_counts_BKS=None if prefix.merge_counts_BKP is None else prefix.merge_counts_BKP.clamp(min=1).log(),
    )


def _unedited(
    state: CompressedState, score_function: ScoreFunction, q_BNTH: Tensor, view: CacheView, positions_BT: Tensor
) -> Tensor:
    if state.prefix.slots == 0:
        return score_function.attend(q_BNTH, view, positions_BT)
    if whole(state) and (q_BNTH.shape[2] > 1 or "terms" not in score_function.says):
        return score_function.attend(q_BNTH, joined(state, view), positions_BT)
    tail = Entries(keys_BKSC=view.keys_BKSH, values_BKSV=view.values_BKSH, positions_BKS=view.positions_BKS)
    prefix = prefix_entries(state, score_function, held=all_held(state))
    return read(score_function, q_BNTH, positions_BT, prefix, tail).out_BNTH


def joined(state: CompressedState, view: CacheView) -> CacheView:
    """Prefix and tail as one view, for a prefix with all channels."""
    prefix, places = state.prefix, prefix_positions(state)
    return CacheView(
        torch.cat([prefix.keys_BKPC, view.keys_BKSH], dim=2),
        torch.cat([prefix.values_BKPV, view.values_BKSH], dim=2),
        _concatenated(places, view.positions_BKS),
    )


def read(
    score_function: ScoreFunction,
    q_BNTH: Tensor,
    positions_BT: Tensor,
    prefix: Entries,
    tail: Entries,
    *,
    probe_BKC: Tensor | None = None,
    accumulated_attention: bool = False,
) -> Decoded:
    """`paged_decode` with the variant's scores, in blocks of queries whose scores take about `BLOCK_BYTES`.

    Entries must have positions where the score function is relative.
    """
    batch, num_heads, tokens, _ = q_BNTH.shape
    rows = max(1, BLOCK_BYTES // max(1, batch * num_heads * (prefix.slots + tail.slots) * 4))
    keys_BKS = None
    if score_function.relative:
        assert prefix.positions_BKS is not None
        assert tail.positions_BKS is not None
        keys_BKS = _concatenated(prefix.positions_BKS, tail.positions_BKS)
    parts = []
    for first in range(0, tokens, rows):
        block = slice(first, first + rows)
        content, bias = q_BNTH[:, :, block], None
        if keys_BKS is not None:
            mask = Mask(query_positions_BT=positions_BT[:, block], key_positions_BKS=keys_BKS)
            content, bias = score_function.terms(content, mask)
        parts.append(
            paged_decode(
                content,
                prefix,
                tail,
                query_positions_BT=positions_BT[:, block],
                bias_BNTS=bias,
                probe_BKC=probe_BKC,
                accumulated_attention=accumulated_attention,
                impl=score_function.impl,
            )
        )
    if len(parts) == 1:
        return parts[0]
    assert not accumulated_attention, "the operation accumulated_attention sums over many queries"
    return replace(parts[0], out_BNTH=torch.cat([part.out_BNTH for part in parts], dim=2))


def _concatenated(first_BKS: Tensor, second_BKS: Tensor) -> Tensor:
    """Positions of two segments, concatenated; the K axis stays 1 where both have 1."""
    heads = max(first_BKS.shape[1], second_BKS.shape[1])
    return torch.cat([first_BKS.expand(-1, heads, -1), second_BKS.expand(-1, heads, -1)], dim=2)


def last_queries(before_BNWH: Tensor | None, q_BNTH: Tensor, counts_B: Tensor | None, most: int) -> Tensor:
    """The last `most` real queries of before_BNWH followed by q_BNTH, newest last; fewer if no sequence has as many.
    Shorter sequences have zeros in front."""
    batch, heads, tokens, head_dim = q_BNTH.shape
    if before_BNWH is None or before_BNWH.shape[1] == 0:
        before_BNWH = q_BNTH.new_zeros(batch, heads, 0, head_dim)
    width = min(most, before_BNWH.shape[2] + tokens)
    rows = torch.cat([front_padded(before_BNWH, width), q_BNTH], dim=2)
    if counts_B is None:
        return rows[:, :, tokens:].clone()
    index_BW = counts_B[:, None] + torch.arange(width, device=q_BNTH.device)
    return rows.gather(2, index_BW[:, None, :, None].expand(-1, heads, -1, head_dim))


def front_padded(queries_BNWH: Tensor, width: int) -> Tensor:
    """The queries with zeros in front, `width` in all."""
    return F.pad(queries_BNWH, (0, 0, width - queries_BNWH.shape[2], 0))


def observed_bytes(batch: int, num_heads: int, head_dim: int, queries: int, dtype: torch.dtype) -> int:
    """Bytes of `queries` observed queries of every head."""
    return batch * num_heads * head_dim * queries * dtype_bytes(dtype)


@dataclass(frozen=True)
class Occupied:
    """What one sequence occupies in a layer's state. tokens: how many have keys and values stored, in the kv head that
    stores most; nbytes: bytes of these, with all that is stored for them; thinned: whether some lost channels."""

    tokens: int
    nbytes: int
    thinned: bool


def occupied(state: CompressedState, row: int, length: int) -> Occupied:
    """`Occupied` of the sequence in `row`, which has seen `length` tokens. Empty slots are not counted."""
    prefix, tail = state.prefix, length - int(state.starts_B[row])
    entries = int(state.starts_B[row])
    if prefix.places_BKP is not None:
        entries = int((prefix.places_BKP[row] > 0).sum(-1).max()) if prefix.slots else 0
    ring = 0 if state.ring is None else state.ring.keys_BKRH.shape[2]
    if ring:  # one slot awaits the next token, the others hold the newest ones; there is no tail
        tail = 0
    total = 0
    for name, x in state.rows(slice(row, row + 1)).tensors().items():
        growing = name.startswith("tail.") or name == "accumulated_BKS"
        if name.startswith("prefix.") and "channels" not in name:
            total += x.nbytes * entries // max(1, prefix.slots)
        else:
            total += x.nbytes * tail // max(1, x.shape[2]) if growing else x.nbytes
    thinned = entries > 0 and not (_stored(prefix.channels_BKC) is None and _stored(prefix.value_channels_BKV) is None)
    return Occupied(entries + (min(length, ring - 1) if ring else tail), total, thinned)
