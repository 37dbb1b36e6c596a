"""Caches that keep a fixed number of tokens: each new token evicts another. Policies differ in which token they evict
and whether they merge it into one that stays.

While the prompt is read, the tail is the full cache. `compress` puts what stays into `kept`; from then on the newest
tokens pass through a ring of whole entries (`ring`). The oldest token of the ring takes the slot of the token that is
evicted, so that no entry is ever shifted. The token to evict is chosen before a step, so that attention can compare its
key with the others while it reads them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnzoo.kvcache import compressed as cc
from attnzoo.kvcache.base import CachedLayer, CacheSize, CacheView, NewTokens, ScoreFunction
from attnzoo.kvcache.budgets import asked_tokens
from attnzoo.kvcache.compressed import CompressingCache
from attnzoo.kvcache.entries import Kept, KeptState, kept_columns, packed
from attnzoo.kvcache.ring import (
    Choice,
    Ring,
    StepInfo,
    enter,
    put,
    read_ring,
    ring_columns,
    ringed,
    step_info,
    with_room,
)
from attnzoo.kvcache.state import State
from attnzoo.ops.common.rows import places_or_none
from attnzoo.ops.evict_merge import Merged, MergeRule, evict_merge
from attnzoo.ops.paged_decode import Decoded
from attnzoo.types import accumulation_dtype


@dataclass
class EvictingState(KeptState):
    """ring: the newest entries once the prompt has ended and a token has to leave. budgets_B: tokens to keep, from the
    end of the prompt on."""

    ring: Ring
    budgets_B: Tensor

    @property
    def decoding(self) -> bool:
        """Whether new tokens enter the ring."""
        return self.ring.slots > 0

    @property
    def rewinds(self) -> bool:
        return not self.decoding  # entries of the ring are replaced

    def shares(self, after: Any) -> bool:
        if self.decoding and isinstance(after, EvictingState):
            return after.ring.keys_BKRH is self.ring.keys_BKRH
        return super().shares(after)

    def tail_slots(self, length: int, row: int) -> int:
        # One slot of the ring awaits the next token.
        return min(length, self.ring.slots - 1) if self.decoding else super().tail_slots(length, row)


class EvictingCache(CompressingCache):
    """Base of evicting policies. Subclasses define `priorities`; `config` is a `TokenOptions`."""

    accumulates = False
    """Whether a step needs the attention of every key."""
    rule = MergeRule(kind="drop")
    window = 0
    """Tokens besides the newest whose keys keep all channels."""
    recent_share = 0.25
    """Share of the most recent tokens among the kept tokens that are not sinks."""
    shared = False
    """Whether the kv heads of a layer keep the same tokens."""
    thins = False
    """Whether keys or values lose channels when a prompt ends, however short it is."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.compiles = not self.lossless

    @property
    def lossless(self) -> bool:
        return bool(self.config.lossless)

    @property
    def resumes(self) -> int | None:
        return None if self.accumulates else 0

    def priorities(self, positions_BKS: Tensor, entries: Mapping[str, Tensor]) -> Tensor:
        """priority_BKS of each entry; the lowest is evicted first. entries: what else is known of them, by name."""
        raise NotImplementedError

    def layer_budgets(self, layers: Sequence[CachedLayer], asked_B: Tensor) -> list[Tensor]:
        """budgets_B (tokens to keep) of each layer; by default the same for all."""
        return [asked_B for _ in layers]

    def thin(self, state: Any) -> Any:
        """Called when the kept entries of a prompt are final: policies that prune channels do it here."""
        return state

    def observed(self, state: Any, score_function: ScoreFunction, new: NewTokens, view: CacheView) -> Any:
        """The state after a chunk whose queries read the kept entries and a view of the tail."""
        return state

    def empty(self, size: CacheSize, *, tail: int, prefix: int = 0, ended: bool = False) -> EvictingState:
        return EvictingState(**self.parts(size, tail, prefix, ended))

    def parts(self, size: CacheSize, tail: int, prefix: int, ended: bool) -> dict[str, Any]:
        """The fields of the state."""
        return {
            **cc.empty_tail(self, size, tail),
            "kept": Kept(**self.kept_columns(size, prefix)),
            "held_B": size.zeros(dtype=torch.int64),
            "ring": Ring(**ring_columns(size, self.window + 1 if ended else 0)),
            "budgets_B": size.zeros(dtype=torch.int64),
        }

    def kept_columns(self, size: CacheSize, slots: int) -> dict[str, Tensor]:
        """The fields of `kept` with that many slots."""
        return kept_columns(size, slots, size.head_dim, size.head_dim)

    def compressed_nbytes(self, size: CacheSize, prompt: int, *, tokens: int = 0, joinable: bool = False) -> int:
        budget = prompt if self.lossless else self.budget(prompt)
        started = self.thins or joinable
        if self.lossless or (prompt + tokens <= budget and not started):
            # Nothing was evicted: the state is a full cache, here one that was made for exactly these tokens.
            return self.nbytes(size, prompt + tokens)
        slots = max(1, min(budget, prompt if started else budget) - self.window)
        while slots < min(budget, prompt + tokens) - self.window:
            slots = min(budget - self.window, cc.pages(slots + 1))
        return self.empty(replace(size, device="meta"), tail=0, prefix=slots, ended=True).nbytes()

    def budget(self, prompt: int) -> int:
        """Tokens kept of a prompt of this length, where layers have equal budgets."""
        return int(self._asked(torch.tensor([prompt]))[0])

    def why_whole(self, prompt: int, context: int) -> str:
        if self.lossless:
            return super().why_whole(prompt, context)
        return (
            f"{self.describe()} keeps at least {self.budget(prompt)} tokens after a prompt of {prompt}, and there are "
            f"{context}"
        )

    def _asked(self, lengths_B: Tensor) -> Tensor:
        config = self.config
        return asked_tokens(lengths_B, config.ratio, config.max_tokens, cc.least_kept(config))

    def read(self, state: Any, score_function: ScoreFunction, new: NewTokens) -> tuple[Tensor, EvictingState]:
        starts_B = new.step.positions_BT[:, 0]
        if not self.lossless and not state.decoding:
            # Whether a sequence whose prompt has ended exceeds its budget with this chunk.
            over_B = state.ended_B & (starts_B + new.tokens > state.budgets_B)
            if bool(over_B.any()):
                state = self._for_decoding(CachedLayer(state, score_function, starts_B), state.budgets_B)
        if state.decoding:
            outputs = []
            for t in range(new.tokens):
                out, state = self._step(state, score_function, new, t)
                outputs.append(out)
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2), state
        state, view = cc.append(state, new)
        o_BNTH = cc.attend(state, score_function, new.q_BNTH, view, new.step.positions_BT)
        return o_BNTH, self.observed(state, score_function, new, view)

    def _step(self, state: Any, score_function: ScoreFunction, new: NewTokens, t: int) -> tuple[Tensor, EvictingState]:
        """(o_BN1H, state) for token t of each sequence; sequences without one keep their state.

        The new token enters the ring, attention reads `kept` and ring, and the oldest token of the ring takes the slot
        of the evicted one. A sequence below its budget takes an empty slot instead. All operations are batched, and
        depend on no values once there is room, so that a step can be compiled.
        """
        q, k, v = (x[:, :, t : t + 1] for x in (new.q_BNTH, new.k_BKTH, new.v_BKTH))
        if not torch.compiler.is_compiling():
            state = with_room(state, self.window, new.step.positions_BT[:, t])
        now = new.step.once(step_info, t, k.shape[1], self.window)
        choice = self._choose(state, now)
        enter(state.ring, k, v, now)
        read = read_ring(
            state, score_function, q, now, choice, probe=self.rule.kind != "drop", accumulate=self.accumulates
        )
        return read.out_BNTH, self._replaced(state, now, choice, read, score_function)

    def _choose(self, state: EvictingState, now: StepInfo) -> Choice:
        """What a layer decides before attention."""
        positions, budgets_B = state.kept.positions_BKP, state.budgets_B
        rank = self.priorities(positions, state.kept.columns()).expand_as(positions)
        if self.shared:
            rank = rank.mean(1, keepdim=True).expand_as(rank)
        rank = torch.where(self.protected(positions, budgets_B, now.at_B + 1), torch.inf, rank)
        held, grows_B = state.all_held(), None
        if not held:
            # A sequence at its budget must not take an empty slot, one below it takes the first.
            rank = torch.where(state.empty(), torch.inf, rank)
        slot_BK = victim_BK = rank.argmin(-1)
        if not held:
            grows_B = now.at_B < budgets_B
            slot_BK = torch.where(grows_B[:, None], state.held_B[:, None], slot_BK)
            victim_BK = torch.where(grows_B[:, None], -1, victim_BK)
        if now.some_leave:
            leaves_B1 = (now.leaving_B >= 0)[:, None]
            slot_BK = torch.where(leaves_B1, slot_BK, -1)
            victim_BK = slot_BK if grows_B is None else torch.where(leaves_B1, victim_BK, -1)
        into = places_or_none(slot_BK, positions.shape[2])
        return Choice(slot_BK, into, victim_BK, held, grows_B, positions.shape[2])

    def _replaced(self, state: Any, now: StepInfo, choice: Choice, read: Decoded, score_function: ScoreFunction) -> Any:
        """The state once the token that leaves the ring has taken the chosen slot."""
        put(state.kept, choice, now.leaving_columns(state.ring))
        return self._filled(state, now, choice)

    def _filled(self, state: Any, now: StepInfo, choice: Choice, **changes: Any) -> Any:
        if choice.grows_B is not None:
            changes["held_B"] = state.held_B + (choice.grows_B & (now.leaving_B >= 0))
        return replace(state, **changes) if changes else state

    def ready(self, state: EvictingState, at_B: Tensor) -> EvictingState:
        if not state.decoding:
            raise ValueError("this state is not joinable: end its prompt with compress(state, joinable=True)")
        return with_room(state, self.window, at_B)

    def compress(self, layers: Sequence[CachedLayer], final: bool) -> list[Any]:
        lengths_B = layers[0].lengths_B
        asked_B = lengths_B if self.lossless else self._asked(lengths_B)
        budgets = [asked_B] * len(layers) if self.lossless else self.layer_budgets(layers, asked_B)
        states: list[State] = []
        for layer, budgets_B in zip(layers, budgets, strict=True):
            state = layer.state
            over = not self.lossless and bool((lengths_B > budgets_B).any())
            if over or (final and self.thins):
                state = self._for_decoding(layer, budgets_B) if final else self._evicted(layer, budgets_B)
            # Sequences within their budgets stay uncompressed until a token exceeds them.
            if final:
                state = replace(state, budgets_B=budgets_B.clone(), ended_B=torch.ones_like(state.ended_B))
            states.append(state)
        return states

    def to_joinable(self, layers: Sequence[CachedLayer]) -> list[Any]:
        # A prompt within its budget has no ring yet.
        return [
            layer.state if self.lossless or layer.state.decoding else self._for_decoding(layer, layer.state.budgets_B)
            for layer in layers
        ]

    def _for_decoding(self, layer: CachedLayer, budgets_B: Tensor) -> Any:
        """The state for decoding: the newest `window` tokens in the ring, the others in `kept`."""
        return self.thin(ringed(self._evicted(layer, budgets_B), layer.lengths_B, self.window))

    def _evicted(self, layer: CachedLayer, budgets_B: Tensor) -> Any:
        """The state after eviction and merging: all entries that stay are in `kept`, and the tail is empty."""
        state, lengths_B = layer.state, layer.lengths_B
        entries = state.entries(lengths_B)
        keys = entries["keys"]
        positions_BKS = entries["positions"].expand(keys.shape[:3])
        keep = self._kept(positions_BKS, self.priorities(positions_BKS, entries), budgets_B, lengths_B)
        evict = (positions_BKS >= 0) & ~keep
        merged = evict_merge(
            keys,
            entries["values"],
            keep_BKS=keep,
            evict_BKS=evict,
            slots=int(keep.sum(-1).max()),
            rule=self.rule,
            threshold_BK=self.threshold(state),
            merge_counts_BKS=entries.get("merge_counts"),
            impl=layer.score_function.impl,
        )
        nothing = state.tail.keys_BKSH[:, :, :0]
        after = replace(
            state,
            kept=packed(state.kept, merged, entries),
            held_B=keep[:, 0].sum(-1),
            # New memory: a view of no slots would keep the whole buffer alive.
            tail=cc.FullCacheState(nothing.clone(), nothing.clone()),
            starts_B=lengths_B.clone(),
        )
        return self.after_eviction(after, entries, evict, merged)

    def threshold(self, state: Any) -> Tensor:
        """threshold_BK of merging, NaN for none yet."""
        keys = state.tail.keys_BKSH
        return keys.new_full(keys.shape[:2], torch.nan, dtype=accumulation_dtype(keys.dtype))

    def after_eviction(self, state: Any, entries: Mapping[str, Tensor], evict_BKS: Tensor, merged: Merged) -> Any:
        """The state after an eviction, with what else a policy remembers of those who left."""
        return state

    def _kept(self, positions_BKS: Tensor, priority_BKS: Tensor, budgets_B: Tensor, lengths_B: Tensor) -> Tensor:
        """keep_BKS (bool): sinks, the most recent tokens, and of the others those of the highest priority."""
        held = positions_BKS >= 0
        protected = self.protected(positions_BKS, budgets_B, lengths_B) & held
        rank = priority_BKS.masked_fill(protected, torch.inf).masked_fill(~held, -torch.inf)
        if self.shared:
            rank = rank.mean(1, keepdim=True).expand_as(rank)
        order = rank.argsort(dim=-1, descending=True, stable=True)
        within = torch.arange(order.shape[-1], device=order.device) < budgets_B[:, None, None]
        return torch.zeros_like(held).scatter_(-1, order, within.expand_as(order)) & held

    def protected(self, positions_BKS: Tensor, budgets_B: Tensor, lengths_B: Tensor) -> Tensor:
        """protected_BKS (bool): sinks and the most recent tokens."""
        # In the dtype of the positions: a comparison of two dtypes would copy them.
        first_recent_B = (lengths_B - self.recents(budgets_B)).to(positions_BKS.dtype)
        return (positions_BKS < self.config.sinks) | (positions_BKS >= first_recent_B[:, None, None])

    def recents(self, budgets_B: Tensor) -> Tensor:
        """How many of the newest tokens must stay."""
        share_B = ((budgets_B - self.config.sinks) * self.recent_share).long()
        return torch.minimum(share_B.clamp(min=max(1, self.window)), budgets_B - self.config.sinks - 1)
