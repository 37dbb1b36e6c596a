"""Evicting caches: all entries of prefix and tail in one set of tensors, and a new state from those that stay."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnzoo.kvcache import compressed as cc
from attnzoo.kvcache.base import CacheView
from attnzoo.kvcache.compressed import CompressedState, Prefix
from attnzoo.kvcache.full import FullCacheState
from attnzoo.ops.evict_merge import Merged
from attnzoo.types import accumulation_dtype


def all_entries(state: CompressedState, lengths_B: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Any, Any]]:
    """positions_BKS (K axis 1 before the first eviction), and (keys, values, accumulated attention, merge counts) of
    prefix and tail."""
    used = int((lengths_B - state.starts_B).max())
    slots_S = torch.arange(used, device=lengths_B.device)
    at_BS = state.starts_B[:, None] + slots_S
    places = torch.where(at_BS < lengths_B[:, None], at_BS, -1)[:, None]
    keys, values = state.tail.keys_BKSH[:, :, :used], state.tail.values_BKSH[:, :, :used]
    accumulated = None if state.accumulated_BKS is None else state.accumulated_BKS[:, :, :used]
    merge_counts = (
        None
        if state.prefix.merge_counts_BKP is None
        else keys.new_ones(keys.shape[:3], dtype=state.prefix.merge_counts_BKP.dtype)
    )
    if state.prefix.slots == 0:
        return places, (keys, values, accumulated, merge_counts)
    prefix = state.prefix
    view = cc.joined(state, CacheView(keys, values, places))
    accumulated = (
        None
        if accumulated is None or prefix.accumulated_BKP is None
        else torch.cat([prefix.accumulated_BKP, accumulated], dim=2)
    )
    merge_counts = (
        None
        if merge_counts is None or prefix.merge_counts_BKP is None
        else torch.cat([prefix.merge_counts_BKP, merge_counts], dim=2)
    )
    return view.positions_BKS, (view.keys_BKSH, view.values_BKSH, accumulated, merge_counts)


def packed(
    state: CompressedState, merged: Merged, places_BKS: Tensor, accumulated_BKS: Tensor | None, lengths_B: Tensor
) -> CompressedState:
    """The state with the merged entries as its prefix and an empty tail."""
    index, empty = merged.source_BKM.clamp(min=0), merged.source_BKM < 0

    def picked(x_BKS: Tensor) -> Tensor:
        return x_BKS.expand(*empty.shape[:2], -1).gather(-1, index).masked_fill(empty, 0)

    old = state.prefix
    prefix = Prefix(
        keys_BKPC=merged.keys_BKMC,
        values_BKPV=merged.values_BKMV,
        channels_BKC=old.channels_BKC,
        value_channels_BKV=old.value_channels_BKV,
        places_BKP=picked(places_BKS + 1).to(torch.int32),
        accumulated_BKP=None if accumulated_BKS is None else picked(accumulated_BKS),
        norms_BKP=None if old.norms_BKP is None else stored_norms(merged.keys_BKMC, empty),
        merge_counts_BKP=merged.merge_counts_BKM,
    )
    nothing = state.tail.keys_BKSH[:, :, :0]
    return replace(
        state,
        prefix=prefix,
        # New memory: a view of no slots would keep the whole buffer alive.
        tail=FullCacheState(nothing.clone(), nothing.clone()),
        starts_B=lengths_B.clone(),
        accumulated_BKS=None if state.accumulated_BKS is None else state.accumulated_BKS[:, :, :0].clone(),
    )


def stored_norms(keys_BKPC: Tensor, empty_BKP: Tensor) -> Tensor:
    """Norms of keys, 0 for empty slots, in the keys' dtype."""
    exact = keys_BKPC.to(accumulation_dtype(keys_BKPC.dtype))
    return exact.norm(dim=-1).masked_fill(empty_BKP, 0.0).to(keys_BKPC.dtype)
