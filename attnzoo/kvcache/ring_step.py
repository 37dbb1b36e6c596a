"""One token comes, one goes: a decode step of caches that evict.

The new token enters the ring and attention reads prefix and ring; then the token that leaves is merged into its
nearest (its products with all keys were a row of attention's own), and the oldest of the ring takes its slot. A
sequence that may keep more than it has takes an empty slot instead. Every operation is batched over sequences and
heads.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.kvcache import compressed as cc
from attnzoo.kvcache.base import Reader
from attnzoo.kvcache.channels import take_channels
from attnzoo.kvcache.compressed import CompressedState, Prefix, Ring
from attnzoo.ops.evict_merge import Arrival, Slots, evict_merge_step
from attnzoo.ops.paged_decode import Decoded, Entries

QKV = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class _Turn:
    """What the step decides before attention. at_B: position of the new token. leaving_B: the position that leaves the
    ring, below 0 for none. slot_BK: where it goes. victim_BK: what is there, -1 for nothing."""

    at_B: Tensor
    active_B: Tensor | None
    leaving_B: Tensor
    slot_BK: Tensor
    victim_BK: Tensor


def step(
    policy: Any, state: CompressedState, reader: Reader, qkv: QKV, at_B: Tensor, active_B: Tensor | None
) -> tuple[Tensor, CompressedState]:
    """(o_BN1H, state) for one token of each sequence, (q_BN1H, k_BK1H, v_BK1H), at positions `at_B`; inactive sequences
    keep their state."""
    state = _with_room(policy, state, at_B)
    turn = _turn(policy, state, at_B, active_B)
    ring = state.ring
    assert ring is not None
    _enter(ring, qkv[1], qkv[2], turn)
    probe = None
    if policy.rule.kind != "drop":
        index = turn.victim_BK.clamp(min=0)[..., None, None]
        probe = state.prefix.keys_BKPC.gather(2, index.expand(-1, -1, 1, state.prefix.keys_BKPC.shape[3]))[:, :, 0]
    decoded = cc.read(
        reader,
        qkv[0],
        at_B[:, None],
        cc.prefix_entries(state),
        _ring_entries(ring, at_B),
        probe_BKC=probe,
        key_mass=policy.accumulates,
    )
    if decoded.mass_BKS is not None:
        _accumulate(state.prefix, ring, decoded.mass_BKS, active_B)
    return decoded.out_BNTH, _replaced(policy, state, reader, turn, decoded)


def _turn(policy: Any, state: CompressedState, at_B: Tensor, active_B: Tensor | None) -> _Turn:
    places, budgets_B = state.prefix.places_BKP, state.budgets_B
    assert places is not None
    leaving_B = at_B - policy.window
    if active_B is not None:
        leaving_B = leaving_B.masked_fill(~active_B, -1)
    # An empty slot has place 0 and counts as a sink: nobody takes it where a sequence has all it may keep.
    positions = places - 1
    rank = policy.priorities(positions, state.prefix.mass_BKP, places.shape[1]).expand_as(positions)
    if policy.shared:
        rank = rank.mean(1, keepdim=True).expand_as(rank)
    rank = rank.masked_fill(policy.protected(positions, budgets_B, at_B + 1), torch.inf)
    growing_B = at_B < budgets_B
    if bool(growing_B.any()):
        rank = rank.masked_fill((places == 0) & growing_B[:, None, None], -torch.inf)
    slot_BK = rank.argmin(-1)
    taken_BK = places.gather(-1, slot_BK[..., None])[..., 0] > 0
    comes_B1 = (leaving_B >= 0)[:, None]
    return _Turn(
        at_B=at_B,
        active_B=active_B,
        leaving_B=leaving_B,
        slot_BK=torch.where(comes_B1, slot_BK, -1),
        victim_BK=torch.where(comes_B1 & taken_BK, slot_BK, -1),
    )


def _enter(ring: Ring, k_BK1H: Tensor, v_BK1H: Tensor, turn: _Turn) -> None:
    """The new token in its slot of the ring, with no mass yet and one vote."""
    slots = ring.keys_BKRH.shape[2]
    index_B111 = (turn.at_B % slots)[:, None, None, None]
    for buffer, new in ((ring.keys_BKRH, k_BK1H), (ring.values_BKRH, v_BK1H)):
        where = index_B111.expand(-1, buffer.shape[1], 1, buffer.shape[3])
        row = new.to(buffer.dtype)
        if turn.active_B is not None:
            row = torch.where(turn.active_B[:, None, None, None], row, buffer.gather(2, where))
        buffer.scatter_(2, where, row)
    for numbers, first in ((ring.mass_BKR, 0.0), (ring.votes_BKR, 1.0)):
        if numbers is not None:
            where = index_B111[..., 0].expand(-1, numbers.shape[1], 1)
            row = numbers.gather(2, where)
            fresh = (
                turn.active_B[:, None, None] if turn.active_B is not None else torch.ones_like(row, dtype=torch.bool)
            )
            numbers.scatter_(2, where, row.masked_fill(fresh, first))


def _ring_entries(ring: Ring, at_B: Tensor) -> Entries:
    """The ring holds the newest R positions up to `at_B`."""
    slots = ring.keys_BKRH.shape[2]
    age_BR = (at_B[:, None] - torch.arange(slots, device=at_B.device)) % slots
    return Entries(
        keys_BKSC=ring.keys_BKRH,
        values_BKSV=ring.values_BKRH,
        positions_BKS=(at_B[:, None] - age_BR)[:, None],
        log_votes_BKS=None if ring.votes_BKR is None else ring.votes_BKR.clamp(min=1).log(),
    )


def _accumulate(prefix: Prefix, ring: Ring, mass_BKS: Tensor, active_B: Tensor | None) -> None:
    assert prefix.mass_BKP is not None
    assert ring.mass_BKR is not None
    if active_B is not None:
        mass_BKS = mass_BKS * active_B[:, None, None]
    prefix.mass_BKP += mass_BKS[:, :, : prefix.slots]
    ring.mass_BKR += mass_BKS[:, :, prefix.slots :]


def _replaced(policy: Any, state: CompressedState, reader: Reader, turn: _Turn, decoded: Decoded) -> CompressedState:
    """The oldest of the ring in the slot that was chosen, the victim merged."""
    prefix, ring, thresholds = state.prefix, state.ring, state.thresholds_BK
    assert ring is not None
    assert prefix.places_BKP is not None
    source_B = turn.leaving_B.clamp(min=0) % ring.keys_BKRH.shape[2]
    arrival = Arrival(
        key_BKC=_thinned(_ring_rows(ring.keys_BKRH, source_B), prefix.channels_BKC),
        value_BKV=_thinned(_ring_rows(ring.values_BKRH, source_B), prefix.value_channels_BKV),
        slot_BK=turn.slot_BK,
    )
    norms = prefix.norms_BKP
    dots = decoded.dots_BKP
    slots = Slots(
        keys_BKPC=prefix.keys_BKPC,
        values_BKPV=prefix.values_BKPV,
        norms_BKP=prefix.keys_BKPC.new_empty(prefix.keys_BKPC.shape[:3]) if norms is None else norms,
        votes_BKP=prefix.votes_BKP,
    )
    after = evict_merge_step(
        slots,
        victim_BK=turn.victim_BK,
        dots_BKP=slots.norms_BKP if dots is None else dots,
        arrival=arrival,
        rule=policy.rule,
        threshold_BK=slots.norms_BKP[..., 0]
        if thresholds is None
        else torch.where(thresholds == 0, torch.nan, thresholds - 2),
        impl=reader.impl,
    )
    index, comes = turn.slot_BK.clamp(min=0)[..., None], (turn.slot_BK >= 0)[..., None]
    here = (turn.leaving_B + 1).to(torch.int32)[:, None, None].expand_as(index)
    _put(prefix.places_BKP, index, comes, here)
    for mine, theirs in ((prefix.mass_BKP, ring.mass_BKR), (prefix.votes_BKP, ring.votes_BKR)):
        if mine is not None and theirs is not None:
            where = source_B[:, None, None].expand(-1, theirs.shape[1], 1)
            _put(mine, index, comes, theirs.gather(-1, where))
    if thresholds is not None:
        thresholds = torch.nan_to_num(after + 2, nan=0.0)
    return replace(state, thresholds_BK=thresholds)


def _put(x_BKP: Tensor, index_BK1: Tensor, comes_BK1: Tensor, new_BK1: Tensor) -> None:
    x_BKP.scatter_(-1, index_BK1, torch.where(comes_BK1, new_BK1, x_BKP.gather(-1, index_BK1)))


def _ring_rows(x_BKRH: Tensor, source_B: Tensor) -> Tensor:
    index = source_B[:, None, None, None].expand(-1, x_BKRH.shape[1], 1, x_BKRH.shape[3])
    return x_BKRH.gather(2, index)[:, :, 0]


def _thinned(row_BKH: Tensor, channels_BKC: Tensor | None) -> Tensor:
    if channels_BKC is None or channels_BKC.shape[2] == 0:
        return row_BKH
    return take_channels(row_BKH[:, :, None], channels_BKC)[:, :, 0]


def _with_room(policy: Any, state: CompressedState, at_B: Tensor) -> CompressedState:
    """A page more where a sequence has no empty slot, but may keep more than it has."""
    prefix, budgets_B = state.prefix, state.budgets_B
    assert prefix.places_BKP is not None
    most = int(budgets_B.max()) - policy.window
    if prefix.slots >= most:
        return state
    allowed_B = torch.minimum(budgets_B - policy.window, at_B + 1 - policy.window)
    if int(allowed_B.max()) <= prefix.slots:
        return state
    slots = min(most, cc.pages(prefix.slots + 1))

    pad = (0, slots - prefix.slots)
    return replace(state, prefix=prefix.map_entries(lambda x: F.pad(x, (0, 0, *pad) if x.dim() == 4 else pad)))
