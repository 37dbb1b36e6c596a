"""The ring of evicting caches: the newest entries, whole, through which each new token passes before it is kept.

`ringed` fills it when decoding begins. A step calls, in this order, `with_room`, `step_info`, `enter`, `read_ring` and
`put`.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.kvcache import compressed as cc
from attnzoo.kvcache.base import CacheSize, CacheView, ScoreFunction
from attnzoo.kvcache.state import State
from attnzoo.ops.common.rows import Places, known, places, places_or_none
from attnzoo.ops.common.step_inputs import StepInputs
from attnzoo.ops.paged_decode import Decoded, Entries


@dataclass
class Ring(State):
    """The newest R = window + 1 entries, position p in slot p mod R. R is 0 before decoding begins."""

    keys_BKRH: Tensor
    values_BKRH: Tensor

    @property
    def slots(self) -> int:
        return self.keys_BKRH.shape[2]


def ring_columns(size: CacheSize, slots: int) -> dict[str, Tensor]:
    """The fields of a `Ring` without an entry."""
    return {"keys_BKRH": size.heads(slots, size.head_dim), "values_BKRH": size.heads(slots, size.head_dim)}


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

    def leaving_columns(self, ring: Ring) -> dict[str, Tensor]:
        """What is known of the token that leaves, by the names of the columns of `kept`."""
        found = {name: self.leaving.take(x) for name, x in ring.columns().items()}
        return found | {"positions": self.leaving_B[:, None].expand_as(self.leaving.place_BK)}


@dataclass(frozen=True)
class Choice:
    """What a layer decides before attention. slot_BK: the slot of `kept` for the token that leaves the ring, -1 where
    none leaves; into: the same as `Places`. victim_BK: slot_BK where that slot holds a token, else -1. held: no slot is
    empty. grows_B (bool): sequences that take an empty slot, None: none, and both slots are equal. slots: P."""

    slot_BK: Tensor
    into: Places
    victim_BK: Tensor
    held: bool
    grows_B: Tensor | None
    slots: int

    @property
    def victims(self) -> Places:
        """`Places` of the tokens that are evicted."""
        if self.grows_B is None:
            return self.into
        return places_or_none(self.victim_BK, self.slots)


def ringed(state: Any, lengths_B: Tensor, window: int) -> Any:
    """Moves the newest `window` entries of `kept`, whose positions ascend, into the ring."""
    held_B, slots_R = state.held_B, torch.arange(window + 1, device=lengths_B.device)
    # The newest position before the next token that belongs into each slot of the ring, which the next one's is not.
    ages_BR = (lengths_B[:, None] - 1 - slots_R) % (window + 1)
    index_BR = held_B[:, None] - 1 - ages_BR
    gone_BR = (ages_BR == window) | (lengths_B[:, None] - 1 - ages_BR < 0)
    index_BR, columns = index_BR.clamp(min=0), state.kept.columns()

    def moved(name: str, _: Tensor) -> Tensor:
        x = columns[name.rpartition("_")[0]]
        shape = (*x.shape[:2], window + 1, *x.shape[3:])
        index, gone = ((y[:, None, :, None] if x.dim() == 4 else y[:, None]) for y in (index_BR, gone_BR))
        return x.gather(2, index.expand(shape)).masked_fill(gone, 0)

    left_B = (held_B - window).clamp(min=0)
    slots = max(1, int(left_B.max()))
    empty_B1P = (torch.arange(slots, device=left_B.device) >= left_B[:, None])[:, None]

    def cut(_: str, x: Tensor) -> Tensor:
        return x[:, :, :slots].masked_fill(empty_B1P[..., None] if x.dim() == 4 else empty_B1P, 0)

    return replace(state, ring=state.ring.map(moved), kept=state.kept.map(cut), held_B=left_B)


def with_room(state: Any, window: int, at_B: Tensor) -> Any:
    """The state with a page more in `kept`, if a sequence below its budget has no empty slot at this step."""
    budgets_B = state.budgets_B
    most = int(budgets_B.max()) - window
    if state.slots >= most:
        return state
    allowed_B = torch.minimum(budgets_B - window, at_B + 1 - window)
    if int(allowed_B.max()) <= state.slots:
        return state
    pad = (0, min(most, cc.pages(state.slots + 1)) - state.slots)
    return replace(state, kept=state.kept.map(lambda _, x: F.pad(x, (0, 0, *pad) if x.dim() == 4 else pad)))


def step_info(step: StepInputs, t: int, kv_heads: int, window: int) -> StepInfo:
    """`StepInfo` of token t of a chunk; rows with fewer tokens are inactive."""
    at_B, slots = step.positions_BT[:, t], window + 1
    active_B = None if step.counts_B is None else step.counts_B > t
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


def enter(ring: Ring, k_BK1H: Tensor, v_BK1H: Tensor, now: StepInfo) -> None:
    """The new token in its slot of the ring, with no accumulated attention yet and a merge count of one."""
    now.entering.put(ring.keys_BKRH, k_BK1H[:, :, 0])
    now.entering.put(ring.values_BKRH, v_BK1H[:, :, 0])
    for name, numbers in ring.columns().items():
        if numbers.dim() == 3:
            now.entering.fill(numbers, float(name == "merge_counts"))


def read_ring(
    state: Any,
    score_function: ScoreFunction,
    q_BN1H: Tensor,
    now: StepInfo,
    choice: Choice,
    *,
    probe: bool,
    accumulate: bool,
) -> Decoded:
    """Attention over `kept` and ring. probe: also products of the victims' keys with all of `kept`; accumulate: also
    the attention of every key."""
    ring, at_B1 = state.ring, now.at_B[:, None]
    if score_function.relative and "terms" not in score_function.says:
        # The variant's own operation, which reads keys that are whole.
        entries = ring_entries(ring, now, seen=False)
        assert entries.positions_BKS is not None
        view = CacheView(entries.keys_BKSC, entries.values_BKSV, entries.positions_BKS)
        read = Decoded(out_BNTH=score_function.attend(q_BN1H, cc.joined(state, view), at_B1))
    else:
        read = cc.read(
            score_function,
            q_BN1H,
            at_B1,
            cc.prefix_entries(state, score_function, held=choice.held),
            ring_entries(ring, now, seen=now.ring_full and not score_function.relative),
            probe_BKC=choice.victims.take(state.kept.keys_BKPC) if probe else None,
            accumulated_attention=accumulate,
        )
    if score_function.edits is None:
        return read
    segments = [state.placed(choice.held), ring_entries(ring, now, seen=False)]
    return replace(read, out_BNTH=score_function.edits(read.out_BNTH, q_BN1H, at_B1, segments))


def ring_entries(ring: Ring, now: StepInfo, *, seen: bool) -> Entries:
    """The newest R tokens as `paged_decode` reads them. seen: all slots may be seen, so positions are not needed."""
    positions_B1R = None
    if not seen:
        slots, at_B1 = ring.slots, now.at_B[:, None]
        age_BR = (at_B1 - torch.arange(slots, device=at_B1.device)) % slots
        positions_B1R = (at_B1 - age_BR)[:, None]
    counts = ring.columns().get("merge_counts")
    return Entries(
        keys_BKSC=ring.keys_BKRH,
        values_BKSV=ring.values_BKRH,
        positions_BKS=positions_B1R,
        log_counts_BKS=None if counts is None else counts.clamp(min=1).log(),
    )


def put(kept: State, choice: Choice, arriving: dict[str, Tensor]) -> None:
    """Writes an entry, by columns, into the chosen slots of `kept`."""
    mine = kept.columns()
    for name, new in arriving.items():
        choice.into.put(mine[name], new)
