"""Evicting caches that count the attention of every key, and may merge the tokens that leave into similar ones.

Sums of attention go with the entries, from the tail into `kept` and through the ring. What merging means is said by
`attnzoo.ops.evict_merge.MergeRule`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnzoo.kvcache import compressed as cc
from attnzoo.kvcache.base import CacheSize, CacheView, Need, NewTokens, ScoreFunction
from attnzoo.kvcache.budgets import moments
from attnzoo.kvcache.channels import take_channels
from attnzoo.kvcache.entries import Kept
from attnzoo.kvcache.eviction import EvictingCache, EvictingState
from attnzoo.kvcache.ring import Choice, Ring, StepInfo, put, ring_columns
from attnzoo.ops.accumulated_attention import accumulated_attention
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.evict_merge import Arrival, Merged, Slots, evict_merge_step
from attnzoo.ops.paged_decode import Decoded, Entries


@dataclass
class D2OKept(Kept):
    """accumulated_BKP: accumulated attention of each entry; norms_BKP: norms of the stored keys (option merge);
    merge_counts_BKP: number of tokens that each entry stands for (option merge_counts)."""

    accumulated_BKP: Tensor
    norms_BKP: Tensor | None
    merge_counts_BKP: Tensor | None


@dataclass
class D2ORing(Ring):
    """As `D2OKept`."""

    accumulated_BKR: Tensor
    merge_counts_BKR: Tensor | None


@dataclass
class D2OState(EvictingState):
    """accumulated_BKS: accumulated attention of the tail. moments_BK3: `budgets.moments` of the accumulated attention
    of tokens evicted while the prompt was read. thresholds_BK: the merge threshold, where has_threshold_BK (bool) says
    that there is one yet (option merge)."""

    kept: D2OKept
    ring: D2ORing
    accumulated_BKS: Tensor
    moments_BK3: Tensor
    thresholds_BK: Tensor | None
    has_threshold_BK: Tensor | None

    @property
    def rewinds(self) -> bool:
        return False  # accumulated attention is added to

    def compressed(self) -> Entries:
        entries, counts = super().compressed(), self.kept.merge_counts_BKP
        return entries if counts is None else replace(entries, log_counts_BKS=counts.clamp(min=1).log())

    def tail_columns(self, keys_BKSH: Tensor, values_BKSH: Tensor) -> dict[str, Tensor]:
        accumulated = self.accumulated_BKS[:, :, : keys_BKSH.shape[2]]
        columns = super().tail_columns(keys_BKSH, values_BKSH) | {"accumulated": accumulated}
        if self.kept.merge_counts_BKP is not None:
            columns["merge_counts"] = torch.ones_like(accumulated)
        return columns


class MergingCache(EvictingCache):
    """Base of these policies; `config` has `merge` and `merge_counts`."""

    accumulates = True

    @property
    def merges_uncounted(self) -> bool:
        return self.config.merge and not self.config.merge_counts and not self.lossless

    @property
    def needs(self) -> frozenset[Need]:
        # Accumulated attention needs `tables`; merged entries can only be read through `terms`.
        return frozenset() if self.lossless else frozenset({"tables", "terms"})

    def empty(self, size: CacheSize, *, tail: int, prefix: int = 0, ended: bool = False) -> D2OState:
        return D2OState(**self.parts(size, tail, prefix, ended))

    def parts(self, size: CacheSize, tail: int, prefix: int, ended: bool) -> dict[str, Any]:
        merge, counts = self.config.merge, self.config.merge_counts
        ring = self.window + 1 if ended else 0
        return {
            **super().parts(size, tail, prefix, ended),
            "kept": D2OKept(
                **self.kept_columns(size, prefix),
                accumulated_BKP=size.heads(prefix, dtype=size.sums),
                norms_BKP=size.heads(prefix) if merge else None,
                merge_counts_BKP=size.heads(prefix, dtype=size.sums) if counts else None,
            ),
            "ring": D2ORing(
                **ring_columns(size, ring),
                accumulated_BKR=size.heads(ring, dtype=size.sums),
                merge_counts_BKR=size.heads(ring, dtype=size.sums) if counts else None,
            ),
            "accumulated_BKS": size.heads(0 if self.lossless else tail, dtype=size.sums),
            "moments_BK3": size.heads(3, dtype=torch.float64),
            "thresholds_BK": size.heads(dtype=size.sums) if merge else None,
            "has_threshold_BK": size.heads(dtype=torch.bool) if merge else None,
        }

    def observed(self, state: Any, score_function: ScoreFunction, new: NewTokens, view: CacheView) -> D2OState:
        if self.lossless:
            return state
        seen, kept_slots = cc.joined(state, view), state.slots
        mask = Mask(query_positions_BT=new.step.positions_BT, key_positions_BKS=seen.positions_BKS)
        logs = state.compressed().log_counts_BKS if kept_slots else None
        if logs is not None:
            logs = torch.cat([logs, logs.new_zeros(*logs.shape[:2], view.keys_BKSH.shape[2])], dim=2)
        accumulated_BKS = accumulated_attention(
            new.q_BNTH,
            seen.keys_BKSH,
            mask=mask,
            counts_B=new.step.counts_B,
            tables=score_function.tables(mask, new.tokens),
            log_counts_BKS=logs,
            impl=score_function.impl,
        )
        slots, total = state.tail.keys_BKSH.shape[2], state.accumulated_BKS
        if total.shape[2] < slots:
            total = torch.cat([total, total.new_zeros(*total.shape[:2], slots - total.shape[2])], dim=2)
        total[:, :, : accumulated_BKS.shape[2] - kept_slots] += accumulated_BKS[:, :, kept_slots:]
        if kept_slots:
            state.kept.accumulated_BKP += accumulated_BKS[:, :, :kept_slots]
        return replace(state, accumulated_BKS=total)

    def threshold(self, state: D2OState) -> Tensor:
        if state.thresholds_BK is None or state.has_threshold_BK is None:
            return super().threshold(state)
        return torch.where(state.has_threshold_BK, state.thresholds_BK, torch.nan)

    def after_eviction(
        self, state: D2OState, entries: Mapping[str, Tensor], evict_BKS: Tensor, merged: Merged
    ) -> D2OState:
        return replace(
            state,
            accumulated_BKS=state.accumulated_BKS[:, :, :0].clone(),
            moments_BK3=state.moments_BK3 + moments(entries["accumulated"], evict_BKS),
            **self._thresholds(merged.threshold_BK),
        )

    def _thresholds(self, threshold_BK: Tensor) -> dict[str, Any]:
        """The fields of a state with this threshold, NaN for none."""
        if not self.config.merge:
            return {}
        return {"thresholds_BK": threshold_BK.nan_to_num(nan=0.0), "has_threshold_BK": ~threshold_BK.isnan()}

    def _replaced(self, state: Any, now: StepInfo, choice: Choice, read: Decoded, score_function: ScoreFunction) -> Any:
        kept = state.kept
        if read.accumulated_BKS is not None:
            added_BKS = read.accumulated_BKS
            if now.active_B is not None:
                added_BKS = added_BKS * now.active_B[:, None, None]
            kept.accumulated_BKP += added_BKS[:, :, : state.slots]
            state.ring.accumulated_BKR += added_BKS[:, :, state.slots :]
        arriving, entries = now.leaving_columns(state.ring), state.compressed()
        for name, channels_BKC in (("keys", entries.channels_BKC), ("values", entries.value_channels_BKV)):
            if channels_BKC is not None:
                arriving[name] = take_channels(arriving[name][:, :, None], channels_BKC)[:, :, 0]
        if not self.config.merge:
            put(kept, choice, arriving)
            return self._filled(state, now, choice)
        assert read.dots_BKP is not None
        threshold_BK = evict_merge_step(
            Slots(
                keys_BKPC=kept.keys_BKPC,
                values_BKPV=kept.values_BKPV,
                norms_BKP=kept.norms_BKP,
                merge_counts_BKP=kept.merge_counts_BKP,
            ),
            victim_BK=choice.victim_BK,
            dots_BKP=read.dots_BKP,
            arrival=Arrival(
                key_BKC=arriving.pop("keys"),
                value_BKV=arriving.pop("values"),
                slot_BK=None if choice.grows_B is None else choice.slot_BK,
            ),
            rule=self.rule,
            threshold_BK=self.threshold(state),
            impl=score_function.impl,
        )
        put(kept, choice, arriving)
        return self._filled(state, now, choice, **self._thresholds(threshold_BK))
