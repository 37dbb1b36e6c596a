"""Caches that keep a fixed number of tokens: each new token evicts another. Policies differ in which token they evict
and whether they merge it into one that stays.

While the prompt is read, the tail is the full cache. `compress` puts what stays into the prefix; from then on the
newest tokens pass through a ring of uncompressed entries. The oldest token of the ring takes the slot of the token that
is evicted from the prefix, so that no entry is ever shifted. The token to evict is chosen before a step, so that
attention can compare its key with the others while it reads them.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnzoo.kvcache import compressed as cc
from attnzoo.kvcache.base import CachedLayer, CachePolicy, CacheView, Need, ScoreFunction
from attnzoo.kvcache.budgets import asked_tokens, moments
from attnzoo.kvcache.compressed import CompressedState, Ring
from attnzoo.kvcache.entries import all_entries, packed
from attnzoo.kvcache.ring_start import ringed
from attnzoo.kvcache.ring_step import step, step_info, with_room
from attnzoo.kvcache.state import new_zeros
from attnzoo.ops.accumulated_attention import accumulated_attention
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.evict_merge import MergeRule, evict_merge
from attnzoo.types import accumulation_dtype, dtype_bytes

QKV = tuple[Tensor, Tensor, Tensor]


class EvictingCache(CachePolicy):
    """Base of evicting policies. Subclasses define `priorities`; `config` is a `TokenOptions`."""

    accumulates = False
    """Whether priorities need the accumulated attention of every key."""
    rule = MergeRule(kind="drop")
    merge_counts = False
    window = 0
    """Tokens besides the newest whose keys keep all channels."""
    recent_share = 0.25
    """Share of the most recent tokens among the kept tokens that are not sinks."""
    shared = False
    """Whether the kv heads of a layer keep the same tokens."""
    thins = False
    """Whether keys or values lose channels when a prompt ends, however short it is."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def prefill(self) -> str:
        return str(self.config.prefill)

    @property
    def merges_uncounted(self) -> bool:
        return self.rule.kind != "drop" and not self.merge_counts and not self.config.lossless

    def priorities(self, taken_BKS: Tensor, accumulated_BKS: Tensor | None, kv_heads: int) -> Tensor:
        """priority_BKS of each token; the lowest is evicted first. taken_BKS: position + 1, 0 for none."""
        raise NotImplementedError

    def layer_budgets(self, layers: Sequence[CachedLayer], asked_B: Tensor) -> list[Tensor]:
        """budgets_B (tokens to keep) of each layer; by default the same for all."""
        return [asked_B for _ in layers]

    def thin(self, state: CompressedState) -> CompressedState:
        """Called when the prefix of a prompt is final: policies that prune channels do it here."""
        return state

    def init(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> CompressedState:
        state = cc.empty_state(self, batch, num_kv_heads, head_dim, capacity, device=device, dtype=dtype)
        if self.config.lossless:
            return state
        exact = accumulation_dtype(dtype)

        def zeros(*shape: int, kind: torch.dtype) -> Tensor:
            return new_zeros(batch, *shape, device=device, dtype=kind)

        heads = (num_kv_heads,)
        prefix = replace(
            state.prefix,
            places_BKP=zeros(*heads, 0, kind=torch.int32),
            accumulated_BKP=zeros(*heads, 0, kind=exact) if self.accumulates else None,
            norms_BKP=zeros(*heads, 0, kind=dtype) if self.rule.kind != "drop" else None,
            merge_counts_BKP=zeros(*heads, 0, kind=exact) if self.merge_counts else None,
        )
        ring = Ring(
            zeros(*heads, 0, head_dim, kind=dtype),
            zeros(*heads, 0, head_dim, kind=dtype),
            zeros(*heads, 0, kind=exact) if self.accumulates else None,
            zeros(*heads, 0, kind=exact) if self.merge_counts else None,
        )
        return replace(
            state,
            prefix=prefix,
            ring=ring,
            accumulated_BKS=zeros(*heads, capacity, kind=exact) if self.accumulates else None,
            moments_BK3=zeros(*heads, 3, kind=torch.float64) if self.accumulates else None,
            thresholds_BK=zeros(*heads, kind=exact) if self.rule.kind != "drop" else None,
        )

    def nbytes(self, batch: int, num_kv_heads: int, head_dim: int, capacity: int, dtype: torch.dtype) -> int:
        total = cc.empty_bytes(batch, num_kv_heads, head_dim, capacity, dtype)
        if not self.config.lossless:
            accumulated = num_kv_heads * capacity * dtype_bytes(accumulation_dtype(dtype)) * int(self.accumulates)
            total += batch * (self._fixed_bytes(num_kv_heads, dtype) + accumulated)
        return total

    def _fixed_bytes(self, num_kv_heads: int, dtype: torch.dtype) -> int:
        """Moments and thresholds."""
        threshold = dtype_bytes(accumulation_dtype(dtype)) if self.rule.kind != "drop" else 0
        return num_kv_heads * (24 * int(self.accumulates) + threshold)

    def key_width(self, head_dim: int) -> int:
        """Channels of a key of the prefix."""
        return head_dim

    def value_width(self, head_dim: int) -> int:
        """Channels of a value of the prefix."""
        return head_dim

    def index_bytes(self, head_dim: int) -> int:
        """Bytes of channel indices per kv head."""
        return 0

    def compressed_nbytes(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        prompt: int,
        dtype: torch.dtype,
        *,
        tokens: int = 0,
        joinable: bool = False,
    ) -> int:
        budget = prompt if self.config.lossless else self.budget(prompt)
        started = self.thins or joinable
        if self.config.lossless or (prompt + tokens <= budget and not started):
            # Nothing was evicted: the state is a full cache, here one that was made for exactly these tokens.
            return self.nbytes(batch, num_kv_heads, head_dim, prompt + tokens, dtype)
        width, exact = dtype_bytes(dtype), dtype_bytes(accumulation_dtype(dtype))
        extra = exact * (int(self.accumulates) + int(self.merge_counts))
        entry = width * (self.key_width(head_dim) + self.value_width(head_dim)) + 4 + extra
        entry += width if self.rule.kind != "drop" else 0
        ring = (self.window + 1) * (2 * head_dim * width + extra)
        slots = max(1, min(budget, prompt if started else budget) - self.window)
        while slots < min(budget, prompt + tokens) - self.window:
            slots = min(budget - self.window, cc.pages(slots + 1))
        per_head = slots * entry + ring + self.index_bytes(head_dim)
        return batch * (16 + num_kv_heads * per_head + self._fixed_bytes(num_kv_heads, dtype))

    def budget(self, prompt: int) -> int:
        """Tokens kept of a prompt of this length, where layers have equal budgets."""
        return int(self._asked(torch.tensor([prompt]))[0])

    def why_whole(self, prompt: int, context: int) -> str:
        if self.config.lossless:
            return super().why_whole(prompt, context)
        return (
            f"{self.describe()} keeps at least {self.budget(prompt)} tokens after a prompt of {prompt}, and there are "
            f"{context}"
        )

    @property
    def needs(self) -> frozenset[Need]:
        if self.config.lossless:
            return frozenset()
        # Accumulated attention needs `tables`; merged or pruned entries can only be read through `terms`.
        plain = self.rule.kind == "drop" and not self.merge_counts and not self.thins and not self.accumulates
        tables: frozenset[Need] = frozenset({"tables"} if self.accumulates else ())
        return tables if plain else tables | {"terms"}

    def _asked(self, lengths_B: Tensor) -> Tensor:
        config = self.config
        return asked_tokens(lengths_B, config.ratio, config.max_tokens, cc.least_kept(config))

    def recents(self, budgets_B: Tensor) -> Tensor:
        """How many of the newest tokens must stay."""
        share_B = ((budgets_B - self.config.sinks) * self.recent_share).long()
        return torch.minimum(share_B.clamp(min=max(1, self.window)), budgets_B - self.config.sinks - 1)

    def attend(
        self,
        state: CompressedState,
        score_function: ScoreFunction,
        qkv: QKV,
        positions_BT: Tensor,
        counts_B: Tensor | None,
    ) -> tuple[Tensor, CompressedState]:
        cc.check_call(*qkv)
        if not self.config.lossless and self._exceeds_budgets(state, positions_BT):
            state = self._for_decoding(CachedLayer(state, score_function, positions_BT[:, 0]), state.budgets_B)
        if state.ring is not None and state.ring.keys_BKRH.shape[2]:
            return self._one_by_one(state, score_function, qkv, positions_BT, counts_B)
        state, view = cc.append(state, qkv[1], qkv[2], positions_BT, counts_B)
        o_BNTH = cc.attend(state, score_function, qkv[0], view, positions_BT)
        if self.accumulates and not self.config.lossless:
            state = self._accumulated(state, score_function, qkv[0], view, positions_BT, counts_B)
        return o_BNTH, state

    def _exceeds_budgets(self, state: CompressedState, positions_BT: Tensor) -> bool:
        """Whether this chunk exceeds the budget of a sequence whose prompt has ended."""
        assert state.ring is not None
        if state.ring.keys_BKRH.shape[2]:
            return False
        after_B = positions_BT[:, 0] + positions_BT.shape[1]
        return bool(((state.budgets_B > 0) & (after_B > state.budgets_B)).any())

    def _one_by_one(
        self,
        state: CompressedState,
        score_function: ScoreFunction,
        qkv: QKV,
        positions_BT: Tensor,
        counts_B: Tensor | None,
    ) -> tuple[Tensor, CompressedState]:
        outputs = []
        for t in range(positions_BT.shape[1]):
            one = (qkv[0][:, :, t : t + 1], qkv[1][:, :, t : t + 1], qkv[2][:, :, t : t + 1])
            if not torch.compiler.is_compiling():
                state = with_room(self, state, positions_BT[:, t])
            out, state = step(
                self, state, score_function, one, step_info(positions_BT, counts_B, t, one[1].shape[1], self.window)
            )
            outputs.append(out)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2), state

    def _accumulated(
        self,
        state: CompressedState,
        score_function: ScoreFunction,
        q_BNTH: Tensor,
        view: CacheView,
        positions_BT: Tensor,
        counts_B: Tensor | None,
    ) -> CompressedState:
        """Adds the attention of a chunk to the accumulated attention of prefix and tail."""
        seen = view if state.prefix.slots == 0 else cc.joined(state, view)
        mask = Mask(query_positions_BT=positions_BT, key_positions_BKS=seen.positions_BKS)
        merge_counts = None
        if state.prefix.merge_counts_BKP is not None and state.prefix.slots:
            kept = state.prefix.merge_counts_BKP.clamp(min=1).log()
            merge_counts = torch.cat([kept, kept.new_zeros(*kept.shape[:2], view.keys_BKSH.shape[2])], dim=2)
        accumulated_BKS = accumulated_attention(
            q_BNTH,
            seen.keys_BKSH,
            mask=mask,
            counts_B=counts_B,
            tables=score_function.tables(mask, q_BNTH.shape[2]),
            log_counts_BKS=merge_counts,
            impl=score_function.impl,
        )
        assert state.accumulated_BKS is not None
        slots, kept_slots = state.tail.keys_BKSH.shape[2], state.prefix.slots
        total = state.accumulated_BKS
        if total.shape[2] < slots:
            total = torch.cat([total, total.new_zeros(*total.shape[:2], slots - total.shape[2])], dim=2)
        total[:, :, : accumulated_BKS.shape[2] - kept_slots] += accumulated_BKS[:, :, kept_slots:]
        if kept_slots and state.prefix.accumulated_BKP is not None:
            state.prefix.accumulated_BKP += accumulated_BKS[:, :, :kept_slots]
        return replace(state, accumulated_BKS=total)

    @property
    def compiles(self) -> bool:
        return not self.config.lossless

    def ready(self, state: CompressedState, at_B: Tensor) -> CompressedState:
        if state.ring is None or state.ring.keys_BKRH.shape[2] == 0:
            raise ValueError("this state is not joinable: end its prompt with compress(state, joinable=True)")
        return with_room(self, state, at_B)

    def compress(self, layers: Sequence[CachedLayer], final: bool) -> list[Any]:
        lengths_B = layers[0].lengths_B
        if self.config.lossless:
            return [replace(layer.state, budgets_B=lengths_B.clone()) if final else layer.state for layer in layers]
        budgets = self.layer_budgets(layers, self._asked(lengths_B))
        states = []
        for layer, budgets_B in zip(layers, budgets, strict=True):
            state = layer.state
            over = bool((lengths_B > budgets_B).any())
            if over or (final and self.thins):
                state = self._for_decoding(layer, budgets_B) if final else self._evicted(layer, budgets_B)
            # Sequences within their budgets stay uncompressed until a token exceeds them.
            states.append(replace(state, budgets_B=budgets_B.clone()) if final else state)
        return states

    def to_joinable(self, layers: Sequence[CachedLayer]) -> list[Any]:
        # A prompt within its budget has no ring yet.
        return [
            layer.state
            if self.config.lossless or layer.state.ring.keys_BKRH.shape[2]
            else self._for_decoding(layer, layer.state.budgets_B)
            for layer in layers
        ]

    def _for_decoding(self, layer: CachedLayer, budgets_B: Tensor) -> CompressedState:
        """The state for decoding: the newest `window` tokens in the ring, the others in the prefix."""
        state = replace(self._evicted(layer, budgets_B), budgets_B=budgets_B)
        return self.thin(ringed(state, layer.lengths_B, self.window))

    def _evicted(self, layer: CachedLayer, budgets_B: Tensor) -> CompressedState:
        """The state after eviction and merging: all entries that stay are in the prefix, and the tail is empty."""
        state, lengths_B = layer.state, layer.lengths_B
        entries = all_entries(state, lengths_B)
        places, (keys, values, accumulated, merge_counts) = entries
        kv_heads = keys.shape[1]
        held = places >= 0
        priority = self.priorities(places + 1, accumulated, kv_heads).expand(-1, kv_heads, -1)
        keep = self._kept(places.expand(-1, kv_heads, -1), priority, budgets_B, lengths_B)
        evict = held & ~keep
        slots = int(keep.sum(-1).max())
        before = None if state.thresholds_BK is None else state.thresholds_BK
        threshold = keys.new_full(keys.shape[:2], torch.nan, dtype=accumulation_dtype(keys.dtype))
        if before is not None:
            threshold = torch.where(before == 0, torch.nan, before - 2)
        merged = evict_merge(
            keys,
            values,
            keep_BKS=keep,
            evict_BKS=evict,
            slots=slots,
            rule=self.rule,
            threshold_BK=threshold,
            merge_counts_BKS=merge_counts,
            impl=layer.score_function.impl,
        )
        counted = state.moments_BK3
        if counted is not None and accumulated is not None:
            counted = counted + moments(accumulated, evict)
        return replace(
            packed(state, merged, places, accumulated, lengths_B),
            moments_BK3=counted,
            thresholds_BK=None if before is None else torch.nan_to_num(merged.threshold_BK + 2, nan=0.0),
        )

    def _kept(self, places_BKS: Tensor, priority_BKS: Tensor, budgets_B: Tensor, lengths_B: Tensor) -> Tensor:
        """keep_BKS (bool): sinks, the most recent tokens, and of the others those of the highest priority."""
        protected = self.protected(places_BKS + 1, budgets_B, lengths_B)
        rank = priority_BKS.masked_fill(protected, torch.inf).masked_fill(places_BKS < 0, -torch.inf)
        if self.shared:
            rank = rank.mean(1, keepdim=True).expand_as(rank)
        order = rank.argsort(dim=-1, descending=True, stable=True)
        within = torch.arange(order.shape[-1], device=order.device) < budgets_B[:, None, None]
        keep = torch.zeros_like(protected).scatter_(-1, order, within.expand_as(order))
        return keep & (places_BKS >= 0)

    def protected(self, taken_BKS: Tensor, budgets_B: Tensor, lengths_B: Tensor) -> Tensor:
        """protected_BKS (bool): sinks, the most recent tokens, and empty slots. taken_BKS: position + 1, 0 for none."""
        # In the dtype of the places: a comparison of two dtypes would copy them.
        first_recent_B = (lengths_B - self.recents(budgets_B)).to(taken_BKS.dtype)
        return (taken_BKS <= self.config.sinks) | (taken_BKS > first_recent_B[:, None, None])
