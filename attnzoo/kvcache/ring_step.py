"""A decode step of evicting caches.

The new token enters the ring, and attention reads prefix and ring. Then the evicted token is merged into the token of
the most similar key (attention has computed the products with all keys as one more row), and the oldest token of the
ring takes its slot. A sequence below its budget takes an empty slot instead. All operations are batched.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.kvcache import compressed as cc
from attnzoo.kvcache.base import CacheView, ScoreFunction
from attnzoo.kvcache.channels import take_channels
from attnzoo.kvcache.compressed import CompressedState, Prefix, Ring
from attnzoo.ops.common.recent import recent
from attnzoo.ops.common.rows import Places, known, places, places_or_none
from attnzoo.ops.evict_merge import Arrival, Slots, evict_merge_step
from attnzoo.ops.paged_decode import Decoded, Entries

QKV = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class StepInfo:
    """What all layers share in a step. at_B: position of the new token. active_B: sequences that get a token, None:
    all. entering, leaving: ring slots of the new token (in active sequences) and of the token that leaves the ring.
    leaving_B: position of the latter, below 0 where none leaves; some_leave: none leaves in some sequences. ring_full:
    every slot of the ring holds a token. On a GPU, which is not waited for: some_leave is True, ring_full False."""

    at_B: Tensor
    active_B: Tensor | None
    entering: Places
    leaving: Places
    leaving_B: Tensor
    some_leave: bool
    ring_full: bool


@dataclass(frozen=True)
class _Choice:
    """What a layer decides before attention. slot_BK: the prefix slot for the token that leaves the ring, -1 where none
    leaves; into: the same as `Places`. victim_BK: slot_BK where that slot holds a token, else -1 (the same tensor where
    both are equal). held: no slot is empty. slots: P."""

    slot_BK: Tensor
    into: Places
    victim_BK: Tensor
    held: bool
    slots: int

    @property
    def victims(self) -> Places:
        if self.victim_BK is self.slot_BK:
            return self.into
        return places_or_none(self.victim_BK, self.slots)


@recent
def step_info(positions_BT: Tensor, counts_B: Tensor | None, t: int, kv_heads: int, window: int) -> StepInfo:
    """`StepInfo` of token t of a chunk; rows with fewer tokens are inactive."""
    at_B, slots = positions_BT[:, t], window + 1
    active_B = None if counts_B is None else counts_B > t
    if active_B is not None and known(active_B):
        active_B = None
    leaving_B = at_B - window
    if active_B is not None:
        leaving_B = leaving_B.masked_fill(~active_B, -1)

    def slot_of(position_B: Tensor) -> Tensor:
        return (position_B % slots)[:, None].expand(-1, kv_heads)

    active_BK = None if active_B is None else active_B[:, None].expand(-1, kv_heads)
    return StepInfo(
        at_B=at_B,
        active_B=active_B,
        entering=places(slot_of(at_B), slots, active_BK),
        leaving=places(slot_of(leaving_B.clamp(min=0)), slots),
        leaving_B=leaving_B,
        some_leave=not known(leaving_B >= 0),
        ring_full=window == 0 or known(at_B >= window),
    )


def step(
    policy: Any, state: CompressedState, score_function: ScoreFunction, qkv: QKV, now: StepInfo
) -> tuple[Tensor, CompressedState]:
    """(o_BN1H, state) for one token of each sequence, (q_BN1H, k_BK1H, v_BK1H); inactive sequences keep their state.

    `state` must have room (`with_room`). The operations do not depend on values, so that a step can be compiled.
    """
    choice = _choose(policy, state, now)
    ring = state.ring
    assert ring is not None
    _enter(ring, qkv[1], qkv[2], now)
    if score_function.relative and "terms" not in score_function.says:
        # The variant's own operation, which reads keys that are whole.
        out_BN1H = _edited(_read_whole(state, score_function, qkv[0], now), state, score_function, qkv[0], now)
        return out_BN1H, _replaced(policy, state, score_function, (now, choice), Decoded(out_BNTH=out_BN1H))
    probe = None
    if policy.rule.kind != "drop":
        probe = choice.victims.take(state.prefix.keys_BKPC)
    decoded = cc.read(
        score_function,
        qkv[0],
        now.at_B[:, None],
        cc.prefix_entries(state, score_function, held=choice.held),
        _ring_entries(ring, now, seen=now.ring_full and not score_function.relative),
        probe_BKC=probe,
        accumulated_attention=policy.accumulates,
    )
    if decoded.accumulated_BKS is not None:
        _accumulate(state.prefix, ring, decoded.accumulated_BKS, now.active_B)
    out_BN1H = _edited(decoded.out_BNTH, state, score_function, qkv[0], now)
    return out_BN1H, _replaced(policy, state, score_function, (now, choice), decoded)


def _edited(
    out_BN1H: Tensor, state: CompressedState, score_function: ScoreFunction, q_BN1H: Tensor, now: StepInfo
) -> Tensor:
    """The output with edits, where there are any: before the step changes prefix and ring."""
    if score_function.edits is None:
        return out_BN1H
    assert state.ring is not None
    segments = [cc.placed_prefix(state), _ring_entries(state.ring, now, seen=False)]
    return score_function.edits(out_BN1H, q_BN1H, now.at_B[:, None], segments)


def _read_whole(state: CompressedState, score_function: ScoreFunction, q_BN1H: Tensor, now: StepInfo) -> Tensor:
    """o_BN1H over prefix and ring, of a policy that needs nothing else of the variant."""
    assert state.ring is not None
    entries = _ring_entries(state.ring, now, seen=False)
    assert entries.positions_BKS is not None
    ring = CacheView(entries.keys_BKSC, entries.values_BKSV, entries.positions_BKS)
    return score_function.attend(q_BN1H, cc.joined(state, ring), now.at_B[:, None])


def _choose(policy: Any, state: CompressedState, now: StepInfo) -> _Choice:
    taken, budgets_B = state.prefix.places_BKP, state.budgets_B
    assert taken is not None
    rank = policy.priorities(taken, state.prefix.accumulated_BKP, taken.shape[1]).expand_as(taken)
    if policy.shared:
        rank = rank.mean(1, keepdim=True).expand_as(rank)
    # Empty slots are protected: a sequence at its budget must not take one.
    rank = torch.where(policy.protected(taken, budgets_B, now.at_B + 1), torch.inf, rank)
    held = cc.all_held(state)
    if not held:
        growing_B11 = (now.at_B < budgets_B)[:, None, None]
        rank = rank.masked_fill_((taken == 0) & growing_B11, -torch.inf)
    slot_BK = victim_BK = rank.argmin(-1)
    if now.some_leave:
        slot_BK = victim_BK = torch.where((now.leaving_B >= 0)[:, None], slot_BK, -1)
    if not held:
        there_BK = taken.gather(-1, slot_BK.clamp(min=0)[..., None])[..., 0] > 0
        victim_BK = torch.where(there_BK, slot_BK, -1)
    into = places_or_none(slot_BK, taken.shape[2])
    return _Choice(slot_BK=slot_BK, into=into, victim_BK=victim_BK, held=held, slots=taken.shape[2])


def _enter(ring: Ring, k_BK1H: Tensor, v_BK1H: Tensor, now: StepInfo) -> None:
    """The new token in its slot of the ring, with no accumulated attention yet and a merge count of one."""
    now.entering.put(ring.keys_BKRH, k_BK1H[:, :, 0])
    now.entering.put(ring.values_BKRH, v_BK1H[:, :, 0])
    for numbers, first in ((ring.accumulated_BKR, 0.0), (ring.merge_counts_BKR, 1.0)):
        if numbers is not None:
            now.entering.fill(numbers, first)


def _ring_entries(ring: Ring, now: StepInfo, *, seen: bool) -> Entries:
    """The newest R tokens as `paged_decode` reads them. seen: all slots may be seen, so positions are not needed."""
    positions_B1R = None
    if not seen:
        slots, at_B1 = ring.keys_BKRH.shape[2], now.at_B[:, None]
        age_BR = (at_B1 - torch.arange(slots, device=at_B1.device)) % slots
        positions_B1R = (at_B1 - age_BR)[:, None]
    return Entries(
        keys_BKSC=ring.keys_BKRH,
        values_BKSV=ring.values_BKRH,
        positions_BKS=positions_B1R,
        log_counts_BKS=None if ring.merge_counts_BKR is None else ring.merge_counts_BKR.clamp(min=1).log(),
    )


def _accumulate(prefix: Prefix, ring: Ring, accumulated_BKS: Tensor, active_B: Tensor | None) -> None:
    assert prefix.accumulated_BKP is not None
    assert ring.accumulated_BKR is not None
    if active_B is not None:
        accumulated_BKS = accumulated_BKS * active_B[:, None, None]
    prefix.accumulated_BKP += accumulated_BKS[:, :, : prefix.slots]
    ring.accumulated_BKR += accumulated_BKS[:, :, prefix.slots :]


def _replaced(
    policy: Any,
    state: CompressedState,
    score_function: ScoreFunction,
    both: tuple[StepInfo, _Choice],
    decoded: Decoded,
) -> CompressedState:
    """Merges the victim, and puts the token that leaves the ring into the chosen slot of the prefix."""
    prefix, ring, thresholds = state.prefix, state.ring, state.thresholds_BK
    (now, choice), leaving = both, both[0].leaving
    assert ring is not None
    assert prefix.places_BKP is not None
    arrival = Arrival(
        key_BKC=_thinned(leaving.take(ring.keys_BKRH), prefix.channels_BKC),
        value_BKV=_thinned(leaving.take(ring.values_BKRH), prefix.value_channels_BKV),
        slot_BK=choice.slot_BK,
    )
    norms = prefix.norms_BKP
    dots = decoded.dots_BKP
    slots = Slots(
        keys_BKPC=prefix.keys_BKPC,
        values_BKPV=prefix.values_BKPV,
        norms_BKP=prefix.keys_BKPC.new_empty(prefix.keys_BKPC.shape[:3]) if norms is None else norms,
        merge_counts_BKP=prefix.merge_counts_BKP,
    )
    after = evict_merge_step(
        slots,
        victim_BK=choice.victim_BK,
        dots_BKP=slots.norms_BKP if dots is None else dots,
        arrival=arrival,
        rule=policy.rule,
        threshold_BK=slots.norms_BKP[..., 0]
        if thresholds is None
        else torch.where(thresholds == 0, torch.nan, thresholds - 2),
        impl=score_function.impl,
    )
    _put(choice.into, prefix.places_BKP, (now.leaving_B + 1)[:, None].expand_as(choice.slot_BK))
    for mine, theirs in (
        (prefix.accumulated_BKP, ring.accumulated_BKR),
        (prefix.merge_counts_BKP, ring.merge_counts_BKR),
    ):
        if mine is not None and theirs is not None:
            _put(choice.into, mine, leaving.take(theirs))
    if thresholds is not None:
        thresholds = torch.nan_to_num(after + 2, nan=0.0)
    return replace(state, thresholds_BK=thresholds)


def _put(into: Places, x_BKP: Tensor, new_BK: Tensor) -> None:
    into.put(x_BKP, new_BK)


def _thinned(row_BKH: Tensor, channels_BKC: Tensor | None) -> Tensor:
    if channels_BKC is None or channels_BKC.shape[2] == 0:
        return row_BKH
    return take_channels(row_BKH[:, :, None], channels_BKC)[:, :, 0]


def with_room(policy: Any, state: CompressedState, at_B: Tensor) -> CompressedState:
    """The state with a page more in the prefix, if a sequence below its budget has no empty slot at this step."""
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
